"""Being told to stop anywhere, a data reader that hangs, a full disk, two writers, bad steps.

In the quick tier inside this process; in the system tier with real processes and real signals.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from processes import environments, wait_for
from tiny import RUN, WORDS, overrides

from jaxgpt import errors, train
from jaxgpt.data import pipeline
from jaxgpt.diagnosis.kill_drill import last_step
from jaxgpt.errors import Interrupted
from jaxgpt.storage import manifest
from jaxgpt.training import loop, metrics, signals
from jaxgpt.training.checkpoint import finished_steps
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.models import load_model
from jaxgpt.training.recovery import read_faults

CONFIG = (
    RUN
    + """warmup_steps = 2
[train]
max_steps = 12
per_device_train_batch_size = 2
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
ENVIRONMENT = {  # of processes: one device
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text.txt").write_text(" ".join(np.random.default_rng(0).choice(WORDS, 2000)))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder


# Runs within this process have 6 steps: the program of the session's trained run.
QUICK = overrides(train__max_steps=6, train__per_device_train_batch_size=1, eval__eval_batches=2)
QUICK += overrides(eval__eval_steps=2, checkpoint__save_steps=2)
# A constant learning rate has one program for any number of steps.
CONSTANT = overrides(optimizer__lr_scheduler_type="constant")


def train_here(folder: Path, workdir: Path, *options: str) -> int:
    return train.main(["--config", str(folder / "config.toml"), "--workdir", str(workdir), *QUICK, *options])


# Reads batch after batch, so that a failpoint knows which one it is in.
ONE_READER = """
from jaxgpt import cli, train
from jaxgpt.data import pipeline
pipeline.THREADS = pipeline.PREFETCHED = 1
cli.leave(train.main())
"""


def start(
    folder: Path, workdir: Path, *options: str, failpoint: str = "", environment=None, program=("-m", "jaxgpt.train")
) -> subprocess.Popen:
    command = [sys.executable, *program, "--config", str(folder / "config.toml")]
    environment = {**os.environ, **(environment or ENVIRONMENT), "JAXGPT_FAILPOINT": failpoint}
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
    """By a process of its own, with one device."""
    code, output = finish(start(folder, folder / "undisturbed"))
    assert code == 0, output
    return folder / "undisturbed"


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert record(ours) == record(theirs)
    for file in (theirs / "hf").iterdir():
        assert (ours / "hf" / file.name).read_bytes() == file.read_bytes()


# ---------------------------------------------------------------- SIGTERM, wherever the run is


# One start after the other, each told to stop at its point; then the run goes on to its end. There are 9 steps, each
# with an evaluation of 2 batches and a checkpoint, so that each point is met wherever the start before it stopped. Not
# delete.renamed: all steps may be done before a checkpoint is deleted, and the run is finished then.
POINTS = [
    "data.read:term@6",  # the reader is at most 4 batches ahead
    "evaluate:term@2",  # in the middle of the evaluation that was left out
    "save.arrays:term",  # in the background, while the next step is done
    "restore.done:term",
    "evaluate:term@4",  # in the middle of the evaluation of a step
    "save.started:term",
    "evaluate:term@2",
]
BEFORE_A_RUN = "lease.taken:term"  # a process that lives on keeps its lease
EACH_STEP = [*QUICK, *CONSTANT, *overrides(train__max_steps=9, eval__eval_steps=1, checkpoint__save_steps=1)]


def stop_at_each_point(run: Callable[[str], tuple[int, str]], workdir: Path, points: list[str]) -> None:
    """`run` starts or resumes the run in `workdir` and gives its exit code and messages."""
    for number, point in enumerate(points):
        code, output = run(point)
        assert code == 42, f"{number}, {point}: {output}"
        assert "run the same command again" in output
        if not point.startswith(("lease", "restore")):
            assert max(line["step"] for line in read_metrics(workdir)) in finished_steps(workdir)  # nothing is lost
    code, output = run("")
    assert code == 0, output


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("activity", "number", "whole", "said"),
    [
        ("eval", signal.SIGTERM, True, "SIGTERM at step 7, in eval for . s; no step is lost"),
        ("eval", signal.SIGHUP, True, "SIGHUP at step 7, in eval for . s; no step is lost"),
        ("step", signal.SIGINT, True, "SIGINT at step 7, in step for . s; no step is lost"),  # writes a profile
        ("eval", signal.SIGTERM, False, "in eval for . s; the steps after 4 are lost"),
        ("data", signal.SIGHUP, False, "in data for . s; the steps after 4 are lost"),
    ],
)
def test_what_takes_long_is_left_and_the_state_saved_beside_it(monkeypatch, capfd, activity, number, whole, said):
    ended, saved, told = threading.Event(), [], []

    def leave(code):
        saved.append(code)
        ended.set()
        sys.exit()  # of the thread

    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(signals.os, "_exit", leave)
    watched = signals.Activity()
    with signals.StopSignal(watched, is_alone=lambda: whole) as stop:
        stop.kept = lambda: 7 if 7 in saved else 4
        stop.tell_others = told.append
        watched.is_at(activity, 7)
        with stop.saved_by(lambda: saved.append(7)):
            os.kill(os.getpid(), number)
            assert ended.wait(10)
    assert saved == ([7, 42] if whole else [42]) and told == [signal.Signals(number).name]
    assert re.search(f"stopped: .*{said}; run the same command again", capfd.readouterr().err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(("activity", "said"), [("start", "before the first step"), ("end", "after the last step")])
def test_a_signal_where_nothing_is_to_be_saved_interrupts_at_once(number, activity, said):
    watched = signals.Activity()
    with signals.StopSignal(watched):
        watched.is_at(activity, 6)
        with pytest.raises(Interrupted, match=f"{number.name} {said}"):
            os.kill(os.getpid(), number)
            time.sleep(5)


def test_a_terminal_that_is_closed_sends_sighup_twice_and_nohup_has_it_ignored(monkeypatch):
    watched = signals.Activity()
    watched.is_at("step", 3)
    with signals.StopSignal(watched) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested == "SIGHUP"
    monkeypatch.setattr(signals.signal, "getsignal", lambda _: signal.SIG_IGN)
    assert errors.stop_signals() == [signal.SIGTERM, signal.SIGINT]


def test_a_reader_that_left_costs_no_step(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))  # noqa: SIM115
    for _ in range(2):
        metrics.say("step 1")


def test_data_or_settings_that_are_removed_during_a_run_cost_no_step(folder, tmp_path, failpoint, capsys, monkeypatch):
    workdir, evaluate = tmp_path / "run", loop.evaluate

    def evaluate_and_remove(*arguments):
        if not finished_steps(workdir):  # at step 2
            for name in ("config.json", "tokenizer/tokenizer.json", "metrics.jsonl"):
                (workdir / name).unlink()
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", evaluate_and_remove)
    failpoint("data.read:full@6")
    monkeypatch.setattr(pipeline, "THREADS", 1)
    monkeypatch.setattr(pipeline, "PREFETCHED", 1)
    assert train_here(folder, workdir) == 74
    out, err = capsys.readouterr()
    assert "config.json is gone, and written again" in out
    found = re.search(r"the prepared data cannot be read .*; the state of step (\d) is saved: put it back", err)
    assert found and finished_steps(workdir)[-1] == int(found[1]) >= 2
    assert [line["step"] for line in read_metrics(workdir)] == list(range(3, int(found[1]) + 1))
    failpoint("")
    assert train_here(folder, workdir) == 0
    assert load_model(workdir).step == 6


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_hosts_join_exits_with_42(folder, number):
    """And so do those that wait with it. SIGINT comes while it imports, SIGTERM to process 0. The third never comes."""
    places = environments(3)
    port = int(places[0]["JAXGPT_COORDINATOR"].rpartition(":")[2])
    first = start(folder, folder / "joins", environment=places[0])
    wait_for(lambda: "0A" in sockets(port))
    second = start(folder, folder / "joins", environment=places[1])
    wait_for(functools.partial(hears, second) if number == signal.SIGINT else lambda: "01" in sockets(port))
    told = 0 if number == signal.SIGTERM else 1
    (first, second)[told].send_signal(number)
    sent = time.monotonic()
    for process, (code, output) in enumerate([finish(first, 20), finish(second, 20)]):
        assert code == 42 and "run the same command again" in output, output
        assert process == told or f"stopped: process {told} on " in output, output
    assert time.monotonic() - sent < 15  # of 300
    assert not (folder / "joins").exists()


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("program", ["jaxgpt.sweep", "jaxgpt.launch --local-procs 1 -- train", "jaxgpt sweep"])
def test_a_signal_while_a_command_imports_exits_with_42(folder, tmp_path, program, number):
    options = ["--config", str(folder / "config.toml"), "--workdir", str(tmp_path / "new")]
    command = [sys.executable, "-m", *program.split(), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, **pipes)
    wait_for(functools.partial(hears, process))
    process.send_signal(number)
    code, output = finish(process, 20)
    assert (code, output.count("\n")) == (42, 2) and f"stopped: {number.name}; run the same" in output, output
    assert not (tmp_path / "new").exists()


def sockets(port: int) -> list[str]:
    """The states of a local port's sockets, as Linux numbers them: 0A listens, 01 is connected."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [words[3] for words in lines if int(words[1].rpartition(":")[2], 16) == port]


@pytest.mark.system
def test_an_evaluation_that_takes_for_ever_is_left_and_its_step_saved(folder):
    workdir = folder / "evaluates"
    options = [*EACH_STEP, *overrides(checkpoint__save_steps=3, checkpoint__keep_best=False)]
    process = start(folder, workdir, *options, failpoint="evaluate:hang@3")
    wait_for_a_step(process, workdir)
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, 30)
    assert code == 42 and "no step is lost" in output, output
    assert finished_steps(workdir) == [2]


def test_sigterm_anywhere_exits_with_42_and_the_run_ends_as_if_nothing_had_happened(
    folder, tmp_path, failpoint, monkeypatch, capsys
):
    monkeypatch.setattr(pipeline, "THREADS", 1)
    monkeypatch.setattr(pipeline, "PREFETCHED", 1)

    def run(point: str) -> tuple[int, str]:
        failpoint(point)
        return train_here(folder, tmp_path / "run", *EACH_STEP), capsys.readouterr().err

    assert train_here(folder, folder / "whole", *EACH_STEP) == 0
    stop_at_each_point(run, tmp_path / "run", [*POINTS[:3], *POINTS[4:6]])  # the system tier has them all
    assert_same_run(tmp_path / "run", folder / "whole")


@pytest.mark.system
def test_sigterm_anywhere_ends_the_process_with_42_and_the_run_ends_as_if_nothing_had_happened(folder, tmp_path):
    run = lambda point: finish(start(folder, tmp_path / "run", *EACH_STEP, failpoint=point, program=("-c", ONE_READER)))
    stop_at_each_point(run, tmp_path / "run", [BEFORE_A_RUN, *POINTS])
    assert finish(start(folder, tmp_path / "whole", *EACH_STEP))[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def hears(process: subprocess.Popen) -> bool:
    """Whether SIGTERM finds a handler in the process yet; Python itself takes some hundredths of a second to start."""
    [caught] = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return process.poll() is not None or bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def stop_at_random_instants(folder: Path, workdir: Path, signals: int, processes: int, seed: int) -> None:
    """SIGTERM between the first import and the last export: to the process, or to both or one of two.

    A run that was stopped goes on; one that has reached its end first is begun again.
    """
    rng, options = np.random.default_rng(seed), [*EACH_STEP, *overrides(train__max_steps=20)]
    places = environments(processes) if processes > 1 else [ENVIRONMENT]

    def begin() -> list[subprocess.Popen]:
        if processes > 1:
            places[:] = environments(processes)  # another port
        return [start(folder, workdir, *options, environment=place) for place in places]

    began = time.monotonic()
    assert [finish(process)[0] for process in begin()] == [0] * processes
    whole, sent, took = time.monotonic() - began, 0, []
    while sent < signals:
        if (workdir / "hf").exists():
            shutil.rmtree(workdir)
        running = begin()
        for process in running:
            wait_for(functools.partial(hears, process))
        time.sleep(rng.uniform(0, whole))
        told = running if (signals - sent) % 2 else running[rng.integers(processes) :][:1]
        if any(process.poll() is not None for process in running):
            assert all(finish(process)[0] == 0 for process in running)
            continue
        step = last_step(workdir)
        for process in told:
            process.send_signal(signal.SIGTERM)
        at = time.monotonic()
        for process in running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:  # it waits for the other one to come and join it
                assert processes > 1 and last_step(workdir) == step
                process.send_signal(signal.SIGTERM)
        ended = [finish(process, 20) for process in running]
        took.append(time.monotonic() - at)
        # After the last export there is nothing left to stop: whoever hears it then ends as it would have.
        is_done = (workdir / "hf" / "model.safetensors").exists() and step == 20
        assert {code for code, _ in ended} <= ({0, 42} if is_done else {42}), f"{sent}, at step {step}: {ended}"
        kept, done = max(finished_steps(workdir), default=0), last_step(workdir)
        assert step <= done <= kept, f"step {done} was done, {kept} is kept: {ended}"
        sent += 1
        print(f"{sent}: {len(told)} of {processes} told after step {step}, kept {kept}, {took[-1]:.1f} s", flush=True)
    print(f"undisturbed {whole:.1f} s; to the end: median {np.median(took):.1f} s, most {max(took):.1f} s")


@pytest.mark.system
@pytest.mark.parametrize(("processes", "signals"), [(1, 2), (2, 1)])
def test_sigterm_at_a_random_instant_ends_with_42_and_loses_no_step(folder, tmp_path, processes, signals):
    stop_at_random_instants(folder, tmp_path / "run", signals, processes, seed=processes)


@pytest.mark.chaos
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_at_30_random_instants_ends_with_42_and_loses_no_step(folder, tmp_path, processes):
    stop_at_random_instants(folder, tmp_path / "run", 30, processes, seed=processes)


@pytest.mark.system
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


@pytest.mark.system
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


@pytest.mark.system
def test_sigterm_in_a_save_is_not_forgotten_where_the_next_batch_never_comes(folder):
    workdir = folder / "saving"
    # The loop asks two batches ahead: without the seventh, step 5 waits for ever.
    points = "save.begin:term,data.read:hang@7"
    process = start(folder, workdir, failpoint=points, program=("-c", ONE_READER))
    code, output = finish(process, 60)
    assert code == 42, output
    assert "SIGTERM at step 4" in output and finished_steps(workdir) == [4]


@pytest.mark.system
def test_a_data_reader_that_hangs_ends_the_run_with_75_and_the_stacks_of_all_threads(folder):
    workdir = folder / "hung"
    code, output = finish(start(folder, workdir, "--faults.hang_seconds", "2", failpoint="data.read:hang@11"), 60)
    assert code == 75, output
    assert "no progress for" in output and "in data" in output
    [fault] = read_faults(workdir)
    assert fault["what"].endswith("in data") and fault["host"] and fault["step"] > 1
    stacks = (workdir / "stacks-0.txt").read_text()
    assert "_wait_for_data" in stacks and "failpoint" in stacks  # who waits, and for whom


@pytest.mark.system
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


@pytest.mark.system
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


@pytest.mark.system
def test_a_run_that_was_killed_and_whose_checkpoints_are_gone_does_not_begin_anew(folder):
    workdir = folder / "killed"
    assert finish(start(folder, workdir, failpoint="save.arrays:kill"))[0] == -signal.SIGKILL
    code, output = finish(start(folder, workdir, failpoint="save.begin:kill@2"))  # none yet: from step 0
    assert code == -signal.SIGKILL and finished_steps(workdir) == [4], output
    shutil.rmtree(workdir / "checkpoints")
    before = (workdir / "metrics.jsonl").read_bytes()
    code, output = finish(start(folder, workdir))
    assert code == 2 and output.count("\n") == 1 and "holds no checkpoint any more" in output, output
    assert (workdir / "metrics.jsonl").read_bytes() == before and b'"step": 8' in before


@pytest.mark.system
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


def test_three_crashes_at_one_step_go_one_checkpoint_back_and_three_more_end_it(folder, tmp_path, failpoint, capsys):
    workdir = tmp_path / "run"

    def crash(evaluated_batches: int) -> None:
        """In the evaluation of step 6, of which a start has evaluated so many batches before."""
        failpoint(f"evaluate:crash@{evaluated_batches + 1}")
        with pytest.raises(ValueError, match="evaluate:crash"):  # there is no such action
            train_here(folder, workdir)

    for batches in (4, 0, 0):  # from the beginning, then from step 4
        crash(batches)
    assert [fault["step"] for fault in read_faults(workdir)] == [6] * 3
    capsys.readouterr()
    for batches in (2, 0, 0):  # from step 2, then from the new step 4
        crash(batches)
    assert "going one checkpoint back, to step 2" in capsys.readouterr().out
    assert (workdir / "quarantine" / "4" / manifest.NAME).is_file()
    assert train_here(folder, workdir) == 1
    assert re.search("also from one checkpoint earlier.*not tried again", capsys.readouterr().err)
    failpoint("")
    (workdir / "faults.jsonl").unlink()  # what the message says
    assert train_here(folder, workdir) == 0
    assert json.loads((workdir / "summary.json").read_text())["status"] == "finished"


# ---------------------------------------------------------------- bad steps


@pytest.fixture
def bad_data(monkeypatch):
    """The batch at position 3 of the data, that of step 4, makes the loss a NaN."""
    from jaxgpt.data import pipeline

    whole = pipeline.train_rows

    def train_rows(stream, *, step, **how):
        batch = whole(stream, step=step, **how)
        return batch._replace(weights_BT=batch.weights_BT * np.float32("nan")) if step == 3 else batch

    monkeypatch.setattr(pipeline, "train_rows", train_rows)


def hashes(workdir: Path) -> list[int]:
    return [line["batch_hash"] for line in read_metrics(workdir) if "batch_hash" in line]


@pytest.fixture(scope="module")
def undisturbed_hashes(folder) -> list[int]:
    """Of the first 8 batches."""
    assert train_here(folder, folder / "8-steps", *CONSTANT, "--train.max_steps", "8") == 0
    return hashes(folder / "8-steps")


def test_a_rollback_goes_on_from_the_checkpoint_with_the_data_after_the_bad_step(
    folder, tmp_path, undisturbed_hashes, bad_data, capsys
):
    workdir = tmp_path / "run"
    assert train_here(folder, workdir, *CONSTANT, "--faults.on_bad_step", "rollback") == 0
    assert "step 4: loss = nan" in capsys.readouterr().out
    assert [fault["what"] for fault in read_faults(workdir)] == ["bad step"]
    # Of what an undisturbed run reads, batches 3 and 4 are left out.
    assert hashes(workdir) == undisturbed_hashes[:2] + undisturbed_hashes[4:]
    assert all(np.isfinite(line["loss"]) for line in read_metrics(workdir) if "loss" in line)


def test_a_skipped_step_is_counted_and_the_run_goes_on(folder, tmp_path, bad_data, capsys):
    workdir = tmp_path / "run"
    assert train_here(folder, workdir, *CONSTANT, "--faults.on_bad_step", "skip") == 0
    lines = {line["step"]: line for line in read_metrics(workdir) if "batch_hash" in line}
    assert list(lines) == list(range(1, 7))
    assert lines[4]["loss"] is None and "skipped_steps" not in lines[3]
    assert lines[6]["skipped_steps"] == 1 and np.isfinite(lines[6]["loss"])
    assert "the update was skipped" in capsys.readouterr().out
