"""What a sweep varies: lists, ranges, settings that belong together, and every wrong `--vary`."""

import math

import numpy as np
import pytest

from jaxgpt.config import Config, load_config
from jaxgpt.errors import UserError
from jaxgpt.tuning.space import Space, corners, draw, grid, read_space, read_variable

RATE = "optimizer.learning_rate"


def values(word: str) -> list[str]:
    return ["+".join(value) for value in read_variable(word).values]


def test_a_list_keeps_the_texts_that_were_written():
    assert values(f"{RATE}=1e-4, 3e-4,1e-3") == ["1e-4", "3e-4", "1e-3"]
    assert values("optimizer.name=adamw,muon") == ["adamw", "muon"]
    assert values("optimizer.weight_decay=1e+0,0") == ["1e+0", "0"]


def test_a_range_is_logarithmic_where_its_positive_ends_lie_ten_times_apart():
    assert values(f"{RATE}=1e-4..1e-2:5") == ["0.0001", "0.0003162", "0.001", "0.003162", "0.01"]
    assert values(f"{RATE}=1e-3..3e-3:3") == ["0.001", "0.002", "0.003"]
    assert values("optimizer.weight_decay=0..1:3") == ["0.0", "0.5", "1.0"]
    assert "logarithmic" in read_variable(f"{RATE}=1e-4..1e-3").describe()
    assert "linear" in read_variable("optimizer.weight_decay=0..1").describe()


def test_whole_numbers_stay_whole_and_none_is_tried_twice():
    assert values("model.n_layer=1..4:9") == ["1", "2", "3", "4"]
    assert values("model.n_layer=1..100:3") == ["1", "10", "100"]
    drawn = [int(draw([read_variable("model.n_layer=2..5")], 0, n)["model.n_layer"]) for n in range(400)]
    assert set(drawn) == {2, 3, 4, 5}
    assert min(np.bincount(drawn)[2:]) > 60  # the ends are as likely as the others


def test_settings_that_belong_together_vary_together():
    points = grid(
        [read_variable("model.n_layer+model.n_embd+model.n_head=2+64+2,4+128+4"), read_variable(f"{RATE}=1,2")]
    )
    assert len(points) == 4
    assert points[2] == {"model.n_layer": "4", "model.n_embd": "128", "model.n_head": "4", RATE: "1"}


def test_without_vary_the_learning_rate_goes_from_an_eighth_to_eight_times():
    (variable,) = read_space([], Config())
    rates = [float(value) for (value,) in variable.values]
    np.testing.assert_allclose(rates, 6e-4 * 2.0 ** np.arange(-3, 4), rtol=1e-3)
    assert variable.is_log


def test_a_random_trial_is_a_function_of_seed_and_number():
    space = [read_variable(f"{RATE}=1e-4..1e-2"), read_variable("optimizer.name=adamw,muon")]
    assert draw(space, 1, 5) == draw(space, 1, 5)
    assert len({draw(space, seed, number)[RATE] for seed in range(3) for number in range(10)}) == 30
    logs = [math.log10(float(draw(space, 0, number)[RATE])) for number in range(300)]
    assert min(logs) >= -4 and max(logs) <= -2
    assert abs(np.mean(logs) + 3) < 0.1  # half of them below 1e-3


def test_corners_hold_every_end_and_every_value():
    points = list(corners([read_variable(f"{RATE}=1e-4..1e-2"), read_variable("model.n_layer=1,2,3")]))
    assert {(p[RATE], p["model.n_layer"]) for p in points} == {(r, n) for r in ("0.0001", "0.01") for n in "123"}
    many = [read_variable(f"train.{name}=1..9") for name in ("seed", "max_steps")]
    many += [read_variable(f"optimizer.{name}=0.1..0.2") for name in ("weight_decay", "adam_beta1", "adam_beta2")]
    many += [read_variable("model.n_layer=" + ",".join(map(str, range(1, 60))))]
    assert {p["model.n_layer"] for p in corners(many)} == {str(n) for n in range(1, 60)}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optimizer.learnig_rate=1,2", "did you mean optimizer.learning_rate"),
        ("learning_rate=1,2", "did you mean optimizer.learning_rate"),
        ("data.block_size=16,32", "only settings of [model], [optimizer] and [train]"),
        ("tokenizer.vocab_size=300,400", "only settings of [model], [optimizer] and [train]"),
        (RATE, "write KEY=VALUES"),
        (f"{RATE}=", "write KEY=VALUES"),
        (f"{RATE}=1,,2", "a value is empty"),
        (f"{RATE}=1e-3,0.001", "is given twice"),
        (f"{RATE}=1e-2..1e-4", "the smaller one first"),
        (f"{RATE}=1e-4..nan", "two numbers"),
        (f"{RATE}=1e-4...1e-2", "two numbers"),
        (f"{RATE}=1e-4..1e-2:1", "number of points"),
        (f"{RATE}=1e-4..1e-2:many", "number of points"),
        ("model.n_layer=1.5..3", "whole number"),
        ("optimizer.name=a..b", "no number"),
        ("model.n_layer+model.n_embd=2+64,4", "1 values for 2 settings"),
        ("model.n_layer+model.n_embd=2..4", "need a list"),
        ("model.n_layer+model.n_layer=2+2", "twice"),
    ],
)
def test_a_wrong_variable_is_refused_in_a_line(word, said):
    with pytest.raises(UserError) as refusal:
        read_variable(word)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.fixture
def file(tmp_path) -> str:
    file = tmp_path / "base.toml"
    file.write_text("[model]\nn_head = 2\nn_embd = 64\nn_positions = 32\n")
    return str(file)


def space(file: str, *words: str, **overrides) -> Space:
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    return Space(file, overrides, read_space(words, load_config(file)))


def refusal(space: Space) -> str:
    with pytest.raises(UserError) as error:
        space.check(list(corners(space.variables)))
    return str(error.value)


def test_every_point_is_checked_as_the_command_line_is(file):
    assert "does not divide" in refusal(space(file, "model.n_head=2,3"))
    assert "model.n_head 3" in refusal(space(file, "model.n_head=2,3"))
    assert "must be float > 0" in refusal(space(file, f"{RATE}=1e-3,-1"))
    assert "one of adamw, muon" in refusal(space(file, "optimizer.name=adamw,sgd"))
    assert "leave one out" in refusal(space(file, f"{RATE}=1,2", optimizer__learning_rate="3"))
    assert "auto" in refusal(space(file, f"{RATE}=1,2", train__per_device_train_batch_size="auto"))


def test_windows_of_several_lengths_do_not_compare(file):
    assert "windows of 32 and 64 tokens" in refusal(space(file, "model.n_positions=32,64"))
    space(file, "model.n_positions=32,64", data__block_size="16").check([{"model.n_positions": "64"}])


def test_all_batch_sizes_are_evaluated_on_the_same_rows(file):
    base = load_config(file)
    fixed = space(file, "train.per_device_train_batch_size=2,4").fixed(base)
    sizes = {fixed.config(point).eval.per_device_eval_batch_size for point in grid(fixed.variables)}
    assert sizes == {base.train.per_device_train_batch_size}
    assert space(file, f"{RATE}=1,2").fixed(base).overrides == {}


def test_names_twice_and_grids_of_ranges_are_refused():
    with pytest.raises(UserError, match="twice"):
        read_space([f"{RATE}=1,2", f"{RATE}=3,4"], Config())
    with pytest.raises(UserError, match=r"=1e-4\.\.1e-2:7"):
        grid([read_variable(f"{RATE}=1e-4..1e-2")])
    many = [read_variable(f"optimizer.{name}=0..1:99") for name in ("weight_decay", "min_lr_rate", "adam_epsilon")]
    with pytest.raises(UserError, match="970,299 points"):
        grid(many)
