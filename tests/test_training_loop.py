"""What the loop tells while it trains: traces of the steps asked for, and how long it waited for data."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import RUN

from jaxgpt import cli, train
from jaxgpt.config import Config, UserError
from jaxgpt.training.metrics import read_metrics

CONFIG = (
    RUN
    + """warmup_steps = 2
[train]
max_steps = 8
per_device_train_batch_size = 1
[eval]
eval_steps = 4
eval_batches = 1
sample_tokens = 0
[checkpoint]
save_steps = 4
[log]
logging_steps = 1
tensorboard = false
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], 2000)
    (folder / "text.txt").write_text(" ".join(words))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder


def load(folder: Path, **settings) -> Config:
    return cli.load_config(folder / "config.toml", {key.replace("__", "."): str(v) for key, v in settings.items()})


def traced_steps(workdir: Path) -> list[int]:
    """The numbers of the steps whose dispatch a trace holds, in order."""
    [file] = (workdir / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    events = [event for plane in data.planes for line in plane.lines for event in line.events if event.name == "train"]
    return sorted(dict(event.stats)["step_num"] for event in events)


@pytest.fixture(scope="module")
def profiled(folder) -> tuple[Path, str]:
    """A run of 8 steps with steps 3 to 5 traced, an evaluation and a checkpoint among them; and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train.train(load(folder, log__profile="3:5"), folder / "profiled")
    return folder / "profiled", out.getvalue()


def test_a_trace_holds_exactly_the_steps_asked_for_and_one_line_says_where_it_is(profiled):
    workdir, printed = profiled
    assert traced_steps(workdir) == [3, 4, 5]
    [line] = [line for line in printed.splitlines() if "trace" in line]
    assert str(workdir / "profile") in line and "xprof --logdir" in line and "steps 3 to 5" in line


def test_a_run_that_is_past_the_traced_steps_traces_nothing_and_computes_the_same(folder, profiled, capsys):
    workdir = folder / "resumed"
    shutil.copytree(profiled[0], workdir, ignore=shutil.ignore_patterns("profile", "8"))
    train.train(load(folder, log__profile="3:5"), workdir)  # from step 4
    assert not (workdir / "profile").exists()
    assert "trace of" not in capsys.readouterr().out
    traced, plain = (
        {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line} for run in (profiled[0], workdir)
    )
    assert len(plain) == 8
    assert plain == traced  # step 5 was traced in one and not in the other


@pytest.mark.parametrize(
    ("steps", "words"),
    [("5:3", "ends before it begins"), ("7:9", "beyond the last step, train.max_steps = 8"), ("3", "log.profile")],
)
def test_steps_that_cannot_be_traced_are_refused_at_the_start(folder, steps, words, tmp_path, capsys):
    command = ["--config", str(folder / "config.toml"), "--workdir", str(tmp_path / "run"), "--log.profile", steps]
    assert train.main(command) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert words in error
    assert not (tmp_path / "run").exists()


def test_steps_beyond_an_end_that_epochs_decide_are_refused_before_anything_is_written(folder, tmp_path):
    config = load(folder, train__max_steps="none", train__num_train_epochs="0.1", log__profile="1000:1001")
    with pytest.raises(UserError, match="beyond the last step"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_line_says_what_share_of_the_time_data_took(profiled):
    workdir, printed = profiled
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    shown = re.findall(r"\| data (\d+\.\d)% \|", printed)
    expected = [f"{100 * line['seconds_data'] / line['seconds_total']:.1f}" for line in lines]
    assert shown == expected
    assert len(shown) == 8
