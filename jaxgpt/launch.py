"""Several processes on this machine as one run: `python -m jaxgpt.launch --local-procs 2 -- train --config FILE`.

For trying the code path of a pod without one: each process is what a host would be, with CPU devices of its own,
joined by jax over the loopback interface. Their output carries the process's number, [1]. What is sent to the
launcher (SIGTERM, Ctrl-C) goes to all. It exits as the first process that failed.
"""

import argparse
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

from jaxgpt import cli
from jaxgpt.errors import UserError

JOINING_VERBS = ("train",)
_PR_SET_PDEATHSIG = 1  # prctl(2)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("launch", __doc__)
    parser.usage = "%(prog)s --local-procs N [--devices-per-proc M] -- train --config FILE [options]"
    parser.add_argument("--local-procs", metavar="N", type=int, required=True, help="processes to start")
    parser.add_argument("--devices-per-proc", metavar="M", type=int, default=1, help="CPU devices of each [default 1]")
    parser.add_argument(
        "--grace", metavar="S", type=float, default=60.0, help="seconds to end, once one has failed [default 60]"
    )
    parser.add_argument("verb", nargs=argparse.REMAINDER, metavar="...", help="the verb to run, and its arguments")
    arguments = parser.parse_args(argv)
    for name in ("local_procs", "devices_per_proc"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} = {getattr(arguments, name)}, but it must be 1 or more")
    verb = [word for word in arguments.verb if word != "--"] if arguments.verb[:1] == ["--"] else arguments.verb
    if not verb or verb[0] not in JOINING_VERBS:
        given = f"not {verb[0]!r}" if verb else "and there is nothing after --"
        raise UserError(
            f"launch runs {' or '.join(JOINING_VERBS)}, {given}; for example: launch --local-procs 2 -- train"
        )
    environments = local_environments(arguments.local_procs, arguments.devices_per_proc)
    return run_together([sys.executable, "-m", "jaxgpt", *verb], environments, arguments.grace)


def local_environments(num_processes: int, devices_each: int) -> list[dict[str, str]]:
    """The environment of each process: this one's, with its place in the run and its number of CPU devices."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    common = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices_each}"]),
        "JAXGPT_COORDINATOR": f"127.0.0.1:{port}",
        "JAXGPT_NUM_PROCESSES": str(num_processes),
        "PYTHONUNBUFFERED": "1",
    }
    return [common | {"JAXGPT_PROCESS_ID": str(number)} for number in range(num_processes)]


def run_together(command: Sequence[str], environments: Sequence[dict[str, str]], grace_seconds: float) -> int:
    """Run `command` once in each environment; the exit code of the first that failed, 0 if none did.

    A death by signal s counts as 128 + s. Once one has failed, the others have `grace_seconds` to end.
    """
    processes = [_start(command, environment) for environment in environments]
    writing = threading.Lock()
    readers = [threading.Thread(target=_relay, args=(n, p, writing), daemon=True) for n, p in enumerate(processes)]
    for reader in readers:
        reader.start()
    handlers = {number: signal.signal(number, _forward_to(processes)) for number in (signal.SIGTERM, signal.SIGINT)}
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


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    prctl = ctypes.CDLL(None).prctl  # found here, because little is safe between fork and exec

    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
        preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # also when the launcher itself is killed
    )


def _relay(number: int, process: subprocess.Popen, writing: threading.Lock) -> None:
    """Each line whole, so that lines of different processes never mix."""
    for line in process.stdout:
        # Where the reader of our output left (`| head`), we read on: the processes must not block on theirs.
        with writing, contextlib.suppress(OSError):
            sys.stdout.buffer.write(f"[{number}] ".encode() + line.removesuffix(b"\n") + b"\n")
            sys.stdout.buffer.flush()


def _forward_to(processes: Sequence[subprocess.Popen]):
    def forward(number: int, frame) -> None:
        for process in processes:
            process.send_signal(number)

    return forward


def _wait(processes: Sequence[subprocess.Popen], grace_seconds: float) -> int:
    """Until all ended, or the grace after the first failure is over."""
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


if __name__ == "__main__":
    sys.exit(main())
