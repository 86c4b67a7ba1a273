"""Starts several processes on this machine, each with its place in one run, and waits for all of them."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from jaxgpt.errors import stop_signals
from jaxgpt.parallel.cluster_env import COORDINATOR, NUM_PROCESSES, PROCESS_ID

_PR_SET_PDEATHSIG = 1  # prctl(2)


def local_environments(num_processes: int, devices_each: int) -> list[dict[str, str]]:
    """The environment of each process: this one's, with its place in the run and its number of CPU devices."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    common = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices_each}"]),
        COORDINATOR: f"127.0.0.1:{port}",
        NUM_PROCESSES: str(num_processes),
        "PYTHONUNBUFFERED": "1",
    }
    return [common | {PROCESS_ID: str(number)} for number in range(num_processes)]


def run_together(command: Sequence[str], environments: Sequence[dict[str, str]], grace_seconds: float) -> int:
    """Run `command` once in each environment; the exit code of the first that failed, 0 if none did.

    A death by signal s counts as 128 + s. Once one has failed, the others have `grace_seconds` to end.
    """
    prctl = ctypes.CDLL(None).prctl  # found here, because little is safe between fork and exec
    processes = [
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only the launcher, which passes it on once
            preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # also when the launcher itself is killed
        )
        for environment in environments
    ]
    writing = threading.Lock()
    readers = [threading.Thread(target=_relay, args=(n, p, writing), daemon=True) for n, p in enumerate(processes)]
    for reader in readers:
        reader.start()

    def forward(number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    handlers = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        code = _wait(processes, grace_seconds)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for reader in readers:
        reader.join(5)
    return code


def _relay(number: int, process: subprocess.Popen[bytes], writing: threading.Lock) -> None:
    """Print the output of a process, each line whole, so that lines of different processes never mix."""
    assert process.stdout
    for line in process.stdout:
        # When the reader of our output has left (`| head`), reading goes on: the processes must not block.
        with writing, contextlib.suppress(OSError):
            sys.stdout.buffer.write(f"[{number}] ".encode() + line.removesuffix(b"\n") + b"\n")
            sys.stdout.buffer.flush()


def _wait(processes: Sequence[subprocess.Popen[bytes]], grace_seconds: float) -> int:
    """Wait until all ended, or the grace after the first failure is over; returns the first failure's code."""
    first_failure, deadline = 0, float("inf")
    running = list(processes)
    while running and time.monotonic() < deadline:
        for process in running:
            code = process.poll()
            if code and not first_failure:
                first_failure = code if code > 0 else 128 - code
                deadline = time.monotonic() + grace_seconds
        running = [process for process in running if process.returncode is None]
        time.sleep(0.05)
    if running:
        numbers = ", ".join(str(processes.index(process)) for process in running)
        print(f"launch: process {numbers} still ran {grace_seconds:g} s after another had failed; killed", flush=True)
    return first_failure
