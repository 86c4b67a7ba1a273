"""What fits a TPU slice, how fast it is and what it costs, before one is rented:
`python -m jaxgpt.plan --config configs/gpt2_124m.toml --tpu v5e-8`.

The TPU compiler runs on this machine (libtpu: any x86-64 Linux, no TPU). It compiles the train step that the training
command would run, with the config's own settings and then with others that train the same model: meshes, batch
sizes, recomputation, layers in a loop or one by one. Without libtpu the table is arithmetic, and says so.

A gate for continuous integration: `--record FILE` writes what the config's own settings need, and `--gate FILE`
exits with 1 when they no longer fit, or take more cycles than was recorded.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.config import Config
from jaxgpt.errors import RunFailed, UserError

TOLERANCE = 0.02  # of the recorded cycles: what a gate lets pass, for changes of no account move them a little


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("plan", __doc__)
    _add_arguments(parser)
    cli.add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    config = cli.config_from(arguments)
    if not (arguments.tpu or arguments.gate):
        raise UserError("give the slices to plan for, for example --tpu v5e-8 or --tpu v5e-1,v5e-8,v6e-8,v5p-16")
    plan(config, arguments)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    own = "the config's own settings"
    add = parser.add_argument
    add("--tpu", metavar="LIST", help="slices, with commas: v5e-1,v5e-8,v6e-8,v5p-16, or shapes in chips: v5p:2x2x4")
    add("--exact", action="store_true", help=f"only {own}")
    budget = f"compile other settings for S seconds a slice; what is begun is finished, and {own} always are"
    add("--budget", metavar="S", type=_positive(float), default=300.0, help=f"{budget} [default 300]")
    add("--candidates", metavar="N", type=_positive(int), help="compile at most N settings for a slice")
    add("--vocab-size", metavar="V", type=_positive(int), help="tokens in the vocabulary, where the config cannot tell")
    add("--top", metavar="N", type=int, default=5, help="costliest operations to list [default 5]")
    add("--prices", metavar="FILE", type=Path, help="TOML file of prices [default jaxgpt/planning/prices.toml]")
    add("--json", metavar="FILE", type=Path, help="write the table for programs")
    add("--record", metavar="FILE", type=Path, help=f"write memory and cycles of {own}, for --gate; implies --exact")
    gate = f"exit with 1 if {own} no longer fit the slices in FILE, or take over {TOLERANCE:.0%} more cycles than there"
    add("--gate", metavar="FILE", type=Path, help=f"{gate.replace('%', '%%')}; implies --exact")


def _positive(kind: type):
    def positive_number(text: str):
        value = kind(text)
        if value <= 0:
            raise ValueError
        return value

    return positive_number


def plan(config: Config, arguments: argparse.Namespace) -> None:
    """Print what the slices can do with `config`.

    Raises:
        UserError: a slice or a setting is wrong, or nothing fits anywhere.
        RunFailed: the gate does not hold.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # a TPU in this machine is left to whoever uses it
    from jaxgpt.planning import plan_table
    from jaxgpt.planning.plan_search import Limits
    from jaxgpt.planning.prices import read_prices
    from jaxgpt.planning.topology import NoTpuCompiler, parse_slices, tpu_compiler_version
    from jaxgpt.planning.verdict import nothing_fits, times_are_absolute

    # 1. Everything that the input can have wrong.
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
        compiler = None

    # 2. Each slice: the config's own settings, then others; its table as soon as it is done.
    exact = arguments.exact or bool(arguments.record or arguments.gate)
    limits = Limits(arguments.budget, arguments.candidates, exact)
    absolute = times_are_absolute(compiled=compiler is not None)
    rows, refusals = [], []
    for where in slices:
        print(plan_table.slice_line(where, compiler), flush=True)
        try:
            found, untried, refused = verdicts(config, vocab_size, where, limits, prices, compiler is not None)
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


def verdicts(config: Config, vocab_size: int, where, limits, prices: dict, compiled: bool):
    """(verdicts on a slice, candidates left untried, why the config's own settings cannot run there)"""
    from jaxgpt.planning.plan_search import queue_of, search
    from jaxgpt.planning.verdict import guess, judge

    if not compiled:
        queue, refused = queue_of(config, vocab_size, where, limits)
        kept = limits.candidates or 5
        return [guess(candidate, vocab_size, prices) for candidate in queue[:kept]], [], refused
    folder = config.train.compilation_cache_dir
    cache = Path(folder).expanduser() / "plan" if folder else None
    found = search(config, vocab_size, where, limits, cache)
    rows = [judge(candidate, step, vocab_size, prices, cache) for candidate, step in found.tried]
    return rows, found.untried, found.refused


def vocabulary(config: Config) -> int:
    """Tokens of the config's vocabulary, without making its tokenizer.

    Raises:
        UserError: the config does not tell.
    """
    from jaxgpt.model.sizes import GPT2_VOCAB
    from jaxgpt.preparation.make_dataset import given_tokenizer

    tokenizer = config.tokenizer
    added = len(tokenizer.special_tokens) + (2 if config.data.format == "chat" else 0)  # the two tokens of a turn
    if tokenizer.type == "bpe":
        return tokenizer.vocab_size + added
    if tokenizer.type == "char":
        return 128  # the embedding is padded to a multiple of 128 anyway
    if tokenizer.path == "hf:gpt2":
        return GPT2_VOCAB + added
    if tokenizer.path.startswith("hf:"):
        raise UserError(f"tokenizer.path = {tokenizer.path} is on the hub; say how many tokens it has: --vocab-size N")
    return given_tokenizer(config).vocab_size


# ---------------------------------------------------------------- the gate


def bound_of(row) -> dict:
    """What a gate compares: bytes and cycles of one device, and who said so."""
    import jax

    from jaxgpt.planning.topology import tpu_compiler_version

    versions = {"jax": jax.__version__, "libtpu": tpu_compiler_version()}
    return {"fits": row.fits, "total_bytes": row.total_bytes, "cycles": row.cycles, **versions}


def read_bounds(file: Path) -> dict[str, dict]:
    """{"v5e-8": bound, ...}"""
    try:
        bounds = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--gate {file}: no such file; write it with --record {file}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--gate {file}: not a file that --record wrote ({error})") from None
    if not (
        isinstance(bounds, dict) and bounds and all(isinstance(b, dict) and "cycles" in b for b in bounds.values())
    ):
        raise UserError(f"--gate {file}: not a file that --record wrote")
    return bounds


def check_bounds(file: Path, bounds: dict[str, dict], rows: Sequence) -> None:
    """Raises:
    RunFailed: a row does not fit, or takes more cycles than its bound and the tolerance; names both numbers.
    """
    broken = []
    for row in rows:
        bound = bounds.get(row.where.name)
        if bound is None:
            raise UserError(f"--gate {file} has no bound for {row.where.name}; it has {', '.join(bounds)}")
        if not row.fits:
            broken.append(f"{row.where.name} no longer fits")
        elif bound["cycles"] and row.cycles > bound["cycles"] * (1 + TOLERANCE):
            now, before = row.cycles / 1e6, bound["cycles"] / 1e6
            broken.append(f"{row.where.name} takes {now:.1f} M cycles, {before:.1f} M were recorded")
    if broken:
        raise RunFailed(f"gate {file}: {'; '.join(broken)}")
    print(f"gate {file}: holds")


def write(file: Path, text: str) -> None:
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error})") from None
    print(f"written: {file}")


if __name__ == "__main__":
    sys.exit(main())
