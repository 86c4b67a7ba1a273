"""Which processes hold a file, and what they are, as /proc tells."""

import os
from pathlib import Path


def lock_owners(lock: Path, root: Path) -> list[int]:
    """The processes that lock a file, by the kernel's list: it names those of other users too."""
    status = lock.stat()
    wanted = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    pids = []
    try:
        lines = (root / "proc/locks").read_text().splitlines()
    except OSError:
        return []
    for line in lines:  # 1: POSIX  ADVISORY  WRITE 4711 fe:00:2146491 0 EOF
        fields = [field for field in line.split() if field != "->"]  # an arrow: it waits for the lock
        if "->" in line or len(fields) < 6:
            continue
        major, minor, inode = fields[5].split(":")
        if (int(major, 16), int(minor, 16), int(inode)) == wanted and fields[4].isdigit():
            pids.append(int(fields[4]))
    return pids


def file_users(files: tuple[str, ...], root: Path) -> list[int]:
    """The processes that have one of the files open, as far as this user may see."""
    pids = []
    for folder in root.glob("proc/[0-9]*"):
        try:
            opened = {os.readlink(link) for link in (folder / "fd").iterdir()}
        except OSError:  # ended by now, or another user's
            continue
        if opened & set(files):
            pids.append(int(folder.name))
    return pids


def describe(pid: int, root: Path) -> str:
    """process 4711 (python -m jaxgpt.train --config ...); of the command line only the beginning, never a secret."""
    try:
        words = (root / f"proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return f"process {pid}"
    hidden = ("key", "token", "secret", "password")
    words = [word for word in words[:6] if word and not any(name in word.lower() for name in hidden)]
    return f"process {pid} ({' '.join(words)[:120]})" if words else f"process {pid}"
