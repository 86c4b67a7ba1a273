"""A trained model to use, wherever it lies, and the two kinds of folder it is written to.

A run folder is ours (config.json, tokenizer/, checkpoints/); a Hugging Face folder is everyone's. New folders are
filled under another name and get their own when they are complete, so a crash leaves nothing half-written.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from jaxgpt.config import Config, to_json
from jaxgpt.data.tokenizer import GENERATION, Tokenizer
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import RunFailed, UserError
from jaxgpt.model import gpt2, huggingface
from jaxgpt.model.huggingface import NAMES, leaf_at, set_leaf
from jaxgpt.model.sizes import parameter_count
from jaxgpt.parallel.compiler import use_compilation_cache
from jaxgpt.settings import ModelConfig, TokenizerConfig
from jaxgpt.storage import manifest
from jaxgpt.storage.files import check_new, new_folder, write_file
from jaxgpt.training.checkpoint import (
    FOLDER,
    METADATA,
    find_step,
    quiet_orbax,
    read_config,
    read_metadata,
)
from jaxgpt.training.recovery import check_weights

# Arrays are written in pieces of the first size to files of the second. Orbax would encode whole arrays, and keep
# them until a file of 2 GB is full: a second copy of the model (saving 355M: a peak of 1.9 against 1.1 times it).
CHUNK_BYTES, FILE_BYTES = 8 << 20, 8 << 20
HUB = "hf:"  # begins the name of a model on the Hugging Face hub


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model: what sampling, evaluation and serving start from."""

    config: Config
    vocab_size: int  # the model's; a tokenizer may know fewer tokens
    params: dict
    tokenizer: Tokenizer
    step: int  # 0 for a Hugging Face folder, which does not say


# ---------------------------------------------------------------- reading


def is_huggingface(path: str | Path) -> bool:
    """True if `path` names a Hugging Face folder or a model on the hub, not a run or a step."""
    if str(path).startswith(HUB):
        return True
    file = Path(path) / "config.json"
    if not file.is_file() or (Path(path) / FOLDER).is_dir():
        return False
    try:
        return "model_type" in json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError, RecursionError):  # no JSON object: no Hugging Face folder either
        return False


def load_model(path: str | Path, read: Callable[[tuple[str, ...]], None] = lambda path: None) -> LoadedModel:
    """The model of a run folder (its latest step), a step's folder, a Hugging Face folder or "hf:NAME" on the hub.

    The arrays lie on the default device, whatever mesh wrote them. `read` is called with the path of each
    array of a Hugging Face folder once it is read.

    Raises:
        UserError: it is none of these, or cannot be represented; says what was looked for.
    """
    if is_huggingface(path):
        return _load_huggingface(huggingface.locate(str(path)), read)
    run, step = find_step(Path(path), tell=True)
    check_weights(run, step)
    config = read_config(run)
    tokenizer = load_tokenizer(run / "tokenizer")
    vocab_size = read_metadata(run, step).get("vocab_size") or tokenizer.vocab_size
    _, shapes, _ = gpt2.abstract_model(config.model, vocab_size)
    return LoadedModel(config, vocab_size, _restore(run / FOLDER / str(step) / "params", shapes), tokenizer, step)


def _restore(folder: Path, shapes: dict) -> dict:
    """The weights, one large array after another: Orbax holds up to three copies of all that it is asked for at once.

    The largest come first: their copies are made while little else is there.
    """
    quiet_orbax()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    size = {path: 4 * leaf_at(shapes, path).size for path in NAMES}
    small = [path for path in NAMES if size[path] < CHUNK_BYTES]
    large = sorted(set(NAMES) - set(small), key=lambda path: (-size[path], path))
    params: dict = {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for paths in [*([path] for path in large), small]:
            part: dict = {}
            for path in paths:
                shape = leaf_at(shapes, path)
                set_leaf(part, path, jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=device))
            how = ocp.checkpoint_utils.construct_restore_args(part)
            args = ocp.args.PyTreeRestore(part, restore_args=how, partial_restore=True)
            restored = jax.block_until_ready(checkpointer.restore(folder.absolute(), args=args))
            for path in paths:
                set_leaf(params, path, leaf_at(restored, path))
            del restored
            if large:  # a small model has nothing to give back, and is read twice as fast without
                _release_memory()
    return params


def _release_memory() -> None:
    """Give memory that is no longer used back to the kernel.

    Orbax leaves whole arrays in reference cycles, and glibc keeps what Orbax's threads freed in a heap for each
    (writing 355M and reading it again: a peak of 1.5 against 1.2 times the model).
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc: another allocator, with its own habits
        ctypes.CDLL(None).malloc_trim(0)


def _load_huggingface(folder: Path, read: Callable[[tuple[str, ...]], None]) -> LoadedModel:
    model = huggingface.open_model(folder)
    tokenizer = load_tokenizer(folder)
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but config.json has vocab_size = "
            f"{model.vocab_size}; they do not belong together"
        )

    def place(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        # Waits for the copy, or the array would still be held by it when the next one is read.
        leaf = jax.block_until_ready(jax.device_put(array, jax.devices()[0]))
        read(path)
        return leaf

    config = Config(model=model.config, tokenizer=TokenizerConfig(type="folder", path=str(folder)))
    return LoadedModel(config, model.vocab_size, huggingface.read_params(model, place), tokenizer, 0)


# ---------------------------------------------------------------- writing


def export_model(
    folder: Path,
    config: ModelConfig,
    vocab_size: int,
    params: dict,
    tokenizer: Tokenizer,
    *,
    replace: bool = False,
    whole: Callable[[jax.Array], np.ndarray] = np.asarray,
    is_writer: bool = True,
) -> None:
    """Write a complete Hugging Face folder; `UserError` where it exists, unless `replace`. See `write_model` there."""
    existing: Literal["replace", "refuse"] = "replace" if replace else "refuse"
    with new_folder(folder, existing) if is_writer else contextlib.nullcontext(folder) as partial:
        write_huggingface(partial, config, vocab_size, params, tokenizer, whole=whole, is_writer=is_writer)


def write_huggingface(
    folder: Path,
    config: ModelConfig,
    vocab_size: int,
    params: dict,
    tokenizer: Tokenizer,
    *,
    whole: Callable[[jax.Array], np.ndarray] = np.asarray,
    is_writer: bool = True,
) -> None:
    """`export_model` into a folder that exists already."""
    huggingface.write_model(folder, config, vocab_size, params, tokenizer.end_of_text, whole=whole, is_writer=is_writer)
    if is_writer:
        tokenizer.save(folder, config.n_positions)
        # Have transformers' `generate` end a text where we do: also at the end of a turn, and at the folder's own ends.
        text = json.dumps(tokenizer.generation_config, indent=2, sort_keys=True)
        (folder / GENERATION).write_text(text + "\n", encoding="utf-8")
        manifest.write(folder)


def write_run(run: Path, model: LoadedModel) -> None:
    """Write the weights of `model` into the folder `run` as its step 0, without an optimizer."""
    quiet_orbax()
    write_settings(run, model.config, model.tokenizer)
    metadata = {"step": 0, "vocab_size": model.vocab_size, "tokenizer_digest": model.tokenizer.digest}
    step = (run / FOLDER / "0").absolute()
    how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), model.params)
    args = ocp.args.PyTreeSave(model.params, save_args=how, ocdbt_target_data_file_size=FILE_BYTES)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(step / "params", args=args)
    (step / METADATA).write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    manifest.write(step)
    _release_memory()


def write_settings(run: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Write config.json and tokenizer/ of a run, with their digests; a line says if the tokenizer there is damaged."""
    run.mkdir(parents=True, exist_ok=True)
    write_file(run / "config.json", to_json(config))
    folder = run / "tokenizer"
    if (folder / manifest.NAME).exists() and (found := manifest.problems(folder)):
        print(f"damaged  {folder}: {found[0]}; written again", flush=True)
    with new_folder(folder, "replace") as partial:
        tokenizer.save(partial, config.model.n_positions)
        manifest.write(partial)


# ---------------------------------------------------------------- comparing


def check_logits(config: ModelConfig, vocab_size: int, params: dict) -> np.ndarray:
    """Logits (T, V) of a fixed text of at most 16 tokens: the same weights give the same bits."""
    # One layer at a time and without rounding: little memory beside the weights, and every bit of them counts.
    config = dataclasses.replace(config, dtype="float32", scan_layers=True, remat="none", dropout=0.0)
    length = min(16, config.n_positions)
    tokens_1T = (np.arange(1, length + 1) ** 5 % vocab_size).astype(np.int32)[None]
    return np.asarray(_logits(config, vocab_size, params, tokens_1T))[0]


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"))
def _logits(config: ModelConfig, vocab_size: int, params: dict, tokens_1T: np.ndarray) -> jax.Array:
    return gpt2.bind(config, vocab_size, params)(tokens_1T)


# ---------------------------------------------------------------- from one kind of folder to the other


def convert(source: str, to: Path, to_format: str | None) -> None:
    """Write what `source` names to the new folder `to`; by default as the other kind of folder.

    Raises:
        UserError: `to` exists, or `source` cannot be read.
        RunFailed: it could not be written, or what was written gives other logits; nothing is left of it.
    """
    started = time.monotonic()
    check_new(to)
    from_huggingface = is_huggingface(source)
    to_format = to_format or ("jaxgpt" if from_huggingface else "huggingface")
    model = _read(source, f"reading {source}")
    shape, vocab_size = model.config.model, model.vocab_size
    expected = check_logits(shape, vocab_size, model.params)
    try:
        with new_folder(to) as partial:
            _write(partial, to_format, model)
            del model  # memory holds one copy of the weights at a time
            again = _read(str(partial), "checking what was written")
            logits = check_logits(shape, again.vocab_size, again.params)
            if logits.tobytes() != expected.tobytes():
                raise RunFailed(f"what was written gives other logits than {source}; nothing of it was kept")
    except OSError as error:
        raise RunFailed(f"{to} could not be written ({error}); nothing of it was kept") from None

    millions = parameter_count(shape, vocab_size) / 1e6
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file()) / 1e6
    seconds = time.monotonic() - started
    print(f"{to}: {to_format}, {millions:.1f}M parameters, {size:,.1f} MB in {seconds:.1f} s; logits agree")


def _read(source: str, what: str) -> LoadedModel:
    with _progress(what) as bar:
        model = load_model(source, lambda path: bar.update())
        use_compilation_cache()
        bar.update(bar.total - bar.n)
    return model


def _write(folder: Path, to_format: str, model: LoadedModel) -> None:
    with _progress(f"writing {to_format}") as bar:
        if to_format == "jaxgpt":
            write_run(folder, model)
            bar.update(bar.total)
            return

        def whole(leaf: jax.Array) -> np.ndarray:
            bar.update()
            return np.asarray(leaf)

        write_huggingface(folder, model.config.model, model.vocab_size, model.params, model.tokenizer, whole=whole)


def _progress(what: str) -> tqdm:
    """A bar of arrays, on stderr."""
    return tqdm(desc=what, total=len(NAMES), unit="array")
