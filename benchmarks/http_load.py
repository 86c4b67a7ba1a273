"""The load of benchmarks/serve.py: many clients in one process, on one `epoll`, for it shares the server's cores.

Reads one job a line from stdin and writes what became of it, as JSON, to stdout. A job is {"port", "path", "bodies"}
and either {"clients", "count"}: so many clients, each of which sends its next request when it has its answer (closed
loop), or {"rate", "seconds"}: requests come at random at that rate, whatever becomes of them (open loop). With
{"clients", "seconds"} the closed loop begins no request after so many seconds.

The answer: {"seconds", "late", "answers"}; "late" is by how much the generator was behind its own plan (99th
percentile), an answer is [status, sent, first, end, tokens]: seconds from the beginning; "first" is the first event of
a stream, or the whole answer. Status 0: the connection broke.
"""

import collections
import gc
import itertools
import json
import random
import re
import resource
import select
import socket
import sys
import time

TOKENS = re.compile(rb'"(?:completion|new)_tokens": ?(\d+)')
MOST_CONNECTIONS = 4000
KEEP_SECONDS = 4.0  # uvicorn gives up a connection that is idle for 5; who uses it in that moment is cut off
PATIENCE = 120.0  # seconds without any answer: the server hangs


class Connection:
    """One connection, with one request at a time."""

    def __init__(self, address: tuple[str, int], poll: select.epoll):
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self._poll = poll
        poll.register(self.socket, select.EPOLLIN)

    def send(self, request: bytes) -> None:
        self.sent, self.first, self.received = time.perf_counter(), None, bytearray()
        self._ends_at = 0  # not known yet
        self._is_chunked = False
        self.socket.send(request)  # small enough for the kernel to take at once

    def read(self) -> bool:
        """Take what came; whether that was the end of the answer.

        Raises:
            ConnectionError: it was cut off.
        """
        part = self.socket.recv(65536)
        if not part:
            raise ConnectionError
        self.received += part
        if not self._ends_at and not self._read_head():
            return False
        if self._is_chunked:
            if self.first is None and self.received.find(b"data: ", self._body) >= 0:
                self.first = time.perf_counter()
            return self.received.endswith(b"\r\n0\r\n\r\n")
        return len(self.received) >= self._ends_at

    def _read_head(self) -> bool:
        self._body = self.received.find(b"\r\n\r\n") + 4
        if self._body < 4:
            return False
        head = bytes(self.received[: self._body]).lower()
        self.status = int(head[9:12])
        self._is_chunked = b"transfer-encoding: chunked" in head
        self._ends_at = self._body
        if not self._is_chunked:
            self._ends_at += int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        self.stays = head.startswith(b"http/1.1") and b"connection: close" not in head
        return True

    def answer(self, began: float) -> list:
        end = time.perf_counter()
        found = TOKENS.findall(self.received, self._body)
        tokens = int(found[-1]) if found and self.status == 200 else 0
        times = (self.sent, self.first or end, end)
        return [self.status, *(round(moment - began, 6) for moment in times), tokens]

    def close(self) -> None:
        self._poll.unregister(self.socket)
        self.socket.close()


class Load:
    """One job."""

    def __init__(self, job: dict):
        self._address = ("127.0.0.1", job["port"])
        head = f"POST {job['path']} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        texts = [json.dumps(body).encode() for body in job["bodies"]]
        requests = [f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text for text in texts]
        self._requests = itertools.cycle(requests)
        self._poll = select.epoll()
        self._busy: dict[int, Connection] = {}
        self._free: collections.deque[Connection] = collections.deque()
        self.answers: list[list] = []
        self.late: list[float] = []

    def closed(self, clients: int, count: int | None, seconds: float | None) -> None:
        self._began = time.perf_counter()
        left = count or sys.maxsize
        until = self._began + (seconds or 1e9)
        while self._busy or left:
            while left and len(self._busy) < clients:
                self._send()
                left -= 1
            self._read(1.0)
            if time.perf_counter() > until:
                left = 0
        self._end()

    def open(self, rate: float, seconds: float) -> None:
        draw = random.Random(0)
        self._began = due = time.perf_counter()
        until = self._began + seconds
        while self._busy or due < until:
            now = time.perf_counter()
            while due < until and due <= now:
                if len(self._busy) < MOST_CONNECTIONS:
                    self._send()
                    self.late.append(time.perf_counter() - due)
                due += draw.expovariate(rate)
            self._read(max(due - time.perf_counter(), 0) if due < until else 1.0)
        self._end()

    def _send(self) -> None:
        while self._free and time.perf_counter() - self._free[0].used > KEEP_SECONDS:
            self._free.popleft().close()
        connection = self._free.pop() if self._free else Connection(self._address, self._poll)
        connection.send(next(self._requests))
        self._busy[connection.socket.fileno()] = connection

    def _read(self, patience: float) -> None:
        ready = self._poll.poll(patience)
        if ready:
            self._heard = time.perf_counter()
        elif self._busy and time.perf_counter() - getattr(self, "_heard", self._began) > PATIENCE:
            raise SystemExit("the server does not answer")
        for number, _ in ready:
            connection = self._busy.get(number)
            if connection is None:  # the server gave up a connection that nobody used
                self._forget(number)
                continue
            try:
                if not connection.read():
                    continue
            except (ConnectionError, ValueError):
                now = round(time.perf_counter() - self._began, 6)
                self.answers.append([0, round(connection.sent - self._began, 6), now, now, 0])
                connection.stays = False
            else:
                self.answers.append(connection.answer(self._began))
            del self._busy[number]
            if connection.stays:
                connection.used = time.perf_counter()
                self._free.append(connection)
            else:
                connection.close()

    def _forget(self, number: int) -> None:
        for connection in [one for one in self._free if one.socket.fileno() == number]:
            self._free.remove(connection)
            connection.close()

    def _end(self) -> None:
        for connection in self._free:
            connection.close()
        self._poll.close()


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for line in sys.stdin:
        job = json.loads(line)
        load = Load(job)
        gc.disable()
        if "rate" in job:
            load.open(job["rate"], job["seconds"])
        else:
            load.closed(job["clients"], job.get("count"), job.get("seconds"))
        gc.enable()
        late = sorted(load.late)[int(0.99 * len(load.late))] if load.late else 0.0
        seconds = max((answer[3] for answer in load.answers), default=0.0)
        print(json.dumps({"seconds": seconds, "late": late, "answers": load.answers}), flush=True)


if __name__ == "__main__":
    main()
