"""A run to a Hugging Face folder or back: `python -m jaxgpt.convert --from runs/quickstart --to quickstart-hf`.

--from takes a run folder, one step's folder, a Hugging Face folder, or hf:NAME on the hub. The new folder is read
again and must give the same logits, bit for bit, before it gets its name.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.errors import RunFailed
from jaxgpt.storage import files

FORMATS = ("huggingface", "jaxgpt")


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    convert(arguments.source, arguments.to, arguments.format)


def parser():
    flags = cli.parser("convert", __doc__)
    flags.add_argument(
        "--from",
        dest="source",
        metavar="MODEL",
        required=True,
        help="run, RUN@best, step or Hugging Face folder, or hf:NAME",
    )
    flags.add_argument("--to", metavar="DIR", type=Path, required=True, help="the new folder")
    flags.add_argument(
        "--format",
        metavar="F",
        choices=FORMATS,
        help="what to write: huggingface or jaxgpt (a run folder) [the other kind than --from]",
    )
    return flags


def convert(source: str, to: Path, to_format: str | None) -> None:
    """Write what `source` names to the new folder `to`; by default as the other kind of folder.

    Raises:
        UserError: `to` exists, or `source` cannot be read.
        RunFailed: it could not be written, or what was written gives other logits; nothing is left of it.
    """
    started = time.monotonic()
    from jaxgpt.training import models

    files.check_new(to)
    from_huggingface = models.is_huggingface(source)
    to_format = to_format or FORMATS[from_huggingface]
    model = read(source, f"reading {source}")
    shape, vocab_size = model.config.model, model.vocab_size
    expected = models.check_logits(shape, vocab_size, model.params)
    try:
        with files.new_folder(to) as partial:
            write(partial, to_format, model)
            del model  # memory holds one copy of the weights at a time
            again = read(str(partial), "checking what was written")
            logits = models.check_logits(shape, again.vocab_size, again.params)
            if logits.tobytes() != expected.tobytes():
                raise RunFailed(f"what was written gives other logits than {source}; nothing of it was kept")
    except OSError as error:
        raise RunFailed(f"{to} could not be written ({error}); nothing of it was kept") from None

    from jaxgpt.model.sizes import parameter_count

    millions = parameter_count(shape, vocab_size) / 1e6
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file()) / 1e6
    seconds = time.monotonic() - started
    print(f"{to}: {to_format}, {millions:.1f}M parameters, {size:,.1f} MB in {seconds:.1f} s; logits agree")


def read(source: str, what: str):
    from jaxgpt.parallel.compiler import use_compilation_cache
    from jaxgpt.training.models import load_model

    with progress(what) as bar:
        model = load_model(source, lambda path: bar.update())
        use_compilation_cache(model.config.train.compilation_cache_dir)
        bar.update(bar.total - bar.n)
    return model


def write(folder: Path, to_format: str, model) -> None:
    import numpy as np

    from jaxgpt.training.models import write_huggingface, write_run

    with progress(f"writing {to_format}") as bar:
        if to_format == "jaxgpt":
            write_run(folder, model)
            bar.update(bar.total)
            return

        def whole(leaf):
            bar.update()
            return np.asarray(leaf)

        write_huggingface(folder, model.config.model, model.vocab_size, model.params, model.tokenizer, whole=whole)


def progress(what: str):
    """A bar of arrays, on stderr."""
    from tqdm import tqdm

    from jaxgpt.model.huggingface import NAMES

    return tqdm(desc=what, total=len(NAMES), unit="array")


if __name__ == "__main__":
    sys.exit(main())
