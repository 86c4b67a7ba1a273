"""From the token stream to the batch of a step. The idea: a batch is a pure function of (seed, step).

The N tokens of a stream are a circle. Epoch e starts at a pseudo-random place o_e and cuts the circle
into W = ceil(N / T) windows; window k holds the T targets that follow position o_e + kT:

    stream      ... t0 t1 t2 t3 t4 t5 t6 t7 t8 ...          T = 4, o_e at t1
    tokens            [t1 t2 t3 t4][t5 t6 t7 t8]
    targets              [t2 t3 t4 t5][t6 t7 t8 ...

The last window goes past the end of the circle; what it would repeat weighs 0, so each token is a target
exactly once in an epoch. The windows come in a pseudo-random order of the epoch, computed and not stored.
Row r of step s is window number s * B + r of an endless run of epochs. Nothing here knows how many hosts or
devices there are, except which of the rows this process has to read.
"""

import collections
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from jaxgpt.data.rows import TokenStream, check_window
from jaxgpt.failpoints import failpoint

AHEAD = 2  # batches sent to the devices before the step asks: the transfer overlaps the step


class Batch(NamedTuple):
    """Windows of tokens; all arrays have the same shape [..., T]."""

    tokens_BT: np.ndarray | jax.Array
    """int32 inputs."""
    targets_BT: np.ndarray | jax.Array
    """int32, the token that follows each input."""
    weights_BT: np.ndarray | jax.Array
    """float32, 1 where the target counts and 0 where it is padding."""
    segments_BT: np.ndarray | jax.Array | None = None
    """int32 document number of each position where documents are packed; None: one segment a row."""


def windows_per_epoch(num_tokens: int, block_size: int) -> int:
    """Windows in one pass over a stream: ceil(num_tokens / block_size)."""
    return -(-num_tokens // block_size)


def windows_to_evaluate(num_tokens: int, block_size: int) -> int:
    """Windows that hold the targets 1..num_tokens - 1, each once: the first token has nothing before it."""
    return -(-(num_tokens - 1) // block_size)


def train_rows(
    stream: TokenStream,
    *,
    seed: int,
    step: int,
    global_batch_size: int,
    block_size: int,
    rows: Iterable[int],
) -> Batch:
    """The given rows (0 <= row < global_batch_size) of the batch of `step`, [len(rows), T] in numpy."""
    size = stream.num_tokens
    windows = windows_per_epoch(size, block_size)
    spans, starts = [], []
    for row in rows:
        epoch, index = divmod(step * global_batch_size + row, windows)
        start = block_size * _shuffled(index, windows, seed, epoch)
        spans.append(stream.read(_hash(seed, epoch, "offset") % size + start, block_size + 1))
        starts.append(start)
    positions_BT = np.array(starts, np.int64).reshape(-1, 1) + np.arange(block_size)
    return _batch(spans, block_size, positions_BT < size)


def eval_rows(stream: TokenStream, *, step: int, global_batch_size: int, block_size: int, rows: Iterable[int]) -> Batch:
    """The given rows of the `step`-th batch of windows in stream order, [len(rows), T] in numpy."""
    first = np.array(list(rows), np.int64) + step * global_batch_size
    spans = [stream.read(int(window) * block_size, block_size + 1) for window in first]
    targets_BT = first.reshape(-1, 1) * block_size + np.arange(1, block_size + 1)
    return _batch(spans, block_size, targets_BT < stream.num_tokens)


def train_batches(
    stream: TokenStream,
    *,
    seed: int,
    start_step: int,
    stop_step: int,
    global_batch_size: int,
    accumulation: int,
    block_size: int,
    sharding: Sharding,
    num_threads: int = 2,
    prefetch_batches: int = 4,
) -> Iterator[Batch]:
    """The batches of steps start_step..stop_step - 1 as global arrays [accumulation, B / accumulation, T].

    Row r of the global batch lies at [r // M, r % M], M = B / accumulation. A process reads the rows that
    `sharding` puts on its devices. Close the iterator (or drop it) to end its threads.

    Raises:
        UserError: the stream is shorter than one window.
    """
    check_window(stream.num_tokens, block_size)
    if global_batch_size % accumulation:
        raise ValueError(f"accumulation {accumulation} does not divide batch {global_batch_size}")

    def read(step: int, rows: np.ndarray) -> Batch:
        failpoint("data.read")
        return train_rows(
            stream,
            seed=seed,
            step=step,
            global_batch_size=global_batch_size,
            block_size=block_size,
            rows=rows.tolist(),
        )

    shape = (accumulation, global_batch_size // accumulation, block_size)
    steps = range(start_step, stop_step)
    return _batches(read, steps, shape, sharding, num_threads, prefetch_batches)


def eval_batches(
    stream: TokenStream,
    *,
    global_batch_size: int,
    block_size: int,
    sharding: Sharding,
    max_batches: int | None = None,
    num_threads: int = 2,
    prefetch_batches: int = 4,
) -> Iterator[Batch]:
    """The stream from its start in windows that do not overlap, as global arrays [B, T].

    Every token but the first is a target once; what fills up the last window and the last batch weighs 0.
    Every process gets the same number of batches: at most `max_batches`.
    """

    def read(step: int, rows: np.ndarray) -> Batch:
        return eval_rows(
            stream,
            step=step,
            global_batch_size=global_batch_size,
            block_size=block_size,
            rows=rows.tolist(),
        )

    count = -(-windows_to_evaluate(stream.num_tokens, block_size) // global_batch_size)
    steps = range(count if max_batches is None else min(count, max_batches))
    shape = (global_batch_size, block_size)
    return _batches(read, steps, shape, sharding, num_threads, prefetch_batches)


def _batch(spans: list[np.ndarray], block_size: int, counts_BT: np.ndarray) -> Batch:
    spans_BT = np.array(spans, np.int32).reshape(-1, block_size + 1)
    return Batch(spans_BT[:, :-1], spans_BT[:, 1:], counts_BT.astype(np.float32))


def _hash(seed: int, epoch: int, use: str) -> int:
    """64 pseudo-random bits; SHA-256, because a generator's stream may change with its library's version."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{use}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _shuffled(index: int, length: int, seed: int, epoch: int) -> int:
    """Where the epoch's permutation of range(length) sends `index`, in constant time and memory.

    Grain's permutation is a block cipher on indices of 32 bits.
    """
    import grain  # here and below: the step and the samplers import this module for Batch alone

    assert length < 2**32, length
    key = _hash(seed, epoch, "order") % 2**32
    return grain.experimental.index_shuffle(index, max_index=length - 1, seed=key, rounds=4)


def _batches(
    read: Callable[[int, np.ndarray], Batch],
    steps: range,
    shape: tuple[int, ...],
    sharding: Sharding,
    num_threads: int,
    prefetch_batches: int,
) -> Iterator[Batch]:
    """Global arrays of `shape` [..., T] for each step, read by Grain's threads and sent AHEAD of use."""
    import grain

    local_rows, place = _local_rows(shape, sharding)

    def put(local_BT: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(shape, sharding, lambda index: local_BT[place[index[:-1]]][..., index[-1]])

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_batches)
    dataset = grain.MapDataset.range(steps.start, max(steps.start, steps.stop))
    dataset = dataset.map(lambda step: read(int(step), local_rows)).to_iter_dataset(options)

    def generate() -> Iterator[Batch]:
        host_batches = iter(dataset)
        sent = collections.deque()
        try:
            for host_batch in host_batches:
                sent.append(jax.tree.map(put, host_batch))
                if len(sent) > AHEAD:
                    yield sent.popleft()
            while sent:
                yield sent.popleft()
        finally:
            host_batches.close()

    return generate()


def _local_rows(shape: tuple[int, ...], sharding: Sharding) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a global [..., T] array that lie on this process's devices, and where each is among them.

    Returns:
        rows [R] ascending, and an array of shape[:-1] that holds row r's position in it, -1 if it is elsewhere.
    """
    number = np.arange(int(np.prod(shape[:-1]))).reshape(shape[:-1])
    indices = sharding.addressable_devices_indices_map(shape).values()
    rows = np.unique(np.concatenate([number[index[:-1]].ravel() for index in indices]))
    place = np.full(number.shape, -1)
    place.ravel()[rows] = np.arange(len(rows))
    return rows, place
