"""Several real processes that join over the loopback interface, each with CPU devices of its own.

Each process runs this file as a program, `python tests/processes.py FOLDER FAULT`: the loop of a training without the
training (join, watch, vote, step), which starts in two seconds. FAULT is the fault of this process, or empty.
"""

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jaxgpt import cli
from jaxgpt.errors import StorageFailed
from jaxgpt.parallel.local_launch import local_environments

HOST_TIMEOUT = 3.0
STOP_AT, FAIL_AT = 5, 5


@cli.command
def main(argv=None) -> None:
    from jaxgpt.parallel import distributed

    folder, fault = Path(sys.argv[1]), sys.argv[2]
    distributed.join("auto", HOST_TIMEOUT)
    import jax

    from jaxgpt.parallel.host_watch import PeerWatch
    from jaxgpt.training.signals import record_lost_host

    ended_well, process = False, jax.process_index()
    try:
        reached = [0]
        with PeerWatch(HOST_TIMEOUT, lambda: reached[0], functools.partial(record_lost_host, folder / "run")):
            vote = distributed.StopVote()
            received = distributed.broadcast_from_writer(2**40 + 1 if process == 0 else 0)
            print(f"process {process} of {jax.process_count()} received {received}", flush=True)
            for step in range(3000):
                reached[0] = step
                if step == 3:
                    (folder / f"runs-{process}").touch()
                if step == FAIL_AT and fault == "fails":
                    raise StorageFailed("the disk is full")
                if vote.poll(step == STOP_AT and fault == "stops"):
                    print(f"stopped at {step}", flush=True)
                    break
                time.sleep(0.02)
        ended_well = True
    finally:
        distributed.leave(ended_well)


@dataclasses.dataclass
class Processes:
    """Started processes, what they write, and how they end."""

    started: list[subprocess.Popen]
    folder: Path

    def wait_until_they_run(self) -> None:
        self.wait_for(lambda: all((self.folder / f"runs-{n}").exists() for n in range(len(self.started))))

    def wait_for(self, condition) -> None:
        """Wait for `condition()`; fails when one of them ends before."""

        def holds() -> bool:
            ended = [number for number, process in enumerate(self.started) if process.poll() is not None]
            assert not ended, "\n".join(self.output(number) for number in ended)
            return condition()

        wait_for(holds, 120)

    def code(self, process: int, seconds: float = 120) -> int:
        return self.started[process].wait(seconds)

    def output(self, process: int) -> str:
        return (self.folder / f"output-{process}").read_text()


@contextlib.contextmanager
def started(folder: Path, commands: list[list], environments: list[dict[str, str]]) -> Iterator[Processes]:
    """Start Python with each command in its environment, output to `folder`; what still runs at the end is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    running = []
    try:
        for number, (words, environment) in enumerate(zip(commands, environments, strict=True)):
            with open(folder / f"output-{number}", "w") as output:
                command = [sys.executable, *map(str, words)]
                running.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        yield Processes(running, folder)
    finally:
        for process in running:
            process.kill()
            process.wait()


def joined(folder: Path, count: int, faults: dict[int, str] | None = None):
    """`count` processes of this file; `faults`: process -> its fault."""
    commands = [[__file__, folder, (faults or {}).get(number, "")] for number in range(count)]
    return started(folder, commands, environments(count))


def environments(count: int, devices_each: int = 1) -> list[dict[str, str]]:
    """The environments that launch sets, with the tests' compiler options."""
    return [
        place | {"XLA_FLAGS": place["XLA_FLAGS"] + " --xla_backend_optimization_level=0"}
        for place in local_environments(count, devices_each)
    ]


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


if __name__ == "__main__":
    sys.exit(main())
