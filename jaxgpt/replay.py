"""The texts of one step's batch, each with its loss: `python -m jaxgpt.replay --checkpoint RUN --step N`.

The rows of the step's batch are read again, and the loss of each is computed with the weights of the nearest checkpoint
at or before the step; the highest comes first. Rows can be added to a skip list, to continue the run without them.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    from jaxgpt.training.checkpoint import find_step
    from jaxgpt.training.metrics import say
    from jaxgpt.training.replayed_step import replay, report, skip_rows

    run, _ = find_step(arguments.checkpoint)
    found = replay(run, arguments.step, arguments.weights_step, arguments.data)
    if arguments.json:
        arguments.json.write_text(json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False), encoding="utf-8")
    say(report(found, arguments.rows))
    if arguments.skip or arguments.skip_above is not None:
        say(skip_rows(found, arguments.skip or (), arguments.skip_above, arguments.skip_list))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("replay", __doc__)
    parser.add_argument("--checkpoint", metavar="RUN", type=Path, required=True, help="run folder")
    parser.add_argument("--step", metavar="N", type=int, required=True, help="the step whose batch is read, from 1")
    parser.add_argument("--weights-step", metavar="M", type=int, help="checkpoint whose weights give the losses")
    parser.add_argument("--data", metavar="DIR", type=Path, help="prepared data, if it was moved")
    parser.add_argument("--rows", metavar="K", type=int, default=10, help="rows to print [10]; --json has all")
    parser.add_argument("--skip-above", metavar="X", type=float, help="add rows with a higher loss to the skip list")
    parser.add_argument("--skip", metavar="ROW,...", type=_numbers, help="add these rows to the skip list")
    parser.add_argument("--skip-list", metavar="FILE", type=Path, help="[the run's own, else RUN/skip.txt]")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything to a file")
    return parser


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of rows such as 953,960")
    return [int(word) for word in words]


if __name__ == "__main__":
    sys.exit(main())
