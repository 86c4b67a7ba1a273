"""Kill a run again and again, and compare each run that reaches its end with an undisturbed one.

Every run is a real process, `python -m jaxgpt.train`. On the same devices the state, the loss of every step and the
hash of every batch have to be equal to the last bit.
"""

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxgpt.config import Config
from jaxgpt.errors import EXIT_DONE, EXIT_RESUME, RunFailed
from jaxgpt.failpoints import POINTS
from jaxgpt.training.checkpoint import FOLDER, finished_steps, quiet_orbax, read_config
from jaxgpt.training.metrics import METRICS_FILE, read_metrics

TIMED = ("tokens_per_second", "mfu")  # these and seconds_* depend on the clock
TERM_SECONDS = 10.0  # a run must end this long after SIGTERM
START_SECONDS = 3600.0  # a start that has not ended by then hangs
RESUMING = ("clean.", "verify.", "restore.")  # prefixes of points that only a run with checkpoints passes
REPEATED = ("save.", "delete.")  # prefixes of points that it passes at every checkpoint


@dataclass(frozen=True)
class DrillPlan:
    """The run to kill, and how often."""

    config_file: str
    config: Config
    overrides: dict[str, str]  # {"train.max_steps": "40"}: the settings given on the command line
    workdir: Path  # for the runs and their log; empty at the start
    kills: int  # at random instants
    points: int  # kills at each named point
    seed: int
    devices: Sequence[int] = ()  # CPU devices of one start after another; empty leaves them as they are


@dataclass
class DrillReport:
    """The figures of a drill."""

    undisturbed_seconds: float = 0.0
    kills: int = 0
    terms: int = 0
    at_points: dict[str, int] = field(default_factory=dict)  # kills at each named point
    damaged: int = 0  # checkpoints in which a bit was flipped
    finished: int = 0  # runs that reached their end and were compared
    steps_lost: list[int] = field(default_factory=list)  # that each kill made the run repeat
    seconds_to_step: list[float] = field(default_factory=list)  # from each start to its first new step
    term_seconds: list[float] = field(default_factory=list)  # from SIGTERM to the end of the process
    failures: list[str] = field(default_factory=list)  # what differed or failed; empty when all is well


class Drill:
    """One drill: `run` does it."""

    def __init__(self, plan: DrillPlan):
        self._asked = plan
        self._workdir = plan.workdir
        self._run, self._log = plan.workdir / "disturbed", plan.workdir / "log.txt"
        self._random = random.Random(plan.seed)
        self._report = DrillReport()
        self._starts = 0

    def run(self) -> DrillReport:
        """The undisturbed run, then the kills.

        Raises:
            RunFailed: the undisturbed run did not reach its end.
        """
        self._workdir.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        process = self._start("undisturbed")
        if (code := process.wait()) != 0:
            raise RunFailed(f"the undisturbed run ended with exit code {code}; see {self._log}")
        self._report.undisturbed_seconds = time.monotonic() - began
        for kill in self._plan():
            print(f"{self._report.kills + self._report.terms + 1}: {kill or 'random instant'}", flush=True)
            self._disturb(kill)
        self._finish()
        return self._report

    def _plan(self) -> Iterator[str]:
        """Failpoints, and "" for a random instant, in a mixed order."""
        kills = [""] * self._asked.kills + [point for point in POINTS for _ in range(self._asked.points)]
        self._random.shuffle(kills)
        yield from kills

    def _start(self, name: str, failpoint: str = "") -> subprocess.Popen:
        environment = {**os.environ, "JAXGPT_FAILPOINT": failpoint}
        settings = {"log.logging_steps": "1", "log.tensorboard": "false", **self._asked.overrides}
        if all_devices := self._asked.devices:
            devices = all_devices[self._starts % len(all_devices)] if name == "disturbed" else all_devices[0]
            flags = os.environ.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
            settings["train.per_device_train_batch_size"] = str(self._asked.config.global_batch_size // devices)
        self._starts += 1
        command = [sys.executable, "-m", "jaxgpt.train", "--config", self._asked.config_file]
        command += ["--workdir", str(self._workdir / name)]
        for setting, value in settings.items():
            command += [f"--{setting}", value]
        with open(self._log, "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def _disturb(self, point: str) -> None:
        """Start the run, kill it, and count the lost steps. A run that ends first is compared and started anew."""
        if point.startswith(RESUMING):
            self._have_checkpoints(2)
        if point == "verify.damaged":
            self._damage_the_latest()
        times = self._random.randint(1, 3) if point.startswith(REPEATED) else 1
        before = last_step(self._run)
        process = self._start("disturbed", f"{point}:kill@{times}" if point else "")
        started = time.monotonic()
        instant = started + self._random.uniform(0, 1.2 * self._report.undisturbed_seconds)
        seen = False
        while process.poll() is None and (point or time.monotonic() < instant):
            if not seen and last_step(self._run, after=started) > 0:
                seen = True
                self._report.seconds_to_step.append(time.monotonic() - started)
            if time.monotonic() - started > START_SECONDS:
                process.kill()
                self._fail(f"start {self._starts}: not at its end after {START_SECONDS:.0f} s")
            time.sleep(0.02)
        ended = process.poll()
        if ended == 0:
            self._compare()
            return self._disturb(point)
        if ended is None:
            self._kill(process)
        elif ended == -signal.SIGKILL and point:
            self._report.at_points[point] = self._report.at_points.get(point, 0) + 1
            self._report.kills += 1
        else:
            self._fail(f"start {self._starts} ended by itself with exit code {ended}; see {self._log}")
        done = max(before, last_step(self._run))
        self._report.steps_lost.append(max(done - self._kept_step(), 0))

    def _have_checkpoints(self, number: int) -> None:
        """Run until there are `number` checkpoints, then kill it."""
        while len(finished_steps(self._run)) < number:
            process = self._start("disturbed")
            while process.poll() is None and len(finished_steps(self._run)) < number:
                time.sleep(0.01)
            process.kill()
            if process.wait() == 0:
                self._compare()

    def _damage_the_latest(self) -> None:
        """Flip one bit of the newest checkpoint."""
        folder = self._run / "checkpoints" / str(self._kept_step())
        files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
        file = self._random.choice(files)
        content = bytearray(file.read_bytes())
        content[self._random.randrange(len(content))] ^= 1 << self._random.randrange(8)
        file.write_bytes(content)
        self._report.damaged += 1

    def _kill(self, process: subprocess.Popen) -> None:
        is_term = (self._report.kills + self._report.terms) % 4 == 3
        if not is_term:
            process.kill()
            process.wait()
            self._report.kills += 1
            return
        sent = time.monotonic()
        process.terminate()
        try:
            code = process.wait(6 * TERM_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        self._report.terms += 1
        self._report.term_seconds.append(time.monotonic() - sent)
        # Python itself has no handler yet in the first hundredths of a second; after its last step the run is done.
        if code not in (EXIT_RESUME, EXIT_DONE, -signal.SIGTERM):
            self._fail(f"SIGTERM ended start {self._starts} with exit code {code}; see {self._log}")
        if self._report.term_seconds[-1] > TERM_SECONDS:
            self._fail(f"SIGTERM took {self._report.term_seconds[-1]:.1f} s")

    def _kept_step(self) -> int:
        """The newest checkpoint that a start would use, before the next start cleans up."""
        return max(finished_steps(self._run), default=0)

    def _finish(self) -> None:
        for _ in range(3):
            if (code := self._start("disturbed").wait()) == 0:
                return self._compare()
            self._fail(f"an undisturbed start ended with exit code {code}; see {self._log}")

    def _compare(self) -> None:
        """Hold a finished run beside the undisturbed one; then it is removed, to be killed from its beginning again."""
        ours, whole = self._run, self._workdir / "undisturbed"
        exact = len(set(self._asked.devices)) <= 1
        for difference in compare_records(ours, whole, exact) + (compare_states(ours, whole) if exact else []):
            self._fail(difference)
        left = [*ours.glob("checkpoints/.*"), *ours.glob("*.tmp")]
        if not self._report.damaged:
            left += ours.glob("quarantine/*")
        if left:
            self._fail(f"left behind: {', '.join(str(path) for path in left)}")
        interval = read_config(ours).save_steps
        worst = max(self._report.steps_lost, default=0)
        if worst > 2 * interval:  # one interval, and the save that was still being written
            self._fail(f"{worst} steps lost at once, more than one interval of {interval} and an unfinished save")
        self._report.finished += 1
        if self._report.failures:
            shutil.copytree(ours, self._workdir / f"failed-{self._report.finished}", dirs_exist_ok=True)
        shutil.rmtree(ours)

    def _fail(self, text: str) -> None:
        self._report.failures.append(text)
        print(f"FAILED: {text}", flush=True)


def last_step(run: Path, after: float | None = None) -> int:
    """The last step in the record; 0 where there is none, or none written since `after` (monotonic seconds)."""
    file = run / METRICS_FILE
    if not file.is_file() or (after is not None and file.stat().st_mtime < time.time() - (time.monotonic() - after)):
        return 0
    return max((line["step"] for line in read_metrics(run)), default=0)


def record(run: Path) -> dict[tuple[int, str], dict]:
    """The lines of metrics.jsonl by step and kind, without what the clock decides."""
    without_clock = lambda line: {k: v for k, v in line.items() if k not in TIMED and not k.startswith("seconds_")}
    kind = lambda line: "evaluation" if "eval_loss" in line else "step"
    return {(line["step"], kind(line)): without_clock(line) for line in read_metrics(run)}


def compare_records(ours: Path, whole: Path, exact: bool) -> list[str]:
    """Differences between two runs' lines; where not `exact`, of batches, and of losses beyond 1e-4 of their value."""
    mine, theirs = record(ours), record(whole)
    found = [f"step {step}: the line of the {kind} is missing" for step, kind in theirs.keys() - mine.keys()]
    found += [f"step {step}: one line of the {kind} too many" for step, kind in mine.keys() - theirs.keys()]
    for key in sorted(mine.keys() & theirs.keys()):
        a, b = mine[key], theirs[key]
        near = (abs(a[name] - b[name]) <= 1e-4 * abs(b[name]) for name in ("loss", "eval_loss") if name in b)
        same = a == b if exact else a.get("batch_hash") == b.get("batch_hash") and all(near)
        if not same:
            found.append(f"step {key[0]}: {a} instead of {b}")
    return found[:5]


def compare_states(ours: Path, whole: Path) -> list[str]:
    """Differences in the bits of the last checkpoints' arrays."""
    quiet_orbax()
    # The last ones: a SIGTERM leaves checkpoints at steps of its own, so those before may be other steps.
    mine, theirs = finished_steps(ours)[-1:], finished_steps(whole)[-1:]
    if mine != theirs or not mine:
        return [f"last checkpoint {mine} instead of {theirs}"]
    found = []
    for item in ("params", "optimizer"):
        # The warning says that it restores onto the devices that saved.
        with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings(action="ignore"):
            a, b = (checkpointer.restore((run / FOLDER / str(mine[-1]) / item).absolute()) for run in (ours, whole))
        for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
            if np.asarray(left).tobytes() != np.asarray(right).tobytes():
                found.append(f"{item}{jax.tree_util.keystr(path)} differs")
    return found[:5]


def table(report: DrillReport) -> str:
    """The figures for a terminal, with the first failures."""
    middle = lambda values: f"{statistics.median(values):.1f}" if values else "–"
    most = lambda values: f"{max(values):.1f}" if values else "–"
    rows = [
        ("kills survived", f"{report.kills} SIGKILL, {report.terms} SIGTERM"),
        ("  of them at named points", ", ".join(f"{k} x{n}" for k, n in sorted(report.at_points.items())) or "none"),
        ("bits flipped in checkpoints", f"{report.damaged}, all found" if report.damaged else "none"),
        ("finished and compared", f"{report.finished} times"),
        ("steps lost by a kill", f"median {middle(report.steps_lost)}, most {most(report.steps_lost)}"),
        ("seconds to the first step again", f"{middle(report.seconds_to_step)}, most {most(report.seconds_to_step)}"),
        ("seconds from SIGTERM to the end", f"{middle(report.term_seconds)}, most {most(report.term_seconds)}"),
        ("state, losses, batches", "as undisturbed" if not report.failures else f"{len(report.failures)} FAILURES"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows) + "".join(
        f"\n  {failure}" for failure in report.failures[:10]
    )
