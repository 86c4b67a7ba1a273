"""GPT-2's four sizes in the TPU compiler's hands: memory, cycles and estimated MFU, as a Markdown table.

    python benchmarks/tpu_plan.py [--only 124M:v5e-8] [--cache ~/.cache/jaxgpt/xla/plan]

No TPU is needed (pip install -e '.[plan]', x86-64 Linux). T = 1024 and 524,288 tokens a step. Rows are printed as
they finish; compiled programs are kept in the cache, so a run that was stopped goes on where it was.

MFU here is model FLOPs (6 N + causal attention, recomputation not counted) over the time of the compiler's cycles,
the attention kernels and the exposed collectives, before calibration; the calibration is printed below.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import jax

from jaxgpt.config import Config
from jaxgpt.model.sizes import GPT2_VOCAB, PUBLISHED
from jaxgpt.parallel.chips import CHIPS
from jaxgpt.planning.compile import compile_step
from jaxgpt.planning.plan_search import own_candidate
from jaxgpt.planning.plan_table import calibration_lines
from jaxgpt.planning.topology import parse_slice
from jaxgpt.planning.verdict import Verdict, judge, read_prices
from jaxgpt.settings import MeshConfig, ModelConfig, OptimizerConfig, TrainConfig

GLOBAL_BATCH = 512  # x 1024 = 524,288 tokens


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of the table: the settings that were found best for a model on a slice."""

    size: str
    slice: str
    rows: int
    """Sequences of a micro-batch on one device."""
    fsdp: int = 1
    remat: str = "none"
    scan: bool = False
    mu_dtype: str = "float32"
    n_head: int | None = None
    """None: as published."""
    note: str = ""


SCANNED = dict(remat="block", scan=True)
RUNS = (
    Run("124M", "v5e-8", rows=16),
    Run("124M", "v5e-8", rows=16, n_head=6, note="6 heads of 128"),
    Run("1.5B", "v5e-8", rows=16, fsdp=8, **SCANNED),
    Run("124M", "v6e-8", rows=32),
    Run("124M", "v5e-1", rows=16),
    Run("355M", "v5e-8", rows=16, **SCANNED),
    Run("774M", "v5e-8", rows=16, fsdp=8, **SCANNED),
    Run("355M", "v6e-8", rows=16, **SCANNED),
    Run("774M", "v6e-8", rows=16, fsdp=8, **SCANNED),
    Run("1.5B", "v6e-8", rows=16, fsdp=8, **SCANNED),
    Run("124M", "v5p:2x2x2", rows=64),
    Run("355M", "v5p:2x2x2", rows=32, **SCANNED),
    Run("774M", "v5p:2x2x2", rows=32, **SCANNED),
    Run("1.5B", "v5p:2x2x2", rows=16, fsdp=8, **SCANNED),
    Run("124M", "v5e-256", rows=2),
    Run("1.5B", "v5e-256", rows=2, fsdp=16, **SCANNED),
)

COLUMNS = (
    "model", "slice", "settings", "HBM GiB", "Mcycles", "kernels", "exposed collectives ms", "step ms", "MFU",
    "tokens/s", "compile s",
)  # fmt: skip


def config_of(run: Run) -> Config:
    shape = PUBLISHED[run.size][0] | ({"n_head": run.n_head} if run.n_head else {})
    return Config(
        model=ModelConfig(**shape, remat=run.remat, scan_layers=run.scan),
        optimizer=OptimizerConfig(adam_mu_dtype=run.mu_dtype),
        train=TrainConfig(max_steps=10_000, global_batch_size=GLOBAL_BATCH, per_device_train_batch_size=run.rows),
        mesh=MeshConfig(fsdp=run.fsdp),
    )


def verdict_of(run: Run, cache: Path) -> Verdict:
    where = parse_slice(run.slice)
    candidate = own_candidate(config_of(run), GPT2_VOCAB, where)
    step = compile_step(candidate.config, GPT2_VOCAB, where, cache)
    return judge(dataclasses.replace(candidate, own=False), step, GPT2_VOCAB, read_prices())


def line(run: Run, row: Verdict) -> str:
    settings = row.candidate.label + (", bf16 mu" if run.mu_dtype == "bfloat16" else "")
    settings += f"; {run.note}" if run.note else ""
    memory = f"{row.total_bytes / 2**30:.2f} of {row.limit_bytes / 2**30:.2f}"
    if not row.fits:
        why = row.problem or "does not fit"
        cells = [run.size, run.slice, settings, memory, why, "", "", "", "", "", f"{row.compile_seconds:.0f}"]
    else:
        clock, seconds = CHIPS[row.where.family].clock_hz, row.parts.seconds
        cells = [
            run.size,
            run.slice,
            settings,
            memory,
            f"{row.parts.compute_seconds * clock / 1e6:.1f}",
            f"{row.parts.kernel_seconds * clock / 1e6:.1f}" + ("+?" if row.parts.kernels_without_cycles else ""),
            f"{1e3 * row.parts.collective_seconds_exposed:.1f}",
            f"{1e3 * seconds:.0f}",
            f"{row.mfu(seconds):.1%}",
            f"{row.tokens / seconds:,.0f}",
            f"{row.compile_seconds:.0f}",
        ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="MODEL:SLICE", action="append", help="only this row; may be repeated")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/jaxgpt/xla/plan"))
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    started = time.perf_counter()
    for run in RUNS:
        if not arguments.only or f"{run.size}:{run.slice}" in arguments.only:
            print(line(run, verdict_of(run, arguments.cache.expanduser())), flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s in all. " + " ".join(calibration_lines()))


if __name__ == "__main__":
    main()
