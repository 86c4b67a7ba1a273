"""Runs a probe in a process of its own: it may hang, crash or be killed, and the doctor still answers.

A child ends itself when its time is up (faulthandler's thread needs no Python, so code that holds the interpreter
cannot stop it), even where its parent is gone by then; what is left after that, the parent kills with all its group.
"""

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

from jaxgpt.diagnosis.finding import NOT_APPLICABLE, PROBLEM, Case, Finding

_GRACE = 1.0  # seconds that a child has to end itself before it is killed, and then to be gone


@dataclasses.dataclass(frozen=True)
class Probe:
    """A function from a Case to Findings, and what to say when it does not come back."""

    names: tuple[str, ...]
    """Of its findings, in the order in which it makes them."""
    module: str
    """In jaxgpt.diagnosis."""
    function: str
    if_silent: str
    """The fix where it hangs or crashes."""


class Child:
    """A probe under way."""

    def __init__(self, probe: Probe, case: Case, seconds: float):
        self.probe, self._seconds, self._started = probe, seconds, time.monotonic()
        # Files, not pipes: reading them never waits for somebody who still holds the other end.
        self._answers = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, probe.module, probe.function, str(seconds)],
            stdin=subprocess.PIPE,
            stdout=self._answers,
            stderr=self._complaints,
            start_new_session=True,
        )
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(case.to_json().encode())

    def wait(self) -> None:
        """Until it has ended, or its time is up."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(self._started + self._seconds + _GRACE - time.monotonic(), 0))

    def findings(self) -> list[Finding]:
        """What it found; of the first thing that it did not find, why."""
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
        """End it and all that it started; one that the kernel does not let go (a dead file server) is left behind."""
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


def main(module: str, function: str, seconds: float) -> None:
    """The child's own side: the case comes on stdin, a finding goes out as soon as it is made."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no finding
    case = Case.from_json(sys.stdin.read())
    probe = getattr(importlib.import_module(f"jaxgpt.diagnosis.{module}"), function)
    for finding in probe(case):
        print(finding.to_json(), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
