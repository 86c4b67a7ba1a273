"""Every fast way to compute the network gives the reference's values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.model import backend, backend_choice, gpt2
from jaxgpt.model.attention import attend
from jaxgpt.model.backend import PLAIN
from jaxgpt.model.backend_choice import choose_backend
from jaxgpt.model.flash import LONGEST, flash_attention
from jaxgpt.model.loss import FAST_UP_TO, cross_entropy
from jaxgpt.settings import ModelConfig

# The kernel itself, run without a TPU.
interpreted = functools.partial(flash_attention, interpret=True)


def normal(seed: int, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def relative(ours, reference) -> float:
    """Norm of the difference over norm."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def value_and_gradients(function, arguments, dout):
    def both(arguments, dout):
        out, vjp = jax.vjp(function, *arguments)
        return out, vjp(dout)

    return jax.jit(both)(arguments, dout)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize(
    ("positions", "heads", "head_size", "segments"),
    [
        (384, 1, 128, False),  # several blocks
        (300, 3, 64, True),  # segments end inside of blocks; neither positions nor heads fill the last one
        (40, 5, 32, False),  # less than one block
        (130, 4, 16, False),
    ],
)
def test_the_tpu_kernel_is_attention(positions, heads, head_size, segments):
    shape = (2, positions, heads, head_size)
    arrays, dout = [normal(seed, *shape) for seed in range(3)], normal(3, *shape)
    segments_BT = jnp.sort(jax.random.randint(jax.random.key(4), shape[:2], 0, 4)) if segments else None
    ours = value_and_gradients(lambda *qkv: interpreted(*qkv, segments_BT), arrays, dout)
    plain = value_and_gradients(lambda *qkv: attend(*qkv, segments_BT=segments_BT), arrays, dout)
    np.testing.assert_allclose(ours[0], plain[0], atol=1e-5)
    for gradient, expected in zip(ours[1], plain[1]):
        assert relative(gradient, expected) < 1e-5


def test_the_tpu_kernel_bears_large_scores():
    """Scores of thousands: a softmax without its maximum taken out would overflow."""
    q, k, v = (100.0 * normal(seed, 1, 128, 2, 64) for seed in range(3))
    ours, plain = interpreted(q, k, v), attend(q, k, v)
    assert np.isfinite(ours).all()
    assert relative(ours, plain) < 1e-4


def test_the_tpu_kernel_refuses_what_it_was_not_made_for():
    for shape in ((1, LONGEST + 1, 1, 64), (1, 8, 1, 48)):
        with pytest.raises(ValueError, match="no kernel for heads of"):
            flash_attention(*(jnp.zeros(shape) for _ in range(3)))


# ---------------------------------------------------------------- the other operations


@pytest.mark.parametrize("name", ["layer_norm", "linear", "linear_apart"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tpu_operations_are_the_plain_ones(name, dtype):
    x, dout = normal(0, 2, 24, 64, dtype=dtype) + 0.5, normal(1, 2, 24, 64, dtype=dtype)
    weights = [1 + 0.1 * normal(2, 64), normal(3, 64)] if name == "layer_norm" else [normal(2, 64, 64), normal(3, 64)]
    plain = getattr(backend, name.removesuffix("_apart"))
    as_float = lambda function: value_and_gradients(
        function, [x.astype(jnp.float32), *weights], dout.astype(jnp.float32)
    )
    ours = value_and_gradients(getattr(backend_choice, name), [x, *weights], dout)
    expected = as_float(plain)
    limit = 1e-6 if dtype == jnp.float32 else 2.0**-8  # bfloat16 rounds to 2^-9 once or twice on the way
    assert relative(ours[0], expected[0]) < limit
    for gradient, reference in zip(ours[1], expected[1]):
        assert relative(gradient, reference) < 3 * limit


def test_the_whole_network_on_the_tpu_operations_has_the_plain_loss_and_gradients():
    config = ModelConfig(n_layer=2, n_head=2, n_embd=128, n_positions=64, dtype="float32")
    params = jax.jit(gpt2.init_params, static_argnums=(0, 1))(config, 300, jax.random.key(0))
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 65), 0, 300)
    fast = dataclasses.replace(backend_choice.TPU, attend=lambda q, k, v, **_: interpreted(q, k, v), loss_rows=32)

    def loss(params, backend):
        hidden_BTD = gpt2.bind(config, 300, params).hidden(tokens_BT[:, :-1], backend=backend)
        total, count = cross_entropy(
            hidden_BTD, params["wte"], tokens_BT[:, 1:], jnp.ones((2, 64)), 300, backend.loss_rows
        )
        return total / count

    ours, plain = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, backend) for backend in (fast, PLAIN))
    assert float(ours[0]) == pytest.approx(float(plain[0]), abs=1e-5)
    for (path, gradient), expected in zip(jax.tree_util.tree_leaves_with_path(ours[1]), jax.tree.leaves(plain[1])):
        assert relative(gradient, expected) < 1e-4, path


# ---------------------------------------------------------------- the loss


def textbook_loss(hidden_BTD, wte_VD, targets_BT, weights_BT, vocab_size):
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, wte_VD[:vocab_size])
    logs_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.sum(jnp.take_along_axis(logs_BTV, targets_BT[..., None], -1)[..., 0] * weights_BT)


def loss_inputs(scale: float = 1.0):
    hidden_BTD, wte_VD = scale * normal(0, 3, 10, 32), normal(1, 128, 32)
    targets_BT = jax.random.randint(jax.random.key(2), (3, 10), 0, 100)
    return hidden_BTD, wte_VD.at[100:].set(0.0), targets_BT, (jnp.arange(30.0).reshape(3, 10) % 4) / 2


@pytest.mark.parametrize("chunk_rows", [None, 7, 1])
def test_the_gradients_computed_with_the_loss_are_its_gradients(chunk_rows):
    hidden_BTD, wte_VD, targets_BT, weights_BT = loss_inputs()
    ours = lambda h, w: cross_entropy(h, w, targets_BT, weights_BT, 100, chunk_rows)[0]
    plain = lambda h, w: textbook_loss(h, w, targets_BT, weights_BT, 100)
    for function in (ours, lambda *a: 3.0 * ours(*a)):
        (value, gradients) = jax.jit(jax.value_and_grad(function, (0, 1)))(hidden_BTD, wte_VD)
        scale = 1.0 if function is ours else 3.0
        assert float(value) == pytest.approx(scale * float(plain(hidden_BTD, wte_VD)), rel=1e-6)
        for gradient, expected in zip(gradients, jax.jit(jax.grad(plain, (0, 1)))(hidden_BTD, wte_VD)):
            assert relative(gradient, scale * expected) < 1e-5
    value = jax.jit(ours)(hidden_BTD, wte_VD)  # not differentiated: another path
    assert float(value) == pytest.approx(float(plain(hidden_BTD, wte_VD)), rel=1e-6)


def test_a_loss_too_large_for_the_fast_shift_is_still_exact():
    hidden_BTD, wte_VD, targets_BT, weights_BT = loss_inputs(scale=40.0)
    plain = lambda h, w: textbook_loss(h, w, targets_BT, weights_BT, 100)
    logs_BTV = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden_BTD, wte_VD[:100]))
    single_BT = -jnp.take_along_axis(logs_BTV, targets_BT[..., None], -1)[..., 0]
    assert single_BT.max() > 3 * FAST_UP_TO and single_BT.min() < FAST_UP_TO
    ours = lambda h, w: cross_entropy(h, w, targets_BT, weights_BT, 100, 10)[0]
    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden_BTD, wte_VD)
    assert float(value) == pytest.approx(float(plain(hidden_BTD, wte_VD)), rel=1e-6)
    for gradient, expected in zip(gradients, jax.jit(jax.grad(plain, (0, 1)))(hidden_BTD, wte_VD)):
        assert relative(gradient, expected) < 1e-5


# ---------------------------------------------------------------- the choice


MODEL = ModelConfig(n_layer=1, n_head=4, n_embd=256)


def changed(**fields) -> ModelConfig:
    return dataclasses.replace(MODEL, **fields)


def test_each_device_gets_its_own_attention():
    assert choose_backend(MODEL, "tpu", 1024)[1] == "TPU kernel"
    assert choose_backend(MODEL, "gpu", 1024)[1] == "cuDNN"
    assert choose_backend(MODEL, "cpu", 1024)[1] == "XLA"
    for platform in ("tpu", "gpu", "cpu"):
        assert choose_backend(changed(attention="xla"), platform, 1024)[1] == "XLA"


@pytest.mark.parametrize(
    ("platform", "fields", "positions", "reason"),
    [
        ("tpu", {"dropout": 0.1}, 1024, "it has no dropout, and model.dropout = 0.1"),
        ("tpu", {"n_head": 1}, 1024, "its heads have 16, 32, 64, 128 entries, and the model's 256"),
        ("tpu", {"n_positions": 4096}, 4096, "it reads up to 2048 positions, and data.block_size = 4096"),
        ("gpu", {"dropout": 0.1}, 1024, "it has no dropout"),
        ("gpu", {"dtype": "float32"}, 1024, 'it computes in bfloat16, and model.dtype = "float32"'),
    ],
)
def test_a_slower_attention_is_never_silent(platform, fields, positions, reason):
    chosen, name = choose_backend(changed(**fields), platform, positions)
    assert chosen.attend is attend
    assert name.startswith("XLA, slower than") and reason in name
    with pytest.raises(UserError, match="model.attention = "):
        named = {"tpu": "flash", "gpu": "cudnn"}[platform]
        choose_backend(changed(attention=named, **fields), platform, positions)


@pytest.mark.parametrize(("named", "platform"), [("flash", "cpu"), ("flash", "gpu"), ("cudnn", "tpu")])
def test_a_kernel_asked_for_on_the_wrong_device_is_an_error(named, platform):
    with pytest.raises(UserError, match=f'model.attention = "{named}", but it does not run on a {platform}'):
        choose_backend(changed(attention=named), platform, 1024)
