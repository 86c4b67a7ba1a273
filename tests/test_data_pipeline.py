"""A batch is a pure function of (seed, step), and an epoch visits every token once."""

import math
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.data.dataset import RECORD_TOKENS, Batch, TokenStream
from jaxgpt.data.pipeline import _local_rows, eval_batches, train_batches, train_rows
from jaxgpt.errors import UserError


def stream_of(size: int) -> TokenStream:
    """Tokens that are their own position."""
    tokens = np.arange(size, dtype=np.uint32)
    records = [{"tokens": tokens[i : i + RECORD_TOKENS]} for i in range(0, size, RECORD_TOKENS)]
    return TokenStream(records, size, size, 1, "uint32")


def windows(stream: TokenStream, block_size: int, first: int, count: int, seed: int = 0) -> Batch:
    """Windows first..first + count - 1 of the endless run of epochs."""
    return train_rows(
        stream,
        seed=seed,
        step=0,
        global_batch_size=first + count,
        block_size=block_size,
        rows=range(first, first + count),
    )


def sharding(accumulated: bool, devices: int = 8, spec=("data",)) -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    return NamedSharding(mesh, PartitionSpec(None, *spec) if accumulated else PartitionSpec(*spec))


def steps(stream, start: int, stop: int, accumulation: int = 1, place=None, batch: int = 16, **settings) -> list[Batch]:
    return list(
        train_batches(
            stream,
            **{"seed": 7, "block_size": 5, **settings},
            start_step=start,
            stop_step=stop,
            global_batch_size=batch,
            accumulation=accumulation,
            sharding=place or sharding(True),
        )
    )


# ---------------------------------------------------------------- one epoch


@pytest.mark.parametrize(("size", "block_size"), [(50, 5), (53, 5), (6, 5), (9, 8), (4099, 64), (2, 1)])
def test_every_token_is_a_target_exactly_once_in_every_epoch(size, block_size):
    stream = stream_of(size)
    count = stream.rows_per_epoch(block_size)
    for epoch in range(3):
        batch = windows(stream, block_size, epoch * count, count)
        targets = batch.targets_BT[batch.weights_BT == 1]
        assert sorted(targets) == list(range(size))


def test_a_target_is_the_token_that_follows_around_the_circle():
    stream = stream_of(53)
    batch = windows(stream, 5, 0, 40)
    assert np.array_equal(batch.targets_BT, (batch.tokens_BT + 1) % 53)
    assert np.array_equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])


def test_the_next_epoch_has_another_order_and_other_borders():
    stream = stream_of(1000)
    epochs = [windows(stream, 10, epoch * 100, 100).tokens_BT[:, 0] for epoch in range(6)]
    borders = {int(starts[0]) % 10 for starts in epochs}
    assert len(borders) > 2
    orders = [tuple((starts - starts[0]) % 1000) for starts in epochs]
    assert len(set(orders)) == 6
    in_sequence = [np.mean((np.diff(starts) % 1000) == 10) for starts in epochs]
    assert max(in_sequence) < 0.1


def test_seeds_give_different_orders():
    stream = stream_of(1000)
    firsts = {tuple(windows(stream, 10, 0, 100, seed).tokens_BT[:, 0]) for seed in range(5)}
    assert len(firsts) == 5


def test_the_order_is_the_one_of_every_other_version():
    """A resumed run must see the rest of the epoch, whatever versions of grain and numpy it finds."""
    batch = windows(stream_of(100), 10, 0, 20, seed=42)
    assert batch.tokens_BT[:, 0].tolist() == STARTS


STARTS = [48, 78, 8, 18, 88, 38, 28, 58, 68, 98, 50, 10, 70, 0, 40, 80, 90, 60, 20, 30]


def test_a_batch_may_lie_in_two_epochs():
    stream, count = stream_of(53), 11
    rows = [windows(stream, 5, first, 1).tokens_BT[0] for first in range(2 * count)]
    (_, second) = steps(stream, 0, 2, batch=8, seed=0)
    assert count == 11
    assert np.array_equal(second.tokens_BT[0], rows[8:16])


# ---------------------------------------------------------------- pure in (seed, step)


def test_batches_are_the_same_from_any_start():
    stream = stream_of(101)
    all_steps = steps(stream, 0, 9)
    assert len(all_steps) == 9
    for start in (1, 4, 8):
        for early, late in zip(all_steps[start:], steps(stream, start, 9), strict=True):
            for one, two in zip(early[:3], late[:3], strict=True):
                assert np.array_equal(one, two)
    assert steps(stream, 9, 9) == []


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_devices_and_accumulation_do_not_change_the_rows_or_their_order(devices, accumulation):
    stream = stream_of(101)
    for step, batch in enumerate(steps(stream, 0, 3, accumulation, sharding(True, devices))):
        expected = train_rows(stream, seed=7, step=step, global_batch_size=16, block_size=5, rows=range(16))
        assert batch.tokens_BT.shape == (accumulation, 16 // accumulation, 5)
        assert batch.segments_BT is None
        for got, want in zip(batch[:3], expected[:3], strict=True):
            assert got.dtype == want.dtype
            assert np.array_equal(np.asarray(got).reshape(16, 5), want)


def test_a_batch_split_over_positions_or_copied_is_the_same():
    stream = stream_of(101)
    expected = steps(stream, 0, 1, block_size=8)[0]
    for spec in ((None, "data"), (None, None)):
        (batch,) = steps(stream, 0, 1, place=sharding(True, spec=spec), block_size=8)
        assert np.array_equal(batch.tokens_BT, expected.tokens_BT)


def test_a_process_reads_only_the_rows_of_its_devices():
    class HalfOfTheDevices:
        def addressable_devices_indices_map(self, shape):
            return dict(list(sharding(True).addressable_devices_indices_map(shape).items())[4:])

    rows, place = _local_rows((2, 8, 5), HalfOfTheDevices())
    assert rows.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert place[0].tolist() == [-1] * 4 + [0, 1, 2, 3]
    assert place[1].tolist() == [-1] * 4 + [4, 5, 6, 7]


def test_a_corpus_shorter_than_a_window_is_refused_at_once_with_both_numbers():
    with pytest.raises(UserError, match="has 5 tokens, fewer than the 6 of one window"):
        train_batches(
            stream_of(5),
            seed=0,
            start_step=0,
            stop_step=1,
            global_batch_size=8,
            accumulation=1,
            block_size=5,
            sharding=sharding(True),
        )


@pytest.mark.system
def test_closing_early_ends_the_threads_and_lets_python_exit():
    code = (
        "import jax, numpy as np\n"
        "from jaxgpt.data.pipeline import train_batches\n"
        "from jaxgpt.data.dataset import RECORD_TOKENS, TokenStream\n"
        "record = {'tokens': np.arange(RECORD_TOKENS, dtype=np.uint16)}\n"
        "stream = TokenStream([record] * 50, 50 * RECORD_TOKENS, 0, 1, 'uint16')\n"
        "place = jax.sharding.SingleDeviceSharding(jax.devices()[0])\n"
        "make = lambda: train_batches(stream, seed=0, start_step=0, stop_step=10**9, global_batch_size=8,\n"
        "                             accumulation=1, block_size=64, sharding=place)\n"
        "closed, dropped, held = make(), make(), make()\n"
        "next(closed); next(dropped); next(held)\n"
        "closed.close(); del dropped\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_an_error_while_reading_reaches_the_caller():
    class Broken(TokenStream):
        def read(self, start, length):
            raise OSError("the disk is gone")

    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        steps(Broken([], 100, 100, 1, "uint16"), 0, 3)
    assert threading.active_count() <= before + 2


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize(("size", "batch"), [(2, 8), (6, 8), (41, 8), (42, 8), (81, 8), (82, 8), (203, 16)])
def test_evaluation_has_each_target_but_the_first_once_and_in_order(size, batch):
    found = list(eval_batches(stream_of(size), global_batch_size=batch, block_size=5, sharding=sharding(False)))
    targets = [np.asarray(b.targets_BT)[np.asarray(b.weights_BT) == 1] for b in found]
    assert np.concatenate(targets).tolist() == list(range(1, size))
    for b in found:
        assert b.tokens_BT.shape == (batch, 5)
        counted = np.asarray(b.weights_BT) == 1
        assert np.array_equal(np.asarray(b.tokens_BT)[counted] + 1, np.asarray(b.targets_BT)[counted])
    assert len(found) == math.ceil(math.ceil((size - 1) / 5) / batch)


def test_max_batches_takes_the_first_of_them():
    make = lambda **most: list(
        eval_batches(stream_of(203), global_batch_size=8, block_size=5, sharding=sharding(False), **most)
    )
    every = make()
    assert len(every) == 6
    assert len(make(max_batches=99)) == 6
    for one, two in zip(every[:2], make(max_batches=2), strict=True):
        assert np.array_equal(one.tokens_BT, two.tokens_BT)
