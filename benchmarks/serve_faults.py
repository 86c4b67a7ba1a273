"""What 1,000 connections that stall cost others: `python benchmarks/serve_faults.py --checkpoint runs/quickstart`.

A third of them say nothing, a third send a byte of a request's head each second, a third read a byte of the page each
second; those that the server drops come again. Clients that ask as fast as they are answered are timed with and
without them, turn and turn about; the first turn of each is left out.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

BODY = {"prompt": "The ", "max_tokens": 64, "temperature": 0}
PAGE = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--checkpoint", metavar="WHERE", required=True)
    flags.add_argument("--connections", type=int, default=1000)
    flags.add_argument("--clients", type=int, default=8)
    flags.add_argument("--turns", type=int, default=5)
    flags.add_argument("--seconds", type=float, default=10.0, help="of a turn [%(default)g]")
    flags.add_argument("--stall", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.stall:
        stall(arguments.stall, arguments.connections)
        return
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jaxgpt.serve", "--checkpoint", arguments.checkpoint, "--port", "0"], stderr=log
        )
        try:
            compare(arguments, server, wait_until_ready(server, log))
            server.send_signal(signal.SIGTERM)
            print(f"exit code {server.wait(40)} after SIGTERM")
        finally:
            server.kill()
            server.wait()


def wait_until_ready(server: subprocess.Popen, log) -> int:
    """The port."""
    for _ in range(6000):
        log.seek(0)
        found = re.search(r"listening on http://\S+:(\d+)\n", text := log.read())
        if found and "ready after" in text:
            return int(found[1])
        if server.poll() is not None:
            sys.exit(text)
        time.sleep(0.1)
    sys.exit("the server was not ready after 600 s")


def compare(arguments: argparse.Namespace, server: subprocess.Popen, port: int) -> None:
    asked, speeds = ask(port, arguments.clients, 1.0), {False: [], True: []}
    print(f"warm: {asked:.1f} answers a second; {held(server)}")
    for _ in range(arguments.turns):
        for stalled in speeds:
            with stalling(port, arguments.connections) if stalled else contextlib.nullcontext():
                speeds[stalled].append(ask(port, arguments.clients, arguments.seconds))
                print(f"{arguments.connections if stalled else 0} stall: {speeds[stalled][-1]:.1f}; {held(server)}")
    alone, beside = (statistics.median(values[1:] or values) for values in speeds.values())
    cost = 100 * (1 - beside / alone)
    print(f"median: {alone:.1f} answers a second alone, {beside:.1f} beside: {cost:.1f} % less")


def ask(port: int, clients: int, seconds: float) -> float:
    """Answers a second."""
    content, until, answered = json.dumps(BODY), time.monotonic() + seconds, [0] * clients

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.monotonic() < until:
            connection.request("POST", "/v1/completions", content)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
            answered[number] += 1
        connection.close()

    threads = [threading.Thread(target=client, args=[number]) for number in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(answered) / (time.monotonic() - began)


def held(server: subprocess.Popen) -> str:
    folder = Path(f"/proc/{server.pid}")
    [memory] = re.findall(r"VmRSS:\s+(\d+) kB", (folder / "status").read_text())
    return f"the server holds {len(os.listdir(folder / 'fd'))} files and {int(memory) / 1024:.0f} MiB"


@contextlib.contextmanager
def stalling(port: int, connections: int):
    """In a process of its own, which takes no time from the clients' interpreter."""
    command = [sys.executable, __file__, "--checkpoint", "none", "--stall", str(port)]
    process = subprocess.Popen([*command, "--connections", str(connections)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()  # all are there
        yield
    finally:
        process.kill()
        process.wait()


def stall(port: int, count: int) -> None:
    """Until killed, at most an hour."""
    connections = [begin(port, number) for number in range(count)]
    print("begun", flush=True)
    for _ in range(3600):
        began = time.monotonic()
        for number, connection in enumerate(connections):
            try:
                if number % 3 == 1:
                    connection.send(b"G")
                if connection.recv(1) == b"":
                    raise ConnectionError
            except BlockingIOError:
                pass
            except ConnectionError:
                connection.close()
                connections[number] = begin(port, number)
        time.sleep(max(0.0, 1 - (time.monotonic() - began)))


def begin(port: int, number: int) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", port))
    if number % 3 == 2:
        connection.send(PAGE)
    connection.setblocking(False)
    return connection


if __name__ == "__main__":
    main()
