"""Servers to test, with tiny models, and a plain client.

    pytest_plugins = ["serving"]            # in a test file, for the fixtures below (PYTEST_DONT_REWRITE: no warning)

    def test_...(base_server):              # no chat template; two API keys: serving.KEYS; CORS for serving.ORIGIN
        assert base_server.post("/v1/completions", prompt="Hi", max_tokens=3).json["choices"]

Fixtures, one each for a whole pytest process:
    base_server, chat_server: applications of this process behind real sockets (`serving.threaded`). `chat_server` has
        no keys, and a system message. Both are compiled once, and nobody may fill their queue for good.
    small: an engine of this process that a test can hold still:

        with serving.threaded(small.app(request_seconds=0.2)) as server, small.held():
            assert server.post("/v1/completions", prompt="Hi").status == 504

    base_checkpoint, chat_checkpoint: the run folders of the same models.
    chat_process: `python -m jaxgpt.serve` as a process of its own, for tests of the system tier. Nobody may stop it.

A test that needs other flags, or harms its server, starts a process:

    with serving.started(chat_checkpoint, "--slots", "2") as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.code() == 0
"""

import contextlib
import dataclasses
import functools
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import wait_for
from tiny import save_as_run

from jaxgpt.config import Config
from jaxgpt.data.chat import with_chat_tokens
from jaxgpt.data.tokenizer import Tokenizer, train_bpe
from jaxgpt.inference.decoder import build_decoder
from jaxgpt.inference.engine import Engine
from jaxgpt.inference.prompts import token_bytes
from jaxgpt.model import gpt2
from jaxgpt.serving.served_model import ServedModel
from jaxgpt.settings import ChatConfig, ModelConfig, TrainConfig
from jaxgpt.training.models import LoadedModel, export_model

KEYS = ("first-key-9f3c", "second-key-77ab")
ORIGIN = "https://chat.example.com"
SYSTEM = "Be kind."
BASE_NAME, CHAT_NAME = "tiny-base", "tiny-chat"
SLOTS = 4  # all engines of a pytest process have one shape, so that they are compiled once
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=128, dtype="float32")
TEXTS = ["中文 and more 中国", "你好，世界！", "😀🙂😉", "👍🏽 ñandú", "the end of the text", "naïve café"]
LIKELY = "中你😀ñé he。\n"
"""Characters whose bytes the models write most of the time, one by one or joined: parts of characters, and whole."""


# ---------------------------------------------------------------- models


def make_tokenizer(chat: bool = False) -> Tokenizer:
    """Bytes, and some joined ones: parts of characters, characters, parts of words."""
    tokenizer = train_bpe(TEXTS * 4, 300)
    # As many tokens in either: what was compiled for one model then serves the other.
    return with_chat_tokens(tokenizer) if chat else tokenizer.with_special_tokens(["<|one|>", "<|two|>"])


def make_model(
    chat: bool = False, config: ModelConfig = MODEL, seed: int = 0, cache: Path | None = None
) -> LoadedModel:
    """Random weights with which tokens of LIKELY's bytes come most, and others (the end-of-text token too) seldom.

    `cache` is where the server keeps compiled programs; None: nowhere.
    """
    tokenizer, draw = make_tokenizer(chat), np.random.default_rng(seed)
    _, shapes, _ = gpt2.abstract_model(config, tokenizer.vocab_size)
    params = jax.tree.map_with_path(
        lambda path, s: np.float32(path[-1].key == "scale") + 0.15 * draw.standard_normal(s.shape, np.float32), shapes
    )
    direction = draw.standard_normal(config.n_embd).astype(np.float32)
    direction /= np.linalg.norm(direction)
    params["wte"][likely_tokens(tokenizer)] += 0.6 * direction
    params["ln_f"]["bias"] = 5 * direction
    train = TrainConfig(compilation_cache_dir=str(cache or ""))
    settings = Config(model=config, train=train, chat=ChatConfig(system=SYSTEM))
    return LoadedModel(settings, tokenizer.vocab_size, params, tokenizer, 0)


def likely_tokens(tokenizer: Tokenizer) -> list[int]:
    parts = {text.encode()[i:j] for text in LIKELY for i in range(4) for j in range(i + 1, 5)}
    return [token for token in range(tokenizer.vocab_size) if token_bytes(tokenizer, token) in parts]


def save_huggingface(folder: Path, model: LoadedModel) -> Path:
    export_model(folder, model.config.model, model.vocab_size, model.params, model.tokenizer)
    return folder


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Path:
    """Where the servers of this pytest process keep compiled programs: one compiles, the others read."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def base_checkpoint(tmp_path_factory, compiled) -> Path:
    path = tmp_path_factory.mktemp("base") / BASE_NAME
    save_as_run(path, make_model(cache=compiled))
    return path


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory, compiled) -> Path:
    path = tmp_path_factory.mktemp("chat") / CHAT_NAME
    save_as_run(path, make_model(chat=True, cache=compiled))
    return path


# ---------------------------------------------------------------- servers


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @functools.cached_property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        """What an error body says: message, type, param, code."""
        assert self.status >= 400 and list(self.json) == ["error"], self.body
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def events(self) -> list[dict]:
        """The JSON of a stream's events, which [DONE] ends; comments are left out."""
        assert self.headers["content-type"].startswith("text/event-stream"), self.body
        lines = [line for line in self.text.split("\n\n") if line and not line.startswith(":")]
        assert lines[-1] == "data: [DONE]", lines[-1]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@dataclasses.dataclass
class Server:
    """Where a server answers; `key` is sent with each request."""

    port: int
    key: str | None = None
    process: subprocess.Popen | None = None
    log: Path | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
        seconds: float = 60,
    ) -> Answer:
        """One request on a connection of its own. `headers` may replace the key."""
        own = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        with contextlib.closing(connection):
            connection.request(method, path, content, own | (headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, **fields) -> Answer:
        return self.post_json(path, fields)

    def post_json(self, path: str, content: object) -> Answer:
        return self.ask("POST", path, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def output(self) -> str:
        """What the process wrote so far, on both channels."""
        return self.log.read_text(encoding="utf-8")

    def code(self, seconds: float = 30) -> int:
        return self.process.wait(seconds)


@contextlib.contextmanager
def started(
    checkpoint: Path,
    *flags: str,
    key: str | None = None,
    environment: dict[str, str] | None = None,
    wait: bool = True,
    python: Sequence[str] = (sys.executable,),
) -> Iterator[Server]:
    """A process that serves `checkpoint` on a free port; with `wait`, until it is ready. It is killed at the end."""
    log = checkpoint.parent / f"log-{os.urandom(4).hex()}.txt"
    command = [*python, "-m", "jaxgpt.serve", "--checkpoint", str(checkpoint), "--port", "0", *flags]
    settings = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONUTF8": "1"}
    settings.pop("JAXGPT_API_KEYS", None)
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=settings | (environment or {}))
    try:
        server = Server(_port(process, log), key, process, log)
        while wait and server.get("/ready").status != 200:
            assert process.poll() is None, server.output()
            time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()


def _port(process: subprocess.Popen, log: Path, seconds: float = 120) -> int:
    until = time.monotonic() + seconds
    while not (found := re.search(r"listening on http://\S+:(\d+)\n", log.read_text(encoding="utf-8"))):
        assert process.poll() is None and time.monotonic() < until, log.read_text(encoding="utf-8")
        time.sleep(0.05)
    return int(found[1])


@pytest.fixture(scope="session")
def chat_process(chat_checkpoint) -> Iterator[Server]:
    with started(chat_checkpoint, "--queue", "256", environment={"JAX_LOG_COMPILES": "1"}) as server:
        yield server


@contextlib.contextmanager
def threaded(app, key: str | None = None) -> Iterator[Server]:
    """An application of this process, behind real sockets."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), name="app", daemon=True)
    thread.start()
    try:
        yield Server(listener.getsockname()[1], key)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@contextlib.contextmanager
def served(model: LoadedModel, name: str, system: str = "", key: str | None = None, **options) -> Iterator[Server]:
    """An application for `model` with the settings of `jaxgpt.serving.app.Options`."""
    from jaxgpt.serving.app import Options, build_app

    with Engine(decoder_of(model), SLOTS, queue=256) as engine:
        served_model = ServedModel(name, model.tokenizer, model.config.model.n_positions, 0, 0, system, engine)
        with threaded(build_app(served_model, Options(**options))[0], key) as server:
            yield server


def decoder_of(model: LoadedModel):
    params, end_of_text = jax.device_put(model.params), model.tokenizer.end_of_text
    return build_decoder(model.config.model, model.vocab_size, params, end_of_text, rows=SLOTS)


@pytest.fixture(scope="session")
def base_server() -> Iterator[Server]:
    with served(make_model(), BASE_NAME, key=KEYS[0], keys=KEYS, cors_origins=[ORIGIN]) as server:
        yield server


@pytest.fixture(scope="session")
def chat_server() -> Iterator[Server]:
    with served(make_model(chat=True), CHAT_NAME, SYSTEM) as server:
        yield server


# ---------------------------------------------------------------- an engine of this process


@dataclasses.dataclass
class Small:
    """Two places in the queue."""

    served: ServedModel
    engine: Engine

    def app(self, **options):
        """An application with the settings of `jaxgpt.serving.app.Options`; several may have the same engine."""
        from jaxgpt.serving.app import Options, build_app

        return build_app(self.served, Options(**options))[0]

    @contextlib.contextmanager
    def held(self) -> Iterator[threading.Event]:
        """The engine makes nothing until the end of the block, or until the event is set.

        To be used inside of `threaded`: at the end it waits until the engine has told the application of all ends.
        """
        go, make = threading.Event(), self.engine._make_chunk
        self.engine._make_chunk = lambda: (go.wait(60), make())
        try:
            yield go
        finally:
            self.engine._make_chunk = make
            go.set()
            wait_for(lambda: not self.engine.running and not self.engine.waiting)

    @contextlib.contextmanager
    def full(self, server: Server) -> Iterator[threading.Event]:
        """`held`, and requests to `server` (of this engine) have a slot and both places of the queue."""
        with ThreadPoolExecutor(3) as pool, self.held() as go:
            for waiting in range(3):
                pool.submit(server.post, "/v1/completions", prompt="Hi", max_tokens=8)
                wait_for(lambda waiting=waiting: (self.engine.running, self.engine.waiting) == (1, waiting))
            yield go


@pytest.fixture(scope="session")
def small() -> Iterator[Small]:
    model = make_model(chat=True)
    with Engine(decoder_of(model), SLOTS, queue=2) as engine:
        yield Small(ServedModel("small", model.tokenizer, MODEL.n_positions, 0, 0, engine=engine), engine)


# ---------------------------------------------------------------- many at once


def at_once(count: int, function: Callable[[int], object]) -> list:
    """What `function(number)` gives for each number below `count`, from 32 threads."""
    with ThreadPoolExecutor(min(count, 32)) as pool:
        return list(pool.map(function, range(count)))
