"""Replays a step of a run: reads its batch again and gives each text in it the loss under a checkpoint's weights."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxgpt.config import Config
from jaxgpt.data.chat import marked, marks, pieces
from jaxgpt.data.dataset import Batch, PackedRows, TokenDataset
from jaxgpt.data.pipeline import add_to_skip_list, place_of_row, read_skip_list, train_rows
from jaxgpt.errors import UserError
from jaxgpt.model import gpt2
from jaxgpt.model.backend_choice import choose_backend
from jaxgpt.training.checkpoint import FOLDER, finished_steps, read_config, read_metadata
from jaxgpt.training.metrics import METRICS_FILE, read_metrics
from jaxgpt.training.models import LoadedModel, load_model
from jaxgpt.training.resume import dataset_read_by
from jaxgpt.training.step import batch_hash

_LONGEST = 2000  # characters of a text on the screen


@dataclasses.dataclass
class ReplayedText:
    """A text of a row: the row itself, or one of the conversations and texts packed into it."""

    document: int | None  # number in the source, from 0; None for text, which is one stream
    loss: float | None  # mean over the learned tokens, in nats; None if there is none
    learned_tokens: int
    pieces: list[tuple[str, bool]]  # (text, whether it is learned) of consecutive parts
    is_plain: bool  # no conversation, so that every token is learned


@dataclasses.dataclass
class ReplayedRow:
    row: int  # its number in the whole run, as in a skip list
    loss: float | None
    learned_tokens: int
    skipped: bool
    """It is in the run's skip list, so it has weight 0 in training; the loss is computed as if it were not."""
    texts: list[ReplayedText]


@dataclasses.dataclass
class ReplayedStep:
    checkpoint: str
    step: int
    weights_step: int
    position: int  # the batch's place in the data: step - 1, plus what rollbacks left out
    batch_hash: int
    logged_hash: int | None  # the hash in metrics.jsonl; None if the step is not logged
    loss: float | None  # mean over the learned tokens of the rows that are not skipped
    rows: list[ReplayedRow]  # the highest loss first


def replay(run: Path, step: int, weights_step: int | None = None, data: Path | None = None) -> ReplayedStep:
    """Read the batch of `step` again and compute the loss of each of its texts.

    Raises:
        UserError: no such step or checkpoint (names those there are), or the data is not there.
    """
    config = read_config(run)
    weights_step = _weights_step(run, config, step, weights_step)
    dataset = dataset_read_by(run, weights_step, data)
    records = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    logged = next((line["batch_hash"] for line in records if line["step"] == step and "batch_hash" in line), None)
    size = config.global_batch_size
    how: dict[str, Any] = {"seed": config.train.seed, "global_batch_size": size, "block_size": config.block_size}
    for offset in _offsets(run, step):
        position = step - 1 + offset
        batch = train_rows(dataset.train, step=position, rows=range(size), **how)
        found_hash = int(batch_hash(batch))
        if found_hash == logged:
            break
    model = load_model(run / FOLDER / str(weights_step))
    rows = list(_rows(config, dataset, model, batch, range(position * size, (position + 1) * size)))
    counted = [(row.loss, row.learned_tokens) for row in rows if row.loss is not None and not row.skipped]
    total = sum(count for _, count in counted)
    loss = math.fsum(loss * count for loss, count in counted) / total if total else None
    rows.sort(key=lambda row: (row.loss is not None, math.isnan(row.loss or 0), row.loss), reverse=True)
    return ReplayedStep(str(run), step, weights_step, position, found_hash, logged, loss, rows)


def _weights_step(run: Path, config: Config, step: int, wanted: int | None) -> int:
    """The checkpoint whose weights are used: `wanted`, else the last one up to `step`, else the first."""
    last, steps = config.train.max_steps, finished_steps(run)
    if last is None or config.train.global_batch_size is None:
        raise UserError(f"{run} holds weights and was not trained here, so there is no step to replay")
    if not 1 <= step <= last:
        raise UserError(f"--step {step}: the run in {run} has the steps 1 to {last}")
    if wanted is not None and wanted not in steps:
        raise UserError(f"--weights-step {wanted}: {run} holds the checkpoints of steps {steps}")
    return wanted if wanted is not None else max((s for s in steps if s <= step), default=steps[0])


def _offsets(run: Path, step: int) -> list[int]:
    """The batches that rollbacks may have left out before `step`, the likeliest number first.

    The checkpoints around the step know them. If they differ, the run went back between them, before `step` or after.
    """
    steps = finished_steps(run)
    around = [*[s for s in steps if s >= step][:1], *[s for s in steps if s < step][-1:]]
    return list(dict.fromkeys(read_metadata(run, s).get("data_offset", 0) for s in around))


def _rows(
    config: Config, dataset: TokenDataset, model: LoadedModel, batch: Batch, numbers: range
) -> Iterable[ReplayedRow]:
    """The rows of a batch [B, T], which have the `numbers` in the run."""
    skip, losses = read_skip_list(config.data.skip_list), _token_losses(config, model)
    arrays = (np.asarray(array) for array in (batch.tokens_BT, batch.targets_BT, batch.weights_BT))
    is_packed = batch.segments_BT is not None
    segments_BT = np.asarray(batch.segments_BT) if is_packed else np.ones_like(batch.tokens_BT)
    bar = tqdm(numbers, desc="replaying", unit="row", disable=None, leave=False)
    for tokens_T, targets_T, weights_T, segments_T, number in zip(*arrays, segments_BT, bar, strict=True):
        losses_T = losses(model.params, tokens_T, targets_T, segments_T if is_packed else None)
        loss_T = np.where(weights_T > 0, losses_T, 0.0)
        documents: list[int | None] = [None]
        if isinstance(dataset.train, PackedRows):
            place, _ = place_of_row(dataset.train, config.train.seed, number, config.block_size)
            packed = dataset.train.row(place)
            documents = packed.documents.tolist()
        texts = []
        for segment, document in enumerate(documents, start=1):
            there = segments_T == segment
            tokens = np.append(tokens_T[there], targets_T[-1:]) if document is None else tokens_T[there]
            learned = np.append(False, weights_T[there] > 0)[: len(tokens)]  # a target is the token after it
            text = pieces(tokens, learned, model.tokenizer)
            is_plain = document is None or bool(packed.supervised[there][0])  # a conversation begins with a question
            texts.append(ReplayedText(document, *_mean(loss_T[there], weights_T[there]), text, is_plain))
        yield ReplayedRow(number, *_mean(loss_T, weights_T), number in skip, texts)


def _token_losses(config: Config, model: LoadedModel) -> Callable[..., jax.Array]:
    """A function (parameters, tokens, targets, segments or None, each [T]) -> the loss of each target in nats, [T]."""
    backend, _ = choose_backend(model.config.model, jax.devices()[0].platform, config.block_size)

    @jax.jit
    def losses(params: dict, tokens_T: jax.Array, targets_T: jax.Array, segments_T: jax.Array | None) -> jax.Array:
        network = gpt2.bind(model.config.model, model.vocab_size, params)
        segments_BT = None if segments_T is None else segments_T[None]
        hidden_BTD = network.hidden(tokens_T[None], segments_BT=segments_BT, backend=backend)
        logprobs_TV = jax.nn.log_softmax(network.logits(hidden_BTD)[0])
        return -jnp.take_along_axis(logprobs_TV, targets_T[:, None], axis=1)[:, 0]

    return losses


def _mean(losses: np.ndarray, weights: np.ndarray) -> tuple[float | None, int]:
    """(mean loss of the targets that count, their number)"""
    count = int((weights > 0).sum())
    return (math.fsum(losses.tolist()) / count if count else None), count


# ---------------------------------------------------------------- on the screen


def report(found: ReplayedStep, most: int, colour: bool | None = None) -> str:
    """The first `most` rows for a screen. In conversations, learned text is green, or between [[ and ]]."""
    config = read_config(Path(found.checkpoint))
    lines = [
        f"step {found.step} of {config.max_steps}: {len(found.rows)} rows of {config.block_size} tokens, batch "
        f"{found.position} of the data; mean loss {_number(found.loss)} under the weights of step {found.weights_step}"
    ]
    here, logged = f"batch hash {found.batch_hash}", found.logged_hash
    if logged is None:
        lines.append(f"{here}; step {found.step} is not in metrics.jsonl, so it cannot be compared")
    elif logged == found.batch_hash:
        lines.append(f"{here}, the one in metrics.jsonl: the run has read this batch")
    else:
        lines.append(f"warning: {here}, but metrics.jsonl has {logged}: the run has not read this batch")
    if found.weights_step > found.step:
        lines.append(f"note: no checkpoint is as old as step {found.step}; these weights have learned from it")
    for row in found.rows[:most]:
        facts = f"row {row.row}, loss {_number(row.loss)}, {row.learned_tokens} tokens learned"
        lines.append(f"\n=== {facts}{', in the skip list' if row.skipped else ''}")
        for text in row.texts:
            if text.document is not None:
                kind = "text" if text.is_plain else "conversation"
                lines.append(f"--- {kind} {text.document + 1}, loss {_number(text.loss)}")
            lines.append(marked(text.pieces, ("", "") if text.document is None else marks(colour), _LONGEST))
    if len(found.rows) > most:
        lines.append(f"\n({len(found.rows) - most} more rows: --rows {len(found.rows)}, or --json FILE)")
    return "\n".join(lines)


def _number(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"


# ---------------------------------------------------------------- the skip list


def skip_rows(found: ReplayedStep, chosen: Iterable[int], above: float | None, file: Path | None) -> str:
    """Add the `chosen` rows, and those with a loss above `above`, to a skip list; returns how to go on without them.

    `file` is the run's own skip list, else skip.txt in the run folder.

    Raises:
        UserError: the step has no such row, or the batch is not the one that the run has read.
    """
    run, step = Path(found.checkpoint), found.step
    config, newest = read_config(run), finished_steps(run)[-1]
    numbers, rows = {row.row for row in found.rows}, set(chosen)
    if found.logged_hash not in (None, found.batch_hash):
        raise UserError(f"nothing is added to a skip list: the run has not read this batch in step {step}")
    if unknown := sorted(rows - numbers):
        raise UserError(f"--skip {unknown[0]}: step {step} has the rows {min(numbers)} to {max(numbers)}")
    if above is not None:
        rows |= {row.row for row in found.rows if row.loss is not None and not row.loss <= above}
    file = file or Path(config.data.skip_list or run / "skip.txt")
    new = add_to_skip_list(file, rows, f"step {step}")
    if not new:
        return f"\n{file}: nothing to add"
    force = "" if str(file) == config.data.skip_list else " --force"
    message = f"\n{file}: {len(new)} rows added ({', '.join(map(str, new))}); go on without them with\n"
    message += f"  python -m jaxgpt.train ... --workdir {run} --data.skip_list {file}{force}"
    if newest >= step:
        message += f"\n(the run is past step {step}: this has an effect when it resumes from an earlier checkpoint)"
    return message
