"""Files and folders that are whole or absent: the one place that replaces, appends and flushes.

After a return from any function here its result is on disk: a power cut cannot take it back or leave half of it.
"""

import contextlib
import errno
import glob
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from jaxgpt.errors import UserError


def fsync(path: Path) -> None:
    """Have the kernel write a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block whose OSErrors name `path`, as the system names no file when a write fails."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def new_file(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` when the block ends well, and else disappears.

    `shared`: several processes may write `path` at once, so each gets a temporary name of its own.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}" if shared else path.name + ".tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8: a reader finds the old content or the new, never a part."""
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append_json(path: Path, record: dict[str, object]) -> None:
    """Add one line to a JSON-lines file."""
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file, none where it is absent; a line that is being written is left out."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [each for each in found if isinstance(each, dict)]


@contextlib.contextmanager
def new_folder(final: Path, existing: Literal["refuse", "replace", "keep"] = "refuse") -> Iterator[Path]:
    """A folder to fill, which is called `final` once the block has ended well, and else disappears.

    `existing` says what happens to a folder that has the name already: it is refused (at once), it is replaced once
    the new one is on disk, or it is kept and the new one dropped, as when two processes make the same folder.
    What a killed process of this host left is removed by the next one.

    Raises:
        UserError: `final` exists and is refused, or its parent cannot be made.
    """
    final = Path(os.path.abspath(final))  # "." has no name to put a word before
    old = final.with_name(f".{final.name}.old")
    if existing == "replace" and old.exists() and not final.exists():  # killed between the two renames below
        os.rename(old, final)
    if existing == "refuse":
        check_new(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{final.parent}: the folder cannot be made ({error.strerror})") from None
    host = socket.gethostname()
    for leftover in final.parent.glob(f".{glob.escape(final.name)}.{host}.*.partial"):
        pid = leftover.name.split(".")[-3]
        if not pid.isdecimal():
            continue  # somebody else's
        if int(pid) == os.getpid() or not _is_alive(int(pid)):  # a restarted container gets the same pid again
            shutil.rmtree(leftover, ignore_errors=True)
    partial = final.with_name(f".{final.name}.{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        with naming(final):
            yield partial
        for path in [*partial.rglob("*"), partial]:
            fsync(path)
        if existing == "replace" and final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        try:
            os.rename(partial, final)
        except OSError as error:
            if existing != "keep" or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        fsync(final.parent)
        if existing == "replace":
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Raise `UserError` where `folder` is a file, or holds something."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists already; choose another name, or remove it first")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # another error: it is alive, and another user's
    return True
