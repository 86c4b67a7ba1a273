"""How each heavy operation of the network is computed on a kind of device.

The model calls these functions and knows no device. `PLAIN` is the reference: short formulas that run anywhere.
Every other backend computes the same values up to rounding (tests/test_model_backend.py), faster.

Axes in names: B batch, T position, D width, N heads, H head size, I inputs, O outputs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt.model.attention import attend

LAYER_NORM_EPSILON = 1e-5  # GPT-2's published hyper-parameter (layer_norm_epsilon in its config.json)


def linear(x_BTI: jax.Array, kernel_IO: jax.Array, bias_O: jax.Array) -> jax.Array:
    """x W + b in the type of x; the parameters are float32, and are cast."""
    return jnp.einsum("BTI,IO->BTO", x_BTI, kernel_IO.astype(x_BTI.dtype)) + bias_O.astype(x_BTI.dtype)[None, None]


def layer_norm(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """Normalises the last axis. Statistics in float32: a bfloat16 mean of 768 values keeps 2-3 digits."""
    x32 = x_BTD.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centred = x32 - mean
    variance = (centred * centred).mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return (normal * scale_D[None, None] + bias_D[None, None]).astype(x_BTD.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """GPT-2's activation: Hendrycks & Gimpel 2016, the form with tanh."""
    return jax.nn.gelu(x, approximate=True)


def loss_gradients(dlogits_RV: jax.Array, hidden_RD: jax.Array, wte_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of the tied head's two inputs, (R, D) in the type of the activations and (V, D) in float32."""
    dhidden_RD = jnp.einsum("RV,VD->RD", dlogits_RV, wte_VD)
    return dhidden_RD, jnp.einsum("RV,RD->VD", dlogits_RV, hidden_RD, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Backend:
    attend: Callable = attend
    """(q_BTNH, k_BSNH, v_BSNH, *, segments_BT, dropout_rate, dropout_key) -> (B, T, N, H): see attention.py."""
    linear: Callable = linear
    """(x_BTI, kernel_IO, bias_O) -> (B, T, O)"""
    layer_norm: Callable = layer_norm
    """(x_BTD, scale_D, bias_D) -> (B, T, D)"""
    gelu: Callable = gelu
    """(x) -> its activation"""
    residual: Callable = lambda x_BTD: x_BTD
    """Called on the residual stream after each branch is added; the identity in value."""
    linear_apart: Callable | None = None
    """`linear` for queries, keys and values one by one, so that their results lie apart, as a kernel wants them; None
    takes one matmul for all three."""
    loss_gradients: Callable = loss_gradients
    """(dlogits_RV, hidden_RD, wte_VD), all of one type -> (dhidden_RD, dwte_VD in float32), R rows = tokens"""
    loss_rows: int | None = None
    """Tokens whose logits exist at once in training (see loss.py); None: all."""


PLAIN = Backend()
