"""A fixed batch of slots on the device, each with a request of its own: what the engine's programs work on.

Axes in names: B slots, S cache positions or steps of a chunk, T prompt positions, V vocabulary, K stop tokens or
alternatives.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxgpt.inference.decode import NO_TOKEN, Decoder
from jaxgpt.inference.sampling import Rules, SamplingOptions, draw_keys, rules_of, sample
from jaxgpt.model import gpt2
from jaxgpt.model.attention import KVCache
from jaxgpt.settings import ModelConfig

STOPS = 8  # stop tokens of a request, the end-of-text token among them
ALTERNATIVES = 20  # the likeliest tokens that can be told beside each one; OpenAI's limit
PLACES = 64  # of a prompt whose logits exist together: 13 MB at GPT-2's vocabulary
SMALLEST_CACHE = 64  # positions
FREE = SamplingOptions(temperature=0.0)  # of a slot that nobody has: the rules that cost least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Where every slot stands. Donated, so the cache lies in memory once."""

    cache: KVCache
    token_B: jax.Array
    """The last token, which the cache does not hold yet."""
    left_B: jax.Array
    """Tokens still to make; 0: nobody is there, or it has come to its end."""
    seen_BV: jax.Array
    """The tokens in prompt and text, for repetition penalties."""
    seed_B: jax.Array
    row_B: jax.Array
    stops_BK: jax.Array
    rules: Rules


def empty_slots(decoder: Decoder, slots: int, positions: int) -> Slots:
    """Slots with a cache of so many positions each; `resize` gives them another one."""
    config = decoder.config
    heads, size = config.n_head, config.n_embd // config.n_head
    zeros = lambda: jnp.zeros((slots * heads, positions, size), config.dtype)
    cache = KVCache(
        tuple(zeros() for _ in range(config.n_layer)),
        tuple(zeros() for _ in range(config.n_layer)),
        jnp.zeros(slots, jnp.int32),
    )
    return Slots(
        cache,
        token_B=jnp.zeros(slots, jnp.int32),
        left_B=jnp.zeros(slots, jnp.int32),
        seen_BV=jnp.zeros((slots, decoder.vocab_size), bool),
        seed_B=jnp.zeros(slots, jnp.uint32),
        row_B=jnp.zeros(slots, jnp.int32),
        stops_BK=jnp.full((slots, STOPS), NO_TOKEN, jnp.int32),
        rules=jax.tree.map(jnp.asarray, rules_of([FREE] * slots, decoder.vocab_size)),
    )


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
    """The same with the smallest cache for texts of up to `length`, as all that are under way must be.

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


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "positions"))
def read(config: ModelConfig, vocab_size: int, weights: dict, tokens_1T, length, positions: int):
    """(a cache of `positions` with a prompt read into it, all but its last token; which tokens are in it (V,))."""
    cache = gpt2.read_prompt(config, vocab_size, weights, tokens_1T, length[None] - 1, positions)
    is_own_T = jnp.arange(tokens_1T.shape[1]) < length
    return cache, jnp.zeros(vocab_size, bool).at[tokens_1T[0]].max(is_own_T)


@functools.partial(jax.jit, donate_argnames="slots")
def admit(slots: Slots, prompt: KVCache, seen_V, slot, *, last_token, left, seed, row, stops_K, rules: Rules) -> Slots:
    """`slots` with a prompt, as `read` gives it, in one of them."""
    # What lies after the prompt in the slot's cache is an earlier request's: each place is overwritten before it is
    # read.
    put = lambda whole, part: jax.lax.dynamic_update_slice(
        whole, part.astype(whole.dtype), (slot * part.shape[0], 0, 0)
    )
    cache = KVCache(
        tuple(map(put, slots.cache.keys, prompt.keys)),
        tuple(map(put, slots.cache.values, prompt.values)),
        slots.cache.length_B.at[slot].set(prompt.length_B[0]),
    )
    return Slots(
        cache,
        token_B=slots.token_B.at[slot].set(last_token),
        left_B=slots.left_B.at[slot].set(left),
        seen_BV=slots.seen_BV.at[slot].set(seen_V),
        seed_B=slots.seed_B.at[slot].set(seed),
        row_B=slots.row_B.at[slot].set(row),
        stops_BK=slots.stops_BK.at[slot].set(stops_K),
        rules=jax.tree.map(lambda all_B, own_1: all_B.at[slot].set(own_1[0]), slots.rules, rules),
    )


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"))
def score(config: ModelConfig, vocab_size: int, weights: dict, tokens_1T, alternatives):
    """(log-probability of each token after those before it (T,), the likeliest tokens there (T, K), theirs (T, K)).

    The first token has nothing before it: what stands at its place means nothing.
    """
    model, hidden_1TD = gpt2.prompt_hidden(config, vocab_size, weights, tokens_1T)
    positions, count = tokens_1T.shape[1], min(ALTERNATIVES, vocab_size)

    def places(hidden_and_tokens):
        hidden_PD, tokens_P = hidden_and_tokens
        logits_PV = model.logits(hidden_PD[None])[0]
        told_P = jnp.take_along_axis(logits_PV, tokens_P[:, None], axis=-1)[:, 0]
        return told_P - jax.nn.logsumexp(logits_PV, axis=-1), *_likeliest_if(alternatives, logits_PV, count)

    # Each place tells of the token after it: the last of none.
    size = min(PLACES, positions)
    next_T = jnp.roll(tokens_1T[0], -1)
    in_chunks = lambda x: jnp.pad(x, ((0, -positions % size), *[(0, 0)] * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])
    told = jax.lax.map(places, (in_chunks(hidden_1TD[0]), in_chunks(next_T)))
    return tuple(jnp.roll(jax.lax.collapse(x, 0, 2)[:positions], 1, axis=0) for x in told)


@functools.partial(jax.jit, donate_argnames="slots")
def release(slots: Slots, slot) -> Slots:
    return dataclasses.replace(slots, left_B=slots.left_B.at[slot].set(0))


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "steps"), donate_argnames="slots")
def decode_chunk(config: ModelConfig, vocab_size: int, steps: int, weights: dict, slots: Slots, alternatives):
    """(slots, (tokens (B, steps), log-probabilities, likeliest tokens (B, steps, K), theirs, left (B,))).

    Up to `steps` tokens for each slot that has some left; NO_TOKEN where there is none. The cache must have room for
    them.
    """
    rows, count = slots.token_B.shape[0], min(ALTERNATIVES, vocab_size)

    def unfinished(carry):
        step, slots, _ = carry
        return (step < steps) & (slots.left_B > 0).any()

    def add_token(carry):
        step, slots, out = carry
        busy_B = slots.left_B > 0
        logits_BV, cache = gpt2.read_token(config, vocab_size, weights, slots.token_B, slots.cache)
        token_B, logprob_B = sample(logits_BV, uniform_SB[step], rules, slots.seen_BV)
        others = _likeliest_if(alternatives, logits_BV, count)
        stopped_B = (token_B[:, None] == slots.stops_BK).any(axis=1)
        new = (jnp.where(busy_B, token_B, NO_TOKEN), logprob_B, *others)
        out = tuple(jax.lax.dynamic_update_index_in_dim(whole, part, step, 1) for whole, part in zip(out, new))
        slots = dataclasses.replace(
            slots,
            # A slot that is not busy stays where it is, or its length would outgrow the cache.
            cache=dataclasses.replace(cache, length_B=jnp.where(busy_B, cache.length_B, slots.cache.length_B)),
            token_B=jnp.where(busy_B, token_B, slots.token_B),
            left_B=jnp.where(busy_B & ~stopped_B, slots.left_B - 1, 0),
            seen_BV=slots.seen_BV.at[jnp.arange(rows), token_B].max(busy_B),
        )
        return step + 1, slots, out

    # A slot that is not busy must not choose how the others' tokens are drawn.
    idle = jax.tree.map(jnp.asarray, rules_of([FREE], vocab_size))
    rules = jax.tree.map(lambda own_B, free_1: jnp.where(slots.left_B > 0, own_B, free_1), slots.rules, idle)
    # All random numbers at once, as in decode.py, and for the same places: a seed draws what it draws there.
    place_SB = slots.cache.length_B[None] + 1 + jnp.arange(steps)[:, None]
    draws = (jnp.broadcast_to(x[None], place_SB.shape).ravel() for x in (slots.seed_B, slots.row_B))
    uniform_SB = draw_keys(*draws, place_SB.ravel()).reshape(place_SB.shape)
    empty = (
        jnp.full((rows, steps), NO_TOKEN, jnp.int32),
        jnp.zeros((rows, steps), jnp.float32),
        jnp.zeros((rows, steps, count), jnp.int32),
        jnp.zeros((rows, steps, count), jnp.float32),
    )
    _, slots, out = jax.lax.while_loop(unfinished, add_token, (jnp.int32(0), slots, empty))
    return slots, (*out, slots.left_B)


def _likeliest_if(wanted, logits_BV, count: int):
    """The `count` likeliest tokens (B, count) and their log-probabilities; zeros where they are not `wanted`."""

    def find(logits_BV):
        best_BK, ids_BK = jax.lax.top_k(logits_BV, count)
        return ids_BK, best_BK - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)

    shape = (logits_BV.shape[0], count)
    return jax.lax.cond(wanted, find, lambda _: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)), logits_BV)
