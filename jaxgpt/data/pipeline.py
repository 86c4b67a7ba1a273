"""From a split to the batch of a step: a pure function of (seed, step), without iterator state.

A split is cut into the rows of an epoch (dataset.py), which come in a pseudo-random order that is computed, not stored.
Row r of step s is row number s * B + r of an endless sequence of epochs. Nothing here knows what kind of data it is, or
how many hosts and devices there are, except which rows this process has to read.
"""

import collections
import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxgpt.data.dataset import Batch, Split
from jaxgpt.errors import UserError
from jaxgpt.failpoints import failpoint
from jaxgpt.storage.files import write_file

# Two threads read 37 million tokens a second on two cores, four 52 (windows of 1,024): many times what a host trains.
THREADS, PREFETCHED = 2, 4
AHEAD = 2  # batches sent to the devices before the step needs them: the transfer overlaps the step


def train_rows(
    split: Split,
    *,
    seed: int,
    step: int,
    global_batch_size: int,
    block_size: int,
    rows: Iterable[int],
    skip: frozenset[int] = frozenset(),
) -> Batch:
    """The given rows (0 <= row < global_batch_size) of the batch of `step`, as numpy arrays [len(rows), T].

    Rows whose number, step * global_batch_size + row, is in `skip` have weight 0.
    """
    numbers = [step * global_batch_size + row for row in rows]
    batch = split.training_rows([place_of_row(split, seed, number, block_size) for number in numbers], block_size)
    if skip:
        batch.weights_BT[[number in skip for number in numbers]] = 0.0
    return batch


def place_of_row(split: Split, seed: int, number: int, block_size: int) -> tuple[int, int]:
    """(row of the split, 64 random bits of its epoch) of row `number` in the endless sequence of epochs.

    Grain's permutation is a block cipher on 32-bit indices: constant time and memory.
    """
    import grain  # heavy: many modules import this one only for types

    length = split.rows_per_epoch(block_size)
    assert length < 2**32, length
    epoch, index = divmod(number, length)
    key = _hash(seed, epoch, "order") % 2**32
    row = grain.experimental.index_shuffle(index, max_index=length - 1, seed=key, rounds=4)
    return row, _hash(seed, epoch, "offset")


def train_batches(
    split: Split,
    *,
    seed: int,
    start_step: int,
    stop_step: int,
    global_batch_size: int,
    accumulation: int,
    block_size: int,
    sharding: Sharding,
    skip: frozenset[int] = frozenset(),
) -> Generator[Batch]:
    """The batches of steps start_step..stop_step - 1 as global arrays [accumulation, B / accumulation, T].

    Row r of the global batch lies at [r // M, r % M], M = B / accumulation. A process reads the rows that `sharding`
    puts on its devices. Rows in `skip` have weight 0. Close the iterator (or drop it) to end its threads.

    Raises:
        UserError: the split has no training row of this block size.
    """
    split.check(block_size)
    if global_batch_size % accumulation:
        raise ValueError(f"accumulation {accumulation} does not divide batch {global_batch_size}")

    how: dict[str, Any] = {"seed": seed, "global_batch_size": global_batch_size, "block_size": block_size, "skip": skip}

    def read(step: int, rows: list[int]) -> Batch:
        failpoint("data.read")
        return train_rows(split, step=step, rows=rows, **how)

    shape = (accumulation, global_batch_size // accumulation, block_size)
    steps = range(start_step, stop_step)
    return _batches(read, steps, shape, sharding)


def eval_batches(
    split: Split,
    *,
    global_batch_size: int,
    block_size: int,
    sharding: Sharding,
    max_batches: int | None = None,
) -> Generator[Batch]:
    """The batches of the split from its start, as global arrays [B, T]; at most `max_batches`.

    Every target occurs once; padding of the last row and the last batch has weight 0. Every process gets the same
    number of batches.
    """
    read = lambda step, rows: split.evaluation_rows([step * global_batch_size + row for row in rows], block_size)
    count = -(-split.rows_to_evaluate(block_size) // global_batch_size)
    steps = range(count if max_batches is None else min(count, max_batches))
    shape = (global_batch_size, block_size)
    return _batches(read, steps, shape, sharding)


def _hash(seed: int, epoch: int, use: str) -> int:
    """64 pseudo-random bits, from SHA-256 because a generator's stream may change with its library's version."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{use}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _batches(
    read: Callable[..., Batch],
    steps: range,
    shape: tuple[int, ...],
    sharding: Sharding,
) -> Generator[Batch]:
    """Global arrays of `shape` [..., T] for each step, read by Grain's threads and sent to the devices AHEAD of use."""
    import grain

    local_rows, place = _local_rows(shape, sharding)

    def put(local_BT: np.ndarray) -> jax.Array:
        part = lambda index: local_BT[place[index[:-1]]][..., index[-1]]
        return jax.make_array_from_callback(shape, sharding, part)

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCHED)
    dataset = grain.MapDataset.range(steps.start, max(steps.start, steps.stop))
    dataset = dataset.map(lambda step: read(step=int(step), rows=local_rows.tolist())).to_iter_dataset(options)
    sent: collections.deque[Batch] = collections.deque()
    with contextlib.closing(iter(dataset)) as host_batches:
        for host_batch in host_batches:
            sent.append(jax.tree.map(put, host_batch))
            if len(sent) > AHEAD:
                yield sent.popleft()
        while sent:
            yield sent.popleft()


def _local_rows(shape: tuple[int, ...], sharding: Sharding) -> tuple[np.ndarray, np.ndarray]:
    """(rows [R] of a global [..., T] array on this process's devices; the place of each row in them or -1, [...])."""
    number = np.arange(int(np.prod(shape[:-1]))).reshape(shape[:-1])
    indices = sharding.addressable_devices_indices_map(shape).values()
    rows = np.unique(np.concatenate([number[index[:-1]].ravel() for index in indices if index is not None]))
    place = np.full(number.shape, -1)
    place.ravel()[rows] = np.arange(len(rows))
    return rows, place


def read_skip_list(path: str | Path | None) -> frozenset[int]:
    """The numbers in a file of training rows that get weight 0: one a line, # for comments; none if `path` is None.

    Raises:
        UserError: the file cannot be read, or a line is not a number; names the file and the line.
    """
    if path is None:
        return frozenset()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"data.skip_list = {path}: cannot be read ({reason})") from None
    found = set()
    for number, line in enumerate(lines, start=1):
        if word := line.split("#")[0].strip():
            if not (word.isascii() and word.isdigit()):
                raise UserError(f"{path}:{number}: {word!r} is not a row; write one whole number a line, such as 12345")
            found.add(int(word))
    return frozenset(found)


def add_to_skip_list(path: Path, rows: Iterable[int], comment: str) -> list[int]:
    """Append the `rows` that are not in the file yet, after a line of comment; returns them."""
    there = read_skip_list(path) if path.exists() else frozenset()
    new = sorted(set(rows) - there)
    if new:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        text += "\n" if text and not text.endswith("\n") else ""
        write_file(path, text + f"# {comment}\n" + "".join(f"{row}\n" for row in new))
    return new
