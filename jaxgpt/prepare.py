"""Text or conversations to a tokenized dataset: `python -m jaxgpt.prepare --config configs/quickstart.toml`.

Finds the dataset that belongs to the settings [data], [cleaning], [tokenizer], [chat] and [augmentation], or makes it,
and prints its folder and what is in it; report.html in that folder tells more, with examples of what was left out or
changed. A preparation that was killed goes on where it was. `train` does the same when it starts.

With `--runner beam` the chunks are cleaned and tokenized by an Apache Beam pipeline, on the runner that Beam's options
after `--` name. Its workers have to see data.prepared_dir under the same path, and have jaxgpt installed:

    jaxgpt prepare --config FILE --runner beam -- --runner FlinkRunner --flink_master HOST:8081
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.config import Config
from jaxgpt.errors import UserError

_MEASURED_SECONDS = 1.0
_MEASURED_ROWS = 64  # a batch


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    beam_options = words[words.index("--") + 1 :] if "--" in words else []
    arguments = _parser().parse_args(words[: words.index("--")] if "--" in words else words)
    config = cli.config_from(arguments)
    if beam_options and arguments.runner != "beam":
        raise UserError(f"{' '.join(beam_options)} after -- are options for Beam; add --runner beam")

    from jaxgpt.model.huggingface import locate
    from jaxgpt.preparation import preparation_report
    from jaxgpt.preparation.preparation import given_tokenizer, prepare
    from jaxgpt.preparation.runners import Beam

    slices = _slices(arguments.tpu)
    runner = Beam(beam_options) if arguments.runner == "beam" else None
    inspected = []

    def inspect(dataset) -> dict:
        inspected.append(host(config, dataset, slices))
        return {"host": inspected[0]}

    folder = prepare(config, given_tokenizer(config, locate), runner, inspect)
    report = preparation_report.read(folder)
    if not inspected and (slices or arguments.json):  # it was there already
        report["host"] = _measured_anew(config, folder, slices)
        print(f"  host       {report['host']['line']}")
    if config.data.format == "chat":
        _show_conversations(folder)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _parser():
    parser = cli.parser("prepare", __doc__)
    cli.add_config_arguments(parser)
    parser.add_argument("--runner", choices=("local", "beam"), default="local", help="who works on the chunks")
    parser.add_argument("--json", metavar="FILE", help="write the report there, too")
    parser.add_argument(
        "--tpu", metavar="SLICES", help="say whether this machine can feed these, for example v5e-8,v5p-8"
    )
    return parser


def _slices(text: str | None) -> list:
    if not text:
        return []
    from jaxgpt.planning.topology import parse_slices

    return parse_slices(text)


def _show_conversations(folder: Path) -> None:
    """What `train` will print before its first step."""
    from jaxgpt.data.dataset import open_dataset
    from jaxgpt.data.tokenizer import load_tokenizer
    from jaxgpt.preparation import lint

    print(lint.show(lint.check(open_dataset(folder, verify="sizes"), load_tokenizer(folder / "tokenizer"))))


# ---------------------------------------------------------------- whether this machine can feed a device


def _measured_anew(config: Config, folder: Path, slices: list) -> dict[str, object]:
    from jaxgpt.data.dataset import open_dataset

    return host(config, open_dataset(folder, verify="sizes"), slices)


def host(config: Config, dataset, slices: list) -> dict[str, object]:
    """Tokens a second that one process of this machine reads, beside those that each of the slices needs of a host."""
    found = read_speed(dataset.train, config.block_size)
    told = [f"one process reads {_big(found)} tokens/s at T = {config.block_size:,}"]
    needs = [_need(config, dataset.vocab_size, where) for where in slices]
    for need in needs:
        ratio = found / need["tokens_per_second"]
        verdict = f"this machine feeds it {ratio:.1f} times over" if ratio >= 1 else "this machine is too slow for it"
        told.append(
            f"{need['slice']} is estimated to train {_big(need['tokens_per_second'])} tokens/s a host: {verdict}"
        )
    return {"tokens_per_second": round(found), "slices": needs, "line": "; ".join(told)}


def read_speed(split, block_size: int, seconds: float = _MEASURED_SECONDS) -> float:
    """Tokens a second of the training pipeline in this process, from the files to the arrays of a batch."""
    from jaxgpt.data.pipeline import train_rows

    def read(step: int) -> None:
        rows = range(_MEASURED_ROWS)
        train_rows(split, seed=0, step=step, global_batch_size=_MEASURED_ROWS, block_size=block_size, rows=rows)

    read(0)  # imports, opens files
    step, started = 1, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        read(step)
        step += 1
    return (step - 1) * _MEASURED_ROWS * block_size / elapsed


def _need(config: Config, vocab_size: int, where) -> dict[str, object]:
    """What `plan` would estimate by arithmetic for the config's own settings on the slice."""
    from jaxgpt.planning.plan_search import own_candidate

    own = own_candidate(config, vocab_size, where)
    tokens = own.config.train.global_batch_size * own.config.block_size
    return {"slice": where.name, "tokens_per_second": round(tokens / own.guessed_seconds / where.hosts)}


def _big(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.0f} k"


if __name__ == "__main__":
    sys.exit(main())
