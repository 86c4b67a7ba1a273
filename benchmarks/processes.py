"""The processes of benchmarks/serve.py: workers that take jobs, and servers on a free port."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import time
from pathlib import Path


class Worker:
    """A process that answers one line of JSON with another, and waits between them."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, job: dict) -> dict:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker died; its error stands above")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        self.process.stdin.close()
        self.process.wait()


class Server:
    """A server that was started on a free port, and is stopped at the end; its log is in a file."""

    def __init__(self, command: list[str], folder: Path, name: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._log = (folder / f"{name}.log").open("w+", encoding="utf-8")
        command = [part.replace("PORT", str(self.port)) for part in command]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self._name = name

    def __enter__(self) -> "Server":
        until = time.monotonic() + 300
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > until:
                self._log.seek(0)
                self.process.kill()
                raise SystemExit(f"{self._name} did not start:\n{self._log.read()[-2000:]}")
            time.sleep(0.1)
        return self

    def _is_ready(self) -> bool:
        try:
            return self.get("/ready")[0] == 200
        except OSError:
            return False

    def get(self, path: str) -> tuple[int, float]:
        """(status, seconds), on a connection of its own."""
        began = time.perf_counter()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
        return response.status, time.perf_counter() - began

    def memory(self) -> int:
        """Bytes that it has in memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def __exit__(self, *exception) -> None:
        self.process.terminate()
        self.process.wait()
        self._log.close()
