"""What a long run costs beside its steps: memory, files and threads over 20,000 steps, and saving in the background.

    python benchmarks/endurance.py            both parts, about 12 minutes on two cores
    python benchmarks/endurance.py --steps 2000 --saves 2

Part 1 looks at the process from outside while it trains: resident memory, open files, threads. The slope is that of
the least-squares line over the second half of the steps. Part 2 trains the same steps with a checkpoint every 50 of
them and with none, in turns, and compares the medians of the step times.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
BIG = ["--model.n_embd", "256", "--model.n_layer", "4"]  # 3.2M parameters, 38 MB a checkpoint: saving is real work


def command(workdir: Path, steps: int, *options: str) -> list[str]:
    common = ["--config", str(ROOT / "configs/drill.toml"), "--workdir", str(workdir), "--train.max_steps", str(steps)]
    common += ["--eval.eval_steps", str(steps), "--checkpoint.keep_best", "false", "--optimizer.min_lr_rate", "1"]
    return [sys.executable, "-m", "jaxgpt.train", *common, *options]


def look(pid: int) -> dict[str, float]:
    """Resident memory in MB, open files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    if "VmRSS" not in status:
        raise ProcessLookupError(f"process {pid} has ended")
    find = lambda name: int(re.search(rf"{name}:\s+(\d+)", status)[1])
    return {"mb": find("VmRSS") / 1024, "threads": find("Threads"), "files": len(os.listdir(f"/proc/{pid}/fd"))}


def endurance(folder: Path, steps: int) -> None:
    run = folder / "long"
    process = subprocess.Popen(
        command(run, steps, "--checkpoint.save_steps", "500", "--log.logging_steps", "20"), stdout=subprocess.DEVNULL
    )
    seen = []
    while process.poll() is None:
        time.sleep(0.5)
        try:
            *_, last = (run / "metrics.jsonl").read_bytes().splitlines()
            seen.append((json.loads(last)["step"], look(process.pid)))
        except (OSError, ValueError):  # not there yet, or just ended
            continue
    assert process.returncode == 0
    late = [(step, facts) for step, facts in seen if steps // 2 <= step < steps]
    slope = np.polyfit([step / 1000 for step, _ in late], [facts["mb"] for _, facts in late], 1)[0]
    print(f"{steps} steps, a checkpoint every 500: {len(late)} looks at the second half")
    for name in ("mb", "threads", "files"):
        values = [facts[name] for _, facts in late]
        print(f"  {name:<8} {min(values):8.1f} to {max(values):8.1f}, median {statistics.median(values):.1f}")
    print(f"  memory slope {slope:+.3f} MB per 1,000 steps")


def step_times(run: Path, skip: int = 20) -> tuple[list[float], list[float]]:
    """(seconds of each step but the first ones, seconds that the loop was blocked by each save)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    lines = [line for line in lines if "seconds_total" in line and line["step"] > skip]
    return [line["seconds_total"] for line in lines], [line["seconds_save"] for line in lines if line["seconds_save"]]


def saving(folder: Path, rounds: int, steps: int = 400) -> None:
    times: dict[str, list[float]] = {"50": [], str(steps): []}
    blocked = []
    for number in range(rounds):
        for every in times:
            run = folder / f"save-{every}-{number}"
            options = ["--checkpoint.save_steps", every, "--log.logging_steps", "1", *BIG]
            subprocess.run(command(run, steps, *options), stdout=subprocess.DEVNULL, check=True)
            seconds, saves = step_times(run)
            # Of ten steps each, so that the steps during which the background writes are weighed as they come.
            times[every] += [sum(seconds[i : i + 50]) / 50 for i in range(0, len(seconds) - 49, 50)]
            blocked += saves if every == "50" else []
    with_saves, without = (statistics.median(values) for values in times.values())
    size = sum(file.stat().st_size for file in (folder / f"save-50-0/checkpoints/{steps}").rglob("*") if file.is_file())
    print(f"a checkpoint of {size / 1e6:.0f} MB every 50 steps, {rounds} x {steps} steps each, in turns:")
    print(f"  step {1000 * with_saves:.2f} ms with, {1000 * without:.2f} ms without: {with_saves / without - 1:+.1%}")
    print(f"  blocked by a save: median {1000 * statistics.median(blocked):.1f} ms, most {1000 * max(blocked):.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="of part 1; 0 leaves it out")
    parser.add_argument("--saves", type=int, default=3, help="rounds of part 2; 0 leaves it out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.steps:
            endurance(Path(folder), arguments.steps)
        if arguments.saves:
            saving(Path(folder), arguments.saves)


if __name__ == "__main__":
    main()
