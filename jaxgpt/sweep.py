"""Find better settings: `python -m jaxgpt.sweep --config C --vary optimizer.learning_rate=1e-4..1e-2:7`.

Trains the model again and again with other settings and compares the validation losses. Trials that differ only in
numbers that the compiled step takes as arguments (rates, decay, seeds) share one compilation. What is recorded is not
run again: a sweep that was stopped goes on when the same command is given.

--vary KEY=A,B,C is a list, KEY=A..B a range, KEY=A..B:7 a range cut into seven points; settings that belong together
vary together: --vary model.n_layer+model.n_embd+model.n_head=2+64+2,4+128+4. Without --vary: the learning rate, from
an eighth to eight times the config's. The folder gets trials.jsonl, report.html and best.toml, a config file.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt.errors import UserError, stop_at_once

if __name__ == "__main__":
    stop_at_once()  # before what takes time is imported

from jaxgpt import cli
from jaxgpt.config import Config


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("sweep", __doc__)
    add = parser.add_argument
    add("--vary", metavar="KEY=VALUES", nargs="+", action="extend", default=[], help="what to vary, see above")
    methods = "every combination; random ones; random ones, with a third going on at each rung; Optuna's estimator"
    methods += " [grid where all are lists, else random]"
    add("--method", choices=["grid", "random", "halving", "tpe"], help=methods)
    add("--trials", metavar="N", type=int, help="trials of random (20), halving (27) and tpe (30)")
    add("--seed", metavar="S", type=int, default=0, help="seed of random draws, not of the model [%(default)s]")
    add("--workdir", metavar="DIR", type=Path, help="folder [runs/NAME-sweep, or runs/NAME-learning-rate]")
    size = "where 4 sizes or more are tried: predict the loss of this many parameters without embeddings"
    add("--predict", metavar="PARAMETERS", type=int, help=f"{size} [twice the largest]")
    add("--find-learning-rate", action="store_true", help="instead: one short run whose learning rate rises all along")
    add("--json", metavar="FILE", type=Path, help="also write the results there")
    cli.add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    config = cli.config_from(arguments)
    for name, least in (("trials", 1), ("predict", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: {least} or more")
    given = [f"--{name}" for name in ("vary", "method", "trials", "predict") if getattr(arguments, name)]
    if arguments.find_learning_rate and given:
        raise UserError(f"--find-learning-rate is one run and takes no {given[0]}; sweep afterwards")
    _run(config, arguments)


def _run(config: Config, arguments: argparse.Namespace) -> None:
    from jaxgpt.parallel.accelerator import keep_freed_memory

    keep_freed_memory()  # before jax starts its threads
    from jaxgpt.reporting.sweep_page import write_page
    from jaxgpt.tuning.learning_rate import find_learning_rate
    from jaxgpt.tuning.search import SweepRequest
    from jaxgpt.tuning.trial_runner import sweep

    kind = "learning-rate" if arguments.find_learning_rate else "sweep"
    names = ("vary", "method", "trials", "seed", "predict", "json")
    request = SweepRequest(
        file=arguments.config,
        overrides={key: value for key, value in vars(arguments).items() if "." in key},
        workdir=arguments.workdir or Path("runs") / f"{Path(arguments.config).stem}-{kind}",
        **{name: getattr(arguments, name) for name in names},
    )
    (find_learning_rate if arguments.find_learning_rate else sweep)(config, request, write_page)


if __name__ == "__main__":
    sys.exit(main())
