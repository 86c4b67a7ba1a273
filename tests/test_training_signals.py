"""Being told to stop anywhere, a data reader that hangs, a full disk, two writers: real processes, real signals."""

import contextlib
import io
import json
import os
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
from jaxgpt.config import load_config
from jaxgpt.errors import RunFailed
from jaxgpt.storage import manifest
from jaxgpt.training.checkpoint import finished_steps
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.recovery import read_faults

CONFIG = (
    RUN
    + """warmup_steps = 2
[train]
max_steps = 12
per_device_train_batch_size = 2
compilation_cache_dir = "{folder}/programs"
[eval]
eval_steps = 4
eval_batches = 4
sample_tokens = 0
[checkpoint]
save_steps = 4
[log]
logging_steps = 1
tensorboard = false
"""
)
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], 2000)
    (folder / "text.txt").write_text(" ".join(words))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder


def start(folder: Path, workdir: Path, *options: str, failpoint: str = "", prefix=()) -> subprocess.Popen:
    command = [*prefix, sys.executable, "-m", "jaxgpt.train", "--config", str(folder / "config.toml")]
    environment = {**os.environ, **ENVIRONMENT, "JAXGPT_FAILPOINT": failpoint}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    return subprocess.Popen([*command, "--workdir", str(workdir), *options], **pipes)


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def wait_for_a_step(process: subprocess.Popen, workdir: Path) -> None:
    """Until the run has done its first steps, and waits where its failpoint keeps it."""
    while process.poll() is None and not ((workdir / "metrics.jsonl").exists() and read_metrics(workdir)):
        time.sleep(0.1)
    time.sleep(1.0)


def record(workdir: Path) -> list[dict]:
    """The lines of the run's record, without what the clock decides."""
    timed = ("tokens_per_second", "mfu")
    return [
        {key: value for key, value in line.items() if key not in timed and not key.startswith("seconds_")}
        for line in read_metrics(workdir)
    ]


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    code, output = finish(start(folder, folder / "undisturbed"))
    assert code == 0, output
    return folder / "undisturbed"


# ---------------------------------------------------------------- SIGTERM, wherever the run is


# the twelve-step run evaluates 4 batches at steps 4, 8 and 12: 6 is in the middle, 10 in the last evaluation
POINTS = ["lease.taken:term", "data.read:term@11", "evaluate:term@6", "evaluate:term@10", "save.arrays:term"]
# Not delete.renamed: twelve steps are done before a checkpoint is deleted, and the run is finished then.
MORE_POINTS = ["restore.done:term", "save.begin:term", "save.manifest:term", "save.renamed:term"]


@pytest.mark.parametrize("point", [*POINTS, *(pytest.param(point, marks=pytest.mark.chaos) for point in MORE_POINTS)])
def test_sigterm_anywhere_exits_with_42_and_the_run_ends_as_if_nothing_had_happened(folder, undisturbed, point):
    workdir = folder / point.replace(":", "-")
    if point.startswith("restore"):  # there has to be something to restore
        assert finish(start(folder, workdir, failpoint="save.renamed:kill"))[0] == -signal.SIGKILL
    code, output = finish(start(folder, workdir, failpoint=point))
    assert code == 42, output
    assert "run the same command again" in output
    if not point.startswith(("lease", "restore")):
        assert max(line["step"] for line in read_metrics(workdir)) in finished_steps(workdir)  # nothing is lost
    code, output = finish(start(folder, workdir))
    assert code == 0, output
    assert record(workdir) == record(undisturbed)
    for file in (undisturbed / "hf").iterdir():
        assert (workdir / "hf" / file.name).read_bytes() == file.read_bytes()


def test_sigterm_while_the_first_step_compiles_ends_the_process_at_once(folder):
    # 64 layers at level 3 compile for a minute
    slow = ["--model.n_layer", "64", "--train.max_steps", "4", "--eval.eval_steps", "4"]
    environment = {**os.environ, **ENVIRONMENT, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, "-m", "jaxgpt.train", "--config", str(folder / "config.toml")]
    command += ["--workdir", str(folder / "compiles"), *slow]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("run "):
            break
    time.sleep(2.0)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 42, output
    assert time.monotonic() - sent < 10
    assert not finished_steps(folder / "compiles")


def test_a_data_reader_that_hangs_is_no_hindrance_to_sigterm(folder, undisturbed):
    workdir = folder / "stalled"
    process = start(folder, workdir, failpoint="data.read:hang@11")
    wait_for_a_step(process, workdir)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, 30)
    assert code == 42, output
    done = max(line["step"] for line in read_metrics(workdir))
    assert 1 <= done < 12 and done in finished_steps(workdir)
    assert finish(start(folder, workdir))[0] == 0
    assert record(workdir) == record(undisturbed)


def test_sigterm_in_a_save_is_not_forgotten_where_the_next_batch_never_comes(folder):
    workdir = folder / "saving"
    # The loop asks two batches ahead: without the seventh, step 5 waits for ever.
    points = "save.begin:term,data.read:hang@7"
    process = start(folder, workdir, "--data.num_threads", "1", failpoint=points)
    code, output = finish(process, 60)
    assert code == 42, output
    assert "SIGTERM at step 4" in output and finished_steps(workdir) == [4]


def test_a_data_reader_that_hangs_ends_the_run_with_75_and_the_stacks_of_all_threads(folder):
    workdir = folder / "hung"
    code, output = finish(start(folder, workdir, "--faults.hang_seconds", "2", failpoint="data.read:hang@11"), 60)
    assert code == 75, output
    assert "no progress for" in output and "in data" in output
    [fault] = read_faults(workdir)
    assert fault["what"].endswith("in data") and fault["host"] and fault["step"] > 1
    stacks = (workdir / "stacks-0.txt").read_text()
    assert "_wait_for_data" in stacks and "failpoint" in stacks  # who waits, and for whom


def test_a_second_signal_exits_at_once(folder):
    workdir = folder / "twice"
    process = start(folder, workdir, "--train.max_steps", "100000", failpoint="save.begin:hang")
    wait_for_a_step(process, workdir)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert finish(process, 20)[0] == 128 + signal.SIGTERM


# ---------------------------------------------------------------- storage


def in_a_small_disk(folder: Path, size: str, script: str) -> subprocess.CompletedProcess:
    """Run a shell script with $DISK, a file system of its own of that size."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    command = f"mount -t tmpfs -o size={size} tmpfs {disk} && export DISK={disk} && {script}"
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(["unshare", "-Urm", "sh", "-c", command], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def can_mount(tmp_path_factory) -> None:
    if in_a_small_disk(tmp_path_factory.mktemp("mount"), "1m", "true").returncode:
        pytest.skip("this machine lets no user mount a tmpfs (unshare -Urm)")


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_full_or_read_only_disk_exits_with_74_and_leaves_whole_checkpoints(folder, can_mount, what):
    train_it = f"{sys.executable} -m jaxgpt.train --config {folder}/config.toml --workdir $DISK/run"
    check = "cd $DISK/run/checkpoints/4 && sha256sum --quiet --check manifest.sha256 && echo whole"
    longer = "--optimizer.lr_scheduler_type constant"
    if what == "full":  # room for the first checkpoint, not for the second
        spoil = "head -c $(($(df --output=avail -k $DISK | tail -1) - 200))k /dev/zero > $DISK/filler"
    else:
        spoil = "mount -o remount,ro $DISK"
    script = f"{train_it} {longer} --train.max_steps 4 && {spoil}; {train_it} {longer}; echo code $?; {check}"
    result = in_a_small_disk(folder, "20m", script)
    assert "code 74" in result.stdout, result.stdout + result.stderr
    assert result.stdout.rstrip().endswith("whole")
    [line] = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert ("No space left" in line) or ("Read-only" in line)


# ---------------------------------------------------------------- two writers, and crashes


def test_a_second_writer_refuses_in_a_moment_and_a_dead_owners_place_is_taken(folder):
    workdir = folder / "twofold"
    first = start(folder, workdir, failpoint="data.read:hang@11")
    wait_for_a_step(first, workdir)
    code, output = finish(start(folder, workdir))
    assert code == 2, output
    assert f"is being written by process {first.pid} on" in output
    first.kill()
    first.wait()
    code, output = finish(start(folder, workdir))
    assert code == 0, output
    assert f"process {first.pid} on" in output and "taken over" in output


def test_three_crashes_at_one_step_go_one_checkpoint_back_and_three_more_end_it(folder, monkeypatch):
    config = load_config(folder / "config.toml", {"mesh.data": "1"} if jax.device_count() == 1 else {})
    workdir, said = folder / "loop", io.StringIO()

    def crash_at(step):
        from jaxgpt.training.loop import Meter

        whole = Meter.read

        def read(self, now, metrics):
            if now == step:
                raise RuntimeError("a bug")
            whole(self, now, metrics)

        monkeypatch.setattr(Meter, "read", read)

    crash_at(10)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="a bug"):
            train.train(config, workdir)
    assert [fault["step"] for fault in read_faults(workdir)] == [read_faults(workdir)[0]["step"]] * 3
    for _ in range(3):
        with contextlib.redirect_stdout(said), pytest.raises(RuntimeError, match="a bug"):
            train.train(config, workdir)
    assert "going one checkpoint back, to step 4" in said.getvalue()
    assert (workdir / "quarantine" / "8" / manifest.NAME).is_file()
    with pytest.raises(RunFailed, match="also from one checkpoint earlier.*not tried again"):
        train.train(config, workdir)
    monkeypatch.undo()
    (workdir / "faults.jsonl").unlink()  # what the message says
    train.train(config, workdir)
    assert json.loads((workdir / "summary.json").read_text())["status"] == "finished"


# ---------------------------------------------------------------- bad steps


@pytest.fixture
def bad_data(monkeypatch):
    """The batch at position 6 of the data, that of step 7, makes the loss a NaN."""
    from jaxgpt.data import pipeline

    whole = pipeline.train_rows

    def train_rows(stream, *, step, **how):
        batch = whole(stream, step=step, **how)
        return batch._replace(weights_BT=batch.weights_BT * np.float32("nan")) if step == 6 else batch

    monkeypatch.setattr(pipeline, "train_rows", train_rows)


def hashes(workdir: Path) -> list[int]:
    return [line["batch_hash"] for line in read_metrics(workdir) if "batch_hash" in line]


def test_a_rollback_goes_on_from_the_checkpoint_with_the_data_after_the_bad_step(folder, bad_data, capsys):
    settings = {"faults.on_bad_step": "rollback", "optimizer.lr_scheduler_type": "constant"}
    workdir = folder / "rollback"
    train.train(load_config(folder / "config.toml", settings), workdir)
    assert "step 7: loss = nan" in capsys.readouterr().out
    assert [fault["what"] for fault in read_faults(workdir)] == ["bad step"]
    # What an undisturbed run reads: 15 batches; of these, 5, 6 and 7 are left out.
    longer = load_config(folder / "config.toml", settings | {"train.max_steps": "15", "eval.eval_steps": "4"})
    undisturbed = hashes_of_the_data(folder, longer)
    assert hashes(workdir) == undisturbed[:4] + undisturbed[7:15]
    assert all(np.isfinite(line["loss"]) for line in read_metrics(workdir) if "loss" in line)


def hashes_of_the_data(folder: Path, config) -> list[int]:
    """The hash of each batch that a run of `config` reads when no step is bad."""
    workdir = folder / "undisturbed-15"
    from jaxgpt.training import bad_steps

    with pytest.MonkeyPatch.context() as patch:  # a NaN changes the weights, not the tokens: the hash is the same
        patch.setattr(bad_steps.BadSteps, "check", lambda *_: None)
        train.train(config, workdir)
    return hashes(workdir)


def test_a_skipped_step_is_counted_and_the_run_goes_on(folder, bad_data, capsys):
    workdir = folder / "skip"
    train.train(load_config(folder / "config.toml", {"faults.on_bad_step": "skip"}), workdir)
    lines = {line["step"]: line for line in read_metrics(workdir) if "batch_hash" in line}
    assert list(lines) == list(range(1, 13))
    assert lines[7]["loss"] is None and "skipped_steps" not in lines[6]
    assert lines[12]["skipped_steps"] == 1 and np.isfinite(lines[12]["loss"])
    assert "the update was skipped" in capsys.readouterr().out
