"""How each heavy operation of the network is computed on a kind of device.

The model calls these functions and knows no device. `PLAIN` is the reference: short formulas that run anywhere.
Every other backend computes the same values up to rounding (tests/test_model_backend.py), faster.

Axes in names: B batch, T position, D width, N heads, H head size, I inputs, O outputs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.model.attention import attend

LAYER_NORM_EPSILON = 1e-5  # GPT-2's published hyper-parameter (layer_norm_epsilon in its config.json)


def linear(x_BTI: Array, kernel_IO: Array, bias_O: Array) -> Array:
    """x W + b in the type of x; the parameters are float32, and are cast."""
    return jnp.einsum("BTI,IO->BTO", x_BTI, kernel_IO.astype(x_BTI.dtype)) + bias_O.astype(x_BTI.dtype)[None, None]


def layer_norm(x_BTD: Array, scale_D: Array, bias_D: Array) -> Array:
    """Normalises the last axis. Statistics in float32: a bfloat16 mean of 768 values keeps 2-3 digits."""
    x32 = x_BTD.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centred = x32 - mean
    variance = (centred * centred).mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return (normal * scale_D[None, None] + bias_D[None, None]).astype(x_BTD.dtype)


def layer_norm_gradients(kept: tuple[Array, Array, Array, Array], dout_BTD: Array) -> tuple[Array, Array, Array]:
    """Gradients of input, scale and bias, written out; `kept` is (input, mean, 1 / standard deviation, scale)."""
    x_BTD, mean_BT1, rstd_BT1, scale_D = kept
    normal_BTD, dout32 = (x_BTD.astype(jnp.float32) - mean_BT1) * rstd_BT1, dout_BTD.astype(jnp.float32)
    dnormal_BTD = dout32 * scale_D[None, None]
    along_BT1 = (dnormal_BTD * normal_BTD).mean(-1, keepdims=True)
    dx_BTD = rstd_BT1 * (dnormal_BTD - dnormal_BTD.mean(-1, keepdims=True) - normal_BTD * along_BT1)
    return dx_BTD.astype(x_BTD.dtype), (dout32 * normal_BTD).sum((0, 1)), dout32.sum((0, 1))


def gelu(x: Array) -> Array:
    """GPT-2's activation: Hendrycks & Gimpel 2016, the form with tanh."""
    return jax.nn.gelu(x, approximate=True)


def loss_gradients(dlogits_RV: Array, hidden_RD: Array, wte_VD: Array) -> tuple[Array, Array]:
    """The gradients of the tied head's two inputs, (R, D) in the type of the activations and (V, D) in float32."""
    dhidden_RD = jnp.einsum("RV,VD->RD", dlogits_RV, wte_VD)
    return dhidden_RD, jnp.einsum("RV,RD->VD", dlogits_RV, hidden_RD, preferred_element_type=jnp.float32)


def without_dropout(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """`attention.attend` by a kernel (q_BTNH, k_BSNH, v_BSNH, segments_BT); a dropout key is a ValueError."""

    def attend(
        q_BTNH: Array,
        k_BSNH: Array,
        v_BSNH: Array,
        *,
        segments_BT: Array | None = None,
        dropout_rate: float | Array = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        if dropout_key is not None:
            raise ValueError("this attention kernel has no dropout")
        return kernel(q_BTNH, k_BSNH, v_BSNH, segments_BT)

    return attend


LinearOperation = Callable[[Array, Array, Array], Array]  # (x_BTI, kernel_IO, bias_O) -> (B, T, O)
LossGradients = Callable[[Array, Array, Array], tuple[Array, Array]]
"""(dlogits_RV, hidden_RD, wte_VD), all of one type -> (dhidden_RD, dwte_VD in float32); R rows = tokens"""


@dataclasses.dataclass(frozen=True)
class Backend:
    attend: Callable[..., Array] = attend
    """(q_BTNH, k_BSNH, v_BSNH, *, segments_BT, dropout_rate, dropout_key) -> (B, T, N, H): see attention.py."""
    linear: LinearOperation = linear
    layer_norm: Callable[[Array, Array, Array], Array] = layer_norm
    gelu: Callable[[Array], Array] = gelu
    residual: Callable[[Array], Array] = lambda x_BTD: x_BTD
    """Called on the residual stream after each branch is added; the identity in value."""
    linear_apart: LinearOperation | None = None
    """`linear` for queries, keys and values one by one, so that their results lie apart, as a kernel wants them; None
    takes one matmul for all three."""
    loss_gradients: LossGradients = loss_gradients
    loss_rows: int | None = None
    """Tokens whose logits exist at once in training (see loss.py); None: all."""


PLAIN = Backend()
