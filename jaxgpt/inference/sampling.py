"""The rules that turn logits into the next token, each row of a batch by its own: repetition penalty, temperature,
top-k, top-p, min-p, in Hugging Face's order.

A token is drawn by inverse cumulative distribution: sort the tokens, the likeliest first and equal ones by id, and take
the first at which the summed weight exceeds a uniform number times the weight that may be drawn. Top-k, top-p and
min-p all keep a prefix of that order, so each only lowers this weight.

Sorting GPT-2's vocabulary takes longer than a small model's whole step, so only candidates are sorted: a vocabulary of
bytes or characters whole, of a larger one the 64 best tokens. Where a row may draw others, a search over the bits of a
float32 finds the cuts, a pass over the vocabulary for each bit. All rules are traced: changing them compiles nothing.

Axes in names: B rows, V vocabulary, K candidates, N blocks of the vocabulary, L tokens of a block, 1 an axis of
size one.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.errors import UserError

FLOAT = jnp.finfo(jnp.float32)
CANDIDATES = 64
SMALL_VOCABULARY = 256
BLOCK = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to continue a prompt."""

    max_new_tokens: int = 100
    """Tokens to add to the prompt, fewer if the end-of-text token or a stop comes first."""
    num_return_sequences: int = 1
    """Independent continuations of the one prompt."""
    temperature: float = 0.8
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_k: int = 50
    """Only the k likeliest tokens can be drawn; 0 turns the rule off."""
    top_p: float = 0.95
    """Only the smallest set of tokens whose probability reaches p can be drawn; 1 turns the rule off."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the likeliest can be drawn; 0 turns the rule off."""
    repetition_penalty: float = 1.0
    """Logits of tokens already in the prompt or the text are divided by it where positive and multiplied by it
    where negative (Keskar et al. 2019): above 1 discourages repetition, 1 turns the rule off."""
    stop: tuple[str, ...] = ()
    """Texts that end the continuation, which does not include them."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the continuation, which does not include them."""
    seed: int = 0
    """The same seed draws the same tokens."""

    def __post_init__(self) -> None:
        allowed = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "num_return_sequences": (self.num_return_sequences >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "a number >= 0 (0 takes the likeliest token)"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1 (1 is off)"),
            "min_p": (0 <= self.min_p <= 1, "between 0 (off) and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a number > 0 (1 is off)"),
            "stop": (
                not isinstance(self.stop, str) and all(isinstance(text, str) and text for text in self.stop),
                "a list of texts, none of them empty",
            ),
            "stop_token_ids": (all(token >= 0 for token in self.stop_token_ids), "token ids, each at least 0"),
            "seed": (0 <= self.seed < 2**31, "between 0 and 2147483647"),
        }
        for name, (valid, rule) in allowed.items():
            if not valid:
                raise UserError(f"{name} = {getattr(self, name)!r}, but it must be {rule}")


class Rules(NamedTuple):
    """The rules of each row: arrays (B,), all float32 but `top_k`, which is int32."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array


def rules_of(options: Sequence[SamplingOptions], vocab_size: int) -> Rules:
    """The rules of a batch, one row an option, as NumPy arrays of types that never change."""
    column = lambda name: np.minimum([getattr(row, name) for row in options], FLOAT.max).astype(np.float32)
    columns: dict[str, Any] = {name: column(name) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
    # A `top_k` of the vocabulary or more is the same as none, and cheaper as none.
    top_k_B: Any = np.array([row.top_k if row.top_k < vocab_size else 0 for row in options], np.int32)
    return Rules(**columns, top_k=top_k_B)


def draw_keys(seed_B: Array, row_B: Array, position_B: Array) -> Array:
    """One uniform float32 in [0, 1) for each of three integers (B,), which depends on nothing but them.

    `row_B` counts the continuations of one request, `position_B` the tokens of one text.
    """

    def uniform(seed: Array, row: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
        # float32 holds all multiples of 2^-24 below 1, and the largest of them is not 1.
        return (jax.random.bits(key) >> 8).astype(jnp.float32) * jnp.float32(2**-24)

    return jax.vmap(uniform)(seed_B, row_B, position_B)


def sample(logits_BV: Array, uniform_B: Array, rules: Rules, seen_BV: Array | None = None) -> tuple[Array, Array]:
    """Tokens (B,), int32, and the log-probability (B,), float32, the model gave them before any rule.

    Args:
        logits_BV: float32. However large they are, and however small the temperature, nothing becomes NaN, and
            the best token can always be drawn (a logit may be infinite; a row all of -inf has no best token).
        uniform_B: float32 in [0, 1), from `draw_keys`.
        rules: values within the limits of `SamplingOptions`.
        seen_BV: bool, the tokens of the prompt and the text so far; None where no row has a penalty.
    """
    scores_BV = logits_BV
    if seen_BV is not None:
        unused = (rules.repetition_penalty == 1).all()
        scores_BV = jax.lax.cond(unused, lambda *_: logits_BV, _penalise, logits_BV, seen_BV, rules)

    vocab_size = logits_BV.shape[-1]
    greedy_B = rules.temperature == 0
    few_B = greedy_B | ((rules.top_k >= 1) & (rules.top_k <= CANDIDATES))
    ways, way = [_best, _draw_from_candidates], (~greedy_B.all()).astype(jnp.int32)
    if vocab_size > SMALL_VOCABULARY:
        ways.append(functools.partial(_draw_each_its_way, few_B))
        way += (~few_B.all()).astype(jnp.int32)
    rules = rules._replace(
        # XLA multiplies by 1 / temperature, which must be neither infinite nor flushed to zero (-inf * 0 is NaN).
        temperature=jnp.clip(rules.temperature, 1e-30, 1e30),
        top_k=jnp.where(greedy_B, 1, jnp.where(rules.top_k == 0, vocab_size, rules.top_k)),
    )
    tokens_B = jax.lax.switch(way, ways, scores_BV, uniform_B, rules)
    return tokens_B, _log_probabilities(logits_BV, tokens_B)


def _penalise(logits_BV: Array, seen_BV: Array, rules: Rules) -> Array:
    penalty_B1 = jnp.clip(rules.repetition_penalty, 1e-30, 1e30)[:, None]
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    # An overflow must not turn a token that could be drawn into one that cannot.
    lower_BV = jnp.where(logits_BV > -jnp.inf, jnp.maximum(lower_BV, FLOAT.min), lower_BV)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def _log_probabilities(logits_BV: Array, tokens_B: Array) -> Array:
    chosen_B1 = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)
    best_B1 = logits_BV.max(axis=-1, keepdims=True)
    total_B1 = jnp.exp(_below(logits_BV, best_B1)).sum(axis=-1, keepdims=True)
    return (_below(chosen_B1, best_B1) - jnp.log(jnp.maximum(total_B1, FLOAT.tiny)))[:, 0]


def _below(x_BX: Array, best_B1: Array) -> Array:
    """Logits relative to the best one, which becomes 0: only the tail can overflow, to -inf (inf - inf is NaN)."""
    return jnp.minimum(x_BX, FLOAT.max) - jnp.clip(best_B1, FLOAT.min, FLOAT.max)


def _weights(scores_BX: Array, best_B1: Array, rules: Rules) -> Array:
    """Probabilities relative to the best token's, which becomes 1."""
    return jnp.exp(_below(scores_BX, best_B1) / rules.temperature[:, None])


def _best(scores_BV: Array, uniform_B: Array, rules: Rules) -> Array:
    """The likeliest token of each row (B,): as `jnp.argmax`, which takes six times as long on a CPU."""
    vocab_size = scores_BV.shape[-1]
    best_B1 = scores_BV.max(axis=-1, keepdims=True)
    ids_BV = jnp.where(scores_BV == best_B1, jnp.arange(vocab_size)[None], vocab_size - 1)
    return ids_BV.min(axis=-1).astype(jnp.int32)


def _draw_each_its_way(few_B: Array, scores_BV: Array, uniform_B: Array, rules: Rules) -> Array:
    """Tokens (B,) where some rows need the whole vocabulary. The others are drawn as if these were not there: the two
    ways sum in another order, and a row's token may not depend on the rows beside it."""
    from_all_B = _draw_from_all(scores_BV, uniform_B, rules)
    from_few = lambda: jnp.where(few_B, _draw_from_candidates(scores_BV, uniform_B, rules), from_all_B)
    return jax.lax.cond(few_B.any(), from_few, lambda: from_all_B)


def _draw_from_candidates(scores_BV: Array, uniform_B: Array, rules: Rules) -> Array:
    """Tokens (B,) where no row keeps any but its best `CANDIDATES`, or where the vocabulary is small."""
    vocab_size = scores_BV.shape[-1]
    count = vocab_size if vocab_size <= SMALL_VOCABULARY else CANDIDATES
    scores_BK, ids_BK = jax.lax.top_k(jnp.where(scores_BV == 0, 0.0, scores_BV), count)  # -0.0 ties with 0.0
    places = jnp.arange(count)
    # Reading the maximum as `scores_BK[:, :1]` would hide the top-k from XLA, which would sort the vocabulary.
    weights_BK = _weights(scores_BK, scores_BK.max(axis=-1, keepdims=True), rules)
    weights_BK = jnp.where(places[None] < rules.top_k[:, None], weights_BK, 0.0)
    mass_BK = jnp.cumsum(weights_BK, axis=-1)

    count_of = lambda mask_BK: mask_BK.sum(axis=-1, keepdims=True)
    top_p_mass_B1 = rules.top_p[:, None] * mass_BK[:, -1:]
    likely_BK = (weights_BK > 0) & (weights_BK >= rules.min_p[:, None])
    last_B1 = jnp.minimum(count_of(mass_BK < top_p_mass_B1), count_of(likely_BK) - 1)
    last_mass_B1 = jnp.where(places[None] == last_B1, mass_BK, 0.0).sum(axis=-1, keepdims=True)
    # At most the last place, for rounding may let the mass fall from one place to the next.
    place_B1 = jnp.minimum(count_of(mass_BK <= uniform_B[:, None] * last_mass_B1), last_B1)
    return jnp.where(places[None] == place_B1, ids_BK, 0).sum(axis=-1).astype(jnp.int32)


def _draw_from_all(scores_BV: Array, uniform_B: Array, rules: Rules) -> Array:
    """Tokens (B,) for any rules and any vocabulary."""
    vocab_size = scores_BV.shape[-1]
    weights_BV = _weights(scores_BV, scores_BV.max(axis=-1, keepdims=True), rules)
    scores_BNL, weights_BNL = _blocks(scores_BV, -jnp.inf), _blocks(weights_BV, 0.0)
    uniform_B11, top_k_B11, top_p_B11, min_p_B11 = (
        x_B[:, None, None] for x_B in (uniform_B, rules.top_k, rules.top_p, rules.min_p)
    )

    rules_off_and_cut = [
        (top_k_B11 >= vocab_size, lambda mass_B11: _top_k_cut(scores_BNL, weights_BNL, top_k_B11)),
        (top_p_B11 >= 1, lambda mass_B11: _top_p_cut(weights_BNL, top_p_B11 * mass_B11)),
        (min_p_B11 == 0, lambda mass_B11: (_total(jnp.where(weights_BNL >= min_p_B11, weights_BNL, 0.0)), min_p_B11)),
    ]
    mass_B11 = _total(weights_BNL)
    least_B11 = jnp.zeros_like(mass_B11)
    for off_B11, cut in rules_off_and_cut:
        kept = jax.lax.cond(off_B11.all(), lambda mass_B11: (mass_B11, jnp.zeros_like(mass_B11)), cut, mass_B11)
        mass_B11, least_B11 = jnp.minimum(mass_B11, kept[0]), jnp.maximum(least_B11, kept[1])
    weights_BNL = jnp.where(weights_BNL >= least_B11, weights_BNL, 0.0)
    ids_B = _at_mass(scores_BNL, weights_BNL, mass_B11, uniform_B11)
    return jnp.clip(ids_B, 0, vocab_size - 1).astype(jnp.int32)


def _top_k_cut(scores_BNL: Array, weights_BNL: Array, top_k_B11: Array) -> tuple[Array, Array]:
    """Weight (B, 1, 1) of the k best tokens together, and of the least of them."""
    cut_B11 = _threshold(scores_BNL, jnp.ones_like(weights_BNL), top_k_B11)
    above_BNL = scores_BNL > cut_B11
    least_B11 = jnp.where(scores_BNL == cut_B11, weights_BNL, 0.0).max(axis=(1, 2), keepdims=True)
    tied_B11 = top_k_B11 - above_BNL.sum(axis=(1, 2), keepdims=True)
    return _total(jnp.where(above_BNL, weights_BNL, 0.0)) + tied_B11 * least_B11, least_B11


def _top_p_cut(weights_BNL: Array, target_B11: Array) -> tuple[Array, Array]:
    """Weight (B, 1, 1) of the fewest best tokens that reach the target together, and of the least of them."""
    target_B11 = jnp.maximum(target_B11, FLOAT.tiny)
    least_B11 = _threshold(weights_BNL, weights_BNL, target_B11)
    above_B11 = _total(jnp.where(weights_BNL > least_B11, weights_BNL, 0.0))
    tied_B11 = jnp.maximum(jnp.ceil((target_B11 - above_B11) / least_B11), 1)
    return above_B11 + tied_B11 * least_B11, least_B11


def _at_mass(scores_BNL: Array, weights_BNL: Array, mass_B11: Array, uniform_B11: Array) -> Array:
    """Ids (B,), float32: the first token of each row that with all better ones weighs more than a share of the mass.

    The weights are 0 where nothing may be drawn, and more than the mass where it holds only some of equal tokens.
    """
    target_B11 = uniform_B11 * mass_B11
    cut_B11 = _threshold(scores_BNL, weights_BNL, target_B11, operator.gt)
    above_B11 = _total(jnp.where(scores_BNL > cut_B11, weights_BNL, 0.0))
    tied_BNL = scores_BNL == cut_B11
    weight_B11 = jnp.where(tied_BNL, weights_BNL, FLOAT.tiny).max(axis=(1, 2), keepdims=True)
    # How many of the tied ones the mass holds, and how many of these go before the one drawn.
    held_B11 = jnp.minimum(jnp.round((mass_B11 - above_B11) / weight_B11), _total(jnp.where(tied_BNL, 1.0, 0.0)))
    place_B11 = jnp.clip(jnp.floor((target_B11 - above_B11) / weight_B11), 0, jnp.maximum(held_B11 - 1, 0))

    # The lower id of equal tokens goes first. float32 holds ids up to 2^24.
    blocks, block = scores_BNL.shape[1:]
    ids_1NL = jnp.arange(blocks * block, dtype=jnp.float32).reshape(1, blocks, block)
    order_BNL = jnp.where(tied_BNL, -ids_1NL, -jnp.inf)
    found_B11 = jax.lax.cond(
        (place_B11 == 0).all(),
        lambda: order_BNL.max(axis=(1, 2), keepdims=True),
        lambda: _threshold(order_BNL, jnp.ones_like(weights_BNL), place_B11 + 1),
    )
    return -found_B11[:, 0, 0]


def _blocks(x_BV: Array, filler: float) -> Array:
    """(B, V) as (B, N, L): a CPU sums many blocks side by side six times as fast as one long row."""
    rows, size = x_BV.shape
    return jnp.pad(x_BV, ((0, 0), (0, -size % BLOCK)), constant_values=filler).reshape(rows, -1, BLOCK)


def _total(x_BNL: Array) -> Array:
    return x_BNL.sum(axis=1, keepdims=True).sum(axis=2, keepdims=True)


def _threshold(x_BNL: Array, weights_BNL: Array, target_B11: Array, reaches: Callable = operator.ge) -> Array:
    """The highest float32 (B, 1, 1) such that the weights where `x_BNL` is not below it reach the target.

    Rounding may keep all of a row from it: then the lowest `x_BNL` that has a weight.
    """

    def set_bit(i: Array, order_B11: Array) -> Array:
        higher_B11 = order_B11 | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        total_B11 = _total(jnp.where(x_BNL >= _float_at(higher_B11), weights_BNL, 0.0))
        return jnp.where(reaches(total_B11, target_B11), higher_B11, order_B11)

    order_B11 = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(target_B11.shape, jnp.uint32))
    lowest_B11 = jnp.where(weights_BNL > 0, x_BNL, jnp.inf).min(axis=(1, 2), keepdims=True)
    # fmax prefers the number to a NaN, which the lowest orders stand for.
    return jnp.fmax(_float_at(order_B11), lowest_B11)


def _float_at(order: Array) -> Array:
    """The float32 at a place in their order, a uint32: the sign bit flipped, and the others of negative numbers."""
    sign = jnp.uint32(1 << 31)
    return jax.lax.bitcast_convert_type(jnp.where(order >= sign, order ^ sign, ~order), jnp.float32)
