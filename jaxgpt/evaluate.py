"""How good is a model? `python -m jaxgpt.evaluate --checkpoint runs/quickstart --text a.txt --task piqa=piqa.jsonl`.

--text: loss, perplexity and bits per byte of each file; windows overlap, so that every token has context, and the
stride is part of the number. --task NAME=FILE: questions with given answers, without examples before them, in the
benchmark's own JSONL format (lambada, hellaswag, piqa, winogrande, arc, openbookqa, blimp, cbt) or in your own
("choices": {"context": "...", "choices": ["...", "..."], "answer": 0}), and wikitext=wiki.test.raw. NAME alone or
NAME=tfds:DATASET takes them from TFDS. --harness: any task of lm-evaluation-harness. --generate: is what the model
writes varied, and does it end? --skills: how many made-up questions does a chat model answer rightly, in English and in
Chinese? With none of these, the validation split of the run. docs/evaluation.md explains each number.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = vars(parser().parse_args(argv))

    from jaxgpt.evaluation.measure import EvaluationOptions, measure
    from jaxgpt.evaluation.result_table import report
    from jaxgpt.reporting.run_page import add_evaluation

    file = arguments.pop("json")
    found = measure(EvaluationOptions(**arguments))
    print(report(found))
    if file:
        file.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    add_evaluation(arguments["checkpoint"], found)


def parser() -> argparse.ArgumentParser:
    flags = cli.parser("evaluate", __doc__)
    folders = "run, RUN@best, step, Hugging Face folder, hf:NAME"
    flags.add_argument("--checkpoint", metavar="WHERE", required=True, help=folders)
    flags.add_argument("--text", metavar="FILE", nargs="+", type=Path, default=[], help="UTF-8 files, one text each")
    flags.add_argument("--task", metavar="NAME[=FILE]", nargs="+", default=[], help="questions with given answers")
    flags.add_argument("--tfds-data-dir", metavar="DIR", type=Path, help="folder of TFDS's datasets [TFDS's own]")
    flags.add_argument("--harness", metavar="NAME", nargs="+", default=[], help="tasks of lm-evaluation-harness")
    flags.add_argument("--harness-include", metavar="DIR", type=Path, help="more tasks for --harness, as YAML files")
    flags.add_argument("--limit", metavar="N", type=int, help="only the first N questions of each task or skill")
    skills = "held-out questions of data.source = skills [20 of each skill in each language]"
    flags.add_argument("--skills", action="store_true", help=skills)
    flags.add_argument("--data", metavar="DIR", type=Path, help="the run's prepared data, if it has been moved")
    flags.add_argument("--stride", metavar="N", type=int, help="tokens between two windows [half of the model's block]")
    flags.add_argument("--batch-size", metavar="N", type=int, default=8, help="rows on each device [%(default)s]")
    flags.add_argument("--dtype", choices=["float32", "bfloat16"], help="compute type [the model's]")
    flags.add_argument("--json", metavar="FILE", type=Path, help="write the figures to this file, too")
    writing = flags.add_argument_group("what the model writes")
    prompts = "check what it writes after the prompts of FILE, one a line [after validation texts of the run]"
    writing.add_argument("--generate", metavar="FILE", nargs="?", type=Path, const=Path(), help=prompts)
    writing.add_argument("--max-new-tokens", metavar="N", type=int, help="[100, at most half of the block]")
    writing.add_argument("--temperature", metavar="T", type=float, default=1.0, help="0: the likeliest [%(default)s]")
    writing.add_argument("--seed", metavar="N", type=int, default=0, help="repeats the same texts [%(default)s]")
    return flags


if __name__ == "__main__":
    sys.exit(main())
