"""The work folder of a preparation: the output of each stage, in files of some MB that are whole or absent.

A stage is a map over chunks, numbered as they were read. A chunk whose file exists is done, so a preparation that was
killed continues where it was, and processes and machines share nothing else.

    .{name}.work/  lock  sizes.json  read.json  plan.json  rows.npy  tokenizer/
                   read-00000.parquet   documents as they come from the source
                   clean-00000.parquet  cleaned documents, and .json with counts of changed and dropped ones
                   tokens-00000.npz     their tokens, and .json with counts
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.storage.files import new_file

LAYOUT = 3  # version of the files in the work folder


@dataclasses.dataclass(frozen=True)
class WorkFolder:
    """The folder in which a preparation keeps its chunks."""

    path: Path

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def rows(self, stage: str, number: int) -> Path:
        """File of the documents of chunk `number` after `stage` ("read", "clean")."""
        return self.path / f"{stage}-{number:05}.parquet"

    def tokens(self, number: int) -> Path:
        """File of the tokens of chunk `number`."""
        return self.path / f"tokens-{number:05}.npz"

    def counts(self, stage: str, number: int) -> Path:
        """File of the counts of `stage` for chunk `number`; written before the chunk itself."""
        return self.path / f"{stage}-{number:05}.json"

    def refusal(self, number: int) -> Path:
        """File in which another machine says why chunk `number` cannot be prepared."""
        return self.path / f"refused-{number:05}.txt"


@contextlib.contextmanager
def held_work_folder(final: Path, versions: dict[str, int | str]) -> Iterator[WorkFolder]:
    """The work folder of the dataset `final`, locked for this process; it stays when the block ends with an error.

    The same settings find it again. Waits for another process that prepares the same dataset. Files made with other
    `versions` are deleted, and so is everything after a UserError: a correction changes the settings or the source,
    and with them the folder's name.

    The lock is the kernel's and ends with its process. On a file system whose locks do not reach other machines, two
    of them may do the same work twice and write the same files.
    """
    path = final.parent / f".{final.name}.work"
    lock = _locked(path)
    try:
        _start_over_if_changed(path, {"layout": LAYOUT, **versions})
        try:
            yield WorkFolder(path.resolve())
        except UserError:
            WorkFolder(path).remove()
            with contextlib.suppress(OSError):  # it holds other datasets
                path.parent.rmdir()
            raise
    finally:
        os.close(lock)


def _locked(path: Path) -> int:
    """The open lock file of the folder; waits until it is free."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise UserError(f"data.prepared_dir = {path.parent}: cannot be made ({error.strerror})") from None
        with contextlib.suppress(FileNotFoundError):  # its last owner has just removed the folder
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            _wait_for(lock, path)
            if _is_at(lock, path / "lock"):
                owner = f"process {os.getpid()} on {socket.gethostname()}".encode()
                os.ftruncate(lock, 0)
                os.pwrite(lock, owner, 0)
                return lock
            os.close(lock)


def _wait_for(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 200, 0).decode(errors="replace") or "another process"
        print(f"prepared data: {owner} prepares it in {path}; waiting for it", file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: two processes may work at once, and write the same files
        return


def _is_at(lock: int, path: Path) -> bool:
    """Whether the open file still has that name."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False


def _start_over_if_changed(path: Path, versions: dict[str, int | str]) -> None:
    file = path / "sizes.json"
    if file.exists() and read_json(file) == versions:
        return
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
    write_json(file, versions)


def write_json(path: Path, content: object) -> None:
    # Shared: two processes may write the same chunk at once (Beam tries a task again; some file systems have no locks).
    with new_file(path, shared=True) as file:
        file.write(json.dumps(content, ensure_ascii=False).encode(errors="replace"))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


SPLIT_CODES = {None: 0, "train": 1, "validation": 2}


@dataclasses.dataclass
class Rows:
    """Documents, or parts of long ones, column by column."""

    texts: list[str] = dataclasses.field(default_factory=list)
    splits: list[int] = dataclasses.field(default_factory=list)  # SPLIT_CODES of the split that the source assigns
    parts: list[int] = dataclasses.field(default_factory=list)  # number of the mixture's source
    numbers: list[int] = dataclasses.field(default_factory=list)
    """Number of the document in the order of reading; the same in all parts of a long one."""
    continues: list[bool] = dataclasses.field(default_factory=list)  # the row before it
    wheres: list[str] = dataclasses.field(default_factory=list)  # file and line of a conversation; empty for text
    contents: list[bytes] = dataclasses.field(default_factory=list)  # SHA-256 of the text
    sizes: list[int] = dataclasses.field(default_factory=list)  # bytes of the text
    signatures: list[bytes] = dataclasses.field(default_factory=list)
    """What duplicates are found by (duplicates.py); empty if [cleaning] does not drop duplicates."""

    def __len__(self) -> int:
        return len(self.numbers)

    def append(self, text: str, split: int, part: int, number: int, continues: bool, where: str = "") -> None:
        """Add a row without a signature."""
        self.texts.append(text)
        self.splits.append(split)
        self.parts.append(part)
        self.numbers.append(number)
        self.continues.append(continues)
        self.wheres.append(where)
        content = text.encode()
        self.contents.append(hashlib.sha256(content).digest())
        self.sizes.append(len(content))


_COLUMNS = ("texts", "splits", "parts", "numbers", "continues", "wheres", "contents", "sizes", "signatures")


def write_rows(path: Path, rows: Rows) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    types = (
        *(pa.large_string(), pa.int8(), pa.int32(), pa.int64(), pa.bool_()),
        *(pa.large_string(), pa.binary(32), pa.int64(), pa.large_binary()),
    )
    columns = {name: pa.array(getattr(rows, name), kind) for name, kind in zip(_COLUMNS, types, strict=True)}
    if not rows.signatures:
        del columns["signatures"]
    with new_file(path, shared=True) as file:
        parquet.write_table(pa.table(columns), file, compression="lz4", use_dictionary=False, write_statistics=False)


def read_rows(path: Path, columns: Sequence[str] = _COLUMNS) -> Rows:
    """The rows of a chunk; only `columns` of Rows are read, the others stay empty."""
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        there = [name for name in columns if name in file.schema_arrow.names]
        table = file.read(there, use_threads=False)
    return Rows(**{name: table.column(name).to_pylist() for name in there})
