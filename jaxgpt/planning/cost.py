"""Estimates the time of a compiled TPU program from the compiler's cycles and the bytes of its collectives.

A time is the compiler's cycles plus those of the attention kernels, which the compiler leaves out of its sum, over the
clock, plus the collectives that nothing hides: their bytes over the links they use.
No TPU is asked. `CALIBRATION` says how far such times have been from measured steps.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from jaxgpt.model.flash import BACKWARD_BLOCK, FORWARD_BLOCK
from jaxgpt.parallel.chips import Chip
from jaxgpt.planning.program import Collective, Event, Kernel, ProgramCost

_HOP_SECONDS = 1e-6  # of latency a link (Austin et al. 2025, "How to Scale Your Model", chapter on sharded matrices)
_RING_FROM = 16  # chips along an axis of a flat slice (v5e, v6e) that are joined to a ring


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How measured steps compare with estimates."""

    factor: float  # measured over estimated seconds, the geometric mean of the runs
    low: float  # the smallest ratio of the runs
    high: float  # the largest
    date: str
    sources: tuple[str, ...]
    limits: str  # the chips and sizes that the runs do not cover

    @property
    def absolute(self) -> bool:
        """Whether the runs agree well enough to claim seconds. If not, only comparisons are claimed."""
        return self.high / self.low <= 1.5


# benchmarks/tpu_calibration.py prints the runs; docs/benchmarks.md keeps them.
CALIBRATION = Calibration(
    factor=0.90,
    low=0.87,
    high=0.96,
    date="2026-11-23",
    sources=(
        "github.com/vorushin/tpuchat LOG.md, 20-21 Feb 2026",
        "vorushin.github.io/blog/llm-pretraining-tpu-v6e-50usd",
    ),
    limits="one author's 160M model on one v5e and one v6e chip; no run over several chips, no v4, v5p or v7x",
)


# Cycles of a cell of the kernels' grid, a row of 1024 positions with two heads of 64, forward and backward, by the
# compiler's own schedules: benchmarks/attention_cycles.py, jax 0.12.0, libtpu 0.0.52. It simulates them, except on v4.
_CELL_CYCLES = {"v4": (3763, 5223), "v5e": (5892, 9572), "v5p": (2957, 4877), "v6e": (4552, 6863), "v7x": (4548, 6896)}
_PASSES = {"attention_forward": (0, FORWARD_BLOCK), "attention_backward": (1, BACKWARD_BLOCK)}
_ONE_HEAD = 0.68  # of two: one of 128 has half as many scores (v5e; 124M with 6 heads)


def attention_cycles(kernel: Kernel, chip: str) -> float | None:
    """Cycles of one call of `model/flash.py`'s kernels; None for another kernel.

    The grid has a cell for each row and group of heads, all alike. A cell takes cycles in proportion to the scores
    that its blocks of queries compute.
    """
    statistics = next((shape for kind, shape in kernel.arrays if kind == "f32" and len(shape) == 4), None)
    if kernel.name not in _PASSES or statistics is None:
        return None
    rows, groups, heads, positions = statistics
    direction, block = _PASSES[kernel.name]
    scores = lambda size: size * (size + min(size, block))
    cell = _CELL_CYCLES[chip][direction] * scores(positions) / scores(1024)
    return rows * groups * cell * (_ONE_HEAD if heads == 1 else heads / 2)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run, before calibration."""

    seconds: float
    compute_seconds: float
    kernel_seconds: float
    collective_seconds: float  # all of them, as if nothing ran beside them
    collective_seconds_exposed: float  # that the program waits for them
    kernels_without_cycles: tuple[str, ...]  # counted as nothing, because their cycles are not known


def estimate(
    cost: ProgramCost,
    chip: Chip,
    shape: tuple[int, ...],
    kernel_cycles: Callable[[Kernel, str], float | None] = attention_cycles,
) -> Estimate:
    """Seconds of one run on a slice of `shape` chips.

    `kernel_cycles` gives the cycles of one call of a kernel on a chip of that name; None where it does not know.
    """
    cycles = [kernel_cycles(kernel, chip.name) for kernel in cost.kernels]
    run_of_kernel = [(value or 0.0) / chip.clock_hz for value in cycles]
    wire = [_collective_seconds(collective, chip, shape) for collective in cost.collectives]
    kernel_seconds = sum(kernel.calls * seconds for kernel, seconds in zip(cost.kernels, run_of_kernel))
    _, exposed = _elapsed(cost.timeline, chip.clock_hz, run_of_kernel, wire)
    compute = cost.cycles / chip.clock_hz
    return Estimate(
        seconds=compute + kernel_seconds + exposed,
        compute_seconds=compute,
        kernel_seconds=kernel_seconds,
        collective_seconds=sum(c.count * seconds for c, seconds in zip(cost.collectives, wire)),
        collective_seconds_exposed=exposed,
        kernels_without_cycles=tuple(k.name for k, value in zip(cost.kernels, cycles) if value is None),
    )


def wire_bandwidth(chip: Chip, shape: tuple[int, ...], group_size: int) -> float:
    """Bytes per second that a device of a group can send to the others, over all links that the group uses.

    A group lies on the axes of the slice whose sizes multiply to its own, or else along one axis. Along an axis whose
    ends are joined a chip sends both ways at once; along an open one the chips at the ends have one way only, so it
    counts one.
    """
    if group_size <= chip.devices_per_chip:  # the devices of one chip: the memory they share
        return chip.hbm_bandwidth
    axes = _axes_of(shape, group_size // chip.devices_per_chip)
    link = chip.ici_bandwidth / (4 * chip.ici_axes)  # one way, one link
    return sum(link * (2 if _is_ring(size, chip) else 1) for size in axes) / chip.devices_per_chip


def _is_ring(size: int, chip: Chip) -> bool:
    return size >= (_RING_FROM if chip.ici_axes == 2 else 4)


def _axes_of(shape: tuple[int, ...], chips: int) -> tuple[int, ...]:
    """Sizes of the fewest axes of the slice that hold exactly `chips`; of one made-up axis if none do."""
    sizes = sorted((size for size in shape if size > 1), reverse=True)
    subsets = (subset for count in range(1, len(sizes) + 1) for subset in itertools.combinations(sizes, count))
    return next((axes for axes in subsets if math.prod(axes) == chips), (min(chips, max(sizes, default=chips)),))


def _collective_seconds(collective: Collective, chip: Chip, shape: tuple[int, ...]) -> float:
    """Seconds of one call, alone on the links."""
    axes = _axes_of(shape, max(1, collective.group_size // chip.devices_per_chip))
    hops = sum(size // 2 if _is_ring(size, chip) else size - 1 for size in axes)
    if collective.kind == "collective-permute":  # to a neighbour, over one link
        return collective.bytes / (chip.ici_bandwidth / (4 * chip.ici_axes)) + _HOP_SECONDS
    rounds = 2 if collective.kind == "all-reduce" else 1
    return collective.bytes / wire_bandwidth(chip, shape, collective.group_size) + rounds * hops * _HOP_SECONDS


def _elapsed(
    timeline: Sequence[Event], clock_hz: float, kernel_seconds: Sequence[float], wire_seconds: Sequence[float]
) -> tuple[float, float]:
    """(seconds of a run of `timeline`, seconds of it that wait for collectives).

    The links carry one collective at a time, in the order of their starts.
    """
    now = waited = wire_free = 0.0
    ends: dict[int, float] = {}
    for event in timeline:
        if event.kind == "run":
            now += event.amount / clock_hz
        elif event.kind == "kernel":
            now += kernel_seconds[event.index]
        elif event.kind == "loop":
            seconds, waits = _elapsed(event.body, clock_hz, kernel_seconds, wire_seconds)
            now, waited = now + event.amount * seconds, waited + event.amount * waits
        else:
            if event.kind in ("start", "collective"):
                ends[event.index] = wire_free = max(now, wire_free) + wire_seconds[event.index]
            if event.kind in ("done", "collective"):
                wait = max(ends.pop(event.index, now) - now, 0.0)
                now, waited = now + wait, waited + wait
    return now, waited
