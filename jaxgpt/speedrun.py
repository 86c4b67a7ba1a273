"""From nothing to a chat model in the time you have: `python -m jaxgpt.speedrun --minutes 10`.

Measures this machine, chooses a size, prepares text and conversations, pretrains, fine-tunes, asks the model what it
has never seen, and ends with a report and the line that opens the chat page. Stopped or killed at any moment, the same
command goes on. The folder holds two ordinary runs, pretrain/ and chat/, and their config files.

Without --data nothing is downloaded: the text is that of Python's library and the installed packages, the conversations
are made up, in English and Chinese, and their answers can be checked.
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
    parser = cli.parser("speedrun", __doc__)
    add = parser.add_argument
    time = parser.add_mutually_exclusive_group(required=True)
    time.add_argument("--minutes", metavar="M", type=float, help="the time for all of it")
    time.add_argument("--hours", metavar="H", type=float)
    add("--tokens", metavar="N", type=int, help="pretrain on so many tokens, however long that takes")
    sets = "builtin, or english, chinese, tinystories, code (downloads), or a file or folder of texts or conversations"
    add("--data", metavar="WHAT", default="builtin", help=f"{sets} [%(default)s]")
    add("--chat", metavar="PATH", help="conversations of your own [the set's, or made-up ones]")
    add("--workdir", metavar="DIR", type=Path, default=Path("runs/speedrun"), help="folder [%(default)s]")
    add("--seed", metavar="N", type=int, default=42, help="of the weights and the order of the data [%(default)s]")
    add("--price-per-hour", metavar="P", type=float, help="of this machine: the report then says what a run has cost")
    add("--dry-run", action="store_true", help="measure, prepare and say what would be trained")
    add("--tpu", metavar="SLICE", help="say it for a slice such as v5e-8, by the TPU compiler on this machine; no run")
    arguments = vars(parser.parse_args(argv))
    hours, tpu = arguments.pop("hours"), arguments.pop("tpu")
    arguments["minutes"] = arguments["minutes"] if hours is None else 60 * hours

    from jaxgpt.parallel.accelerator import keep_freed_memory

    keep_freed_memory()  # before jax starts its threads
    from jaxgpt.planning.planner import slice_machine
    from jaxgpt.tuning.speedrun_slice import print_slice_plan
    from jaxgpt.tuning.speedrun_stages import SpeedrunRequest, Verbs, run_stages

    if tpu:
        print_slice_plan(arguments["minutes"], tpu, slice_machine(tpu))
    else:
        run_stages(SpeedrunRequest(**arguments), Verbs(_train, _score))


def _train(config: Config, workdir: Path) -> None:
    from jaxgpt.evaluation.in_training import task_scorer
    from jaxgpt.reporting.run_page import write_summary
    from jaxgpt.training import run

    run.train(config, workdir, build_scorer=task_scorer(config.eval.tasks), write_report=write_summary)


def _score(workdir: Path, has_skills: bool) -> None:
    from jaxgpt.evaluation.measure import EvaluationOptions, measure
    from jaxgpt.evaluation.result_table import report
    from jaxgpt.reporting.run_page import add_evaluation

    generate = None if has_skills else Path()
    found = measure(EvaluationOptions(checkpoint=str(workdir), skills=has_skills, generate=generate))
    print(report(found))
    add_evaluation(str(workdir), found)


if __name__ == "__main__":
    cli.leave(main())
