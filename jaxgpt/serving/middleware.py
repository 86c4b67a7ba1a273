"""Every request passes here: API keys, pages of other sites, limits of size and time, a line in the log, figures.

No prompt, no answer and no key is ever written to the log.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxgpt.errors import UserError
from jaxgpt.inference.engine import Engine
from jaxgpt.serving.schemas import ApiError
from jaxgpt.serving.served_model import ServedModel

logger = logging.getLogger("jaxgpt.serve")

MAX_BODY_BYTES = 1 << 20
MAX_ALL_BODIES = 32 << 20
MAX_HEADER_BYTES = 1 << 15
BODY_SECONDS = 30.0
ALWAYS_OPEN = ("/health", "/ready")
KEYS = "JAXGPT_API_KEYS"
FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


Names = Sequence[str]


class ServerMetrics:
    """The figures of one server for Prometheus. Names follow vLLM's, with jaxgpt_ before them; times are in seconds."""

    def __init__(self, model: ServedModel):
        own = self._registry = CollectorRegistry()  # one per server: the library's own is global
        self.requests = Counter("jaxgpt_requests", "Requests answered", ["route", "status"], registry=own)
        self.prompt_tokens = Counter("jaxgpt_prompt_tokens", "Tokens of accepted prompts", registry=own)
        self.new_tokens = Counter("jaxgpt_generation_tokens", "Tokens of finished answers", registry=own)
        self.disconnects = Counter("jaxgpt_client_disconnects", "Clients that left before the end", registry=own)
        name, text = "jaxgpt_time_to_first_token_seconds", "From the request to its first token"
        self.first_token = Histogram(name, text, buckets=FIRST_TOKEN, registry=own)
        name, text = "jaxgpt_time_per_output_token_seconds", "Between tokens, after the first"
        self.token = Histogram(name, text, buckets=TOKEN, registry=own)
        self.whole = Histogram("jaxgpt_request_seconds", "Whole requests", ["route"], buckets=WHOLE, registry=own)

        def gauge(name: str, text: str, value: Callable[[Engine], float]) -> None:
            Gauge(name, text, registry=own).set_function(lambda: 0 if model.engine is None else value(model.engine))

        gauge("jaxgpt_requests_waiting", "Texts that wait for a slot", lambda engine: engine.waiting)
        gauge("jaxgpt_requests_running", "Texts that have a slot", lambda engine: engine.running)
        gauge("jaxgpt_slots", "Texts that can be made at once", lambda engine: engine.slots)
        gauge("jaxgpt_batch_fill_ratio", "Slots in use / slots", lambda engine: engine.running / engine.slots)
        gauge("jaxgpt_engine_tokens", "Tokens the engine has made", lambda engine: engine.tokens)
        info = Gauge("jaxgpt_model_info", "The model that is served", ["model", "step"], registry=own)
        info.labels(model.name, model.step).set(1)

    def text(self) -> tuple[bytes, str]:
        """(the page, its content type)."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


def read_keys(file: Path | None) -> list[str]:
    """The API keys of a file or of the environment. (On the command line every user of the machine would see them.)"""
    if file is None:
        return [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {file}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise UserError(f"--api-key-file {file}: no key in it; write one a line")
    return keys


class RequestMiddleware:
    """ASGI middleware that checks who sends each request, counts it and logs it."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, keys: Names, opened: Names, routes: Names, origins: Names):
        """`opened` are the paths that need no key, `routes` all paths.

        Without `keys` anyone may ask who reaches the port, but of pages only the server's own and those of `origins`.
        """
        self._app, self._metrics, self._routes = app, metrics, frozenset(routes)
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._opened = {*ALWAYS_OPEN, *opened}
        self._origins = {origin.lower() for origin in origins}
        self._hosts = {urlsplit(origin).netloc for origin in self._origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # nginx's status for a client that left before its answer

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            refusal = self._refusal(scope)
            app = self._app if refusal is None else answer_error(refusal)
            await app(scope, receive, noting_send)
        finally:
            path = scope["path"] if scope["path"] in self._routes else "other"
            seconds = time.perf_counter() - began
            self._metrics.requests.labels(path, status).inc()
            self._metrics.whole.labels(path).observe(seconds)
            level = logging.DEBUG if path in (*ALWAYS_OPEN, "/metrics") else logging.INFO
            logger.log(level, "%s %s %d %.3f s", scope["method"], path, status, seconds)

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Why the request may not pass."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["raw_path"]) > MAX_HEADER_BYTES:
            return ApiError(431, f"path and headers are larger than {MAX_HEADER_BYTES:,} bytes", code="large_headers")
        if scope["path"] in ALWAYS_OPEN:
            return None
        if not self._digests:
            return self._stranger(headers)
        # A browser sends OPTIONS before it sends a key; the answer is the same for everybody.
        if scope["path"] in self._opened or scope["method"] == "OPTIONS" or self._has_key(headers):
            return None
        return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    def _stranger(self, headers: dict[bytes, bytes]) -> ApiError | None:
        """Why a browser's page may not ask: it is of another site, or of one whose name was bound to this address."""
        host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
        is_own = not origin or (origin.partition("://")[2] == host != "")
        if origin in self._origins or (is_own and (host in self._hosts or _is_local(host))):
            return None
        site = origin if "://" in origin else f"http://{host}"
        message = f"a server without API keys answers no other site; --cors-origin {site[:100]} lets this one ask"
        return ApiError(403, message, code="other_site")

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # Each key is compared, in constant time: the time tells nothing about any key.
        own = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(own, digest) for digest in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def answer_error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def _is_local(host: str) -> bool:
    """Whether a Host is an address, or a name without a dot: a stranger's name has one."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return "." not in name or name.endswith(".localhost") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class Bodies:
    """Reads bodies. `held` counts the bytes of all under way; whoever has one read takes its bytes off again."""

    held = 0

    async def read(self, request: Request, content: bytearray) -> None:
        """Append the body to `content`; ApiError 413 and 429: it or all together are too large, 408: it is slow."""
        too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes", code="body_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    content += part
                    self.held += len(part)
                    if len(content) > MAX_BODY_BYTES:
                        raise too_large
                    if self.held > MAX_ALL_BODIES:
                        message = f"the bodies of all requests together are over {MAX_ALL_BODIES:,} bytes; try again"
                        raise ApiError(429, message, code="bodies_too_large", headers={"Retry-After": "1"})
        except TimeoutError:
            message = f"the body did not come within {BODY_SECONDS:g} s"
            raise ApiError(408, message, code="slow_body", headers={"Connection": "close"}) from None
