"""Hugging Face's GPT-2 folders, read and written: config.json and the weights as safetensors.

One table (`NAMES`) has the name of each of our arrays there and the shape of one layer; reading and writing both use
it. The numbers are the same in the same order, so only shapes change. Nothing here can run code: pickles are refused,
and so are models that bring their own.
"""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.model import gpt2
from jaxgpt.model.backend import LAYER_NORM_EPSILON
from jaxgpt.model.tensor_file import DTYPES, StoredTensor, read_header, read_into, write_tensors
from jaxgpt.settings import ModelConfig
from jaxgpt.storage import manifest

logger = logging.getLogger(__name__)

# our path in the parameters: (Hugging Face's name, its shape); "{}" is the layer, which ours has as first axis.
# D width, V vocabulary, P positions. The head is tied to wte there as here, so it has no entry.
NAMES = {
    ("wte",): ("wte.weight", "V D"),
    ("wpe",): ("wpe.weight", "P D"),
    ("blocks", "ln_1", "scale"): ("h.{}.ln_1.weight", "D"),
    ("blocks", "ln_1", "bias"): ("h.{}.ln_1.bias", "D"),
    ("blocks", "attn", "c_attn", "kernel"): ("h.{}.attn.c_attn.weight", "D 3D"),  # ours (D, 3, heads, head size)
    ("blocks", "attn", "c_attn", "bias"): ("h.{}.attn.c_attn.bias", "3D"),
    ("blocks", "attn", "c_proj", "kernel"): ("h.{}.attn.c_proj.weight", "D D"),  # ours (heads, head size, D)
    ("blocks", "attn", "c_proj", "bias"): ("h.{}.attn.c_proj.bias", "D"),
    ("blocks", "ln_2", "scale"): ("h.{}.ln_2.weight", "D"),
    ("blocks", "ln_2", "bias"): ("h.{}.ln_2.bias", "D"),
    ("blocks", "mlp", "c_fc", "kernel"): ("h.{}.mlp.c_fc.weight", "D 4D"),
    ("blocks", "mlp", "c_fc", "bias"): ("h.{}.mlp.c_fc.bias", "4D"),
    ("blocks", "mlp", "c_proj", "kernel"): ("h.{}.mlp.c_proj.weight", "4D D"),
    ("blocks", "mlp", "c_proj", "bias"): ("h.{}.mlp.c_proj.bias", "D"),
    ("ln_f", "scale"): ("ln_f.weight", "D"),
    ("ln_f", "bias"): ("ln_f.bias", "D"),
}
PREFIX = "transformer."  # of every name in a GPT2LMHeadModel; OpenAI's own checkpoints lack it
HEAD = "lm_head.weight"
BUFFERS = ("h.{}.attn.bias", "h.{}.attn.masked_bias")  # the causal mask, stored by old versions: no parameters

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# The defaults of transformers.GPT2Config for settings that config.json leaves out.
DEFAULTS: dict[str, Any] = dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, n_inner=None)
DEFAULTS |= dict(activation_function="gelu_new", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
# GPT2Config reads these too.
ALIASES = dict(hidden_size="n_embd", num_attention_heads="n_head", num_hidden_layers="n_layer")
ALIASES |= dict(max_position_embeddings="n_positions")
# Settings that change what is computed, and the one value that this package computes.
FIXED = dict(layer_norm_epsilon=LAYER_NORM_EPSILON, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
FIXED |= dict(add_cross_attention=False, tie_word_embeddings=True)
REFUSED = ("pruned_heads", "quantization_config", "auto_map")  # other shapes, other numbers, code of its own
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one formula under three names
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


@dataclasses.dataclass(frozen=True)
class HuggingFaceModel:
    """A checked folder: every tensor is there with the right shape, and no array has been read yet."""

    folder: Path
    config: ModelConfig
    vocab_size: int
    files: dict[str, StoredTensor]  # by Hugging Face's name, the prefix left out


# ---------------------------------------------------------------- finding and checking a folder


def locate(where: str, weights: bool = True) -> Path:
    """The folder of a model: a local one as it is, or that of a hub name such as "gpt2" or "org/name@revision".

    A hub name is downloaded (JSON, safetensors and text, never pickles or code), or taken from the local cache
    where the hub cannot be reached. "hf:" before a name says that it is no folder. Without `weights`, a tokenizer is
    enough.

    Raises:
        UserError: there is neither such a folder nor such a model.
    """
    path = Path(where).expanduser()
    if not where.startswith("hf:") and (where.startswith((".", "/", "~")) or path.exists()):
        if not path.is_dir():
            raise UserError(f"{where}: no such folder; give a Hugging Face folder or the name of a model on the hub")
        return path
    name, _, revision = where.removeprefix("hf:").partition("@")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # that of the HTTP client, which differs from version to version

    patterns = ["*.json", "*.txt", "*.jinja", *([WEIGHTS, "model-*.safetensors"] if weights else [])]
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns, ignore_patterns="*/*")
    except (OSError, ValueError, HTTPError) as error:
        reason = f"not to be had from the Hugging Face hub: {' '.join(str(error).split())}"
        raise UserError(f"{where}: no such local folder, and {reason}") from None
    return Path(folder)


def locate_tokenizer(where: str) -> Path:
    """The folder of the model's tokenizer, as `locate` finds it; its weights are not downloaded."""
    return locate(where, weights=False)


def open_model(folder: Path) -> HuggingFaceModel:
    """Check a Hugging Face folder; reads config.json and the headers of the safetensors, and all where we wrote it.

    Raises:
        UserError: it is no GPT-2 that can be represented here; names the setting or the tensor, and the file.
    """
    folder = Path(folder)
    manifest.check(folder)
    config, vocab_size = _read_config(folder / "config.json")
    files: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        for name, stored in read_header(file).items():
            if (bare := name.removeprefix(PREFIX)) in files:
                raise UserError(f"{file}: tensor {name} is stored twice in {folder}")
            files[bare] = stored
    _check_tensors(folder, config, vocab_size, files)
    return HuggingFaceModel(folder, config, vocab_size, files)


def _read_config(file: Path) -> tuple[ModelConfig, int]:
    """(our model section, vocabulary)."""
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable config of a Hugging Face model ({error})") from None
    named = written.get("model_type") if isinstance(written, dict) else None
    if named != "gpt2":
        raise UserError(f'{file}: model_type is {named!r}, but only "gpt2" can be read')
    settings = DEFAULTS | FIXED | {ALIASES.get(key, key): value for key, value in written.items()}
    for key, value in FIXED.items():
        if settings[key] != value:
            raise UserError(f"{file}: {key} = {settings[key]!r} cannot be represented; only {value!r} can")
    for key in REFUSED:
        if settings.get(key):
            raise UserError(f"{file}: {key} is set, and such a model cannot be represented")
    if settings["activation_function"] not in TANH_GELU:
        raise UserError(
            f"{file}: activation_function = {settings['activation_function']!r} cannot be represented; "
            f"only GELU by tanh can: {', '.join(TANH_GELU)}"
        )
    return _model_config(file, settings), settings["vocab_size"]


def _model_config(file: Path, settings: dict) -> ModelConfig:
    for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if type(settings[key]) is not int or settings[key] < 1:
            raise UserError(f"{file}: {key} = {settings[key]!r} is not a whole number above 0")
    width, heads, inner = (settings[key] for key in ("n_embd", "n_head", "n_inner"))
    if width % heads:
        raise UserError(f"{file}: n_head = {heads} does not divide n_embd = {width}")
    if inner not in (None, 4 * width):
        raise UserError(f"{file}: n_inner = {inner!r} cannot be represented; only 4 x n_embd = {4 * width} can")
    rates = [settings[key] for key in DROPOUTS]
    if not all(type(rate) in (int, float) and 0 <= rate < 1 for rate in rates):
        raise UserError(f"{file}: {', '.join(DROPOUTS)} = {rates} are not three rates from 0 to below 1")
    if len(set(rates)) > 1:
        logger.warning("%s: %s = %s differ; dropout is set to 0", file, ", ".join(DROPOUTS), rates)
    shape = {key: settings[key] for key in ("n_layer", "n_head", "n_embd", "n_positions")}
    return ModelConfig(**shape, dropout=rates[0] if len(set(rates)) == 1 else 0.0, dtype="float32")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder: one, or the shards that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            inside = all(Path(name).name == name for name in names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of safetensors ({error!r})") from None
        missing = [name for name in names if not inside or not (folder / name).is_file()]
        if missing:
            raise UserError(f"{index} names {missing[0]}, which is not in {folder}; copy or download it again")
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read; if you trust "
            'it, convert it once: python -c "from transformers import GPT2LMHeadModel as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    raise UserError(f"{folder}: no weights here; looked for {WEIGHTS} and {INDEX} (pickles such as *.bin are not read)")


def _check_tensors(folder: Path, config: ModelConfig, vocab_size: int, files: dict[str, StoredTensor]) -> None:
    sizes, layers = _sizes(config, vocab_size), range(config.n_layer)
    expected: dict[str, tuple[int, ...]] = {}
    for name, axes in NAMES.values():
        expected |= {name.format(layer): sizes[axes] for layer in (layers if "{}" in name else (0,))}
    for name, shape in expected.items():
        if name not in files:
            raise UserError(f"{folder}: tensor {name} is missing from the weights")
        _check_tensor(name, files[name], shape)
    if HEAD in files:
        _check_tensor(HEAD, files[HEAD], sizes["V D"])
    known = {*expected, HEAD, *(name.format(layer) for name in BUFFERS for layer in layers)}
    for name in files:
        if name not in known:
            raise UserError(f"{files[name].file}: tensor {name} is no part of GPT-2 with {config.n_layer} layers")


def _check_tensor(name: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise UserError(f"{stored.file}: tensor {name} has shape {stored.shape}, but config.json asks for {shape}")
    if stored.dtype not in DTYPES:
        raise UserError(f"{stored.file}: tensor {name} has type {stored.dtype}; only {', '.join(DTYPES)} can be read")


def _sizes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """{"D 3D": (768, 2304), ...}: the shapes that `NAMES` speaks of."""
    width = config.n_embd
    size = {"V": vocab_size, "P": config.n_positions, "D": width, "3D": 3 * width, "4D": 4 * width}
    return {shape: tuple(size[axis] for axis in shape.split()) for _, shape in NAMES.values()}


# ---------------------------------------------------------------- reading


def read_params(
    model: HuggingFaceModel, place: Callable[[tuple[str, ...], np.ndarray], Any] = lambda path, array: array
) -> dict:
    """The parameters as `gpt2` has them: nested dicts of float32 arrays, the vocabulary padded with zero rows.

    `place(path, array)` is called with each array as soon as it is read, and what it returns stands in the
    result: a caller that puts arrays on devices there needs little more memory than the model.

    Raises:
        UserError: the head is not tied to the embedding, or a file changed since `open_model`.
    """
    _check_head(model)
    _, shapes, _ = gpt2.abstract_model(model.config, model.vocab_size)
    params: dict = {}
    # The largest first: a copy that `place` makes is then made while the least lies in memory.
    for path in sorted(NAMES, key=lambda path: -math.prod(leaf_at(shapes, path).shape)):
        set_leaf(params, path, place(path, _read_leaf(model, path, leaf_at(shapes, path).shape)))
    return params


def _read_leaf(model: HuggingFaceModel, path: tuple[str, ...], our_shape: tuple[int, ...]) -> np.ndarray:
    name, axes = NAMES[path]
    shape = _sizes(model.config, model.vocab_size)[axes]
    array = np.zeros(our_shape, np.float32)  # zeros take no memory until something is written there
    if "{}" in name:
        for layer, slice_ in enumerate(array.reshape(model.config.n_layer, *shape)):
            _read_finite(slice_, model, name.format(layer))
    else:
        _read_finite(array[: shape[0]], model, name)  # the padding of the vocabulary stays zero
    return array


def _read_finite(out: np.ndarray, model: HuggingFaceModel, name: str) -> None:
    read_into(out, stored := model.files[name])
    if not math.isfinite(out.sum(dtype=np.float64)):  # float64 holds any sum of float32 numbers
        raise UserError(
            f"{stored.file}: tensor {name} holds NaN or Inf, so the model is broken; download it again, or take an "
            "earlier checkpoint"
        )


def _check_head(model: HuggingFaceModel) -> None:
    """Refuse a stored head that is not the embedding; compared in parts, to need no second copy of either."""
    if HEAD not in model.files:
        return
    head, embedding = model.files[HEAD], model.files["wte.weight"]
    for first in range(0, model.vocab_size, 4096):
        rows = np.empty((2, min(4096, model.vocab_size - first), model.config.n_embd), np.float32)
        read_into(rows[0], head, first)
        read_into(rows[1], embedding, first)
        if not np.array_equal(rows[0], rows[1], equal_nan=True):
            raise UserError(f"{head.file}: {HEAD} differs from wte.weight; a head of its own cannot be represented")


# ---------------------------------------------------------------- writing


def write_model(
    folder: Path,
    config: ModelConfig,
    vocab_size: int,
    params: dict,
    end_of_text: int | None,
    max_shard_bytes: int = 5_000_000_000,
    whole: Callable[[jax.Array], np.ndarray] = np.asarray,
    is_writer: bool = True,
) -> None:
    """Write config.json, generation_config.json and the weights, which any reader of a GPT2LMHeadModel reads.

    `whole(leaf)` brings one of our arrays to this host; one at a time is there. Where arrays are spread over
    several hosts every process calls this (and `whole` with each array, in the same order) and one writes.
    """
    if not is_writer:
        for path in NAMES:
            whole(leaf_at(params, path))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _json_files(config, vocab_size, end_of_text).items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = _host_tensors(config, vocab_size, params, whole)
    shards = _plan_shards(config, vocab_size, max_shard_bytes)
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        total = sum(4 * math.prod(shape) for shard in shards for shape in shard.values())
        where = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, shard in zip(names, shards):
        write_tensors(folder / name, shard, tensors)


def _json_files(config: ModelConfig, vocab_size: int, end_of_text: int | None) -> dict[str, dict]:
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    settings = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocab_size,
        **{key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "n_positions")},
        "n_ctx": config.n_positions,  # readers older than transformers 4 and llama.cpp look for this name
        "n_inner": None,
        "activation_function": TANH_GELU[0],
        **dict.fromkeys(DROPOUTS, config.dropout),
        **FIXED,
        "reorder_and_upcast_attn": False,
        "initializer_range": gpt2.INIT_STD,
        "use_cache": True,
        "dtype": "float32",
        **ends,
    }
    # A padding token that is named spares every caller of `generate` a warning.
    return {"config.json": settings, "generation_config.json": ends | {"pad_token_id": end_of_text}}


def _host_tensors(
    config: ModelConfig, vocab_size: int, params: dict, whole: Callable[[jax.Array], np.ndarray]
) -> Iterator[np.ndarray]:
    """Every tensor in the order of the plan, in Hugging Face's shape; one of our arrays on the host at a time."""
    sizes = _sizes(config, vocab_size)
    for path, (name, shape) in NAMES.items():
        array = whole(leaf_at(params, path))
        if "{}" in name:
            yield from array.reshape(config.n_layer, *sizes[shape])
        else:
            yield array[: sizes[shape][0]].reshape(sizes[shape])
        del array


def _plan_shards(config: ModelConfig, vocab_size: int, max_shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """The {name: shape} of each file, filled in the order of `NAMES`, all layers of an array one after another."""
    sizes = _sizes(config, vocab_size)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in NAMES.values():
        for layer in range(config.n_layer if "{}" in name else 1):
            size = 4 * math.prod(sizes[shape])
            if shards[-1] and used + size > max_shard_bytes:
                shards.append({})
                used = 0
            shards[-1][PREFIX + name.format(layer)] = sizes[shape]
            used += size
    return shards


def leaf_at(params: dict, path: tuple[str, ...]) -> Any:
    """The array at `path` of a tree of parameters."""
    return functools.reduce(lambda tree, key: tree[key], path, params)


def set_leaf(params: dict, path: tuple[str, ...], leaf: Any) -> None:
    """Put an array at `path`, making the dicts on the way."""
    functools.reduce(lambda tree, key: tree.setdefault(key, {}), path[:-1], params)[path[-1]] = leaf
