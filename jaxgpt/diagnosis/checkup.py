"""The doctor's checkup: runs every probe in a process of its own, prints what they find, and writes it as JSON.

A probe may hang, crash or be killed, and the others still answer. Its process ends itself when its time is up, even if
its parent is gone by then (faulthandler's thread needs no Python, so code that holds the interpreter cannot stop it);
what is left after that, the parent kills with its whole group.
"""

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Literal

from jaxgpt import __version__
from jaxgpt.config import Config
from jaxgpt.diagnosis.finding import NOT_APPLICABLE, OK, PROBLEM, STATUSES, WARNING, Case, Finding
from jaxgpt.errors import UserError

_GRACE = 1.0  # seconds that a child has to end itself before it is killed, and then to be gone


@dataclasses.dataclass(frozen=True)
class Probe:
    """A function from a Case to Findings, run in a process of its own."""

    names: tuple[str, ...]  # of its findings, in their order
    module: str  # in jaxgpt.diagnosis
    function: str
    if_silent: str  # the fix when it hangs or crashes


_HOLDER = "holder"  # found before jax takes the TPU itself
PROBES = (
    Probe(("python", "jax"), "machine", "versions", "make a fresh virtual environment and pip install -e . into it"),
    Probe((_HOLDER,), "accelerators", "holder", "end the processes that hold the TPU; else restart the machine"),
    Probe(("memory", "open files"), "machine", "resources", "restart the machine"),
    Probe(("hosts",), "machine", "joined", "check the name server (/etc/resolv.conf) and the hosts' network"),
    Probe(
        ("run folder", "disk room"), "experiment", "run_folder",
        "its file system does not answer: check its server and mount, or choose another --workdir",
    ),
    Probe(("prepared data",), "experiment", "data", "check the file system of data.prepared_dir and data.path"),
    Probe(("compile cache",), "experiment", "compile_cache", "choose another JAX_COMPILATION_CACHE_DIR"),
    Probe(
        ("accelerator", "arithmetic", "mesh"), "accelerators", "compute",
        "free the device (line holder); on several hosts run doctor on all at once; a slow start: --timeout 120",
    ),
)  # fmt: skip


def examine(
    config: Config,
    workdir: str,
    is_given: bool,
    expect: Literal["tpu", "gpu", "cpu"] | None,
    timeout_seconds: float,
    json_file: Path | None,
) -> bool:
    """Run all probes and print their findings as they come; whether there is no problem.

    `is_given` says that the user gave settings; the time limit is each probe's.

    Raises:
        UserError: `json_file` cannot be written.
    """
    started, findings = time.monotonic(), []
    with contextlib.closing(diagnose(Case(config, workdir, is_given, expect), timeout_seconds)) as answers:
        for finding in answers:
            status = {NOT_APPLICABLE: "-"}.get(finding.status, finding.status)
            print(f"{status:<8} {finding.name:<14} {finding.text}", flush=True)
            if finding.fix:
                print(f"{'':8} {'':14} fix: {finding.fix}", flush=True)
            findings.append(finding)
    seconds = time.monotonic() - started
    counts = {status: sum(finding.status == status for finding in findings) for status in STATUSES}
    bad = [f"{counts[name]} {name}{'s' * (counts[name] > 1)}" for name in (PROBLEM, WARNING) if counts[name]]
    print(f"\n{', '.join(bad) or 'nothing is wrong'}, {counts[OK]} ok, in {seconds:.1f} s")
    if json_file:
        report = {
            "jaxgpt": __version__,
            "host": socket.gethostname(),
            "seconds": round(seconds, 2),
            "healthy": not counts[PROBLEM],
            "findings": [json.loads(finding.to_json()) for finding in findings],
        }
        try:
            json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")  # may be /dev/stdout
        except OSError as error:
            raise UserError(f"--json {json_file} cannot be written ({error})") from None
    return not counts[PROBLEM]


def diagnose(case: Case, seconds: float) -> Generator[Finding, None, None]:
    """Yield the findings of all probes. They run at the same time, but jax waits until the TPU's holder is known."""
    children: list[Child] = []
    try:
        for probe in PROBES:
            if probe is PROBES[-1]:
                next(child for child in children if _HOLDER in child.probe.names).wait()
            children.append(Child(probe, case, seconds))
        for child in children:
            yield from child.findings()
    finally:  # also when the caller stops here, or at Ctrl-C
        for child in children:
            child.kill()


class Child:
    """A probe that runs in its own process."""

    def __init__(self, probe: Probe, case: Case, seconds: float):
        self.probe, self._seconds, self._started = probe, seconds, time.monotonic()
        # Files, not pipes: reading them never waits for a process that still holds the other end.
        self._answers = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, probe.module, probe.function, str(self._started + seconds)],
            stdin=subprocess.PIPE,
            stdout=self._answers,
            stderr=self._complaints,
            start_new_session=True,
        )
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(case.to_json().encode())

    def wait(self) -> None:
        """Wait until it has ended, or its time is up."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(self._started + self._seconds + _GRACE - time.monotonic(), 0))

    def findings(self) -> list[Finding]:
        """Its findings; where some are missing, the first of them says why."""
        self.wait()
        self.kill()
        self._answers.seek(0)
        lines = [line for line in self._answers if line.endswith("\n")]  # the last may be cut short
        found = [Finding(**json.loads(line)) for line in lines]
        if self._process.returncode == 0:
            return found
        reason, stack = self._what_went_wrong()
        first, *others = [name for name in self.probe.names if name not in [finding.name for finding in found]]
        found.append(Finding(first, PROBLEM, reason, self.probe.if_silent, {"stack": stack}))
        return found + [Finding(name, NOT_APPLICABLE, f"not asked: {first} comes before it") for name in others]

    def kill(self) -> None:
        """End it and all that it started. One that waits for the kernel (a dead file server) is left behind."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)

    def _what_went_wrong(self) -> tuple[str, str]:
        """(a line, the stack where it hung)"""
        self._complaints.seek(0)
        complaints = self._complaints.read()
        code = self._process.returncode
        stack = complaints[at:] if (at := complaints.rfind("Timeout (")) >= 0 else ""
        if stack or code in (None, -signal.SIGKILL) and time.monotonic() - self._started >= self._seconds:
            main_thread = stack.split("(most recent call first):")[-1]
            where = re.search(r" in (\w+)$", main_thread, re.MULTILINE)
            gone = "" if code is not None else ", and cannot be killed: it waits for the kernel"
            return f"no answer in {self._seconds:g} s{f' (in {where[1]})' if where else ''}{gone}", stack
        if code < 0:
            return f"crashed: {signal.Signals(-code).name}", ""
        last = [line for line in complaints.splitlines() if line.strip()] or ["no message"]
        return f"failed: {last[-1][:300]}", ""


def main(module: str, function: str, deadline: float) -> None:
    """Run a probe in this process: the case comes on stdin, each finding goes out at once.

    At `deadline`, on the clock of time.monotonic(), which all processes share, it prints its stack and exits.
    """
    faulthandler.dump_traceback_later(max(deadline - time.monotonic(), 0.01), exit=True)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of libraries is no finding
    case = Case.from_json(sys.stdin.read())
    probe = getattr(importlib.import_module(f"jaxgpt.diagnosis.{module}"), function)
    for finding in probe(case):
        print(finding.to_json(), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
