"""From prompts to their continuations: read each prompt once into a cache, then one token a row a step.

The whole loop is one call of `slots.decode_chunk` (or one call every few steps, to stream). Shapes come in powers of
two, and what varies within them (prompt lengths, new tokens, seeds, rules, stops) is traced: a process compiles
`prefill` and `decode_chunk` a handful of times, whatever it is asked.

Axes in names: P prompts, B rows (continuations: n a prompt, prompt by prompt), T prompt positions, S steps,
K stop tokens.
"""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxgpt.errors import UserError
from jaxgpt.inference.sampling import SamplingOptions, rules_of
from jaxgpt.inference.slots import NO_TOKEN, STOPS, Slots, decode_chunk, prefill, release
from jaxgpt.model import gpt2
from jaxgpt.settings import ModelConfig

SMALLEST_BUCKET = 16
WEIGHTS = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model laid out for decoding; made once, used for any number of prompts."""

    config: ModelConfig
    """Its dtype is that of the activations and of the cache."""
    vocab_size: int
    weights: dict
    end_of_text: int | None
    """The token that an empty prompt starts from, if the tokenizer has one; it ends every continuation."""
    ends: tuple[int, ...] = ()
    """The other tokens that do."""

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the weights are sharded over; None for one device."""
        return _mesh(self.weights)

    def stops(self, options: SamplingOptions) -> list[int]:
        """The tokens that end a continuation."""
        tokens = dict.fromkeys((self.end_of_text, *self.ends, *options.stop_token_ids))
        return [token for token in tokens if token is not None]

    def checked(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The prompt's tokens, at least one; raises UserError as `generate` does."""
        prompt, limit = list(prompt), self.config.n_positions
        if not prompt:
            if self.end_of_text is None:
                raise UserError("the prompt is empty and the tokenizer has no end-of-text token; give a prompt")
            prompt = [self.end_of_text]
        # Indexing an array clamps silently: another tokenizer's ids would give nonsense and no error.
        if unknown := [token for token in prompt if not 0 <= token < self.vocab_size]:
            raise UserError(f"the prompt holds token {unknown[0]}, but the model's vocabulary is {self.vocab_size}")
        length, room = len(prompt), limit - len(prompt)
        if room < min(max_new_tokens, 1):  # a prompt that is only scored may fill all of it
            raise UserError(
                f"the prompt is {length} tokens and the model reads at most n_positions = {limit}, "
                f"the new ones included; shorten it by at least {1 - room}"
            )
        if max_new_tokens > room:
            raise UserError(
                f"a prompt of {length} tokens and {max_new_tokens} new ones are {max_new_tokens - room} more than "
                f"the model's n_positions = {limit}; ask for at most {room} new tokens, or shorten the prompt"
            )
        return prompt


@dataclasses.dataclass(frozen=True)
class Continuation:
    """The text that a model adds to a prompt, or a part of it."""

    tokens: list[int]  # without the token that ended it
    logprobs: list[float]
    """Natural logarithm of each token's probability under the model itself, before any sampling rule."""
    finish_reason: str | None
    """"stop" (the end-of-text token or a stop token came), "length", or None in a part that is not the last."""


Parts = Generator[list[Continuation], set[int] | None, None]
"""New parts of all rows, again and again; takes the indices of rows that are to end early."""


def build_decoder(
    config: ModelConfig,
    vocab_size: int,
    params: dict,
    end_of_text: int | None,
    weights: str | None = None,
    rows: int = 1,
    ends: Sequence[int] = (),
) -> Decoder:
    """`params`, on one device or sharded over a mesh, laid out for decoding with `weights` stored as one of WEIGHTS.

    None stores them as `config.dtype`. `rows`, how many texts will mostly be continued at once, decides only how the
    weights lie in memory. Activations and cache are bfloat16 on an accelerator unless the weights are
    float32, and always float32 on CPU, whose arithmetic is in float32 anyway.
    """
    kind = weights or config.dtype
    if kind not in WEIGHTS:
        raise UserError(f"weights = {kind!r}, but it must be one of {', '.join(WEIGHTS)}")
    on_cpu = next(iter(params["wpe"].devices())).platform == "cpu"
    layout = "plain" if not on_cpu or _mesh(params) is not None else "streamed" if rows == 1 else "turned"
    packed = _pack(config, params, kind, layout)
    compute: Literal["float32", "bfloat16"] = "float32" if on_cpu or kind == "float32" else "bfloat16"
    return Decoder(dataclasses.replace(config, dtype=compute), vocab_size, packed, end_of_text, tuple(ends))


def generate(decoder: Decoder, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> list[list[Continuation]]:
    """For each prompt its `num_return_sequences` continuations, all made in one call on the device.

    An empty prompt starts from the end-of-text token. On several hosts, every process calls this with the same
    arguments and gets the same answer. `options.stop` holds texts: text.py watches for those.

    Raises:
        UserError: a prompt and its new tokens do not fit `n_positions`, or a prompt cannot be read.
    """
    if not prompts:
        return []
    (rows,) = stream(decoder, prompts, options, options.max_new_tokens)
    n = options.num_return_sequences
    return [rows[i : i + n] for i in range(0, len(rows), n)]


def stream(decoder: Decoder, prompts: Sequence[Sequence[int]], options: SamplingOptions, chunk: int = 8) -> Parts:
    """The tokens of `generate`, handed out every `chunk` steps: one part a row, the rows prompt by prompt.

    A part's `finish_reason` is None until the row has ended; parts after that are empty. `.send(rows)` ends the
    rows of these indices early; closing the generator stops the work. Raises as `generate` does, at once.
    """
    return _parts(decoder, [decoder.checked(ids, options.max_new_tokens) for ids in prompts], options, chunk)


def _parts(decoder: Decoder, prompts: list[list[int]], options: SamplingOptions, chunk: int) -> Parts:
    """The rows' parts of up to `chunk` tokens, until all rows have ended."""
    if not prompts:
        return
    limit, stops = decoder.config.n_positions, decoder.stops(options)
    most = bucket(options.max_new_tokens, limit)
    # Twice the larger bucket holds any prompt and any number of new tokens of these buckets.
    positions = min(2 * max(bucket(max(map(len, prompts)), limit), most), limit)
    n, penalties = options.num_return_sequences, options.repetition_penalty != 1
    slots = start_rows(decoder, prompts, options, n, positions, penalties)
    program = (decoder.config, decoder.vocab_size, most, 0, decoder.mesh, decoder.weights)
    ended_B = np.arange(len(slots.left_B)) >= n * len(prompts)
    while not ended_B.all():
        slots, made = decode_chunk(*program, slots, np.int32(chunk), np.bool_(False))
        tokens_BS, logprobs_BS, left_B = jax.device_get(made)
        parts = [
            Continuation([], [], None) if ended_B[row] else _part(tokens_BS[row], logprobs_BS[row], left_B[row], stops)
            for row in range(n * len(prompts))
        ]
        ended_B |= left_B == 0
        stopped_B = np.isin(np.arange(len(ended_B)), list((yield parts) or ()))
        if (stopped_B & ~ended_B).any():
            slots = release(slots, stopped_B)
            ended_B |= stopped_B


def _part(tokens_S: np.ndarray, logprobs_S: np.ndarray, left: int, stops: list[int]) -> Continuation:
    tokens, reason = row_result(tokens_S, left, stops)
    tokens = tokens[: len(tokens) - (reason == "stop")]
    return Continuation(tokens, logprobs_S[: len(tokens)].tolist(), reason)


def row_result(tokens_S: np.ndarray, left: int, stops: list[int]) -> tuple[list[int], str | None]:
    """(tokens that a busy row got from `decode_chunk`, why it ended: "stop" by its last token, "length", or None)."""
    tokens = tokens_S[tokens_S != NO_TOKEN].tolist()
    if left:
        return tokens, None
    return tokens, "stop" if tokens[-1] in stops else "length"


def start_rows(
    decoder: Decoder,
    prompts: list[list[int]],
    options: SamplingOptions,
    n: int,
    positions: int,
    penalties: bool,
    first_row: int = 0,
) -> Slots:
    """`n` new rows a prompt, whose prompts have been read, with a cache of `positions`; rows that have ended fill up
    the number of prompts to a power of two. `first_row` is the number of a prompt's first row for its random draws."""
    asked, count = n * len(prompts), _power_of_two(len(prompts))
    tokens_PT = padded_prompts(prompts + [[0]] * (count - len(prompts)), decoder.config.n_positions)
    length_P = np.array([len(prompt) for prompt in prompts] + [1] * (count - len(prompts)), np.int32)
    stops = decoder.stops(options)
    stops_K = np.full(-(-max(len(stops), 1) // STOPS) * STOPS, NO_TOKEN, np.int32)
    stops_K[: len(stops)] = stops
    rows = n * count
    return prefill(
        decoder.config,
        decoder.vocab_size,
        positions,
        n,
        penalties,
        decoder.weights,
        tokens_PT,
        length_P,
        left_B=np.where(np.arange(rows) < asked, options.max_new_tokens, 0).astype(np.int32),
        seed_B=np.full(rows, options.seed, np.uint32),
        row_B=first_row + np.tile(np.arange(n, dtype=np.int32), count),
        stops_BK=np.tile(stops_K, (rows, 1)),
        rules=rules_of([options] * rows, decoder.vocab_size),
    )


def padded_prompts(prompts: Sequence[Sequence[int]], n_positions: int) -> np.ndarray:
    """(P, T), int32: the prompts with zeros after them, T the bucket of the longest."""
    tokens_PT = np.zeros((len(prompts), bucket(max(map(len, prompts)), n_positions)), np.int32)
    for row, prompt in zip(tokens_PT, prompts):
        row[: len(prompt)] = prompt
    return tokens_PT


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def bucket(length: int, largest: int) -> int:
    """The power of two that holds `length`, at least 16 and at most `largest`."""
    return min(max(SMALLEST_BUCKET, _power_of_two(length)), largest)


def _mesh(params: dict) -> Mesh | None:
    sharding = params["wpe"].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


_pack = jax.jit(gpt2.decoding_weights, static_argnames=("config", "kind", "layout"))
