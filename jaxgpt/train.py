"""Pretrain, continue or fine-tune: `python -m jaxgpt.train --config configs/quickstart.toml`.

From text to samples in one command: the dataset is prepared when it is not there, the run resumes by itself
when its folder holds a checkpoint, and ends with an evaluation, a sample of text, report.html and hf/, the
weights as a folder that Hugging Face's transformers reads.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import errors

if __name__ == "__main__":
    errors.stop_at_once(lambda: importlib.import_module("jaxgpt.parallel.join").tell_stopped)

from jaxgpt import cli
from jaxgpt.config import Config


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    train(*read_arguments(argv))


def read_arguments(argv: Sequence[str] | None) -> tuple[Config, Path, bool]:
    """The settings, the run folder and --force of a command line."""
    parser = cli.parser("train", __doc__)
    parser.add_argument("--workdir", metavar="DIR", type=Path, help="run folder [default runs/NAME of the config]")
    parser.add_argument("--force", action="store_true", help="go on with settings that change what follows")
    cli.add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    workdir = arguments.workdir or Path("runs") / Path(arguments.config or "").stem
    return cli.config_from(arguments), workdir, arguments.force


def train(config: Config, workdir: Path, force: bool = False) -> None:
    """`training.run.train`, with the tasks of evaluation/ and the report of reporting/."""
    from jaxgpt.parallel.accelerator import keep_freed_memory

    keep_freed_memory()  # before jax starts its threads
    from jaxgpt.evaluation.in_training import task_scorer
    from jaxgpt.reporting.run_page import write_summary
    from jaxgpt.training import run

    run.train(config, workdir, force, build_scorer=task_scorer(config.eval.tasks), write_report=write_summary)


if __name__ == "__main__":
    cli.leave(main())
