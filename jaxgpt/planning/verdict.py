"""Answers for settings on a slice: do they fit, how long is a step, what does a billion tokens cost?

The price of a chip-hour comes from prices.toml beside this file, or from the user's own.
"""

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from jaxgpt.config import Config, with_settings
from jaxgpt.errors import UserError
from jaxgpt.model.sizes import flops_per_token
from jaxgpt.parallel.chips import CHIPS
from jaxgpt.planning.compile import CompiledStep
from jaxgpt.planning.cost import CALIBRATION, Estimate, estimate
from jaxgpt.planning.plan_search import Candidate, candidates
from jaxgpt.planning.program import ProgramCost, read_program
from jaxgpt.planning.topology import FAMILIES, Slice, known_slices
from jaxgpt.training.memory import arithmetic_memory

PRICES_FILE = Path(__file__).with_name("prices.toml")
ARITHMETIC_BAND = (0.6, 2.0)  # error of a time that no compiler has seen; published trainers reach 23 to 74 % MFU


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Price:
    usd_per_chip_hour: Annotated[float, Field(gt=0, strict=True)]
    date: str
    source: str


def read_prices(file: Path | None = None) -> dict[str, Price]:
    """{"v5e": Price, ...} from the user's file or prices.toml."""
    file = file or PRICES_FILE
    try:
        prices = TypeAdapter(dict[str, Price]).validate_python(tomllib.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"--prices {file}: no such file") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--prices {file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--prices {file}: not a readable TOML file ({error})") from None
    if unknown := set(prices) - set(FAMILIES):
        raise UserError(f"--prices {file}: [{min(unknown)}] is no chip; known: {', '.join(FAMILIES)}")
    return prices


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One row of the table. Bytes and cycles are of one device, times of one step."""

    candidate: Candidate
    memory: dict[str, int]
    total_bytes: int
    limit_bytes: int
    flops: float  # model FLOPs of a step on all devices
    fits: bool
    problem: str = ""
    compile_seconds: float | None = None  # None: no compiler was asked, and everything here is arithmetic
    cost: ProgramCost | None = None
    parts: Estimate | None = None  # the sum of the compiler's figures, before calibration
    seconds: float | None = None  # None: it does not fit
    low: float | None = None
    high: float | None = None
    """The ends of the time's error band; None where no measured run says how far it is off."""
    usd_per_hour: float | None = None  # of the whole slice

    @property
    def where(self) -> Slice:
        return self.candidate.where

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all devices."""
        return self.candidate.config.global_batch_size * self.candidate.config.block_size

    @property
    def cycles(self) -> float | None:
        """The compiler's sum, and the kernels' cycles, which that leaves out."""
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

    def mfu(self, seconds: float) -> float:
        """Model FLOPs over what the devices could do in `seconds`."""
        return self.flops / (seconds * self.where.devices * CHIPS[self.where.family].peak_flops)


def judge(candidate: Candidate, step: CompiledStep, vocab_size: int, prices: dict[str, Price]) -> Verdict:
    """The verdict on a compiled step."""
    where = candidate.where
    row = Verdict(
        candidate,
        step.memory,
        step.total_bytes,
        step.limit_bytes,
        flops=_flops(candidate, vocab_size),
        fits=step.fits and step.total_bytes <= step.limit_bytes,
        problem=step.problem,
        compile_seconds=step.compile_seconds,
        usd_per_hour=_usd_per_hour(where, prices),
    )
    if not row.fits:
        return row
    cost = read_program(step.hlo)
    parts = estimate(cost, CHIPS[where.family], where.shape)
    # Measured so far: single chips of two generations, nothing about collectives or other chips (CALIBRATION.limits).
    measured = where.chips == 1 and where.family in ("v5e", "v6e")
    return dataclasses.replace(
        row,
        cost=cost,
        parts=parts,
        seconds=parts.seconds * CALIBRATION.factor,
        low=CALIBRATION.low * parts.seconds if measured else None,
        high=CALIBRATION.high * parts.seconds if measured else None,
    )


def guess(candidate: Candidate, vocab_size: int, prices: dict[str, Price]) -> Verdict:
    """The verdict by arithmetic alone, where there is no compiler."""
    where, seconds = candidate.where, candidate.guessed_seconds
    memory = arithmetic_memory(candidate.config, vocab_size, candidate.shape)
    total = sum(memory.values())
    low, high = ARITHMETIC_BAND
    return Verdict(
        candidate,
        memory,
        total,
        where.hbm_bytes,
        flops=_flops(candidate, vocab_size),
        fits=total <= where.hbm_bytes,
        seconds=seconds,
        low=low * seconds,
        high=high * seconds,
        usd_per_hour=_usd_per_hour(where, prices),
    )


def best(verdicts: Sequence[Verdict]) -> Verdict | None:
    """The fastest of those that fit."""
    return min((row for row in verdicts if row.fits), key=lambda row: row.seconds or 0.0, default=None)


def _flops(candidate: Candidate, vocab_size: int) -> float:
    config = candidate.config
    tokens = config.global_batch_size * config.block_size
    return tokens * flops_per_token(config.model, vocab_size, config.block_size)


def _usd_per_hour(where: Slice, prices: dict[str, Price]) -> float | None:
    price = prices.get(where.family)
    return where.chips * price.usd_per_chip_hour if price else None


def nothing_fits(config: Config, vocab_size: int, slices: Sequence[Slice], exact: bool) -> str:
    """One line on what would fit by arithmetic: other settings if only the config's own were tried, larger slices."""
    names = ", ".join(where.name for where in slices)
    options: list[str] = []
    if exact:
        options = [f"{where.name} with {label}" for where in slices if (label := _first_fit(config, vocab_size, where))]
    if not options:
        for family in dict.fromkeys(where.family for where in slices):
            larger = [where for where in known_slices(family) if where.chips > max(s.chips for s in slices)]
            fits = ((where, _first_fit(config, vocab_size, where)) for where in larger)
            options += [f"{where.name} with {label}" for where, label in fits if label][:1]
    if not options:
        roomiest = max(FAMILIES, key=lambda family: FAMILIES[family].hbm_gib)
        options = [f"chips with more memory, as {roomiest}"]
    return f"nothing fits on {names}; by arithmetic this would: {'; '.join(options)}"


def _first_fit(config: Config, vocab_size: int, where: Slice) -> str:
    """The settings that are likely fastest and fit with 15 % to spare; empty if there are none."""
    rows = config.train.global_batch_size or where.devices // config.mesh.tensor
    try:
        listed = candidates(with_settings(config, train_global_batch_size=rows), vocab_size, where)
    except UserError:
        return ""
    return next((c.label for c in listed if c.guessed_bytes <= 0.85 * where.hbm_bytes), "")
