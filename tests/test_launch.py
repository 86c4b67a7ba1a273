"""`launch`: real children, their output and exit codes, and none left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import is_alive, wait_for

from jaxgpt import launch
from jaxgpt.parallel.local_launch import local_environments, run_together

NUMBER = "import os, sys, time; number = int(os.environ['JAXGPT_PROCESS_ID'])\n"


def ran(code: str, count: int = 2, grace: float = 30) -> int:
    return run_together([sys.executable, "-c", NUMBER + code], local_environments(count, 1), grace)


@pytest.mark.system
def test_each_process_gets_its_place_and_its_devices(capfd):
    names = "JAXGPT_COORDINATOR JAXGPT_NUM_PROCESSES JAXGPT_PROCESS_ID JAX_PLATFORMS XLA_FLAGS"
    assert ran(f"print(*(os.environ[name] for name in {names.split()}))") == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    assert [line[:4] for line in lines] == ["[0] ", "[1] "]
    first, second = (line[4:].split(" ", 4) for line in lines)
    assert first[0] == second[0] and first[0].startswith("127.0.0.1:")
    assert (first[1:4], second[1:4]) == (["2", "0", "cpu"], ["2", "1", "cpu"])
    assert first[4].count("host_platform_device_count") == 1
    assert first[4].endswith("--xla_force_host_platform_device_count=1")


@pytest.mark.system
def test_lines_of_different_processes_do_not_mix(capfd):
    assert ran("[print(str(number) * 200, flush=True) for _ in range(300)]", count=3) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 900
    assert set(lines) == {f"[{number}] {str(number) * 200}" for number in range(3)}


@pytest.mark.system
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(42)", 42),
        ("sys.exit(42 if number else 0)", 42),
        ("number or time.sleep(0.5); sys.exit(3 if number else 75)", 3),
        ("number or os.kill(os.getpid(), 9); time.sleep(0.5); sys.exit(75)", 137),
    ],
)
def test_the_exit_code_is_that_of_the_first_process_that_failed(code, expected):
    assert ran(code) == expected


@pytest.mark.system
def test_once_one_failed_the_others_have_a_bounded_time(capfd):
    began = time.monotonic()
    assert ran("number or sys.exit(3); time.sleep(60)", grace=0.5) == 3
    assert time.monotonic() - began < 10
    assert "launch: process 1 still ran 0.5 s after another had failed; killed" in capfd.readouterr().out


@pytest.fixture
def launcher(tmp_path):
    """A launcher whose two processes note their own number, and exit with 42 when they are told to stop."""
    code = (
        "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
        f"open(rf'{tmp_path}/{{number}}', 'w').write(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    run = (
        "import sys; from jaxgpt.parallel.local_launch import local_environments, run_together\n"
        f"sys.exit(run_together([sys.executable, '-c', {NUMBER + code!r}], local_environments(2, 1), 30))"
    )
    process = subprocess.Popen([sys.executable, "-c", run])
    wait_for(lambda: all((tmp_path / str(n)).exists() and (tmp_path / str(n)).read_text() for n in range(2)))
    yield process, [int((tmp_path / str(n)).read_text()) for n in range(2)]
    process.kill()


@pytest.mark.system
def test_what_the_launcher_is_sent_reaches_all(launcher):
    process, children = launcher
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 42
    assert not any(map(is_alive, children))


@pytest.mark.system
def test_no_process_outlives_a_launcher_that_is_killed(launcher):
    process, children = launcher
    process.kill()
    wait_for(lambda: not any(map(is_alive, children)), 10)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--", "train"], "--local-procs"),
        (["--local-procs", "0", "--", "train"], "--local-procs = 0, but it must be 1 or more"),
        (["--local-procs", "2", "--devices-per-proc", "0", "--", "train"], "--devices-per-proc = 0"),
        (["--local-procs", "2"], "launch runs train, and there is nothing after --"),
        (["--local-procs", "2", "--", "prepare"], "launch runs train, not 'prepare'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, complaint, capsys):
    assert launch.main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and complaint in line


@pytest.mark.system
def test_the_exit_code_of_what_was_launched_is_the_launchers(tmp_path):
    command = ["-m", "jaxgpt", "launch", "--local-procs", "2", "--", "train", "--config", str(tmp_path / "no.toml")]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ)
    assert result.returncode == 2
    assert "no such config file" in result.stdout
