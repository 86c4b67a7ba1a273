"""A sweep of 12 learning rates and 12 runs of `train`: seconds from the command to the end, and CPU seconds.

    python benchmarks/sweep.py                                   # configs/drill.toml
    python benchmarks/sweep.py --config C --rounds 3 --train.max_steps 100

The data is prepared before. In each round both begin with an empty compilation cache and keep it, so the second of the
12 runs finds compiled what the first has compiled. The rounds alternate.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train_step import machine

TRIALS = 12
LOWEST, HIGHEST = 1e-4, 1e-1


def seconds(*command: str, cache: Path | None = None) -> tuple[float, float]:
    """(wall, CPU) seconds of a verb in a process of its own. CPU seconds compare on a busy machine, too.

    `cache` is the folder of compiled programs; without one, nothing is kept.
    """
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL, env=os.environ | kept)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu


def rates() -> list[float]:
    step = (HIGHEST / LOWEST) ** (1 / (TRIALS - 1))
    return [LOWEST * step**number for number in range(TRIALS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/drill.toml")
    parser.add_argument("--rounds", type=int, default=2)
    arguments, settings = parser.parse_known_args()
    common = ["--config", arguments.config, *settings]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        common += ["--data.prepared_dir", str(folder / "prepared")]
        seconds("jaxgpt.prepare", *common)
        found = {"sweep": [], "runs": []}
        for number in range(arguments.rounds):
            place = folder / str(number)
            varied = "optimizer.learning_rate=" + ",".join(f"{rate:g}" for rate in rates())
            sweep = ["jaxgpt.sweep", *common, "--vary", varied, "--workdir", str(place / "sweep")]
            took, cpu = seconds(*sweep, cache=place / "cache-sweep")
            found["sweep"].append(took)
            each = [
                seconds("jaxgpt.train", *common, "--workdir", str(place / f"run{index}"),
                        "--optimizer.learning_rate", f"{rate:g}", cache=place / "cache-runs")
                for index, rate in enumerate(rates())
            ]  # fmt: skip
            each, cpu_each = zip(*each)
            found["runs"].append(sum(each))
            losses = _losses(place)
            apart = sorted(abs(one - other) for one, other in losses)
            best = abs(min(one for one, _ in losses) - min(other for _, other in losses))
            print(
                f"round {number}: sweep {took:.1f} s, {TRIALS} runs {sum(each):.1f} s ({each[0]:.1f}, then "
                f"{statistics.median(each[1:]):.1f} each); ratio {took / sum(each):.3f}; "
                f"CPU seconds {cpu:.1f} and {sum(cpu_each):.1f}, ratio {cpu / sum(cpu_each):.3f}; "
                f"differences of the final losses: best trial {best:.1e}, median {statistics.median(apart):.1e}, "
                f"largest {apart[-1]:.1e}",
                flush=True,
            )
            shutil.rmtree(place)
    best = {name: min(values) for name, values in found.items()}
    print(f"{machine()}\nbest of {arguments.rounds}: {best['sweep']:.1f} s against {best['runs']:.1f} s, "
          f"ratio {best['sweep'] / best['runs']:.3f}")  # fmt: skip


def _losses(place: Path) -> list[tuple[float, float]]:
    """(final validation loss of the trial, that of the run) of each rate."""
    lines = [json.loads(line) for line in (place / "sweep" / "trials.jsonl").read_text().splitlines()]
    trials = {line["number"]: line["eval_loss"] for line in lines}
    runs = []
    for number in range(TRIALS):
        records = map(json.loads, (place / f"run{number}" / "metrics.jsonl").read_text().splitlines())
        runs.append([record["eval_loss"] for record in records if "eval_loss" in record][-1])
    return [(trials[number], runs[number]) for number in range(TRIALS)]


if __name__ == "__main__":
    main()
