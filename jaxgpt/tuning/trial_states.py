"""The states of trials that are not finished, on disk, as the checkpoints of a run are: those of a group together.

    states/GROUP/checkpoints/STEP/

A trial is found by its number, whichever group it ran in: the survivors of a round go on in another one.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxgpt.settings import CheckpointConfig
from jaxgpt.training.checkpoint import Checkpoints, finished_steps, read_metadata
from jaxgpt.training.step import TrainState

KEPT = CheckpointConfig(save_total_limit=1, keep_best=False)


@dataclasses.dataclass
class Progress:
    """How far a group of trials is, and what it has seen; the lists have an entry for each trial."""

    step: int
    losses: list[list[list[float]]]
    """[step, mean training loss since the point before], of each trial."""
    eval_losses: list[list[list[float]]]
    """[step, loss], of each trial."""
    diverged: list[bool]
    since: list[list[float]]
    """Loss sums, counts and bad steps in a row, of each trial, since the last point of `losses`."""
    seconds: float = 0.0
    """Of each, as its share."""

    @classmethod
    def of(cls, trials: int) -> "Progress":
        """At the beginning."""
        each = lambda: [[] for _ in range(trials)]
        return cls(0, each(), each(), [False] * trials, [[0.0] * trials, [0.0] * trials, [0] * trials])

    def chosen(self, places: Sequence[int]) -> "Progress":
        """Of these trials alone, in this order."""
        pick = lambda values: [values[place] for place in places]
        return dataclasses.replace(
            self,
            losses=pick(self.losses),
            eval_losses=pick(self.eval_losses),
            diverged=pick(self.diverged),
            since=[pick(values) for values in self.since],
        )


class States:
    def __init__(self, folder: Path):
        self._folder = folder
        self._forgotten: set[int] = set()

    def steps(self) -> dict[int, int]:
        """{number of a trial: steps done} of all that are on disk."""
        return {number: group.step for number, group in self._groups().items()}

    def save(self, numbers: list[int], states: TrainState, progress: Progress) -> None:
        """Write the states of these trials; returns when they are on disk, and older ones of theirs are gone.

        Raises:
            StorageFailed: they cannot be written.
        """
        name = hashlib.sha256(repr(numbers).encode()).hexdigest()[:12]
        checkpoints = Checkpoints(self._folder / name, KEPT)
        try:
            metadata = {"numbers": numbers, "count": _count(states), "progress": dataclasses.asdict(progress)}
            checkpoints.save(progress.step, states, metadata, None, surely=True)
        finally:
            checkpoints.close()
        self._drop_what_nobody_needs()

    def restore(self, numbers: list[int], abstract: TrainState) -> tuple[TrainState, Progress] | None:
        """The states of these trials, laid out as `abstract`, which may hold more: those repeat the last one.

        None where one of them has no state. All are at the same step.
        """
        known = self._groups()
        if not all(number in known for number in numbers):
            return None
        groups = {number: known[number] for number in numbers}
        count, first = _count(abstract), groups[numbers[0]]
        progress = _joined([group.progress.chosen([group.numbers.index(n)]) for n, group in groups.items()])
        if first.numbers == numbers and first.count == count:
            return first.read(abstract), progress
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        own = lambda leaf, size: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype, sharding=here)
        read = {  # each group once
            group.folder: group.read(jax.tree.map(lambda leaf: own(leaf, group.count), abstract))  # noqa: B023
            for group in groups.values()
        }
        rows = [jax.tree.map(lambda x: x[group.numbers.index(n)], read[group.folder]) for n, group in groups.items()]  # noqa: B023
        rows += rows[-1:] * (count - len(rows))
        states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        return jax.device_put(states, jax.tree.map(lambda leaf: leaf.sharding, abstract)), progress

    def forget(self, numbers: Sequence[int]) -> None:
        """Trials that will not go on: their states are deleted, once nobody else's lie beside them."""
        self._forgotten |= set(numbers)
        self._drop_what_nobody_needs()

    def _groups(self) -> dict[int, "_Group"]:
        """{number of a trial: the group that is furthest with it}"""
        found: dict[int, _Group] = {}
        for group in self._all():
            for number in group.numbers:
                if number not in found or group.step > found[number].step:
                    found[number] = group
        return found

    def _all(self) -> list["_Group"]:
        folders = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        return [_group(folder, steps[-1]) for folder in folders if (steps := finished_steps(folder))]

    def _drop_what_nobody_needs(self) -> None:
        needed = {group.folder for number, group in self._groups().items() if number not in self._forgotten}
        for group in self._all():
            if group.folder not in needed:
                shutil.rmtree(group.folder)


@dataclasses.dataclass(frozen=True)
class _Group:
    """Trials whose states lie together."""

    folder: Path
    step: int
    numbers: list[int]
    count: int
    """States; those after the numbers fill up."""
    progress: Progress

    def read(self, abstract: TrainState) -> TrainState:
        checkpoints = Checkpoints(self.folder, KEPT)
        try:
            return checkpoints.restore(self.step, abstract)
        finally:
            checkpoints.close()


def _group(folder: Path, step: int) -> _Group:
    metadata = read_metadata(folder, step)
    return _Group(folder, step, metadata["numbers"], metadata["count"], Progress(**metadata["progress"]))


def _count(states: TrainState) -> int:
    return states.step.shape[0]


def _joined(parts: list[Progress]) -> Progress:
    """Of all these trials; they are at one step."""
    every = lambda name: [entry for part in parts for entry in getattr(part, name)]
    since = [[entry for part in parts for entry in part.since[row]] for row in range(3)]
    seconds = sum(part.seconds for part in parts) / len(parts)
    return Progress(parts[0].step, every("losses"), every("eval_losses"), every("diverged"), since, seconds)
