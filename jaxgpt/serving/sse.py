"""Answers that take long: sent as server-sent events while they are made, and cancelled when the client has left.

The event stream format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Response
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from jaxgpt.serving.generated_texts import Generation
from jaxgpt.serving.responses import Chats, Completions
from jaxgpt.serving.schemas import ApiError

T = TypeVar("T")

PING_SECONDS = 15.0  # proxies cut a silent connection; most wait for 60 s
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx hands on each event at once
]


def event(content: object) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"


async def events(generation: Generation, shape: Completions | Chats) -> AsyncGenerator[bytes]:
    """The events of an answer; an error is an event, too."""
    try:
        async for part in generation.parts(PING_SECONDS):
            yield b": ping\n\n" if part is None else b"".join(map(event, shape.chunks(part)))
    except ApiError as error:
        yield event(error.body)
    else:
        usage = event(shape.last_chunk(generation.usage)) if generation.asked.include_usage else b""
        yield usage + b"data: [DONE]\n\n"


class EventStream(Response):
    """A response that sends events until they end or the client leaves."""

    background = None

    def __init__(self, source: AsyncGenerator[bytes], counted: contextlib.AbstractContextManager[object]):
        """`counted` is left when nothing is sent any more."""
        self._source, self._counted = source, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect), self._counted:
            await while_connected(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        async with contextlib.aclosing(self._source):
            async for content in self._source:
                await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, answer: Coroutine[Any, Any, T]) -> T:
    """The result of `answer`, which is cancelled if the client leaves.

    Raises:
        ClientDisconnect: the client has left.
    """
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_wait_until_gone(receive))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        raise ClientDisconnect
    finally:
        answering.cancel()
        leaving.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
