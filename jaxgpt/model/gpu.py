"""The network's operations on an NVIDIA GPU: attention by cuDNN; XLA compiles the rest well.

Axes in names: B batch, T query position, S key position, N heads, H head size.
"""

import jax
from jax import Array

from jaxgpt.model.backend import Backend


def attend(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNH: Array,
    *,
    segments_BT: Array | None = None,
    dropout_rate: float | Array = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """`attention.attend` by cuDNN, which has no dropout here.

    Raises:
        ValueError: it is called with a dropout key.
    """
    if dropout_key is not None:
        raise ValueError("cuDNN attention is called without dropout")
    mask = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSNH, v_BSNH, mask=mask, is_causal=True, implementation="cudnn")


# Logits of all tokens at once are faster on a GPU (a published trainer lost 7 % by splitting them), up to what memory
# bears: 16,384 x 50,304 x 2 bytes = 1.6 GB.
GPU = Backend(attend=attend, loss_rows=16_384)
