"""The `plan` command: the table of each slice, the answer over all of them, and the gate."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jaxgpt.config import Config
from jaxgpt.errors import RunFailed, UserError
from jaxgpt.model.sizes import GPT2_VOCAB
from jaxgpt.parallel.accelerator import cache_folder
from jaxgpt.parallel.chips import CHIPS
from jaxgpt.planning import plan_table
from jaxgpt.planning.cost import CALIBRATION
from jaxgpt.planning.plan_search import Candidate, Limits, queue_of, search
from jaxgpt.planning.topology import NoTpuCompiler, Slice, parse_slice, parse_slices, tpu_compiler_version
from jaxgpt.planning.verdict import Price, Verdict, guess, judge, nothing_fits, read_prices
from jaxgpt.preparation.make_dataset import given_tokenizer

TOLERANCE = 0.02  # share of the recorded cycles by which a gate lets them grow: harmless changes move them a little


def plan(config: Config, arguments: argparse.Namespace) -> None:
    """Print what the slices can do with `config`. `arguments` are those of the command line.

    Raises:
        UserError: a slice or a setting is wrong, or nothing fits anywhere.
        RunFailed: the gate does not hold.
    """
    jax.config.update("jax_platforms", "cpu")  # a TPU in this machine is left to its user

    # 1. Everything that can be wrong in the input.
    bounds = read_bounds(arguments.gate) if arguments.gate else {}
    slices = parse_slices(arguments.tpu or ",".join(bounds))
    prices = read_prices(arguments.prices)
    vocab_size = arguments.vocab_size or vocabulary(config)
    try:
        compiler = f"libtpu {tpu_compiler_version()}"
    except NoTpuCompiler as missing:
        if arguments.record or arguments.gate:
            raise UserError(f"--record and --gate need the compiler; {missing}") from None
        print(f"{missing}\n{plan_table.ARITHMETIC}\n")
        compiler = ""

    # 2. Each slice: the config's own settings, then others; its table is printed as soon as it is complete.
    exact = arguments.exact or bool(arguments.record or arguments.gate)
    limits = Limits(arguments.budget, arguments.candidates, exact)
    # Whether times may be printed as seconds: if the calibration allows it, or for arithmetic, whose band is wide.
    absolute = CALIBRATION.absolute or not compiler
    rows: list[Verdict] = []
    refusals: list[UserError] = []
    for where in slices:
        print(plan_table.slice_line(where, compiler), flush=True)
        try:
            found, untried, refused = verdicts(config, vocab_size, where, limits, prices, bool(compiler))
        except UserError as error:
            refusals.append(error)
            print(f"  {error}\n")
            continue
        print(plan_table.slice_report(found, untried, refused, absolute, arguments.top), flush=True)
        rows += found
    if arguments.json:
        write(arguments.json, plan_table.as_json(rows))

    # 3. The answer over all slices, and the gate's.
    if len(refusals) == len(slices):
        raise refusals[0]
    if not any(row.fits for row in rows):
        raise UserError(nothing_fits(config, vocab_size, slices, exact))
    print(plan_table.closing(rows, prices, absolute))
    if arguments.record:
        write(arguments.record, json.dumps({row.where.name: bound_of(row) for row in rows}, indent=2))
    if arguments.gate:
        check_bounds(arguments.gate, bounds, rows)


def verdicts(
    config: Config, vocab_size: int, where: Slice, limits: Limits, prices: dict[str, Price], compiled: bool
) -> tuple[list[Verdict], list[Candidate], str]:
    """(verdicts on a slice, candidates left untried, why the config's own settings cannot run there)"""
    if not compiled:
        queue, refused = queue_of(config, vocab_size, where, limits)
        kept = limits.candidates or 5
        return [guess(candidate, vocab_size, prices) for candidate in queue[:kept]], [], refused
    folder = cache_folder()
    found = search(config, vocab_size, where, limits, folder and folder / "plan")
    return [judge(candidate, step, vocab_size, prices) for candidate, step in found.tried], found.untried, found.refused


def vocabulary(config: Config) -> int:
    """Tokens of the config's vocabulary, found without training its tokenizer."""
    tokenizer = config.tokenizer
    added = len(tokenizer.special_tokens) + (2 if config.data.format == "chat" else 0)  # the two tokens of a turn
    if tokenizer.type == "bpe":
        return tokenizer.entries + added
    if tokenizer.type == "char":
        return 128  # the embedding is padded to a multiple of 128 anyway
    if (tokenizer.path or "").partition("@")[0] in ("hf:gpt2", "hf:openai-community/gpt2"):
        return GPT2_VOCAB + added
    if tokenizer.path and tokenizer.path.startswith("hf:"):
        raise UserError(f"tokenizer.path = {tokenizer.path} is on the hub; say how many tokens it has: --vocab-size N")
    given = given_tokenizer(config)
    assert given, "tokenizer.type = folder has a tokenizer"
    return given.vocab_size


def write(file: Path, text: str) -> None:
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error})") from None
    print(f"written: {file}")


def bound_of(row: Verdict) -> dict[str, object]:
    """The figures that a gate compares: bytes and cycles of one device, with the compiler's versions."""
    versions = {"jax": jax.__version__, "libtpu": tpu_compiler_version()}
    return {"fits": row.fits, "total_bytes": row.total_bytes, "cycles": row.cycles, **versions}


def read_bounds(file: Path) -> dict[str, dict]:
    """{"v5e-8": bound, ...} as `--record` wrote them."""
    try:
        bounds = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--gate {file}: no such file; write it with --record {file}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--gate {file}: not a file that --record wrote ({error})") from None
    is_record = lambda bound: isinstance(bound, dict) and "cycles" in bound
    if not (isinstance(bounds, dict) and bounds and all(map(is_record, bounds.values()))):
        raise UserError(f"--gate {file}: not a file that --record wrote")
    return bounds


def check_bounds(file: Path, bounds: dict[str, dict], rows: Sequence[Verdict]) -> None:
    """Raise RunFailed where a row does not fit, or takes more cycles than its slice's bound and the tolerance."""
    broken = []
    for row in rows:
        bound = bounds.get(row.where.name)
        if bound is None:
            raise UserError(f"--gate {file} has no bound for {row.where.name}; it has {', '.join(bounds)}")
        if row.cycles is None:
            broken.append(f"{row.where.name} no longer fits")
        elif bound["cycles"] and row.cycles > bound["cycles"] * (1 + TOLERANCE):
            now, before = row.cycles / 1e6, bound["cycles"] / 1e6
            broken.append(f"{row.where.name} takes {now:.1f} M cycles, {before:.1f} M were recorded")
    if broken:
        raise RunFailed(f"gate {file}: {'; '.join(broken)}")
    print(f"gate {file}: holds")


class SliceMachine(NamedTuple):
    """A slice as something that trains."""

    devices: int
    peak_flops: float  # of a device
    usd_per_hour: float | None  # of the slice
    step_seconds: Callable[[Config, int], float | None]
    """(config, vocabulary) -> seconds of a step, compiled; None where it does not fit."""


def slice_machine(name: str) -> SliceMachine:
    """The slice of that name. Raises UserError where there is none, or no TPU compiler; its steps raise it, too."""
    jax.config.update("jax_platforms", "cpu")
    where, prices = parse_slice(name), read_prices()
    try:
        tpu_compiler_version()
    except NoTpuCompiler as missing:
        raise UserError(str(missing)) from None

    def step_seconds(config: Config, vocab_size: int) -> float | None:
        found, _, refused = verdicts(config, vocab_size, where, Limits(exact=True), prices, compiled=True)
        if not found:
            raise UserError(refused)
        return found[0].seconds

    price = prices.get(where.family)
    per_hour = price.usd_per_chip_hour * where.chips if price else None
    return SliceMachine(where.devices, CHIPS[where.family].peak_flops, per_hour, step_seconds)
