"""Next-token cross-entropy as (sum, count), so that every mean is one division after all reductions.

Axes in names: B batch, T position, R rows (B x T) of a chunk, D width, V vocabulary (padded), C chunks.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.model.backend import LossGradients, loss_gradients

# The fast sum of exponentials is shifted by the target's logit, so it overflows once a loss nears 88 nats, the
# logarithm of the largest float32. Up to this loss it is used, above it the shift is the largest logit.
FAST_UP_TO = 80.0


def cross_entropy(
    hidden_BTD: Array,
    wte_VD: Array,
    targets_BT: np.ndarray | Array,
    weights_BT: np.ndarray | Array,
    vocab_size: int,
    chunk_rows: int | None = None,
    gradients: LossGradients = loss_gradients,
) -> tuple[Array, Array]:
    """Summed negative log-likelihood in nats and the summed weights, both float32 scalars.

    `wte_VD` is the padded embedding; entries at and after `vocab_size` get no probability. Differentiated, it computes
    its gradients in the forward pass, `chunk_rows` tokens at a time (None: all at once), and keeps no logits;
    `gradients` is a backend's `loss_gradients`.
    """
    width = hidden_BTD.shape[-1]
    tokens = math.prod(targets_BT.shape)
    fewest = -(-tokens // (chunk_rows or tokens))
    chunks = next(count for count in range(fewest, tokens + 1) if tokens % count == 0)  # equal ones
    in_chunks = lambda x, *shape: x.reshape(chunks, tokens // chunks, *shape)
    loss_sum = _summed_loss(
        vocab_size, gradients, in_chunks(hidden_BTD, width), wte_VD, in_chunks(targets_BT), in_chunks(weights_BT)
    )
    return loss_sum, jnp.sum(weights_BT)


def _logits(hidden_RD: Array, wte_VD: Array, vocab_size: int) -> Array:
    """Logits (R, V) in float32, out of the matmul's accumulator: a bfloat16 logit near 10 has steps of 0.06 nats."""
    wte_VD = wte_VD.astype(hidden_RD.dtype)
    logits_RV = jnp.einsum("RD,VD->RV", hidden_RD, wte_VD, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(wte_VD.shape[0])[None] < vocab_size, logits_RV, jnp.finfo(jnp.float32).min)


def _is_target(logits_RV: Array, targets_R: Array) -> Array:
    # A comparison instead of a gather: it stays local when the vocabulary is sharded, and fuses.
    return targets_R[:, None] == jnp.arange(logits_RV.shape[1])[None]


def _over_chunks(chunk: Callable[..., tuple], start: Array | tuple, *arrays: Array) -> tuple:
    """Calls `chunk` over the leading axis of `arrays`: (sum of its first results, its second ones stacked)."""
    if arrays[0].shape[0] == 1:
        total, rest = chunk(*(x[0] for x in arrays))
        return total, jax.tree.map(lambda x: x[None], rest)

    def add(total: Array | tuple, xs: tuple) -> tuple:
        value, rest = chunk(*xs)
        return jax.tree.map(jnp.add, total, value), rest

    return jax.lax.scan(add, start, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_loss(
    vocab_size: int, gradients: LossGradients, hidden_CRD: Array, wte_VD: Array, targets_CR: Array, weights_CR: Array
) -> Array:
    def chunk(hidden_RD: Array, targets_R: Array, weights_R: Array) -> tuple[Array, None]:
        logits_RV = _logits(hidden_RD, wte_VD, vocab_size)
        target_R = jnp.sum(jnp.where(_is_target(logits_RV, targets_R), logits_RV, 0.0), axis=-1)
        return jnp.sum((jax.nn.logsumexp(logits_RV, axis=-1) - target_R) * weights_R), None

    return _over_chunks(chunk, jnp.zeros(()), hidden_CRD, targets_CR, weights_CR)[0]


def _loss_and_gradients(
    vocab_size: int, gradients: LossGradients, hidden_CRD: Array, wte_VD: Array, targets_CR: Array, weights_CR: Array
) -> tuple[Array, tuple[Array, Array]]:
    """The loss and its gradients, which the backward pass only has to scale, since the loss is a scalar."""
    dtype = hidden_CRD.dtype

    def chunk(hidden_RD: Array, targets_R: Array, weights_R: Array) -> tuple:
        logits_RV = _logits(hidden_RD, wte_VD, vocab_size)
        is_target_RV = _is_target(logits_RV, targets_R)
        target_RD = wte_VD.astype(hidden_RD.dtype)[targets_R]
        target_R = jnp.sum(hidden_RD.astype(jnp.float32) * target_RD.astype(jnp.float32), axis=-1)
        logsumexp_R = _logsumexp(logits_RV, target_R, functools.partial(_logits, hidden_RD, wte_VD, vocab_size))
        # Kept in the matmul's type between the sum and the gradient: the one array of the vocabulary's size.
        kept_RV = logits_RV.astype(dtype).astype(jnp.float32)
        share_RV = jnp.exp(jnp.minimum(kept_RV - logsumexp_R[:, None], 0.0))
        dlogits_RV = ((share_RV - is_target_RV) * weights_R[:, None]).astype(dtype)
        dhidden_RD, dwte_VD = gradients(dlogits_RV, hidden_RD, wte_VD.astype(dtype))
        return (jnp.sum((logsumexp_R - target_R) * weights_R), dwte_VD), dhidden_RD

    start = (jnp.zeros(()), jnp.zeros(wte_VD.shape, jnp.float32))
    (loss_sum, dwte_VD), dhidden_CRD = _over_chunks(chunk, start, hidden_CRD, targets_CR, weights_CR)
    return loss_sum, (dhidden_CRD, dwte_VD.astype(wte_VD.dtype))


def _scale_gradients(
    vocab_size: int, gradients: LossGradients, kept: tuple[Array, Array], dloss: Array
) -> tuple[Array, Array, None, None]:
    dhidden_CRD, dwte_VD = kept
    return dhidden_CRD * dloss.astype(dhidden_CRD.dtype), dwte_VD * dloss.astype(dwte_VD.dtype), None, None


_summed_loss.defvjp(_loss_and_gradients, _scale_gradients)


def _logsumexp(logits_RV: Array, target_R: Array, recompute: Callable[[], Array]) -> Array:
    """The logarithm of each row's sum of exponentials, (R,).

    Shifting by the target's logit lets the sum run inside the logits' matmul: one pass less than with the row's maximum
    (TPU v5e, 16 x 1024 tokens of GPT-2's vocabulary: 34.7 against 46.1 M cycles with gradients).

    The sum is at least the target's own 1, so nothing underflows; where a loss is too large for this shift, all rows
    are computed again with their maximum.
    """
    total_R = jnp.sum(jnp.exp(jnp.minimum(logits_RV - target_R[:, None], FAST_UP_TO + 4)), axis=-1)
    fast_R = target_R + jnp.log(total_R)
    exact = lambda: jax.nn.logsumexp(recompute(), axis=-1)
    return jax.lax.cond(jnp.any(fast_R - target_R > FAST_UP_TO), exact, lambda: fast_R)
