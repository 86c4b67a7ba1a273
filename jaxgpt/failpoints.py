"""Named points in preparing, reading, saving, cleaning up and resuming where a test can make this process die or fail.

    JAXGPT_FAILPOINT=save.renamed:kill python -m jaxgpt.train ...      the first time
    JAXGPT_FAILPOINT=save.arrays:full@3                                the third time
    JAXGPT_FAILPOINT=save.begin:term,data.read:hang@7                  both

`kill` sends SIGKILL, `term` SIGTERM, `full` raises the error of a full disk, `hang` waits for ever. Without the
variable, a failpoint only reads the environment.
"""

import collections
import errno
import os
import signal
import time

# The points of a preparation, in order, which a run with prepared data does not pass; and those of a run.
PREPARING = ("prepare.read", "prepare.clean", "prepare.decided", "prepare.tokenize", "prepare.write")
POINTS = (
    "lease.taken", "clean.begin", "clean.done", "verify.begin", "verify.damaged", "restore.begin", "restore.done",
    "data.read", "evaluate",
    "save.begin", "save.started", "save.arrays", "save.metadata", "save.manifest", "save.renamed",
    "delete.renamed", "delete.done",
)  # fmt: skip

_passes: collections.Counter[str] = collections.Counter()  # per point, for @N


def failpoint(name: str) -> None:
    """Do what JAXGPT_FAILPOINT asks for, if it names this point."""
    for wanted in os.environ.get("JAXGPT_FAILPOINT", "").split(","):
        if wanted.startswith(f"{name}:"):
            _passes[name] += 1
            action, _, number = wanted.removeprefix(f"{name}:").partition("@")
            if _passes[name] == int(number or 1):
                _do(action, name)


def _do(action: str, name: str) -> None:
    if action in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGTERM)
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"(failpoint {name})")
    elif action == "hang":
        time.sleep(1e9)
    else:
        raise ValueError(f"JAXGPT_FAILPOINT={name}:{action}: kill, term, full or hang, not {action}")
