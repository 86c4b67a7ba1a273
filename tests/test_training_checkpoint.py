"""Checkpoints: complete or not there, verified before use, and what storage that fails does to them."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import CONFIG, batch, program

from jaxgpt import train
from jaxgpt.config import Config, to_json
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import RunFailed, StorageFailed, UserError
from jaxgpt.model.huggingface import open_model
from jaxgpt.settings import CheckpointConfig, FaultsConfig, MeshConfig
from jaxgpt.storage import manifest
from jaxgpt.training import checkpoint, models, recovery
from jaxgpt.training.checkpoint import (
    FOLDER,
    METADATA,
    SAVING,
    Checkpoints,
    best_step,
    find_step,
    finished_steps,
    has_saved,
    read_config,
    step_to_use,
)
from jaxgpt.training.models import load_model, write_settings
from jaxgpt.training.recovery import QUARANTINE, clean_leftovers, damage, newest_whole_step, read_faults
from jaxgpt.training.resume import check_workdir


@pytest.fixture(scope="module")
def compiled():
    return program()


@pytest.fixture(scope="module")
def saved(compiled, tmp_path_factory) -> Path:
    """A run folder with the checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("saved") / "run"
    checkpoints, state = Checkpoints(run, CheckpointConfig()), compiled.init()
    for step in (1, 2):
        state, _ = compiled.train_step(state, batch(step))
        checkpoints.save(step, state, {"vocab_size": 65}, float(step), surely=True)
    checkpoints.close()
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def files(run: Path, step: int) -> list[Path]:
    folder = run / FOLDER / str(step)
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def bits(state) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


# ---------------------------------------------------------------- damage


def test_a_checkpoint_that_nothing_happened_to_is_whole(run):
    assert damage(run, 2) == []
    assert newest_whole_step(run) == 2


@pytest.mark.parametrize("what", ["truncate", "flip", "delete", "empty"])
def test_damage_to_any_file_is_found_the_checkpoint_moved_and_the_one_before_it_used(run, saved, what, capsys):
    for file in files(run, 2):
        path = run / FOLDER / "2" / file
        whole = path.read_bytes()
        if what in ("truncate", "flip", "empty") and not whole:
            continue  # an empty file has nothing to lose
        if what == "delete":
            path.unlink()
        elif what == "flip":
            middle = len(whole) // 2
            path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        else:
            path.write_bytes(b"" if what == "empty" else whole[:-1])
        assert newest_whole_step(run) == 1, file
        said = capsys.readouterr().out
        assert "damaged  checkpoint 2" in said and str(run / QUARANTINE / "2") in said
        assert read_faults(run)[-1]["what"] == "damaged checkpoint"
        shutil.rmtree(run / QUARANTINE)
        shutil.copytree(saved / FOLDER / "2", run / FOLDER / "2")


def test_files_swapped_between_checkpoints_are_found(run):
    here, there = run / FOLDER / "2", run / FOLDER / "1"
    for file in (METADATA, manifest.NAME):
        mine, other = (here / file).read_bytes(), (there / file).read_bytes()
        (here / file).write_bytes(other)
        assert damage(run, 2), file
        (here / file).write_bytes(mine)
    assert damage(run, 2) == []


def test_a_whole_checkpoint_under_another_steps_name_is_found(run):
    shutil.rmtree(run / FOLDER / "2")
    shutil.copytree(run / FOLDER / "1", run / FOLDER / "2")
    assert damage(run, 2) == ["holds step 1, not 2"]


def test_a_file_that_nobody_wrote_is_found(run):
    (run / FOLDER / "2" / "params" / "d" / "0123").write_bytes(b"")
    assert damage(run, 2) == ["params/d/0123: not listed (extra)"]


def flips(run: Path, number: int, seed: int):
    """Flip one random bit of the arrays' files after another, the one before being undone."""
    rng = np.random.default_rng(seed)
    payload = [path for path in files(run, 2) if "d" in path.parts]
    for _ in range(number):
        path = run / FOLDER / "2" / payload[rng.integers(len(payload))]
        whole = path.read_bytes()
        content = bytearray(whole)
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        yield path
        path.write_bytes(whole)


def test_every_flipped_bit_of_the_arrays_is_found(run):
    found = [bool(damage(run, 2)) for _ in flips(run, 40, seed=0)]
    assert all(found) and len(found) == 40


@pytest.mark.chaos
def test_200_flipped_bits_are_found_and_orbax_alone_loads_some_of_them(run, compiled, capsys):
    silent = loud = 0
    checkpoints = Checkpoints(run, CheckpointConfig())
    whole = bits(checkpoints.restore(2, compiled.abstract_state))
    for _ in flips(run, 200, seed=1):
        assert damage(run, 2)
        try:
            silent += bits(checkpoints.restore(2, compiled.abstract_state)) != whole
        except (ValueError, OSError, RuntimeError):
            loud += 1
    checkpoints.close()
    with capsys.disabled():
        print(f"\n200 bits flipped: all found here; Orbax alone loaded {silent} changed, refused {loud}")
    assert silent > 0  # else the digests would be superfluous


def test_a_run_with_only_damaged_checkpoints_is_not_begun_anew_over_them(run):
    for step in (1, 2):
        (run / FOLDER / str(step) / manifest.NAME).unlink()
    with pytest.raises(RunFailed, match="no whole checkpoint left"):
        newest_whole_step(run)
    assert sorted(path.name for path in (run / QUARANTINE).iterdir()) == ["1", "2"]
    with pytest.raises(RunFailed, match="no whole checkpoint left"):
        newest_whole_step(run)


def test_a_sampler_refuses_damaged_weights_and_does_not_read_the_moments(run):
    (run / "config.json").write_text("{}")
    optimizer = next(path for path in files(run, 2) if path.parts[0] == "optimizer")
    (run / FOLDER / "2" / optimizer).write_bytes(b"other")
    recovery.check_weights(run, 2)
    weights = next(path for path in files(run, 2) if path.parts[:2] == ("params", "d"))
    (run / FOLDER / "2" / weights).write_bytes(b"other")
    with pytest.raises(UserError, match="is damaged: params/d/"):
        load_model(run)


def flip_a_bit(file: Path, rng: np.random.Generator) -> bytes:
    """Flip one; returns what the file held."""
    content = file.read_bytes()
    changed = bytearray(content)
    changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(changed)
    return content


@pytest.mark.parametrize("what", ["hf", "tokenizer", "config.json"])
def test_flipped_bits_are_found_before_anything_is_used(trained_copy, what, monkeypatch):
    monkeypatch.setattr(models, "_restore", lambda *_: pytest.fail("it was used"))
    monkeypatch.setattr(models.huggingface, "read_params", lambda *_: pytest.fail("it was used"))
    place, rng = trained_copy.run / what, np.random.default_rng(0)
    found = sorted(place.iterdir()) if place.is_dir() else [place]
    for number in range(20):
        file = found[number % len(found)]
        content = flip_a_bit(file, rng)
        with pytest.raises(UserError, match="is damaged|config.json"):
            load_model(place if what == "hf" else trained_copy.run)
        if what != "config.json":  # as tokenizer.path, and as the weights to start from
            with pytest.raises(UserError, match="is damaged"):
                (open_model if file.suffix == ".safetensors" else load_tokenizer)(place)
        file.write_bytes(content)


@pytest.mark.parametrize("name", [manifest.NAME, METADATA])
def test_flipped_bits_in_what_describes_a_checkpoint_are_found(run, name):
    rng, file = np.random.default_rng(0), run / FOLDER / "2" / name
    for _ in range(20):
        content = flip_a_bit(file, rng)
        assert damage(run, 2)
        file.write_bytes(content)


def test_a_folder_without_digests_and_added_files_are_somebody_elses(trained_copy, capsys):
    hf = trained_copy.run / "hf"
    (hf / "README.md").write_text("mine")
    assert load_model(hf).step == 0
    (hf / manifest.NAME).unlink()
    (hf / "generation_config.json").write_text("{}")
    assert load_model(hf).step == 0
    file = trained_copy.run / "config.json"
    settings = json.loads(file.read_text())
    del settings["sha256"]  # a run of an older version, or changed on purpose
    file.write_text(json.dumps(settings))
    flip_a_bit(trained_copy.run / "tokenizer" / "tokenizer_config.json", np.random.default_rng(0))
    write_settings(trained_copy.run, read_config(trained_copy.run), load_tokenizer(hf))  # as a start does
    assert re.search("damaged .*tokenizer: tokenizer_config.json: .*written again", capsys.readouterr().out)
    assert load_model(trained_copy.run).step == 6


def test_a_finished_run_whose_checkpoints_are_gone_does_not_begin_anew(trained_copy, capsys):
    shutil.rmtree(trained_copy.run / FOLDER)
    before = sorted(trained_copy.run.rglob("*"))
    for remove in ("summary.json", "hf", "metrics.jsonl"):  # each says that it had some
        assert train.main(trained_copy.arguments) == 2
        assert "holds no checkpoint any more" in capsys.readouterr().err
        if remove == "summary.json":
            assert sorted(trained_copy.run.rglob("*")) == before
            (trained_copy.run / remove).unlink()
        elif remove == "hf":
            shutil.rmtree(trained_copy.run / remove)


@pytest.mark.parametrize(
    ("summary", "steps", "refused"),
    [
        ({"first_checkpoint": 1}, 1, True),  # killed
        ({"first_checkpoint": None}, 9, False),  # no save has succeeded
        ({"status": "failed", "checkpoint": None}, 9, False),
        ({"status": "interrupted", "checkpoint": 1}, 1, True),
        (None, 2, True),  # of an older version
        (None, 1, False),
        (None, 0, False),
    ],
)
def test_a_run_without_checkpoints_begins_anew_only_if_it_never_had_one(tmp_path, summary, steps, refused):
    config = Config(checkpoint=CheckpointConfig(save_steps=1, keep_best=False))
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step + 1}}}\n' for step in range(steps)))
    if summary:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    if not refused:
        assert check_workdir(config, tmp_path) == {}
        return
    for folder in ("", FOLDER, QUARANTINE):  # empty ones
        (tmp_path / folder).mkdir(exist_ok=True)
        with pytest.raises(UserError, match="holds no checkpoint any more"):
            check_workdir(config, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="holds files of a run but no config.json"):
        check_workdir(config, tmp_path)


def test_a_save_keeps_on_record_whether_the_run_has_a_checkpoint(run, tmp_path, compiled, monkeypatch):
    found, checkpoints = [], Checkpoints(tmp_path / "new", CheckpointConfig())
    monkeypatch.setattr(checkpoint, "failpoint", lambda name: found.append((name, has_saved(tmp_path / "new"))))
    for step in (1, 2):
        checkpoints.save(step, compiled.init(), {}, None, surely=True)
    checkpoints.close()
    points = ["save.begin", "save.started", "save.arrays", "save.metadata", "save.manifest", "save.renamed"]
    assert found == [*zip(points, [None, *[False] * 5], strict=True), *zip(points, [True] * 6, strict=True)]
    assert json.loads((tmp_path / "new" / "summary.json").read_text()) == {"first_checkpoint": 1}
    (run / "summary.json").write_text(whole := json.dumps({"status": "interrupted", "checkpoint": 2}))
    checkpoints = Checkpoints(run, CheckpointConfig())
    checkpoints.save(3, compiled.init(), {}, None, surely=True)
    checkpoints.close()
    assert (run / "summary.json").read_text() == whole


# ---------------------------------------------------------------- leftovers


def test_leftovers_of_a_killed_process_are_removed_and_a_checkpoint_without_its_name_gets_it(run):
    (run / FOLDER / "2").rename(run / FOLDER / f"{SAVING}2")
    (run / FOLDER / f"{SAVING}3" / "params").mkdir(parents=True)
    (run / FOLDER / f"{SAVING}4.orbax-checkpoint-tmp").mkdir()
    (run / FOLDER / ".deleting-1").mkdir()
    (run / "metrics.jsonl.tmp").write_text("")
    clean_leftovers(run)
    assert sorted(path.name for path in (run / FOLDER).iterdir()) == ["1", "2"]
    assert not list(run.glob("*.tmp"))
    assert damage(run, 2) == []


def test_what_is_not_ours_in_a_run_folder_is_neither_read_nor_deleted(run):
    theirs = [
        run / "x.tmp",
        run / FOLDER / "²",
        run / FOLDER / "007",
        run / FOLDER / "٣",
        run / FOLDER / ".saving-notes",
    ]
    theirs += [run / FOLDER / f"{SAVING}²", run / FOLDER / "-1"]
    for folder in theirs:
        folder.mkdir()
        (folder / manifest.NAME).touch()
    (run / "my notes.tmp").write_text("mine")
    (run / FOLDER / "9").write_text("a file")
    clean_leftovers(run)
    assert all((folder / manifest.NAME).is_file() for folder in theirs) and (run / "my notes.tmp").is_file()
    assert finished_steps(run) == [1, 2] and newest_whole_step(run) == 2
    (run / "config.json").write_text("{}")
    for name in ("²", "007", "٣"):
        with pytest.raises(UserError, match="is not a finished checkpoint"):
            find_step(run / FOLDER / name)


@pytest.mark.parametrize(
    "odd", ["[1]", "5", "null", '{"what"', '{"what": 3}', '{"what": "crash"}', '{"step": "6"}', "²"]
)
def test_odd_lines_in_the_record_of_faults_are_left_out(run, odd):
    for _ in range(2):
        recovery.record_fault(run, what="crash", step=6, identity="i")
        with open(run / recovery.FAULTS_FILE, "a", encoding="utf-8") as file:
            file.write(odd.replace("{", '{"identity": "i", ') + "\n")
    assert recovery.break_crash_loop(run, 2, "i") == 2
    recovery.record_fault(run, what="crash", step=6, identity="i")
    assert recovery.break_crash_loop(run, 2, "i") == 1


def test_an_older_checkpoint_goes_only_after_the_new_one_is_there(run, compiled, monkeypatch):
    present = []

    def look(name):
        if name in ("save.manifest", "save.renamed", "delete.renamed"):
            present.append((name, finished_steps(run)))

    monkeypatch.setattr(checkpoint, "failpoint", look)
    checkpoints = Checkpoints(run, CheckpointConfig(save_total_limit=1, keep_best=False))
    checkpoints.save(3, compiled.init(), {}, None, surely=True)
    checkpoints.close()
    assert present[:2] == [("save.manifest", [1, 2]), ("save.renamed", [1, 2, 3])]
    assert finished_steps(run) == [3]


def test_the_best_checkpoint_has_a_name(run, compiled):
    (run / "config.json").write_text("{}")
    best = Path(f"{run}@best")
    assert find_step(best) == (run, 1)  # the losses were 1.0 and 2.0
    assert find_step(run) == (run, 2)
    checkpoints = Checkpoints(run, CheckpointConfig(keep_best=False, save_total_limit=1))
    checkpoints.save(3, compiled.init(), {}, None, surely=True)
    checkpoints.close()
    with pytest.raises(UserError, match="no checkpoint of .*run was evaluated"):
        find_step(best)
    with pytest.raises(UserError, match="runs/x: no such checkpoint"):
        find_step(Path("runs/x@best"))


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([2.0, math.nan], 1),
        ([math.nan, 2.0, 3.0], 2),
        ([math.nan], None),
        ([math.inf, math.nan], None),
        ([0.0, 1.0], 1),
    ],
)
def test_a_loss_that_is_no_number_is_never_the_best(tmp_path, losses, best):
    for step, loss in enumerate(losses, 1):
        folder = tmp_path / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        (folder / "manifest.sha256").touch()
        (folder / "metadata.json").write_text(json.dumps({"step": step, "eval_loss": loss, "why_best": "it overfits"}))
    assert best_step(tmp_path) == best
    assert step_to_use(tmp_path) == (best or len(losses), "it overfits")


def test_a_step_saved_again_takes_the_place_of_the_older_one(run, compiled):
    checkpoints = Checkpoints(run, CheckpointConfig())
    checkpoints.save(2, compiled.init(), {"vocab_size": 66}, 0.5, surely=True)
    assert checkpoints.metadata(2)["vocab_size"] == 66
    assert damage(run, 2) == []
    assert checkpoints.best_step() == 2
    checkpoints.close()


# ---------------------------------------------------------------- storage that fails


@pytest.mark.parametrize("point", ["save.begin", "save.arrays", "save.metadata", "save.manifest"])
def test_a_save_that_fails_once_is_tried_again(run, compiled, monkeypatch, point, capsys):
    monkeypatch.setattr(checkpoint, "RETRY_AFTER", (0.01, 0.01, 0.01))
    failures = iter([True, True])

    def full(name):
        if name == point and next(failures, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "failpoint", full)
    checkpoints = Checkpoints(run, CheckpointConfig())
    checkpoints.save(3, compiled.init(), {}, None, surely=True)
    checkpoints.close()
    assert finished_steps(run) == [1, 2, 3]
    assert capsys.readouterr().out.count("No space left on device") == 2


def test_storage_that_keeps_failing_ends_the_run_and_leaves_the_checkpoints(run, compiled, monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_AFTER", (0.01, 0.01, 0.01))

    def full(name):
        if name == "save.manifest":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "failpoint", full)
    checkpoints = Checkpoints(run, CheckpointConfig())
    with pytest.raises(StorageFailed, match=r"Input/output error.*tried 4 times; steps \[1, 2\] are as they were"):
        checkpoints.save(3, compiled.init(), {}, None, surely=True)
    checkpoints.close()
    assert newest_whole_step(run) == 2


def test_a_background_save_that_fails_is_noticed_at_the_next_step(run, compiled, monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_AFTER", (0.05,))
    failures = iter([True])

    def full(name):
        if name == "save.arrays" and next(failures, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "failpoint", full)
    checkpoints, state = Checkpoints(run, CheckpointConfig()), compiled.init()
    checkpoints.save(3, state, {}, None)
    polled = 0
    while not checkpoints.poll():
        polled += 1
    assert polled > 0  # it does not wait, and does not say yes before it is time
    checkpoints.save(4, state, {}, None, surely=True)
    checkpoints.close()
    assert finished_steps(run) == [1, 2, 4]


# ---------------------------------------------------------------- contents


def test_what_is_restored_is_what_was_saved_to_the_last_bit(compiled, tmp_path):
    checkpoints, state = Checkpoints(tmp_path, CheckpointConfig()), compiled.init()
    for step in range(3):
        state, _ = compiled.train_step(state, batch(step))
    checkpoints.save(3, state, {}, None, surely=True)
    assert bits(checkpoints.restore(3, compiled.abstract_state)) == bits(state)
    checkpoints.close()


def test_a_rule_for_spikes_may_come_and_go_in_the_course_of_a_run(tmp_path):
    plain, ruled = (program(dataclasses.replace(CONFIG, faults=FaultsConfig(spike_sigma=sigma))) for sigma in (0, 6))
    checkpoints, state = Checkpoints(tmp_path, CheckpointConfig()), plain.init()
    state, _ = plain.train_step(state, batch(0))
    checkpoints.save(1, state, {}, None, surely=True)
    with_window = checkpoints.restore(1, ruled.abstract_state)
    assert int(with_window.recent["count"]) == 0
    with_window, _ = ruled.train_step(with_window, batch(1))
    checkpoints.save(2, with_window, {}, None, surely=True)
    assert bits(checkpoints.restore(2, ruled.abstract_state)) == bits(with_window)
    without = checkpoints.restore(2, plain.abstract_state)
    assert without.recent == {} and bits(without.params) == bits(with_window.params)
    checkpoints.close()


MESHES = [MeshConfig(data=1), MeshConfig(data=2), MeshConfig(data=4), MeshConfig(data=8),
          MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=4)]  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_state_is_restored_on_any_mesh_to_the_last_bit(saved, compiled, mesh):
    checkpoints = Checkpoints(saved, CheckpointConfig())
    there = checkpoints.restore(2, program(mesh=mesh).abstract_state)
    assert bits(there) == bits(checkpoints.restore(2, compiled.abstract_state))
    assert len(jax.tree.leaves(there.params)[0].devices()) == mesh.data * mesh.fsdp * mesh.tensor
    checkpoints.close()
