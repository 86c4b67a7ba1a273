"""The network is GPT-2: its sizes, its initial values, its causality; and its options change no result."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL, VOCAB

from jaxgpt.model import gpt2
from jaxgpt.model.attention import attend, dropout
from jaxgpt.model.loss import cross_entropy
from jaxgpt.model.sizes import GPT2_VOCAB, PUBLISHED, flops_per_token, padded_vocab, parameter_count
from jaxgpt.settings import ModelConfig


@functools.partial(jax.jit, static_argnames="config")
def logits_of(params, tokens_BT, config=MODEL):
    return gpt2.bind(config, VOCAB, params)(tokens_BT)


@functools.partial(jax.jit, static_argnames=("config", "rate"))
def hidden_of(params, tokens_BT, segments_BT=None, key=None, config=MODEL, rate=0.3):
    dropout = gpt2.NO_DROPOUT if key is None else (rate, key)
    return gpt2.bind(config, VOCAB, params).hidden(tokens_BT, segments_BT=segments_BT, dropout=dropout)


@pytest.fixture(scope="module")
def params():
    return jax.jit(gpt2.init_params, static_argnums=(0, 1))(MODEL, VOCAB, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens_BT():
    return jax.random.randint(jax.random.key(1), (2, 16), 0, VOCAB)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(name):
    shape, published = PUBLISHED[name]
    config = ModelConfig(**shape)
    assert parameter_count(config, GPT2_VOCAB) == published
    _, shapes, _ = gpt2.abstract_model(config, GPT2_VOCAB)
    padding = (padded_vocab(GPT2_VOCAB) - GPT2_VOCAB) * config.n_embd
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published + padding


def test_flops_of_the_124m_model_agree_with_a_count_by_hand():
    # 6 x (12 layers x 12 x 768^2 + 50257 x 768) + half of 12 x 12 x 768 x 1024
    assert flops_per_token(ModelConfig(), GPT2_VOCAB, 1024) == 6 * (84_934_656 + 38_597_376) + 56_623_104


def test_initial_values_follow_the_paper(params):
    layers = MODEL.n_layer
    std = lambda x: float(jnp.std(x))
    blocks = params["blocks"]
    assert std(params["wte"][:VOCAB]) == pytest.approx(0.02, rel=0.05)
    assert std(blocks["attn"]["c_attn"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert std(blocks["mlp"]["c_fc"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    for name in ("attn", "mlp"):
        assert std(blocks[name]["c_proj"]["kernel"]) == pytest.approx(0.02 / math.sqrt(2 * layers), rel=0.05)
    assert not any(np.any(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "bias")
    assert np.all(blocks["ln_1"]["scale"] == 1)
    assert not np.array_equal(blocks["mlp"]["c_fc"]["kernel"][0], blocks["mlp"]["c_fc"]["kernel"][1])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_no_position_sees_the_future(params):
    """Causality by gradients: d logits[t] / d input[s] is 0 exactly for s > t, and not 0 for s <= t."""
    length = 8

    def logits_TV(wpe_TD):
        return logits_of({**params, "wpe": wpe_TD}, jnp.arange(length)[None])[0].sum(-1)

    influence_TS = np.abs(jax.jit(jax.jacobian(logits_TV))(params["wpe"])[:, :length]).sum(-1)
    assert np.all(np.triu(influence_TS, 1) == 0)
    assert np.all(influence_TS[np.tril_indices(length)] > 0)


def test_padding_of_the_vocabulary_is_invisible(params, tokens_BT):
    assert params["wte"].shape[0] == 128
    assert logits_of(params, tokens_BT).shape == (*tokens_BT.shape, VOCAB)
    # Whatever stands in the padding rows changes neither loss nor gradients.
    hidden_BTD = hidden_of(params, tokens_BT)
    loss = jax.jit(lambda wte: cross_entropy(hidden_BTD, wte, tokens_BT, jnp.ones(tokens_BT.shape), VOCAB)[0])
    value, grad = jax.jit(jax.value_and_grad(loss))(params["wte"])
    noisy = params["wte"].at[VOCAB:].set(7.0)
    np.testing.assert_allclose(loss(noisy), value, rtol=1e-6)
    assert not np.any(grad[VOCAB:])


def test_loss_is_minus_log_softmax_as_sum_and_count(params, tokens_BT):
    weights_BT = jnp.asarray(np.random.default_rng(0).random(tokens_BT.shape), jnp.float32)
    summed = jax.jit(cross_entropy, static_argnums=4)
    total, count = summed(hidden_of(params, tokens_BT), params["wte"], tokens_BT, weights_BT, VOCAB)
    log_probs = jax.nn.log_softmax(logits_of(params, tokens_BT), axis=-1)
    picked = jnp.take_along_axis(log_probs, tokens_BT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(total, -(picked * weights_BT).sum(), rtol=1e-5)
    np.testing.assert_allclose(count, weights_BT.sum(), rtol=1e-6)


def test_bfloat16_compute_stays_close_and_keeps_float32_logits(params, tokens_BT):
    exact = logits_of(params, tokens_BT)
    rounded = logits_of(params, tokens_BT, dataclasses.replace(MODEL, dtype="bfloat16"))
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(exact - rounded).max() < 0.02


decoding_weights = jax.jit(lambda params: gpt2.decoding_weights(MODEL, params, "float32", "plain"))
read_prompt = jax.jit(functools.partial(gpt2.read_prompt, MODEL, VOCAB, positions=32))
read_token = jax.jit(functools.partial(gpt2.read_token, MODEL, VOCAB))


def test_cached_decoding_equals_the_full_forward_at_every_position(params, tokens_BT):
    """Rows of different lengths: each reads its own prompt, then the rest token by token."""
    full_BTV = logits_of(params, tokens_BT)
    weights = decoding_weights(params)
    lengths = np.array([0, 1, 5, 9])
    rows = np.resize(np.arange(len(tokens_BT)), len(lengths))
    cache = read_prompt(weights, tokens_BT[rows], jnp.asarray(lengths))
    for step in range(tokens_BT.shape[1] - lengths.max()):
        at = lengths + step
        logits_BV, cache = read_token(weights, tokens_BT[rows, at], cache)
        np.testing.assert_allclose(logits_BV, full_BTV[rows, at], atol=1e-5)
    assert cache.length_B.tolist() == (lengths + step + 1).tolist()


def test_what_lies_behind_a_prompt_is_never_read(params, tokens_BT):
    weights = decoding_weights(params)
    length_B = jnp.array([4, 4])
    logits = []
    for padding in (0, 7):
        padded_BT = jnp.where(jnp.arange(16)[None] < 4, tokens_BT[:2], padding)
        logits.append(read_token(weights, tokens_BT[:2, 4], read_prompt(weights, padded_BT, length_B))[0])
    np.testing.assert_array_equal(*logits)


def test_segments_do_not_see_each_other(params, tokens_BT):
    """Two texts in one row give what the second alone gives (with the positions it has in the row)."""
    segments_BT = jnp.asarray([[0] * 6 + [1] * 10] * 2)
    hidden = lambda tokens_BT: hidden_of(params, tokens_BT, segments_BT)
    changed = tokens_BT.at[:, :6].set((tokens_BT[:, :6] + 1) % VOCAB)
    np.testing.assert_array_equal(hidden(tokens_BT)[:, 6:], hidden(changed)[:, 6:])
    assert np.abs(hidden(tokens_BT)[:, :6] - hidden(changed)[:, :6]).max() > 0


def test_attention_is_the_textbook_formula():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 3, 2, 4)) for i in range(3))
    out = np.asarray(attend(q, k, v))
    for head in range(2):
        for t in range(3):
            scores = np.asarray(k[0, : t + 1, head] @ q[0, t, head]) / math.sqrt(4)
            weights = np.exp(scores) / np.exp(scores).sum()
            np.testing.assert_allclose(out[0, t, head], weights @ np.asarray(v[0, : t + 1, head]), rtol=1e-5)


def test_dropout_keeps_the_mean_and_depends_on_the_key():
    x = jnp.ones((100, 1000))
    dropped = dropout(x, 0.2, jax.random.key(0))
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)  # 100,000 draws: 0.01 is 6 standard deviations
    assert set(np.unique(dropped)) == {0.0, np.float32(1.25)}
    assert not np.array_equal(dropped, dropout(x, 0.2, jax.random.key(1)))
    assert dropout(x, 0.2, None) is x


def test_dropout_in_the_network_needs_a_key_and_differs_between_layers_and_keys(params, tokens_BT):
    config = dataclasses.replace(MODEL, dropout=0.3)
    np.testing.assert_array_equal(hidden_of(params, tokens_BT, config=config), hidden_of(params, tokens_BT))
    one, again, two = (hidden_of(params, tokens_BT, key=jax.random.key(i), config=config) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, two)
    scanned = dataclasses.replace(config, scan_layers=True)
    np.testing.assert_allclose(hidden_of(params, tokens_BT, key=jax.random.key(0), config=scanned), one, atol=1e-5)
