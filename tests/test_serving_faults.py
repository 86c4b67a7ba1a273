"""Clients that vanish or stall, signals, and an engine that breaks: nothing leaks, nobody waits for ever.

Run as a program, this file is the server with faults: `python tests/test_serving_faults.py FOLDER -m jaxgpt.serve ...`.
"""

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import serving

pytest_plugins = ["serving"]
pytestmark = pytest.mark.system

SHORT = 1.0  # seconds; stands for the server's patience of 10 to 120
BODY = {"prompt": "Hi", "max_tokens": 100, "temperature": 1, "seed": 5}
STREAM = BODY | {"stream": True}


# ---------------------------------------------------------------- a server with faults


def serve_with_faults(folder: Path) -> None:
    """What is broken is what has a file in the folder; SIGUSR1 writes there what is alive."""
    import asyncio
    import gc

    from jaxgpt.inference import engine, slots
    from jaxgpt.serving import generated_texts, middleware, served_model, server

    server.HEADER_SECONDS = server.SEND_SECONDS = middleware.BODY_SECONDS = SHORT
    served_model.STUCK_SECONDS = 1.5
    sound = slots.decode_chunk, slots.empty_slots

    def decode_chunk(*arguments):
        if (folder / "slow").exists():
            time.sleep(float((folder / "slow").read_text()))
        while (folder / "stuck").exists():
            time.sleep(0.01)
        if (folder / "broken").exists():
            raise RuntimeError("the device is gone")
        return sound[0](*arguments)

    def empty_slots(*arguments):
        if (folder / "no-memory").exists():
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return sound[1](*arguments)

    def count(*_) -> None:
        gc.collect()
        kinds = (generated_texts.Generation, engine.Ticket, server._Protocol)
        alive = {kind.__name__: sum(isinstance(one, kind) for one in gc.get_objects()) for kind in kinds}
        alive["tasks"] = len(asyncio.all_tasks())
        (folder / "new").write_text(json.dumps(alive))
        os.replace(folder / "new", folder / "alive")

    slots.decode_chunk, slots.empty_slots = decode_chunk, empty_slots
    signal.signal(signal.SIGUSR1, count)
    runpy.run_module("jaxgpt.serve", run_name="__main__", alter_sys=True)


@dataclasses.dataclass
class Faulty(serving.Server):
    """A server whose parts can be broken."""

    folder: Path | None = None

    @contextlib.contextmanager
    def fault(self, name: str, value: object = "") -> Iterator[None]:
        (self.folder / name).write_text(str(value))
        yield
        (self.folder / name).unlink()

    def figure(self, name: str) -> float:
        return float(re.search(rf"^jaxgpt_{name} (\S+)$", self.get("/metrics").text, re.MULTILINE)[1])

    def held(self) -> dict[str, int]:
        """How many files, tasks and objects of a request the process has."""
        (self.folder / "alive").unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: (self.folder / "alive").exists())
        alive = json.loads((self.folder / "alive").read_text())
        return alive | {"files": self.files()}

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def begin(self, count: int, body: dict) -> list[Future]:
        """The answers to requests of which no more than the slots can take are under way."""
        pool = ThreadPoolExecutor(count)
        answers = [pool.submit(self.post, "/v1/completions", **body) for _ in range(count)]
        pool.shutdown(wait=False)
        return answers

    def stop(self, number: int = signal.SIGTERM) -> float:
        """When the signal was sent."""
        self.process.send_signal(number)
        return time.monotonic()


def wait_for(condition, seconds: float = 30) -> float:
    """How long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, "waited in vain"
        time.sleep(0.01)
    return time.monotonic() - began


@contextlib.contextmanager
def faulty(checkpoint: Path, folder: Path, *flags: str, wait: bool = True, **faults) -> Iterator[Faulty]:
    for name, value in faults.items():
        (folder / name.replace("_", "-")).write_text(str(value))
    python = (sys.executable, __file__, str(folder))
    with serving.started(checkpoint, *flags, wait=wait, python=python) as server:
        yield Faulty(server.port, None, server.process, server.log, folder)


@pytest.fixture(scope="module")
def server(base_checkpoint, tmp_path_factory):
    with faulty(base_checkpoint, tmp_path_factory.mktemp("faults"), slow=0.02) as server:
        server.post("/v1/completions", **STREAM)  # threads and modules that come with the first request
        yield server


@pytest.fixture
def leaks_nothing(server):
    """The server holds what it held before and gives the answers that it gave before."""
    ask = lambda: server.post("/v1/completions", **BODY).json["choices"]
    before = ask()
    wait_for(lambda: server.held()["_Protocol"] == 0)
    held = server.held()
    yield
    wait_for(lambda: server.figure("requests_running") == server.figure("requests_waiting") == 0)
    assert ask() == before
    wait_for(lambda: server.held() == held)


def request(path: str, body: dict) -> bytes:
    content = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def connect(server, receives: int = 0) -> socket.socket:
    """`receives`: bytes that its system takes before it reads."""
    connection = socket.socket()
    connection.settimeout(20)
    if receives:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
    connection.connect(("127.0.0.1", server.port))
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    content = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while new := connection.recv(65536):
            content += new
    return bytes(content)


# ---------------------------------------------------------------- clients that vanish


def vanish(server, number: int) -> None:
    """Leave at a random point: while the request is sent, while it waits, in the middle of the answer."""
    draw = random.Random(number)
    path = draw.choice(["/v1/completions", "/v1/completions", "/generate"])
    body = {"prompt": "Hi", "seed": number} | (
        {"max_new_tokens": 100, "num_return_sequences": draw.choice([1, 3])}
        if path == "/generate"
        else {"max_tokens": 100, "stream": draw.random() < 0.7, "n": draw.choice([1, 1, 3])}
    )
    content = request(path, body)
    with connect(server) as connection:
        if draw.random() < 0.5:  # a reset instead of an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if draw.random() < 0.2:
            connection.sendall(content[: draw.randrange(len(content))])
            time.sleep(draw.choice([0, 0.05]))
            return
        connection.sendall(content)
        time.sleep(draw.choice([0, 0.02, 0.1, 0.2]))
        if body.get("stream") and draw.random() < 0.5:
            connection.recv(draw.randrange(1, 2000))


def test_clients_that_vanish_leave_nothing_behind(server, leaks_nothing):
    left, most, ended = server.figure("client_disconnects_total"), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            most[0] = max(most[0], server.figure("requests_waiting"))

    watching = threading.Thread(target=watch)
    watching.start()
    serving.at_once(300, functools.partial(vanish, server))
    ended.set()
    watching.join()
    assert most[0] > 0  # some vanished out of the queue
    wait_for(lambda: server.figure("client_disconnects_total") > left + 20)


@pytest.mark.parametrize("stream", [True, False])
def test_the_slot_of_a_client_that_left_is_free_within_a_chunk(server, leaks_nothing, stream):
    with server.fault("slow", 0.1):
        made = server.figure("engine_tokens")
        with connect(server) as connection:
            connection.sendall(request("/v1/completions", BODY | {"stream": stream}))
            wait_for(lambda: server.figure("engine_tokens") > made)
        wait_for(lambda: server.figure("requests_running") == 0)
        assert server.figure("engine_tokens") - made <= 3 * 8  # the first, the one in hand, and one of luck; not 100
    (server.folder / "slow").write_text("0.02")


# ---------------------------------------------------------------- clients that stall


def test_connections_on_which_nothing_moves_are_dropped_while_others_are_answered(server, leaks_nothing):
    expected = server.post("/v1/completions", **BODY).json["choices"]
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(100)]
        slow = [stack.enter_context(connect(server)) for _ in range(100)]
        began = time.monotonic()
        while time.monotonic() < began + 0.8 * SHORT:
            for connection in slow:
                connection.sendall(b"G")
            assert server.post("/v1/completions", **BODY).json["choices"] == expected
        assert all(read_to_end(connection) == b"" for connection in silent + slow)
        assert time.monotonic() < began + 3 * SHORT


def test_what_comes_after_the_first_request_is_not_waited_for_either(server, leaks_nothing):
    too_long = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\n\r\n"
    for first, status in ((b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", b"200"), (too_long, b"413")):
        with connect(server) as connection:
            connection.sendall(first)
            assert status in connection.recv(4096)
            connection.sendall(b"P")  # of a next request, or of the body
            began = time.monotonic()
            read_to_end(connection)
            assert time.monotonic() < began + 3 * SHORT


def test_a_body_that_does_not_come_is_a_408(server, leaks_nothing):
    with connect(server) as connection:
        connection.sendall(request("/v1/completions", BODY)[:-3])
        answer = read_to_end(connection)  # and the connection is closed
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"slow_body"' in answer


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_dropped(server, leaks_nothing, stream):
    body = BODY | {"n": 16, "logprobs": 20, "prompt": ["a", "b", "c", "d"], "stream": stream}
    whole = len(server.post("/v1/completions", **body).body)
    wait_for(lambda: server.held()["_Protocol"] == 0)
    files = server.held()["files"]
    with connect(server, receives=2048) as connection:
        connection.sendall(request("/v1/completions", body))
        wait_for(lambda: server.figure("requests_running") > 0)
        wait_for(lambda: server.files() <= files)  # fewer where an earlier connection has ended meanwhile
        assert 0 < len(read_to_end(connection)) < whole


# ---------------------------------------------------------------- signals


def finish_reasons(answer: serving.Answer) -> list[str]:
    return [choice["finish_reason"] for event in answer.events for choice in event["choices"]]


def last_error(answer: serving.Answer) -> dict:
    """The error that ends a stream instead of [DONE]."""
    last = answer.text.split("\n\n")[-2]
    return json.loads(last.removeprefix("data: "))["error"]


def test_sigterm_truncates_none_of_32_streams(base_checkpoint, tmp_path):
    with faulty(base_checkpoint, tmp_path, slow=0.1) as server:
        streams = server.begin(32, STREAM)
        wait_for(lambda: server.figure("requests_running") == server.figure("requests_waiting") == 16)
        server.stop()
        time.sleep(0.1)
        assert server.get("/ready").json == {"status": "stopping"}
        refused = server.post("/v1/completions", **BODY)
        assert (refused.status, refused.error["code"]) == (503, "stopping") and refused.headers["retry-after"]
        assert server.get("/health").status == 200
        assert not any(stream.done() for stream in streams)
        texts = [finish_reasons(stream.result()) for stream in streams]  # .events checks that [DONE] came
        assert all(reasons[-1] == "length" and set(reasons[:-1]) == {None} for reasons in texts)
        assert server.code() == 0


def test_a_drain_ends_in_time_and_tells_those_it_cuts_off(base_checkpoint, tmp_path):
    with faulty(base_checkpoint, tmp_path, "--drain-seconds", "0.5", "--slots", "4", slow=1) as server:
        streams, whole = server.begin(5, STREAM), server.begin(2, BODY)
        wait_for(lambda: server.figure("requests_running") + server.figure("requests_waiting") == 7)
        sent = server.stop(signal.SIGINT)
        assert {last_error(stream.result())["code"] for stream in streams} == {"stopping"}
        assert {answer.result().status for answer in whole} == {503}
        assert server.code() == 0 and 0.5 < time.monotonic() - sent < 8  # all of it would take 26 s


def test_a_second_signal_ends_the_server_at_once(base_checkpoint, tmp_path):
    with faulty(base_checkpoint, tmp_path) as server:
        (tmp_path / "slow").write_text("30")
        [stream] = server.begin(1, STREAM)
        wait_for(lambda: server.figure("requests_running") == 1)
        with connect(server):  # an idle connection is not waited for
            server.stop()
            wait_for(lambda: server.get("/ready").status == 503)
            sent = server.stop()
            assert server.code() == 0 and time.monotonic() - sent < 2  # 0.3 s where nothing else runs
        assert stream.exception() or b"[DONE]" not in stream.result().body


def test_sigterm_ends_a_server_that_still_compiles(base_checkpoint):
    with serving.started(base_checkpoint, environment={"JAX_ENABLE_COMPILATION_CACHE": "0"}, wait=False) as server:
        ready = server.get("/ready")
        assert (ready.status, ready.json) == (503, {"status": "loading"})
        assert server.get("/health").status == 200
        refused = server.post("/v1/completions", **BODY)
        assert (refused.status, refused.error["code"]) == (503, "loading")
        server.process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        assert server.code() == 0 and time.monotonic() - sent < 4
        assert "Traceback" not in server.output()


# ---------------------------------------------------------------- an engine that breaks


def test_a_stuck_engine_is_unhealthy_until_it_moves_again(server, leaks_nothing):
    time.sleep(1.5)
    with server.fault("stuck"):
        [stream] = server.begin(1, STREAM)
        wait_for(lambda: server.figure("requests_running") == 1)
        assert server.get("/health").status == 200  # not yet, however long nobody has asked
        wait_for(lambda: server.get("/health").status == 503)
    assert finish_reasons(stream.result())[-1] == "length"
    assert server.get("/health").status == 200


def test_an_engine_that_cannot_be_built_ends_the_process(base_checkpoint, tmp_path):
    with faulty(base_checkpoint, tmp_path, wait=False, no_memory="") as server:
        assert server.code() == 1
        assert server.output().splitlines()[-1].endswith("RESOURCE_EXHAUSTED: out of memory")


def test_an_engine_that_fails_is_reported_and_ends_the_process(server):
    """The last test: it ends the server of this file."""
    with server.fault("slow", 0.1):
        streams, whole = server.begin(4, STREAM), server.begin(3, BODY)
        wait_for(lambda: server.figure("requests_running") + server.figure("requests_waiting") == 7)
        (server.folder / "broken").touch()
        assert wait_for(lambda: server.get("/health").status == 503) < 1.0
        refused = server.post("/v1/completions", **BODY)
        assert (refused.status, refused.error["code"]) == (503, "failed")
        assert {last_error(stream.result())["code"] for stream in streams} == {"engine_failed"}
        answers = [answer.result() for answer in whole]
        assert {(answer.status, answer.error["code"]) for answer in answers} == {(500, "engine_failed")}
        assert server.code() == 1
        lines = [line for line in server.output().splitlines() if line.startswith("failed: ")]
        assert lines == ["failed: the engine: RuntimeError: the device is gone"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    del sys.argv[1:4]  # with -m and its module
    serve_with_faults(folder)
