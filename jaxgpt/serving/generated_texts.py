"""The texts of one HTTP request while they are made: the engine's pieces, as they come, become text for the client.

The engine has a thread of its own and the server an event loop; a piece crosses from one to the other here, and
nowhere else. What a stream sends and what a whole answer holds are the same parts.
"""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator

from jaxgpt.inference.engine import Engine, Piece, QueueFull, Ticket, Tokens
from jaxgpt.inference.text import GrowingText
from jaxgpt.serving.http_errors import ApiError, not_ready, too_busy, too_slow
from jaxgpt.serving.prometheus import Metrics
from jaxgpt.serving.requests import Work
from jaxgpt.serving.served_model import Served


@dataclasses.dataclass(frozen=True)
class Part:
    """What one of the texts has grown by."""

    index: int
    """Which of the request's texts."""
    text: str
    told: Tokens
    """The tokens that `text` is made of; with no `tells_logprobs`, none."""
    offsets: list[int]
    """Where in the text, prompt excluded, each of them begins."""
    finish_reason: str | None = None
    prompt: Tokens | None = None


class Generation:
    """Starts the work when made; `parts` hands it out, and `cancel` gives its slots back."""

    def __init__(self, work: Work, served: Served, engine: Engine, metrics: Metrics, seconds: float):
        """`seconds` are what it may take.

        Raises:
            ApiError: 429, the queue is full; 503, the engine is closed.
        """
        self.work = work
        self.completion_tokens = 0
        self._engine, self._metrics, self._seconds = engine, metrics, seconds
        self._came: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._texts = [_Text(served, work, request.prompt) for request in work.requests]
        self._open = len(self._texts)
        self._began, self._first_at = time.perf_counter(), None

        def deliver_to(index: int):
            return lambda piece: self._came.put_nowait((index, piece))

        try:
            self._tickets: list[Ticket] = engine.submit(
                [(request, deliver_to(index)) for index, request in enumerate(work.requests)],
                asyncio.get_running_loop().call_soon_threadsafe,
            )
        except QueueFull:
            raise too_busy(engine.waiting, retry_seconds(engine)) from None
        except RuntimeError:
            raise not_ready("failed" if engine.failure else "stopping") from None
        metrics.prompt_tokens.inc(work.prompt_tokens)

    async def parts(self, ping_seconds: float | None = None) -> AsyncIterator[Part | None]:
        """The parts of all texts as they come; None where `ping_seconds` passed without one.

        Raises:
            ApiError: 500, the engine has failed; 503, the server was stopped before the end; 504, it took too long.
        """
        while self._open:
            left = self._began + self._seconds - time.perf_counter()
            patience = left if ping_seconds is None else min(left, ping_seconds)
            try:
                # No timeout may span the `yield`s: it would hit whatever the caller does between two parts.
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
            if part.finish_reason and not piece.finish_reason:  # a stop text: the engine does not know of it
                self._engine.cancel(self._tickets[index])
            yield part

    async def collect(self) -> list[Part]:
        return [part async for part in self.parts() if part is not None]

    def cancel(self) -> None:
        """End what is under way: the client has gone, or its time is over."""
        for ticket, text in zip(self._tickets, self._texts):
            if not text.is_done:
                text.is_done = True
                self._open -= 1
                self._engine.cancel(ticket)

    @property
    def usage(self) -> dict[str, int]:
        prompt, made = self.work.prompt_tokens, self.completion_tokens
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


_TOLD = [field.name for field in dataclasses.fields(Tokens)]


class _Text:
    """One of the request's texts."""

    def __init__(self, served: Served, work: Work, prompt: list[int]):
        self.is_done = False
        self._work = work
        self._growing = GrowingText(served.tokenizer, work.stop, prompt)
        self._alternatives: list[list[tuple[int, float]]] = []
        self._given = 0

    @property
    def made(self) -> int:
        return len(self._growing.tokens)

    def add(self, index: int, piece: Piece) -> Part | None:
        """What can be given out now; None where nothing can."""
        growing = self._growing
        text = growing.add(piece)
        self._alternatives += piece.alternatives
        self.is_done = growing.finish_reason is not None
        if not (text or self.is_done or piece.prompt):
            return None
        told, offsets = Tokens([], [], []), []
        if self._work.tells_logprobs:
            ending = piece.ending if self._work.echo and growing.finish_reason == piece.finish_reason else None
            new = slice(self._given, growing.given_tokens())
            told = Tokens(growing.tokens[new], growing.logprobs[new], self._alternatives[new])
            offsets, self._given = growing.offsets[new], new.stop
            if ending is not None:  # lm-eval takes the last token told of for one that followed the scored text
                told = Tokens(*(getattr(told, name) + getattr(ending, name) for name in _TOLD))
                offsets = [*offsets, len(growing.text)]
        return Part(index, text, told, offsets, growing.finish_reason, piece.prompt)


def retry_seconds(engine: Engine) -> int:
    """When to come back: a full queue empties in some seconds, and all clients at once would fill it again."""
    return 1 + engine.waiting // max(engine.slots, 1) // 4
