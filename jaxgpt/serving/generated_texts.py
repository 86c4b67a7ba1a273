"""The texts of one HTTP request while they are made: the engine's pieces become text for the client as they come.

The engine has its own thread and the server an event loop; pieces cross from one to the other only here. A stream and
a whole answer consist of the same parts.
"""

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator
from typing import cast

from jaxgpt.inference.decoder import Continuation
from jaxgpt.inference.engine import Engine, Piece, QueueFull, Ticket, Tokens
from jaxgpt.inference.text import GrowingText
from jaxgpt.serving.middleware import ServerMetrics
from jaxgpt.serving.requests import GenerationRequest
from jaxgpt.serving.schemas import ApiError, not_ready, too_busy, too_slow
from jaxgpt.serving.served_model import ServedModel


@dataclasses.dataclass(frozen=True)
class Part:
    """The growth of one of the texts."""

    index: int
    """Number of the text in the request."""
    text: str
    new: Tokens
    """The tokens of `text`; none without `wants_logprobs`."""
    offsets: list[int]
    """The place in the text, prompt excluded, where each of them begins."""
    finish_reason: str | None = None
    prompt: Tokens | None = None


class Generation:
    """A request in the engine, from the moment this is made; `parts` yields its texts, `cancel` frees its slots."""

    def __init__(
        self, asked: GenerationRequest, model: ServedModel, engine: Engine, metrics: ServerMetrics, seconds: float
    ):
        """`seconds` is its time limit; ApiError 429 if the queue is full, 503 if the engine is closed."""
        self.asked = asked
        self.completion_tokens = 0
        self._engine, self._metrics, self._seconds = engine, metrics, seconds
        self._came: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._texts = [_Text(model, asked, request.prompt) for request in asked.requests]
        self._open = len(self._texts)
        self._began = time.perf_counter()
        self._first_at: float | None = None
        deliver_to = lambda index: lambda piece: self._came.put_nowait((index, piece))
        try:
            self._tickets: list[Ticket] = engine.submit(
                [(request, deliver_to(index)) for index, request in enumerate(asked.requests)],
                asyncio.get_running_loop().call_soon_threadsafe,
            )
        except QueueFull:
            raise too_busy(engine.waiting, retry_seconds(engine)) from None
        except RuntimeError:
            raise not_ready("failed" if engine.failure else "stopping") from None
        metrics.prompt_tokens.inc(asked.prompt_tokens)

    async def parts(self, ping_seconds: float | None = None) -> AsyncGenerator[Part | None]:
        """The parts of all texts as they come; None after `ping_seconds` without one.

        Raises:
            ApiError: 500, the engine has failed; 503, the server was stopped before the end; 504, it took too long.
        """
        while self._open:
            left = self._began + self._seconds - time.perf_counter()
            patience = left if ping_seconds is None else min(left, ping_seconds)
            try:
                # A timeout around a `yield` would also hit what the caller does between two parts.
                async with asyncio.timeout(patience):
                    index, piece = await self._came.get()
            except TimeoutError:
                if patience == left:
                    raise too_slow(self._seconds) from None
                yield None
                continue
            if piece.finish_reason == "error":
                raise ApiError(500, "the engine has failed while it made this text", code="engine_failed")
            text = self._texts[index]
            if text.is_done:
                continue
            if piece.finish_reason == "cancelled":
                raise not_ready("stopping")
            part = text.add(index, piece)
            if part is None:
                continue
            self._count(text, part)
            if part.finish_reason and not piece.finish_reason:  # a stop text, which the engine does not look for
                self._engine.cancel(self._tickets[index])
            yield part

    async def collect(self) -> list[Part]:
        return [part async for part in self.parts() if part is not None]

    def cancel(self) -> None:
        """End the texts under way: the client has left, or their time is over."""
        for ticket, text in zip(self._tickets, self._texts):
            if not text.is_done:
                text.is_done = True
                self._open -= 1
                self._engine.cancel(ticket)

    @property
    def usage(self) -> dict[str, int]:
        prompt, made = self.asked.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def _count(self, text: "_Text", part: Part) -> None:
        now = time.perf_counter()
        if self._first_at is None and text.made:
            self._first_at = now
            self._metrics.first_token.observe(now - self._began)
        if not part.finish_reason:
            return
        self._open -= 1
        self.completion_tokens += text.made
        self._metrics.new_tokens.inc(text.made)
        if text.made > 1 and self._first_at is not None:
            self._metrics.token.observe((now - self._first_at) / (text.made - 1))


class _Text:
    """One of the request's texts."""

    def __init__(self, model: ServedModel, asked: GenerationRequest, prompt: list[int]):
        self.is_done = False
        self._asked = asked
        self._growing = GrowingText(model.tokenizer, asked.stop, prompt)
        self._alternatives: list[list[tuple[int, float]]] = []
        self._given = 0

    @property
    def made(self) -> int:
        return len(self._growing.tokens)

    def add(self, index: int, piece: Piece) -> Part | None:
        """The part that can be sent now; None if nothing can."""
        growing = self._growing
        logprobs = cast(list[float], piece.logprobs)  # only a prompt's first token has none
        text = growing.add(Continuation(piece.tokens, logprobs, piece.finish_reason))
        self._alternatives += piece.alternatives
        self.is_done = growing.finish_reason is not None
        if not (text or self.is_done or piece.prompt):
            return None
        new, offsets = Tokens([], [], []), []
        if self._asked.wants_logprobs:
            own = slice(self._given, growing.given_tokens())
            new = Tokens(growing.tokens[own], [*growing.logprobs[own]], self._alternatives[own])
            offsets, self._given = growing.offsets[own], own.stop
            if piece.ending and self._asked.echo and growing.finish_reason == piece.finish_reason:
                # lm-eval takes the last token of the answer for one that followed the scored text.
                offsets = [*offsets, len(growing.text)]
                for name in ("tokens", "logprobs", "alternatives"):
                    getattr(new, name).extend(getattr(piece.ending, name))
        return Part(index, text, new, offsets, growing.finish_reason, piece.prompt)


def retry_seconds(engine: Engine) -> int:
    """When a client may try again: a full queue empties in seconds, and all clients at once would fill it again."""
    return 1 + engine.waiting // max(engine.slots, 1) // 4
