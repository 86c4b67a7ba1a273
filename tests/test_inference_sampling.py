"""What may be drawn, how often, and that a row's draw is its own."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import UserError
from jaxgpt.inference import sampling
from jaxgpt.inference.sampling import SamplingOptions, filter_logits, sample

VOCAB = 65
jit_filter, jit_sample = jax.jit(filter_logits), jax.jit(sample)
row_keys = jax.jit(sampling.row_keys, static_argnames="rows")


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0):
    rules = np.float32(temperature), np.int32(top_k), np.float32(top_p)
    return np.asarray(jit_filter(jnp.asarray(logits, jnp.float32), *rules))


def sampled(logits, keys, temperature=1.0, top_k=0, top_p=1.0):
    rules = np.float32(temperature), np.int32(top_k), np.float32(top_p)
    return np.asarray(jit_sample(jnp.asarray(logits, jnp.float32), keys, *rules))


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def reference_probabilities(logits, temperature, top_k, top_p):
    """The rules for one row in float64, read off their definition: sort, cut after k, cut after p."""
    scores = np.asarray(logits, np.float64) / temperature
    best = np.argsort(-scores, kind="stable")  # of equal logits the lower id first
    best = best[: top_k or None]
    if top_p < 1:
        reached = np.cumsum(softmax(scores[best]))
        best = best[: 1 + np.sum(reached < top_p)]
    probabilities = np.zeros(len(logits))
    probabilities[best] = softmax(scores[best])
    return probabilities


def rows_of_logits(rows, seed=0):
    return 3 * np.random.default_rng(seed).standard_normal((rows, VOCAB)).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_kept_tokens_and_their_probabilities_equal_the_definition(temperature):
    logits = rows_of_logits(8)
    for top_k, top_p in itertools.product([0, 1, 5, VOCAB, 10 * VOCAB], [0.05, 0.5, 0.9, 0.999, 1.0]):
        scores = filtered(logits, temperature, top_k, top_p)
        for row, row_scores in zip(logits, scores, strict=True):
            expected = reference_probabilities(row, temperature, top_k, top_p)
            assert set(np.flatnonzero(row_scores > -np.inf)) == set(np.flatnonzero(expected))
            np.testing.assert_allclose(softmax(row_scores), expected, rtol=1e-5)


def test_top_p_takes_the_token_that_crosses_p():
    logits = np.log([[0.5, 0.3, 0.15, 0.05]])
    kept = {p: int(np.isfinite(filtered(logits, top_p=p)).sum()) for p in (0.1, 0.49, 0.51, 0.79, 0.81, 0.96)}
    assert kept == {0.1: 1, 0.49: 1, 0.51: 2, 0.79: 2, 0.81: 3, 0.96: 4}


def test_top_p_sees_the_probabilities_that_temperature_and_top_k_left():
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    # Of the best two alone, the first has 4/7 = 0.571: enough for p = 0.57, and not for p = 0.58.
    assert np.isfinite(filtered(logits, top_k=2, top_p=0.57)).tolist() == [[True, False, False, False]]
    assert np.isfinite(filtered(logits, top_k=2, top_p=0.58)).tolist() == [[True, True, False, False]]
    # At temperature 0.5 the probabilities are 16, 9, 4, 1 of 30: the first alone has 0.533.
    assert np.isfinite(filtered(logits, temperature=0.5, top_p=0.53)).sum() == 1


def test_equal_logits_rank_by_token_id():
    logits = np.array([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, -0.0, 0.0, -0.0, -1.0]])
    kept = np.isfinite(filtered(logits, top_k=2))
    assert [np.flatnonzero(row).tolist() for row in kept] == [[1, 2], [0, 1]]
    assert np.flatnonzero(np.isfinite(filtered(np.zeros((1, 8)), top_p=0.5))).tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert sampled(logits, row_keys(0, 2, 0), temperature=0).tolist() == [1, 0]


def test_temperature_zero_and_top_k_one_are_greedy():
    logits, keys = rows_of_logits(32), row_keys(0, 32, 0)
    np.testing.assert_array_equal(sampled(logits, keys, temperature=0), logits.argmax(-1))
    np.testing.assert_array_equal(sampled(logits, keys, temperature=5, top_k=1), logits.argmax(-1))
    np.testing.assert_array_equal(sampled(logits, keys, temperature=1e-6), logits.argmax(-1))


def test_no_logits_and_no_temperature_give_nan_or_a_banned_token():
    largest = float(np.finfo(np.float32).max)
    rows = [
        [largest, -largest, 0, 1],
        [math.inf, 0, -math.inf, 1],
        [-math.inf, -math.inf, -largest, -math.inf],
        [1e-40, 0, -1e-40, -math.inf],
        [1, 1 + 1e-7, 1, -math.inf],
    ]
    logits, keys = np.array(rows, np.float32), row_keys(0, len(rows), 0)
    temperatures, top_ks, top_ps = (
        [0, 1e-45, 1e-30, 1, 1e38, 3e38],
        [0, 1, 3],
        [1e-45, 1e-9, 0.5, 1],
    )
    for temperature, top_k, top_p in itertools.product(temperatures, top_ks, top_ps):
        scores = filtered(logits, temperature, top_k, top_p)
        best = logits.argmax(-1)
        assert not np.isnan(scores).any()
        assert np.isfinite(scores[np.arange(len(rows)), best]).all()
        tokens = sampled(logits, keys, temperature, top_k, top_p)
        assert (logits[np.arange(len(rows)), tokens] > -math.inf).all()


@pytest.mark.parametrize("rules", [(1.0, 0, 1.0), (0.7, 4, 1.0), (1.5, 0, 0.8), (0.8, 6, 0.9)])
def test_tokens_come_as_often_as_their_probability_says(rules):
    row = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5])
    draws, false_alarm = 200 * 200, 1e-9
    # Over rows and over positions: both ways in which decoding makes new keys.
    keys = jax.vmap(lambda position: row_keys(0, 200, position))(jnp.arange(200)).reshape(-1)
    tokens = sampled(np.tile(row, (draws, 1)), keys, *rules)
    frequencies = np.bincount(tokens, minlength=len(row)) / draws
    expected = reference_probabilities(row, *rules)
    # Hoeffding: P(|frequency - p| > e) <= 2 exp(-2 n e^2); together over the tokens at most `false_alarm`.
    error = math.sqrt(math.log(2 * len(row) / false_alarm) / (2 * draws))
    assert np.abs(frequencies - expected).max() < error < 0.02
    assert (frequencies[expected == 0] == 0).all()


def test_no_two_rows_positions_or_seeds_share_a_key():
    keys = [row_keys(seed, 20, position) for seed in range(3) for position in range(20)]
    words = np.concatenate([np.asarray(jax.random.key_data(key)) for key in keys])
    assert len(np.unique(words, axis=0)) == len(words) == 3 * 20 * 20


def test_a_row_alone_draws_what_it_draws_among_others():
    logits, keys = rows_of_logits(6), row_keys(7, 6, 3)
    together = sampled(logits, keys, 0.9, 20, 0.95)
    alone = [sampled(logits[i : i + 1], keys[i : i + 1], 0.9, 20, 0.95)[0] for i in range(6)]
    assert together.tolist() == alone


def test_a_rule_that_leaves_everything_changes_no_draw():
    logits, keys = rows_of_logits(32), row_keys(1, 32, 0)
    free = sampled(logits, keys)
    np.testing.assert_array_equal(sampled(logits, keys, top_k=VOCAB), free)
    np.testing.assert_array_equal(sampled(logits, keys, top_k=10 * VOCAB, top_p=1 - 1e-9), free)


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("seed", -1),
        ("seed", 2**31),
        ("max_new_tokens", 0),
        ("num_return_sequences", 0),
    ],
)
def test_a_bad_option_is_named_with_its_value_and_what_is_allowed(field, value):
    with pytest.raises(UserError, match=rf"^{field} = {value}, but it must be \S"):
        SamplingOptions(**{field: value})


def test_options_are_frozen_and_take_their_limits():
    options = SamplingOptions(temperature=0, top_k=0, top_p=1, seed=2**31 - 1, max_new_tokens=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.top_k = 3
