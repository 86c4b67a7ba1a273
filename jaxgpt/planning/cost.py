"""What a compiled TPU program costs: an estimated time, from the compiler's cycles and the bytes of its collectives.

A time is the compiler's cycles and those of the Pallas kernels, which come from their own schedules (kernels.py), over
the clock, and the collectives that nothing hides: their bytes over the links that they run on.
No TPU is asked. `CALIBRATION` says how far such times have lain from measured steps.
"""

import dataclasses
import math

from jaxgpt.parallel.chips import CHIPS as CHIPS
from jaxgpt.parallel.chips import Chip
from jaxgpt.planning.program import Collective as Collective
from jaxgpt.planning.program import Kernel as Kernel
from jaxgpt.planning.program import ProgramCost as ProgramCost
from jaxgpt.planning.program import read_program as read_program

_HOP_SECONDS = 1e-6  # of latency a link (Austin et al. 2025, "How to Scale Your Model", chapter on sharded matrices)
_RING_FROM = 16  # chips along an axis of a flat slice (v5e, v6e) that are joined to a ring


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How measured steps compare with estimated ones."""

    factor: float
    """Measured over estimated seconds, the geometric mean of the runs."""
    low: float
    high: float
    """The least and the greatest of the runs."""
    date: str
    sources: tuple[str, ...]
    limits: str
    """What the runs do not cover."""

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


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run, before calibration."""

    seconds: float
    compute_seconds: float
    kernel_seconds: float
    collective_seconds: float
    """All collectives, as if nothing ran beside them."""
    collective_seconds_exposed: float
    """What the program waits for."""
    kernels_without_cycles: tuple[str, ...]
    """Counted as nothing, because nobody said what they take."""


def estimate(
    cost: ProgramCost,
    chip: Chip,
    shape: tuple[int, ...],
    kernel_cycles: dict[str, float] | None = None,
) -> Estimate:
    """Seconds of one run on a slice of `shape` chips.

    `kernel_cycles` maps a kernel's identity or name to the cycles of one call.
    """
    known = kernel_cycles or {}
    cycles = [known.get(kernel.identity, known.get(kernel.name)) for kernel in cost.kernels]
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


def mfu(flops: float, seconds: float, chip: Chip, devices: int) -> float:
    """Share of the devices' peak that `flops` model FLOPs in `seconds` make.

    Model FLOPs are `jaxgpt.model.sizes.flops_per_token` times tokens: 6 N and causal attention.
    """
    return flops / (seconds * devices * chip.peak_flops)


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
    subsets = [[s for i, s in enumerate(sizes) if mask >> i & 1] for mask in range(1, 2 ** len(sizes))]
    fitting = [tuple(subset) for subset in subsets if math.prod(subset) == chips]
    return min(fitting, key=len, default=(min(chips, max(sizes, default=chips)),))


def _collective_seconds(collective: Collective, chip: Chip, shape: tuple[int, ...]) -> float:
    """Of one call, alone on the links."""
    axes = _axes_of(shape, max(1, collective.group_size // chip.devices_per_chip))
    hops = sum(size // 2 if _is_ring(size, chip) else size - 1 for size in axes)
    if collective.kind == "collective-permute":  # to a neighbour, over one link
        return collective.bytes / (chip.ici_bandwidth / (4 * chip.ici_axes)) + _HOP_SECONDS
    rounds = 2 if collective.kind == "all-reduce" else 1
    return collective.bytes / wire_bandwidth(chip, shape, collective.group_size) + rounds * hops * _HOP_SECONDS


def _elapsed(
    timeline: list, clock_hz: float, kernel_seconds: list[float], wire_seconds: list[float]
) -> tuple[float, float]:
    """(seconds of a run of `timeline`, seconds of it that wait for collectives).

    The links carry one collective at a time, in the order of their starts.
    """
    now = waited = wire_free = 0.0
    ends = {}
    for event, *what in timeline:
        if event == "run":
            now += what[0] / clock_hz
        elif event == "kernel":
            now += kernel_seconds[what[0]]
        elif event == "loop":
            seconds, waits = _elapsed(what[1], clock_hz, kernel_seconds, wire_seconds)
            now, waited = now + what[0] * seconds, waited + what[0] * waits
        else:
            if event in ("start", "collective"):
                ends[what[0]] = wire_free = max(now, wire_free) + wire_seconds[what[0]]
            if event in ("done", "collective"):
                wait = max(ends.pop(what[0], now) - now, 0.0)
                now, waited = now + wait, waited + wait
    return now, waited
