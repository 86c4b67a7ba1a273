"""The backends of TPUs and GPUs, and the one place that decides which of all backends a device gets.

A TPU has an attention kernel, and a LayerNorm that reads its input once; a GPU has attention by cuDNN, and XLA
compiles the rest well.

Axes in names: B batch, T query position, S key position, D width, N heads, H head size, I inputs, O outputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.errors import UserError
from jaxgpt.model import attention, backend, flash
from jaxgpt.model.backend import LAYER_NORM_EPSILON, PLAIN, Backend
from jaxgpt.model.cpu import CPU
from jaxgpt.settings import ModelConfig

Kept = tuple[Array, Array]  # inputs and kernel of a linear layer, for its gradients


@jax.custom_vjp
def layer_norm(x_BTD: Array, scale_D: Array, bias_D: Array) -> Array:
    """As `backend.layer_norm`."""
    return _normalise(x_BTD, scale_D, bias_D)[0]


def _normalise(x_BTD: Array, scale_D: Array, bias_D: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    """(output, what the gradient needs): the input as it is, and two float32 numbers a token.

    Left to itself, the compiler keeps float32 copies of the input for the backward pass, and reads it twice for the
    variance (TPU v5e, 124M, 16 x 1024 tokens: 0.45 and 0.4 M cycles a layer).
    """
    x32 = x_BTD.astype(jnp.float32)
    mean_BT1 = x32.mean(-1, keepdims=True)
    if x_BTD.dtype == jnp.float32:
        variance_BT1 = jnp.square(x32 - mean_BT1).mean(-1, keepdims=True)
    else:
        # One pass. It loses digits when the mean is far from 0, but a bfloat16 input has lost more by then: with a
        # mean of 30 standard deviations this variance is off by 1e-4, the rounding of the input by 6e-2.
        variance_BT1 = jnp.maximum(jnp.square(x32).mean(-1, keepdims=True) - jnp.square(mean_BT1), 0.0)
    rstd_BT1 = jax.lax.rsqrt(variance_BT1 + LAYER_NORM_EPSILON)
    out_BTD = (x32 - mean_BT1) * rstd_BT1 * scale_D[None, None] + bias_D[None, None]
    return out_BTD.astype(x_BTD.dtype), (x_BTD, mean_BT1, rstd_BT1, scale_D)


layer_norm.defvjp(_normalise, backend.layer_norm_gradients)


@jax.custom_vjp
def linear(x_BTI: Array, kernel_IO: Array, bias_O: Array) -> Array:
    """`backend.linear`, whose bias gradient is a float32 sum."""
    return backend.linear(x_BTI, kernel_IO, bias_O)


@jax.custom_vjp
def linear_apart(x_BTI: Array, kernel_IO: Array, bias_O: Array) -> Array:
    """The same; the bias gradient is a matmul with ones. A kernel hands the gradient in, so there is no matmul that a
    sum could be part of, and a sum of its own costs 0.33 M cycles (TPU v5e, 16 x 1024 tokens of 768)."""
    return backend.linear(x_BTI, kernel_IO, bias_O)


def _linear_saving_inputs(x_BTI: Array, kernel_IO: Array, bias_O: Array) -> tuple[Array, Kept]:
    kernel_IO = kernel_IO.astype(x_BTI.dtype)
    return backend.linear(x_BTI, kernel_IO, bias_O), (x_BTI, kernel_IO)


def _linear_gradients(kept: Kept, dout_BTO: Array) -> tuple[Array, Array, Array]:
    return *_matmul_gradients(kept, dout_BTO), dout_BTO.astype(jnp.float32).sum((0, 1))


def _linear_apart_gradients(kept: Kept, dout_BTO: Array) -> tuple[Array, Array, Array]:
    ones_8BT = jnp.ones((8, *dout_BTO.shape[:2]), dout_BTO.dtype)  # 8: the rows of a vector register
    sums_8O = jnp.einsum("EBT,BTO->EO", ones_8BT, dout_BTO, preferred_element_type=jnp.float32)
    return *_matmul_gradients(kept, dout_BTO), sums_8O[0]


def _matmul_gradients(kept: Kept, dout_BTO: Array) -> tuple[Array, Array]:
    x_BTI, kernel_IO = kept
    dx_BTI = jnp.einsum("BTO,IO->BTI", dout_BTO, kernel_IO)
    # Out of the accumulator as float32: it is added to other micro-batches' and devices' gradients.
    dkernel_IO = jnp.einsum("BTI,BTO->IO", x_BTI, dout_BTO, preferred_element_type=jnp.float32)
    return dx_BTI, dkernel_IO


linear.defvjp(_linear_saving_inputs, _linear_gradients)
linear_apart.defvjp(_linear_saving_inputs, _linear_apart_gradients)

# Logits of 2,048 tokens of GPT-2's vocabulary are 206 MB; all of 16,384 at once are no faster (v5e), and 1.2 GiB more.
TPU = Backend(
    backend.without_dropout(flash.flash_attention), linear, layer_norm, linear_apart=linear_apart, loss_rows=2048
)


def cudnn_attention(q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, segments_BT: Array | None = None) -> Array:
    """Causal attention by cuDNN, (B, T, N, H); with `segments_BT`, within a segment only."""
    mask = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSNH, v_BSNH, mask=mask, is_causal=True, implementation="cudnn")


# Logits of all tokens at once are faster on a GPU (a published trainer lost 7 % by splitting them), up to what memory
# bears: 16,384 x 50,304 x 2 bytes = 1.6 GB.
GPU = Backend(attend=backend.without_dropout(cudnn_attention), loss_rows=16_384)

# The attention kernel of a device: its name in `model.attention`, and in the log.
_KERNELS = {"tpu": ("flash", "TPU kernel"), "gpu": ("cudnn", "cuDNN")}


def choose_backend(model: ModelConfig, platform: str, block_size: int) -> tuple[Backend, str]:
    """The backend for training on devices of `platform` ("tpu", "gpu", "cpu"), and how it attends, for the log.

    Raises:
        UserError: model.attention names a kernel that cannot run there; says why.
    """
    chosen = {"tpu": TPU, "gpu": GPU, "cpu": CPU}.get(platform, PLAIN)
    kernel, name = _KERNELS.get(platform, ("xla", "XLA"))
    wanted = kernel if model.attention == "auto" else model.attention
    if wanted == "xla":
        return dataclasses.replace(chosen, attend=attention.attend if kernel != "xla" else chosen.attend), "XLA"
    obstacle = f"it does not run on a {platform}" if wanted != kernel else _obstacle(kernel, model, block_size)
    if not obstacle:
        return chosen, name
    if model.attention != "auto":
        raise UserError(f'model.attention = "{wanted}", but {obstacle}; "auto" takes what the device has')
    return dataclasses.replace(chosen, attend=attention.attend), f"XLA, slower than {name}, for {obstacle}"


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
