"""Stop signals, and a watchdog for runs that hang."""

import collections
import faulthandler
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from jaxgpt.errors import EXIT_RESUME, EXIT_WATCHDOG, Interrupted
from jaxgpt.training.recovery import record_fault

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
START, DATA, STEP, EVAL, SAVE = "start", "data", "step", "eval", "save"
# Cloud machines are taken away 15 to 30 seconds after the signal. What takes longer than this to come to the end of
# a step is given up, so that the run ends by itself and says so.
PATIENCE_SECONDS = 6.0
STALL_SECONDS = 1.0  # data usually comes in milliseconds: after the signal, a longer wait for it is cut short
# Compiling and writing to a slow disk may take this many times faults.hang_seconds.
SLOW = {START: 12, SAVE: 6}


class Activity:
    """The main thread's activity: ("data", "step", "eval", "save" or "start", step, monotonic seconds of its begin)."""

    def __init__(self) -> None:
        self._steps: collections.deque[float] = collections.deque(maxlen=64)
        self._step_began = time.monotonic()
        self.now: tuple[str, int, float] = (START, 0, time.monotonic())

    def is_at(self, name: str, step: int) -> None:
        """Record the activity that begins now; costs a microsecond."""
        now = time.monotonic()
        if step != self.now[1]:
            self._steps.append(now - self._step_began)
            self._step_began = now
        self.now = (name, step, now)

    def usual_step_seconds(self) -> float:
        """The median of the last steps, 0 before there are some."""
        return statistics.median(list(self._steps)) if len(self._steps) > 3 else 0.0


class StopSignal:
    """Notes SIGTERM and Ctrl-C; the loop asks `requested` after each step. A second signal exits at once.

    Before the first step is done there is nothing to save: there the main thread is interrupted where it is. A thread
    of its own waits for the signal, too. It interrupts the main thread where that waits for data that does not come:
    there the state is whole. (Not anywhere in the reading of a batch: an exception between the taking of a lock and
    the block that releases it leaves it taken.) Compiling and other long calls do not return to Python for a while, so
    that thread ends the process when the end of the step does not come.
    """

    def __init__(self, activity: Activity, is_alone: bool = True):
        self.requested: str | None = None
        self._activity = activity
        self._is_alone = is_alone
        self._previous: dict[int, Handler] = {}
        self._patient = False
        self._stalled = False
        self._ended = False

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals: whoever started this one handles them
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._wait_beside, name="stop", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended = True
        if not self._previous:
            return
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._writer)  # ends the thread

    def is_heard(self) -> None:
        """The loop has come to the end of its step: what follows, saving above all, takes as long as it takes."""
        self._patient = True

    def is_saved(self) -> None:
        """It took what it took: what follows is bounded again, the next step or closing a data reader that hangs."""
        self._patient = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stalled:  # sent by our own thread
            self._stalled = False
            if self._waits_for_data():
                raise Interrupted(self.requested)
            return
        if self.requested:
            os._exit(128 + number)  # the shell's convention for a death by signal
        self.requested = signal.Signals(number).name
        # With several processes the others may be in the step already: all have to stop at the same one.
        if self._activity.now[0] == START and self._is_alone:
            raise Interrupted(f"{self.requested} before the first step was done; run the same command again to go on")
        # write(2), not print: a handler may interrupt a print that holds the stream's lock.
        os.write(2, f"\n{self.requested}: saving after this step (again to stop at once)\n".encode())

    def _waits_for_data(self) -> bool:
        activity, _, since = self._activity.now
        return activity == DATA and time.monotonic() - since > STALL_SECONDS

    def _wait_beside(self) -> None:
        number = None
        while number not in (signal.SIGTERM, signal.SIGINT):
            byte = os.read(self._reader, 1)
            if not byte:
                os.close(self._reader)
                return
            number = byte[0]
        deadline = time.monotonic() + PATIENCE_SECONDS + 3 * self._activity.usual_step_seconds()
        while time.monotonic() < deadline and not self._ended:
            time.sleep(0.1)
            if self._patient:
                deadline = time.monotonic() + PATIENCE_SECONDS
            if self._is_alone and not self._stalled and self._waits_for_data():
                self._stalled = True
                signal.pthread_kill(threading.main_thread().ident or 0, number)  # wakes it from its wait
        if number == signal.SIGTERM and not self._ended:
            activity, step, since = self._activity.now
            where = f"{signal.Signals(number).name} at step {step}, in {activity} for {time.monotonic() - since:.0f} s"
            os.write(2, f"stopped: {where}; run the same command again to go on from the last checkpoint\n".encode())
            os._exit(EXIT_RESUME)


class Watchdog:
    """Ends the process with exit code 75 when nothing moves: the stacks of all threads and one line are left."""

    def __init__(self, workdir: Path, activity: Activity, hang_seconds: float):
        self._workdir = workdir
        self._activity = activity
        self._hang_seconds = hang_seconds
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._hang_seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._hang_seconds / 4)):
            activity, step, since = self._activity.now
            waited = time.monotonic() - since
            limit = max(self._hang_seconds * SLOW.get(activity, 1), 10 * self._activity.usual_step_seconds())
            if waited > limit:
                break
        else:
            return
        what, host = f"no progress for {waited:.0f} s in {activity}", socket.gethostname()
        stacks = write_stacks(self._workdir)
        record_fault(self._workdir, step=step, process=jax.process_index(), host=host, what=what)
        os.write(2, f"failed: {what} at step {step} on {host}; the stacks of all threads are in {stacks}\n".encode())
        os._exit(EXIT_WATCHDOG)


def record_lost_host(workdir: Path, step: int, facts: dict) -> None:
    """Record that this process ends because another one is lost (parallel/host_watch.py notices it)."""
    record_fault(workdir, step=step, **facts)
    write_stacks(workdir)


def write_stacks(workdir: Path) -> Path:
    """Write the stacks of all threads to a file of the run folder; returns the file."""
    file = workdir / f"stacks-{jax.process_index()}.txt"
    try:
        with open(file, "w", encoding="utf-8") as out:
            faulthandler.dump_traceback(out, all_threads=True)
    except OSError:
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
    return file
