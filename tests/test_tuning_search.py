"""Which trials come next and what is kept of them: a function of the records, so that a killed sweep goes on."""

import dataclasses
import importlib.util
import json
import math

import pytest

from jaxgpt.config import Config, load_config
from jaxgpt.errors import UserError
from jaxgpt.settings import CheckpointConfig, EvalConfig, OptimizerConfig, TrainConfig
from jaxgpt.tuning import sweep_folder as recording
from jaxgpt.tuning import sweep_table
from jaxgpt.tuning.search import Search, SweepRequest, requested_search, rungs_of
from jaxgpt.tuning.space import Space, read_space
from jaxgpt.tuning.sweep_folder import Records, TrialRecord

RATE = "optimizer.learning_rate"


def config(steps: int, every: int) -> Config:
    train, optimizer = TrainConfig(max_steps=steps), OptimizerConfig(warmup_steps=0)
    kept = CheckpointConfig(keep_best=False)
    return Config(train=train, eval=EvalConfig(eval_steps=every), optimizer=optimizer, checkpoint=kept)


@pytest.fixture
def search(tmp_path):
    file = tmp_path / "base.toml"
    file.write_text("[optimizer]\nlearning_rate = 1e-3\n")

    def make(method: str, *words: str, **options) -> Search:
        space = Space(str(file), {}, read_space(words, load_config(file)))
        return Search(**{"method": method, "space": space, "seed": 0, "trials": 9} | options)

    return make


def loss_of(settings: dict) -> float:
    """Lowest at a learning rate of 1e-3."""
    return 2 + math.log10(float(settings[RATE]) / 1e-3) ** 2


def record(number: int, settings: dict, step: int = 100, status: str = "finished", loss=None) -> TrialRecord:
    loss = loss_of(settings) if loss is None and status != "diverged" else loss
    return TrialRecord(number, settings, step, status, loss, [], [], 1000, 10, 1.0)


def run(search: Search, records: Records, only: int | None = None) -> list[tuple[int, dict, int | None]]:
    """Run what the search asks for, `only` so many trials; (number, settings, until) of each."""
    ran = []
    while (now := search.next_round(records)) is not None:
        for number, settings in now.points.items():
            if len(ran) == only:
                return ran
            status = "paused" if now.until else "finished"
            records.add(record(number, settings, now.until or 100, status))
            ran.append((number, settings, now.until))
    return ran


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize("method", ["grid", "random", "halving", "tpe"])
def test_a_killed_sweep_does_what_it_would_have_done(tmp_path, search, method):
    if method == "tpe" and importlib.util.find_spec("optuna") is None:
        pytest.skip("optuna is not installed")
    word = f"{RATE}=1e-4..1e-2" + (":9" if method == "grid" else "")
    asked = search(method, word, rungs=(10, 30, 100) if method == "halving" else ())
    (tmp_path / "whole").mkdir()
    whole = run(asked, Records(tmp_path / "whole"))
    assert len(whole) == (13 if method == "halving" else 9)
    for stop in (1, 4, 8):
        (tmp_path / f"{stop}").mkdir()
        first = run(asked, Records(tmp_path / f"{stop}"), only=stop)
        assert first + run(asked, Records(tmp_path / f"{stop}")) == whole


def test_a_larger_number_of_trials_goes_on(tmp_path, search):
    small, large = search("random", f"{RATE}=1e-4..1e-2", trials=3), search("random", f"{RATE}=1e-4..1e-2", trials=5)
    before = run(small, Records(tmp_path))
    assert [number for number, *_ in run(large, Records(tmp_path))] == [3, 4]
    assert [number for number, *_ in before] == [0, 1, 2]


def test_halving_keeps_the_best_third_and_what_diverged_never_comes_back(tmp_path, search):
    asked = search("halving", f"{RATE}=1e-4..1e-2", rungs=(10, 100))
    records = Records(tmp_path)
    first = asked.next_round(records)
    assert first.until == 10 and sorted(first.points) == list(range(9))
    best = min(first.points, key=lambda number: loss_of(first.points[number]))
    for number, settings in first.points.items():
        records.add(record(number, settings, 10, "diverged" if number == best else "paused"))
    second = asked.next_round(records)
    order = sorted(set(first.points) - {best}, key=lambda number: loss_of(first.points[number]))
    assert sorted(second.points) == sorted(order[:3]) and second.until is None
    assert second.alive == set(order[:3])


def test_rungs_lie_where_evaluations_are():
    assert rungs_of(config(900, 100), 27) == (100, 300, 900)
    assert rungs_of(config(900, 10), 27) == (30, 100, 300, 900)
    assert rungs_of(config(100, 30), 9) == (30, 100)
    with pytest.raises(UserError, match="eval.eval_steps to 11"):
        rungs_of(config(100, 100), 9)
    with pytest.raises(UserError, match="3 are needed"):
        rungs_of(config(100, 10), 2)


def test_the_estimator_moves_to_where_the_losses_are_low(tmp_path, search):
    pytest.importorskip("optuna")
    asked = search("tpe", f"{RATE}=1e-6..1", "optimizer.name=adamw,muon", trials=40)
    run(asked, Records(tmp_path))
    trials = Records(tmp_path).latest()
    assert len(trials) == 40 and {trial.settings["optimizer.name"] for trial in trials} == {"adamw", "muon"}
    early, late = trials[:10], trials[25:]
    mean = lambda some: sum(trial.loss for trial in some) / len(some)
    assert mean(late) < mean(early) / 1.5


def test_the_estimator_learns_from_trials_that_diverged(tmp_path, search):
    pytest.importorskip("optuna")
    asked = search("tpe", f"{RATE}=1e-6..1", trials=30)
    records = Records(tmp_path)
    while (now := asked.next_round(records)) is not None:
        for number, settings in now.points.items():
            status = "diverged" if float(settings[RATE]) > 1e-3 else "finished"
            records.add(record(number, settings, status=status))
    assert sum(trial.status == "diverged" for trial in records.latest()[15:]) <= 8  # half of what is drawn at random


def test_the_estimator_names_what_to_install(tmp_path, monkeypatch):
    request = SweepRequest("C", {}, [f"{RATE}=1e-4..1e-2"], "tpe", 9, 0, tmp_path, None, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.*\[sweep\]'"):
        requested_search(Config(), request)


# ---------------------------------------------------------------- records


def test_a_line_that_was_being_written_is_cut_off(tmp_path):
    records = Records(tmp_path)
    records.add(record(0, {RATE: "1e-3"}))
    whole = (tmp_path / recording.TRIALS).read_bytes()
    (tmp_path / recording.TRIALS).write_bytes(whole + b'{"number": 1, "sett')
    assert [line.number for line in Records(tmp_path).latest()] == [0]
    assert (tmp_path / recording.TRIALS).read_bytes() == whole
    (tmp_path / recording.TRIALS).write_bytes(whole + b'{"what": 1}\n')
    with pytest.raises(UserError, match="trials.jsonl:2"):
        Records(tmp_path)


def test_another_sweep_is_refused_with_what_differs(tmp_path):
    asked = {"method": "grid", "variables": {RATE: "1,2"}, "seed": 0, "trials": 2}
    recording.start(tmp_path, asked, config(100, 10))
    before = recording.earlier(tmp_path)
    recording.check_same(tmp_path, before, asked, config(100, 10))
    recording.check_same(tmp_path, before, asked | {"trials": 9}, config(100, 10))
    with pytest.raises(UserError, match=r"learning_rate=1,2, now .*learning_rate=1,3; .*another --workdir"):
        recording.check_same(tmp_path, before, asked | {"variables": {RATE: "1,3"}}, config(100, 10))
    with pytest.raises(UserError, match="train.max_steps was 100, now 200"):
        recording.check_same(tmp_path, before, asked, config(200, 10))
    with pytest.raises(UserError, match="trials was 2, now 9"):
        recording.check_same(tmp_path, before | {"method": "halving"}, asked | {"method": "halving", "trials": 9},
                             config(100, 10))  # fmt: skip


def test_a_folder_of_something_else_is_refused(tmp_path):
    assert recording.earlier(tmp_path / "new") == {}
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no folder of a sweep"):
        recording.earlier(tmp_path)


def test_the_winner_is_a_config_file_with_the_settings_that_differ_only(tmp_path):
    base = tmp_path / "configs" / "base.toml"
    base.parent.mkdir()
    base.write_text('[data]\nsource = "text"\npath = "some text"\n[tokenizer]\nspecial_tokens = ["<a>"]\n')
    overrides = {"train.max_steps": "200", "data.path": 'quo"te \\ ü', "tokenizer.special_tokens": "<b>,<c>"}
    space = Space(str(base), overrides, read_space([f"{RATE}=1e-3,2e-3", "train.global_batch_size=none,8"], Config()))
    settings = {RATE: "2e-3", "train.global_batch_size": "none"}
    (tmp_path / "sweep").mkdir()
    file = recording.write_best(tmp_path / "sweep", space, record(3, settings))
    assert load_config(file) == space.config(settings)
    assert 'base = "../configs/base.toml"' in file.read_text(encoding="utf-8")
    assert "source" not in file.read_text(encoding="utf-8")


# ---------------------------------------------------------------- what the trials say


def test_what_matters_is_told_apart_from_what_does_not(search, tmp_path):
    asked = search("grid", f"{RATE}=1e-4,1e-3,1e-2", "optimizer.weight_decay=0,0.1", trials=6)
    run(asked, records := Records(tmp_path))
    (first, big), (second, small) = sweep_table.effects(asked.space, records)
    assert (first.label, second.label) == ("learning_rate", "weight_decay")
    assert big == pytest.approx(1.0) and small == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("values", "said"),
    [("1e-4,2e-4,3e-4", "largest"), ("3e-3,1e-2,2e-2", "smallest"), ("1e-4,1e-3,1e-2", ""), ("1e-3,2e-3", "")],
)
def test_a_best_value_at_the_border_is_doubted(search, tmp_path, values, said):
    asked = search("grid", f"{RATE}={values}")
    run(asked, records := Records(tmp_path))
    doubts = sweep_table.doubts(asked.space, records)
    assert bool(doubts) == bool(said) and all(said in doubt and "widen the range" in doubt for doubt in doubts)


def test_differences_within_the_noise_of_seeds_are_doubted(search, tmp_path):
    asked = search("grid", f"{RATE}=1e-4,9e-4,1e-3,1e-2", "train.seed=1,2,3")
    records = Records(tmp_path)
    for number, settings in asked.next_round(records).points.items():
        noise = 0.05 * int(settings["train.seed"])
        records.add(record(number, settings, loss=loss_of(settings) + noise))
    (doubt,) = sweep_table.doubts(asked.space, records)
    assert "learning_rate 1e-3; learning_rate 9e-4" in doubt and "0.0500" in doubt


def test_the_table_has_the_best_first_and_what_diverged_last(search, tmp_path):
    asked = search("grid", f"{RATE}=1e-4,1e-3,1e-2")
    run(asked, records := Records(tmp_path))
    records.add(dataclasses.replace(record(3, {RATE: "1"}, status="diverged")))
    lines = sweep_table.table(asked.space, records).splitlines()
    assert [line.split()[0] for line in lines] == ["trial", "1", "0", "2", "3"]
    assert "diverged" in lines[-1] and sweep_table.best(records).number == 1
    assert len(json.loads((tmp_path / recording.TRIALS).read_text().splitlines()[0])) == 10
