"""Muon: the polar factors, the size of an update, and the same numbers on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model import gpt2
from jaxgpt.parallel import sharding
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.settings import MeshConfig, ModelConfig
from jaxgpt.training import muon

alone = lambda function: function
MODEL = ModelConfig(n_layer=3, n_head=2, n_embd=8, n_positions=4)


@pytest.fixture(scope="module")
def grads():
    """Gradients as large as they like, of a model's shapes."""
    _, shapes, _ = gpt2.abstract_model(MODEL, 50)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(30 * rng.normal(size=x.shape), jnp.float32), shapes)


def matrices(tree) -> dict[str, np.ndarray]:
    """Every kernel of the blocks as matrices (M, I, O)."""
    blocks = tree["blocks"]
    L, D, F = MODEL.n_layer, MODEL.n_embd, 4 * MODEL.n_embd
    return {
        "query, key, value": np.moveaxis(blocks["attn"]["c_attn"]["kernel"], 2, 1).reshape(3 * L, D, D),
        "attention out": np.reshape(blocks["attn"]["c_proj"]["kernel"], (L, D, D)),
        "mlp in": np.reshape(blocks["mlp"]["c_fc"]["kernel"], (L, D, F)),
        "mlp out": np.reshape(blocks["mlp"]["c_proj"]["kernel"], (L, F, D)),
    }


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 8, 8), "float32"), ((2, 32, 8), "float32"), ((2, 8, 32), "bfloat16")]
)
def test_polar_factors_keep_the_directions_and_bring_the_singular_values_to_one(shape, dtype):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 1e-4
    [found] = muon.polar_factors([jnp.asarray(x)], dtype, alone)
    u, values, vt = np.linalg.svd(x, full_matrices=False)
    within = u.mT @ np.asarray(found) @ vt.mT  # diagonal, if the directions are those of x
    diagonal = np.diagonal(within, axis1=1, axis2=2)
    np.testing.assert_allclose(
        within, diagonal[..., None] * np.eye(within.shape[1]), atol={"float32": 0.02, "bfloat16": 0.1}[dtype]
    )
    assert np.all(abs(diagonal[values > 1e-2 * values.max()] - 1) < 0.2)


def test_a_matrix_of_zeros_stays_at_zero():
    [found] = muon.polar_factors([jnp.zeros((1, 4, 8))], "float32", alone)
    assert not np.any(found)


def updates(grads, steps=1, share=alone):
    rule = muon.scale_by_muon(0.9, "float32", "float32", share)
    kernels = jax.tree.map(lambda x, rule: x if rule == "muon" else None, grads, muon.rules(grads))
    state, update = rule.init(kernels), jax.jit(rule.update)
    for _ in range(steps):
        found, state = update(kernels, state, bad=jnp.zeros((), bool))
    return found


def test_every_output_of_a_layer_changes_alike_and_as_the_shapes_say(grads):
    for name, update in matrices(updates(grads)).items():
        inputs, outputs = update.shape[1:]
        neurons = np.sqrt(np.sum(update**2, axis=1))
        np.testing.assert_allclose(neurons, neurons.mean(axis=1, keepdims=True).repeat(outputs, axis=1), rtol=1e-3)
        # U V^T has min(inputs, outputs) singular values of one.
        size = np.sqrt(min(inputs, outputs) * outputs / inputs)
        np.testing.assert_allclose(np.linalg.norm(update, axis=(1, 2)), size, rtol=0.1, err_msg=name)


def test_the_size_of_the_gradients_does_not_matter(grads):
    small = jax.tree.map(lambda x: 1e-3 * x, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), updates(grads, 2), updates(small, 2))


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_devices_that_share_the_products_find_the_numbers_of_one(grads, mesh):
    share = sharding.share_out(build_mesh(mesh))
    together = jax.jit(lambda grads: updates(grads, share=share))(grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), updates(grads), together)


def test_each_device_multiplies_its_own_matrices_only():
    # Twelve layers of width 768 on eight devices: 48 square matrices are six for each, not 48.
    share = sharding.share_out(build_mesh(MeshConfig()))
    compiled = jax.jit(share(lambda x: x @ x)).lower(jnp.zeros((48, 16, 16))).compile()
    assert "f32[6,16,16]" in compiled.as_text() and "dot(f32[48,16,16]" not in compiled.as_text()
