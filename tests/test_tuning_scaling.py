"""A power law through a handful of sizes: exact on exact data, and an interval that holds what it says."""

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.settings import ModelConfig
from jaxgpt.tuning import scaling
from jaxgpt.tuning.scaling import Law, Size, fit, predict

LAW = Law(floor=1.7, factor=40.0, exponent=0.25)
SIZES = np.array([1e5, 2e5, 4e5, 8e5, 1.6e6])


@pytest.mark.parametrize("law", [LAW, Law(0.0, 30.0, 0.15), Law(2.5, 900.0, 0.6)])
def test_exact_losses_give_the_exact_law(law):
    found = fit(SIZES, law(SIZES))
    assert found.floor == pytest.approx(law.floor, abs=1e-5)
    assert found.exponent == pytest.approx(law.exponent, rel=1e-5)
    (guess,) = predict(SIZES, law(SIZES), [1e8])
    assert guess.loss == pytest.approx(float(law(1e8)), rel=1e-6)
    assert guess.high - guess.low < 1e-4


@pytest.mark.parametrize("count", [4, 5])
def test_the_interval_holds_the_next_measurement_nine_times_in_ten(count):
    sizes, draws, noise, held = SIZES[:count], 200, 0.005, 0
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        losses = LAW(sizes) * (1 + noise * rng.standard_normal(count))
        measured = LAW(2 * sizes[-1]) * (1 + noise * rng.standard_normal())
        (guess,) = predict(sizes, losses, [2 * sizes[-1]])
        held += guess.low <= measured <= guess.high
        assert guess.low <= guess.loss <= guess.high
    assert 0.86 * draws <= held <= 0.96 * draws


def test_few_points_are_told_by_a_wide_interval():
    rng = np.random.default_rng(0)
    noisy = LAW(SIZES) * (1 + 0.005 * rng.standard_normal(5))
    widths = []
    for count in (4, 5):
        (guess,) = predict(SIZES[:count], noisy[:count], [3.2e6])
        widths.append(guess.high - guess.low)
    near, far = predict(SIZES, noisy, [1.6e6, 1e8])
    assert widths[0] > widths[1]
    assert far.high - far.low > near.high - near.low


def sizes_of(counts, law=LAW) -> list[Size]:
    return [Size(int(count), int(count) + 10, float(law(count)), number) for number, count in enumerate(counts)]


def test_the_next_size_is_twice_the_largest_unless_told():
    assert scaling.fit_sizes(sizes_of(SIZES), None).next.parameters == 3_200_000
    assert scaling.fit_sizes(sizes_of(SIZES[::-1]), 10_000_000).next.parameters == 10_000_000
    said = scaling.report(sizes_of(SIZES), scaling.fit_sizes(sizes_of(SIZES), None))
    assert "1.7 + 40 x N^-0.25" in said and "90% interval" in said and "without embeddings" in said


def test_three_sizes_are_too_few():
    assert scaling.fit_sizes(sizes_of(SIZES[:3]), None) is None
    assert "a law needs 4" in scaling.report(sizes_of(SIZES[:3]), None)
    assert scaling.report(sizes_of(SIZES[:1]), None) == ""
    with pytest.raises(UserError, match="3 sizes of model, 4 are needed"):
        scaling.check_sizes([ModelConfig(n_layer=layers) for layers in (1, 2, 3, 3)])


def test_losses_that_do_not_fall_give_no_law():
    rising = [Size(int(count), 0, 3.0 + number, number) for number, count in enumerate(SIZES)]
    assert "no law" in scaling.report(rising, scaling.fit_sizes(rising, None))


def test_embeddings_are_left_out_of_the_count():
    small = ModelConfig(n_layer=12, n_embd=768, n_head=12, n_positions=1024)
    assert scaling.without_embeddings(small) == 85_056_000  # GPT-2's 124,439,808 less 50,257 x 768 and 1,024 x 768
