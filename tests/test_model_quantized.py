"""Matrices stored small multiply as the matrix they stand for, and stand close to the one they were made from."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model import gpt2
from jaxgpt.model import quantized as packed_module
from jaxgpt.model.quantized import LAYOUTS, STREAMED_TILE
from jaxgpt.settings import ModelConfig

KINDS = ("int8", "bfloat16", "float32")
pack = jax.jit(packed_module.pack, static_argnums=(1, 2, 3))
columns = jax.jit(lambda packed: packed.column(jnp.arange(math.prod(packed.outputs))))
product_of = jax.jit(lambda packed, x: packed(x))


@pytest.fixture(autouse=True)
def small_matrices_are_streamed_too(monkeypatch):
    monkeypatch.setattr(packed_module, "SMALLEST_STREAMED", 0)


def test_a_matrix_below_the_limit_is_not_streamed(monkeypatch):
    monkeypatch.undo()
    limit = packed_module.SMALLEST_STREAMED
    for rows, layout in ((limit // 128, "streamed"), (limit // 128 - 4, "plain")):
        assert pack(jnp.zeros((rows, 128)), 1, "int8", "streamed").layout == layout


def matrix(*shape) -> np.ndarray:
    """Outputs of very different sizes, one of them zero."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal(shape, np.float32) * np.exp(rng.normal(size=shape[-1])).astype(np.float32)
    kernel[..., 3] = 0
    return kernel


def stands_for(packed) -> np.ndarray:
    """(inputs, outputs) in float32, read output by output."""
    return np.asarray(columns(packed)).T


def shape_in_memory(layout: str, kind: str) -> tuple[int, ...]:
    """Of a matrix (48, 192)."""
    if layout == "streamed":
        return (3, 48, STREAMED_TILE)
    if layout == "plain":
        return (1, 48, 192)
    return (1, 192, 48) if kind == "float32" else (3, 64, 48)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [(1, 1), (2, 3)])
def test_the_product_is_that_of_the_matrix_it_stands_for(kind, layout, rows):
    packed = pack(jnp.asarray(matrix(48, 2, 96)), 1, kind, layout)
    assert packed.tiles.shape == shape_in_memory(layout, kind)
    x = np.random.default_rng(1).standard_normal((*rows, 48)).astype(np.float32)
    product = product_of(packed, x)
    assert product.shape == (*rows, 2, 96) and product.dtype == jnp.float32
    expected = (x.astype(np.float64) @ stands_for(packed).astype(np.float64)).reshape(product.shape)
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-4)


def test_several_input_axes_are_summed_over():
    packed = pack(jnp.asarray(matrix(4, 12, 64)), 2, "int8", "streamed")
    x = np.random.default_rng(1).standard_normal((3, 1, 4, 12)).astype(np.float32)
    np.testing.assert_allclose(product_of(packed, x), x.reshape(3, 1, 48) @ stands_for(packed), rtol=1e-5, atol=1e-4)


def test_int8_is_the_nearest_of_255_steps_of_each_output():
    kernel = matrix(48, 128)
    packed = pack(jnp.asarray(kernel), 1, "int8", "streamed")
    assert packed.tiles.dtype == jnp.int8
    step_O = np.abs(kernel).max(0) / 127
    error_KO = np.abs(stands_for(packed) - kernel)
    assert np.all(error_KO <= 0.5001 * step_O)
    assert np.all(error_KO[:, 3] == 0)
    np.testing.assert_allclose(np.abs(stands_for(packed)).max(0), np.abs(kernel).max(0), rtol=1e-6)


def test_bfloat16_is_the_rounded_matrix_bit_for_bit():
    kernel = jnp.asarray(matrix(48, 128))
    for layout in LAYOUTS:
        expected = kernel.astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(stands_for(pack(kernel, 1, "bfloat16", layout)), expected)


@pytest.mark.parametrize("layout", ["streamed", "turned"])
def test_a_width_that_no_tile_divides_is_one_tile(layout):
    packed = pack(jnp.asarray(matrix(48, 100)), 1, "int8", layout)
    assert packed.tiles.shape[0] == 1
    x = np.random.default_rng(1).standard_normal((3, 48)).astype(np.float32)
    np.testing.assert_allclose(product_of(packed, x), x @ stands_for(packed), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network_of_bfloat16_weights_is_the_network_of_rounded_weights(layout):
    config = ModelConfig(n_layer=2, n_head=2, n_embd=64, n_positions=16, dtype="float32")
    params = jax.jit(gpt2.init_params, static_argnums=(0, 1))(config, 65, jax.random.key(0))
    round_matrices = lambda path, x: x.astype(jnp.bfloat16).astype(jnp.float32) if path[-1].key in ROUNDED else x
    rounded = jax.tree_util.tree_map_with_path(round_matrices, params)
    tokens_BT = jnp.arange(14).reshape(2, 7)

    @jax.jit
    def decoded(params):
        weights = gpt2.decoding_weights(config, params, "bfloat16", layout)
        cache = gpt2.read_prompt(config, 65, weights, tokens_BT[:, :6], jnp.array([6, 6]), positions=16)
        return gpt2.read_token(config, 65, weights, tokens_BT[:, 6], cache)[0]

    whole = jax.jit(lambda params: gpt2.bind(config, 65, params)(tokens_BT))
    logits_BV, expected_BTV = decoded(params), whole(rounded)
    np.testing.assert_allclose(logits_BV, expected_BTV[:, -1], atol=1e-5)
    assert np.abs(expected_BTV - whole(params)).max() > 1e-4


ROUNDED = ("kernel", "wte")
