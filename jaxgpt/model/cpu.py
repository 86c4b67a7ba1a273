"""The network's heavy operations in the forms that XLA runs fastest on CPU cores.

The values are those of `backend.PLAIN` up to rounding (docs/benchmarks.md has the measurements). Four things make the
difference: matrix products in a form for which XLA has fast kernels, above all in bfloat16; gradients written out, so
that the backward pass reads what the forward pass kept; no scores of keys that a query may not see; and optimization
barriers where XLA would compute a cheap value again for each of its readers.

Axes in names: B batch, T query position, S key position, D width, N heads, H head size, I inputs, O outputs,
M = B x T rows of a matrix, Q queries of one chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgpt.model.attention import dropout
from jaxgpt.model.backend import LAYER_NORM_EPSILON, Backend, layer_norm_gradients

QUERIES = 64  # of one chunk of attention; measured beside 32 and 128
_heads_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


# ---------------------------------------------------------------- matrix products


def _product(a: Array, b: Array, contracted: tuple[int, int]) -> Array:
    """Sum over one axis of each of two matrices of one type, in float32.

    The result is asked for in float32 also where both are bfloat16: only then XLA takes its bfloat16 kernel, which
    is twice as fast as the float32 one; a bfloat16 result would be computed by converting both to float32 first.
    """
    return lax.dot_general(a, b, (((contracted[0],), (contracted[1],)), ((), ())), preferred_element_type=jnp.float32)


def _transposed(x: Array) -> Array:
    """x with its last two axes swapped, by two reversals that undo each other.

    XLA would fold a bare transpose into the product that reads it and lose the fast kernel; this one it cannot.
    """
    return jnp.flip(jnp.flip(x, -2).swapaxes(-1, -2), -1)


def kernel_gradient(x_MI: Array, g_MO: Array) -> Array:
    """x^T g in float32, (I, O)."""
    if x_MI.dtype == jnp.bfloat16:
        if x_MI.shape[1] <= g_MO.shape[1]:
            return _product(_transposed(x_MI), g_MO, (1, 0))
        return _transposed(_product(_transposed(g_MO), x_MI, (1, 0)))
    if x_MI.shape[1] <= g_MO.shape[1]:
        return _product(x_MI, g_MO, (0, 0))
    return lax.optimization_barrier(_product(g_MO, x_MI, (0, 0))).T


@jax.custom_vjp
def linear(x_BTI: Array, kernel_IO: Array, bias_O: Array) -> Array:
    """x W + b in the type of x; the parameters are float32, and are cast."""
    return _linear_forward(x_BTI, kernel_IO, bias_O)[0]


def _linear_forward(x_BTI: Array, kernel_IO: Array, bias_O: Array) -> tuple[Array, tuple[Array, Array]]:
    x_MI, kernel_IO = lax.collapse(x_BTI, 0, 2), kernel_IO.astype(x_BTI.dtype)
    out_MO = _product(x_MI, kernel_IO, (1, 0)) + bias_O[None]
    return out_MO.astype(x_BTI.dtype).reshape(*x_BTI.shape[:2], -1), (x_BTI, kernel_IO)


def _linear_backward(kept: tuple[Array, Array], g_BTO: Array) -> tuple[Array, Array, Array]:
    x_BTI, kernel_IO = kept
    x_MI, g_MO = lax.collapse(x_BTI, 0, 2), lax.collapse(g_BTO, 0, 2)
    x_gradient = _product(g_MO, kernel_IO, (1, 1)).astype(x_BTI.dtype).reshape(x_BTI.shape)
    return x_gradient, kernel_gradient(x_MI, g_MO), g_MO.astype(jnp.float32).sum(0)


linear.defvjp(_linear_forward, _linear_backward)


def loss_gradients(dlogits_RV: Array, hidden_RD: Array, wte_VD: Array) -> tuple[Array, Array]:
    """As `backend.loss_gradients`; without the barrier XLA computes the softmax again inside both products."""
    dlogits_RV = lax.optimization_barrier(dlogits_RV)
    dhidden_RD = _product(dlogits_RV, wte_VD, (1, 0)).astype(hidden_RD.dtype)
    return dhidden_RD, kernel_gradient(dlogits_RV, hidden_RD)


# ---------------------------------------------------------------- between the products


@jax.custom_vjp
def layer_norm(x_BTD: Array, scale_D: Array, bias_D: Array) -> Array:
    """Normalises the last axis. Statistics in float32: a bfloat16 mean of 768 values keeps 2-3 digits."""
    return _layer_norm_forward(x_BTD, scale_D, bias_D)[0]


def _layer_norm_forward(x_BTD: Array, scale_D: Array, bias_D: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    x32 = x_BTD.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centred = x32 - mean
    inverse = lax.rsqrt((centred * centred).mean(-1, keepdims=True) + LAYER_NORM_EPSILON)
    out = centred * inverse * scale_D[None, None] + bias_D[None, None]
    return out.astype(x_BTD.dtype), (x_BTD, mean, inverse, scale_D)


layer_norm.defvjp(_layer_norm_forward, layer_norm_gradients)

_GELU_SCALE, _GELU_CUBE = (2 / jnp.pi) ** 0.5, 0.044715


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """GPT-2's activation: Hendrycks & Gimpel 2016, the form with tanh; computed in float32."""
    return _gelu_forward(x)[0]


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    x32 = x.astype(jnp.float32)
    tanh = jnp.tanh(_GELU_SCALE * (x32 + _GELU_CUBE * x32 * x32 * x32))
    return (0.5 * x32 * (1.0 + tanh)).astype(x.dtype), x


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    x32 = x.astype(jnp.float32)
    square = x32 * x32
    tanh = jnp.tanh(_GELU_SCALE * x32 * (1.0 + _GELU_CUBE * square))
    slope = 0.5 * (1.0 + tanh) + 0.5 * x32 * (1.0 - tanh * tanh) * _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBE * square)
    return ((g.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def residual(x_BTD: Array) -> Array:
    """The identity, with an optimization barrier in both directions.

    Without it XLA computes the whole sum of the branches, and the whole gradient, again inside every reader.
    """
    return lax.optimization_barrier(x_BTD)


residual.defvjp(lambda x: (lax.optimization_barrier(x), None), lambda _, g: (lax.optimization_barrier(g),))


# ---------------------------------------------------------------- attention


def attend(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNH: Array,
    *,
    segments_BT: Array | None = None,
    dropout_rate: float | Array = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Causal attention as in attention.py, a chunk of queries at a time, each with the keys up to its end."""
    rows, length, heads, _ = q_BTNH.shape
    factors = None
    if dropout_key is not None:
        factors = tuple(
            dropout(jnp.ones((rows, heads, end - start, end)), dropout_rate, jax.random.fold_in(dropout_key, start))
            for start, end in _chunks(length)
        )
    return _attend(q_BTNH, k_BSNH, v_BSNH, segments_BT, factors)


def _chunks(length: int) -> list[tuple[int, int]]:
    """First query and end of each chunk."""
    return [(start, min(start + QUERIES, length)) for start in range(0, length, QUERIES)]


Factors = tuple[Array, ...] | None  # of dropout, for the weights of each chunk


@jax.custom_vjp
def _attend(q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, segments_BT: Array | None, factors: Factors) -> Array:
    return _attend_forward(q_BTNH, k_BSNH, v_BSNH, segments_BT, factors)[0]


def _attend_forward(
    q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, segments_BT: Array | None, factors: Factors
) -> tuple[Array, tuple]:
    q_BNTH, k_BNSH, v_BNSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSNH, v_BSNH))
    scale, weights, outputs = q_BTNH.shape[-1] ** -0.5, [], []
    for chunk, (start, end) in enumerate(_chunks(q_BTNH.shape[1])):
        scores_BNQS = scale * _heads_product("BNQH,BNSH->BNQS", q_BNTH[:, :, start:end], k_BNSH[:, :, :end])
        visible_BNQS = (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :])[None, None]
        if segments_BT is not None:
            visible_BNQS &= (segments_BT[:, start:end, None] == segments_BT[:, None, :end])[:, None]
        scores_BNQS = jnp.where(visible_BNQS, scores_BNQS, jnp.finfo(jnp.float32).min)
        weights.append(jax.nn.softmax(scores_BNQS, axis=-1).astype(q_BTNH.dtype))
        dropped_BNQS = _dropped(weights[-1], factors, chunk)
        outputs.append(_heads_product("BNQS,BNSH->BNQH", dropped_BNQS, v_BNSH[:, :, :end]))
    out_BTNH = jnp.concatenate(outputs, axis=2).astype(q_BTNH.dtype).swapaxes(1, 2)
    return out_BTNH, (q_BNTH, k_BNSH, v_BNSH, factors, weights, out_BTNH)


def _attend_backward(kept: tuple, g_BTNH: Array) -> tuple[Array, Array, Array, None, None]:
    q_BNTH, k_BNSH, v_BNSH, factors, weights, out_BTNH = kept
    dtype, scale, length = g_BTNH.dtype, g_BTNH.shape[-1] ** -0.5, g_BTNH.shape[1]
    # The part that the softmax adds to the gradients of all weights of a query.
    shared_BTN = (g_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)).sum(-1)
    shared_BNT1, g_BNTH = shared_BTN.swapaxes(1, 2)[..., None], g_BTNH.swapaxes(1, 2)
    # Transposed, the products for keys and values have the form that is fast in bfloat16.
    q_BNHT, g_BNHT = _transposed(q_BNTH), _transposed(g_BNTH)
    q_gradients = []
    k_gradient_BNHS = v_gradient_BNHS = jnp.zeros(())
    for chunk, (start, end) in enumerate(_chunks(length)):
        weights_BNQS = weights[chunk]
        weight_gradient = _heads_product("BNQH,BNSH->BNQS", g_BNTH[:, :, start:end], v_BNSH[:, :, :end])
        weight_gradient = _dropped(weight_gradient, factors, chunk) - shared_BNT1[:, :, start:end]
        scores_gradient = (scale * weights_BNQS.astype(jnp.float32) * weight_gradient).astype(dtype)
        q_gradients.append(_heads_product("BNQS,BNSH->BNQH", scores_gradient, k_BNSH[:, :, :end]))
        rest = ((0, 0), (0, 0), (0, 0), (0, length - end))
        k_part = _heads_product("BNHQ,BNQS->BNHS", q_BNHT[..., start:end], scores_gradient)
        v_part = _heads_product("BNHQ,BNQS->BNHS", g_BNHT[..., start:end], _dropped(weights_BNQS, factors, chunk))
        k_gradient_BNHS = k_gradient_BNHS + jnp.pad(k_part, rest)
        v_gradient_BNHS = v_gradient_BNHS + jnp.pad(v_part, rest)
    q_gradient_BTNH = jnp.concatenate(q_gradients, axis=2).astype(dtype).swapaxes(1, 2)
    k_gradient_BSNH, v_gradient_BSNH = (
        lax.optimization_barrier(x).transpose(0, 3, 1, 2).astype(dtype) for x in (k_gradient_BNHS, v_gradient_BNHS)
    )
    return q_gradient_BTNH, k_gradient_BSNH, v_gradient_BSNH, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _dropped(x_BNQS: Array, factors: Factors, chunk: int) -> Array:
    return x_BNQS if factors is None else x_BNQS * factors[chunk].astype(x_BNQS.dtype)


CPU = Backend(attend, linear, layer_norm, gelu, residual, linear_apart=linear, loss_gradients=loss_gradients)
