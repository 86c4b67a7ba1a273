"""The texts of one step's batch, each with its loss: `python -m jaxgpt.replay --checkpoint RUN --step N`.

The rows of the step's batch are read again, and each gets its loss under the weights of the nearest checkpoint at or
before the step; the highest comes first. Rows to leave out can be added to a skip list, for the run to go on without
them.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.config import Config
from jaxgpt.errors import UserError

_LONGEST = 2000  # characters of a text on the screen


@dataclasses.dataclass
class Text:
    """A text of a row: the row itself, or one of the conversations packed into it."""

    document: int | None
    """Number of the conversation in the source, from 0; None for text, which is one stream."""
    loss: float | None
    """Mean over the tokens that are learned, in nats; None where there is none."""
    learned_tokens: int
    pieces: list[tuple[str, bool]]
    """(text, whether it is learned), one after another."""


@dataclasses.dataclass
class Row:
    row: int
    """Its number in the whole run: what a skip list holds."""
    loss: float | None
    learned_tokens: int
    skipped: bool
    """It is in the run's skip list, so it weighs nothing; the loss is what it would be otherwise."""
    texts: list[Text]


@dataclasses.dataclass
class Replay:
    """One step's batch."""

    checkpoint: str
    step: int
    weights_step: int
    position: int
    """The batch's place in the data: step - 1, and what rollbacks left out."""
    batch_hash: int
    logged_hash: int | None
    """What metrics.jsonl says; None where the step is not logged."""
    loss: float | None
    """Mean over the learned tokens of the rows that are not skipped."""
    rows: list[Row]
    """The highest loss first."""


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("replay", __doc__)
    parser.add_argument("--checkpoint", metavar="RUN", type=Path, required=True, help="run folder")
    parser.add_argument("--step", metavar="N", type=int, required=True, help="the step whose batch is read, from 1")
    parser.add_argument("--weights-step", metavar="M", type=int, help="checkpoint whose weights give the losses")
    parser.add_argument("--data", metavar="DIR", type=Path, help="prepared data, where it is no longer where it was")
    parser.add_argument("--rows", metavar="K", type=int, default=10, help="rows to print [10]; --json has all")
    parser.add_argument("--skip-above", metavar="X", type=float, help="add rows with a higher loss to the skip list")
    parser.add_argument("--skip", metavar="ROW,...", type=_numbers, help="add these rows to the skip list")
    parser.add_argument("--skip-list", metavar="FILE", type=Path, help="[the run's own, else RUN/skip.txt]")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything to a file")
    arguments = parser.parse_args(argv)
    from jaxgpt.training.checkpoint import find_step, read_config

    run, newest = find_step(arguments.checkpoint)
    config = read_config(run)
    found = replay(run, arguments.step, arguments.weights_step, arguments.data)
    if arguments.json:
        arguments.json.write_text(json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False), encoding="utf-8")
    _say(report(found, config, arguments.rows))
    if arguments.skip or arguments.skip_above is not None:
        _say(_skip(run, newest, config, found, arguments))


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of rows such as 953,960")
    return [int(word) for word in words]


def replay(run: Path, step: int, weights_step: int | None = None, data: Path | None = None) -> Replay:
    """Read the batch of `step` again and give each of its texts its loss.

    Raises:
        UserError: there is no such step or checkpoint, or the data is not there; says which there are.
    """
    from jaxgpt.data.pipeline import train_rows
    from jaxgpt.data.skip_list import read_skip_list
    from jaxgpt.training.checkpoint import FOLDER, read_config
    from jaxgpt.training.models import load_model
    from jaxgpt.training.resume import dataset_read_by
    from jaxgpt.training.step import batch_hash

    config = read_config(run)
    weights_step = _weights_step(run, config, step, weights_step)
    dataset = dataset_read_by(run, weights_step, data)
    skip = read_skip_list(config.data.skip_list)
    logged, size = _logged_hash(run, step), config.train.global_batch_size
    how = {"seed": config.train.seed, "global_batch_size": size, "block_size": config.block_size}
    for offset in _offsets(run, step):
        position = step - 1 + offset
        batch = train_rows(dataset.train, step=position, rows=range(size), **how)
        found_hash = int(batch_hash(batch))
        if found_hash == logged:
            break
    model = load_model(run / FOLDER / str(weights_step))
    numbers = range(position * size, (position + 1) * size)
    rows = _rows(config, dataset, model, batch, numbers, skip)
    counted = [row for row in rows if row.learned_tokens and not row.skipped]
    total = sum(row.learned_tokens for row in counted)
    loss = math.fsum(row.loss * row.learned_tokens for row in counted) / total if total else None
    rows.sort(key=lambda row: (row.loss is not None, math.isnan(row.loss or 0), row.loss), reverse=True)
    return Replay(str(run), step, weights_step, position, found_hash, logged, loss, rows)


# ---------------------------------------------------------------- what there is


def _weights_step(run: Path, config: Config, step: int, wanted: int | None) -> int:
    """The checkpoint whose weights are used: `wanted`, else the last one up to `step`, else the first."""
    from jaxgpt.training.checkpoint import finished_steps

    last, steps = config.train.max_steps, finished_steps(run)
    if last is None or config.train.global_batch_size is None:
        raise UserError(f"{run} holds weights and was not trained here, so there is no step to replay")
    if not 1 <= step <= last:
        raise UserError(f"--step {step}: the run in {run} has the steps 1 to {last}")
    if wanted is not None and wanted not in steps:
        raise UserError(f"--weights-step {wanted}: {run} holds the checkpoints of steps {steps}")
    return wanted if wanted is not None else max((s for s in steps if s <= step), default=steps[0])


def _offsets(run: Path, step: int) -> list[int]:
    """What rollbacks may have left out before `step`, the likeliest first: as the checkpoints around it have it.

    Where the two differ, the run went back between them, before `step` or after it.
    """
    from jaxgpt.training.checkpoint import finished_steps, read_metadata

    steps = finished_steps(run)
    around = [*[s for s in steps if s >= step][:1], *[s for s in steps if s < step][-1:]]
    return list(dict.fromkeys(read_metadata(run, s).get("data_offset", 0) for s in around))


def _logged_hash(run: Path, step: int) -> int | None:
    from jaxgpt.training.metrics import METRICS_FILE, read_metrics

    records = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    return next((line["batch_hash"] for line in records if line["step"] == step and "batch_hash" in line), None)


# ---------------------------------------------------------------- texts and losses


def _rows(config: Config, dataset, model, batch, numbers: range, skip: frozenset[int]) -> list[Row]:
    import numpy as np
    from tqdm import tqdm

    from jaxgpt.data.marking import pieces
    from jaxgpt.data.pipeline import place_of_row

    losses, rows = _token_losses(config, model), []
    bar = tqdm(numbers, desc="replaying", unit="row", disable=None, leave=False)
    for tokens_T, targets_T, weights_T, segments_T, number in zip(*batch[:3], _segments(batch), bar, strict=True):
        segments = None if batch.segments_BT is None else segments_T
        loss_T = np.where(weights_T > 0, losses(model.params, tokens_T, targets_T, segments), 0.0)
        documents = [None]
        if segments is not None:
            place, _ = place_of_row(dataset.train, config.train.seed, number, config.block_size)
            documents = dataset.train.row(place).documents.tolist()
        texts = []
        for segment, document in enumerate(documents, start=1):
            there = segments_T == segment
            all_tokens = np.append(tokens_T[there], targets_T[-1:]) if segments is None else tokens_T[there]
            learned = np.append(False, weights_T[there] > 0)[: len(all_tokens)]  # a target is the token after it
            mean, count = _mean(loss_T[there], weights_T[there])
            texts.append(Text(document, mean, count, pieces(all_tokens, learned, model.tokenizer)))
        mean, count = _mean(loss_T, weights_T)
        rows.append(Row(number, mean, count, number in skip, texts))
    return rows


def _segments(batch):
    """[B, T]: the segments; of text, whose rows are one segment each, ones."""
    import numpy as np

    return np.ones_like(batch.tokens_BT) if batch.segments_BT is None else batch.segments_BT


def _token_losses(config: Config, model):
    """A function (parameters, tokens, targets, segments or None, each [T]) -> the loss of each target in nats [T]."""
    import jax
    import jax.numpy as jnp

    from jaxgpt.model import gpt2
    from jaxgpt.model.backend_choice import choose_backend

    backend, _ = choose_backend(model.config.model, jax.devices()[0].platform, config.block_size)

    @jax.jit
    def losses(params, tokens_T, targets_T, segments_T):
        network = gpt2.bind(model.config.model, model.vocab_size, params)
        segments_BT = None if segments_T is None else segments_T[None]
        hidden_BTD = network.hidden(tokens_T[None], segments_BT=segments_BT, backend=backend)
        logprobs_TV = jax.nn.log_softmax(network.logits(hidden_BTD)[0])
        return -jnp.take_along_axis(logprobs_TV, targets_T[:, None], axis=1)[:, 0]

    return losses


def _mean(losses, weights) -> tuple[float | None, int]:
    """(mean loss of the targets that count, how many these are)"""
    count = int((weights > 0).sum())
    return (math.fsum(losses.tolist()) / count if count else None), count


# ---------------------------------------------------------------- for a person


def report(found: Replay, config: Config, most: int, colour: bool | None = None) -> str:
    """The rows for a screen. In conversations the learned text is green, or stands between [[ and ]]."""
    from jaxgpt.data.marking import marked, marks

    loss = "none" if found.loss is None else f"{found.loss:.4f}"
    lines = [
        f"step {found.step} of {config.train.max_steps}: {len(found.rows)} rows of {config.block_size} tokens, batch "
        f"{found.position} of the data; mean loss {loss} under the weights of step {found.weights_step}",
        _hash_line(found),
    ]
    if found.weights_step > found.step:
        lines.append(f"note: no checkpoint is as old as step {found.step}; these weights have learned from it")
    for row in found.rows[:most]:
        facts = f"row {row.row}, loss {_number(row.loss)}, {row.learned_tokens} tokens learned"
        lines.append(f"\n=== {facts}{', in the skip list' if row.skipped else ''}")
        for text in row.texts:
            if text.document is not None:
                lines.append(f"--- conversation {text.document + 1}, loss {_number(text.loss)}")
            lines.append(marked(text.pieces, ("", "") if text.document is None else marks(colour), _LONGEST))
    if len(found.rows) > most:
        lines.append(f"\n({len(found.rows) - most} more rows: --rows {len(found.rows)}, or --json FILE)")
    return "\n".join(lines)


def _hash_line(found: Replay) -> str:
    if found.logged_hash is None:
        return f"batch hash {found.batch_hash}; step {found.step} is not in metrics.jsonl, so it cannot be compared"
    if found.logged_hash == found.batch_hash:
        return f"batch hash {found.batch_hash}, the one in metrics.jsonl: this is what the run has read"
    return (
        f"warning: batch hash {found.batch_hash}, but metrics.jsonl has {found.logged_hash}: this is not what the run "
        "has read"
    )


def _number(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"


def _say(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _skip(run: Path, newest: int, config: Config, found: Replay, arguments) -> str:
    """Add rows to the skip list, and say how to go on without them."""
    from jaxgpt.data.skip_list import add_to_skip_list

    numbers = {row.row for row in found.rows}
    if found.logged_hash not in (None, found.batch_hash):
        raise UserError(f"nothing is added to a skip list: the batch of step {found.step} is not what the run has read")
    for row in arguments.skip or ():
        if row not in numbers:
            raise UserError(f"--skip {row}: step {found.step} has the rows {min(numbers)} to {max(numbers)}")
    chosen = set(arguments.skip or ())
    if arguments.skip_above is not None:
        chosen |= {row.row for row in found.rows if row.loss is not None and not row.loss <= arguments.skip_above}
    file = arguments.skip_list or Path(config.data.skip_list or run / "skip.txt")
    new = add_to_skip_list(file, chosen, f"step {found.step}")
    if not new:
        return f"\n{file}: nothing to add"
    force = "" if str(file) == config.data.skip_list else " --force"
    told = f"\n{file}: {len(new)} rows added ({', '.join(map(str, new))}); go on without them with\n"
    told += f"  python -m jaxgpt.train ... --workdir {run} --data.skip_list {file}{force}"
    if newest >= found.step:
        told += f"\n(the run is past step {found.step}: this matters when it goes on from a checkpoint before that)"
    return told


if __name__ == "__main__":
    sys.exit(main())
