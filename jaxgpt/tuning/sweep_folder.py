"""The folder of a sweep: what was asked, a line for each trial, and the best settings as a config file.

A line is on disk before the next trial begins, so that a sweep which is killed repeats no finished trial.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from jaxgpt.config import Config, flatten, load_config, read_json, to_json
from jaxgpt.errors import UserError
from jaxgpt.storage.files import append_json, fsync, write_file
from jaxgpt.tuning.config_file import to_toml
from jaxgpt.tuning.space import Point, Space

TRIALS, ASKED, CONFIG, BEST, REPORT = "trials.jsonl", "sweep.json", "config.json", "best.toml", "report.html"
FINISHED, PAUSED, DIVERGED = "finished", "paused", "diverged"

# Where a trial runs and how it is watched, not what it computes: may differ when a sweep goes on.
_FREE_SECTIONS = ("log", "checkpoint")
_FREE = ("data.verify", "data.num_proc")


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """The settings of a trial and how far it has come."""

    number: int
    settings: Point
    step: int
    status: str
    """FINISHED, PAUSED (at a rung of successive halving) or DIVERGED (a bad step ended it, by faults.on_bad_step)."""
    eval_loss: float | None
    """Nats per token at `step`; None where it diverged."""
    losses: list[list[float]]
    """[[step, mean training loss since the last point], ...]"""
    eval_losses: list[list[float]]
    """[[step, validation loss], ...]"""
    parameters: int
    tokens: int
    seconds: float
    """Wall time of all its starts, but for compilation before the last one."""

    @property
    def loss(self) -> float:
        """`eval_loss` to compare by: infinite where the trial diverged."""
        if self.status == DIVERGED or self.eval_loss is None or not math.isfinite(self.eval_loss):
            return math.inf
        return self.eval_loss


class Records:
    """The lines of trials.jsonl, in memory and on disk."""

    def __init__(self, folder: Path):
        """Read what is there; a torn last line is cut off. Raises UserError for a line that `add` did not write."""
        self._file = folder / TRIALS
        self._lines: list[TrialRecord] = []
        if not self._file.exists():
            return
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self._file, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._lines.append(TrialRecord(**json.loads(line)))
            except (ValueError, TypeError):
                raise UserError(
                    f"{self._file}:{number}: not a line that a sweep wrote; remove it, or choose another --workdir"
                ) from None

    def add(self, record: TrialRecord) -> None:
        """Append a line; it is on disk when this returns."""
        is_new = not self._file.exists()
        append_json(self._file, dataclasses.asdict(record))
        if is_new:
            fsync(self._file.parent)
        self._lines.append(record)

    def at(self, number: int, step: int) -> TrialRecord | None:
        """The record of a trial at a step; one that diverged before it stands for all later steps, too."""
        lines = [line for line in self._lines if line.number == number]
        return next((line for line in lines if line.step == step or line.status == DIVERGED), None)

    def latest(self) -> list[TrialRecord]:
        """The last line of every trial, by number."""
        last = {line.number: line for line in self._lines}
        return [last[number] for number in sorted(last)]

    def ended(self) -> dict[int, TrialRecord]:
        """{number: record} of trials that will not go on: finished, or diverged."""
        return {line.number: line for line in self._lines if line.status != PAUSED}

    def ranking(self) -> list[TrialRecord]:
        """All trials, the best first: those that finished, those that were stopped early, those that diverged."""
        order = {FINISHED: 0, PAUSED: 1, DIVERGED: 2}
        return sorted(self.latest(), key=lambda line: (order[line.status], -line.step, line.loss, line.number))


def start(folder: Path, asked: dict, config: Config) -> None:
    """Make `folder` that of this sweep."""
    write_file(folder / CONFIG, to_json(config))
    write_file(folder / ASKED, json.dumps(asked, indent=2))


def earlier(folder: Path) -> dict:
    """The request of the sweep in `folder`; {} for a new folder. Raises UserError where it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir {folder} is a file, not a folder")
    if not (folder / ASKED).exists():
        if (folder / TRIALS).exists() or (folder / "checkpoints").exists():
            raise UserError(f"{folder} is no folder of a sweep (it has no {ASKED}); choose another --workdir")
        return {}
    try:
        return dict(json.loads((folder / ASKED).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / ASKED}: not what a sweep wrote ({error}); choose another --workdir") from None


def check_same(folder: Path, before: dict, asked: dict, config: Config) -> None:
    """Raise a UserError that names all that differs, with both values, where `folder` holds another sweep. The number
    of trials may grow, see search.py."""
    differ = {key: (before.get(key), asked[key]) for key in asked if key != "trials" and before.get(key) != asked[key]}
    if asked["method"] == "halving" and before.get("trials") != asked["trials"]:  # its rungs follow from the number
        differ["trials"] = (before.get("trials"), asked["trials"])
    old = flatten(read_json(folder / CONFIG))
    for key, value in flatten(config).items():
        if old[key] != value and key not in _FREE and key.split(".")[0] not in _FREE_SECTIONS:
            differ[key] = (old[key], value)
    if differ:
        short = lambda value: " ".join(map("=".join, value.items())) if isinstance(value, Mapping) else value
        listed = ", ".join(f"{key} was {short(was)}, now {short(now)}" for key, (was, now) in differ.items())
        raise UserError(f"{folder} holds another sweep: {listed}; set back what differs or choose another --workdir")


def train_command(file: Path) -> str:
    """The command that trains with a best.toml."""
    return f"python -m jaxgpt.train --config {file} --workdir {file.parent}-best"


def write_best(folder: Path, space: Space, record: TrialRecord) -> Path:
    """Write best.toml: the settings of a trial as a config file on top of the sweep's own."""
    file = folder / BEST
    before = flatten(load_config(space.file))
    changed = {key: value for key, value in flatten(space.config(record.settings)).items() if before[key] != value}
    base = Path(os.path.relpath(Path(space.file).resolve(), folder.resolve())).as_posix()
    loss = f"validation loss {record.eval_loss:.4f} nats per token at step {record.step:,}."
    header = [f"The best of a sweep: trial {record.number}, {loss}", f"  {train_command(file)}"]
    write_file(file, to_toml(changed, header, base))
    return file
