"""Stop signals, and a watchdog for runs that hang."""

import collections
import contextlib
import faulthandler
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from jaxgpt.errors import EXIT_RESUME, EXIT_WATCHDOG, Interrupted, RunFailed, stop_signals, tell
from jaxgpt.training.recovery import record_fault

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
START, DATA, STEP, EVAL, SAVE, END = "start", "data", "step", "eval", "save", "end"
# Cloud machines are taken away 15 to 30 seconds after the signal. What takes longer than this to come to the end of
# a step is given up, so that the run ends by itself and says so.
PATIENCE_SECONDS = 6.0
STALL_SECONDS = 1.0  # data usually comes in milliseconds: after the signal, a longer wait for it is cut short
# Compiling and writing to a slow disk may take this many times faults.hang_seconds.
SLOW = {START: 12, SAVE: 6}


class Activity:
    """The main thread's activity: ("start", "data", "step", "eval", "save" or "end", step, when it began)."""

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
        """The median of the last steps; the first one's, with its compilation, before there are some; else 0."""
        steps = list(self._steps)  # begins with the time before the first step
        return statistics.median(steps) if len(steps) > 3 else steps[-1] if len(steps) > 1 else 0.0


class StopSignal:
    """Notes SIGTERM, Ctrl-C and SIGHUP; the loop asks `requested` after each step. A second signal exits at once.

    Before the first step is done, and after the last one, there is nothing to save: there the main thread is
    interrupted where it is. A thread of its own waits for the signal, too. It interrupts the main thread where that
    waits for data that does not come: there the state is whole. (Not anywhere in the reading of a batch: an exception
    between the taking of a lock and the block that releases it leaves it taken.) Compiling, sampling and other long
    calls do not return to Python for a while. That thread saves beside them where the state is whole (`saved_by`), and
    else ends the process when the end of the step does not come.
    """

    def __init__(self, activity: Activity, is_alone: Callable[[], bool] = lambda: True):
        self.requested: str | None = None
        self.tell_others: Callable[[str], object] = lambda why: None  # several processes: that this one leaves
        self.kept: Callable[[], int | None] = lambda: None  # the newest step that is on disk
        self._activity = activity
        self._is_alone = is_alone
        self._previous: dict[int, Handler] = {}
        self._patient = False
        self._stalled = False
        self._ended = False
        self._save: Callable[[], None] | None = None
        self._saving = threading.Lock()

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals: whoever started this one handles them
        for number in stop_signals():
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

    @contextlib.contextmanager
    def saved_by(self, save: Callable[[], None]) -> Iterator[None]:
        """A block that leaves the state alone. If it does not end soon after a signal, `save` is called beside it."""
        self._save = save
        try:
            yield
        finally:
            with self._saving:  # for ever, if the thread is at it: it ends the process then
                self._save = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stalled:  # sent by our own thread
            self._stalled = False
            if self._waits_for_data():
                raise Interrupted(self.requested)
            return
        if self.requested:
            if number == signal.SIGHUP:  # a terminal that is closed sends it, and its shell does
                return
            os._exit(128 + number)  # the shell's convention for a death by signal
        self.requested = signal.Signals(number).name
        # With several processes the others may be in the step already: all have to stop at the same one.
        at_once = self._activity.now[0] in (START, END) and self._is_alone()
        tell("\n" if at_once else f"\n{self.requested}: saving after this step (again to stop at once)\n")
        if at_once:
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """The exception for a signal before the first step or after the last one."""
        ended = self._activity.now[0] == END
        where = "after the last step, which is saved" if ended else "before the first step was done"
        return Interrupted(f"{self.requested} {where}; run the same command again to go on")

    def _waits_for_data(self) -> bool:
        activity, _, since = self._activity.now
        return activity == DATA and time.monotonic() - since > STALL_SECONDS

    def _wait_beside(self) -> None:
        number = None
        while number not in stop_signals():
            byte = os.read(self._reader, 1)
            if not byte:
                os.close(self._reader)
                return
            number = byte[0]
        name, heard = signal.Signals(number).name, time.monotonic()
        deadline = heard + PATIENCE_SECONDS + 3 * self._activity.usual_step_seconds()
        while not self._ended:
            time.sleep(0.1)
            if self._patient:
                deadline = time.monotonic() + PATIENCE_SECONDS
            elif self._is_alone() and not self._stalled and self._waits_for_data():
                self._stalled = True
                signal.pthread_kill(threading.main_thread().ident or 0, number)  # wakes it from its wait
            elif number != signal.SIGINT and time.monotonic() > deadline:
                with self._saving:
                    self._leave(name)
            elif self._is_alone() and time.monotonic() > heard + PATIENCE_SECONDS / 2:
                with self._saving:
                    if self._save:
                        self._leave(name)

    def _leave(self, name: str) -> None:
        """End the process beside a main thread that does not come to the end of its step."""
        activity, step, since = self._activity.now
        where = f"{name} at step {step}, in {activity} for {time.monotonic() - since:.0f} s"
        done = step if activity in (EVAL, SAVE, END) or self._save else step - 1
        if self._save and self._is_alone():
            try:
                self._save()
            except RunFailed as error:
                tell(f"failed: {error}\n")
                os._exit(error.exit_code)
        others = threading.Thread(target=self.tell_others, args=(name,), daemon=True)
        others.start()
        others.join(PATIENCE_SECONDS / 2)
        kept = self.kept() or 0
        what = f"the steps after {kept} are lost" if done > kept else "no step is lost"
        tell(f"stopped: {where}; {what}; run the same command again to go on from the last checkpoint\n")
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
