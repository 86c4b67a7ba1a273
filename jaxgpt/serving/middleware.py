"""What stands before every route: API keys, the size and the patience for a body, and a line in the log.

No prompt, no answer and no key is ever written to the log.
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Collection, Sequence

from fastapi import Request
from fastapi.responses import JSONResponse

from jaxgpt.serving.http_errors import ApiError
from jaxgpt.serving.prometheus import Metrics

logger = logging.getLogger("jaxgpt.serve")

MAX_BODY_BYTES = 1 << 20
BODY_SECONDS = 30.0
ALWAYS_OPEN = ("/health", "/ready")


class Gate:
    """ASGI middleware: checks the key of each request, counts and logs it."""

    def __init__(self, app, keys: Sequence[str], opened: Collection[str], metrics: Metrics, routes: Collection[str]):
        """`keys`: none for a server that anyone may use. `opened`: paths that need none. `routes`: those there are."""
        self._app, self._metrics, self._routes = app, metrics, frozenset(routes)
        self._digests = [_digest(key) for key in keys]
        self._opened = {*ALWAYS_OPEN, *opened}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # nginx's word for a client that left before its answer

        async def noting_send(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            if self._may_pass(scope):
                await self._app(scope, receive, noting_send)
            else:
                error = ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
                await answer_error(error)(scope, receive, noting_send)
        finally:
            path = scope["path"] if scope["path"] in self._routes else "other"
            seconds = time.perf_counter() - began
            self._metrics.requests.labels(path, status).inc()
            self._metrics.whole.labels(path).observe(seconds)
            level = logging.DEBUG if path in (*ALWAYS_OPEN, "/metrics") else logging.INFO
            logger.log(level, "%s %s %d %.3f s", scope["method"], path, status, seconds)

    def _may_pass(self, scope) -> bool:
        # A browser asks with OPTIONS before it sends a key; the answer is the same for all.
        if not self._digests or scope["path"] in self._opened or scope["method"] == "OPTIONS":
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # All are compared, each in constant time: how long it takes tells nothing of any key.
        matches = [hmac.compare_digest(_digest(key.strip()), digest) for digest in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def answer_error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def body_of(request: Request) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413, it is larger than MAX_BODY_BYTES; 408, it did not come in BODY_SECONDS.
        ClientDisconnect: the client left.
    """
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        message = f"the body did not come within {BODY_SECONDS:g} s"
        raise ApiError(408, message, code="slow_body", headers={"Connection": "close"}) from None
    return bytes(content)
