"""What a person asks of settings on a slice: do they fit, how long is a step, what does a billion tokens cost?"""

import dataclasses
import logging
import subprocess
from pathlib import Path

from jaxgpt.config import Config, with_settings
from jaxgpt.errors import UserError
from jaxgpt.model.sizes import flops_per_token
from jaxgpt.parallel.chips import CHIPS
from jaxgpt.planning.compile import CompiledStep
from jaxgpt.planning.cost import CALIBRATION, Estimate, estimate
from jaxgpt.planning.kernels import kernel_cycles
from jaxgpt.planning.plan_search import Candidate, candidates
from jaxgpt.planning.prices import Price
from jaxgpt.planning.program import ProgramCost, read_program
from jaxgpt.planning.topology import FAMILIES, Slice, known_slices
from jaxgpt.training.memory import arithmetic_memory

logger = logging.getLogger(__name__)

ARITHMETIC_BAND = (0.6, 2.0)  # of a time that no compiler has seen; published trainers lie between 23 and 74 % MFU


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One row of the table. Bytes and cycles are of one device, times of one step."""

    where: Slice
    candidate: Candidate
    memory: dict[str, int]
    total_bytes: int
    limit_bytes: int
    flops: float
    """Model FLOPs of a step on all devices."""
    fits: bool
    problem: str = ""
    compile_seconds: float | None = None
    """None: no compiler was asked, and everything here is arithmetic."""
    cost: ProgramCost | None = None
    parts: Estimate | None = None
    """What the compiler's figures add up to, before calibration."""
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    """The estimated time and the ends of its error band; the ends are None where no measured run says how far it is
    off (`is_calibrated`)."""
    usd_per_hour: float | None = None
    """Of the whole slice."""

    @property
    def tokens(self) -> int:
        """Of a step, over all devices."""
        return self.candidate.config.train.global_batch_size * self.candidate.config.block_size

    @property
    def cycles(self) -> float | None:
        """The compiler's sum and the schedules of the kernels, which that leaves out."""
        chip = CHIPS[self.where.family]
        return (self.parts.compute_seconds + self.parts.kernel_seconds) * chip.clock_hz if self.parts else None

    @property
    def tokens_per_day(self) -> float | None:
        return 86_400 * self.tokens / self.seconds if self.seconds else None

    @property
    def usd_per_billion_tokens(self) -> float | None:
        if not (self.seconds and self.usd_per_hour):
            return None
        return self.usd_per_hour / 3600 * self.seconds * 1e9 / self.tokens

    def mfu(self, seconds: float | None) -> float | None:
        """Model FLOPs over what the devices could do in `seconds`."""
        return self.flops / (seconds * self.where.devices * CHIPS[self.where.family].peak_flops) if seconds else None


def judge(
    candidate: Candidate, step: CompiledStep, vocab_size: int, prices: dict[str, Price], cache: Path | None
) -> Verdict:
    """Of a compiled step. `cache` is where the schedules of kernels are kept."""
    where = candidate.where
    row = Verdict(
        where=where,
        candidate=candidate,
        memory=step.memory,
        total_bytes=step.total_bytes,
        limit_bytes=step.limit_bytes,
        flops=_flops(candidate, vocab_size),
        fits=step.fits and step.total_bytes <= step.limit_bytes,
        problem=step.problem,
        compile_seconds=step.compile_seconds,
        usd_per_hour=_usd_per_hour(where, prices),
    )
    if not row.fits:
        return row
    cost = read_program(step.hlo)
    parts = estimate(cost, CHIPS[where.family], where.shape, _kernel_cycles(step.hlo, where, cache))
    return dataclasses.replace(
        row,
        cost=cost,
        parts=parts,
        seconds=parts.seconds * CALIBRATION.factor,
        low=parts.seconds * CALIBRATION.low if is_calibrated(where) else None,
        high=parts.seconds * CALIBRATION.high if is_calibrated(where) else None,
    )


def _kernel_cycles(hlo: str, where: Slice, cache: Path | None) -> dict[str, float]:
    """Cycles of one call of each kernel; without those whose schedule cannot be had, which the table names."""
    try:
        return kernel_cycles(hlo, where.topology, cache)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        logger.warning("the kernels' schedules cannot be read: %s", str(error).splitlines()[0])
        return {}


def guess(candidate: Candidate, vocab_size: int, prices: dict[str, Price]) -> Verdict:
    """By arithmetic alone, where there is no compiler."""
    where, seconds = candidate.where, candidate.guessed_seconds
    memory = arithmetic_memory(candidate.config, vocab_size, candidate.layout)
    total = sum(memory.values())
    low, high = ARITHMETIC_BAND
    return Verdict(
        where=where,
        candidate=candidate,
        memory=memory,
        total_bytes=total,
        limit_bytes=where.hbm_bytes,
        flops=_flops(candidate, vocab_size),
        fits=total <= where.hbm_bytes,
        seconds=seconds,
        low=low * seconds,
        high=high * seconds,
        usd_per_hour=_usd_per_hour(where, prices),
    )


def best(verdicts: list[Verdict]) -> Verdict | None:
    """The fastest of those that fit."""
    return min((row for row in verdicts if row.fits), key=lambda row: row.seconds, default=None)


def _flops(candidate: Candidate, vocab_size: int) -> float:
    config = candidate.config
    tokens = config.train.global_batch_size * config.block_size
    return tokens * flops_per_token(config.model, vocab_size, config.block_size)


def _usd_per_hour(where: Slice, prices: dict[str, Price]) -> float | None:
    price = prices.get(where.family)
    return where.chips * price.usd_per_chip_hour if price else None


def is_calibrated(where: Slice) -> bool:
    """Whether measured runs like this slice are behind the calibration: so far single chips of two generations, so
    it says nothing of collectives or of other chips (CALIBRATION.limits)."""
    return where.chips == 1 and where.family in ("v5e", "v6e")


def times_are_absolute(compiled: bool) -> bool:
    """Whether times may be printed as seconds: the calibration says, except of arithmetic, which promises little."""
    return CALIBRATION.absolute or not compiled


def nothing_fits(config: Config, vocab_size: int, slices: list[Slice], exact: bool) -> str:
    """One line on what would, by arithmetic: other settings if only the config's own were tried, or larger slices."""
    names = ", ".join(where.name for where in slices)
    told = []
    if exact:
        told = [f"{where.name} with {label}" for where in slices if (label := _first_fit(config, vocab_size, where))]
    if not told:
        for family in dict.fromkeys(where.family for where in slices):
            larger = [where for where in known_slices(family) if where.chips > max(s.chips for s in slices)]
            fits = ((where, _first_fit(config, vocab_size, where)) for where in larger)
            told += [f"{where.name} with {label}" for where, label in fits if label][:1]
    if not told:  # of no size: chips with more memory
        roomiest = max(FAMILIES, key=lambda family: FAMILIES[family].hbm_gib)
        told = [f"chips with more memory, as {roomiest}"]
    return f"nothing fits on {names}; by arithmetic this would: {'; '.join(told)}"


def _first_fit(config: Config, vocab_size: int, where: Slice) -> str:
    """The likely fastest settings that fit, with some room to err; empty if there are none."""
    total = config.train.global_batch_size
    rows = total or where.devices // config.mesh.tensor
    try:
        listed = candidates(with_settings(config, train_global_batch_size=rows), vocab_size, where)
    except UserError:
        return ""
    return next((c.label for c in listed if c.guessed_bytes <= 0.85 * where.hbm_bytes), "")
