"""Seconds from the command to the end of its first training step, and where they go; with and without a warm cache.

    python benchmarks/startup.py                                      # the quickstart
    python benchmarks/startup.py --config configs/gpt2_124m.toml --rounds 3

Each round is `train` in a fresh process that ends after its first step. The dataset is prepared before the first
round. Round 0 compiles into an empty compilation cache, the others find it filled.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PHASES = {  # a phase ends when this function of the package is called
    "python and jax": None,
    "package": "check_workdir",
    "data": "build_program",
    "program": "initial_state",
    "initial values": "fit",
    "first step": "skip_compilation",
}


def child(started: float, config: str, workdir: str, overrides: list[str]) -> None:
    """`train` with a clock at the borders of its phases; prints them as JSON after the first step and ends."""
    marks = {}

    def mark(owner, name: str, after: bool = False) -> None:
        original = getattr(owner, name)

        def timed(*arguments, **keywords):
            if not after:
                marks.setdefault(name, time.time() - started)
            result = original(*arguments, **keywords)
            if after:
                marks[name] = time.time() - started
                print("\n" + json.dumps(marks), flush=True)
                os._exit(0)
            return result

        setattr(owner, name, timed)

    from jaxgpt.parallel.accelerator import keep_freed_memory

    keep_freed_memory()  # as `train` does, before jax
    import jax  # noqa: F401

    marks["jax"] = time.time() - started
    from jaxgpt import train
    from jaxgpt.training import loop, resume, run, start

    mark(resume, "check_workdir")
    mark(start, "build_program")
    mark(resume, "initial_state")
    mark(run, "fit")
    mark(loop.Meter, "skip_compilation", after=True)
    sys.exit(train.main(["--config", config, "--workdir", workdir, *overrides]))


def once(config: str, cache: Path, folder: Path, overrides: list[str]) -> dict[str, float]:
    """Seconds of each phase of one start, and "whole"."""
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        settings = ["--eval.eval_steps", "1000000", "--checkpoint.save_steps", "1000000", *overrides]
        command = [sys.executable, __file__, "--child", str(time.time()), "--config", config, "--workdir", workdir]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        done = subprocess.run([*command, *settings], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    marks = json.loads(done.stdout.splitlines()[-1])
    ends = [marks[function or "jax"] for function in PHASES.values()]
    seconds = [end - begin for begin, end in zip([0.0, *ends], ends)]
    return dict(zip(PHASES, seconds)) | {"whole": ends[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", type=float, metavar="STARTED", help=argparse.SUPPRESS)
    parser.add_argument("--workdir", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.child:
        child(arguments.child, arguments.config, arguments.workdir, overrides)
    from train_step import machine

    prepare = [sys.executable, "-m", "jaxgpt.prepare", "--config", arguments.config, *overrides]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}; Python {sys.version.split()[0]}\n")
    print("| cache | " + " | ".join([*PHASES, "whole"]) + " |\n|" + "---|" * (len(PHASES) + 2))
    with tempfile.TemporaryDirectory() as folder:
        rounds = []
        for number in range(arguments.rounds + 1):
            seconds = once(arguments.config, Path(folder) / "cache", Path(folder), overrides)
            rounds.append(seconds)
            label = f"warm {number}" if number else "empty"
            print(f"| {label} | " + " | ".join(f"{value:.2f}" for value in seconds.values()) + " |", flush=True)
    median = {phase: statistics.median(seconds[phase] for seconds in rounds[1:]) for phase in rounds[0]}
    print("| **warm, median** | " + " | ".join(f"{value:.2f}" for value in median.values()) + " |")


if __name__ == "__main__":
    main()
