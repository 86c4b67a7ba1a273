"""What may be drawn, how often, and that a row's draw is its own."""

import dataclasses
import itertools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.inference import sampling
from jaxgpt.inference.sampling import Rules, SamplingOptions, rules_of

SMALL, LARGE = 65, 700  # of the large one a token is drawn from 64 candidates or from all
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
BELOW_1 = np.nextafter(np.float32(1), np.float32(0))
jit_sample, draw_keys = jax.jit(sampling.sample), jax.jit(sampling.draw_keys)


def sampled(logits, uniform, rules=None, seen=None, **options):
    """Tokens and log-probabilities of rows of logits, by `rules` or by the same options for every row."""
    logits, uniform = np.asarray(logits, np.float32), np.asarray(uniform, np.float32)
    rows = len(logits)
    if rules is None:
        rules = rules_of([SamplingOptions(**{**OFF, **options})] * rows, logits.shape[1])
    # Rows once more, to compile for few numbers of rows.
    again = np.arange(-(-rows // 64) * 64) % rows
    arguments = jax.tree.map(lambda x: x[again], (logits, uniform, rules, seen))
    tokens, log_probabilities = jit_sample(*arguments)
    assert tokens.dtype == jnp.int32 and log_probabilities.dtype == jnp.float32
    return np.asarray(tokens)[:rows], np.asarray(log_probabilities)[:rows]


def sampled_from_all(logits, uniform, rules):
    """The tokens of a batch whose last row, added here, can draw more than the candidates: so all draw from all."""
    logits, uniform = np.concatenate([logits, logits[:1]]), np.append(uniform, np.float32(0.5))
    extra = rules_of([SamplingOptions(**{**OFF, "top_k": 100})], logits.shape[1])
    rules = Rules(*[np.concatenate(both) for both in zip(rules, extra, strict=True)])
    return sampled(logits, uniform, rules)[0][:-1]


def drawable(logits, count=127, **options):
    """All tokens of one row that some number in [0, 1) draws; likelier than 1 / `count` they cannot hide."""
    uniform = np.append(np.arange(count) / count, BELOW_1)
    return sorted(set(sampled(np.tile(logits, (count + 1, 1)), uniform, **options)[0].tolist()))


def uniforms(rows, seed=0):
    return np.asarray(draw_keys(np.full(rows, seed), np.arange(rows), np.full(rows, 3)))


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def line_up(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The tokens of a row that may be drawn, the likeliest first, and their probabilities.

    In float64 and read off the definition: sort, cut after k, cut after p, cut below min_p.
    """
    scores = np.asarray(logits, np.float64) / temperature
    best = np.argsort(-scores, kind="stable")  # of equal logits the lower id first
    best = best[: top_k or None]
    if top_p < 1:
        best = best[: 1 + np.sum(np.cumsum(softmax(scores[best])) < top_p)]
    probabilities = softmax(scores[best])
    best = best[probabilities >= min_p * probabilities[0]]
    return best, softmax(scores[best])


def rows_of_logits(rows, vocab_size=SMALL, spread=3.0, seed=0):
    return (spread * np.random.default_rng(seed).standard_normal((rows, vocab_size))).astype(np.float32)


@pytest.mark.parametrize("vocab_size, spread", [(SMALL, 2.0), (LARGE, 1.0), (LARGE, 4.0), (1100, 0.5)])
def test_each_token_is_drawn_from_where_its_share_begins_to_where_it_ends(vocab_size, spread):
    margin, shares = 1e-5, 15
    row = rows_of_logits(1, vocab_size, spread)[0]
    logits = np.tile(row, (2 * shares + 2, 1))
    for rule in itertools.product([0.5, 1.3], [0, 1, 64, 90, 10**9], [0.05, 0.95, 1.0], [0.0, 0.02, 1.0]):
        options = dict(zip(("temperature", "top_k", "top_p", "min_p"), rule, strict=True))
        tokens, probabilities = line_up(row, **options)
        ends = np.cumsum(probabilities)
        begins = ends - probabilities
        places = np.flatnonzero(probabilities > 3 * margin)
        places = places[np.linspace(0, len(places) - 1, shares).astype(int)]
        uniform = np.concatenate([begins[places] + margin, ends[places] - margin, [0, BELOW_1]])
        drawn, _ = sampled(logits, uniform, **options)
        assert drawn[:-1].tolist() == [*tokens[places], *tokens[places], tokens[0]], options
        assert drawn[-1] in tokens


def test_top_p_takes_the_token_that_crosses_p():
    row = np.log([0.5, 0.3, 0.15, 0.05])
    kept = {p: len(drawable(row, top_p=p)) for p in (1e-45, 0.1, 0.49, 0.51, 0.79, 0.81, 0.96)}
    assert kept == {1e-45: 1, 0.1: 1, 0.49: 1, 0.51: 2, 0.79: 2, 0.81: 3, 0.96: 4}


def test_top_p_sees_the_probabilities_that_temperature_and_top_k_left():
    row = np.log([0.4, 0.3, 0.2, 0.1])
    # Of the best two alone, the first has 4/7 = 0.571: enough for p = 0.57, and not for p = 0.58.
    assert drawable(row, top_k=2, top_p=0.57) == [0]
    assert drawable(row, top_k=2, top_p=0.58) == [0, 1]
    # At temperature 0.5 the probabilities are 16, 9, 4, 1 of 30: the first alone has 0.533.
    assert drawable(row, temperature=0.5, top_p=0.53) == [0]


def test_min_p_is_relative_to_the_likeliest_token_after_temperature():
    row = np.log([0.2, 0.4, 0.1, 0.3])
    assert [drawable(row, min_p=p) for p in (0.24, 0.26, 0.51, 0.76, 1.0)] == [
        [0, 1, 2, 3],
        [0, 1, 3],
        [1, 3],
        [1],
        [1],
    ]
    assert drawable(row, temperature=0.5, min_p=0.26) == [1, 3]  # relative: 0.25, 1, 0.0625, 0.5625
    assert drawable(row, top_k=3, top_p=0.7, min_p=0.24) == [1, 3]


@pytest.mark.parametrize("vocab_size", [8, LARGE])
def test_equal_logits_rank_by_token_id(vocab_size):
    row = np.full(vocab_size, -np.inf)
    row[:5] = [1.0, 2.0, 2.0, 2.0, 0.0]
    assert drawable(row, top_k=2) == [1, 2]
    row[:5] = [0.0, -0.0, 0.0, -0.0, -1.0]
    assert drawable(row, top_k=2) == [0, 1]
    assert drawable(row, top_p=0.6) == [0, 1, 2]
    assert sampled([row], [0.9], temperature=0)[0] == 0
    assert sampled(np.zeros((3, vocab_size)), [0, 0.51, BELOW_1], top_p=0.5)[0].tolist() == [
        0,
        int(0.51 * vocab_size / 2),
        vocab_size // 2 - 1,
    ]


def test_temperature_zero_and_top_k_one_are_greedy():
    for vocab_size in (SMALL, LARGE):
        logits, uniform = rows_of_logits(32, vocab_size), uniforms(32)
        for greedy in ({"temperature": 0}, {"temperature": 5, "top_k": 1}, {"temperature": 1e-6}, {"min_p": 1}):
            np.testing.assert_array_equal(sampled(logits, uniform, **greedy)[0], logits.argmax(-1))


def test_log_probabilities_are_of_the_model_and_not_of_the_rules():
    for vocab_size in (SMALL, LARGE):
        logits, seen = rows_of_logits(32, vocab_size), np.ones((32, vocab_size), bool)
        for options in ({"temperature": 0}, {"temperature": 0.3, "top_k": 5}, {"top_p": 0.8, "temperature": 3}):
            tokens, log_probabilities = sampled(logits, uniforms(32), seen=seen, repetition_penalty=1.7, **options)
            expected = [np.log(softmax(row.astype(np.float64)))[token] for row, token in zip(logits, tokens)]
            np.testing.assert_allclose(log_probabilities, expected, rtol=1e-5, atol=1e-6)


def penalised(logits, seen, penalty):
    """Keskar et al. 2019 as Hugging Face reads it: a negative logit is multiplied."""
    lowered = [[x / penalty if x > 0 else x * penalty for x in row] for row in logits.astype(np.float64)]
    return np.where(seen, lowered, logits).astype(np.float32)


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
def test_the_repetition_penalty_lowers_the_logits_of_seen_tokens_and_no_others(vocab_size):
    logits, uniform = rows_of_logits(64, vocab_size, spread=1.5), uniforms(64)
    seen = np.random.default_rng(1).random(logits.shape) < 0.4
    for rules in ({"temperature": 0}, {"top_k": 20, "temperature": 0.8}, {"top_p": 0.9}):
        unpenalised = sampled(logits, uniform, **rules)[0]
        for penalty in (0.5, 1.3, 4.0):
            tokens = sampled(logits, uniform, seen=seen, repetition_penalty=penalty, **rules)[0]
            expected = sampled(penalised(logits, seen, penalty), uniform, **rules)[0]
            assert (tokens == expected).mean() > 0.98  # but where rounding moves a border past the number drawn
            assert (tokens != unpenalised).any()
        np.testing.assert_array_equal(sampled(logits, uniform, seen=seen, **rules)[0], unpenalised)


def test_the_repetition_penalty_is_that_of_hugging_face():
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, text = rows_of_logits(64, spread=1.5), np.random.default_rng(2).integers(0, SMALL, (64, 30))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, text, True, axis=1)
    processor = RepetitionPenaltyLogitsProcessor(1.4)
    expected = processor(torch.from_numpy(text), torch.from_numpy(logits.copy())).argmax(-1).numpy()
    np.testing.assert_array_equal(
        sampled(logits, uniforms(64), seen=seen, temperature=0, repetition_penalty=1.4)[0], expected
    )


def test_each_row_of_a_batch_follows_its_own_rules():
    choices = itertools.product([0, 0.7], [0, 30, 200], [0.5, 1.0], [0, 0.05], [1.0, 1.5])
    options = [
        SamplingOptions(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r) for t, k, p, m, r in choices
    ]
    for vocab_size in (SMALL, LARGE):
        rules = rules_of(options, vocab_size)
        logits, uniform = rows_of_logits(len(options), vocab_size, spread=1.5), uniforms(len(options))
        seen = np.random.default_rng(1).random(logits.shape) < 0.4
        tokens, log_probabilities = sampled(logits, uniform, rules, seen)
        together = logits, uniform, rules, seen
        alone = [jit_sample(*jax.tree.map(lambda x, i=i: x[i : i + 1], together)) for i in range(len(options))]
        assert tokens.tolist() == [token for (token,), _ in alone]
        np.testing.assert_allclose(log_probabilities, [value for _, (value,) in alone], rtol=1e-5)


@pytest.mark.parametrize("step", [0.0, 0.25])  # between logits: with steps many are equal
def test_a_row_draws_from_the_candidates_what_it_draws_from_all(step):
    rows, different = 63, 0
    choices = list(itertools.product([0, 0.5, 1, 2], [1, 7, 64], [0.3, 0.9, 1], [0, 0.1]))
    for seed in range(32):
        logits = rows_of_logits(rows, LARGE, spread=1.5, seed=seed)
        logits = np.round(logits / step).astype(np.float32) * np.float32(step) if step else logits
        chosen = [choices[i] for i in np.random.default_rng(seed).integers(0, len(choices), rows)]
        options = [SamplingOptions(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in chosen]
        rules, uniform = rules_of(options, LARGE), uniforms(rows, seed)
        different += (sampled(logits, uniform, rules)[0] != sampled_from_all(logits, uniform, rules)).sum()
    assert different <= 2  # of 2,016: the number drawn lay within rounding of the border between two tokens


def test_no_logits_and_no_rules_give_nan_or_a_banned_token():
    largest = float(np.finfo(np.float32).max)
    rows = [
        [largest, -largest, 0, 1],
        [math.inf, 0, -math.inf, 1],
        [-math.inf, -math.inf, -largest, -math.inf],
        [1e-40, 0, -1e-40, -math.inf],
        [1, 1 + 1e-7, 1, -math.inf],
    ]
    for vocab_size in (4, LARGE):
        logits = np.full((len(rows), vocab_size), -np.inf, np.float32)
        logits[:, -4:] = rows
        temperatures, top_ks, top_ps, min_ps, penalties = (
            [0, 1e-45, 1, 1e300],
            [0, 1, 100],
            [1e-45, 0.5, 1],
            [0, 0.5],
            [1e-300, 1, 1e300],
        )
        every_rule = list(itertools.product(temperatures, top_ks, top_ps, min_ps, penalties))
        options = [
            SamplingOptions(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r)
            for t, k, p, m, r in every_rule
        ]
        batch, every_row = np.tile(logits, (len(options), 1)), np.arange(len(options) * len(rows))
        rules = rules_of([option for option in options for _ in rows], vocab_size)
        for uniform in (0.0, 0.5, BELOW_1):
            numbers, seen = np.full(len(batch), uniform), np.ones(batch.shape, bool)
            tokens, log_probabilities = sampled(batch, numbers, rules, seen)
            assert (batch[every_row, tokens] > -math.inf).all()
            assert np.isfinite(log_probabilities[batch[every_row, tokens] > -1e30]).all()
            assert not np.isnan(log_probabilities).any()


def test_a_row_without_a_token_to_draw_still_gives_one_of_the_vocabulary():
    for vocab_size, row in itertools.product((SMALL, LARGE), (-math.inf, math.nan)):
        for options in ({"temperature": 0}, {"top_k": 5}, {"top_k": 80, "top_p": 0.9, "min_p": 0.1}, {}):
            tokens, _ = sampled(np.full((1, vocab_size), row), [0.7], **options)
            assert 0 <= tokens[0] < vocab_size


@pytest.mark.parametrize("rule", [(1.0, 0, 1.0, 0), (0.7, 4, 1.0, 0), (1.5, 0, 0.8, 0), (0.8, 6, 0.9, 0.2)])
def test_tokens_come_as_often_as_their_probability_says(rule):
    row = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5])
    options = dict(zip(("temperature", "top_k", "top_p", "min_p"), rule, strict=True))
    draws, false_alarm = 200 * 200, 1e-9
    # Over rows and over positions: both ways in which decoding draws new numbers.
    uniform = draw_keys(np.zeros(draws, np.int32), *(x.ravel() for x in np.indices((200, 200), np.int32)))
    tokens, _ = sampled(np.tile(row, (draws, 1)), uniform, **options)
    frequencies = np.bincount(tokens, minlength=len(row)) / draws
    expected = np.zeros(len(row))
    kept, expected_of_kept = line_up(row, **options)
    expected[kept] = expected_of_kept
    # Hoeffding: P(|frequency - p| > e) <= 2 exp(-2 n e^2); together over the tokens at most `false_alarm`.
    error = math.sqrt(math.log(2 * len(row) / false_alarm) / (2 * draws))
    assert np.abs(frequencies - expected).max() < error < 0.02
    assert (frequencies[expected == 0] == 0).all()


def test_numbers_drawn_depend_on_seed_row_and_position_and_on_nothing_else():
    seeds, rows, positions = (x.ravel() for x in np.indices((3, 20, 20), np.int32))
    numbers = np.asarray(draw_keys(seeds, rows, positions))
    assert numbers.dtype == np.float32 and (numbers >= 0).all() and (numbers < 1).all()
    assert len(np.unique(numbers)) > 1195  # of 1,200; two of 2^24 numbers may be equal by chance
    alone = [float(draw_keys(seeds[i : i + 1], rows[i : i + 1], positions[i : i + 1])[0]) for i in (0, 7, 500, 1199)]
    assert alone == numbers[[0, 7, 500, 1199]].tolist()


def test_the_largest_number_drawn_is_below_1(monkeypatch):
    monkeypatch.setattr(jax.random, "bits", lambda key: jnp.uint32(2**32 - 1))
    assert sampling.draw_keys(np.arange(1), np.arange(1), np.arange(1))[0] == BELOW_1


def test_a_rule_that_leaves_everything_changes_no_draw():
    for vocab_size in (SMALL, LARGE):
        logits, uniform = rows_of_logits(32, vocab_size), uniforms(32)
        free = sampled(logits, uniform)[0]
        for options in ({"top_k": vocab_size}, {"top_k": 10**12, "top_p": 1 - 1e-9}, {"min_p": 1e-30}):
            np.testing.assert_array_equal(sampled(logits, uniform, **options)[0], free)


def test_other_rules_compile_nothing():
    logits, uniform = rows_of_logits(64, LARGE), uniforms(64)
    jit_sample(logits, uniform, rules_of([SamplingOptions()] * 64, LARGE), None)
    before = jit_sample._cache_size()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"temperature": 0}, {"top_k": 0, "top_p": 1, "min_p": 0.5}, {"temperature": 1e300}):
            jit_sample(logits, uniform, rules_of([SamplingOptions(**options)] * 64, LARGE), None)
    assert jit_sample._cache_size() == before


def test_candidates_are_found_without_sorting_the_vocabulary():
    """XLA recognizes a top-k by its pattern. Where it does not, GPT-2's takes 6 ms instead of 0.1 ms."""
    logits, rules = rows_of_logits(64, LARGE), rules_of([SamplingOptions()] * 64, LARGE)
    compiled = jit_sample.lower(logits, uniforms(64), rules).compile().as_text()
    assert 'custom_call_target="TopK"' in compiled
    assert " sort(" not in compiled


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
        ("min_p", -0.1),
        ("min_p", 1.01),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("stop", ("end", "")),
        ("stop", "end"),
        ("stop", ("\n\n", 5)),
        ("stop_token_ids", (3, -1)),
        ("seed", -1),
        ("seed", 2**31),
        ("max_new_tokens", 0),
        ("num_return_sequences", 0),
    ],
)
def test_a_bad_option_is_named_with_its_value_and_what_is_allowed_in_one_line(field, value):
    with pytest.raises(UserError) as error:
        SamplingOptions(**{field: value})
    assert str(error.value).startswith(f"{field} = {value!r}, but it must be ")
    assert "\n" not in str(error.value)


def test_options_are_frozen_and_take_their_limits():
    options = SamplingOptions(temperature=0, top_k=0, top_p=1, seed=2**31 - 1, max_new_tokens=1, min_p=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.top_k = 3
    assert hash(options) == hash(SamplingOptions(**dataclasses.asdict(options)))
