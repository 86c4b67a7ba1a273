"""Folders, disks, prepared data, the compile cache and the host's limits, with real file systems and real data."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from machines import case

from jaxgpt.config import Config
from jaxgpt.diagnosis import experiment, machine
from jaxgpt.diagnosis.finding import NOT_APPLICABLE, OK, PROBLEM, WARNING, Case
from jaxgpt.settings import DataConfig, ModelConfig, TokenizerConfig
from jaxgpt.storage.lease import Lease


def run_folder_on(mount: str, here: Case, before: str = "true") -> list[dict]:
    """What the probe finds where something is mounted on the run folder; skips the test where no user may mount."""
    folder = Path(here.workdir)
    folder.mkdir(exist_ok=True)
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount")
    probe = f"{sys.executable} -m jaxgpt.diagnosis.checkup experiment run_folder {time.monotonic() + 60}"
    script = f"mount {mount} {folder} && {{ {before}; {probe}; }}"
    command = ["unshare", "-Urm", "sh", "-c", script]
    done = subprocess.run(command, input=here.to_json(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.system
def test_a_read_only_run_folder_is_a_problem(tmp_path):
    finding, room = run_folder_on("-t tmpfs -o ro none", case(tmp_path))
    assert finding["status"] == PROBLEM and "Read-only file system" in finding["text"]
    assert "remount,rw" in finding["fix"] and "--workdir" in finding["fix"]
    assert room["status"] == NOT_APPLICABLE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_of_somebody_else_is_a_problem(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    finding, _ = experiment.run_folder(case(tmp_path))
    assert finding.status == PROBLEM and "chown" in finding.fix


@pytest.mark.system
def test_a_full_disk_is_a_problem_and_a_small_one_too(tmp_path):
    here, size = case(tmp_path, is_given=True), "-t tmpfs -o size=4m none"
    full, _ = run_folder_on(size, here, f"head -c 8000000 /dev/zero > {here.workdir}/filled 2> /dev/null")
    assert full["status"] == PROBLEM and "No space left" in full["text"] and "make room" in full["fix"]
    small, room = run_folder_on(size, here)
    assert small["status"] == WARNING and "gone after a reboot" in small["text"]
    assert room["status"] == PROBLEM and room["facts"]["free_bytes"] <= 4 << 20


def test_room_is_twelve_bytes_a_parameter_for_each_checkpoint_kept_and_one_more(tmp_path):
    model = ModelConfig(n_layer=1, n_head=1, n_embd=64, n_positions=64)
    config = dataclasses.replace(case(tmp_path).config, model=model, tokenizer=TokenizerConfig(type="char"))
    there = tmp_path / "run/checkpoints/10"
    there.mkdir(parents=True)
    (there / "file").write_bytes(b"x" * 1000)
    _, room = experiment.run_folder(case(tmp_path, config=config, is_given=True))
    parameters = 12 * 64 * 64 + 13 * 64 + (128 + 64) * 64 + 2 * 64
    assert room.status == OK
    assert room.facts["needed_bytes"] == (2 + 1 + 1) * 12 * parameters - 1000


def test_checkpoints_that_no_disk_could_hold_are_a_problem(tmp_path):
    model = ModelConfig(n_layer=10_000, n_head=1, n_embd=65_536)
    config = dataclasses.replace(case(tmp_path).config, model=model)
    _, room = experiment.run_folder(case(tmp_path, config=config, is_given=True))
    assert room.status == PROBLEM and "save_total_limit" in room.fix


def test_what_is_no_folder_is_a_problem_and_a_link_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name, word in [("file", "not a folder"), ("file/below", "not a folder"), ("broken", "broken symbolic link")]:
        finding, place = experiment.check_folder("run folder", str(tmp_path / name), "choose another")
        assert finding.status == PROBLEM and word in finding.text and place is None
    finding, _ = experiment.check_folder("run folder", str(tmp_path / "link"), "choose another")
    assert f"by a symbolic link to {tmp_path / 'real'}" in finding.text
    assert list((tmp_path / "real").iterdir()) == []


def test_a_folder_that_a_run_writes_to_now_is_named_with_the_run(tmp_path):
    (tmp_path / "run").mkdir()
    with Lease(tmp_path / "run"):
        finding, _ = experiment.run_folder(case(tmp_path))
        assert finding.status == WARNING and f"process {os.getpid()} (" in finding.text
    finding, _ = experiment.run_folder(case(tmp_path))
    assert "being written" not in finding.text


def test_a_bucket_has_to_be_mounted():
    finding, place = experiment.check_folder("run folder", "gs://bucket/runs/a", "")
    assert finding.status == PROBLEM and place is None
    assert "gcsfuse" in finding.fix and finding.fix.endswith("then give ~/bucket/runs/a")


# ---------------------------------------------------------------- data, cache, host


def test_prepared_data_is_found_and_damage_is_a_problem(tmp_path):
    from jaxgpt.preparation.make_dataset import prepare

    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    settings = DataConfig(source="text", path=str(tmp_path / "text.txt"), prepared_dir=str(tmp_path / "prepared"))
    config = Config(data=settings, tokenizer=TokenizerConfig(type="char"), model=ModelConfig(n_positions=32))
    here = case(tmp_path, config=config, is_given=True)
    [finding] = experiment.data(here)
    assert finding.status == OK and "not prepared yet" in finding.text
    path = prepare(config)
    [finding] = experiment.data(here)
    assert finding.status == OK and "training tokens" in finding.text
    next(path.glob("*train*array_record*")).write_bytes(b"")
    [finding] = experiment.data(here)
    assert finding.status == PROBLEM and "train" in finding.text
    (tmp_path / "text.txt").unlink()
    [finding] = experiment.data(here)
    assert finding.status == PROBLEM


def test_damaged_cache_entries_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "cache_folder", lambda: tmp_path / "cache")
    cache = tmp_path / "cache/x86"
    cache.mkdir(parents=True, mode=0o700)
    packed = zlib.compress(os.urandom(1000))
    (cache / "a-cache").write_bytes(packed)
    [finding] = experiment.compile_cache(case(tmp_path))
    assert finding.status == OK and finding.facts["entries"] == 1
    (cache / "b-cache").write_bytes(packed[:500])
    (cache / "c-cache").write_bytes(b"")
    [finding] = experiment.compile_cache(case(tmp_path))
    assert finding.status == WARNING and "2 damaged" in finding.text
    assert {Path(file).name for file in finding.facts["damaged"]} == {"b-cache", "c-cache"}


def test_a_cache_that_others_may_write_to_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    [finding] = experiment.compile_cache(case(tmp_path))
    assert finding.status == WARNING and finding.fix.startswith("chmod")


def test_few_open_files_are_a_warning(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        _, finding = machine.resources(case(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert finding.status == WARNING and "ulimit -n" in finding.fix


def test_the_memory_of_a_container_is_what_its_limit_leaves(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 67108864 kB\nMemAvailable: 60000000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("4000000000\n")
    (group / "memory.stat").write_text("anon 1000000000\ninactive_file 3000000000\n")
    for limit, status, free in [
        ("max", OK, 60000000 * 1024),
        ("5000000000", OK, 4 * 10**9),
        ("1500000000", WARNING, 5 * 10**8),
    ]:
        (group / "memory.max").write_text(f"{limit}\n")
        memory, _ = machine.resources(case(tmp_path, root=str(tmp_path)))
        assert (memory.status, memory.facts["free_bytes"]) == (status, free)
