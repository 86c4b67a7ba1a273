"""The network's operations on an NVIDIA GPU: attention by cuDNN; XLA compiles the rest well.

Axes in names: B batch, T query position, S key position, N heads, H head size.
"""

import jax
from jax import Array

from jaxgpt.model.backend import Backend, without_dropout


def cudnn_attention(q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, segments_BT: Array | None = None) -> Array:
    """Causal attention by cuDNN, (B, T, N, H); with `segments_BT`, within a segment only."""
    mask = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSNH, v_BSNH, mask=mask, is_causal=True, implementation="cudnn")


# Logits of all tokens at once are faster on a GPU (a published trainer lost 7 % by splitting them), up to what memory
# bears: 16,384 x 50,304 x 2 bytes = 1.6 GB.
GPU = Backend(attend=without_dropout(cudnn_attention), loss_rows=16_384)
