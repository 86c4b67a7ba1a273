"""Text or conversations to a tokenized dataset: `python -m jaxgpt.prepare --config configs/quickstart.toml`.

Finds the dataset that belongs to the settings [data], [cleaning], [tokenizer], [chat] and [augmentation], or makes it,
and prints its folder and its content. The report.html in that folder has the details, with examples of what was left
out or changed. A preparation that was killed continues where it was. `train` does the same when it starts.

With `--runner beam` the chunks are cleaned and tokenized by an Apache Beam pipeline, on the runner that Beam's options
after `--` name. Its workers must see data.prepared_dir under the same path, and have jaxgpt installed:

    jaxgpt prepare --config FILE --runner beam -- --runner FlinkRunner --flink_master HOST:8081
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.config import Config
from jaxgpt.errors import UserError


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    arguments, beam_options = _parser().parse_args(words[:end]), words[end + 1 :]
    config = cli.config_from(arguments)
    if beam_options and arguments.runner != "beam":
        raise UserError(f"{' '.join(beam_options)} after -- are options for Beam; add --runner beam")
    _prepare(config, arguments, beam_options)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("prepare", __doc__)
    cli.add_config_arguments(parser)
    parser.add_argument("--runner", choices=("local", "beam"), default="local", help="what processes the chunks")
    parser.add_argument("--json", metavar="FILE", help="also write the report there")
    parser.add_argument("--tpu", metavar="SLICES", help="say whether this host can feed these, for example v5e-8,v5p-8")
    return parser


def _prepare(config: Config, arguments: argparse.Namespace, beam_options: list[str]) -> None:
    from jaxgpt.data.dataset import TokenDataset, open_dataset
    from jaxgpt.model.huggingface import locate_tokenizer
    from jaxgpt.planning.plan_search import own_candidate
    from jaxgpt.planning.topology import parse_slices
    from jaxgpt.preparation import lint, preparation_report
    from jaxgpt.preparation.make_dataset import given_tokenizer, prepare
    from jaxgpt.preparation.runners import Beam

    slices = parse_slices(arguments.tpu) if arguments.tpu else []
    runner = Beam(beam_options) if arguments.runner == "beam" else None
    measured: dict[str, object] = {}

    def inspect(dataset: TokenDataset) -> dict[str, object]:
        needed = {}
        for where in slices:  # by plan's arithmetic, for the settings as they are
            own = own_candidate(config, dataset.vocab_size, where)
            tokens = own.config.global_batch_size * own.config.block_size
            needed[where.name] = round(tokens / own.guessed_seconds / where.hosts)
        measured["host"] = preparation_report.host(config, dataset, needed)
        return measured

    folder = prepare(config, given_tokenizer(config, locate_tokenizer), runner, inspect)
    report = preparation_report.read(folder)
    if not measured and (slices or arguments.json):  # the dataset was there already
        report |= inspect(open_dataset(folder, verify="sizes"))
        print(f"  host       {report['host']['line']}")
    if config.data.format == "chat":  # as `train` shows it before its first step
        print(lint.show(lint.check(open_dataset(folder, verify="sizes"))))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
