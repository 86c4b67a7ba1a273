"""What can go wrong in a run, and being told to stop."""

import os
import signal
from types import FrameType

from jaxgpt.cli import RunFailed


class NonFiniteLoss(RunFailed):
    """The loss or the gradient stopped being a number; training on would only spread it."""

    def __init__(self, step: int, loss: float, grad_norm: float, learning_rate: float, last_good: int | None):
        kept = f"the last good checkpoint is step {last_good}" if last_good else "no checkpoint was written yet"
        super().__init__(
            f"step {step}: loss = {loss}, gradient norm = {grad_norm}; {kept}. Likely causes: a learning rate "
            f"that is too high (now {learning_rate:.1e}), too short a warm-up, clipping turned off "
            "(optimizer.max_grad_norm = 0), or weights that were already damaged when training started."
        )


class StopSignal:
    """Notes SIGTERM and Ctrl-C; the loop asks `requested` after each step. A second signal exits at once."""

    def __init__(self):
        self.requested: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)  # the shell's convention for a death by signal
        self.requested = signal.Signals(number).name
        # write(2), not print: a handler may interrupt a print that holds the stream's lock.
        os.write(2, f"\n{self.requested}: saving after this step (again to stop at once)\n".encode())
