"""The exceptions that more than one room raises or catches, the exit codes of commands, and what stops one at once."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

# What a disk or a mounted bucket says when it is full, broken or no longer writable.
STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
EXIT_DONE, EXIT_FAILED, EXIT_USER, EXIT_RESUME, EXIT_STORAGE, EXIT_WATCHDOG = 0, 1, 2, 42, 74, 75


class UserError(Exception):
    """The user's input is wrong: one line that says what, where, and the fix. Exit code 2."""


def how_to_install(extra: str) -> str:
    """The command that adds the packages of an extra; jaxgpt itself is a clone, and on no package index."""
    clone = Path(__file__).parents[1]
    return f"pip install -e '{clone if (clone / 'pyproject.toml').is_file() else '.'}[{extra}]'"


class BadRecord(ValueError):
    """One record of a data source cannot be used: where it is, and why, each in a few words."""

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)  # both, so that it survives pickling between processes
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class RunFailed(Exception):
    """The run cannot go on, for a reason that fits in a line. Exit code 1, unless a subclass says another one."""

    exit_code = EXIT_FAILED


class StorageFailed(RunFailed):
    """A disk or bucket refused what the run has to write. Exit code 74 (EX_IOERR of sysexits.h)."""

    exit_code = EXIT_STORAGE


class FolderLost(RunFailed):
    """Another process took the run folder, or its lock was removed: nothing more may be written there. Exit code 1."""


class HostLost(RunFailed):
    """A host of the run is dead or hangs. Exit code 75 (EX_TEMPFAIL): run the same command again."""

    exit_code = EXIT_WATCHDOG


class Interrupted(BaseException):
    """A stop signal ended the run, its state is saved: run the same command again. Exit code 42.

    Not an Exception, as KeyboardInterrupt is none: a signal raises it anywhere, and no library may swallow it.
    """


def stop_signals() -> list[signal.Signals]:
    """SIGTERM, Ctrl-C, and the end of the terminal, unless nohup has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


def stop_at_once(import_teller: Callable[[], Callable[[], object]] = lambda: lambda: None) -> None:
    """Have a stop signal end this process with 42 wherever training/signals.py does not handle it: while it imports.

    Nothing is raised, as imports would not survive that. Called before everything else, and only by programs.
    What `import_teller` returns is called before the end, to tell others; a second signal cuts that short.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())  # a handler cannot import what is half imported
    tell_others = import_teller()

    def end(number: int, _: object) -> None:
        tell(f"\nstopped: {signal.Signals(number).name}; run the same command again to go on\n")
        signal.signal(number, lambda *_: os._exit(EXIT_RESUME))
        try:
            tell_others()
        finally:
            os._exit(EXIT_RESUME)

    for number in stop_signals():
        signal.signal(number, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())


def tell(line: str) -> None:
    """Write to stderr by write(2), not print: a handler may interrupt a print that holds the stream's lock."""
    try:
        os.write(2, line.encode())
    except OSError:  # the terminal is gone: nothing that is printed from here on may fail, and cost a step
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
