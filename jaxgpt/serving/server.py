"""A server from start to end: listen at once, compile, answer, and on SIGTERM finish what is under way.

A server listens before its model is compiled, so that whoever watches it sees "loading" and not a refused connection.
"""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import gc
import logging
import os
import re
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxgpt.errors import EXIT_DONE, RunFailed, UserError
from jaxgpt.inference.engine import Engine
from jaxgpt.serving.app import Options, build_app
from jaxgpt.serving.middleware import MAX_HEADER_BYTES, read_keys
from jaxgpt.serving.served_model import ServedModel, ServeOptions, load

logger = logging.getLogger("jaxgpt.serve")

HEADER_SECONDS = 10.0  # a connection on which no request begins is dropped
SEND_SECONDS = 30.0  # a client that reads nothing for this long is dropped
END_SECONDS = 5.0  # for the engine to end the current chunk
POLL_SECONDS = 0.05
FAILURE_SECONDS = 1.0  # between a failure and the exit: clients get their errors, and a probe sees it
CONNECTIONS = 65536
LOCAL = ("127.0.0.1", "::1", "localhost")


def run(options: ServeOptions) -> int:
    """Load a model and serve it until a signal comes; returns the exit code.

    Raises:
        UserError: an option is wrong, or there is no such model.
    """
    check_options(options)
    keys = read_keys(options.api_key_file)
    listener = listen(options.host, options.port)
    model, build = load(options)
    # A library may have set up the root logger when it was imported: `force` replaces its handlers.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    print(f"listening on http://{options.host}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    if not keys and options.host not in LOCAL:
        print("warning: no API keys: whoever reaches this port may use the model", file=sys.stderr)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a connection is a file, and many systems allow 1,024 of them
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, CONNECTIONS)), hard))
    clients = Options(keys, options.open, options.cors_origin, options.request_seconds)
    try:
        asyncio.run(_Lifetime(listener, model, clients, build, options.drain_seconds).run())
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def check_options(options: ServeOptions) -> None:
    """Refuse wrong options before anything is read.

    Raises:
        UserError: names the option and its limits.
    """
    if not 0 <= options.port < 65536:
        raise UserError(f"--port {options.port}: it must be between 0 and 65535")
    for name in ("slots", "queue", "chunk", "request_seconds"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: it must be more than 0")
    if options.drain_seconds < 0:
        raise UserError(f"--drain-seconds {options.drain_seconds:g}: it must be 0 or more")
    for origin in options.cors_origin:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):  # an extension's page has a scheme of its own
            raise UserError(f"--cors-origin {origin}: it must be like https://example.com, without a / at its end")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, made before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; choose another one") from None
    return listener


# ---------------------------------------------------------------- connections on which nothing moves


class _Watch:
    """Drops a connection on which no request begins, or whose client reads nothing: uvicorn waits for both for ever."""

    def __init__(self, transport: asyncio.Transport):
        self._transport, self._loop = transport, asyncio.get_running_loop()
        self._requests, self._unread, self._moved_at = 0, 0, self._loop.time()
        self._look()

    def count(self, requests: int) -> None:
        """Add to the requests that the application works on."""
        self._requests, self._moved_at = self._requests + requests, self._loop.time()

    def end(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        unread, now = self._transport.get_write_buffer_size(), self._loop.time()
        if unread != self._unread:
            self._unread, self._moved_at = unread, now
        patience = SEND_SECONDS if unread else HEADER_SECONDS
        if (unread or not self._requests) and now - self._moved_at >= patience:
            self._transport.abort()  # `close` would wait until all is read
        else:
            self._timer = self._loop.call_later(HEADER_SECONDS / 4, self._look)


_WATCH: contextvars.ContextVar[_Watch] = contextvars.ContextVar("watch of the connection")


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a watch on each connection; only methods of asyncio.Protocol are extended."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's type
        super().connection_made(transport)
        self._watch = _Watch(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch.end()

    def data_received(self, data: bytes) -> None:
        _WATCH.set(self._watch)  # the tasks of the requests that the data begins inherit it
        super().data_received(data)


def _watched(app: ASGIApp) -> ASGIApp:
    """The application, with each request counted by the watch of its connection."""

    async def counting(scope: Scope, receive: Receive, send: Send) -> None:
        watch = _WATCH.get()
        watch.count(1)
        try:
            await app(scope, receive, send)
        finally:
            watch.count(-1)

    return counting


# ---------------------------------------------------------------- start, signals, end


class _Server(uvicorn.Server):
    """uvicorn's server, which a signal ends only when `_Lifetime` says so."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]):
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, *_: object) -> None:
        self._on_signal()


class _Lifetime:
    """One server from start to end; `build` compiles the engine on another thread while the server answers."""

    def __init__(
        self,
        listener: socket.socket,
        model: ServedModel,
        options: Options,
        build: Callable[[], Engine],
        drain_seconds: float,
    ):
        app, self._routes = build_app(model, options)
        self._listener, self._model, self._build, self._drain_seconds = listener, model, build, drain_seconds
        config = uvicorn.Config(
            _watched(app),
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,  # the middleware writes one, without what a query may hold
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=2,
        )
        self._server = _Server(config, self._on_signal)
        self._signals = 0

    async def run(self) -> None:
        """Serve until a signal comes, then finish what is under way; RunFailed if the engine fails."""
        answering = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        try:
            await self._until_signal()
            await self._drain()
        finally:
            self._model.stopping = True
            await self._end_engine()
            self._server.should_exit = True
            while not answering.done() and self._signals < 2:
                await asyncio.wait([answering], timeout=POLL_SECONDS)
            answering.cancel()  # after a second signal nothing is waited for
            with contextlib.suppress(asyncio.CancelledError):
                await answering

    def _on_signal(self) -> None:
        self._signals += 1
        self._model.stopping = True

    async def _until_signal(self) -> None:
        began, built = time.perf_counter(), self._start_building()
        while not self._signals:
            if self._model.engine is None and built.done():
                self._model.engine = built.result()
                logger.info("ready after %.1f s", time.perf_counter() - began)
            await self._raise_failure()
            await asyncio.sleep(POLL_SECONDS)

    def _start_building(self) -> concurrent.futures.Future[Engine]:
        """The engine, built by a thread that does not keep the process from ending."""
        built: concurrent.futures.Future[Engine] = concurrent.futures.Future()

        def build() -> None:
            try:
                engine = self._build()
                gc.collect()
                _prefer_main_thread()
                gc.freeze()  # jax's 300,000 objects stay: to collect them again would stop all clients for 0.2 s
                built.set_result(engine)
            except Exception as error:  # noqa: BLE001 - raised again where the server waits for it
                built.set_exception(error)

        threading.Thread(target=build, name="build", daemon=True).start()
        return built

    async def _raise_failure(self) -> None:
        """Raise what ended the engine, after a moment in which /health reports it."""
        failure = self._model.engine.failure if self._model.engine else None
        if failure is not None:
            await asyncio.sleep(FAILURE_SECONDS)
            raise RunFailed(f"the engine: {type(failure).__name__}: {failure}") from failure

    async def _drain(self) -> None:
        under_way = self._routes.under_way
        logger.info("stopping: %d requests under way, %g s for them at most", under_way, self._drain_seconds)
        until = time.monotonic() + self._drain_seconds
        while self._routes.under_way and time.monotonic() < until and self._signals == 1:
            await self._raise_failure()
            await asyncio.sleep(POLL_SECONDS)
        if self._routes.under_way:
            logger.warning("%d requests are cut off", self._routes.under_way)

    async def _end_engine(self) -> None:
        until, engine = time.monotonic() + END_SECONDS, self._model.engine
        while engine and not engine.close(seconds=0) and time.monotonic() < until and self._signals < 2:
            await asyncio.sleep(POLL_SECONDS)


def _prefer_main_thread() -> None:
    """Give all threads but the main one a lower priority.

    XLA's threads fill all cores with long work; a refusal or a probe that waits behind them would take as long.
    """
    with contextlib.suppress(OSError):  # not Linux
        for thread in map(int, os.listdir("/proc/self/task")):
            if thread != os.getpid():
                os.setpriority(os.PRIO_PROCESS, thread, 5)
