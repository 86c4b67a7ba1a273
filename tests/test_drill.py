"""The drill survives kills, and would not hide a run that differs."""

import json
import re
import shutil
from pathlib import Path

import pytest
from test_training_signals import CONFIG, ENVIRONMENT

import jaxgpt
from jaxgpt import drill
from jaxgpt.diagnosis import kill_drill
from jaxgpt.failpoints import POINTS, PREPARING


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drill")
    (folder / "text.txt").write_text("the cat sat on the mat " * 300)
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def report(folder) -> dict:
    """Five kills, one of them a SIGTERM, and one at each of three points; checkpoints every 4 of 12 steps."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setattr(
            kill_drill.Drill,
            "_plan",
            lambda self: iter(["", "save.renamed", "", "restore.done", "", "", "verify.damaged"]),
        )
        arguments = ["--config", str(folder / "config.toml"), "--workdir", str(folder / "runs"), "--seed", "3"]
        assert drill.main([*arguments, "--kills", "5", "--json", str(folder / "report.json")]) == 0
    return json.loads((folder / "report.json").read_text())


@pytest.mark.system
def test_a_run_killed_anywhere_ends_as_the_undisturbed_one(report):
    assert report["failures"] == []
    assert report["kills"] + report["terms"] >= 7
    assert report["at_points"] == {"save.renamed": 1, "restore.done": 1, "verify.damaged": 1}
    assert report["damaged"] == 1
    assert report["finished"] >= 1


@pytest.mark.system
def test_a_difference_in_the_record_or_the_state_is_told(folder, report):
    whole, other = folder / "runs" / "undisturbed", folder / "other"
    shutil.copytree(whole, other)
    assert kill_drill.compare_records(other, whole, exact=True) + kill_drill.compare_states(other, whole) == []
    metrics = other / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:3] + lines[4:]))
    assert "missing" in kill_drill.compare_records(other, whole, exact=True)[0]
    changed = json.loads(lines[3]) | {"batch_hash": 1}
    metrics.write_text("".join([*lines[:3], json.dumps(changed) + "\n", *lines[4:]]))
    assert "instead of" in kill_drill.compare_records(other, whole, exact=False)[0]
    shutil.rmtree(other / "checkpoints" / "12")
    shutil.copytree(whole / "checkpoints" / "8", other / "checkpoints" / "12")
    assert any("differs" in line for line in kill_drill.compare_states(other, whole))


def test_a_folder_that_holds_something_is_left_alone(folder, capsys):
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("")
    assert drill.main(["--config", str(folder / "config.toml"), "--workdir", str(folder / "mine")]) == 2
    assert "exists already; choose another name" in capsys.readouterr().err


def test_every_named_point_is_in_the_list_of_those_who_pass_it():
    package = Path(jaxgpt.__file__).parent
    used = {
        name for file in package.rglob("*.py") for name in re.findall(r'failpoint\("([a-z.]+)"\)', file.read_text())
    }
    assert used == {*POINTS, *PREPARING}
    # The drill waits for its kill: a point that a run with prepared data never passes would keep it waiting for ever.
    assert {name for name in used if name.startswith("prepare.")} == set(PREPARING)
