"""From start to end: listen at once, compile, answer, and on SIGTERM finish what is under way.

A server listens before its model is compiled, so that whoever watches it sees "loading" and not a refused connection.
On SIGTERM it says at once that it is not ready, refuses new work, lets the answers under way end, and ends itself.
"""

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxgpt.errors import RunFailed, UserError
from jaxgpt.inference.engine import Engine
from jaxgpt.serving.app import Options, build_app
from jaxgpt.serving.served_model import Served

logger = logging.getLogger("jaxgpt.serve")

HEADER_SECONDS = 10.0  # a connection on which no request begins is dropped
SEND_SECONDS = 30.0  # a client that reads nothing for so long has gone
END_SECONDS = 5.0  # for the engine to end the chunk in hand
LOOK_SECONDS = 0.05
LAST_WORD_SECONDS = 1.0  # after a failure: for clients to be told, and for a probe to see it
CONNECTIONS = 65536


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; found out before a model is loaded.

    Raises:
        UserError: the address is not this machine's, or another program has the port.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; choose another one") from None
    return listener


def serve(
    listener: socket.socket, served: Served, options: Options, build: Callable[[], Engine], drain_seconds: float
) -> None:
    """Answer requests until a signal comes; `build` compiles the engine on another thread meanwhile.

    Raises:
        RunFailed: the engine has failed; whatever `build` raises.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a connection is a file, and many systems allow 1,024 of them
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, CONNECTIONS)), hard))
    asyncio.run(_Life(listener, served, options, build, drain_seconds).run())


class _Protocol(H11Protocol):
    """uvicorn's, which waits for ever for a request to begin, and for a client to read its answer."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._state, self._since = (None, True, 0), self.loop.time()
        self._timer = self.loop.call_later(HEADER_SECONDS, self._drop_if_nothing_moves)

    def connection_lost(self, exc) -> None:
        super().connection_lost(exc)
        self._timer.cancel()

    def _drop_if_nothing_moves(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete or self.transport.is_closing()
        unread, now = self.transport.get_write_buffer_size(), self.loop.time()
        state = (self.cycle, waits, unread)
        if state != self._state:
            self._state, self._since = state, now
        patience = SEND_SECONDS if unread else HEADER_SECONDS
        if (waits or unread) and now - self._since >= patience:
            self.transport.abort()  # `close` would wait until all is read
        else:
            self._timer = self.loop.call_later(HEADER_SECONDS / 4, self._drop_if_nothing_moves)


class _Server(uvicorn.Server):
    """uvicorn's, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def _let_the_loop_go_first() -> None:
    """Have all threads but the main one wait for a core when there are too few: XLA's fill all cores with work that
    takes long, and a refusal or a probe that waits behind them takes as long."""
    with contextlib.suppress(OSError):  # not Linux
        for thread in map(int, os.listdir("/proc/self/task")):
            if thread != os.getpid():
                os.setpriority(os.PRIO_PROCESS, thread, 5)


class _Life:
    """One server from start to end."""

    def __init__(self, listener, served: Served, options: Options, build: Callable[[], Engine], drain_seconds: float):
        app, self._routes = build_app(served, options)
        self._listener, self._served, self._build, self._drain_seconds = listener, served, build, drain_seconds
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,  # the gate writes one, without what a query may hold
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )
        self._signals = 0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        answering = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        try:
            await self._until_told_to_stop(self._start_building(loop))
            await self._drain()
        finally:
            self._served.stopping = True
            await self._end_engine()
            self._server.should_exit = True
            await answering

    async def _end_engine(self) -> None:
        until, engine = time.monotonic() + END_SECONDS, self._served.engine
        while engine and not engine.close(seconds=0) and time.monotonic() < until and self._signals < 2:
            await asyncio.sleep(LOOK_SECONDS)

    def _on_signal(self) -> None:
        self._signals += 1
        self._served.stopping = True
        if self._signals > 1:
            self._server.force_exit = True
            for connection in list(self._server.server_state.connections):  # asyncio would wait for them
                connection.transport.abort()

    def _start_building(self, loop) -> asyncio.Future:
        """The engine, from a thread that does not keep the process from ending."""
        built = loop.create_future()

        def set_result(set_it: Callable, value) -> None:
            if not built.done():
                set_it(value)

        def build() -> None:
            try:
                engine = self._build()
                gc.collect()
                _let_the_loop_go_first()
                gc.freeze()  # jax's 300,000 objects stay: each look through them would stop all clients for 0.2 s
            except Exception as error:  # noqa: BLE001 - raised again where the server waits for it
                loop.call_soon_threadsafe(set_result, built.set_exception, error)
            else:
                loop.call_soon_threadsafe(set_result, built.set_result, engine)

        threading.Thread(target=build, name="build", daemon=True).start()
        return built

    async def _until_told_to_stop(self, built: asyncio.Future) -> None:
        began = time.perf_counter()
        while not self._signals:
            if self._served.engine is None and built.done():
                self._served.engine = built.result()
                logger.info("ready after %.1f s", time.perf_counter() - began)
            self._raise_failure(await self._failed())
            await asyncio.sleep(LOOK_SECONDS)

    async def _failed(self) -> BaseException | None:
        """What ended the engine, after a moment in which /health tells of it."""
        failure = self._served.engine and self._served.engine.failure
        if failure:
            await asyncio.sleep(LAST_WORD_SECONDS)
        return failure

    def _raise_failure(self, failure: BaseException | None) -> None:
        if failure:
            raise RunFailed(f"the engine: {type(failure).__name__}: {failure}") from failure

    async def _drain(self) -> None:
        waits = self._routes.under_way
        logger.info("stopping: %d requests under way, %g s for them at most", waits, self._drain_seconds)
        until = time.monotonic() + self._drain_seconds
        while self._routes.under_way and time.monotonic() < until and self._signals == 1:
            self._raise_failure(await self._failed())
            await asyncio.sleep(LOOK_SECONDS)
        if self._routes.under_way:
            logger.warning("%d requests are cut off", self._routes.under_way)
