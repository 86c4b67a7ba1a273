"""The backend for a kind of device, and why: the one place that decides it."""

import dataclasses

from jaxgpt.errors import UserError
from jaxgpt.model import attention, flash
from jaxgpt.model.backend import PLAIN, Backend
from jaxgpt.model.cpu import CPU
from jaxgpt.model.gpu import GPU
from jaxgpt.model.tpu import TPU
from jaxgpt.settings import ModelConfig

# The attention kernel of a device: its name in `model.attention`, and in the log.
_KERNELS = {"tpu": ("flash", "TPU kernel"), "gpu": ("cudnn", "cuDNN")}


def choose_backend(model: ModelConfig, platform: str, block_size: int) -> tuple[Backend, str]:
    """The backend for training on devices of `platform` ("tpu", "gpu", "cpu"), and how it attends, for the log.

    Raises:
        UserError: model.attention names a kernel that cannot run there; says why.
    """
    backend = {"tpu": TPU, "gpu": GPU, "cpu": CPU}.get(platform, PLAIN)
    kernel, name = _KERNELS.get(platform, ("xla", "XLA"))
    wanted = kernel if model.attention == "auto" else model.attention
    if wanted == "xla":
        return dataclasses.replace(backend, attend=attention.attend if kernel != "xla" else backend.attend), "XLA"
    obstacle = f"it does not run on a {platform}" if wanted != kernel else _obstacle(kernel, model, block_size)
    if not obstacle:
        return backend, name
    if model.attention != "auto":
        raise UserError(f'model.attention = "{wanted}", but {obstacle}; "auto" takes what the device has')
    return dataclasses.replace(backend, attend=attention.attend), f"XLA, slower than {name}, for {obstacle}"


def _obstacle(kernel: str, model: ModelConfig, block_size: int) -> str | None:
    """Why a kernel cannot attend for this model on its own device; None if it can."""
    head_size = model.n_embd // model.n_head
    if model.dropout:
        return f"it has no dropout, and model.dropout = {model.dropout}"
    if kernel == "flash" and head_size not in flash.HEAD_SIZES:
        return f"its heads have {', '.join(map(str, flash.HEAD_SIZES))} entries, and the model's {head_size}"
    if kernel == "flash" and block_size > flash.LONGEST:
        return f"it reads up to {flash.LONGEST} positions, and data.block_size = {block_size}"
    if kernel == "cudnn" and model.dtype == "float32":
        return 'it computes in bfloat16, and model.dtype = "float32"'
    if kernel == "cudnn" and head_size % 8:
        return f"its heads are multiples of 8, and the model's have {head_size}"
    return None
