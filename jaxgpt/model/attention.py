"""Causal self-attention: one function, and the cache of keys and values that decoding fills.

Axes in names: B batch, T query position, S key position, N heads, H head size.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions read so far; one array a layer, so that each is updated in place."""

    keys: tuple[jax.Array, ...]
    """L arrays (B, S, N, H); positions at and after `length` are unwritten."""
    values: tuple[jax.Array, ...]
    length: jax.Array
    """int32 scalar: positions written, the same for every row."""


def empty_cache(layers: int, batch: int, positions: int, heads: int, head_size: int, dtype) -> KVCache:
    """A cache with room for `positions` tokens a row."""
    keys, values = (
        tuple(jnp.zeros((batch, positions, heads, head_size), dtype) for _ in range(layers)) for _ in range(2)
    )
    return KVCache(keys, values, jnp.zeros((), jnp.int32))


def attend(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    *,
    first_query: jax.Array | int = 0,
    segments_BT: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of each query over the keys at or before it. Returns (B, T, N, H) in q's type.

    `first_query` is the position of the first query among the keys (0 in training, the cache's length
    in decoding). With `segments_BT` (S = T), a query reads only keys of its own segment.
    """
    scale = q_BTNH.shape[-1] ** -0.5
    # Scores in float32: in bfloat16 (8 bits) the softmax of a long row would lose its small entries.
    scores_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
    query_T1 = first_query + jnp.arange(q_BTNH.shape[1])[:, None]
    visible_BNTS = (query_T1 >= jnp.arange(k_BSNH.shape[1])[None, :])[None, None]
    if segments_BT is not None:
        visible_BNTS &= (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    scores_BNTS = jnp.where(visible_BNTS, scores_BNTS, jnp.finfo(jnp.float32).min)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNH.dtype)
    weights_BNTS = dropout(weights_BNTS, dropout_rate, dropout_key)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero each entry with probability `rate` and scale the rest by 1 / (1 - rate); no key, no dropout."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
