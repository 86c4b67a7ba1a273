"""Sources that are files: text, HTML, JSON lines, Parquet, dialogues; plain or compressed.

Nothing that could be long is read as a whole: a long text comes in parts, a too long line is skipped without being
held in memory, Parquet is read by row groups.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from jaxgpt.errors import BadRecord, UserError
from jaxgpt.preparation.dialogues import sgd_records
from jaxgpt.preparation.documents import BadRecords, Document, SourceRecord
from jaxgpt.settings import SourceConfig

T = TypeVar("T")
SUFFIXES = {
    "stdlib": (".py", ".txt"),
    "text": (".txt", ".md", ".py"),
    "html": (".html", ".htm"),
    "jsonl": (".jsonl",),
    "parquet": (".parquet",),
    "sgd": (".json",),
}
COMPRESSED = ("text", "html", "jsonl")
PART_BYTES = 8_000_000  # a longer text comes in parts, so that each stage needs at most some hundred MB of memory
_PARQUET_ROWS = 256

# Parts of the standard library that are left out: tests, character tables, generated files (which differ between
# machines), and installed packages.
# fmt: off
_NOT_STDLIB = frozenset([
    "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip",
    "site-packages", "dist-packages", "lib-dynload", "__pycache__", "__phello__",
])
# fmt: on
_NOT_STDLIB_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize", "__hello__")


def source_files(part: SourceConfig) -> list[tuple[str, Path]]:
    """(relative path, file) of the source's files, sorted by relative path; a UserError says that there is none."""
    stdlib, root = part.source == "stdlib", source_root(part)
    if not root.exists():
        raise UserError(f"data.path = {root}: no such file or folder")
    if root.is_file():
        return [(root.name, root)]
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _left_out(name, stdlib)]
        for name in names:
            if _is_of(name, part.source) and not _left_out(name, stdlib):
                file = Path(folder, name)
                found.append((file.relative_to(root).as_posix(), file))
    if not found:
        raise UserError(f"data.path = {root}: no {', '.join(SUFFIXES[part.source])} file in this folder")
    return sorted(found)


def source_root(part: SourceConfig) -> Path:
    """The file or folder of the source."""
    if part.source == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    assert part.path is not None, "checked with the settings"
    return Path(part.path)


def _is_of(name: str, source: str) -> bool:
    if source in COMPRESSED and name.endswith(tuple(_OPENERS)):
        name = name.rpartition(".")[0]
    if source == "sgd":  # schema.json lies beside the dialogues
        return name.startswith("dialogues") and name.endswith(SUFFIXES[source])
    return name.endswith(SUFFIXES[source])


def _left_out(name: str, stdlib: bool) -> bool:
    if stdlib:
        return name in _NOT_STDLIB or name.startswith(_NOT_STDLIB_PREFIXES)
    return name.startswith(".")  # hidden: .git, editors' files


# ---------------------------------------------------------------- opening


def _open_zst(file: Path) -> BinaryIO:
    import pyarrow  # Python's own library reads this format from 3.14 on

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The bytes of the file, decompressed; a BadRecord says that it is damaged."""
    opener = _OPENERS.get(file.suffix)
    try:
        with opener(file) if opener else open(file, "rb", buffering=1 << 20) as stream:
            yield stream
    except PermissionError:
        raise UserError(f"{file}: no permission to read it") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if opener is None:
            raise
        raise BadRecord(str(file), f"damaged, or not {file.suffix[1:]}: {error}".partition("\n")[0]) from None


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error.start, content[error.start]) from None


def _not_utf8(where: str, position: int, byte: int) -> BadRecord:
    fix = "convert it, for example with: iconv -f latin1 -t utf-8"
    return BadRecord(where, f"not UTF-8 at byte {position} (0x{byte:02x}); {fix}")


# ---------------------------------------------------------------- text and HTML


def _each_file(part: SourceConfig, bad: BadRecords, read: Callable[[Path], Iterable[T]]) -> Iterator[T]:
    """The items that `read` yields for each file of the source; damaged and empty files go to `bad`."""
    for _, file in source_files(part):
        count = 0
        try:
            for item in read(file):
                count += 1
                yield item
        except PermissionError:
            raise UserError(f"{file}: no permission to read it") from None
        except BadRecord as error:
            bad.add(error)
        else:
            if not count:
                bad.empty(str(file))


def text_documents(part: SourceConfig, bad: BadRecords, max_record_bytes: int) -> Iterator[Document]:
    """One document for each file; one of more than PART_BYTES or `max_record_bytes` comes in parts."""

    def read(file: Path) -> Iterator[Document]:
        texts = (text for text in _parts(file, min(PART_BYTES, max_record_bytes)) if text.strip())
        return (Document(text, continues=number > 0) for number, text in enumerate(texts))

    return _each_file(part, bad, read)


def _parts(file: Path, size: int) -> Iterator[str]:
    """The text in consecutive parts of at most `size` bytes.

    A part begins with the white space before a paragraph or line, so that no GPT-2 token crosses a border.
    """
    with _opened(file) as stream:
        rest = stream.read(3).removeprefix(codecs.BOM_UTF8)  # a byte order mark is not text
        rest += stream.read(size + 1 - len(rest))
        if len(rest) > size:
            _check_utf8(file)
        while len(rest) > size:
            border = _border(rest)
            yield _decoded(rest[:border], str(file))
            rest = rest[border:]
            rest += stream.read(size + 1 - len(rest))
        yield _decoded(rest, str(file))


def _border(content: bytes) -> int:
    """The place to cut: before the last blank line, line break or space of the second half, else between characters."""
    for separator in (b"\n\n", b"\n", b" "):
        found = content.rfind(separator, len(content) // 2, len(content) - 1)
        if found > 0:
            return len(content[:found].rstrip()) or found
    end = len(content) - 1
    while end > 1 and content[end] & 0xC0 == 0x80:  # the second to fourth byte of a character
        end -= 1
    return end


def _check_utf8(file: Path) -> None:
    """Check all of a long file before its first part is used, so that it is used whole or not at all."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with _opened(file) as stream:
        while True:
            chunk = stream.read(1 << 20)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(str(file), position - held + error.start, error.object[error.start]) from None
            if not chunk:
                return
            position += len(chunk)


def html_documents(part: SourceConfig, bad: BadRecords, max_record_bytes: int) -> Iterator[Document]:
    """One document for each page, with its tags: `cleaning.html` extracts the text."""

    def read(file: Path) -> Iterator[Document]:
        with _opened(file) as stream:
            content = stream.read(max_record_bytes + 1)
        if len(content) > max_record_bytes:
            raise BadRecord(str(file), f"longer than data.max_record_bytes = {max_record_bytes}")
        text = _decoded(content.removeprefix(codecs.BOM_UTF8), str(file))
        if text.strip():
            yield Document(text)

    return _each_file(part, bad, read)


# ---------------------------------------------------------------- rows


def jsonl_records(part: SourceConfig, bad: BadRecords, max_record_bytes: int) -> Iterator[SourceRecord]:
    """One record for each line that is not blank."""

    def read(file: Path) -> Iterator[tuple[str, bytes | None]]:
        with _opened(file) as stream:
            yield from ((f"{file}:{number}", line) for number, line in _lines(stream, max_record_bytes))

    for where, line in _each_file(part, bad, read):
        try:
            if line is None:
                raise BadRecord(where, f"longer than data.max_record_bytes = {max_record_bytes}")
            yield SourceRecord(where, _json_object(line, where))
        except BadRecord as error:
            bad.add(error)


def _lines(stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line) of each line that is not blank; None for a line of more than `limit` bytes."""
    number = 0
    while line := stream.readline(limit + 2):
        number += 1
        if len(line.rstrip(b"\r\n")) > limit:
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)  # skipped without holding more of it
            yield number, None
        elif line.strip():
            yield number, line


def _json_object(line: bytes, where: str) -> dict:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise BadRecord(where, f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise BadRecord(where, f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        raise BadRecord(where, f"not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise BadRecord(where, f"a JSON {type(record).__name__}; each line must be an object")
    return record


def parquet_records(part: SourceConfig, bad: BadRecords, columns: list[str] | None) -> Iterator[SourceRecord]:
    """The rows, numbered from 0 in each file; only their `columns`, if given, which the first file must have."""
    import pyarrow
    import pyarrow.parquet

    first = source_files(part)[0][1]

    def read(file: Path) -> Iterator[tuple[str, pyarrow.RecordBatch, int]]:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                missing = [name for name in columns or [] if name not in table.schema_arrow.names]
                if missing:
                    message = _no_field(missing[0], table.schema_arrow.names)
                    raise UserError(f"{file}: {message}") if file == first else BadRecord(str(file), message)
                for rows in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                    for row in range(len(rows)):
                        yield f"{file}, row {number}", rows, row
                        number += 1
        except PermissionError:
            raise
        except (pyarrow.ArrowException, OSError) as error:
            reason = f"damaged, or not Parquet: {error}".partition("\n")[0]
            raise BadRecord(f"{file}, from row {number} on", reason) from None

    for where, rows, row in _each_file(part, bad, read):
        try:
            values = {name: column[row].as_py() for name, column in zip(rows.schema.names, rows.columns)}
        except UnicodeDecodeError as error:
            bad.add(BadRecord(where, f"not UTF-8 at byte {error.start}"))
        else:
            yield SourceRecord(where, values)


def sgd_dialogues(part: SourceConfig, bad: BadRecords) -> Iterator[SourceRecord]:
    """The dialogues of files in the form of the Schema-Guided Dialogue dataset."""
    return (SourceRecord(where, record) for where, record in _each_file(part, bad, sgd_records))


def _no_field(field: str, names: Iterable[object]) -> str:
    return f'no field "{field}"; it has {", ".join(map(str, names)) or "no field"}: set data.text_field'


def text_of(record: SourceRecord, field: str) -> str:
    """The text in a field of the record; a BadRecord says that it is missing or not text."""
    if field not in record.value:
        raise BadRecord(record.where, _no_field(field, record.value))
    value = record.value[field]
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise BadRecord(record.where, f'field "{field}" is not text but {kind}; set data.text_field')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"half a character (U+{ord(value[error.start]):04X}) at position {error.start}"
        raise BadRecord(record.where, f'field "{field}" holds {half}, which is not Unicode text') from None
    return value
