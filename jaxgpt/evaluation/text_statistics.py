"""Figures of the texts that a model generates: are they varied, do they repeat themselves, do they end?

distinct-n (Li et al. 2016): the share of different n-grams among those of all texts together. rep-4 (Welleck et al.
2020): the share of a text's 4-grams that repeat an earlier one; the mean over the texts. Both depend on how many texts
there are and how long they may get, so they mean something only beside the same figures of real texts of the same
lengths.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.data.dataset import PackedRows, TokenDataset, TokenStream
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.inference.answers import asked_in
from jaxgpt.inference.decoder import Decoder, generate
from jaxgpt.inference.prompts import ChatPrompts
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.inference.text import fit_prompt

PROMPTS = 64  # from the validation texts
PROMPT_TOKENS = 32
TOGETHER = 32  # texts generated at once
LOOK_AHEAD = 1 << 16  # tokens in which the beginning of a text is searched


class Written(NamedTuple):
    tokens: list[int]
    """Without the token that ended it."""
    stopped: bool
    """The text came to its end; the others were cut."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    tokens: list[list[int]]
    origin: str
    """The source of the prompts, for the table."""
    real: list[Written] | None = None
    """The continuation of each in the data."""
    cut: int = 0
    """Prompts that were too long and lost their beginning."""


# ---------------------------------------------------------------- prompts


def written_prompts(
    texts: list[str], origin: str, tokenizer: Tokenizer, n_positions: int, options: SamplingOptions, system: str = ""
) -> Prompts:
    """The prompts that a user wrote; for a chat model each is a message after the system message."""
    if tokenizer.end_of_turn is None:
        encoded = [tokenizer.encode(text) for text in texts]
        fitted = [fit_prompt(ids, options, n_positions, truncate=True) for ids in encoded]
        return Prompts(fitted, origin, cut=sum(len(kept) < len(ids) for kept, ids in zip(fitted, encoded)))
    chat = ChatPrompts(tokenizer, n_positions, origin)
    head = [{"role": "system", "content": system}] if system.strip() else []
    asked = ([*head, {"role": "user", "content": text}] for text in texts)
    return Prompts([chat.fit(messages, options.max_new_tokens).ids for messages in asked], origin)


def validation_prompts(dataset: TokenDataset, tokenizer: Tokenizer, n_positions: int, new: int) -> Prompts:
    """Beginnings of validation texts, or validation conversations up to an answer, each with its real continuation."""
    longest = n_positions - new
    if longest < 1:
        raise UserError(f"--max-new-tokens {new}: the model reads and writes {n_positions} tokens at most")
    validation = dataset.validation
    if isinstance(validation, PackedRows):
        assert tokenizer.end_of_turn is not None, "conversations are prepared with a chat's tokens"
        asked = asked_in(validation, PROMPTS, longest)
        real = [_up_to(tokens[length : length + new], tokenizer.end_of_turn) for tokens, length in asked]
        tokens = [tokens[:length] for tokens, length in asked]
        prompts = Prompts(tokens, "before answers of validation conversations", real)
    else:
        assert isinstance(validation, TokenStream)
        prompts = _beginnings(validation, tokenizer.end_of_text, min(PROMPT_TOKENS, longest), new)
    if not prompts.tokens:
        raise UserError(f"--generate: no validation text leaves room for {new} new tokens; ask for fewer")
    return prompts


def _beginnings(stream: TokenStream, end_of_text: int, length: int, new: int) -> Prompts:
    """The text that begins next after each of evenly spaced places; in a very long text, the place itself."""
    starts = []
    for place in range(PROMPTS):
        start = place * stream.num_tokens // PROMPTS
        ahead = stream.read(start, min(LOOK_AHEAD, stream.num_tokens - start))
        found = np.flatnonzero(ahead == end_of_text)
        starts.append(start + int(found[0]) if len(found) else start)
    # A text that is shorter than its prompt is left out: another text would begin in it.
    inside = [start for start in sorted(set(starts)) if start + length + new <= stream.num_tokens]
    whole = [stream.read(start, length + new).tolist() for start in inside]
    whole = [tokens for tokens in whole if end_of_text not in tokens[1:length]]
    real = [_up_to(tokens[length:], end_of_text) for tokens in whole]
    return Prompts([tokens[:length] for tokens in whole], f"the first {length} tokens of validation texts", real)


def _up_to(tokens: list[int], end: int) -> Written:
    return Written(tokens[: tokens.index(end)], True) if end in tokens else Written(tokens, False)


# ---------------------------------------------------------------- figures


def check(
    decoder: Decoder,
    prompts: Prompts,
    end_of_turn: int | None,
    options: SamplingOptions,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, object]:
    """{"prompts", "origin", "cut", sampling options, "model": figures, "real": figures or None}."""
    if end_of_turn is not None:
        options = dataclasses.replace(options, stop_token_ids=(end_of_turn,))
    made = []
    for start in range(0, len(prompts.tokens), TOGETHER):
        part = generate(decoder, prompts.tokens[start : start + TOGETHER], options)
        made += [Written(one.tokens, one.finish_reason == "stop") for [one] in part]
        progress(len(part))
    return {
        "prompts": len(made),
        "origin": prompts.origin,
        "cut": prompts.cut,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "model": figures(made),
        "real": figures(prompts.real) if prompts.real else None,
    }


def figures(texts: Sequence[Written]) -> dict[str, float | None]:
    """{"distinct_1", "distinct_2", "distinct_3", "rep_4", "stops", "tokens"}; None where no text is long enough.

    "stops" is the share of the texts that came to their end, "tokens" their mean length.
    """
    found: dict[str, float | None] = {}
    for n in (1, 2, 3):
        grams = [gram for text in texts for gram in _grams(text.tokens, n)]
        found[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else None
    repeated = [1 - len(set(grams)) / len(grams) for text in texts if (grams := _grams(text.tokens, 4))]
    found["rep_4"] = sum(repeated) / len(repeated) if repeated else None
    found["stops"] = sum(text.stopped for text in texts) / len(texts)
    found["tokens"] = sum(len(text.tokens) for text in texts) / len(texts)
    return found


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[start:] for start in range(n))))
