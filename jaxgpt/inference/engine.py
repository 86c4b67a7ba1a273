"""Continuous batching: requests come and go while others are under way, each in a slot of one fixed batch.

The device only runs a few programs, all compiled at the start (slots.py). `prefill` reads a prompt (one program for
each bucket of lengths), `admit` puts it into a free slot, `decode_chunk` makes a few tokens for all slots. The cache
is as long as the longest text needs, one of few sizes: `resize` changes it. Between two chunks, which take
milliseconds, requests are admitted, new tokens handed out, and cancelled requests removed. A request gets the tokens
that `generate` gives it, whatever runs beside it.

A thread of the engine's own does all of this; `submit` and `cancel` may be called from any other.

Axes in names: B slots, S steps of a chunk, T prompt positions, K stop tokens or alternatives.
"""

import collections
import dataclasses
import functools
import sys
import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.inference import slots as programs
from jaxgpt.inference.decoder import SMALLEST_BUCKET, Decoder, bucket, padded_prompts, row_result, start_rows
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.inference.slots import ALTERNATIVES, FREE, STOPS, Slots


class QueueFull(Exception):
    """The queue holds as many requests as it may."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of a text, with how likely the model finds them."""

    tokens: list[int]
    logprobs: list[float | None]
    """Natural logarithm of each token's probability under the model itself, before any sampling rule. None for the
    first of a prompt, which has nothing before it."""
    alternatives: list[list[tuple[int, float]]]
    """The likeliest tokens at each place with their log-probabilities; empty where none were asked for."""


@dataclasses.dataclass(frozen=True)
class Piece(Tokens):
    """Part of the answer to a request: new tokens, without the one that ends it."""

    finish_reason: str | None = None
    """In the last piece: "stop", "length", "cancelled" or "error"."""
    prompt: Tokens | None = None
    """In the first piece of a request with `scores_prompt`."""
    ending: Tokens | None = None
    """The stop token, in the piece that it ends."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and what is wanted of it."""

    prompt: list[int]
    options: SamplingOptions
    """`stop` is for the caller to watch for, `num_return_sequences` for the caller to ask for."""
    row: int = 0  # which of several continuations of one prompt, for its random numbers
    alternatives: int = 0  # how many of the likeliest tokens to return at each place
    scores_prompt: bool = False  # return the log-probabilities of the prompt's tokens, too
    continues: bool = True  # make new tokens; without, only the prompt is scored


def _at_once(work: Callable[[], None]) -> None:
    work()


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request and its state."""

    request: Request
    deliver: Callable[[Piece], None]  # must return at once
    run: Callable[[Callable[[], None]], object] = _at_once  # has `deliver` called, for all that a chunk has made
    made: int = 0
    slot: int | None = None
    cancelled: bool = False
    is_done: bool = False


class Engine:
    """Continues prompts with one decoder, up to `slots` at a time. Close it, or use it in a `with`."""

    def __init__(self, decoder: Decoder, slots: int = 16, chunk: int = 8, queue: int = 64):
        """Compiles everything; `chunk` tokens are made between two looks at the queue, which holds `queue` requests."""
        self._decoder, self._chunk, self.queue_size = decoder, chunk, queue
        self._sizes = programs.doubled(programs.SMALLEST_CACHE, decoder.config.n_positions)
        # Put on the device by name: arrays that are only there by default make another program of `admit` than the
        # slots that a program gave back, and the first request would wait for its compilation.
        nobody = programs.empty_slots(decoder.config, decoder.vocab_size, slots, self._sizes[0])
        self._slots = jax.device_put(nobody, decoder.weights["wpe"].sharding)
        self._tickets: list[Ticket | None] = [None] * slots
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._changed = threading.Condition()
        self._closing: str | None = None  # "drain" or "now"
        self._outbox: list[tuple[Ticket, Piece]] = []
        self.failure: BaseException | None = None  # the exception that ended the engine
        self.chunks = self.tokens = 0  # made so far, over all requests
        self.moved_at = time.monotonic()
        """Start of the current chunk (time.monotonic()); long ago while requests run, the device is stuck."""
        self._warm_up()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------ for any thread

    @property
    def slots(self) -> int:
        """The number of requests that can run at once."""
        return len(self._tickets)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(ticket is not None for ticket in self._tickets)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def check(self, request: Request) -> Request:
        """The request as it can be carried out; a UserError says why it cannot."""
        options = request.options
        prompt = self._decoder.checked(request.prompt, options.max_new_tokens if request.continues else 0)
        stops = len(self._decoder.stops(options))
        if stops > STOPS:
            raise UserError(f"stop_token_ids: {stops} with the end-of-text token, but at most {STOPS}")
        if not 0 <= request.alternatives <= ALTERNATIVES:
            raise UserError(f"logprobs = {request.alternatives}, but it must be between 0 and {ALTERNATIVES}")
        return dataclasses.replace(request, prompt=prompt)

    def submit(
        self,
        asked: Sequence[tuple[Request, Callable[[Piece], None]]],
        run: Callable[[Callable[[], None]], object] = _at_once,
    ) -> list[Ticket]:
        """Have requests (from `check`) carried out, all of them or none; each one's function gets its pieces.

        `run` calls these functions: at once in the engine's thread, or with `call_soon_threadsafe` in an event loop,
        which then wakes once a chunk.

        Raises:
            QueueFull: try again later.
            RuntimeError: the engine is closed, or has failed.
        """
        tickets = [Ticket(request, deliver, run) for request, deliver in asked]
        with self._changed:
            if self._closing or self.failure:
                raise RuntimeError("the engine is closed") from self.failure
            if len(self._waiting) + len(tickets) > self.queue_size:
                raise QueueFull
            self._waiting += tickets
            self._changed.notify()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """End a request after the current chunk; its last piece has the reason "cancelled"."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify()

    def close(self, drain: bool = False, seconds: float | None = None) -> bool:
        """Stop, with `drain` after all requests have ended, waiting ones too; returns whether it did in `seconds`."""
        with self._changed:
            self._closing = "drain" if drain else "now"
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self.moved_at = time.monotonic()
                self._admit_waiting()
                self._make_chunk()
        finally:  # also after a failure: no request may wait for ever
            self.failure = sys.exception()
            self._end_all("error" if self.failure else "cancelled")

    def _wait_for_work(self) -> bool:
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._closing == "now" or (self._closing and not self._waiting and not self.running):
                    return False
                if self._waiting or self.running:
                    return True
                self._hand_out()
                self._changed.wait()

    def _drop_cancelled(self) -> None:
        for ticket in [ticket for ticket in self._waiting if ticket.cancelled]:
            self._waiting.remove(ticket)
            self._end(ticket, "cancelled")
        for slot, running in enumerate(self._tickets):
            if running is not None and running.cancelled:
                self._slots = programs.release(self._slots, np.arange(self.slots) == slot)
                self._end(running, "cancelled")

    def _admit_waiting(self) -> None:
        for _ in range(self.slots):  # and no more: prompts that are only scored free their slot at once
            if not self._waiting or None not in self._tickets:
                return
            with self._changed:
                ticket = self._waiting.popleft()
            ticket.slot = self._tickets.index(None)
            self._tickets[ticket.slot] = ticket
            if ticket.request.scores_prompt:
                self._score_prompt(ticket)
            if not ticket.is_done:
                self._fit_cache()
                self._slots = self._admitted(ticket.request, ticket.slot)

    def _score_prompt(self, ticket: Ticket) -> None:
        request, decoder = ticket.request, self._decoder
        wanted, length = np.bool_(request.alternatives), len(request.prompt)
        tokens_1T = padded_prompts([request.prompt], decoder.config.n_positions)
        out = programs.score(decoder.config, decoder.vocab_size, decoder.weights, tokens_1T, wanted)
        logprobs_T, ids_TK, others_TK = jax.device_get(out)
        scored = _tokens(request.prompt, logprobs_T[:length], ids_TK, others_TK, request.alternatives)
        scored.logprobs[0] = None
        if scored.alternatives:
            scored.alternatives[0] = []
        if not request.continues:
            self._forget(ticket)
        self._outbox.append((ticket, Piece([], [], [], None if request.continues else "length", scored)))

    def _admitted(self, request: Request, slot: int) -> Slots:
        size = programs.size_for(bucket(len(request.prompt), self._decoder.config.n_positions), self._sizes)
        one = start_rows(self._decoder, [request.prompt], request.options, 1, size, True, request.row)
        # A CPU would read several prompts at once, each on all cores (124M: 156 tokens a second instead of 180).
        jax.block_until_ready(one)
        return programs.admit(self._slots, one, np.int32(slot))

    def _make_chunk(self) -> None:
        made = None
        if self.running:
            self._fit_cache()
            made = self._decode(any(ticket is not None and ticket.request.alternatives for ticket in self._tickets))
        self._hand_out()  # what the chunk before has made, while the device works on this one
        if made is not None:
            self._finish_chunk(made)

    def _fit_cache(self) -> None:
        """Give the cache the size that the texts under way need for a chunk: shorter is faster."""
        texts = (len(ticket.request.prompt) + ticket.made for ticket in self._tickets if ticket is not None)
        self._slots = programs.resize(self._slots, self._sizes, max(texts) + self._chunk)

    def _decode(self, wanted: bool) -> tuple:
        decoder = self._decoder
        count = min(ALTERNATIVES, decoder.vocab_size)
        program = (decoder.config, decoder.vocab_size, self._chunk, count, decoder.mesh, decoder.weights)
        self._slots, made = programs.decode_chunk(*program, self._slots, np.int32(self._chunk), np.bool_(wanted))
        return made

    def _finish_chunk(self, made: tuple) -> None:
        tokens_BS, logprobs_BS, ids_BSK, others_BSK, left_B = jax.device_get(made)
        self.chunks += 1
        for slot, ticket in enumerate(self._tickets):
            if ticket is None:
                continue
            tokens, reason = row_result(tokens_BS[slot], left_B[slot], self._decoder.stops(ticket.request.options))
            self.tokens += len(tokens)
            ticket.made += len(tokens)
            kept = len(tokens) - (reason == "stop")
            alternatives = ticket.request.alternatives
            new, ending = (
                _tokens(
                    tokens[part], logprobs_BS[slot, part], ids_BSK[slot, part], others_BSK[slot, part], alternatives
                )
                for part in (slice(kept), slice(kept, len(tokens)))
            )
            if reason:
                self._forget(ticket)
            last = ending if reason == "stop" else None
            self._outbox.append((ticket, Piece(new.tokens, new.logprobs, new.alternatives, reason, ending=last)))

    def _forget(self, ticket: Ticket) -> None:
        ticket.is_done = True
        if ticket.slot is not None:
            self._tickets[ticket.slot] = None

    def _hand_out(self) -> None:
        by_run: dict[Callable, list[tuple[Ticket, Piece]]] = {}
        for ticket, piece in self._outbox:
            by_run.setdefault(ticket.run, []).append((ticket, piece))
        self._outbox.clear()
        for run, pieces in by_run.items():
            run(functools.partial(_deliver, pieces))

    def _end(self, ticket: Ticket, reason: str) -> None:
        self._forget(ticket)
        self._outbox.append((ticket, Piece([], [], [], reason)))

    def _end_all(self, reason: str) -> None:
        with self._changed:
            self._closing = self._closing or "now"
            left = [ticket for ticket in (*self._tickets, *self._waiting) if ticket is not None]
            self._waiting.clear()
        for ticket in left:
            self._end(ticket, reason)
        self._hand_out()

    def _warm_up(self) -> None:
        """Compile every program, by running each once."""
        longest, once = self._sizes[-1], dataclasses.replace(FREE, max_new_tokens=1)
        lengths = [min(length, longest - 1) for length in programs.doubled(SMALLEST_BUCKET, longest)]
        prompts = [Request([0] * length, once, alternatives=1) for length in lengths]
        for request in prompts:
            self._score_prompt(Ticket(request, lambda piece: None))
        for size in self._sizes:
            self._slots = programs.resize(self._slots, self._sizes, size)
            for request in (request for request in prompts if len(request.prompt) <= size):
                self._slots = self._admitted(request, slot=0)
            jax.block_until_ready(self._decode(wanted=False))
        self._slots = programs.resize(self._slots, self._sizes, self._sizes[0])
        self._outbox.clear()
        self._slots = programs.release(self._slots, np.arange(self.slots) == 0)


def _deliver(pieces: Sequence[tuple[Ticket, Piece]]) -> None:
    for ticket, piece in pieces:
        ticket.deliver(piece)


def _tokens(
    tokens: list[int], logprobs_T: np.ndarray, ids_TK: np.ndarray, others_TK: np.ndarray, alternatives: int
) -> Tokens:
    """Arrays from the device as lists; of the likeliest tokens the first `alternatives`."""
    logprobs = logprobs_T.tolist()
    if not alternatives:
        return Tokens(tokens, logprobs, [])
    places = zip(tokens, logprobs, ids_TK[:, :alternatives].tolist(), others_TK[:, :alternatives].tolist())
    # The same number for the same token: the two are summed in different programs, and may differ in the last bit.
    others = [
        [(other, logprob if other == token else value) for other, value in zip(ids, values)]
        for token, logprob, ids, values in places
    ]
    return Tokens(tokens, logprobs, others)
