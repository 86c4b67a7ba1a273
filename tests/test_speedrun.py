"""`speedrun` from nothing to a chat model: real processes, killed at any moment, and what is refused at once."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxgpt import speedrun
from jaxgpt.config import load_config
from jaxgpt.training.metrics import read_metrics

KILLS = int(os.environ.get("JAXGPT_KILLS", 3))
STAGES = ("measure", "prepare", "pretrain", "chat", "score")


def begin(folder: Path) -> subprocess.Popen:
    # So many tokens, however long it takes: no step depends on a measurement. Two minutes suggest the smallest size.
    command = [sys.executable, "-m", "jaxgpt.speedrun", "--minutes", "2", "--tokens", "20480", "--workdir", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder: Path) -> str:
    process = begin(folder)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0, said
    return said


@pytest.mark.system
def test_killed_at_any_moment_it_ends_with_the_same_weights(tmp_path):
    start = time.monotonic()
    said = finish(tmp_path / "undisturbed")
    seconds, draw = time.monotonic() - start, random.Random(5)
    for line in (
        "=== measure",
        "=== prepare",
        "=== pretrain",
        "=== chat",
        "=== score",
        "page     python -m jaxgpt.serve",
    ):
        assert line in said
    for _ in range(KILLS):  # each attempt goes on where the one before was
        process = begin(tmp_path / "killed")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=draw.uniform(0.15, 0.5) * seconds)
        process.kill()
        process.communicate()
    finish(tmp_path / "killed")

    read = {name: json.loads((tmp_path / name / "speedrun.json").read_text()) for name in ("undisturbed", "killed")}
    for state in read.values():
        assert list(state["done"]) == list(STAGES)
    assert read["undisturbed"]["size"] == read["killed"]["size"]
    assert read["killed"]["spent"] > 0.3 * seconds
    for run in ("pretrain", "chat"):
        one, other = (tmp_path / name / run for name in ("undisturbed", "killed"))
        assert load_config(one.with_suffix(".toml")).train == load_config(other.with_suffix(".toml")).train
        weights = [(folder / "hf" / "model.safetensors").read_bytes() for folder in (one, other)]
        assert weights[0] == weights[1]
        losses = [[each.get("eval_loss") for each in read_metrics(folder)] for folder in (one, other)]
        assert losses[0] == losses[1]
    assert "skills" in (tmp_path / "killed" / "chat" / "report.html").read_text(encoding="utf-8").lower()

    # What is done is not done again, and another speedrun does not take its place.
    assert "=== " not in finish(tmp_path / "killed")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "1"], "--minutes 1: at least 2, as compiling and preparing take one"),
        (["--minutes", "10", "--hours", "1"], "not allowed with argument"),
        (["--minutes", "ten"], "invalid float value"),
        (["--data", "builtin"], "one of the arguments --minutes --hours is required"),
        (["--minutes", "5", "--data", "novels"], "no such file or folder, and no set of that name"),
        (["--minutes", "5", "--tokens", "0"], "--tokens 0: at least 1"),
        (["--minutes", "nan"], "--minutes nan: at least 2"),
        (["--minutes", "5", "--tpu", "v99-8"], "--tpu v99-8: no such slice"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert speedrun.main(arguments) == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_another_speedrun_does_not_take_its_place(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    asked = {"minutes": 5.0, "tokens": None, "data": "builtin", "chat": None, "seed": 1}
    (folder / "speedrun.json").write_text(json.dumps({"asked": asked, "spent": 3.0, "began": 0.0, "done": {}}))
    assert speedrun.main(["--minutes", "7", "--workdir", str(folder)]) == 2
    assert "holds a speedrun with minutes = 5.0, not 7.0" in capsys.readouterr().err
    (folder / "speedrun.json").write_text("{")
    assert speedrun.main(["--minutes", "7", "--workdir", str(folder)]) == 2
    assert "not what a speedrun wrote" in capsys.readouterr().err
