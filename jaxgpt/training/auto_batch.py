"""Batch sizes: which ones keep the sequences of a step, which one fits the devices, and why a step did not fit."""

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
from jaxgpt.training import memory
from jaxgpt.training.step import resolve_batch

_MAX_CPU_ROWS = 64  # larger batches gain nothing on a CPU
_LEAST_SLOPE = 0.4  # what a larger batch takes, at least, of what arithmetic says that it takes more
_ROOM = 0.95  # share of a device's memory to plan for: the allocator's pieces leave gaps
MAX_ROWS = 64  # where no global batch is given, "auto" stops here: more rows a step is another experiment


def batch_sizes(config: Config, shards: int) -> list[int]:
    """Values of per_device_train_batch_size that keep the sequences of a step, ascending.

    Raises:
        UserError: train.global_batch_size is not a multiple of the devices that share it.
    """
    total, accumulation = config.train.global_batch_size, config.train.gradient_accumulation_steps
    unit = shards * (accumulation or 1)
    if total is None:
        return [2**power for power in range(MAX_ROWS.bit_length())]
    if total % unit:
        times = f" x train.gradient_accumulation_steps = {accumulation}" if accumulation else ""
        raise UserError(
            f"train.global_batch_size = {total} is not a multiple of the {shards} devices that share it{times}; "
            f"{-(-total // unit) * unit} is"
        )
    rows = total // shards
    if accumulation:
        return [rows // accumulation]
    return [size for size in range(1, rows + 1) if rows % size == 0]


def ways_to_save(config: Config, devices: int) -> Iterator[tuple[list[str], list[Config]]]:
    """(flags, configs from the largest batch down): settings that take less memory than `config`, which is resolved.

    They keep the sequences of a step. Settings that cost the least time come first.
    """
    free = with_settings(config, train_gradient_accumulation_steps=None)
    order = ["none", "dots", "block"]
    remats = order[order.index(config.model.remat) :]
    everywhere = devices // config.mesh.tensor
    splits = [config.mesh.fsdp]
    if everywhere > config.mesh.fsdp and config.model.n_embd % everywhere == 0:
        splits.append(everywhere)
    for fsdp in splits:
        for remat in remats:
            changed = with_settings(free, model_remat=remat, mesh_fsdp=fsdp, mesh_data=everywhere // fsdp)
            sizes = [
                size for size in batch_sizes(changed, everywhere) if size <= memory.step_shape(config, devices).rows
            ]
            flags = [f"--model.remat {remat}"] if remat != config.model.remat else []
            flags += [f"--mesh.fsdp {fsdp} --mesh.data 1"] if fsdp != config.mesh.fsdp else []
            yield flags, [_sized(changed, size, everywhere) for size in reversed(sizes)]


def _sized(config: Config, size: int, shards: int) -> Config:
    """`config` with its batch resolved for micro-batches of `size` rows on each of the `shards` devices."""
    return resolve_batch(with_settings(config, train_per_device_train_batch_size=size), shards)


# ---------------------------------------------------------------- per_device_train_batch_size = "auto"


def largest_batch(config: Config, vocab_size: int, mesh: Mesh, limit_bytes: float | None = None) -> int:
    """The largest per_device_train_batch_size with which the train step fits each device of `mesh`.

    Compiles sizes that keep the sequences of a step, beginning where arithmetic expects the limit: two or three
    programs as a rule. `limit_bytes` is what one device has; None asks the device.

    Raises:
        UserError: not even the smallest size fits, or no size divides the global batch.
    """
    shards = batch_shards(mesh)
    sizes = batch_sizes(config, shards)
    if not _has_kernels(mesh):
        sizes = [size for size in sizes if size <= _MAX_CPU_ROWS]
    limit = limit_bytes or device_memory(mesh)
    if limit is None:  # the device does not say: take the size that needs least
        return sizes[0]
    best = largest_that_fits(
        sizes,
        needed=lambda size: compiled_bytes(_sized(config, size, shards), vocab_size, mesh),
        guessed=lambda size: sum(_arithmetic(_sized(config, size, shards), vocab_size, mesh).values()),
        limit=_ROOM * limit,
    )
    if jax.process_count() > 1:  # the hosts' limits may differ by a little, their programs must not
        from jax.experimental.multihost_utils import process_allgather

        best = int(process_allgather(np.asarray(best or 0)).min()) or None
    if best is None:
        advice = settings_that_fit(_sized(config, sizes[0], shards), vocab_size, mesh, limit) or [_NOTHING]
        raise UserError(
            f'train.per_device_train_batch_size = "auto", but a step of {sizes[0]} needs more than the '
            f"{_in_gib(limit)} of a device; try {', or '.join(advice)}"
        )
    return best


def largest_that_fits(
    sizes: Sequence[int], needed: Callable[[int], float], guessed: Callable[[int], float], limit: float
) -> int | None:
    """The largest of the ascending `sizes` that needs at most `limit`; None if none does.

    `needed` is exact and expensive. `guessed` is cheap and wrong, but its differences are close.
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
    """Bytes that the compiled train step takes on one device; infinite if its compiler gave no number."""
    program, lowered = memory.lower_step(config, vocab_size, mesh)
    try:
        return sum(memory.step_memory(lowered.compile(), memory.state_bytes(program)).values())
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return memory.out_of_memory_bytes(str(error))[0] or math.inf


def device_memory(mesh: Mesh) -> float | None:
    """Bytes that programs may use on one device of `mesh`; None where it cannot be known.

    CPU devices share half of the memory that is free now: data and runtime need the rest.
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
    """Whether a compiler or a runtime says that a program is too large for the device's memory."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


@contextlib.contextmanager
def out_of_memory_explained(config: Config, vocab_size: int, mesh: Mesh) -> Iterator[None]:
    """Turn out-of-memory errors in the block into `RunFailed` with an explanation. `config` is resolved."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(explain_out_of_memory(config, vocab_size, mesh, error)) from error


def explain_out_of_memory(
    config: Config, vocab_size: int, mesh: Mesh, error: Exception, limit_bytes: float | None = None
) -> str:
    """An account of a device's memory, and settings that fit with the same sequences a step.

    `config` is resolved. Where the compiler said how much it needs, the arithmetic is scaled to that.
    """
    needed, available = memory.out_of_memory_bytes(str(error))
    limit = limit_bytes or available or device_memory(mesh)
    arithmetic = _arithmetic(config, vocab_size, mesh)
    factor = 1.0  # by which the estimate of activations must grow so that all kinds add up to `needed`
    if needed:
        exact = sum(size for kind, size in arithmetic.items() if kind not in memory.ACTIVATIONS)
        estimated = sum(arithmetic[kind] for kind in memory.ACTIVATIONS)
        factor = min(max((needed - exact) / estimated, 0.2), 5.0)
    kinds = _scaled(arithmetic, factor)
    listed = ", ".join(f"{kind} {_in_gib(size)}" for kind, size in kinds.items())
    lines = [
        f"out of memory: a device needs {_in_gib(needed or sum(kinds.values()))}"
        + (f" and may use {_in_gib(limit)}" if limit else ""),
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
    """Up to three command lines that keep the sequences of a step and fit, by arithmetic, `limit` bytes per device."""
    found = []
    for flags, ways in ways_to_save(config, mesh.devices.size):
        for changed in ways:
            needs = sum(_scaled(_arithmetic(changed, vocab_size, mesh), activation_factor).values())
            if needs <= _ROOM * limit:
                size = f"--train.per_device_train_batch_size {changed.per_device_train_batch_size}"
                found.append(f"{' '.join([size, *flags])}  ({_in_gib(needs)})")
                break  # the largest batch of this way to save memory
    return found[:3]


def _arithmetic(config: Config, vocab_size: int, mesh: Mesh) -> dict[str, int]:
    shape = memory.step_shape(config, mesh.devices.size)
    return memory.arithmetic_memory(config, vocab_size, shape, kernel=_has_kernels(mesh))


def _scaled(kinds: dict[str, int], factor: float) -> dict[str, float]:
    return {kind: size * factor if kind in memory.ACTIVATIONS else size for kind, size in kinds.items()}


def _has_kernels(mesh: Mesh) -> bool:
    return mesh.devices.flatten()[0].platform != "cpu"


def _in_gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
