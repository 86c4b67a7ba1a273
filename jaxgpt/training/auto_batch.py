"""What `train` asks on the devices at hand: the batch size that fits them, and why a step did not."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config, with_settings
from jaxgpt.errors import RunFailed, UserError
from jaxgpt.parallel.mesh import batch_shards
from jaxgpt.training.memory import (
    ACTIVATIONS,
    arithmetic_memory,
    batch_sizes,
    in_gib,
    layout_of,
    lower_step,
    out_of_memory_bytes,
    state_bytes,
    step_memory,
    ways_to_save,
)
from jaxgpt.training.step import resolve_batch

_MAX_CPU_ROWS = 64  # larger batches gain nothing on a CPU
_LEAST_SLOPE = 0.4  # what a larger batch takes, at least, of what arithmetic says that it takes more
_ROOM = 0.95  # share of a device's memory to plan for: the allocator's pieces leave gaps


# ---------------------------------------------------------------- per_device_train_batch_size = "auto"


def largest_batch(config: Config, vocab_size: int, mesh: Mesh, limit_bytes: float | None = None) -> int:
    """The largest per_device_train_batch_size with which the train step fits each device of `mesh`.

    Sizes that keep the tokens of a step are compiled, beginning where arithmetic puts the border, until it is found:
    two or three programs as a rule. `limit_bytes` is what one device has; None asks the device.

    Raises:
        UserError: not even the smallest size fits, or no size divides the global batch.
    """
    shards = batch_shards(mesh)
    sizes = batch_sizes(config, shards)
    if not _has_kernels(mesh):
        sizes = [size for size in sizes if size <= _MAX_CPU_ROWS]
    limit = limit_bytes or device_memory(mesh)
    if limit is None:  # a device that does not tell: what surely fits, if anything does
        return sizes[0]

    def resolved(size: int) -> Config:
        return resolve_batch(with_settings(config, train_per_device_train_batch_size=size), shards)

    best = largest_that_fits(
        sizes,
        needed=lambda size: compiled_bytes(resolved(size), vocab_size, mesh),
        guessed=lambda size: sum(_arithmetic(resolved(size), vocab_size, mesh).values()),
        limit=_ROOM * limit,
    )
    if jax.process_count() > 1:  # the hosts' limits may differ by a little, their programs must not
        from jax.experimental.multihost_utils import process_allgather

        best = int(process_allgather(np.asarray(best or 0)).min()) or None
    if best is None:
        advice = settings_that_fit(resolved(sizes[0]), vocab_size, mesh, limit) or [_NOTHING]
        raise UserError(
            f'train.per_device_train_batch_size = "auto", but a step of {sizes[0]} needs more than the '
            f"{in_gib(limit)} of a device; try {', or '.join(advice)}"
        )
    return best


def largest_that_fits(
    sizes: Sequence[int], needed: Callable[[int], float], guessed: Callable[[int], float], limit: float
) -> int | None:
    """The largest of the ascending `sizes` that needs at most `limit`; None if none does.

    `needed` is dear and right. `guessed` is cheap and wrong, but its differences are not far off.
    """
    fits, too_large = -1, len(sizes)
    known: list[tuple[float, float]] = []  # (guessed, needed) of the sizes tried

    def may_fit(size: int, slope: float) -> bool:
        guess = guessed(size)
        if not known:
            return guess <= limit
        x, y = known[-1]
        if len(known) > 1:
            slope = (y - known[-2][1]) / (x - known[-2][0])
        return y + slope * (guess - x) <= limit

    while too_large - fits > 1:
        between = range(fits + 1, too_large)
        if fits >= 0 and not may_fit(sizes[fits + 1], _LEAST_SLOPE):
            break
        index = max((i for i in between if may_fit(sizes[i], 1.0)), default=fits + 1)
        needs = needed(sizes[index])
        fits, too_large = (index, too_large) if needs <= limit else (fits, index)
        if math.isfinite(needs):
            known.append((guessed(sizes[index]), needs))
    return sizes[fits] if fits >= 0 else None


def compiled_bytes(config: Config, vocab_size: int, mesh: Mesh) -> float:
    """Bytes of one device that the compiled train step takes; infinite where its compiler only said "too much"."""
    program, lowered = lower_step(config, vocab_size, mesh)
    try:
        return sum(step_memory(lowered.compile(), state_bytes(program)).values())
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return out_of_memory_bytes(str(error))[0] or math.inf


def device_memory(mesh: Mesh) -> float | None:
    """Bytes that programs may use on one device of `mesh`; None where it cannot be known.

    Of a CPU's memory half of what is free now: data and runtime live there too.
    """
    device = mesh.local_devices[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return free / 2 / len(mesh.local_devices)


# ---------------------------------------------------------------- out of memory


def is_out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


@contextlib.contextmanager
def out_of_memory_explained(config: Config, vocab_size: int, mesh: Mesh) -> Iterator[None]:
    """A block whose out-of-memory errors become `RunFailed` with an explanation. `config` is resolved."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(explain_out_of_memory(config, vocab_size, mesh, error)) from error


def explain_out_of_memory(
    config: Config, vocab_size: int, mesh: Mesh, error: Exception, limit_bytes: float | None = None
) -> str:
    """What the memory of a device went to, in the model's terms, and settings that fit with the same tokens a step.

    `config` is resolved. Where the compiler told how much it needs, the arithmetic is scaled to that.
    """
    needed, available = out_of_memory_bytes(str(error))
    limit = limit_bytes or available or device_memory(mesh)
    memory = _arithmetic(config, vocab_size, mesh)
    factor = _activation_factor(memory, needed)
    memory = _scaled(memory, factor)
    listed = ", ".join(f"{kind} {in_gib(size)}" for kind, size in memory.items())
    lines = [
        f"out of memory: a device needs {in_gib(needed or sum(memory.values()))}"
        + (f" and may use {in_gib(limit)}" if limit else ""),
        f"  by kind (arithmetic{', scaled to the sum' if needed else ''}): {listed}",
    ]
    if limit:
        advice = settings_that_fit(config, vocab_size, mesh, limit, factor)
        lines.append(f"  with the same {config.train.global_batch_size} sequences a step, this should fit:")
        lines += [f"    {setting}" for setting in advice or [_NOTHING]]
    return "\n".join(lines)


_NOTHING = (
    "more devices or larger ones: one sequence at a time with model.remat = block and the parameters split over all "
    "devices (mesh.fsdp) is still too much"
)


def settings_that_fit(
    config: Config, vocab_size: int, mesh: Mesh, limit: float, activation_factor: float = 1.0
) -> list[str]:
    """Up to three command lines that keep the tokens of a step and fit, by arithmetic, `limit` bytes a device."""
    return [
        f"{flags}  ({in_gib(needs)})"
        for flags, needs in _fitting(config, vocab_size, mesh, _ROOM * limit, activation_factor)
    ][:3]


def _fitting(config: Config, vocab_size: int, mesh: Mesh, limit: float, factor: float) -> Iterator[tuple[str, float]]:
    """(flags, bytes): for each way of saving memory, the largest batch that fits."""
    for flags, ways in ways_to_save(config, mesh.devices.size):
        for changed in ways:
            needs = sum(_scaled(_arithmetic(changed, vocab_size, mesh), factor).values())
            if needs <= limit:
                rows = changed.train.per_device_train_batch_size
                yield " ".join([f"--train.per_device_train_batch_size {rows}", *flags]), needs
                break


def _arithmetic(config: Config, vocab_size: int, mesh: Mesh) -> dict[str, float]:
    layout = layout_of(config, mesh.devices.size)
    return arithmetic_memory(config, vocab_size, layout, kernel=_has_kernels(mesh))


def _activation_factor(memory: dict[str, float], needed: int) -> float:
    """What the arithmetic of activations is to be multiplied with, so that all kinds add up to `needed`."""
    if not needed:
        return 1.0
    exact = sum(size for kind, size in memory.items() if kind not in ACTIVATIONS)
    return min(max((needed - exact) / sum(memory[kind] for kind in ACTIVATIONS), 0.2), 5.0)


def _scaled(memory: dict[str, float], factor: float) -> dict[str, float]:
    return {kind: size * factor if kind in ACTIVATIONS else size for kind, size in memory.items()}


def _has_kernels(mesh: Mesh) -> bool:
    return mesh.devices.flatten()[0].platform != "cpu"
