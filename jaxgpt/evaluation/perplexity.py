"""How well a model predicts a text: every token is scored once, with as much context as the windows give it.

The first window scores all of its targets. Each next window moves on by `stride` tokens and scores only these; the
tokens before them are context (the sliding window of Hugging Face's page "Perplexity of fixed-length models"). A token
thus has at least window - stride tokens before it, if the text has as many. stride = window cuts the text into windows
that do not overlap, which is what `train` reports; a smaller stride gives lower numbers and takes longer, so a number
means nothing without its stride.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from tqdm import tqdm

from jaxgpt.config import Config
from jaxgpt.data.dataset import Batch, Split, TokenStream
from jaxgpt.errors import UserError
from jaxgpt.parallel.sharding import rows_sharding
from jaxgpt.training.models import LoadedModel
from jaxgpt.training.step import build_eval_step

AHEAD = 4  # batches in flight
ANSWERS = "validation answers"


class EncodedText(NamedTuple):
    """A text to score."""

    read: Callable[[int, int], np.ndarray]
    """(start, length) -> tokens start, start + 1, ..., int32 [length]."""
    num_tokens: int
    """Token 0 is only context: nothing stands before it."""
    num_bytes: int
    """UTF-8."""


class TextBatches(NamedTuple):
    """Batches of rows of one text, in numpy."""

    name: str
    batches: Iterable[Batch]
    num_batches: int
    num_bytes: int
    """UTF-8 bytes of what is scored."""


@dataclasses.dataclass(frozen=True)
class TextLoss:
    """A loss as its sum, so that those of several texts can be added."""

    loss_sum: float
    """Nats."""
    count: int
    """Targets scored."""
    num_bytes: int

    @property
    def loss(self) -> float:
        """Mean over the targets, in nats."""
        return self.loss_sum / self.count

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp(710) overflows a float64

    @property
    def bits_per_byte(self) -> float:
        return self.loss_sum / math.log(2) / self.num_bytes


# ---------------------------------------------------------------- texts as batches


def encoded_text(tokens: Iterable[int], num_bytes: int, end_of_text: int) -> EncodedText:
    """A document by itself: the end-of-text token stands before it, as in training, and is not scored."""
    array = np.array([end_of_text, *tokens], np.int32)
    return EncodedText(lambda start, length: array[start : start + length], len(array), num_bytes)


def windows(num_tokens: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of the windows that score the tokens 1..num_tokens - 1, each once.

    Inputs are begin..end - 2, targets begin + 1..end - 1; the targets from `first` on are scored.
    """
    begin, first = 0, 1
    while first < num_tokens:
        end = min(begin + 1 + block_size, num_tokens)
        yield begin, first, end
        begin, first = begin + stride, end


def text_batches(name: str, text: EncodedText, block_size: int, stride: int, rows: int) -> TextBatches:
    """The windows of a text as batches of [rows, block_size]; padding weighs 0."""
    count = sum(1 for _ in windows(text.num_tokens, block_size, stride))
    return TextBatches(name, _batches(text, block_size, stride, rows), -(-count // rows), text.num_bytes)


def _batches(text: EncodedText, block_size: int, stride: int, rows: int) -> Iterator[Batch]:
    spans = windows(text.num_tokens, block_size, stride)
    while part := list(itertools.islice(spans, rows)):
        tokens_BT, targets_BT = np.zeros((2, rows, block_size), np.int32)
        weights_BT = np.zeros((rows, block_size), np.float32)
        for row, (begin, first, end) in enumerate(part):
            span = text.read(begin, end - begin)
            tokens_BT[row, : len(span) - 1], targets_BT[row, : len(span) - 1] = span[:-1], span[1:]
            weights_BT[row, first - begin - 1 : len(span) - 1] = 1.0
        yield Batch(tokens_BT, targets_BT, weights_BT)


def validation_batches(validation: Split, block_size: int, stride: int | None, rows: int) -> TextBatches:
    """The validation split of a run: windows of its texts, or its conversations, each whole.

    Raises:
        UserError: there is a stride, but the split holds conversations.
    """
    if isinstance(validation, TokenStream):
        text = EncodedText(validation.read, validation.num_tokens, validation.num_bytes)
        return text_batches("validation", text, block_size, stride or default_stride(block_size), rows)
    if stride is not None:
        raise UserError("--stride: conversations are scored whole, each by itself; leave it out")
    count = -(-validation.rows_to_evaluate(block_size) // rows)
    numbers = (list(range(batch * rows, (batch + 1) * rows)) for batch in range(count))
    batches = (validation.evaluation_rows(batch, block_size) for batch in numbers)
    return TextBatches(ANSWERS, batches, count, validation.num_bytes)


def default_stride(block_size: int) -> int:
    return max(block_size // 2, 1)


# ---------------------------------------------------------------- losses


def score_texts(texts: Sequence[TextBatches], config: Config, model: LoadedModel, mesh: Mesh) -> dict[str, TextLoss]:
    """The loss of each text by its name, and "all" for several texts together."""
    eval_step, shardings = build_eval_step(config, model.vocab_size, mesh)
    params = jax.device_put(model.params, shardings)
    losses = {}
    for text in texts:
        with tqdm(total=text.num_batches, desc=text.name, unit="batch", disable=None, leave=False) as bar:
            losses[text.name] = score(lambda batch: eval_step(params, batch), text, rows_sharding(mesh), bar.update)
    if len(losses) > 1:
        sums = zip(*((each.loss_sum, each.count, each.num_bytes) for each in losses.values()))
        losses["all"] = TextLoss(*map(sum, sums))
    return losses


def score(
    losses: Callable[[Batch], tuple[jax.Array, jax.Array]],
    text: TextBatches,
    sharding: Sharding,
    progress: Callable[[], object] = lambda: None,
) -> TextLoss:
    """The loss of a text. `losses` gives (summed loss, summed weights) of a batch that lies as `sharding` says.

    Each batch is summed on the devices, in float32; the batches are added in Python's float64. `progress` is called
    after each batch.
    """
    sums: list[tuple[jax.Array, jax.Array]] = []
    waiting: collections.deque[jax.Array] = collections.deque()
    for batch in text.batches:
        sums.append(losses(jax.tree.map(lambda rows: jax.device_put(rows, sharding), batch)))
        waiting.append(sums[-1][0])
        if len(waiting) > AHEAD:
            waiting.popleft().block_until_ready()
            progress()
    found = jax.device_get(sums)
    count = round(math.fsum(float(count) for _, count in found))
    return TextLoss(math.fsum(float(loss) for loss, _ in found), count, text.num_bytes)
