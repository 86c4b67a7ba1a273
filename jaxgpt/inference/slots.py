"""Rows of a batch on the device, each with a request of its own: the compiled programs of `generate` and the engine.

`prefill` reads prompts into new rows, `decode_chunk` adds tokens to all rows that have some left to make. `generate`
calls these two on a batch of its own. The engine keeps one batch: it puts new rows into it (`admit`), ends rows early
(`release`), and changes the length of the cache (`resize`).

A row has its own rules, length and random stream, so its tokens do not depend on the rows beside it.

Axes in names: P prompts, B rows (slots), S cache positions or steps of a chunk, T prompt positions, V vocabulary,
K stop tokens or alternatives, A heads of all rows (B x N), H head size.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from jaxgpt.inference.sampling import Rules, SamplingOptions, draw_keys, rules_of, sample
from jaxgpt.model import gpt2
from jaxgpt.model.attention import KVCache
from jaxgpt.parallel.sharding import replicated
from jaxgpt.settings import ModelConfig

NO_TOKEN = -1
STOPS = 16  # the arrays of stop tokens grow in steps of this, to have few shapes
ALTERNATIVES = 20  # the likeliest tokens that can be returned beside each one; OpenAI's limit
PLACES = 64  # of a prompt whose logits exist together: 13 MB at GPT-2's vocabulary
SMALLEST_CACHE = 64  # positions
FREE = SamplingOptions(temperature=0.0)  # rules of a row that is not in use: those that cost least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The state of every row between two steps. Donated, so the cache lies in memory once."""

    cache: KVCache
    token_B: Array  # the last token, which the cache does not hold yet
    left_B: Array  # tokens still to make; 0: the row is not in use, or has ended
    seen_BV: Array | None  # the tokens in prompt and text, for repetition penalties; None where no row has one
    seed_B: Array
    row_B: Array
    stops_BK: Array
    rules: Rules


def empty_slots(config: ModelConfig, vocab_size: int, slots: int, positions: int) -> Slots:
    """Slots that are not in use, with a cache of `positions` each."""
    heads, size = config.n_head, config.n_embd // config.n_head
    zeros = lambda: tuple(jnp.zeros((slots * heads, positions, size), config.dtype) for _ in range(config.n_layer))
    return Slots(
        cache=KVCache(zeros(), zeros(), jnp.zeros(slots, jnp.int32)),
        token_B=jnp.zeros(slots, jnp.int32),
        left_B=jnp.zeros(slots, jnp.int32),
        seen_BV=jnp.zeros((slots, vocab_size), bool),
        seed_B=jnp.zeros(slots, jnp.uint32),
        row_B=jnp.zeros(slots, jnp.int32),
        stops_BK=jnp.full((slots, STOPS), NO_TOKEN, jnp.int32),
        rules=jax.tree.map(jnp.asarray, rules_of([FREE] * slots, vocab_size)),
    )


# ---------------------------------------------------------------- reading prompts


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "positions", "n", "penalties"))
def prefill(
    config: ModelConfig,
    vocab_size: int,
    positions: int,
    n: int,
    penalties: bool,
    weights: dict,
    tokens_PT: Array,
    length_P: Array,
    *,
    left_B: Array,
    seed_B: Array,
    row_B: Array,
    stops_BK: Array,
    rules: Rules,
) -> Slots:
    """`n` rows a prompt, prompt by prompt. Each padded prompt is read once, without its last token.

    The cache has room for `positions`; the arrays after `length_P` are fields of `Slots`.
    """
    cache = gpt2.read_prompt(config, vocab_size, weights, tokens_PT, length_P - 1, positions)
    prompts = jnp.arange(len(length_P))
    seen_PV = None
    if penalties:
        real_PT = jnp.arange(tokens_PT.shape[1])[None] < length_P[:, None]
        seen_PV = jnp.zeros((len(length_P), vocab_size), bool).at[prompts[:, None], tokens_PT].max(real_PT)

    def repeat(x: Array) -> Array:
        by_prompt = x.reshape(len(length_P), -1, *x.shape[1:])  # a layer's keys have the heads of all prompts first
        return jnp.repeat(by_prompt, n, axis=0).reshape(-1, *x.shape[1:])

    cache, token_B, seen_BV = jax.tree.map(repeat, (cache, tokens_PT[prompts, length_P - 1], seen_PV))
    return Slots(cache, token_B, left_B, seen_BV, seed_B, row_B, stops_BK, rules)


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"))
def score(
    config: ModelConfig, vocab_size: int, weights: dict, tokens_1T: Array, wanted: Array
) -> tuple[Array, Array, Array]:
    """(log-probability of each token but the first given those before it (T,), the likeliest there (T, K), theirs)."""
    model, hidden_1TD = gpt2.prompt_hidden(config, vocab_size, weights, tokens_1T)
    positions, count = tokens_1T.shape[1], min(ALTERNATIVES, vocab_size)

    def places(hidden_and_tokens: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        hidden_PD, tokens_P = hidden_and_tokens
        logits_PV = model.logits(hidden_PD[None])[0]
        own_P = jnp.take_along_axis(logits_PV, tokens_P[:, None], axis=-1)[:, 0]
        return own_P - jax.nn.logsumexp(logits_PV, axis=-1), *_likeliest_if(wanted, logits_PV, count)

    # The logits at a place are those of the token after it; at the last, of none.
    size = min(PLACES, positions)
    next_T = jnp.roll(tokens_1T[0], -1)
    in_chunks = lambda x: jnp.pad(x, ((0, -positions % size), *[(0, 0)] * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])
    scores = jax.lax.map(places, (in_chunks(hidden_1TD[0]), in_chunks(next_T)))
    logprobs_T, ids_TK, others_TK = (jnp.roll(jax.lax.collapse(x, 0, 2)[:positions], 1, axis=0) for x in scores)
    return logprobs_T, ids_TK, others_TK


# ---------------------------------------------------------------- decoding


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "most", "count", "mesh"), donate_argnames="slots")
def decode_chunk(
    config: ModelConfig,
    vocab_size: int,
    most: int,
    count: int,
    mesh: Mesh | None,
    weights: dict,
    slots: Slots,
    max_steps: Array,
    wanted: Array,
) -> tuple[Slots, tuple[Array, ...]]:
    """(slots, (tokens (B, most), log-probabilities, likeliest tokens (B, most, count), theirs, left (B,))).

    Up to `max_steps` tokens, at most `most`, for each row that has some left; NO_TOKEN where there is none. The cache
    must have room for them. The `count` likeliest tokens are zeros unless they are `wanted`.
    """
    rows = slots.token_B.shape[0]

    def unfinished(carry: tuple) -> Array:
        step, _, _, left_B, _, _ = carry
        return (step < max_steps) & (left_B > 0).any()

    def add_token(carry: tuple) -> tuple:
        step, cache, token_B, left_B, seen_BV, out = carry
        busy_B, length_B = left_B > 0, cache.length_B
        logits_BV, cache = gpt2.read_token(config, vocab_size, weights, token_B, cache)
        new_B, logprob_B = sample(logits_BV, uniform_SB[step], rules, seen_BV)
        others = _likeliest_if(wanted, logits_BV, count) if count else ()
        new = (jnp.where(busy_B, new_B, NO_TOKEN), logprob_B, *others)
        out = tuple(jax.lax.dynamic_update_index_in_dim(whole, part, step, 1) for whole, part in zip(out, new))
        # A row that is not busy stays where it is, or its length would outgrow the cache; its token means nothing.
        cache = dataclasses.replace(cache, length_B=jnp.where(busy_B, cache.length_B, length_B))
        stopped_B = (new_B[:, None] == slots.stops_BK).any(axis=1)
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(rows), new_B].max(busy_B)
        left_B = jnp.where(busy_B & ~stopped_B, left_B - 1, 0)
        return step + 1, cache, new_B, left_B, seen_BV, out

    # A row that is not busy must not choose how the others' tokens are drawn.
    idle = jax.tree.map(jnp.asarray, rules_of([FREE], vocab_size))
    rules = jax.tree.map(lambda own_B, free_1: jnp.where(slots.left_B > 0, own_B, free_1), slots.rules, idle)
    # One random number for each place in a text, drawn here for all steps at once: in the loop it would cost a small
    # model more than a layer.
    place_SB = slots.cache.length_B[None] + 1 + jnp.arange(most)[:, None]
    seed_SB, row_SB = (jnp.broadcast_to(x[None], place_SB.shape) for x in (slots.seed_B, slots.row_B))
    uniform_SB = draw_keys(seed_SB.ravel(), row_SB.ravel(), place_SB.ravel()).reshape(place_SB.shape)
    empty = [jnp.full((rows, most), NO_TOKEN, jnp.int32), jnp.zeros((rows, most), jnp.float32)]
    if count:
        empty += [jnp.zeros((rows, most, count), jnp.int32), jnp.zeros((rows, most, count), jnp.float32)]
    start = (jnp.int32(0), slots.cache, slots.token_B, slots.left_B, slots.seen_BV, tuple(empty))
    _, cache, token_B, left_B, seen_BV, out = jax.lax.while_loop(unfinished, add_token, start)
    slots = dataclasses.replace(slots, cache=cache, token_B=token_B, left_B=left_B, seen_BV=seen_BV)
    out = (*out, left_B)
    if mesh is not None:
        # The compiler may leave the answer split over the mesh; whole on each device, any process can read it.
        out = jax.lax.with_sharding_constraint(out, replicated(mesh))
    return slots, out


def _likeliest_if(wanted: Array, logits_BV: Array, count: int) -> tuple[Array, Array]:
    """The `count` likeliest tokens (B, count) and their log-probabilities; zeros where they are not `wanted`."""

    def find(logits_BV: Array) -> tuple[Array, Array]:
        best_BK, ids_BK = jax.lax.top_k(logits_BV, count)
        return ids_BK, best_BK - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)

    shape = (logits_BV.shape[0], count)
    return jax.lax.cond(wanted, find, lambda _: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)), logits_BV)


# ---------------------------------------------------------------- rows come and go


@functools.partial(jax.jit, donate_argnames="slots")
def admit(slots: Slots, one: Slots, slot: Array) -> Slots:
    """`slots` with one new row, as `prefill` gives it, at `slot`; its cache may be shorter."""
    # The cache after the prompt is an earlier request's: each place is overwritten before it is read.
    put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, slot * part.shape[0], axis=0)
    return jax.tree.map(put, slots, one)


@functools.partial(jax.jit, donate_argnames="slots")
def release(slots: Slots, ended_B: Array) -> Slots:
    """`slots` in which the rows of `ended_B` have ended."""
    return dataclasses.replace(slots, left_B=jnp.where(ended_B, 0, slots.left_B))


def doubled(smallest: int, largest: int) -> list[int]:
    """Few sizes, each of which is a program of its own: the smallest, doubled until it is the largest."""
    sizes = [min(smallest, largest)]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    return sizes


def size_for(length: int, sizes: list[int]) -> int:
    """The smallest of `sizes` for texts of up to `length`, which may be more than the largest."""
    return next((size for size in sizes if size >= length), sizes[-1])


def resize(slots: Slots, sizes: list[int], length: int) -> Slots:
    """`slots` with the smallest cache of `sizes` for texts of up to `length`, which must be that of the longest row.

    A step reads the whole cache: of 16 slots of 124M it took 76, 91 and 127 ms with 128, 256 and 1,024 positions.
    Goes by way of all sizes between, so that there are few programs.
    """
    place, end = (sizes.index(size) for size in (slots.cache.keys[0].shape[1], size_for(length, sizes)))
    while place != end:
        place += 1 if end > place else -1
        slots = _with_positions(slots, sizes[place])
    return slots


@functools.partial(jax.jit, static_argnames="positions")
def _with_positions(slots: Slots, positions: int) -> Slots:
    more = positions - slots.cache.keys[0].shape[1]
    fit = lambda x_ASH: jnp.pad(x_ASH, ((0, 0), (0, more), (0, 0))) if more > 0 else x_ASH[:, :positions]
    keys, values = (tuple(map(fit, arrays)) for arrays in (slots.cache.keys, slots.cache.values))
    return dataclasses.replace(slots, cache=KVCache(keys, values, slots.cache.length_B))
