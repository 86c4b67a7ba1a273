"""The roll call before jax joins processes: names those that are missing.

jax itself ends each process with a C++ stack trace when one does not come, and does not name it. Process 0 listens on
the port that jax's coordinator will use, so no other port has to be open; the others say hello and receive the result.
Every process that came gets the same result.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping

from jaxgpt.errors import HostLost
from jaxgpt.parallel.cluster_env import ProcessPlace

_RETRY_SECONDS = 0.2
_HELLO_SECONDS = 5.0  # for a line of text from somebody who has connected
_NOTICE_SECONDS = 10.0  # of waiting, before a line says for whom


def roll_call(place: ProcessPlace, timeout_seconds: float, same: Mapping[str, str] | None = None) -> None:
    """Return once all processes answered at the coordinator's port.

    `same` is what must be equal in all of them, such as {"jax": "0.10.2"}.

    Raises:
        HostLost: some did not within the timeout, or two claim the same number, or they differ in their number of
            processes or in `same`; the message is the same in all processes that came.
    """
    host, port = place.address()
    hello = {"process": place.process_id, "processes": place.num_processes, "same": dict(same or {})}
    hello |= {"host": socket.gethostname(), "pid": os.getpid()}
    deadline = time.monotonic() + timeout_seconds
    error: str | None
    if place.process_id == 0:
        error = _Roll(hello, place, timeout_seconds).call(host, port, deadline)
    elif (error := _answer(hello, host, port, deadline)) is None:
        error = (
            f"process 0 did not answer at {place.coordinator} in {timeout_seconds:g} s; start the same command "
            f"there too, and open port {port} between the hosts (JAX_COORDINATOR_PORT chooses another)"
        )
    if error:
        raise HostLost(f"the processes did not join: {error}")


class _Roll:
    """Process 0's list of who said hello."""

    def __init__(self, hello: dict, place: ProcessPlace, timeout_seconds: float):
        self._own, self._place, self._timeout = hello, place, timeout_seconds
        self._here = {0: hello}
        self._connections: list[socket.socket] = []
        self._error = ""
        self._notice: float | None = time.monotonic() + _NOTICE_SECONDS

    def call(self, host: str, port: int, deadline: float) -> str:
        """Hear all processes and send them the result: what is wrong, or ""."""
        listener = self._listen(host, port, deadline)
        if listener is None:
            return f"port {port} of this host is taken, by another run or by a process of this one that hangs"
        with listener:
            while len(self._here) < self._own["processes"] and not self._error:
                self._hear(listener, deadline)
        for connection in self._connections:
            with contextlib.suppress(OSError), connection:  # it left meanwhile; jax's own join will notice
                connection.sendall(json.dumps({"error": self._error}).encode() + b"\n")
                connection.settimeout(_HELLO_SECONDS)
                connection.recv(1)  # until the other side has closed: then the port is free for jax at once
        return self._error

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

    def _hear(self, listener: socket.socket, deadline: float) -> None:
        until = min(deadline, self._notice) if self._notice else deadline
        listener.settimeout(max(until - time.monotonic(), 0.001))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if until == deadline:
                self._error = self._missing("no sign of")
            else:
                self._notice = None
                print(self._missing("waiting for"), file=sys.stderr, flush=True)
            return
        hello = _read(connection, _HELLO_SECONDS)
        if not isinstance(hello, dict) or hello.keys() != self._own.keys():
            connection.close()  # somebody else's program
            return
        self._error = self._objection(hello)
        self._here.setdefault(hello["process"], hello)
        self._connections.append(connection)

    def _objection(self, hello: dict) -> str:
        process, count, host = hello["process"], hello["processes"], hello["host"]
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


def _answer(hello: dict, host: str, port: int, deadline: float) -> str | None:
    """Say hello until process 0 sends the result: what is wrong, or ""; None if it never did."""
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
            return outcome["error"]
        time.sleep(_RETRY_SECONDS)
    return None


def _read(connection: socket.socket, seconds: float) -> object:
    """A line of JSON, or None."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("rb") as stream:
            return json.loads(stream.readline(4096))
    except (OSError, ValueError):
        return None


def is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False
