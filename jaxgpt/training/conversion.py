"""Convert a run folder to a Hugging Face folder or back, and check that both give the same logits."""

import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from jaxgpt.errors import RunFailed
from jaxgpt.model.huggingface import NAMES
from jaxgpt.model.sizes import parameter_count
from jaxgpt.parallel.compiler import use_compilation_cache
from jaxgpt.storage import files
from jaxgpt.training import models
from jaxgpt.training.models import LoadedModel


def convert(source: str, to: Path, to_format: str | None) -> None:
    """Write what `source` names to the new folder `to`; by default as the other kind of folder.

    Raises:
        UserError: `to` exists, or `source` cannot be read.
        RunFailed: it could not be written, or what was written gives other logits; nothing is left of it.
    """
    started = time.monotonic()
    files.check_new(to)
    from_huggingface = models.is_huggingface(source)
    to_format = to_format or ("jaxgpt" if from_huggingface else "huggingface")
    model = _read(source, f"reading {source}")
    shape, vocab_size = model.config.model, model.vocab_size
    expected = models.check_logits(shape, vocab_size, model.params)
    try:
        with files.new_folder(to) as partial:
            _write(partial, to_format, model)
            del model  # memory holds one copy of the weights at a time
            again = _read(str(partial), "checking what was written")
            logits = models.check_logits(shape, again.vocab_size, again.params)
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
        model = models.load_model(source, lambda path: bar.update())
        use_compilation_cache(model.config.train.compilation_cache_dir)
        bar.update(bar.total - bar.n)
    return model


def _write(folder: Path, to_format: str, model: LoadedModel) -> None:
    with _progress(f"writing {to_format}") as bar:
        if to_format == "jaxgpt":
            models.write_run(folder, model)
            bar.update(bar.total)
            return

        def whole(leaf: jax.Array) -> np.ndarray:
            bar.update()
            return np.asarray(leaf)

        models.write_huggingface(
            folder, model.config.model, model.vocab_size, model.params, model.tokenizer, whole=whole
        )


def _progress(what: str) -> tqdm:
    """A bar of arrays, on stderr."""
    return tqdm(desc=what, total=len(NAMES), unit="array")
