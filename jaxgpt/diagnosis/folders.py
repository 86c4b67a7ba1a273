"""The folders a run writes to: can they be written, on what file system, and how much room is there?"""

import dataclasses
import errno
import os
import re
import secrets
import shutil
import time
from pathlib import Path

from jaxgpt.diagnosis.finding import OK, PROBLEM, WARNING, Finding
from jaxgpt.diagnosis.machine import in_words

_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs",
    "gcsfuse", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "virtiofs",
}  # fmt: skip
_FLEETING = {
    "tmpfs": "it lies in memory and is gone after a reboot",
    "ramfs": "it lies in memory and is gone after a reboot",
    "overlay": "it lies in the container and is gone with it",
}
_GCSFUSE = "--implicit-dirs --rename-dir-limit=100000"  # by default it renames no folder, and checkpoints are renamed
_FEW_FILES = 10_000  # a checkpoint has dozens, a compile cache hundreds


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder that could be written."""

    exists: bool
    kind: str
    """The file system's type."""
    free: int
    """Bytes that this user may still write."""
    text: str
    facts: dict


def check_folder(name: str, folder: str, fix: str, *, lasting: bool = False) -> tuple[Finding, Place | None]:
    """(finding, place), the place None where nothing can be written.

    `fix` says what to do when another folder is needed; a `lasting` folder should survive a reboot.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", folder):
        return _bucket(name, folder), None
    path = Path(folder).expanduser().absolute()
    there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not there.is_dir():
        what = "a broken symbolic link" if there.is_symlink() and not there.exists() else "a file, not a folder"
        return Finding(name, PROBLEM, f"{folder}: {there} is {what}", fix, {"path": str(path)}), None
    mount, kind = file_system(there)
    try:
        seconds = write_and_rename(there)
    except OSError as error:
        facts = {"path": str(path), "file_system": kind, "errno": errno.errorcode.get(error.errno, "")}
        text = f"{folder}: {there} cannot be written: {error.strerror}"
        return Finding(name, PROBLEM, text, _cure(error, there, mount, kind, fix), facts), None
    free = shutil.disk_usage(there).free
    link = "" if there.resolve() == there else f", by a symbolic link to {there.resolve()}"
    network = f"network file system {kind}" if kind in _NETWORK else kind
    state = "" if there == path else f" (to be made in {there})"
    text = f"{folder}{state}: written in {seconds * 1e3:.0f} ms, {in_words(free)} free on {network} at {mount}{link}"
    facts = {"path": str(path), "file_system": kind, "mount": mount, "free_bytes": free, "seconds": round(seconds, 4)}
    place = Place(there == path, kind, free, text, facts)
    files = os.statvfs(there)
    if files.f_files and files.f_favail < _FEW_FILES:
        return Finding(name, WARNING, f"{text}; only {files.f_favail} more files", "delete files there", facts), place
    if lasting and kind in _FLEETING:
        return Finding(name, WARNING, f"{text}; {_FLEETING[kind]}", fix, facts), place
    return Finding(name, OK, text, facts=facts), place


def _bucket(name: str, folder: str) -> Finding:
    bucket, _, rest = re.sub(r"^[^:]*:/+", "", folder).partition("/")
    text = f"{folder} is a bucket; jaxgpt writes to folders of mounted file systems"
    if not folder.startswith("gs:"):
        return Finding(name, PROBLEM, text, "mount it (s3fs, rclone mount) and give the folder")
    mounted = "/".join(part for part in (f"~/{bucket}", rest.strip("/")) if part)
    mount = f"mkdir -p ~/{bucket} && gcsfuse {_GCSFUSE} {bucket} ~/{bucket}"
    fix = f"{mount}; then give {mounted}"
    return Finding(name, PROBLEM, text, fix)


def write_and_rename(folder: Path) -> float:
    """Seconds to do in small what a checkpoint does: write a file in a folder, force it to the disk, rename the folder.

    Raises:
        OSError: one of them failed; nothing is left behind.
    """
    started, content = time.monotonic(), os.urandom(64 << 10)
    first = folder / f".jaxgpt-doctor-{os.getpid()}-{secrets.token_hex(4)}"
    second = first.with_name(first.name + ".renamed")
    try:
        first.mkdir()
        with (first / "file").open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        first.rename(second)
        if (second / "file").read_bytes() != content:
            raise OSError(errno.EIO, "what is read back is not what was written")
    finally:
        for path in (first, second):
            shutil.rmtree(path, ignore_errors=True)
    return time.monotonic() - started


def _cure(error: OSError, there: Path, mount: str, kind: str, fix: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"make room on {mount} (du -xh {mount} | sort -h | tail), or {fix}"
    if error.errno == errno.EROFS:
        return f"mount -o remount,rw {mount}, or {fix}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"sudo chown -R $USER {there}, or {fix}"
    if kind == "fuse.gcsfuse":
        return f"mount the bucket anew with {_GCSFUSE}, or {fix}"
    return f"{mount} is failing (dmesg tells more): {fix}"


def file_system(folder: Path) -> tuple[str, str]:
    """(mount point, type) of what holds a folder that exists; ("/", "unknown") outside of Linux."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return "/", "unknown"
    path, best = folder.resolve(), ("/", "unknown")
    for line in lines:  # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
        before, _, after = line.partition(" - ")
        mount = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), before.split()[4])
        if path.is_relative_to(mount) and len(mount) >= len(best[0]):  # a later line lies over an earlier one
            best = (mount, after.split()[0])
    return best
