"""How well a model predicts a text: every token is scored once, with as much before it as the windows give it.

The first window scores all of its targets. Each next one moves on by `stride` tokens and scores only these; the
tokens before them are context (the sliding window of Hugging Face's page "Perplexity of fixed-length models"). So a
token has at least window - stride tokens before it, where the text has as many. stride = window is the plain cut into
windows that do not overlap, which is what `train` reports; a smaller one gives lower numbers and takes longer, so a
number means nothing without its stride.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from jaxgpt.data.dataset import Batch

AHEAD = 4  # batches in flight


class Text(NamedTuple):
    """A text to score."""

    read: Callable[[int, int], np.ndarray]
    """(start, length) -> tokens start, start + 1, ..., int32 [length]."""
    num_tokens: int
    """Token 0 is context alone: nothing stands before it."""
    num_bytes: int
    """UTF-8."""


class Window(NamedTuple):
    """Inputs begin..end - 2, targets begin + 1..end - 1, of which those from `first` on are scored."""

    begin: int
    first: int
    end: int


@dataclasses.dataclass(frozen=True)
class Score:
    """A loss as its sum, so that scores of several texts add up."""

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


def text_of(tokens: Iterable[int], num_bytes: int, end_of_text: int) -> Text:
    """A document by itself: the end-of-text token stands before it, as in training, and is not scored."""
    array = np.array([end_of_text, *tokens], np.int32)
    return Text(lambda start, length: array[start : start + length], len(array), num_bytes)


def windows(num_tokens: int, block_size: int, stride: int) -> Iterator[Window]:
    """The windows that score the tokens 1..num_tokens - 1, each once."""
    begin, first = 0, 1
    while first < num_tokens:
        end = min(begin + 1 + block_size, num_tokens)
        yield Window(begin, first, end)
        begin, first = begin + stride, end


def text_batches(texts: Iterable[Text], block_size: int, stride: int, rows: int) -> Iterator[Batch]:
    """The windows of all texts as batches of [rows, block_size] in numpy; what fills up weighs 0."""
    spans = ((text, window) for text in texts for window in windows(text.num_tokens, block_size, stride))
    for part in _batched(spans, rows):
        tokens_BT, targets_BT = np.zeros((2, rows, block_size), np.int32)
        weights_BT = np.zeros((rows, block_size), np.float32)
        for row, (text, (begin, first, end)) in enumerate(part):
            span = text.read(begin, end - begin)
            tokens_BT[row, : len(span) - 1], targets_BT[row, : len(span) - 1] = span[:-1], span[1:]
            weights_BT[row, first - begin - 1 : len(span) - 1] = 1.0
        yield Batch(tokens_BT, targets_BT, weights_BT)


def _batched(items: Iterator, size: int) -> Iterator[tuple]:
    """As `itertools.batched`, which Python 3.11 lacks."""
    while part := tuple(itertools.islice(items, size)):
        yield part


def score(
    losses: Callable[[Batch], tuple[jax.Array, jax.Array]],
    batches: Iterable[Batch],
    sharding: Sharding,
    num_bytes: int,
    progress: Callable[[], object] = lambda: None,
) -> Score:
    """The loss over batches of numpy rows. `losses` gives (summed loss, summed weights) of a batch laid as `sharding`.

    Each batch is summed on the devices, in float32; the batches are added in Python's float64. `progress` is called
    after each batch.
    """
    sums: list[tuple[jax.Array, jax.Array]] = []
    waiting: collections.deque[jax.Array] = collections.deque()
    for batch in batches:
        on_devices = jax.tree.map(lambda rows: jax.device_put(rows, sharding), batch)
        sums.append(losses(on_devices))
        waiting.append(sums[-1][0])
        if len(waiting) > AHEAD:
            waiting.popleft().block_until_ready()
            progress()
    found = jax.device_get(sums)
    return Score(
        math.fsum(float(loss) for loss, _ in found), round(math.fsum(float(count) for _, count in found)), num_bytes
    )
