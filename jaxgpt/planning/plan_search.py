"""Finds the fastest settings on a slice: compiles the likely best first, until time is up.

Every candidate takes the same sequences a step, so they train the same model and differ in time and memory only.
"""

import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from jaxgpt.config import Config, with_settings
from jaxgpt.errors import UserError
from jaxgpt.model.sizes import flops_per_token, parameter_count
from jaxgpt.parallel.chips import CHIPS
from jaxgpt.parallel.mesh import AXES, mesh_shape
from jaxgpt.planning.compile import CompiledStep, compile_step
from jaxgpt.planning.topology import Slice
from jaxgpt.training.auto_batch import batch_sizes
from jaxgpt.training.memory import StepShape, arithmetic_memory, step_shape
from jaxgpt.training.step import resolve_batch

_SURELY_TOO_LARGE = 1.5  # arithmetic over limit: beyond this, no compiler makes it fit


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings worth a look, with their memory and time by arithmetic."""

    where: Slice
    config: Config  # its batch is resolved
    shape: StepShape
    guessed_bytes: float  # on one device
    guessed_seconds: float  # of a step; good for the order of candidates, not for their times
    own: bool = False  # the config's own settings

    @property
    def label(self) -> str:
        """ "data 8, 16 rows x 4, remat block, scan" """
        shape, model = self.shape, self.config.model
        axes = [f"{axis} {size}" for axis in AXES if (size := getattr(shape, axis)) > 1]
        words = [*(axes or ["1 device"]), f"{shape.rows} rows x {shape.accumulation}"]
        words += [f"remat {model.remat}"] if model.remat != "none" else []
        words += ["scan"] if model.scan_layers else []
        return ", ".join(words) + (" (config)" if self.own else "")

    @property
    def kind(self) -> tuple[int, int, int, str, bool]:
        """The settings without the batch size: with all of these equal, larger needs more memory and less time."""
        shape, model = self.shape, self.config.model
        return shape.data, shape.fsdp, shape.tensor, model.remat, model.scan_layers


class Found(NamedTuple):
    """The result of a search."""

    tried: list[tuple[Candidate, CompiledStep]]  # in that order; the config's own settings first, if they can run
    untried: list[Candidate]
    refused: str  # why the config's own settings cannot run on the slice at all; empty if they can


def own_candidate(config: Config, vocab_size: int, where: Slice) -> Candidate:
    """The config's own settings on the slice; for an "auto" batch, the largest that fits by arithmetic.

    Raises:
        UserError: the slice's devices do not divide into the mesh, or the batch over them.
    """
    data, fsdp, _ = mesh_shape(config.mesh, where.devices)
    if config.train.per_device_train_batch_size == "auto":
        sized = _sized(config, vocab_size, where)
        own = next((c for c in sized if c.guessed_bytes <= where.hbm_bytes), sized[-1])
    else:
        own = _candidate(resolve_batch(config, data * fsdp), vocab_size, where)
    return dataclasses.replace(own, own=True)


def candidates(config: Config, vocab_size: int, where: Slice) -> list[Candidate]:
    """Mesh x remat x scan x batch size for `config`, whose global batch is known; the likely fastest first.

    What is far too large by arithmetic is left out; what is a little too large comes last. Raises UserError where no
    mesh of the slice's devices divides the global batch.
    """
    total = where.devices // config.mesh.tensor
    width, limit = config.model.n_embd, where.hbm_bytes
    found: list[Candidate] = []
    for fsdp in [n for n in range(1, total + 1) if total % n == 0 and width % n == 0]:
        for remat, scan in itertools.product(("none", "dots", "block"), (False, True)):
            changed = with_settings(
                config,
                mesh_data=total // fsdp,
                mesh_fsdp=fsdp,
                model_remat=remat,
                model_scan_layers=scan,
                train_gradient_accumulation_steps=None,
            )
            found += _sized(changed, vocab_size, where)
    found = [c for c in found if c.guessed_bytes <= _SURELY_TOO_LARGE * limit]
    return sorted(found, key=lambda c: (c.guessed_bytes > limit, c.guessed_seconds))


def _sized(config: Config, vocab_size: int, where: Slice) -> list[Candidate]:
    """A candidate for each batch size, the largest first, each at most two thirds of the one before it."""
    data, fsdp, _ = mesh_shape(config.mesh, where.devices)
    found: list[Candidate] = []
    for size in reversed(batch_sizes(config, data * fsdp)):
        if not found or size <= found[-1].shape.rows / 1.5:
            sized = with_settings(config, train_per_device_train_batch_size=size)
            found.append(_candidate(resolve_batch(sized, data * fsdp), vocab_size, where))
    return found


def _candidate(config: Config, vocab_size: int, where: Slice) -> Candidate:
    shape = step_shape(config, where.devices)
    memory = sum(arithmetic_memory(config, vocab_size, shape).values())
    return Candidate(where, config, shape, memory, arithmetic_seconds(config, vocab_size, where, shape))


# Factors of a step's time. Remat: what is computed twice. Measured on the TPU compiler: the loop over layers (124M,
# v5e-8: 1.40 without remat, 1.04 with whole blocks) and fsdp, which waits for its gathers.
_EFFICIENCY = 0.45
_REMAT_COST = {"none": 1.0, "dots": 1.08, "block": 1.27}
_LOOP_COST = {"none": 1.40, "dots": 1.15, "block": 1.04}
_FSDP_COST = 1.05


def arithmetic_seconds(config: Config, vocab_size: int, where: Slice, shape: StepShape) -> float:
    """An estimate of a step's seconds that needs no compiler; its error is up to a factor of 2."""
    model, chip = config.model, CHIPS[where.family]
    flops = config.global_batch_size * config.block_size * flops_per_token(model, vocab_size, config.block_size)
    seconds = flops / where.devices / chip.peak_flops / _EFFICIENCY
    seconds *= _REMAT_COST[model.remat] * (_LOOP_COST[model.remat] if model.scan_layers else 1.0)
    seconds *= 1 + 256 / (shape.rows * config.block_size)  # few rows leave the matrix units half empty

    parameters = parameter_count(model, vocab_size) / shape.tensor
    links = chip.ici_bandwidth / 4
    if shape.accumulation > 1:  # the sum of gradients is read and written for each micro-batch
        seconds += shape.accumulation * 12 * parameters / shape.fsdp / chip.hbm_bandwidth
    if shape.data > 1:  # gradients are sent, new parameters come back
        seconds += 8 * parameters / shape.fsdp / links
    if shape.fsdp > 1:  # bfloat16 weights forward and backward, float32 gradients, for each micro-batch
        seconds = _FSDP_COST * seconds + shape.accumulation * 8 * parameters / links
    return seconds


class Limits(NamedTuple):
    """How much a search may try on one slice."""

    seconds: float = 300.0  # after these no further program is begun
    candidates: int | None = None  # programs, the config's own included
    exact: bool = False  # only the config's own settings


def search(config: Config, vocab_size: int, where: Slice, limits: Limits, cache: Path | None) -> Found:
    """Compile the config's own settings for the slice, and then others, the likely fastest first.

    Raises:
        UserError: no settings can run on the slice, or with `limits.exact` the config's own cannot.
        NoTpuCompiler: there is no libtpu here.
    """
    queue, refused = queue_of(config, vocab_size, where, limits)
    started, pace = time.perf_counter(), 1.0
    tried: list[tuple[Candidate, CompiledStep]] = []
    untried: list[Candidate] = []
    with tqdm(total=limits.seconds, desc=where.name, unit="s", disable=None, file=sys.stderr) as bar:
        for candidate in queue:
            if _decided(candidate, tried):
                continue
            elapsed = time.perf_counter() - started
            enough = limits.candidates is not None and len(tried) >= limits.candidates
            if enough or (tried and elapsed + pace * _compile_seconds(candidate.config) > limits.seconds):
                untried.append(candidate)
                continue
            bar.set_postfix_str(candidate.label)
            step = compile_step(candidate.config, vocab_size, where, cache)
            bar.update(min(time.perf_counter() - started, limits.seconds) - bar.n)
            tried.append((candidate, step))
            if step.fits:
                pace = step.compile_seconds / _compile_seconds(candidate.config)
    return Found(tried, untried, refused)


def queue_of(config: Config, vocab_size: int, where: Slice, limits: Limits) -> tuple[list[Candidate], str]:
    """(candidates in the order of trying, why the config's own settings are not among them)"""
    try:
        own = own_candidate(config, vocab_size, where)
    except UserError as error:
        if limits.exact:
            raise
        size = config.train.per_device_train_batch_size
        each = 8 if size == "auto" else config.per_device_train_batch_size
        rows = config.train.global_batch_size or each * where.devices // config.mesh.tensor
        fixed = with_settings(config, train_global_batch_size=rows)
        return candidates(fixed, vocab_size, where), str(error)
    if limits.exact:
        return [own], ""
    fixed = with_settings(config, train_global_batch_size=own.config.global_batch_size)
    others = [c for c in candidates(fixed, vocab_size, where) if (c.kind, c.shape) != (own.kind, own.shape)]
    return [own, *others], ""


def _decided(candidate: Candidate, tried: list[tuple[Candidate, CompiledStep]]) -> bool:
    """Whether another program decides this one: same kind, and it fits and is no smaller, or does not and no larger."""
    rows = candidate.shape.rows
    same = ((other.shape.rows, step.fits) for other, step in tried if other.kind == candidate.kind)
    return any(size >= rows if fits else size <= rows for size, fits in same)


def _compile_seconds(config: Config) -> float:
    """Roughly how long libtpu takes on two cores, relative to another program."""
    return 60.0 if config.model.scan_layers else 20.0 + 13.0 * config.model.n_layer
