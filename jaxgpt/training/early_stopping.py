"""Early stopping: a run ends once its validation loss has not become better for a while."""

import math

from jaxgpt.config import Config
from jaxgpt.training.run_state import Position


class EarlyStopping:
    """Counts evaluations as Hugging Face's EarlyStoppingCallback does, whether or not a patience is set.

    An evaluation is better than the best before it if its loss is lower by more than eval.early_stopping_threshold;
    eval.early_stopping_patience in a row that are not end the run. The lowest loss is the best, by however little.
    """

    def __init__(self, config: Config, start: Position):
        self._patience = config.eval.early_stopping_patience
        self._threshold = config.eval.early_stopping_threshold
        self._last_step = config.max_steps
        self._best_loss, self._best_step, self._not_better = start.best_loss, start.best_step, start.not_better

    def note(self, step: int, eval_loss: float) -> None:
        """Count the evaluation at `step`."""
        best = math.inf if self._best_loss is None else self._best_loss
        self._not_better = 0 if best - eval_loss > self._threshold else self._not_better + 1
        if eval_loss < best:
            self._best_loss, self._best_step = eval_loss, step

    def counts(self) -> tuple[float | None, int, int]:
        """(best_loss, best_step, not_better), as a `Position` keeps them."""
        return self._best_loss, self._best_step, self._not_better

    def reason(self, step: int) -> str:
        """The reason why the run ends at `step`, before its last one; "" if it goes on."""
        if self._patience is None or self._not_better < self._patience or step >= self._last_step:
            return ""
        by = f" by more than {self._threshold:g}" if self._threshold else ""
        best = f"{self._best_loss:.4f} at step {self._best_step:,}" if self._best_loss is not None else "none"
        return (
            f"stopped early at step {step:,} of {self._last_step:,}: {self._not_better} evaluations in a row were "
            f"not better{by} than the best before them (lowest validation loss {best})"
        )
