"""A dead or hung host ends the run on all others, soon, with exit code 75 and its name on record.

Each process counts up a number in the key-value store that jax's coordinator (process 0) keeps anyway. Process 0
watches all numbers and names the process whose number stands still; the others watch process 0's and read its verdict.
Where the store itself does not answer, process 0 is the lost one. Threads do this, because the main thread of a
survivor waits in a collective that never ends.

jax's own health check cannot replace this (tried with jax 0.10.2 and 0.12.0.1). It names no host, and it ends a process
by abort(): SIGABRT, a C++ stack trace, exit code 134. With jax_enable_recoverability the same still happens when the
coordinator is lost, and a process that hangs is not noticed at all. The client's missed_heartbeat_callback would avoid
the abort, but calling it throws std::bad_cast in both versions.
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
from typing import Any, NamedTuple

import jax
from jax._src.distributed import global_state  # jax has no public way to its key-value store; Orbax uses this one too

from jaxgpt.errors import EXIT_RESUME, EXIT_WATCHDOG, Interrupted

_INTERVAL = 0.5  # seconds between two signs of life
_FAILED_SECONDS = 5.0  # for the others to fail for the same reason, before one that failed ends them
_END_MILLISECONDS = 3_600_000  # for process 0 to write its last files
_RECORD_SECONDS = 4.0  # for the record; less than an abort is delayed
_HOST_OF_0 = "jaxgpt/host"  # set when all join, so that it is known however early process 0 dies
_SIGNS = "jaxgpt/peers/"
_VERDICT = "jaxgpt/verdict"
ALIVE, DONE, FAILED, TOLD = "alive", "done", "failed", "was told to stop"


def coordination_client() -> Any:
    """jax's client of its key-value store and barriers; None for a single process. Starts no device."""
    return global_state.client


def publish_host() -> None:
    """Tell all processes on which host process 0 is; every process calls this once it has joined."""
    if global_state.process_id == 0:
        coordination_client().key_value_set(_HOST_OF_0, socket.gethostname())


@dataclasses.dataclass(frozen=True)
class Sign:
    """The last message of a process: a number that grows while it lives, its state, and its host."""

    count: int
    state: str
    host: str


class Loss(NamedTuple):
    """Which process is lost, and how that was noticed."""

    process: int
    host: str
    what: str


class Peers:
    """Decides from the signs of other processes who is lost. Has no clock and no network of its own."""

    def __init__(self, timeout_seconds: float):
        self._timeout = timeout_seconds
        self._last: dict[int, Sign] = {}
        self._silent: dict[int, float] = {}
        self._failed: dict[int, float] = {}

    def judge(self, signs: dict[int, Sign], seconds: float) -> Loss | None:
        """The lost process, given the `signs` by process after `seconds` more.

        A process that gave no sign yet, or has left, is not judged.
        """
        # After a pause of our own (a machine that slept), the others get time to show that they live.
        seconds = min(seconds, 4 * _INTERVAL)
        for process, sign in signs.items():
            grown = process not in self._last or sign.count != self._last[process].count
            self._silent[process] = 0.0 if grown else self._silent[process] + seconds
            self._last[process] = sign
        for process, sign in self._last.items():
            if sign.state == ALIVE and self._silent[process] > self._timeout:
                return Loss(process, sign.host, f"gave no sign of life for {self._silent[process]:.0f} s")
            if sign.state.startswith(TOLD):
                return Loss(process, sign.host, sign.state)
            if sign.state.startswith(FAILED):
                self._failed[process] = self._failed.get(process, 0.0) + seconds
                if self._failed[process] > _FAILED_SECONDS:
                    return Loss(process, sign.host, sign.state)
        return None


class PeerWatch:
    """Context manager around a run of several processes: while it is open, a lost peer ends this process (75).

    `step` returns the current step. `record` writes to disk who was lost, given the step and {"process", "host",
    "what", "reported_by"}. With a single process it starts no thread and does nothing.
    """

    def __init__(self, timeout_seconds: float, step: Callable[[], int], record: Callable[[int, dict], None]):
        self._step, self._record = step, record
        self._timeout = timeout_seconds
        self._peers = Peers(timeout_seconds)
        self._state, self._count = ALIVE, 0
        self._closing, self._ending = threading.Event(), threading.Lock()
        self._answered = time.monotonic()  # when the store last did
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "PeerWatch":
        self._client = coordination_client()
        if self._client is None:
            return self
        self._me, self._host = jax.process_index(), socket.gethostname()
        self._host_of_0 = self._client.blocking_key_value_get(_HOST_OF_0, 60_000)
        self._beat()
        _delay_aborts()
        for work in (self._keep_beating, self._watch_the_store):
            self._threads.append(threading.Thread(target=work, name=f"peers{work.__name__}", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if not self._threads:
            return
        if isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and "Gloo" in str(error)):
            # As a collective with a dead peer raises it. The threads find out who is gone, and end this process. If
            # they do not within the longest time that can take, the error had another cause.
            time.sleep(max(self._timeout, _FAILED_SECONDS) + 10 * _INTERVAL)
        good = error is None or isinstance(error, Interrupted)
        if good:  # wait, still watched by the threads, until process 0 has written its last files
            with contextlib.suppress(RuntimeError, ValueError):  # some process is lost: the threads will say which
                self._client.wait_at_barrier("jaxgpt/end", _END_MILLISECONDS)
        self._state = DONE if good else f"{FAILED}: {type(error).__name__}: {error}"[:300]
        self._closing.set()
        for thread in self._threads:
            thread.join(2 * self._timeout)
        if not good and self._me == 0:
            self._outlast_the_others()

    def leave(self, signal_name: str) -> None:
        """Have the others end with 42, too, as this process does: it was told to stop where it cannot save."""
        if self._threads:
            self._state = f"{TOLD} ({signal_name})"
            self._beat()
            self._outlast_the_others()

    def _keep_beating(self) -> None:
        before = time.monotonic()
        while True:
            closing = self._closing.wait(_INTERVAL)
            now = time.monotonic()
            try:
                self._beat()
                verdict = self._client.key_value_dir_get(_VERDICT)
                if verdict:
                    loss: Loss | None = Loss(*json.loads(verdict[0][1]))
                else:
                    loss = self._peers.judge(self._read_signs(), now - before)
            except (RuntimeError, ValueError):  # the store does not answer; _watch_the_store counts how long
                if closing:
                    return
                continue
            self._answered = before = now
            if closing:
                return
            if loss and self._me == 0:  # publish it, and keep the store until the others have read it
                self._client.key_value_set(f"{_VERDICT}/0", json.dumps(loss), allow_overwrite=True)
                time.sleep(4 * _INTERVAL)
            if loss:
                self._end(loss)

    def _watch_the_store(self) -> None:
        """End this process when the store is gone or silent. The other thread cannot: its calls may wait for ever."""
        silent, before = 0.0, time.monotonic()
        answered = self._answered
        while not self._closing.wait(_INTERVAL):
            now = time.monotonic()
            silent = silent + min(now - before, 4 * _INTERVAL) if answered == self._answered else 0.0
            before, answered = now, self._answered
            if silent and self._me and _refuses(global_state.coordinator_address):
                self._end(Loss(0, self._host_of_0, "is gone, and the coordinator with it"))
            if silent > self._timeout + 2 * _INTERVAL:  # process 0's own verdict goes first
                self._end(Loss(0, self._host_of_0, f"does not answer for {silent:.0f} s"))

    def _outlast_the_others(self) -> None:
        """Keep the store of process 0 until the others have read there that it failed, or have failed too."""
        deadline = time.monotonic() + _FAILED_SECONDS + 4 * _INTERVAL
        with contextlib.suppress(RuntimeError, ValueError):  # jax has closed the store
            while time.monotonic() < deadline and any(sign.state == ALIVE for sign in self._read_signs().values()):
                time.sleep(_INTERVAL)

    def _beat(self) -> None:
        self._count += 1
        sign = json.dumps([self._count, self._state, self._host])
        self._client.key_value_set(f"{_SIGNS}{self._me}", sign, allow_overwrite=True)

    def _read_signs(self) -> dict[int, Sign]:
        """All other processes' signs in process 0, its own in the others: the work grows linearly, not squared."""
        if self._me == 0:
            found = self._client.key_value_dir_get(_SIGNS)
            signs = {int(key.rsplit("/", 1)[1]): Sign(*json.loads(text)) for key, text in found}
            return {process: sign for process, sign in signs.items() if process != 0}
        return {0: Sign(*json.loads(self._client.key_value_try_get(f"{_SIGNS}0")))}

    def _end(self, loss: Loss) -> None:
        """Print, record and exit. Not an exception: the main thread waits in a collective and would not see it."""
        self._ending.acquire()  # never released: one thread ends the process
        told = loss.what.startswith(TOLD) or self._state.startswith(TOLD)
        line = (
            f"process {loss.process} on {loss.host} {loss.what}; process {self._me} ends at step {self._step()}, "
            "run the same command again to go on"
        )
        os.write(2, f"{'stopped' if told else 'failed'}: {line}\n".encode())
        if told:
            os._exit(EXIT_RESUME)
        facts = loss._asdict() | {"reported_by": self._me}
        writing = threading.Thread(target=self._record, args=(self._step(), facts), daemon=True)
        writing.start()
        writing.join(_RECORD_SECONDS)  # the disk may be what died
        os._exit(EXIT_WATCHDOG)


def _refuses(address: str | None) -> bool:
    """Whether nobody listens at host:port; a host that does not answer at all may only be slow."""
    host, port = str(address).rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return False


def _delay_aborts() -> None:
    """From now on, abort() ends this process six seconds later.

    jax aborts from a C++ thread as soon as the connection to its coordinator breaks. The delay is for the threads
    above, which end this process with 75, or for a process that failed itself to end with its own exit code. An abort
    for any other reason still happens. The handler is C's sleep(), which gets the signal's number, 6, as its argument:
    Python runs its own handlers in the main thread only, which may wait in a collective.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def abandon_coordination() -> None:
    """Keep jax from closing the connection when Python ends: it would wait for the others in vain, and then abort.

    jax must not know the objects any more, and nobody may destroy them, because their destructors close it too.
    """
    for connection in (global_state.client, global_state.service):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
    global_state.client = global_state.service = None
