"""The manifest of a folder: the SHA-256 of every file, in a file that is written last.

A folder with a manifest is complete, and a later change of any of its files is found and named. The format is that of
coreutils, so a folder can be checked without this program:

    cd FOLDER && sha256sum --check manifest.sha256
"""

import errno
import fnmatch
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxgpt.errors import UserError
from jaxgpt.storage.files import write_file

NAME = "manifest.sha256"
_TEMPORARY = NAME + ".tmp"  # new_file's
_THREADS = 4  # hashing releases the GIL: two busy cores hash 1.4 GB a second, about what a disk reads
_LINE = re.compile(rb"\\?([0-9a-f]{64})  (.+)\n", re.DOTALL)
# How sha256sum writes these letters of a name; it begins such a line with a backslash.
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


def write(folder: Path) -> None:
    """Record every file below `folder`; when this returns, they and the manifest are on disk.

    Raises:
        OSError: a file cannot be read, the manifest cannot be written, or something is neither a file nor a folder.
    """
    unreadable: list[OSError] = []
    names = sorted(_names(folder, unreadable.append))
    if unreadable:
        raise unreadable[0]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = [digest for digest, _ in pool.map(lambda name: _digest(folder / name, sync=True), names)]
    lines = [_line(digest, name) for digest, name in zip(digests, names, strict=True)]
    write_file(folder / NAME, b"".join(lines))


def add(folder: Path, names: Sequence[str]) -> None:
    """Record files that were written after the manifest, without reading the others again. Raises as `write` does."""
    lines = (folder / NAME).read_bytes().splitlines(keepends=True)
    lines += [_line(_digest(folder / name, sync=True)[0], name) for name in names]
    write_file(folder / NAME, b"".join(lines))


def check(folder: Path, unread: str | None = None) -> None:
    """Raise `UserError` where a file that the folder's manifest lists is not as it was written. See `problems`.

    A folder without a manifest is somebody else's, as what was added to one is.
    """
    if (folder / NAME).exists() and (found := problems(folder, unread=unread, extra=False)):
        raise UserError(
            f"{folder} is damaged: {found[0]}; write it again, or delete {NAME} there if you changed it yourself"
        )


def problems(
    folder: Path, progress: Callable[[int], object] | None = None, *, unread: str | None = None, extra: bool = True
) -> list[str]:
    """The differences between `folder` and its manifest, one short text a file.

    `progress` gets the number of bytes of each file that has been read. Files whose path matches `unread` ("*.bin")
    must exist, and are not read. `extra`: files that are not listed count, too.
    """
    try:
        text = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return [f"{NAME}: missing"]
    except OSError as error:
        return [f"{NAME}: {_reason(error)}"]
    expected, found = _parse(text)
    unreadable: list[OSError] = []
    others = set(_names(folder, unreadable.append)) - set(expected) if extra else set()
    found += [f"{_shown(os.path.relpath(error.filename, folder))}: {_reason(error)}" for error in unreadable]
    listed = sorted(expected)
    if unread:
        trusted = fnmatch.filter(listed, unread)
        found += [f"{_shown(name)}: missing" for name in trusted if not os.path.isfile(folder / name)]
        listed = sorted(set(listed) - set(trusted))
    with ThreadPoolExecutor(_THREADS) as pool:
        compared = pool.map(lambda name: _compare(folder / name, expected[name]), listed)
        for name, (problem, size) in zip(listed, compared, strict=True):
            if problem:
                found.append(f"{_shown(name)}: {problem}")
            if progress:
                progress(size)
    return found + [f"{_shown(name)}: not listed (extra)" for name in sorted(others)]


def _compare(path: Path, expected: str) -> tuple[str | None, int]:
    """(the problem of the file, the number of bytes read)"""
    try:
        digest, size = _digest(path)
    except FileNotFoundError:
        return "missing", 0
    except OSError as error:
        return _reason(error), 0
    if digest == expected:
        return None, size
    return f"changed (sha256 {digest[:8]}… instead of {expected[:8]}…)", size


def _names(folder: Path, unreadable: Callable[[OSError], None]) -> Iterator[str]:
    """Every name below `folder` that is not a folder, relative to it with "/"; links to folders are not followed."""
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in files + links:
            relative = (Path(parent) / name).relative_to(folder).as_posix()
            if relative not in (NAME, _TEMPORARY):
                yield relative


def _digest(path: Path, sync: bool = False) -> tuple[str, int]:
    """(SHA-256, bytes) of a file; with `sync` the kernel has written it to disk, too."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        raise OSError(errno.EINVAL, "not a file", str(path))
    with open(path, "rb", buffering=0) as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


def _line(digest: str, name: str) -> bytes:
    escaped = _escaped(name)
    return os.fsencode(f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n")


def _escaped(name: str) -> str:
    return "".join(_ESCAPES.get(letter, letter) for letter in name)


def _parse(text: bytes) -> tuple[dict[str, str], list[str]]:
    """({name: digest}, problems) of a manifest."""
    digests: dict[str, str] = {}
    damaged = []
    letters = {escape: letter for letter, escape in _ESCAPES.items()}
    for number, line in enumerate(io.BytesIO(text), 1):  # splits at "\n" alone
        digest, name = "", "\0"
        if match := _LINE.fullmatch(line):
            digest = match[1].decode()
            name = re.sub(r"\\[\\nr]", lambda escape: letters[escape[0]], os.fsdecode(match[2]))
        if "\0" not in name and name not in digests and line == _line(digest, name):
            digests[name] = digest
        else:
            damaged.append(f"{NAME}: line {number} is damaged")
    return digests, damaged


def _shown(name: str) -> str:
    """The name as one line that can be printed."""
    return os.fsencode(_escaped(name)).decode("utf-8", "backslashreplace")


def _reason(error: OSError) -> str:
    return f"cannot be read ({error.strerror})"
