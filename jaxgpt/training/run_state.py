"""The parts of a run, and its position: what the loop works with."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.data.dataset import TokenDataset
from jaxgpt.storage.lease import Lease
from jaxgpt.training.checkpoint import Checkpoints
from jaxgpt.training.metrics import MetricLog, TimeSplit
from jaxgpt.training.signals import Activity, StopSignal
from jaxgpt.training.step import Program

RISE = 0.01
GoOn = Callable[[], None]  # called again and again during long work; raises where the work is to stop


class Scorer(Protocol):
    """Scores eval.tasks with parameters that lie on the devices as the training has them."""

    def __call__(self, params: dict, go_on: GoOn) -> dict[str, float]:
        """{"eval_NAME_acc": 0.5, ...}; `go_on` is called after each batch."""

    def describe(self) -> str:
        """One line for each task that will be scored."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run. Its config is resolved: max_steps and global_batch_size are numbers."""

    config: Config
    workdir: Path
    mesh: Mesh
    dataset: TokenDataset
    program: Program
    checkpoints: Checkpoints
    log: MetricLog
    sample: Callable[[dict], dict[str, str | float]] | None
    """Parameters -> metrics, such as "sample", a text that the model wrote; None turns samples off."""
    stop: StopSignal
    activity: Activity
    skip: frozenset[int] = frozenset()  # training rows that weigh nothing (data.skip_list)
    score: Scorer | None = None  # scores eval.tasks; None where there are none
    lease: Lease | None = None  # the hold on `workdir`, in the process that writes
    split: TimeSplit = dataclasses.field(default_factory=TimeSplit)
    """The seconds that no line of metrics tells of yet."""


@dataclasses.dataclass(frozen=True)
class Position:
    """The position of a run, besides its state; kept in the metadata of its checkpoints."""

    step: int = 0  # steps done
    data_offset: int = 0
    """Batches left out so far: step n reads the rows of n + data_offset. A rollback adds to it."""
    bad_steps: int = 0  # bad steps in a row, up to this step
    evaluated: bool = True  # False where the evaluation that was due at this step is still to be done
    loss_sum: float = 0.0
    count: float = 0.0
    """Loss sum and weight sum since the last line of metrics, so that a restart does not change the next line."""
    best_loss: float | None = None  # the lowest validation loss so far; None before the first evaluation
    best_step: int = 0  # the step of that loss
    not_better: int = 0  # evaluations in a row, up to this step, that were not better than the best before them
    best_train_loss: float | None = None  # the mean training loss of the steps before the evaluation at best_step
    train_loss: float = 0.0
    train_count: float = 0.0
    """Loss sum and weight sum since the last evaluation."""
    overfits: str = ""  # what the last evaluation has shown, if the validation loss rose while the training loss fell


def position(checkpoints: Checkpoints, step: int | None) -> Position:
    """The position at which the run wrote the checkpoint of `step`; for None, its beginning.

    Counts that a checkpoint of an older version lacks start at their defaults.
    """
    if step is None:
        return Position()
    saved = checkpoints.metadata(step)
    return Position(**{field.name: saved[field.name] for field in dataclasses.fields(Position) if field.name in saved})


class EvaluationHistory:
    """Counts evaluations as Hugging Face's EarlyStoppingCallback does, whether or not a patience is set.

    An evaluation is better than the best before it if its loss is lower by more than eval.early_stopping_threshold;
    eval.early_stopping_patience in a row that are not end the run. The lowest loss is the best, by however little.

    A run overfits if two evaluations or more in a row were not better, the last one is above the best by more than
    RISE of it, and the training loss has fallen since the best.
    """

    def __init__(self, config: Config, start: Position):
        self._patience, self._threshold = config.eval.early_stopping_patience, config.eval.early_stopping_threshold
        self._last_step = config.max_steps
        self.now = start
        """The counts, in the fields that a `Position` has for them."""

    def add(self, loss_sum: float, count: float) -> None:
        """Count a training step."""
        now = self.now
        self.now = dataclasses.replace(now, train_loss=now.train_loss + loss_sum, train_count=now.train_count + count)

    def note(self, step: int, eval_loss: float) -> None:
        """Count the evaluation at `step`."""
        now, told = self.now, ""
        train_loss = now.train_loss / now.train_count if now.train_count else None
        has_fallen = train_loss is not None and now.best_train_loss is not None and train_loss < now.best_train_loss
        best = math.inf if now.best_loss is None else now.best_loss
        not_better = 0 if best - eval_loss > self._threshold else now.not_better + 1
        if not_better > 1 and not eval_loss <= best * (1 + RISE) and has_fallen:
            told = f"{eval_loss:.4f} at step {step:,}, lowest {best:.4f} at step {now.best_step:,}"
            told = f"validation loss rises while training loss falls: {told}"
        now = dataclasses.replace(now, not_better=not_better, overfits=told, train_loss=0.0, train_count=0.0)
        if eval_loss < best:
            now = dataclasses.replace(now, best_loss=eval_loss, best_step=step, best_train_loss=train_loss)
        self.now = now

    def reason(self, step: int) -> str:
        """The reason why the run ends at `step`, before its last one; "" if it goes on."""
        if self._patience is None or self.now.not_better < self._patience or step >= self._last_step:
            return ""
        by = f" by more than {self._threshold:g}" if self._threshold else ""
        best = f"{self.now.best_loss:.4f} at step {self.now.best_step:,}" if self.now.best_loss is not None else "none"
        return (
            f"stopped early at step {step:,} of {self._last_step:,}: {self.now.not_better} evaluations in a row were "
            f"not better{by} than the best before them (lowest validation loss {best}); a larger "
            "eval.early_stopping_patience goes on"
        )
