"""Which settings are fastest on a slice? The likely best are compiled first, until time is up.

Every candidate takes the same sequences a step, so they train the same model and differ in time and memory only.
"""

import dataclasses
import itertools
import sys
import time
from pathlib import Path

from tqdm import tqdm

from jaxgpt.config import Config, with_settings
from jaxgpt.errors import UserError
from jaxgpt.model.sizes import flops_per_token, parameter_count
from jaxgpt.parallel.chips import CHIPS
from jaxgpt.planning.compile import CompiledStep, compile_step
from jaxgpt.planning.topology import Slice
from jaxgpt.training.memory import Layout, arithmetic_memory, batch_sizes, layout_of, mesh_sizes
from jaxgpt.training.step import resolve_batch

_SURELY_TOO_LARGE = 1.5  # arithmetic over limit: beyond this, no compiler makes it fit


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings worth a look, with what arithmetic says of them."""

    where: Slice
    config: Config
    """Its batch is resolved."""
    layout: Layout
    guessed_bytes: float
    """On one device."""
    guessed_seconds: float
    """Of a step; better in its order than in its size."""
    own: bool = False
    """The config's own settings."""

    @property
    def label(self) -> str:
        """ "data 8, 16 rows x 4, remat block, scan" """
        layout, model = self.layout, self.config.model
        axes = [f"{axis} {size}" for axis in ("data", "fsdp", "tensor") if (size := getattr(layout, axis)) > 1]
        words = [*(axes or ["1 device"]), f"{layout.rows} rows x {layout.accumulation}"]
        words += [f"remat {model.remat}"] if model.remat != "none" else []
        words += ["scan"] if model.scan_layers else []
        return ", ".join(words) + (" (config)" if self.own else "")

    @property
    def kind(self) -> tuple:
        """All but the batch size: of two sizes of one kind the larger needs more memory and less time."""
        model = self.config.model
        return self.layout.data, self.layout.fsdp, self.layout.tensor, model.remat, model.scan_layers


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search came to."""

    tried: list[tuple[Candidate, CompiledStep]]
    """In the order of trying; the config's own settings first, where the slice can run them."""
    untried: list[Candidate]
    refused: str
    """Why the config's own settings cannot run on the slice at all; empty if they can."""


# ---------------------------------------------------------------- candidates


def own_candidate(config: Config, vocab_size: int, where: Slice) -> Candidate:
    """The config's own settings on the slice; of "auto", the largest batch that fits by arithmetic.

    Raises:
        UserError: the slice's devices do not divide into the mesh, or the batch over them.
    """
    data, fsdp, _ = mesh_sizes(config.mesh, where.devices)
    if config.train.per_device_train_batch_size == "auto":
        sized = _sized(config, vocab_size, where)
        fits = [c for c in sized if c.guessed_bytes <= where.hbm_bytes]
        own = fits[0] if fits else sized[-1]
    else:
        own = _candidate(resolve_batch(config, data * fsdp), vocab_size, where)
    return dataclasses.replace(own, own=True)


def candidates(config: Config, vocab_size: int, where: Slice) -> list[Candidate]:
    """Mesh x remat x scan x batch size for `config`, whose global batch is known; the likely fastest first.

    What arithmetic finds far too large is left out; what it finds a little too large comes last.

    Raises:
        UserError: no mesh of the slice's devices divides the global batch.
    """
    total = where.devices // config.mesh.tensor
    width, limit = config.model.n_embd, where.hbm_bytes
    found: list[Candidate] = []
    for fsdp in [n for n in range(1, total + 1) if total % n == 0 and width % n == 0]:
        for remat, scan in itertools.product(("none", "dots", "block"), (False, True)):
            settings = dict(mesh_data=total // fsdp, mesh_fsdp=fsdp, model_remat=remat, model_scan_layers=scan)
            changed = with_settings(config, **settings, train_gradient_accumulation_steps=None)
            found += _sized(changed, vocab_size, where)
    found = [c for c in found if c.guessed_bytes <= _SURELY_TOO_LARGE * limit]
    return sorted(found, key=lambda c: (c.guessed_bytes > limit, c.guessed_seconds))


def _sized(config: Config, vocab_size: int, where: Slice) -> list[Candidate]:
    """One for each batch size, the largest first, each at most two thirds of the one before it."""
    data, fsdp, _ = mesh_sizes(config.mesh, where.devices)
    found: list[Candidate] = []
    for size in reversed(batch_sizes(config, data * fsdp)):
        if not found or size <= found[-1].layout.rows / 1.5:
            sized = with_settings(config, train_per_device_train_batch_size=size)
            found.append(_candidate(resolve_batch(sized, data * fsdp), vocab_size, where))
    return found


def _candidate(config: Config, vocab_size: int, where: Slice) -> Candidate:
    layout = layout_of(config, where.devices)
    memory = sum(arithmetic_memory(config, vocab_size, layout).values())
    return Candidate(where, config, layout, memory, arithmetic_seconds(config, vocab_size, where, layout))


# Factors of a step's time. Remat: what is computed twice. The loop over layers was measured on the TPU compiler (124M,
# v5e-8: 1.40 without remat, 1.04 with whole blocks), and so was fsdp, whose gathers it waits for.
_EFFICIENCY = 0.45
_REMAT_COST = {"none": 1.0, "dots": 1.08, "block": 1.27}
_LOOP_COST = {"none": 1.40, "dots": 1.15, "block": 1.04}
_FSDP_COST = 1.05


def arithmetic_seconds(config: Config, vocab_size: int, where: Slice, layout: Layout) -> float:
    """A guess of a step's seconds, for the order of candidates and for where there is no compiler."""
    model, chip = config.model, CHIPS[where.family]
    devices = layout.data * layout.fsdp * layout.tensor
    tokens = config.train.global_batch_size * config.block_size
    seconds = tokens * flops_per_token(model, vocab_size, config.block_size) / devices / chip.peak_flops / _EFFICIENCY
    seconds *= _REMAT_COST[model.remat] * (_LOOP_COST[model.remat] if model.scan_layers else 1.0)
    seconds *= 1 + 256 / (layout.rows * config.block_size)  # few rows leave the matrix units half empty

    parameters = parameter_count(model, vocab_size) / layout.tensor
    links = chip.ici_bandwidth / 4
    if layout.accumulation > 1:  # the sum of gradients is read and written for each micro-batch
        seconds += layout.accumulation * 12 * parameters / layout.fsdp / chip.hbm_bandwidth
    if layout.data > 1:  # gradients there, new parameters back
        seconds += 8 * parameters / layout.fsdp / links
    if layout.fsdp > 1:  # bfloat16 weights forward and backward, float32 gradients, for each micro-batch
        seconds = _FSDP_COST * seconds + layout.accumulation * 8 * parameters / links
    return seconds


# ---------------------------------------------------------------- the search


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much a search may try on one slice."""

    seconds: float = 300.0
    """After these no further program is begun."""
    candidates: int | None = None
    """Programs, the config's own included."""
    exact: bool = False
    """Only the config's own settings."""


def search(config: Config, vocab_size: int, where: Slice, limits: Limits, cache: Path | None) -> Found:
    """Compile the config's own settings for the slice, and then others, the likely fastest first.

    Raises:
        UserError: with `limits.exact`, the slice cannot run the config; or no settings could.
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
        rows = config.train.global_batch_size or (8 if size == "auto" else size) * where.devices // config.mesh.tensor
        fixed = with_settings(config, train_global_batch_size=rows)
        return candidates(fixed, vocab_size, where), str(error)
    if limits.exact:
        return [own], ""
    fixed = with_settings(config, train_global_batch_size=own.config.train.global_batch_size)
    others = [c for c in candidates(fixed, vocab_size, where) if (c.kind, c.layout) != (own.kind, own.layout)]
    return [own, *others], ""


def _decided(candidate: Candidate, tried: list[tuple[Candidate, CompiledStep]]) -> bool:
    """Whether a program of the same kind says enough: it fits and is no smaller, or does not and is no larger."""
    return any(
        other.kind == candidate.kind
        and (other.layout.rows >= candidate.layout.rows if step.fits else other.layout.rows <= candidate.layout.rows)
        for other, step in tried
    )


def _compile_seconds(config: Config) -> float:
    """Roughly how long libtpu takes on two cores, relative to another program."""
    return 60.0 if config.model.scan_layers else 20.0 + 13.0 * config.model.n_layer
