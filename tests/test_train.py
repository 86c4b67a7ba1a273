"""`train` from a text file to a report: resume, stop, and every wrong input, with real data, Orbax and processes."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import RUN

from jaxgpt import train
from jaxgpt.config import Config, load_config
from jaxgpt.errors import Interrupted, UserError
from jaxgpt.model import huggingface
from jaxgpt.training import bad_steps, signals
from jaxgpt.training.checkpoint import Checkpoints
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.models import check_logits, load_model

CONFIG = (
    RUN
    + """warmup_steps = 2
[train]
max_steps = 6
per_device_train_batch_size = 1
seed = 7
[eval]
eval_steps = 3
sample_tokens = 8
[checkpoint]
save_steps = 3
[log]
logging_steps = 1
"""
)
WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "after", "it", "over", "a", "hill"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text(" ".join(rng.choice(WORDS, 2000)))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder


def load(folder: Path, **overrides) -> Config:
    return load_config(folder / "config.toml", {key.replace("__", "."): str(v) for key, v in overrides.items()})


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """A run of 6 steps, undisturbed."""
    train.train(load(folder), folder / "whole")
    return folder / "whole"


def steps(workdir: Path) -> dict[int, dict]:
    """The training lines of metrics.jsonl by step, without what the clock decides."""
    timed = ("tokens_per_second", "mfu")
    return {
        line["step"]: {k: v for k, v in line.items() if k not in timed and not k.startswith("seconds_")}
        for line in read_metrics(workdir)
        if "loss" in line
    }


def test_a_run_leaves_everything_a_user_expects(finished):
    lines = steps(finished)
    assert list(lines) == [1, 2, 3, 4, 5, 6]
    assert lines[6]["loss"] < lines[1]["loss"]
    evaluations = [line for line in read_metrics(finished) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    last = evaluations[-1]
    assert last["eval_perplexity"] == pytest.approx(np.exp(last["eval_loss"]))
    assert last["eval_bits_per_byte"] == pytest.approx(last["eval_loss"] / np.log(2), rel=0.01)  # a char is a byte here
    assert isinstance(last["sample"], str)
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir() if p.name.isdigit()) == [3, 6]
    assert "<html" in (finished / "report.html").read_text()
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (finished / "hf").iterdir()
    }
    assert (finished / "tokenizer" / "tokenizer.json").exists()
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["devices"] == 8


def test_three_plus_restore_plus_three_is_six_bit_for_bit(folder, finished, monkeypatch):
    class StopAtThree(signals.StopSignal):
        """What SIGTERM during step 4 does."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.asked = 0

        @property
        def requested(self):
            self.asked += 1
            return "SIGTERM" if self.asked > 4 else None  # the loop asks once a step and once an evaluation

        @requested.setter
        def requested(self, value):
            pass

    workdir = folder / "halves"
    monkeypatch.setattr("jaxgpt.training.run.StopSignal", StopAtThree)
    with pytest.raises(Interrupted, match="run the same command again"):
        train.train(load(folder), workdir)
    monkeypatch.undo()
    interrupted = max(steps(workdir))
    assert interrupted < 6
    assert not (workdir / "hf").exists()
    assert json.loads((workdir / "summary.json").read_text())["status"] == "interrupted"
    train.train(load(folder), workdir)
    assert steps(workdir) == steps(finished)  # losses, norms and batch hashes to the last bit
    ours, theirs = (load_model(run).params for run in (workdir, finished))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    for file in (finished / "hf").iterdir():
        assert (workdir / "hf" / file.name).read_bytes() == file.read_bytes()


def test_the_weights_for_everyone_are_those_of_the_last_checkpoint(finished):
    run, exported = load_model(finished), load_model(finished / "hf")
    assert exported.vocab_size == run.vocab_size == exported.tokenizer.vocab_size
    np.testing.assert_array_equal(
        *(check_logits(run.config.model, model.vocab_size, model.params) for model in (run, exported))
    )


def test_hf_is_the_same_from_a_mesh_that_splits_the_weights(folder, finished):
    workdir = folder / "split"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "hf")
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "train__per_device_train_batch_size": 2}
    train.train(load(folder, **mesh, train__global_batch_size=8), workdir)  # nothing left to do but this
    for name in ("model.safetensors", "config.json"):
        assert (workdir / "hf" / name).read_bytes() == (finished / "hf" / name).read_bytes()


def test_hf_that_cannot_be_written_fails_in_one_line_and_the_same_command_writes_it(
    folder, finished, capsys, monkeypatch
):
    workdir = folder / "full"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "hf")
    arguments = ["--config", str(folder / "config.toml"), "--workdir", str(workdir)]

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface, "write_tensors", full)
    assert train.main(arguments) == 1
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert "the run is finished and saved" in error and "No space left" in error
    assert json.loads((workdir / "summary.json").read_text())["status"] == "finished"
    assert not [path for path in workdir.iterdir() if "hf" in path.name]
    monkeypatch.undo()
    assert train.main(arguments) == 0
    assert (workdir / "hf" / "model.safetensors").read_bytes() == (finished / "hf" / "model.safetensors").read_bytes()


def test_a_run_goes_on_on_another_mesh(folder, finished):
    workdir = folder / "meshes"
    train.train(load(folder, train__max_steps=6, checkpoint__save_steps=3), workdir)
    # Forget the last three steps, then repeat them on another mesh.
    shutil.rmtree(workdir / "checkpoints" / "6")
    train.train(load(folder, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, train__global_batch_size=8,
                     train__per_device_train_batch_size=2), workdir)  # fmt: skip
    ours, theirs = steps(workdir), steps(finished)
    assert [ours[s]["batch_hash"] for s in ours] == [theirs[s]["batch_hash"] for s in theirs]
    np.testing.assert_allclose([ours[s]["loss"] for s in ours], [theirs[s]["loss"] for s in theirs], atol=1e-5)


def test_a_finished_run_does_nothing_more(folder, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    train.train(load(folder), finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_the_state_that_was_saved_is_the_state_that_is_restored(folder, finished):
    model = load_model(finished)
    assert model.step == 6
    assert load_model(finished / "checkpoints" / "3").step == 3
    assert model.tokenizer.vocab_size == model.vocab_size


def test_training_starts_from_another_runs_weights(folder, finished):
    workdir = folder / "continued"
    train.train(load(folder, init__from_checkpoint=finished, optimizer__learning_rate=1e-9, train__seed=1), workdir)
    assert steps(workdir)[1]["loss"] < steps(finished)[1]["loss"] - 0.1
    weights, start = load_model(workdir).params["wpe"], load_model(finished).params["wpe"]
    np.testing.assert_allclose(weights, start, atol=1e-6)


def test_the_best_checkpoint_is_kept_besides_the_latest(tmp_path):
    from tiny import program

    state = program().init()
    checkpoints = Checkpoints(tmp_path, dataclasses.replace(Config().checkpoint, save_total_limit=1))
    for step, loss in [(10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5)]:
        checkpoints.save(step, state, {}, loss)
    checkpoints.save(50, state, {}, None)  # told to stop: no evaluation
    checkpoints.wait()
    assert checkpoints.steps() == [20, 50]
    assert checkpoints.best_step() == 20
    checkpoints.close()
    reopened = Checkpoints(tmp_path, Config().checkpoint)
    assert (reopened.best_step(), reopened.latest_step()) == (20, 50)
    reopened.close()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(folder, capsys):
    workdir = folder / "exploded"
    config = load(folder, optimizer__learning_rate=1e30, optimizer__max_grad_norm=0, optimizer__warmup_steps=0,
                  checkpoint__save_steps=1, eval__eval_steps=1)  # fmt: skip
    with pytest.raises(bad_steps.BadStep, match=r"step \d: loss = .*last good checkpoint is step 1.*learning rate"):
        train.train(config, workdir)
    assert json.loads((workdir / "summary.json").read_text())["status"] == "failed"
    saved = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert max(saved) <= max(line["step"] for line in lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_42_and_the_same_command_goes_on(folder, number):
    workdir = folder / f"signal-{number.name}"
    never = ["--train.max_steps", "100000", "--eval.eval_steps", "100000", "--checkpoint.save_steps", "100000"]
    arguments = ["--config", str(folder / "config.toml"), "--workdir", str(workdir), *never]
    command = [sys.executable, "-m", "jaxgpt.train", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.time() + 120
    while not (workdir / "metrics.jsonl").exists() or len(read_metrics(workdir)) < 5:
        assert time.time() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 42, errors
    assert "run the same command again" in errors
    last = read_metrics(workdir)[-1]["step"]
    [saved] = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == last


BAD_INPUT = [
    (["--config", "{folder}/nothing.toml"], "no such config file"),
    (["--config", "{folder}/config.toml", "--train.max_step", "3"], "did you mean train.max_steps?"),
    (["--config", "{folder}/config.toml", "--data.path", "{folder}/nothing.txt"], "nothing.txt"),
    (["--config", "{folder}/config.toml", "--data.path", "{folder}/empty.txt"], "empty"),
    (["--config", "{folder}/config.toml", "--data.path", "{folder}/short.txt"], "32"),
    (["--config", "{folder}/config.toml", "--mesh.fsdp", "3"], "does not divide the 8 devices"),
    (["--config", "{folder}/config.toml", "--train.global_batch_size", "12"], "global_batch_size = 12"),
    (["--config", "{folder}/config.toml", "--init.from_checkpoint", "{folder}"], "is not a jaxgpt run"),
    (["--config", "{folder}/config.toml", "--eval.sample_prompt", "the cat sat on the mat and the hill"], "no room"),
    (["--config", "{folder}/config.toml", "--eval.sample_prompt", "ÄÖ"], "no token for 'Ä'"),
    (["--config", "{folder}/config.toml", "--workdir", "{folder}/text.txt"], "is a file, not a folder"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT, ids=[words for _, words in BAD_INPUT])
def test_bad_input_is_one_line_and_exit_2_and_nothing_is_written(folder, arguments, words, capsys, tmp_path):
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("too short")
    workdir = tmp_path / "run"
    arguments = [argument.format(folder=folder) for argument in arguments]
    if "--workdir" not in arguments:
        arguments += ["--workdir", str(workdir)]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert not workdir.exists()


def test_a_run_folder_of_another_config_names_what_differs(folder, finished, capsys):
    arguments = [
        "--config",
        str(folder / "config.toml"),
        "--workdir",
        str(finished),
        "--optimizer.learning_rate",
        "0.5",
    ]
    before = sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*"))
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert "optimizer.learning_rate was 0.01, now 0.5" in error
    assert sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*")) == before


def test_a_run_folder_whose_data_changed_is_refused_and_left_alone(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("one fish two fish red fish blue fish " * 50)
    arguments = ["--config", str(folder / "config.toml"), "--workdir", str(tmp_path / "run")]
    arguments += ["--data.path", str(text), "--eval.sample_tokens", "0"]
    assert train.main(arguments) == 0
    text.write_text("one fish two fish red fish blue fish. " * 50)
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert train.main(arguments) == 2
    assert "is not what the run in" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    moved = tmp_path / "moved.txt"  # the same text elsewhere is the same data
    moved.write_text("one fish two fish red fish blue fish " * 50)
    assert train.main([*arguments, "--data.path", str(moved)]) == 0


def test_weights_of_another_shape_or_vocabulary_are_refused(folder, finished, tmp_path):
    with pytest.raises(UserError, match="model.n_layer = 2, but this config has 3"):
        train.train(load(folder, init__from_checkpoint=finished, model__n_layer=3), tmp_path / "run")
    (folder / "other.txt").write_text("completely different letters: ÄÖÜ" * 100)
    with pytest.raises(UserError, match="another tokenizer"):
        train.train(load(folder, init__from_checkpoint=finished, data__path=folder / "other.txt"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["missing", "empty folder", "no checkpoint yet", "unfinished step"])
def test_a_folder_that_is_no_checkpoint_says_so(what, tmp_path, finished):
    if what == "missing":
        path, words = tmp_path / "nothing", "no such checkpoint"
    elif what == "empty folder":
        path, words = tmp_path, "is not a jaxgpt run"
    elif what == "no checkpoint yet":
        path, words = tmp_path, "no finished checkpoint yet"
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "checkpoints").mkdir()
    else:
        path, words = finished / "checkpoints" / "5", r"holds steps \[3, 6\]"
        os.makedirs(path, exist_ok=True)
    try:
        with pytest.raises(UserError, match=words if what != "unfinished step" else "finished checkpoint"):
            load_model(path)
    finally:
        if what == "unfinished step":
            path.rmdir()
