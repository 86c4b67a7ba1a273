"""From prompts to their continuations: read each prompt once into a cache, then one token a row a step.

The whole loop is one jitted call (or one call every few steps, to stream). Shapes come in powers of two, and
what varies within them (prompt lengths, new tokens, seeds, rules, stops) is traced: a process compiles `_prefill`
and `_decode` a handful of times, whatever it is asked.

Every row has its own rules, length and random stream, so what it gets does not depend on the rows beside it.

Axes in names: P prompts, B rows (continuations: n a prompt, prompt by prompt), T prompt positions, S cache or text
positions, V vocabulary, K stop tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxgpt.errors import UserError
from jaxgpt.inference.sampling import Rules, SamplingOptions, draw_keys, rules_of, sample
from jaxgpt.model import gpt2
from jaxgpt.model.attention import KVCache
from jaxgpt.parallel.sharding import replicated
from jaxgpt.settings import ModelConfig

SMALLEST_BUCKET = 16
NO_TOKEN = -1
WEIGHTS = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model laid out for decoding; made once, used for any number of prompts."""

    config: ModelConfig
    """Its dtype is that of the activations and of the cache."""
    vocab_size: int
    weights: dict
    end_of_text: int | None
    """The token that ends every continuation, if the tokenizer has one."""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What the model wrote after a prompt."""

    tokens: list[int]
    """Without the token that ended it."""
    logprobs: list[float]
    """Natural logarithm of each token's probability under the model itself, before any sampling rule."""
    finish_reason: str | None
    """"stop" (the end-of-text token or a stop token came), "length", or None in a part that is not the last."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Where each row is between two steps. Donated, so the cache lies in memory once."""

    cache: KVCache
    token_B: jax.Array
    """The row's last token, which the cache does not hold yet."""
    done_B: jax.Array
    seen_BV: jax.Array | None
    """The tokens in prompt and text, where a row has a repetition penalty."""


def build_decoder(
    config: ModelConfig,
    vocab_size: int,
    params: dict,
    end_of_text: int | None,
    weights: str | None = None,
    rows: int = 1,
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
    layout = "plain"
    if on_cpu and _mesh(params) is None:
        layout = "streamed" if rows == 1 else "turned"
    packed = _pack(config, params, kind, layout)
    compute = "float32" if on_cpu or kind == "float32" else "bfloat16"
    return Decoder(dataclasses.replace(config, dtype=compute), vocab_size, packed, end_of_text)


def generate(decoder: Decoder, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> list[list[Continuation]]:
    """For each prompt its `num_return_sequences` continuations, all made in one call on the device.

    An empty prompt starts from the end-of-text token. On several hosts, every process calls this with the same
    arguments and gets the same answer. `options.stop` holds texts: text.py watches for those.

    Raises:
        UserError: a prompt and its new tokens do not fit `n_positions`, or a prompt cannot be read.
    """
    prompts = [checked_prompt(decoder, prompt, options.max_new_tokens) for prompt in prompts]
    if not prompts:
        return []
    (rows,) = _parts(decoder, prompts, options, options.max_new_tokens)
    n = options.num_return_sequences
    return [rows[i : i + n] for i in range(0, len(rows), n)]


def stream(
    decoder: Decoder, prompts: Sequence[Sequence[int]], options: SamplingOptions, chunk: int = 8
) -> Iterator[list[Continuation]]:
    """The tokens of `generate`, handed out every `chunk` steps: one part a row, the rows prompt by prompt.

    A part's `finish_reason` is None until the row has ended; parts after that are empty. `.send(rows)` ends the
    rows of these indices early; closing the generator stops the work. Raises as `generate` does, at once.
    """
    prompts = [checked_prompt(decoder, prompt, options.max_new_tokens) for prompt in prompts]
    return _parts(decoder, prompts, options, chunk) if prompts else iter(())


def _parts(decoder: Decoder, prompts: list[list[int]], options: SamplingOptions, chunk: int):
    """Generator of the rows' parts of up to `chunk` tokens, until all rows have ended."""
    n = options.num_return_sequences
    asked = len(prompts) * n
    prompts = prompts + [[0]] * (_power_of_two(len(prompts)) - len(prompts))  # rows that are done from the start
    rows = len(prompts) * n
    ids = [token for token in (decoder.end_of_text, *options.stop_token_ids) if token is not None]
    stops_K = np.full(-(-max(len(ids), 1) // 8) * 8, NO_TOKEN, np.int32)  # in eights: few shapes
    stops_K[: len(ids)] = ids
    traced = dict(
        stops_K=stops_K,
        seed_B=np.full(rows, options.seed, np.uint32),
        row_B=np.tile(np.arange(n, dtype=np.int32), len(prompts)),
        rules=rules_of([options] * rows, decoder.vocab_size),
    )
    most = bucket(options.max_new_tokens, decoder.config.n_positions)
    state = _read(decoder, prompts, n, most, penalties=options.repetition_penalty != 1)
    ended_B = np.arange(rows) >= asked
    left = options.max_new_tokens
    mesh = _mesh(decoder.weights)
    while left and not ended_B.all():
        steps = min(chunk, left)
        state, out = _decode(
            decoder.config, decoder.vocab_size, most, mesh, decoder.weights, state, np.int32(steps), ended_B, **traced
        )
        tokens_BS, logprobs_BS, made = jax.device_get(out)
        left -= steps
        parts = [
            _part(tokens_BS[row, :made], logprobs_BS[row, :made], ids, ended_B[row], last=not left)
            for row in range(asked)
        ]
        ended_B = ended_B | np.array([bool(part.finish_reason) for part in parts] + [True] * (rows - asked))
        stopped = yield parts
        ended_B[list(stopped or ())] = True


def _part(tokens, logprobs, stop_ids: list[int], ended: bool, last: bool) -> Continuation:
    tokens, logprobs = tokens.tolist(), logprobs.tolist()
    if ended:
        return Continuation([], [], None)
    end = next((i for i, token in enumerate(tokens) if token in stop_ids), None)
    if end is not None:
        return Continuation(tokens[:end], logprobs[:end], "stop")
    return Continuation(tokens, logprobs, "length" if last else None)


def _read(decoder: Decoder, prompts: list[list[int]], n: int, most: int, penalties: bool) -> _State:
    """The state of n rows a prompt after all of the prompt but its last token has been read."""
    longest = bucket(max(map(len, prompts)), decoder.config.n_positions)
    # Twice the larger bucket holds any prompt and any number of new tokens of these buckets.
    positions = min(2 * max(longest, most), decoder.config.n_positions)
    tokens_PT = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(tokens_PT, prompts):
        row[: len(prompt)] = prompt
    length_P = np.array([len(prompt) for prompt in prompts], np.int32)
    return _prefill(decoder.config, decoder.vocab_size, positions, n, penalties, decoder.weights, tokens_PT, length_P)


def checked_prompt(decoder: Decoder, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    prompt, limit = list(prompt), decoder.config.n_positions
    if not prompt:
        if decoder.end_of_text is None:
            raise UserError("the prompt is empty and the tokenizer has no end-of-text token; give a prompt")
        prompt = [decoder.end_of_text]
    # Indexing an array clamps silently: another tokenizer's ids would give nonsense and no error.
    if not 0 <= min(prompt) <= max(prompt) < decoder.vocab_size:
        unknown = next(token for token in prompt if not 0 <= token < decoder.vocab_size)
        raise UserError(f"the prompt holds token {unknown}, but the model's vocabulary is {decoder.vocab_size}")
    length, room = len(prompt), limit - len(prompt)
    if room < min(max_new_tokens, 1):  # a prompt that is only scored may fill all of it
        raise UserError(
            f"the prompt is {length} tokens and the model reads at most n_positions = {limit}, "
            f"the new ones included; shorten it by at least {1 - room}"
        )
    if max_new_tokens > room:
        raise UserError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones are {max_new_tokens - room} more than "
            f"the model's n_positions = {limit}; ask for at most {room} new tokens, "
            "or shorten the prompt"
        )
    return prompt


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def bucket(length: int, largest: int) -> int:
    """The power of two that holds `length`, at least 16 and at most `largest`."""
    return min(max(SMALLEST_BUCKET, _power_of_two(length)), largest)


def _mesh(params: dict) -> Mesh | None:
    sharding = params["wpe"].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


_pack = jax.jit(gpt2.decoding_weights, static_argnames=("config", "kind", "layout"))


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "positions", "n", "penalties"))
def _prefill(
    config: ModelConfig, vocab_size: int, positions: int, n: int, penalties: bool, weights: dict, tokens_PT, length_P
) -> _State:
    """Read each padded prompt once; its cache is copied for its n rows."""
    cache = gpt2.read_prompt(config, vocab_size, weights, tokens_PT, length_P - 1, positions)
    rows = jnp.arange(len(length_P))
    seen_PV = None
    if penalties:
        real_PT = jnp.arange(tokens_PT.shape[1])[None] < length_P[:, None]
        seen_PV = jnp.zeros((len(length_P), vocab_size), bool).at[rows[:, None], tokens_PT].max(real_PT)
    state = _State(cache, tokens_PT[rows, length_P - 1], jnp.zeros(len(length_P), bool), seen_PV)

    # Row by row: a layer's keys have the heads of all prompts on their first axis.
    def repeat(x):
        by_prompt = x.reshape(len(length_P), -1, *x.shape[1:])
        return jnp.repeat(by_prompt, n, axis=0).reshape(-1, *x.shape[1:])

    return jax.tree.map(repeat, state)


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "most", "mesh"), donate_argnames="state")
def _decode(
    config: ModelConfig,
    vocab_size: int,
    most: int,
    mesh: Mesh | None,
    weights: dict,
    state: _State,
    max_steps,
    ended_B,
    *,
    stops_K,
    seed_B,
    row_B,
    rules: Rules,
):
    """(state, (new tokens (B, most), their log-probabilities, how many steps were made)).

    Stops after `max_steps`, or when every row has ended: those of `ended_B`, and those that drew one of `stops_K`.
    """
    rows = len(seed_B)

    def unfinished(carry):
        step, state, _, _ = carry
        return (step < max_steps) & ~state.done_B.all()

    def add_token(carry):
        step, state, tokens_BS, logprobs_BS = carry
        logits_BV, cache = gpt2.read_token(config, vocab_size, weights, state.token_B, state.cache)
        token_B, logprob_B = sample(logits_BV, uniform_SB[step], rules, state.seen_BV)
        tokens_BS = jax.lax.dynamic_update_slice_in_dim(tokens_BS, token_B[:, None], step, axis=1)
        logprobs_BS = jax.lax.dynamic_update_slice_in_dim(logprobs_BS, logprob_B[:, None], step, axis=1)
        done_B = state.done_B | (token_B[:, None] == stops_K[None]).any(axis=1)
        seen_BV = None if state.seen_BV is None else state.seen_BV.at[jnp.arange(rows), token_B].set(True)
        return step + 1, _State(cache, token_B, done_B, seen_BV), tokens_BS, logprobs_BS

    # One random number for each place in a text, drawn here for all steps at once: in the loop it would cost a small
    # model more than a layer.
    place_SB = state.cache.length_B[None] + 1 + jnp.arange(most)[:, None]
    uniform_SB = draw_keys(
        *(jnp.broadcast_to(x[None], place_SB.shape).ravel() for x in (seed_B, row_B)), place_SB.ravel()
    )
    uniform_SB = uniform_SB.reshape(place_SB.shape)
    state = dataclasses.replace(state, done_B=state.done_B | ended_B)
    empty = (jnp.zeros((rows, most), jnp.int32), jnp.zeros((rows, most), jnp.float32))
    steps, state, *out = jax.lax.while_loop(unfinished, add_token, (jnp.int32(0), state, *empty))
    out = (*out, steps)
    if mesh is not None:
        # The compiler may leave the answer split over the mesh; whole on each device, any process can read it.
        out = jax.lax.with_sharding_constraint(out, replicated(mesh))
    return state, out
