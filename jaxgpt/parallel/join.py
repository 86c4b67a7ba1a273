"""The roll call before jax joins processes: names those that are missing.

jax itself ends each process with a C++ stack trace when one does not come, and does not name it. Process 0 listens on
the port that jax's coordinator will use, so no other port has to be open; the others say hello and receive the result.
Every process that came gets the same result. One that is told to stop meanwhile says so in its hello, and all stop.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Mapping
from typing import TypeGuard

from jaxgpt.errors import HostLost, Interrupted, UserError
from jaxgpt.parallel.cluster_env import ProcessPlace, find_place

_RETRY_SECONDS = 0.2
_HELLO_SECONDS = 5.0  # for a line from somebody who has connected; for others to come and hear that one has to stop
_LINE_BYTES = 4096
_NOTICE_SECONDS = 10.0  # of waiting, before a line says for whom


def roll_call(
    place: ProcessPlace, timeout_seconds: float, same: Mapping[str, str] | None = None, stopped: bool = False
) -> None:
    """Return once all processes answered at the coordinator's port.

    `same` is what must be equal in all of them, such as {"jax": "0.10.2"}. `stopped`: this one was told to stop.

    Raises:
        HostLost: some did not within the timeout, or two claim the same number, or they differ in their number of
            processes or in `same`; the message is the same in all processes that came.
        Interrupted: this process was told to stop, and told the others; or one of these was, which is named.
    """
    host, port = place.address()
    hello = {"process": place.process_id, "processes": place.num_processes, "same": dict(same or {})}
    hello |= {"host": socket.gethostname(), "pid": os.getpid(), "stopped": stopped}
    no_answer = (
        f"process 0 did not answer at {place.coordinator} in {timeout_seconds:g} s; start the same command "
        f"there too, and open port {port} between the hosts (JAX_COORDINATOR_PORT chooses another)"
    )
    try:
        if place.process_id == 0:
            result = _Roll(hello, place, timeout_seconds).call(host, port)
        else:
            result = _answer(hello, host, port, time.monotonic() + timeout_seconds) or {"error": no_answer}
    except Interrupted:
        tell_stopped(place)
        raise
    if result.get("stopped"):
        raise Interrupted(result["error"])
    if result["error"]:
        raise HostLost(f"the processes did not join: {result['error']}")


def tell_stopped(place: ProcessPlace | None = None) -> None:
    """Have the processes that wait for this one stop, too, as it was told to; gives them some seconds to hear it."""
    with contextlib.suppress(UserError, HostLost, Interrupted):
        if place := place or find_place(os.environ):
            roll_call(place, _HELLO_SECONDS, stopped=True)


class _Roll:
    """Process 0's list of who said hello. It listens to all connections at once: a stranger's delays nobody."""

    def __init__(self, hello: dict, place: ProcessPlace, timeout_seconds: float):
        self._own, self._place, self._timeout = hello, place, timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds
        self._here = {0: hello}
        self._accepted = contextlib.ExitStack()
        self._connections: list[socket.socket] = []
        self._error, self._stopped = self._objection(hello), hello["stopped"]

    def call(self, host: str, port: int) -> dict:
        """Hear all processes and send them the result: {"error": what is wrong, or "", "stopped": is it that alone}."""
        listener = self._listen(host, port, self._deadline)
        if listener is None:
            return {"error": f"port {port} of this host is taken, by another run or by a process of it that hangs"}
        with self._accepted:  # an exception closes them, and the others come again
            with listener, selectors.DefaultSelector() as selector:
                listener.setblocking(False)
                selector.register(listener, selectors.EVENT_READ)
                self._hear_all(listener, selector)
            return self._send_result()

    def _hear_all(self, listener: socket.socket, selector: selectors.BaseSelector) -> None:
        """Read hellos until all processes are here, two disagree, or the time is over. If one stops, all hear it."""
        notice = time.monotonic() + _NOTICE_SECONDS
        while len(self._here) < self._own["processes"] and (self._stopped or not self._error):
            if self._stopped:
                self._send_result()
            now = time.monotonic()
            if now > self._deadline:
                self._error = self._error or self._missing("no sign of")
                break
            if now > notice:
                notice = float("inf")
                print(self._missing("waiting for"), file=sys.stderr, flush=True)
            for key, _ in selector.select(max(min(self._deadline, notice) - now, 0.001)):
                with contextlib.suppress(OSError):  # it left before it was accepted
                    if key.data:
                        self._hear(selector, *key.data)
                    else:
                        connection = self._accepted.enter_context(listener.accept()[0])
                        connection.setblocking(False)
                        selector.register(connection, selectors.EVENT_READ, (connection, bytearray()))

    def _hear(self, selector: selectors.BaseSelector, connection: socket.socket, line: bytearray) -> None:
        """Take what has come of a line. A connection that ends, or whose line is no hello, is closed."""
        try:
            part = connection.recv(_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        line += part
        if part and b"\n" not in line and len(line) < _LINE_BYTES:
            return
        selector.unregister(connection)
        hello = _parsed(bytes(line))
        if not self._is_hello(hello):
            connection.close()  # somebody else's program
            return
        if hello["stopped"]:
            self._stopped, self._deadline = True, min(self._deadline, time.monotonic() + _HELLO_SECONDS)
        self._error = self._error or self._objection(hello)
        self._here.setdefault(hello["process"], hello)
        self._connections.append(connection)

    def _is_hello(self, hello: object) -> TypeGuard[dict]:
        """True for an object with this process's keys and types, from one of the processes that are expected."""
        if not isinstance(hello, dict) or hello.keys() != self._own.keys():
            return False
        typed = all(type(hello[key]) is type(value) for key, value in self._own.items())
        return typed and 0 < hello["process"] < max(hello["processes"], self._own["processes"])

    def _send_result(self) -> dict:
        result, deadline = {"error": self._error, "stopped": self._stopped}, time.monotonic() + _HELLO_SECONDS
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it left meanwhile; jax's own join will notice
                connection.settimeout(_HELLO_SECONDS)
                connection.sendall(json.dumps(result).encode() + b"\n")
        while self._connections:
            with contextlib.suppress(OSError), self._connections.pop() as connection:
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                connection.recv(1)  # until the other side has closed: then the port is free for jax at once
        return result

    @staticmethod
    def _listen(host: str, port: int, deadline: float) -> socket.socket | None:
        local = is_loopback(host)
        while True:
            try:
                if local or not socket.has_dualstack_ipv6():
                    return socket.create_server((host if local else "", port), backlog=512)
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=512, dualstack_ipv6=True)
            except OSError:
                if time.monotonic() > deadline:
                    return None
                time.sleep(_RETRY_SECONDS)

    def _objection(self, hello: dict) -> str:
        process, count, host = hello["process"], hello["processes"], hello["host"]
        if hello["stopped"]:
            return f"process {process} on {host} was told to stop before all had joined; run the same command again"
        if count != self._own["processes"]:
            return (
                f"process {process} on {host} expects {count} processes, process 0 on {self._own['host']} expects "
                f"{self._own['processes']}"
            )
        other = self._here.get(process)
        if other and (other["host"], other["pid"]) != (host, hello["pid"]):
            return f"{host} and {other['host']} both say that they are process {process}"
        for name, ours in self._own["same"].items():
            theirs = hello["same"].get(name)
            if theirs != ours:
                return f"{name}: {theirs} in process {process} on {host}, {ours} in process 0 on {self._own['host']}"
        return ""

    def _missing(self, how: str) -> str:
        hosts = {number: f" ({name})" for number, name in self._place.hosts.items()}
        missing = [number for number in range(self._own["processes"]) if number not in self._here]
        names = ", ".join(f"{number}{hosts.get(number, '')}" for number in missing)
        here = ", ".join(f"{number} on {hello['host']}" for number, hello in sorted(self._here.items()))
        return (
            f"{how} process {names} of {self._own['processes']} within {self._timeout:g} s at "
            f"{self._place.coordinator} (here: {here}); start the same command on every host at once, and open port "
            f"{self._place.address()[1]} between them"
        )


def _answer(hello: dict, host: str, port: int, deadline: float) -> dict | None:
    """Say hello until process 0 sends the result (that of `_Roll.call`); None if it never did."""
    notice = time.monotonic() + _NOTICE_SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=2) as connection:
                connection.sendall(json.dumps(hello).encode() + b"\n")
                # process 0 may have started later, and waits longer for those who are missing
                outcome = _read(connection, max(deadline - time.monotonic(), 0) + _HELLO_SECONDS)
        except OSError:  # not there yet, or an earlier run's coordinator that is just ending
            outcome = None
            if time.monotonic() > notice:
                notice = float("inf")
                waits = f"process {hello['process']} waits for process 0 at {host}:{port}, which does not answer yet"
                print(waits, file=sys.stderr, flush=True)
        if isinstance(outcome, dict) and "error" in outcome:
            return outcome
        time.sleep(_RETRY_SECONDS)
    return None


def _read(connection: socket.socket, seconds: float) -> object:
    """A line of JSON, or None."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("rb") as stream:
            return _parsed(stream.readline(_LINE_BYTES))
    except OSError:
        return None


def _parsed(line: bytes) -> object:
    """The JSON value of `line`, or None."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False
