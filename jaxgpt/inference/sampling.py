"""The rules that turn logits into the next token: temperature, then top-k, then top-p, as in Hugging Face.

Temperature, k and p are traced values, so changing them compiles nothing. That rules out `jax.lax.top_k`
(its k is a shape), and a full sort costs more than the rest of the step on a small model; both rules ask for
"the best entries whose weights reach a target", which a binary search over float32's 32 bits answers.

Each row draws from its own random stream: what is sampled for it does not depend on its neighbours.

Axes in names: B rows, V vocabulary, 1 an axis of size one.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxgpt.config import UserError

FLOAT = jnp.finfo(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to continue a prompt."""

    max_new_tokens: int = 100
    """Tokens to add to the prompt, fewer if the end-of-text token comes first."""
    num_return_sequences: int = 1
    """Independent continuations of the one prompt."""
    temperature: float = 0.8
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_k: int = 50
    """Only the k likeliest tokens can be drawn; 0 turns the rule off."""
    top_p: float = 0.95
    """Only the smallest set of tokens whose probability reaches p can be drawn; 1 turns the rule off."""
    seed: int = 0
    """The same seed draws the same tokens."""

    def __post_init__(self):
        allowed = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "num_return_sequences": (self.num_return_sequences >= 1, "at least 1"),
            "temperature": (
                0 <= self.temperature < math.inf,
                "a number >= 0 (0 takes the likeliest token)",
            ),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1 (1 is off)"),
            "seed": (0 <= self.seed < 2**31, "between 0 and 2147483647"),
        }
        for name, (valid, rule) in allowed.items():
            if not valid:
                raise UserError(f"{name} = {getattr(self, name)}, but it must be {rule}")


def row_keys(seed: jax.Array | int, rows: int, position: jax.Array | int) -> jax.Array:
    """One key a row (B,), for the token at `position`: it depends on nothing but these three numbers."""
    key_of = lambda row: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
    return jax.vmap(key_of)(jnp.arange(rows))


def sample(logits_BV, keys_B, temperature, top_k, top_p) -> jax.Array:
    """Tokens (B,), int32, drawn from float32 logits with one key a row.

    `temperature`, `top_k` and `top_p` are scalars within the limits of `SamplingOptions`. Equal logits rank
    by token id, the lower first: greedy takes the first of them, top-k and top-p cut between them.
    """

    def draw():
        scores_BV = filter_logits(logits_BV, temperature, top_k, top_p)
        return jax.vmap(jax.random.categorical)(keys_B, scores_BV)

    tokens_B = jax.lax.cond(temperature == 0, lambda: jnp.argmax(logits_BV, axis=-1), draw)
    return tokens_B.astype(jnp.int32)


def filter_logits(logits_BV, temperature, top_k, top_p) -> jax.Array:
    """Logits over the temperature (> 0), up to a constant a row; -inf for tokens that top-k or top-p leave out.

    However large the logits and however small the temperature, nothing becomes NaN, and the best token stays
    (a logit may be infinite; a row all of -inf has no best token).
    """
    rank_BV = _order(logits_BV)
    logits_BV = jnp.minimum(logits_BV, FLOAT.max)  # inf - inf would be NaN
    # The row's maximum goes to 0 before the division: only the tail can overflow, to -inf.
    scores_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    # XLA multiplies by 1 / temperature, which must be neither infinite nor flushed to zero (-inf * 0 is NaN).
    scores_BV = scores_BV / jnp.clip(temperature, 1e-30, 1e30)

    def drop(scores_BV, weights_BV, target):
        return jnp.where(_best(rank_BV, weights_BV, target), scores_BV, -jnp.inf)

    scores_BV = jax.lax.cond(
        top_k == 0,
        lambda scores_BV: scores_BV,
        lambda scores_BV: drop(scores_BV, jnp.ones_like(scores_BV), jnp.float32(top_k)),
        scores_BV,
    )
    # Probabilities of what top-k left. The largest is at least 1 / V, so a target of `tiny` keeps one token.
    return jax.lax.cond(
        top_p >= 1,
        lambda scores_BV: scores_BV,
        lambda scores_BV: drop(scores_BV, jax.nn.softmax(scores_BV), jnp.maximum(top_p, FLOAT.tiny)),
        scores_BV,
    )


def _order(x_BV) -> jax.Array:
    """uint32 that compare as the float32 do: flip all bits of a negative number, the sign bit of the others."""
    x_BV = jnp.where(x_BV == 0, 0.0, x_BV)  # -0.0 equals 0.0 but has other bits
    bits_BV = jax.lax.bitcast_convert_type(x_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)


def _best(rank_BV, weights_BV, target) -> jax.Array:
    """Mask of the smallest set of highest-ranked entries of each row whose weights reach `target`.

    All of the row if they never do. Of equal ranks the lower index goes first.
    """
    total = lambda mask_BV: jnp.where(mask_BV, weights_BV, 0.0).sum(axis=-1, keepdims=True)

    def set_bit(i, threshold_B1):
        higher_B1 = threshold_B1 | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(total(rank_BV >= higher_B1) >= target, higher_B1, threshold_B1)

    # The highest rank at which the weights of it and all above reach the target, most significant bit first.
    threshold_B1 = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros_like(rank_BV[:, :1]))
    above_BV, tied_BV = rank_BV > threshold_B1, rank_BV == threshold_B1
    tied_weights_BV = jnp.where(tied_BV, weights_BV, 0.0)
    before_BV = total(above_BV) + jnp.cumsum(tied_weights_BV, axis=-1) - tied_weights_BV
    return above_BV | (tied_BV & (before_BV < target))
