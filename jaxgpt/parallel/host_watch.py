"""A dead or hung host ends the run on all others, soon, with exit code 75 and its name on record.

The idea: each process counts up a number in the key-value store that jax's coordinator (process 0) keeps anyway.
Process 0 watches all numbers and names who stands still; the others watch process 0's and read its verdict. Where
the store itself does not answer, that says that process 0 is the dead one. The work is done by threads, because
the main thread of a survivor sits in a collective that never ends.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import jax

from jaxgpt.errors import EXIT_WATCHDOG, Interrupted

_INTERVAL = 0.5  # seconds between two signs of life
_FAILED_SECONDS = 5.0  # for the others to fail for the same reason, before one that failed ends them
_END_MILLISECONDS = 3_600_000  # for process 0 to write what it writes at the end
HOST_OF_0 = "jaxgpt/host"  # written when all join, so that it is known however early process 0 dies
_FOLDER = "jaxgpt/peers/"
_VERDICT = "jaxgpt/verdict"
ALIVE, DONE, FAILED = "alive", "done", "failed"


@dataclasses.dataclass(frozen=True)
class Sign:
    """What a process last said: a number that grows while it lives, how it fares, and on which host."""

    count: int
    state: str
    host: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Who is lost, and how that shows."""

    process: int
    host: str
    what: str


class Peers:
    """The judgement: fed with the signs of other processes, says who is lost. No clock of its own, no network."""

    def __init__(self, timeout_seconds: float):
        self._timeout = timeout_seconds
        self._last: dict[int, Sign] = {}
        self._silent: dict[int, float] = {}
        self._failed: dict[int, float] = {}

    def judge(self, signs: dict[int, Sign], seconds: float) -> Verdict | None:
        """`signs` by process after `seconds` more; a process that said nothing yet, or left, is not judged."""
        # After a pause of our own (a machine that slept), the others get time to show that they live.
        seconds = min(seconds, 4 * _INTERVAL)
        for process, sign in signs.items():
            grown = process not in self._last or sign.count != self._last[process].count
            self._silent[process] = 0.0 if grown else self._silent[process] + seconds
            self._last[process] = sign
        for process, sign in self._last.items():
            if sign.state == ALIVE and self._silent[process] > self._timeout:
                return Verdict(process, sign.host, f"gave no sign of life for {self._silent[process]:.0f} s")
            if sign.state.startswith(FAILED):
                self._failed[process] = self._failed.get(process, 0.0) + seconds
                if self._failed[process] > _FAILED_SECONDS:
                    return Verdict(process, sign.host, sign.state)
        return None


class PeerWatch:
    """Context manager around a run of several processes: while it is open, a lost peer ends this process (75).

    `step` tells where the run is. `record` leaves on disk who was lost, given the step and {"process", "host", "what",
    "reported_by"}. One process: no threads, nothing happens.
    """

    def __init__(self, timeout_seconds: float, step: Callable[[], int], record: Callable[[int, dict], None]):
        self._step, self._record = step, record
        self._timeout = timeout_seconds
        self._peers = Peers(timeout_seconds)
        self._state, self._count = ALIVE, 0
        self._closing, self._ending = threading.Event(), threading.Lock()
        self._answered = time.monotonic()  # when the store last did
        self._threads: list[threading.Thread] = []
        self._abort: _AbortHandler | None = None

    def __enter__(self) -> "PeerWatch":
        from jax._src.distributed import global_state  # no public way; Orbax takes the same one

        if global_state.client is None:  # asked for the number of processes, jax would start the devices
            return self
        self._client, self._coordinator = global_state.client, global_state.coordinator_address
        self._me, self._host = jax.process_index(), socket.gethostname()
        self._host_of_0 = self._client.blocking_key_value_get(HOST_OF_0, 60_000)
        self._beat()
        self._abort = _AbortHandler(self._coordinator_is_gone)
        for work in (self._keep_beating, self._watch_the_store):
            self._threads.append(threading.Thread(target=work, name=f"peers{work.__name__}", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        if not self._threads:
            return
        if _is_broken_collective(error):
            # The thread that beats will find out who is gone, and end this process; longer than that can take, we
            # do not wait: then the error was another one.
            time.sleep(max(self._timeout, _FAILED_SECONDS) + 10 * _INTERVAL)
        good = error is None or isinstance(error, Interrupted)
        if good:
            self._wait_for_the_others()
        self._state = DONE if good else f"{FAILED}: {type(error).__name__}: {error}"[:300]
        self._closing.set()
        for thread in self._threads:
            thread.join(2 * self._timeout)
        self._abort.remove()
        if not good:
            hold_aborts()
            if self._me == 0:
                self._outlast_the_others()

    # ------------------------------------------------------------ the threads

    def _keep_beating(self) -> None:
        before = time.monotonic()
        while True:
            closing = self._closing.wait(_INTERVAL)
            now = time.monotonic()
            try:
                self._beat()
                verdict = self._read_verdict() or self._peers.judge(self._read_signs(), now - before)
            except (RuntimeError, ValueError):  # the store does not answer; _watch_the_store counts how long
                if closing:
                    return
                continue
            self._answered = before = now
            if closing:
                return
            if verdict:
                self._announce(verdict)
                self._end(verdict)

    def _watch_the_store(self) -> None:
        """A store on a host that hangs keeps the other thread waiting, so this one looks at the clock."""
        silent, before = 0.0, time.monotonic()
        answered = self._answered
        while not self._closing.wait(_INTERVAL):
            now = time.monotonic()
            silent = silent + min(now - before, 4 * _INTERVAL) if answered == self._answered else 0.0
            before, answered = now, self._answered
            if silent > self._timeout + 2 * _INTERVAL:  # process 0's own verdict goes first
                self._end(self._store_lost(f"does not answer for {silent:.0f} s"))

    def _wait_for_the_others(self) -> None:
        """Process 0 may have much to write at the end. While we wait for it, the threads still look after it."""
        with contextlib.suppress(RuntimeError, ValueError):  # somebody is lost: the threads will say who
            self._client.wait_at_barrier("jaxgpt/end", _END_MILLISECONDS)

    def _outlast_the_others(self) -> None:
        """They learn from the store of process 0 that it failed: it must not go before they have, or failed too."""
        deadline = time.monotonic() + _FAILED_SECONDS + 4 * _INTERVAL
        try:
            while time.monotonic() < deadline and any(sign.state == ALIVE for sign in self._read_signs().values()):
                time.sleep(_INTERVAL)
        except (RuntimeError, ValueError):  # jax has closed the store
            pass

    def _beat(self) -> None:
        self._count += 1
        sign = json.dumps([self._count, self._state, self._host])
        self._client.key_value_set(f"{_FOLDER}{self._me}", sign, allow_overwrite=True)

    def _read_signs(self) -> dict[int, Sign]:
        """Of all others in process 0, of process 0 in the others: the work grows with the processes, not squared."""
        if self._me == 0:
            found = self._client.key_value_dir_get(_FOLDER)
            signs = {int(key.rsplit("/", 1)[1]): Sign(*json.loads(text)) for key, text in found}
            return {process: sign for process, sign in signs.items() if process != 0}
        return {0: Sign(*json.loads(self._client.key_value_try_get(f"{_FOLDER}0")))}

    def _read_verdict(self) -> Verdict | None:
        found = self._client.key_value_dir_get(_VERDICT)
        return Verdict(*json.loads(found[0][1])) if found else None

    def _announce(self, verdict: Verdict) -> None:
        """Process 0 tells the others, and waits until they have read it before the store goes with it."""
        if self._me == 0:
            self._client.key_value_set(f"{_VERDICT}/0", json.dumps(dataclasses.astuple(verdict)), allow_overwrite=True)
            time.sleep(4 * _INTERVAL)

    # ------------------------------------------------------------ the end

    def _store_lost(self, what: str) -> Verdict:
        return Verdict(0, self._host_of_0, what)

    def _coordinator_is_gone(self) -> bool:
        """Asked when jax is about to abort the process, which it does the moment that its coordinator is gone."""
        if self._me == 0 or _answers(self._coordinator):
            return False
        self._end(self._store_lost("is gone, and the coordinator with it"))
        return True

    def _end(self, verdict: Verdict) -> None:
        """Say, record and exit. Not an exception: the main thread sits in a collective, and hears none."""
        self._ending.acquire()  # never released: one thread ends the process
        line = (
            f"process {verdict.process} on {verdict.host} {verdict.what}; process {self._me} ends at step "
            f"{self._step()}, run the same command again to go on"
        )
        os.write(2, f"failed: {line}\n".encode())
        facts = dataclasses.asdict(verdict) | {"reported_by": self._me}
        writing = threading.Thread(target=self._record, args=(self._step(), facts), daemon=True)
        writing.start()
        writing.join(5)  # the disk may be what died
        os._exit(EXIT_WATCHDOG)


def _is_broken_collective(error: BaseException | None) -> bool:
    """An error of the runtime, which is what a collective with a dead peer raises (of gloo, as a ValueError)."""
    return isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and "Gloo" in str(error))


def _answers(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return True
    except OSError:
        return False


class _AbortHandler:
    """Asks `ours` before abort() ends the process with a stack trace and code 134.

    jax aborts from a thread of C++ as soon as the connection to its coordinator breaks, and lets nobody have a
    word in that. Python's own handlers run in the main thread only, which is why this one is set in C.
    """

    def __init__(self, ours: Callable[[], bool]):
        self._libc = ctypes.CDLL(None)
        self._libc.signal.restype = ctypes.c_void_p
        self._libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)

        def handle(number: int) -> None:
            if not ours():  # another abort: whoever was asked before us, then the default
                self._libc.signal(number, self._before)
                signal.raise_signal(number)

        self._handle = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)  # C holds no reference to it
        self._before = self._libc.signal(signal.SIGABRT, ctypes.cast(self._handle, ctypes.c_void_p))

    def remove(self) -> None:
        self._libc.signal(signal.SIGABRT, self._before)


def hold_aborts() -> None:
    """From now on abort() makes its thread sleep: a process that ends with an error of its own keeps its exit code.

    Otherwise jax would abort it as soon as another process, which fails for the same reason, is a little quicker.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.pause, ctypes.c_void_p))
