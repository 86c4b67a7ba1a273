"""Causal self-attention: one function, and the cache of keys and values that decoding fills.

Axes in names: B batch, T query position, S key position, N heads, H head size, A heads of all rows (B x N).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions read so far; one array a layer, so that each is updated in place."""

    keys: tuple[Array, ...]
    """L arrays (A, S, H): each head's keys lie as one block. With B and N as two axes XLA merges them for the matmul
    and, on CPU, copies the whole cache six times a layer to do so (jax 0.10.2, B = 1)."""
    values: tuple[Array, ...]
    length_B: Array
    """int32: positions of each row that are written; what lies at and after them is never read."""


def attend(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNH: Array,
    *,
    segments_BT: Array | None = None,
    dropout_rate: float | Array = 0.0,
    dropout_key: Array | None = None,
    shared_segment: int | None = None,
) -> Array:
    """Softmax attention of each query over the keys at or before it (S = T). Returns (B, T, N, H) in q's type.

    With `segments_BT`, a query reads only keys of its own segment, and those of `shared_segment`.
    """
    scale = q_BTNH.shape[-1] ** -0.5
    # Scores in float32: in bfloat16 (8 bits) the softmax of a long row would lose its small entries.
    scores_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
    position = jnp.arange(q_BTNH.shape[1])
    visible_BNTS = (position[:, None] >= position[None, :])[None, None]
    if segments_BT is not None:
        seen_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
        if shared_segment is not None:
            seen_BTS |= (segments_BT == shared_segment)[:, None, :]
        visible_BNTS &= seen_BTS[:, None]
    scores_BNTS = jnp.where(visible_BNTS, scores_BNTS, jnp.finfo(jnp.float32).min)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNH.dtype)
    weights_BNTS = dropout(weights_BNTS, dropout_rate, dropout_key)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)


def attend_cached(
    q_BTNH: Array, k_BTNH: Array, v_BTNH: Array, keys_ASH: Array, values_ASH: Array, length_B: Array
) -> tuple[Array, Array, Array]:
    """One new token a row (T = 1): adds its key and value at the row's length, and attends to all up to there.

    Returns the output (B, 1, N, H) in q's type and the updated keys and values.
    """
    heads, head_size = q_BTNH.shape[2:]
    keys_ASH, values_ASH = _put(keys_ASH, k_BTNH, length_B), _put(values_ASH, v_BTNH, length_B)
    q_AH, length_A = q_BTNH.reshape(-1, head_size), jnp.repeat(length_B, heads)
    scores_AS = head_size**-0.5 * jnp.einsum("AH,ASH->AS", q_AH, keys_ASH, preferred_element_type=jnp.float32)
    visible_AS = jnp.arange(keys_ASH.shape[1])[None] <= length_A[:, None]
    scores_AS = jnp.where(visible_AS, scores_AS, jnp.finfo(jnp.float32).min)
    weights_AS = jax.nn.softmax(scores_AS, axis=-1).astype(q_BTNH.dtype)
    out_AH = jnp.einsum("AS,ASH->AH", weights_AS, values_ASH)
    return out_AH.reshape(q_BTNH.shape), keys_ASH, values_ASH


def _put(cached_ASH: Array, new_BTNH: Array, length_B: Array) -> Array:
    """The cache with each row's new entry, (N, 1, H), at the row's length."""
    rows, _, heads, _ = new_BTNH.shape
    new_BNTH = new_BTNH.swapaxes(1, 2).astype(cached_ASH.dtype)
    if rows == 1:
        return jax.lax.dynamic_update_slice_in_dim(cached_ASH, new_BNTH[0], length_B[0], axis=1)
    return jax.lax.scatter(
        cached_ASH,
        jnp.stack([heads * jnp.arange(rows), length_B], axis=1),
        new_BNTH,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3), inserted_window_dims=(), scatter_dims_to_operand_dims=(0, 1)
        ),
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.CLIP,
    )


def dropout(x: Array, rate: float | Array, key: Array | None) -> Array:
    """Zero each entry with probability `rate` and scale the rest by 1 / (1 - rate); no key, no dropout."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, (x / (1.0 - rate)).astype(x.dtype), jnp.zeros((), x.dtype))
