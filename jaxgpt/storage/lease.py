"""One writer for a run folder: a second one is refused, and a dead one's place is taken.

It uses two signs, because each fails somewhere: a kernel lock (flock), which ends with its process but is not visible
on other machines through every network file system; and a heartbeat in the lock's file, which a reader compares with
a later one, so that the clocks of two machines need not agree.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from jaxgpt.errors import UserError
from jaxgpt.failpoints import failpoint

FILE = "lease.json"
BEAT_SECONDS = 3.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux; the host's name elsewhere


class Lease:
    """Context manager: one process of the run holds the folder."""

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._ended = threading.Event()

    def __enter__(self) -> "Lease":
        """Take the folder, which has to exist.

        Raises:
            UserError: a live process holds it; names that process.
        """
        self._file = os.open(self._workdir / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._check_kernel_lock()
            self._check_heartbeat()
        except BaseException:
            os.close(self._file)
            raise
        self._beat()
        self._heart = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        self._heart.start()
        failpoint("lease.taken")
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._heart.join()  # or it might write into the next file with this descriptor
        os.ftruncate(self._file, 0)  # no owner to wait for
        os.close(self._file)

    def _check_kernel_lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(self._read()) from None
        except OSError:
            pass  # a file system without locks: the heartbeat decides alone

    def _check_heartbeat(self) -> None:
        if not (owner := self._read()):
            return
        if owner.get("boot_id") != _boot_id():  # its kernel lock may not be visible from this machine
            print(f"lease    {_name(owner)} held {self._workdir}; waiting to see whether it lives", flush=True)
            deadline = time.monotonic() + 4 * BEAT_SECONDS
            while time.monotonic() < deadline:
                time.sleep(BEAT_SECONDS / 4)
                if self._read() != owner:
                    raise self._refusal(owner)
        print(f"lease    {_name(owner)} left {self._workdir} without a word; taken over", flush=True)

    def _refusal(self, owner: dict) -> UserError:
        return UserError(
            f"{self._workdir} is being written by {_name(owner)}; wait for it, stop it, or choose another --workdir"
        )

    def _read(self) -> dict:
        """The owner's record; {} where there is none, or it was killed while it wrote."""
        try:
            owner = json.loads(os.pread(self._file, 4096, 0))
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}

    def _beat(self) -> None:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": _boot_id(), "beat": time.time()}
        text = json.dumps(owner).encode()
        os.pwrite(self._file, text.ljust(256), 0)  # one length: a reader never sees the end of an older text

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # storage fails for a while: a later beat may come, and flock holds
                self._beat()


def _name(owner: dict) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()
