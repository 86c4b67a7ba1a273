"""Several processes as one run, with real processes: joining, agreeing, losing one, leaving; and the training."""

import contextlib
import functools
import json
import os
import re
import selectors
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import FAIL_AT, HOST_TIMEOUT, STOP_AT, environments, joined, started, wait_for
from tiny import RUN

from jaxgpt.errors import EXIT_RESUME, EXIT_STORAGE, EXIT_WATCHDOG, HostLost, Interrupted, UserError
from jaxgpt.parallel import distributed, join
from jaxgpt.parallel.cluster_env import ProcessPlace
from jaxgpt.parallel.distributed import StopVote, place_in
from jaxgpt.parallel.host_watch import ALIVE, DONE, FAILED, TOLD, Peers, PeerWatch, Sign
from jaxgpt.parallel.join import roll_call
from jaxgpt.training.checkpoint import finished_steps
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.models import load_model

OURS = {"JAXGPT_COORDINATOR": "10.0.0.1:8476", "JAXGPT_NUM_PROCESSES": "4", "JAXGPT_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


# ---------------------------------------------------------------- who takes part


def test_the_setting_decides_whether_a_pod_is_joined():
    assert place_in(OURS, "auto") == place_in(OURS, "on") == ProcessPlace("10.0.0.1:8476", 4, 2)
    assert place_in(OURS, "off") is None
    assert place_in({}, "auto") is None
    with pytest.raises(UserError, match="nothing here names other processes; set JAXGPT_COORDINATOR"):
        place_in({}, "on")


def test_a_cluster_is_recognised_by_its_environment():
    assert place_in(SLURM, "auto") == ProcessPlace(f"node001:{77 + 65535 - 2**12 + 1}", 2, 1)


@pytest.mark.parametrize(
    "environment",
    [
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        SLURM | {"SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "2"},  # a batch script, which is none of the two tasks
        OURS | {"JAXGPT_NUM_PROCESSES": "1", "JAXGPT_PROCESS_ID": "0"},
    ],
)
def test_a_single_process_never_waits_for_others(environment):
    assert place_in(environment, "auto") is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"JAXGPT_PROCESS_ID": ""}, "JAXGPT_COORDINATOR is set, but JAXGPT_PROCESS_ID not"),
        ({"JAXGPT_COORDINATOR": "", "JAXGPT_NUM_PROCESSES": ""}, "JAXGPT_COORDINATOR and JAXGPT_NUM_PROCESSES not"),
        ({"JAXGPT_COORDINATOR": "10.0.0.1"}, "is not HOST:PORT"),
        ({"JAXGPT_PROCESS_ID": "4"}, "the first below the second"),
        ({"JAXGPT_NUM_PROCESSES": "two"}, "must be numbers"),
    ],
)
def test_a_contradictory_environment_is_refused(change, complaint):
    with pytest.raises(UserError, match=complaint):
        place_in(OURS | change, "auto")


def test_one_process_needs_no_vote_no_threads_and_no_barrier():
    before = threading.enumerate()
    recorded = []
    with PeerWatch(5.0, lambda: 0, lambda step, facts: recorded.append(facts)):
        vote = StopVote()
        assert [vote.poll(flag) for flag in (False, True, False)] == [False, True, False]
        assert threading.enumerate() == before
    distributed.barrier("alone", 0.1)
    assert distributed.broadcast_from_writer(7) == 7
    assert not recorded


# ---------------------------------------------------------------- joining


@pytest.fixture
def roll_calls(monkeypatch):
    """Calls the roll as (process, of how many), each in a thread that passes for a process; returns their errors."""
    monkeypatch.setattr(os, "getpid", threading.get_ident)

    def call(
        processes: list[tuple[int, int]], timeout: float, versions: tuple[str, ...] = (), stopped: int | None = None
    ) -> list[str]:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            address = f"127.0.0.1:{unused.getsockname()[1]}"

        def answer(number: int) -> str:
            process, count = processes[number]
            try:
                same = {"jax": dict(enumerate(versions)).get(number)}
                seconds = join._HELLO_SECONDS if number == stopped else timeout
                roll_call(ProcessPlace(address, count, process), seconds, same, stopped=number == stopped)
            except (HostLost, Interrupted) as error:
                return f"{type(error).__name__}: {error}"
            return ""

        with ThreadPoolExecutor(len(processes)) as pool:
            return list(pool.map(answer, range(len(processes))))

    return call


@pytest.mark.parametrize("number", [0, 1, 2])
def test_when_one_is_told_to_stop_all_stop_at_once(roll_calls, number):
    errors = roll_calls([(0, 3), (1, 3), (2, 3)], 60, stopped=number)
    assert all(line.startswith(f"Interrupted: process {number} on ") for line in errors), errors
    assert all("was told to stop before all had joined; run the same command again" in line for line in errors)


@pytest.mark.parametrize("number", [0, 1])
def test_who_is_interrupted_while_it_waits_for_one_who_never_comes_tells_the_others(monkeypatch, number):
    monkeypatch.setattr(join, "_HELLO_SECONDS", 1.0)
    monkeypatch.setattr(os, "getpid", threading.get_ident)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    name, waits = ("select", selectors.DefaultSelector) if number == 0 else ("_read", join)
    original, calls = getattr(waits, name), []

    def interrupt_once(*given):
        if threading.get_ident() == told.result():
            calls.append(given)
            if len(calls) == (3 if number == 0 else 1):  # another one has come, or this one has
                raise Interrupted("SIGTERM")
        return original(*given)

    monkeypatch.setattr(waits, name, interrupt_once)
    told: Future = Future()

    def answer(process: int) -> str:
        if process == number:
            told.set_result(threading.get_ident())
        with pytest.raises(Interrupted) as raised:
            roll_call(ProcessPlace(address, 4, process), 60)
        return str(raised.value)

    with ThreadPoolExecutor(3) as pool:
        errors = dict(enumerate(pool.map(answer, range(3))))
    assert errors.pop(number) == "SIGTERM"
    assert all(f"process {number} on" in line and "was told to stop" in line for line in errors.values()), errors


def test_all_answer_the_roll_call(roll_calls):
    assert roll_calls([(2, 3), (0, 3), (1, 3)], 30) == ["", "", ""]


def test_who_does_not_come_is_named_to_all_who_came(roll_calls):
    errors = roll_calls([(0, 4), (2, 4)], 0.3)
    assert all("no sign of process 1, 3 of 4 within 0.3 s" in line for line in errors), errors


def test_a_coordinator_that_does_not_come_is_named(roll_calls):
    [error] = roll_calls([(1, 2)], 0.2)
    assert "process 0 did not answer at 127.0.0.1:" in error


def test_processes_that_expect_different_numbers_do_not_join(roll_calls):
    errors = roll_calls([(0, 2), (1, 3)], 20)
    assert all("expects 3 processes" in line and "expects 2" in line for line in errors), errors


def test_processes_with_different_versions_of_jax_do_not_join(roll_calls):
    errors = roll_calls([(0, 2), (1, 2)], 20, ("0.10.2", "0.12.0"))
    assert all("jax: 0.12.0 in process 1 on " in line and "0.10.2 in process 0 on " in line for line in errors), errors


def test_two_processes_with_one_number_do_not_join(roll_calls):
    errors = roll_calls([(0, 3), (1, 3), (1, 3)], 20)
    assert all("both say that they are process 1" in line for line in errors), errors


@pytest.mark.parametrize("end", [b"\n", b""], ids=["whole lines", "lines without an end"])
def test_strangers_on_the_port_neither_break_nor_delay_a_start(end):
    hello = {"process": 1, "processes": 2, "same": {}, "host": "elsewhere", "pid": 1, "stopped": False}
    wrong = [{"process": [1]}, {"process": 99}, {"process": -1}, {"process": 0}, {"process": True}, {"same": [1]}]
    wrong += [
        {"pid": None},
        {"more": 1},
        {"host": 5},
        {"processes": "2"},
        {"stopped": "yes"},
        {"stopped": True, "process": 7},
    ]
    lines = [json.dumps(hello | change).encode() for change in wrong]
    lines += [b"GET / HTTP/1.1\r\n\r", b"[" * 4000, b"\xff\xfe", b"x" * 100_000, b"null", b"", b"", b"", b"", b""]
    with socket.create_server(("127.0.0.1", 0)) as unused:
        host, port = unused.getsockname()
    place = lambda process: ProcessPlace(f"{host}:{port}", 2, process)
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as strangers:
        first = pool.submit(roll_call, place(0), 20.0)
        for line in lines:
            connection = strangers.enter_context(connected(host, port))
            with contextlib.suppress(OSError):  # the longest is cut off while it is sent
                connection.sendall(line + end)
        pool.submit(roll_call, place(1), 20.0).result()
        first.result()


def connected(host: str, port: int) -> socket.socket:
    """A connection to a server that may still be starting."""
    found = []

    def connect() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            found.append(socket.create_connection((host, port)))
        return bool(found)

    wait_for(connect)
    return found[0]


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(HostLost, match=f"port {port} of this host is taken"):
            roll_call(ProcessPlace(f"127.0.0.1:{port}", 2, 0), 0.2)


# ---------------------------------------------------------------- who is lost


def test_only_a_process_that_lived_and_stands_still_is_lost():
    peers = Peers(timeout_seconds=3.0)
    for count in range(4):
        assert peers.judge({1: Sign(count, ALIVE, "a"), 2: Sign(count, ALIVE, "b")}, 1.0) is None
    verdicts = [peers.judge({1: Sign(9 + n, ALIVE, "a"), 2: Sign(3, ALIVE, "b")}, 1.0) for n in range(4)]
    assert verdicts[:3] == [None] * 3
    assert (verdicts[3].process, verdicts[3].host) == (2, "b")


def test_a_process_that_left_in_order_is_not_lost():
    peers = Peers(timeout_seconds=3.0)
    assert all(peers.judge({1: Sign(1, DONE, "a")}, 1.0) is None for _ in range(20))


def test_a_process_that_failed_takes_the_others_with_it():
    peers = Peers(timeout_seconds=60.0)
    verdicts = [peers.judge({1: Sign(1, f"{FAILED}: disk full", "a")}, 1.0) for _ in range(6)]
    assert verdicts[:5] == [None] * 5
    assert verdicts[5].what == "failed: disk full"


def test_a_process_that_was_told_to_stop_has_the_others_stop_too():
    loss = Peers(timeout_seconds=60.0).judge({1: Sign(1, f"{TOLD} (SIGTERM)", "a")}, 0.5)
    assert loss == (1, "a", "was told to stop (SIGTERM)")


def test_a_machine_that_slept_does_not_take_the_others_for_dead():
    peers = Peers(timeout_seconds=3.0)
    assert peers.judge({1: Sign(1, ALIVE, "a")}, 0.5) is None
    assert peers.judge({1: Sign(1, ALIVE, "a")}, 3600.0) is None


# ---------------------------------------------------------------- together, in real processes


@pytest.mark.system
def test_one_that_is_asked_to_stop_stops_all_at_the_same_step(tmp_path):
    with joined(tmp_path, 2, {1: "stops"}) as processes:
        assert [processes.code(0), processes.code(1)] == [0, 0]
        for number in range(2):
            assert f"process {number} of 2 received {2**40 + 1}\nstopped at {STOP_AT + 1}\n" in processes.output(number)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("count", "lost", "number"),
    [
        pytest.param(2, 1, signal.SIGKILL, marks=pytest.mark.system),
        pytest.param(2, 0, signal.SIGKILL, marks=pytest.mark.system),
        pytest.param(2, 0, signal.SIGSTOP, marks=pytest.mark.system),
        pytest.param(2, 1, signal.SIGSTOP, marks=pytest.mark.chaos),
        pytest.param(4, 2, signal.SIGKILL, marks=pytest.mark.chaos),
        pytest.param(4, 0, signal.SIGKILL, marks=pytest.mark.chaos),
        pytest.param(4, 0, signal.SIGSTOP, marks=pytest.mark.chaos),
    ],
)
def test_a_lost_process_ends_the_others_and_is_named(tmp_path, count, lost, number):
    with joined(tmp_path, count) as processes:
        processes.wait_until_they_run()
        processes.started[lost].send_signal(number)
        began = time.monotonic()
        others = [process for process in range(count) if process != lost]
        assert [processes.code(process) for process in others] == [EXIT_WATCHDOG] * len(others)
        assert time.monotonic() - began < HOST_TIMEOUT + 8
        for process in others:
            assert f"failed: process {lost} on {os.uname().nodename} " in processes.output(process)
            assert "Thread 0x" in (tmp_path / "run" / f"stacks-{process}.txt").read_text()
    records = [json.loads(line) for line in (tmp_path / "run" / "faults.jsonl").read_text().splitlines()]
    assert {(record["process"], record["host"]) for record in records} == {(lost, os.uname().nodename)}
    assert sorted(record["reported_by"] for record in records) == others
    assert all(record["step"] > 0 for record in records)


@pytest.mark.parametrize(
    "failing", [pytest.param(0, marks=pytest.mark.chaos), pytest.param(1, marks=pytest.mark.system)]
)
def test_a_process_that_fails_keeps_its_exit_code_and_takes_the_others_with_it(tmp_path, failing):
    with joined(tmp_path, 2, {failing: "fails"}) as processes:
        assert processes.code(failing) == EXIT_STORAGE
        assert processes.code(1 - failing) == EXIT_WATCHDOG
        assert "failed: StorageFailed: the disk is full; process" in processes.output(1 - failing)


@pytest.mark.system
def test_processes_that_fail_alike_keep_their_exit_codes(tmp_path):
    with joined(tmp_path, 2, {0: "fails", 1: "fails"}) as processes:
        assert [processes.code(0), processes.code(1)] == [EXIT_STORAGE] * 2
    assert FAIL_AT and not (tmp_path / "run").exists()


@pytest.mark.system
def test_an_abort_is_delayed_and_still_ends_the_process(tmp_path):
    code = (
        "import ctypes, threading, time; from jaxgpt.parallel import host_watch; host_watch._delay_aborts()\n"
        "began = time.monotonic(); threading.Thread(target=ctypes.CDLL(None).abort).start()\n"
        "while True: print(time.monotonic() - began, flush=True); time.sleep(0.1)"
    )
    with started(tmp_path, [["-c", code]], [dict(os.environ)]) as processes:
        assert processes.code(0) == -signal.SIGABRT
        assert float(processes.output(0).split()[-1]) > 5  # the other threads went on


# ---------------------------------------------------------------- the training

CONFIG = (
    RUN
    + """warmup_steps = 2
[train]
max_steps = 4
per_device_train_batch_size = 2
seed = 7
[eval]
eval_steps = 2
sample_tokens = 0
[checkpoint]
save_steps = 2
[log]
logging_steps = 1
tensorboard = false
[faults]
host_timeout_seconds = 3.0
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], 2000)
    (folder / "text.txt").write_text(" ".join(words))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder


def trained(folder: Path, name: str, count: int, devices_each: int, *options: str) -> dict[int, dict]:
    """The training lines of metrics.jsonl by step, after `count` processes trained to the end."""
    with training(folder, name, count, devices_each, *options) as processes:
        codes = [processes.code(process, 200) for process in range(count)]
        assert codes == [0] * count, "\n".join(processes.output(process) for process in range(count))
    return lines(folder / name)


def training(folder: Path, name: str, count: int, devices_each: int, *options: str):
    command = ["-m", "jaxgpt", "train", "--config", folder / "config.toml", "--workdir", folder / name, *options]
    return started(folder / f"{name}-output", [command] * count, environments(count, devices_each))


def lines(workdir: Path) -> dict[int, dict]:
    return {line["step"]: line for line in read_metrics(workdir) if "loss" in line}


@pytest.fixture(scope="module")
def one_process(folder) -> dict[int, dict]:
    return trained(folder, "one", 1, 2)


@pytest.fixture(scope="module")
def two_processes(folder) -> dict[int, dict]:
    return launched(folder, "two", 2)


def launched(folder: Path, name: str, count: int, *options: str) -> dict[int, dict]:
    """As `trained`, started by the command itself."""
    launch = ["-m", "jaxgpt", "launch", "--local-procs", str(count), "--", "train"]
    command = [*launch, "--config", folder / "config.toml", "--workdir", folder / name, *options]
    with started(folder / f"{name}-output", [command], [os.environ]) as processes:
        assert processes.code(0, 300) == 0, processes.output(0)
    return lines(folder / name)


def assert_same(ours: dict[int, dict], theirs: dict[int, dict]) -> None:
    assert list(ours) == list(theirs) and ours
    for step, line in ours.items():
        assert line["batch_hash"] == theirs[step]["batch_hash"]
        assert abs(line["loss"] - theirs[step]["loss"]) < 1e-6


@pytest.mark.system
def test_two_and_four_launched_processes_train_as_one(folder, one_process, two_processes):
    assert list(one_process) == [1, 2, 3, 4]
    assert_same(one_process, two_processes)
    four = launched(folder, "four", 4, "--train.per_device_train_batch_size", "1")  # on twice the devices
    assert_same(one_process, four)


@pytest.mark.system
def test_what_two_processes_saved_one_process_restores(folder, one_process, two_processes):
    ours, theirs = (load_model(folder / name).params for name in ("one", "two"))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), ours, theirs))


@pytest.mark.system
def test_sigterm_to_one_of_two_saves_the_same_step_in_both(folder):
    long = ("--train.max_steps", "5000", "--eval.eval_steps", "5000", "--checkpoint.save_steps", "5000")
    with training(folder, "told", 2, 1, *long) as processes:
        processes.wait_for(lambda: len(lines_if_any(folder / "told")) >= 3)
        processes.started[1].send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert [processes.code(0), processes.code(1)] == [EXIT_RESUME] * 2
        assert time.monotonic() - began < 10
        steps = {re.search(r"stopped: .* step (\d+)", processes.output(number)).group(1) for number in range(2)}
    assert [str(step) for step in finished_steps(folder / "told")] == list(steps)


@pytest.fixture(scope="module")
def undisturbed(folder):
    """count -> the lines of a longer run of so many processes."""
    return functools.cache(lambda count: trained(folder, f"undisturbed-{count}", count, 1, *longer(count)))


def longer(count: int) -> tuple[str, ...]:
    """Options for 100 steps of 4 sequences on `count` devices."""
    steps = ("--train.max_steps", "100", "--eval.eval_steps", "100", "--checkpoint.save_steps", "20")
    return (*steps, "--checkpoint.keep_best", "false", "--train.per_device_train_batch_size", str(4 // count))


@pytest.mark.chaos
@pytest.mark.parametrize(("count", "lost"), [(2, 0), (2, 1), (4, 0), (4, 3)])
def test_a_training_that_lost_a_process_goes_on_as_if_it_had_not(folder, undisturbed, count, lost):
    name = f"lost-{count}-{lost}"
    with training(folder, name, count, 1, *longer(count)) as processes:
        processes.wait_for(lambda: finished_steps(folder / name))
        processes.started[lost].kill()
        began = time.monotonic()
        codes = {processes.code(process) for process in range(count) if process != lost}
        assert codes == {EXIT_WATCHDOG}
        assert time.monotonic() - began < 30
    assert max(lines(folder / name)) < 100
    resumed = trained(folder, name, count, 1, *longer(count))
    # the same processes, so the same order of every sum: not one bit differs
    assert {step: line["loss"] for step, line in resumed.items()} == {
        step: line["loss"] for step, line in undisturbed(count).items()
    }
    assert_same(undisturbed(count), resumed)


@pytest.mark.chaos
@pytest.mark.parametrize(("before", "after"), [((2, 1), (1, 2)), ((1, 2), (2, 1))])
def test_a_run_goes_on_with_another_number_of_processes(folder, one_process, two_processes, before, after):
    name = f"from-{before[0]}-to-{after[0]}"
    shutil.copytree(folder / ("two" if before[0] == 2 else "one"), folder / name)
    shutil.rmtree(folder / name / "checkpoints" / "4")
    assert_same(one_process, trained(folder, name, *after))


def lines_if_any(workdir: Path) -> dict[int, dict]:
    return lines(workdir) if (workdir / "metrics.jsonl").exists() else {}


@pytest.mark.system
def test_a_training_whose_others_do_not_come_fails_before_it_writes_anything(folder):
    [first, _] = environments(2)
    alone = first | {"JAXGPT_JOIN_TIMEOUT": "1"}
    command = ["-m", "jaxgpt", "train", "--config", folder / "config.toml", "--workdir", folder / "alone"]
    with started(folder / "alone-output", [command], [alone]) as processes:
        assert processes.code(0) == EXIT_WATCHDOG
    [line] = processes.output(0).splitlines()
    assert line.startswith("failed: the processes did not join: no sign of process 1 of 2 within 1 s at 127.0.0.1:")
    assert not (folder / "alone").exists()
