"""Can this machine do the job? `python -m jaxgpt.doctor`; the experiment too: `... --config configs/quickstart.toml`.

Prints one line for each thing that a run needs, and the fix where something is wrong. Each probe has its own process
and a time limit, so a probe that hangs is named and the others still answer. The exit code is 1 when there is a
problem; a warning is none. On a TPU slice of several hosts, run it on all of them at once.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.config import load_config
from jaxgpt.errors import EXIT_DONE, EXIT_FAILED, UserError


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("doctor", __doc__)
    add = parser.add_argument
    add("--expect", choices=("tpu", "gpu", "cpu"), help="what jax has to find; another device is a problem")
    add("--timeout", metavar="S", type=_seconds, default=30.0, help="seconds for each probe [default 30]")
    add("--workdir", metavar="DIR", help="run folder [default runs/NAME of the config]")
    add("--json", metavar="FILE", type=Path, help="write the findings for programs")
    cli.add_config_arguments(parser)
    parser.usage = "%(prog)s [--config FILE] [options] [--section.field value ...]"
    arguments = parser.parse_args(argv)
    overrides = {key: value for key, value in vars(arguments).items() if "." in key}
    config = load_config(arguments.config, overrides)
    workdir = arguments.workdir or str(Path("runs") / Path(arguments.config or "").stem)
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    from jaxgpt.diagnosis.checkup import examine

    given = bool(arguments.config or overrides)
    healthy = examine(config, workdir, given, arguments.expect, arguments.timeout, arguments.json)
    return EXIT_DONE if healthy else EXIT_FAILED


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
