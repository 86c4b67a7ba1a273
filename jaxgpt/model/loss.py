"""Next-token cross-entropy as (sum, count), so that every mean is one division after all reductions."""

import jax
import jax.numpy as jnp


def cross_entropy(
    hidden_BTD: jax.Array,
    wte_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Summed negative log-likelihood in nats and the summed weights, both float32 scalars.

    `wte_VD` is the padded embedding; entries at and after `vocab_size` get no probability.
    """
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV",
        hidden_BTD,
        wte_VD.astype(hidden_BTD.dtype),
        # float32 out of the matmul's accumulator: a bfloat16 logit near 10 has steps of 0.06 nats.
        preferred_element_type=jnp.float32,
    )
    ids_11V = jnp.arange(wte_VD.shape[0])[None, None]
    logits_BTV = jnp.where(ids_11V < vocab_size, logits_BTV, jnp.finfo(jnp.float32).min)
    logsumexp_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A one-hot sum instead of a gather: it stays local when the vocabulary is sharded.
    is_target_BTV = targets_BT[..., None] == ids_11V
    target_logit_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    return jnp.sum((logsumexp_BT - target_logit_BT) * weights_BT), jnp.sum(weights_BT)
