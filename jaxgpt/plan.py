"""Say what fits a TPU slice, how fast it is and what it costs, before one is rented:
`python -m jaxgpt.plan --config configs/gpt2_124m.toml --tpu v5e-8`.

The TPU compiler runs on this machine (libtpu: any x86-64 Linux, no TPU). It compiles the train step that the training
command would run, with the config's own settings and then with others that train the same model: meshes, batch
sizes, recomputation, layers in a loop or one by one. Without libtpu the table is arithmetic, and says so.

A gate for continuous integration: `--record FILE` writes what the config's own settings need, and `--gate FILE`
exits with 1 when they no longer fit, or take over 2 % more cycles than were recorded.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.errors import UserError


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("plan", __doc__)
    _add_arguments(parser)
    cli.add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    config = cli.config_from(arguments)
    if not (arguments.tpu or arguments.gate):
        raise UserError("give the slices to plan for, for example --tpu v5e-8 or --tpu v5e-1,v5e-8,v6e-8,v5p-16")
    from jaxgpt.planning.planner import plan

    plan(config, arguments)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    own = "the config's own settings"
    add = parser.add_argument
    add("--tpu", metavar="LIST", help="slices, with commas: v5e-1,v5e-8,v6e-8,v5p-16, or shapes in chips: v5p:2x2x4")
    add("--exact", action="store_true", help=f"only {own}")
    budget = f"compile other settings for S seconds a slice; what is begun is finished, and {own} always are"
    add("--budget", metavar="S", type=_positive(float), default=300.0, help=f"{budget} [default 300]")
    add("--candidates", metavar="N", type=_positive(int), help="compile at most N settings for a slice")
    add("--vocab-size", metavar="V", type=_positive(int), help="tokens in the vocabulary, where the config cannot tell")
    add("--top", metavar="N", type=int, default=5, help="costliest operations to list [default 5]")
    add("--prices", metavar="FILE", type=Path, help="TOML file of prices [default jaxgpt/planning/prices.toml]")
    add("--json", metavar="FILE", type=Path, help="write the table for programs")
    add("--record", metavar="FILE", type=Path, help=f"write memory and cycles of {own}, for --gate; implies --exact")
    gate = f"exit with 1 if {own} no longer fit the slices in FILE, or take over 2 %% more cycles than there"
    add("--gate", metavar="FILE", type=Path, help=f"{gate}; implies --exact")


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def positive_number(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise ValueError
        return value

    return positive_number


if __name__ == "__main__":
    sys.exit(main())
