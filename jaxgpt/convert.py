"""A run to a Hugging Face folder or back: `python -m jaxgpt.convert --from runs/quickstart --to quickstart-hf`.

--from takes a run folder, one step's folder, a Hugging Face folder, or hf:NAME on the hub. The new folder is read
again and must give the same logits, bit for bit, before it gets its name.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("convert", __doc__)
    folders = "run, RUN@best, step or Hugging Face folder, or hf:NAME"
    parser.add_argument("--from", dest="source", metavar="MODEL", required=True, help=folders)
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="the new folder")
    kinds = "what to write: huggingface or jaxgpt (a run folder) [the other kind than --from]"
    parser.add_argument("--format", metavar="F", choices=["huggingface", "jaxgpt"], help=kinds)
    arguments = parser.parse_args(argv)

    from jaxgpt.training.models import convert

    convert(arguments.source, arguments.to, arguments.format)


if __name__ == "__main__":
    sys.exit(main())
