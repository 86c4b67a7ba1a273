"""Text in, text out: prompts become token ids, and the tokens that follow become text while they are made.

A token may end inside a Chinese character or an emoji, and a text may turn out to be the beginning of a stop
text; `TextStream` hands out only what no later token can change. Each token is looked at once or twice, however
long the text grows. (`tokenizers.decoders.DecodeStream` is not used: on bytes that are not UTF-8, which an
untrained model makes all the time, it gives another text than decoding the whole, or fails.)
"""

import codecs
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import tokenizers

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.inference.decoder import Continuation, Decoder, stream
from jaxgpt.inference.prompts import BYTE_TOKEN, byte_of_character
from jaxgpt.inference.sampling import SamplingOptions

REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continuation of a prompt. The stop text and the stop token are in neither `text` nor `tokens`."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    """Natural logarithm of each token's probability."""
    finish_reason: str | None
    """"stop": a stop text or token, or end-of-text; "length": max_new_tokens; None: not finished yet."""


class TextStream:
    """Turns the tokens of one continuation into text, piece by piece.

    The pieces one after another are `tokenizer.decode` of all the tokens, cut where the first stop text begins.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), after: Sequence[int] = ()):
        """`after`: the prompt's tokens; some tokenizers drop the space before the first word of a text."""
        self.stopped = False  # True once a stop text was met: no text comes any more
        self._stop = tuple(stop)
        self._held = ""
        backend = tokenizer.backend
        is_bytes = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        self._text: _ByteText | _WindowText = _ByteText(backend) if is_bytes else _WindowText(backend, after)

    def add(self, tokens: Iterable[int]) -> str:
        """The text that is certain now that `tokens` came: whole characters, and no part of a stop text."""
        return "" if self.stopped else self._release("".join(self._text.add(int(token)) for token in tokens))

    def finish(self) -> str:
        """The text that was held back, now that no more tokens come. Bytes of an unfinished character are U+FFFD."""
        return "" if self.stopped else self._release(self._text.finish(), is_last=True)

    def _release(self, text: str, is_last: bool = False) -> str:
        text = self._held + text
        border, self.stopped = _stop_border(text, self._stop, is_last)
        self._held = "" if self.stopped else text[border:]
        return text[:border]


class TextGeneration:
    """The continuations of a batch of prompts while they are made. Iterate to make them; leave the loop to stop.

    Rows are prompts x num_return_sequences, those of one prompt side by side. A row whose stop text came is
    not worked on any more.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        prompts: Sequence[str | Sequence[int]],
        options: SamplingOptions,
        chunk: int = 8,
    ):
        """A prompt is text, or token ids; `chunk` tokens are made between two looks at the stop texts."""
        self._decoder, self._options, self._chunk = decoder, options, chunk
        self._prompts = [tokenizer.encode(given) if isinstance(given, str) else list(given) for given in prompts]
        each = range(options.num_return_sequences)
        self._rows = [GrowingText(tokenizer, options.stop, prompt) for prompt in self._prompts for _ in each]

    def __iter__(self) -> Iterator[list[str]]:
        """The new text of each row, again and again; "" for a row that has none."""
        finished: set[int] | None = None
        parts = stream(self._decoder, self._prompts, self._options, self._chunk)
        with contextlib.closing(parts), contextlib.suppress(StopIteration):
            while finished is None or len(finished) < len(self._rows):
                new = parts.send(finished)
                yield [row.add(part) for row, part in zip(self._rows, new, strict=True)]
                finished = {i for i, row in enumerate(self._rows) if row.finish_reason}

    @property
    def completions(self) -> list[list[Completion]]:
        """The continuations so far, num_return_sequences a prompt."""
        made = [Completion(row.text, [*row.tokens], [*row.logprobs], row.finish_reason) for row in self._rows]
        count = self._options.num_return_sequences
        return [made[i : i + count] for i in range(0, len(made), count)]


def complete(
    decoder: Decoder, tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]], options: SamplingOptions
) -> list[list[Completion]]:
    """The continuations of each prompt (text, or token ids), num_return_sequences a prompt.

    Raises:
        UserError: prompt and new tokens do not fit the context, or the prompt cannot be read.
    """
    # One call of the device if there is no stop text to look for.
    generation = TextGeneration(decoder, tokenizer, prompts, options, 8 if options.stop else options.max_new_tokens)
    for _ in generation:
        pass
    return generation.completions


def fit_prompt(ids: Sequence[int], options: SamplingOptions, n_positions: int, truncate: bool) -> list[int]:
    """The prompt's tokens, or with `truncate` the last of them that leave room for the new ones.

    Raises:
        UserError: prompt and new tokens are longer than the context, and by how much.
    """
    new = options.max_new_tokens
    if new >= n_positions:
        raise UserError(
            f"max_new_tokens = {new}, but prompt and new tokens together are at most n_positions = {n_positions} "
            f"and the prompt is at least one; ask for at most {n_positions - 1}"
        )
    excess = len(ids) + new - n_positions
    if excess > 0 and not truncate:
        # If the prompt alone fits, fewer new tokens help, too.
        fewer = f"ask for at most {n_positions - len(ids)} new tokens, " if len(ids) < n_positions else ""
        raise UserError(
            f"a prompt of {len(ids)} tokens and {new} new ones are {excess} more than the model's "
            f"n_positions = {n_positions}; {fewer}shorten the prompt, or set truncate"
        )
    return list(ids)[max(excess, 0) :]


class GrowingText:
    """One continuation in the making: tokens come in parts, and text is given out as soon as it is certain."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], prompt: Sequence[int]):
        self.finish_reason: str | None = None
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.offsets: list[int] = []  # start in the text of each of the first `given_tokens` tokens
        self._stream = TextStream(tokenizer, stop, after=prompt)
        self._counter = TextStream(tokenizer, after=prompt)
        self._pieces: list[str] = []
        self._length = self._counted = 0

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, part: Continuation) -> str:
        """The text that is new."""
        if self.finish_reason:
            return ""
        self.tokens += part.tokens
        self.logprobs += part.logprobs
        text = self._stream.add(part.tokens)
        self.finish_reason = "stop" if self._stream.stopped else part.finish_reason
        if self.finish_reason:
            text += self._stream.finish()
        self._pieces.append(text)
        self._length += len(text)
        if self._stream.stopped:
            self.finish_reason = "stop"
            kept = self.given_tokens()
            del self.tokens[kept:], self.logprobs[kept:]
        return text

    def given_tokens(self) -> int:
        """How many tokens the text given out is made of: the fewest that make it certain, wherever parts end."""
        all_of_them = self.finish_reason is not None and not self._stream.stopped
        while len(self.offsets) < len(self.tokens) and (all_of_them or self._counted < self._length):
            place = len(self.offsets)
            self.offsets.append(self._counted)
            self._counted += len(self._counter.add(self.tokens[place : place + 1]))
        return len(self.offsets)


def _stop_border(text: str, stop: Sequence[str], is_last: bool) -> tuple[int, bool]:
    """How much of the text is certain, and whether a stop text begins there.

    The stop text that begins first counts: if one is complete and another began earlier but is not yet, the next token
    decides.
    """
    whole = min((at for at in (text.find(end) for end in stop) if at >= 0), default=len(text) + 1)
    begun = len(text) + 1
    for end in () if is_last else stop:
        at = text.find(end[0], max(0, len(text) - len(end) + 1))
        while at >= 0 and not end.startswith(text[at:]):
            at = text.find(end[0], at + 1)
        begun = min(begun, at if at >= 0 else begun)
    return min(whole, begun, len(text)), whole <= min(begun, len(text))


class _ByteText:
    """Tokens that are bytes in GPT-2's alphabet: UTF-8 says by itself where a character ends."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._token_of = backend.id_to_token
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        written = self._token_of(token) or ""  # a padded embedding has ids that no token has
        byte_of = byte_of_character()
        if all(character in byte_of for character in written):
            return self._decoder.decode(bytes(byte_of[character] for character in written))
        return self._decoder.decode(written.encode())  # an added token holds characters, not bytes

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowText:
    """Any other tokenizer: what a token adds is seen by decoding it together with the tokens right before it."""

    def __init__(self, backend: tokenizers.Tokenizer, after: Sequence[int]) -> None:
        self._backend = backend
        self._window = list(after)
        self._known = len(self._window)
        """Tokens of the window whose text was given; they are there because the first of a text may lose its space."""

    def add(self, token: int) -> str:
        written = self._backend.id_to_token(token)
        if written is None:  # a padded embedding has ids that no token has
            return ""
        self._window.append(token)
        # A run of single bytes is decoded as a whole: one wrong byte at its end makes all of them U+FFFD.
        if BYTE_TOKEN.fullmatch(written):
            return ""
        known, text = self._decode(self._window[: self._known]), self._decode(self._window)
        if len(text) <= len(known) or text.endswith(REPLACEMENT):
            return ""
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return text[len(known) :]

    def finish(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._known])) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=False)
