"""`sweep` from a text to best.toml: trials that are really trained, killed and gone on with, and every wrong input."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import save_as_run

from jaxgpt import sweep
from jaxgpt.config import load_config
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import Interrupted, UserError
from jaxgpt.model import gpt2
from jaxgpt.training.bad_steps import BadStep
from jaxgpt.training.models import LoadedModel
from jaxgpt.tuning import learning_rate, trial_runner
from jaxgpt.tuning import sweep_folder as recording
from jaxgpt.tuning.sweep_folder import Records, TrialRecord
from jaxgpt.tuning.trial_runner import Trial, TrialRunner

CONFIG = """
[model]
n_layer = 1
n_head = 2
n_embd = 16
n_positions = 16
dtype = "float32"
[tokenizer]
type = "char"
[data]
source = "text"
path = "{folder}/text.txt"
prepared_dir = "{folder}/prepared"
validation_fraction = 0.1
[optimizer]
learning_rate = 1e-2
warmup_steps = 1
[train]
max_steps = 9
per_device_train_batch_size = 1
[eval]
eval_steps = 3
eval_batches = 2
[checkpoint]
save_steps = 3
[log]
logging_steps = 3
"""
RATE = "optimizer.learning_rate"
RATES = f"{RATE}=1e-4,1e-3,1e-2,1e-1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text(" ".join(rng.choice(["the", "cat", "sat", "on", "a", "mat"], 1500)))
    (folder / "tiny.toml").write_text(CONFIG.format(folder=folder))
    return folder


def run(folder: Path, name: str, *words: str) -> int:
    return sweep.main(["--config", str(folder / "tiny.toml"), "--workdir", str(folder / name), *words])


def lines(folder: Path, name: str) -> list[dict]:
    file = folder / name / recording.TRIALS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def pretended(self, trials, until=None):
    """Records without training: the lowest loss at a learning rate of 1e-3."""
    for trial in trials:
        loss = 2 + math.log10(trial.config.optimizer.learning_rate / 1e-3) ** 2
        curve = [[9, loss]]
        yield TrialRecord(trial.number, trial.settings, 9, "finished", loss, curve, curve, 1000, 1000, 1.0)


@pytest.fixture(scope="module")
def grid(folder) -> Path:
    """A grid of four learning rates that crashed before its third record, and went on to its end."""
    add = Records.add

    def crash_at_the_third(self, record):
        if record.number == 2:
            raise RuntimeError("crashed")
        add(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Records, "add", crash_at_the_third)
        with pytest.raises(RuntimeError):
            run(folder, "grid", "--vary", RATES)
    assert [trial["number"] for trial in lines(folder, "grid")] == [0, 1]
    before, fit, steps = (folder / "grid" / recording.TRIALS).read_bytes(), trial_runner.fit, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_runner, "fit", lambda run, state, start: steps.append(start.step) or fit(run, state, start))
        assert run(folder, "grid", "--vary", RATES, "--json", str(folder / "grid.json")) == 0
    assert steps == [9, 0]  # the third was trained but not recorded
    assert (folder / "grid" / recording.TRIALS).read_bytes().startswith(before)
    return folder / "grid"


@pytest.mark.system
def test_a_killed_sweep_repeats_no_finished_trial(folder):
    command = [sys.executable, "-m", "jaxgpt.sweep", "--config", str(folder / "tiny.toml"), "--vary", RATES]
    command += ["--workdir", str(folder / "killed")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while len(lines(folder, "killed")) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
    assert len(lines(folder, "killed")) >= 2, said
    assert not (folder / "killed" / recording.BEST).exists()
    killed = (folder / "killed" / recording.TRIALS).read_bytes()
    assert run(folder, "killed", "--vary", RATES) == 0
    assert (folder / "killed" / recording.TRIALS).read_bytes().startswith(killed)
    assert [trial["number"] for trial in lines(folder, "killed")] == [0, 1, 2, 3]


def test_best_toml_is_the_config_of_the_lowest_loss(folder, grid):
    trials = lines(folder, "grid")
    best = min(trials, key=lambda trial: trial["eval_loss"])
    assert sorted(trial["number"] for trial in trials) == [0, 1, 2, 3]
    assert len({trial["eval_loss"] for trial in trials}) == 4
    config = load_config(grid / recording.BEST)
    assert config == load_config(folder / "tiny.toml", best["settings"])
    assert json.loads((folder / "grid.json").read_text())["best"]["number"] == best["number"]
    assert "report.html" in os.listdir(grid) and not any((grid / "trials").iterdir())


def test_a_finished_sweep_is_shown_again_and_trains_nothing(folder, grid, monkeypatch, capsys):
    monkeypatch.setattr(TrialRunner, "__init__", None)
    before = (grid / recording.TRIALS).read_bytes()
    assert run(folder, "grid", "--vary", RATES) == 0
    assert "all 4 trials are done" in capsys.readouterr().out
    assert (grid / recording.TRIALS).read_bytes() == before


def test_another_sweep_in_the_folder_is_refused(folder, grid, capsys):
    assert run(folder, "grid", "--find-learning-rate") == 2
    assert "holds a sweep" in capsys.readouterr().err
    assert run(folder, "grid", "--vary", f"{RATE}=1e-4,1e-3") == 2
    assert "another sweep" in capsys.readouterr().err
    assert run(folder, "grid", "--vary", RATES, "--model.n_layer", "2") == 2
    assert "model.n_layer was 1, now 2" in capsys.readouterr().err


def test_halving_gives_the_steps_to_the_best_third(folder):
    halving = ["--method", "halving", "--trials", "3", "--vary", f"{RATE}=1e-4..1e-1"]
    assert run(folder, "halving", *halving) == 0
    reached = [(trial["step"], trial["number"]) for trial in lines(folder, "halving")]
    first = {trial["number"]: trial["eval_loss"] for trial in lines(folder, "halving") if trial["step"] == 3}
    assert reached == [(3, 0), (3, 1), (3, 2), (9, min(first, key=first.get))]
    assert not any((folder / "halving" / "trials").iterdir())


def test_the_estimator_goes_on_with_the_same_proposals(folder, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(TrialRunner, "run", pretended)
    tpe = ["--method", "tpe", "--vary", f"{RATE}=1e-4..1e-1"]
    assert run(folder, "whole", *tpe, "--trials", "15") == 0
    assert run(folder, "parts", *tpe, "--trials", "15") == 0
    kept = lines(folder, "parts")[:12]
    file = folder / "parts" / recording.TRIALS
    file.write_text("".join(json.dumps(trial) + "\n" for trial in kept) + '{"number": 12, "settings": {"opt')
    assert run(folder, "parts", *tpe, "--trials", "16") == 0
    assert lines(folder, "parts")[:15] == lines(folder, "whole") and len(lines(folder, "parts")) == 16


def test_a_sweep_that_is_told_to_stop_shows_what_it_has(folder, monkeypatch, capsys):
    def stopped(self, trials, until=None):
        yield from pretended(self, trials[:1])
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(TrialRunner, "run", stopped)
    assert run(folder, "stopped", "--vary", RATES) == 42
    assert "stopped: SIGTERM" in (said := capsys.readouterr()).err and "best     trial 0" in said.out
    assert len(lines(folder, "stopped")) == 1
    assert load_config(folder / "stopped" / recording.BEST).optimizer.learning_rate == 1e-4


def test_trials_get_the_weights_that_init_names(folder, grid, tmp_path, monkeypatch):
    config = load_config(folder / "tiny.toml")
    tokenizer = load_tokenizer(next((folder / "prepared").iterdir()) / "tokenizer")
    params = gpt2.init_params(config.model, tokenizer.vocab_size, jax.random.key(5))
    save_as_run(folder / "given", LoadedModel(config, tokenizer.vocab_size, params, tokenizer, 0))
    config = load_config(folder / "tiny.toml", {"init.from_checkpoint": str(folder / "given")})
    started = []

    def end_at_once(run, state, start):
        started.append(state.params)
        raise BadStep

    monkeypatch.setattr(trial_runner, "fit", end_at_once)
    bench = trial_runner.prepare_bench(config, [config])
    (record,) = TrialRunner(tmp_path, bench).run([Trial(0, {}, bench.resolved(config))])
    jax.tree.map(np.testing.assert_array_equal, started[0], params)
    assert record.status == "diverged"
    other = load_config(folder / "tiny.toml", {"init.from_checkpoint": str(folder / "given"), "model.n_layer": "2"})
    with pytest.raises(UserError, match="model.n_layer = 1, but this config has 2"):
        trial_runner.prepare_bench(config, [config, other])


def test_the_range_finder_writes_its_picture(folder, monkeypatch, capsys):
    rates, losses = [10.0**power for power in range(-6, 1)], [5.0, 5.0, 4.9, 4.0, 3.5, 3.4, 9.0]
    find = lambda *given: learning_rate.RangeFound(rates, losses, 1e-3, 1e-2)  # trained in test_tuning_trial_runner.py
    monkeypatch.setattr(learning_rate, "find", find)
    assert run(folder, "range", "--find-learning-rate", "--json", str(folder / "range.json")) == 0
    assert json.loads((folder / "range.json").read_text())["steepest"] == 1e-3
    assert "--vary optimizer.learning_rate=0.0003..0.02:7" in capsys.readouterr().out
    assert "range test" in (folder / "range" / recording.REPORT).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vary", "optimizer.learnig_rate=1,2"], "did you mean optimizer.learning_rate"),
        (["--vary", "data.path=a,b"], "only settings of [model], [optimizer] and [train]"),
        (["--vary", f"{RATE}=1,2", f"--{RATE}", "3"], "leave one out"),
        (["--vary", "model.n_head=2,3"], "does not divide"),
        (["--vary", f"{RATE}=1e-4..1e-2", "--method", "grid"], "1e-4..1e-2:7"),
        (["--vary", f"{RATE}=1,2", "--method", "grid", "--trials", "5"], "the grid has 2 points"),
        (["--vary", f"{RATE}=1..2", "--method", "halving", "--trials", "2"], "3 are needed"),
        (["--vary", "train.max_steps=5,9", "--method", "halving"], "after equal numbers of steps"),
        (["--vary", f"{RATE}=1..2", "--method", "halving", "--eval.eval_steps", "9", "--checkpoint.save_steps", "9"],
         "no evaluation before the last step"),
        (["--vary", f"{RATE}=1,2", "--predict", "1000000"], "4 are needed"),
        (["--trials", "0"], "1 or more"),
        (["--find-learning-rate", "--vary", f"{RATE}=1,2"], "takes no --vary"),
        (["--vary", "model.n_layer=1,2", "--init.from_checkpoint", "nowhere"], "nowhere"),
        (["--mesh.distributed", "on"], "one process"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_in_a_line_before_anything_is_written(folder, words, said, capsys, monkeypatch):
    for name, value in (("COORDINATOR", "127.0.0.1:9999"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        if "on" in words:
            monkeypatch.setenv(f"JAXGPT_{name}", value)
    assert run(folder, "wrong", *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (folder / "wrong").exists()
