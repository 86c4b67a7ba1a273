"""One writer for a run folder: a second one is refused, and a dead one's place is taken.

It uses two signs, because each fails somewhere: a kernel lock (flock), which ends with its process but is not visible
on other machines through every network file system, and does not exist on mounted buckets; and a heartbeat in the
lock's file, which a reader compares with a later one, so that the clocks of two machines need not agree. The owner
compares, too: a file that another process wrote or replaced is lost, and whoever lost it stops writing.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from jaxgpt.errors import STORAGE_ERRNOS, FolderLost, UserError
from jaxgpt.failpoints import failpoint

FILE = "lease.json"
BEAT_SECONDS = 3.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux; the host's name elsewhere


class Lease:
    """Context manager: one process of the run holds the folder."""

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._path = workdir / FILE
        process = {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": _boot_id()}
        self.owner: dict = process | {"id": uuid.uuid4().hex, "began": time.time()}
        self.left: dict = {}
        """The record of an owner that ended without a word; "beat" is the last time at which it lived."""
        self._ended = threading.Event()
        self._lost = ""  # why this process holds the folder no more

    def __enter__(self) -> "Lease":
        """Take the folder, which has to exist.

        Raises:
            UserError: a live process holds it; names that process. Or the lock's file cannot be written.
        """
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if error.errno in STORAGE_ERRNOS:
                raise
            raise UserError(
                f"{self._path}: the lock of the run folder cannot be opened ({error.strerror}); remove it"
            ) from None
        try:
            self._has_kernel_lock = self._take_kernel_lock()
            self._check_heartbeat()
            self._write()
            if not self._has_kernel_lock:  # another one may have written at the same moment: the last one has it
                time.sleep(BEAT_SECONDS)
                if (owner := self._read()).get("id") != self.owner["id"]:
                    raise self._refusal(owner)
        except BaseException:
            os.close(self._file)
            raise
        self._heart = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        self._heart.start()
        failpoint("lease.taken")
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._heart.join()  # or it might write into the next file with this descriptor
        if not self._lost:
            os.ftruncate(self._file, 0)  # no owner to wait for
        os.close(self._file)

    def check(self, look: bool = False) -> None:
        """Nothing while this process holds the folder. `look` reads the file; without it the last beat decides.

        Raises:
            FolderLost: another process has taken the folder, or somebody removed the lock.
        """
        if look:
            self._look()
        if self._lost:
            raise FolderLost(f"{self._workdir}: {self._lost}; this process stops and writes nothing more there")

    def _take_kernel_lock(self) -> bool:
        """Whether this file system has locks.

        Raises:
            UserError: another process holds the lock.
        """
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise self._refusal(self._read()) from None
        except OSError:
            return False  # the heartbeat decides alone

    def _check_heartbeat(self) -> None:
        if not (owner := self._read()):
            return
        if owner.get("boot_id") != _boot_id() or not self._has_kernel_lock:  # it may live without a sign of a lock
            print(f"lease    {_name(owner)} held {self._workdir}; waiting to see whether it lives", flush=True)
            deadline = time.monotonic() + 4 * BEAT_SECONDS
            while time.monotonic() < deadline:
                time.sleep(BEAT_SECONDS / 4)
                if self._read() != owner:
                    raise self._refusal(owner)
        print(f"lease    {_name(owner)} left {self._workdir} without a word; taken over", flush=True)
        self.left = owner

    def _refusal(self, owner: dict) -> UserError:
        return UserError(
            f"{self._workdir} is being written by {_name(owner)}; wait for it, stop it, or choose another --workdir"
        )

    def _read(self) -> dict:
        """The owner's record; {} where there is none, or it was killed while it wrote. Opens the file anew: a mounted
        bucket shows the writes of other machines only so."""
        try:
            with open(self._path, "rb") as file:
                owner = json.loads(file.read(4096))
        except (ValueError, RecursionError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _write(self) -> None:
        text = json.dumps(self.owner | {"beat": time.time()}).encode()
        os.pwrite(self._file, text.ljust(320), 0)  # one length: a reader never sees the end of an older text
        if not self._has_kernel_lock:
            os.fsync(self._file)

    def _look(self) -> None:
        """Note whether the folder is still held."""
        try:
            owner = self._read()
            is_replaced = self._has_kernel_lock and not os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            self._lost = f"{FILE}, its lock, was removed"
            return
        except OSError:  # storage fails for a while
            return
        if is_replaced or owner.get("id", self.owner["id"]) != self.owner["id"]:
            self._lost = f"taken over by {_name(owner)}"

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT_SECONDS) and not self._lost:
            self._look()
            if not self._lost:
                with contextlib.suppress(OSError):  # storage fails for a while: a later beat may come
                    self._write()


def _name(owner: dict) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()
