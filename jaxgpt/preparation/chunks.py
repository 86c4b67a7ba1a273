"""The work folder of a preparation: what each stage leaves for the next, in files of some MB that are whole or absent.

The idea: a stage is a map over chunks, numbered as they were read. Where its file for a chunk exists, that chunk is
done; so a preparation that was killed goes on where it was, and processes and machines need to share nothing else.

    .{name}.work/  lock  sizes.json  read.json  plan.json  rows.npy  tokenizer/
                   read-00000.parquet   documents as they come from the source
                   clean-00000.parquet  those that are left after cleaning, and .json with what was dropped and changed
                   tokens-00000.npz     their tokens, and .json with what was counted
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
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxgpt.errors import UserError

LAYOUT = 2  # of the files in the work folder


@dataclasses.dataclass(frozen=True)
class WorkFolder:
    """Where a preparation keeps its chunks."""

    path: Path

    def rows(self, stage: str, number: int) -> Path:
        """Documents of chunk `number` as `stage` ("read", "clean") left them."""
        return self.path / f"{stage}-{number:05}.parquet"

    def tokens(self, number: int) -> Path:
        return self.path / f"tokens-{number:05}.npz"

    def counts(self, stage: str, number: int) -> Path:
        """What `stage` counted in chunk `number`; written before the chunk itself."""
        return self.path / f"{stage}-{number:05}.json"

    def refusal(self, number: int) -> Path:
        """Why chunk `number` cannot be prepared, in a user's words, where another machine found it out."""
        return self.path / f"refused-{number:05}.txt"


def work_folder_of(final: Path) -> Path:
    """Where a preparation of the dataset `final` works: the same settings find it again."""
    return final.parent / f".{final.name}.work"


@contextlib.contextmanager
def held_work_folder(final: Path, sizes: dict[str, int]) -> Iterator[WorkFolder]:
    """The work folder of `final`, this process the only one in it; kept when the block ends with an error.

    Another process that prepares the same is waited for. What was left by one with other `sizes` is thrown away. So is
    all after a user's mistake: what is corrected changes the settings or the source, and so the folder's name.

    The lock is the kernel's and ends with its process. On a file system whose locks do not reach other machines two of
    them may do the same work twice; they write the same files.

    Raises:
        UserError: the folder cannot be made.
    """
    path = work_folder_of(final)
    lock = _locked(path)
    try:
        _start_over_if_changed(path, {"layout": LAYOUT, **sizes})
        try:
            yield WorkFolder(path.resolve())
        except UserError:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # other datasets are in it
                path.parent.rmdir()
            raise
    finally:
        os.close(lock)


def remove(work: WorkFolder) -> None:
    shutil.rmtree(work.path, ignore_errors=True)


def _locked(path: Path) -> int:
    """An open lock of the folder; waits for who holds it."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise UserError(f"data.prepared_dir = {path.parent}: cannot be made ({error.strerror})") from None
        with contextlib.suppress(FileNotFoundError):  # the one who had it has just removed the folder
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
    except OSError:  # a file system without locks: two may work at once, and write the same
        return


def _is_at(lock: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False


def _start_over_if_changed(path: Path, sizes: dict[str, int]) -> None:
    file = path / "sizes.json"
    if file.exists() and read_json(file) == sizes:
        return
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
    write_json(file, sizes)


# ---------------------------------------------------------------- files that are whole or absent


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8", errors="replace")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with whole(path) as temporary, open(temporary, "wb") as file:  # NumPy would add a suffix to a name
        np.savez(file, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


# ---------------------------------------------------------------- rows of documents

SPLIT_CODES = {None: 0, "train": 1, "validation": 2}


@dataclasses.dataclass
class Rows:
    """Documents, or parts of long ones, column by column."""

    texts: list[str] = dataclasses.field(default_factory=list)
    splits: list[int] = dataclasses.field(default_factory=list)
    """SPLIT_CODES of the split that the source gives."""
    parts: list[int] = dataclasses.field(default_factory=list)
    """Number of the mixture's source."""
    numbers: list[int] = dataclasses.field(default_factory=list)
    """Number of the document in the order of reading; a long one's parts have the same."""
    continues: list[bool] = dataclasses.field(default_factory=list)
    """It goes on where the row before it ended."""
    wheres: list[str] = dataclasses.field(default_factory=list)
    """File and line of a conversation; empty for text."""
    contents: list[bytes] = dataclasses.field(default_factory=list)
    """SHA-256 of the text."""
    signatures: list[bytes] = dataclasses.field(default_factory=list)
    """What duplicates are known by; empty where nobody looks for them."""

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
        self.contents.append(hashlib.sha256(text.encode()).digest())


_COLUMNS = ("texts", "splits", "parts", "numbers", "continues", "wheres", "contents", "signatures")


def write_rows(path: Path, rows: Rows) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    types = (
        *(pa.large_string(), pa.int8(), pa.int32(), pa.int64(), pa.bool_()),
        *(pa.large_string(), pa.binary(32), pa.large_binary()),
    )
    columns = {name: pa.array(getattr(rows, name), kind) for name, kind in zip(_COLUMNS, types, strict=True)}
    if not rows.signatures:
        del columns["signatures"]
    with whole(path) as temporary:
        parquet.write_table(
            pa.table(columns), temporary, compression="lz4", use_dictionary=False, write_statistics=False
        )


def read_rows(path: Path, columns: Sequence[str] = _COLUMNS) -> Rows:
    """The rows of a chunk; `columns` names those of Rows that are wanted, the others stay empty."""
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        there = [name for name in columns if name in file.schema_arrow.names]
        table = file.read(there, use_threads=False)
    return Rows(**{name: table.column(name).to_pylist() for name in there})
