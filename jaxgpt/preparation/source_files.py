"""Sources that are files: text, HTML, JSON lines, Parquet, dialogues; plain or compressed.

Nothing that could be long is read as a whole: a long text comes in parts, a too long line is skipped without being
held in memory, Parquet is read by row groups.
"""

import bz2
import codecs
import collections
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
from jaxgpt.preparation.documents import NUL, BadRecords, Document, SourceRecord, as_utf8, decoded, holds_nul, not_utf8
from jaxgpt.settings import DataConfig, SourceConfig
from jaxgpt.storage import manifest

T = TypeVar("T")
SUFFIXES = {
    "stdlib": (".py", ".txt"),
    "text": (".txt", ".text", ".md", ".rst", ".py"),
    "html": (".html", ".htm", ".xhtml"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "sgd": (".json",),
}
COMPRESSED = ("text", "html", "jsonl")
ENCODED = ("text", "html", "jsonl")  # sources that data.encoding is for
_OWN = ({manifest.NAME}, {"config.json", "metrics.jsonl"})  # what prepared datasets and checkpoints hold, and runs
# JSON beside data that is no data: what the datasets library and model folders write there.
_SIDE_FILES = ("dataset_info", "dataset_infos", "dataset_dict", "state", "config", "metadata", "schema", "package")
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


def source_files(part: SourceConfig, bad: BadRecords | None = None) -> list[tuple[str, Path]]:
    """(relative path, file) of the source's files, sorted by relative path; a UserError says that there is none.

    The other files are counted in `bad` by their suffix.
    """
    stdlib, root = part.source == "stdlib", source_root(part)
    if not root.exists():
        raise UserError(f"data.path = {root}: no such file or folder")
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise UserError(f"data.path = {root}: neither a file nor a folder, but a pipe or a device; copy it into a file")
    found: list[tuple[str, Path]] = []
    unread: dict[str, list[Path]] = collections.defaultdict(list)
    for file in _walk(root, stdlib, unread):
        suffix = Path(_plain_name(file.name)).suffix or file.suffix
        kind = "hidden" if file.name.startswith(".") else suffix or "without a suffix"
        if _left_out(file.name, stdlib) or not is_read_by(file.name, part.source):
            unread[kind].append(file)
        elif not file.is_file():
            unread["not files" if file.exists() else "dangling links"].append(file)
        else:
            found.append((file.relative_to(root).as_posix(), file))
    if not found:
        raise UserError(f"data.path = {root}: {_no_file(part.source, unread)}")
    if bad is not None and not stdlib:
        for kind, place in sorted((kind, str(file)) for kind, files in unread.items() for file in files):
            bad.unread(kind, place)
    return sorted(found)


def _walk(root: Path, stdlib: bool, unread: dict[str, list[Path]]) -> Iterator[Path]:
    """Everything below `root` that is no folder. A folder that a link leads to is entered once, after all others."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    pending, seen = [root], set()
    for begin in pending:
        for folder, subfolders, names in os.walk(begin, onerror=refuse):
            is_own, key = any(own <= {*names} for own in _OWN), (os.stat(folder).st_dev, os.stat(folder).st_ino)
            if is_own or key in seen:
                unread["jaxgpt's own" if is_own else "links to folders that are read anyway"].append(Path(folder))
                subfolders.clear()
                continue
            seen.add(key)
            subfolders[:] = sorted(name for name in subfolders if not _left_out(name, stdlib))
            pending += [link for name in subfolders if not stdlib and (link := Path(folder, name)).is_symlink()]
            yield from (Path(folder, name) for name in names)


def _no_file(source: str, unread: dict[str, list[Path]]) -> str:
    """Why a folder without a file of the source is refused: what it holds, and the source that reads such files."""
    holds = ", ".join(f"{len(unread[kind]):,} {kind}" for kind in sorted(unread))
    sources = [name for name, suffixes in SUFFIXES.items() if name != "stdlib" and {*suffixes} & {*unread}]
    fix = f': set data.source = "{sources[0]}"' if sources else ""
    wanted = "dialogues*.json" if source == "sgd" else ", ".join(SUFFIXES[source])
    return f"no {wanted} file in this folder" + (f"; it holds {holds}{fix}" if holds else "")


def source_root(part: SourceConfig) -> Path:
    """The file or folder of the source."""
    if part.source == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    assert part.path is not None, "checked with the settings"
    return Path(part.path)


def is_read_by(name: str, source: str) -> bool:
    """Whether the source reads a file of this name."""
    name = _plain_name(name) if source in COMPRESSED else name.lower()
    if source == "sgd":  # schema.json lies beside the dialogues
        return name.startswith("dialogues") and name.endswith(SUFFIXES[source])
    return name.endswith(SUFFIXES[source]) and name not in [f"{side}.json" for side in _SIDE_FILES]


def _plain_name(name: str) -> str:
    """The name in small letters, without the suffix of a compression."""
    stem, suffix = os.path.splitext(name.lower())
    return stem if suffix in _OPENERS else name.lower()


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
def _opened(file: Path, encoding: str) -> Iterator[BinaryIO]:
    """The bytes of the file, decompressed, as UTF-8; a BadRecord says that it is damaged."""
    opener = _OPENERS.get(file.suffix.lower())
    try:
        with opener(file) if opener else open(file, "rb", buffering=1 << 20) as stream:
            yield as_utf8(stream, encoding)
    except UnicodeError as error:
        raise BadRecord(str(file), f"not {encoding}, which data.encoding says: {error}".partition("\n")[0]) from None
    except PermissionError:
        raise UserError(f"{file}: no permission to read it") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if opener is None:
            raise
        raise BadRecord(str(file), f"damaged, or not {file.suffix[1:]}: {error}".partition("\n")[0]) from None


# ---------------------------------------------------------------- text and HTML


def _each_file(part: SourceConfig, bad: BadRecords, read: Callable[[Path], Iterable[T]]) -> Iterator[T]:
    """The items that `read` yields for each file of the source; damaged and empty files go to `bad`."""
    for _, file in source_files(part, bad):
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


def text_documents(part: SourceConfig, bad: BadRecords, data: DataConfig) -> Iterator[Document]:
    """One document for each file; one of more than PART_BYTES or data.max_record_bytes comes in parts."""

    def read(file: Path) -> Iterator[Document]:
        size = min(PART_BYTES, data.max_record_bytes)
        texts = (text for text in _parts(file, size, data.encoding, bad) if text.strip())
        return (Document(text, continues=number > 0) for number, text in enumerate(texts))

    return _each_file(part, bad, read)


def _parts(file: Path, size: int, encoding: str, bad: BadRecords) -> Iterator[str]:
    """The text in consecutive parts of at most `size` bytes.

    A part begins with the white space before a paragraph or line, so that no GPT-2 token crosses a border.
    """
    with _opened(file, encoding) as stream:
        rest = stream.read(3).removeprefix(codecs.BOM_UTF8)  # a byte order mark is not text
        rest += stream.read(size + 1 - len(rest))
        if len(rest) > size:
            _check_text(file, encoding, bad)
        while len(rest) > size:
            border = _border(rest)
            yield decoded(rest[:border], str(file), bad)
            rest = rest[border:]
            rest += stream.read(size + 1 - len(rest))
        yield decoded(rest, str(file), bad)


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


def _check_text(file: Path, encoding: str, bad: BadRecords) -> None:
    """Check all of a long file before its first part is used, so that it is used whole or not at all."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with _opened(file, encoding) as stream:
        while True:
            chunk = stream.read(1 << 20)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise not_utf8(str(file), error.object, error.start, position - held + error.start, bad) from None
            if b"\0" in chunk:
                raise holds_nul(str(file), chunk, bad)
            if not chunk:
                return
            position += len(chunk)


def html_documents(part: SourceConfig, bad: BadRecords, data: DataConfig) -> Iterator[Document]:
    """One document for each page, with its tags: `cleaning.html` extracts the text."""

    def read(file: Path) -> Iterator[Document]:
        with _opened(file, data.encoding) as stream:
            content = stream.read(data.max_record_bytes + 1)
        if len(content) > data.max_record_bytes:
            raise too_long(str(file), data)
        text = decoded(content.removeprefix(codecs.BOM_UTF8), str(file), bad)
        if text.strip():
            yield Document(text)

    return _each_file(part, bad, read)


# ---------------------------------------------------------------- rows


def too_long(where: str, data: DataConfig) -> BadRecord:
    return BadRecord(where, f"longer than data.max_record_bytes = {data.max_record_bytes}")


def jsonl_records(part: SourceConfig, bad: BadRecords, data: DataConfig) -> Iterator[SourceRecord]:
    """One record for each line that is not blank; of a .json file also for each item of a list, or each object."""
    limit = data.max_record_bytes

    def read(file: Path) -> Iterator[tuple[str, Any]]:
        if _plain_name(file.name).endswith(".json"):
            with _opened(file, data.encoding) as stream, contextlib.suppress(ValueError, RecursionError):
                whole = json.loads(stream.read(limit + 1))
                items = whole if isinstance(whole, list) else [whole]
                yield from ((f"{file}, item {number}", item) for number, item in enumerate(items))
                return
        with _opened(file, data.encoding) as stream:  # not one JSON value: JSON lines
            yield from ((f"{file}:{number}", line) for number, line in _lines(stream, limit))

    for where, item in _each_file(part, bad, read):
        try:
            if item is None:
                raise too_long(where, data)
            yield SourceRecord(where, _json_object(item, where, bad))
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


def _json_object(item: Any, where: str, bad: BadRecords) -> dict:
    """The object that a line holds, or that an item of a list is."""
    try:
        text = decoded(item.removeprefix(codecs.BOM_UTF8), where, bad) if isinstance(item, bytes) else None
        record = item if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(where, f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        raise BadRecord(where, f"not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise BadRecord(where, f"a JSON {type(record).__name__}; each line or item must be an object")
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
                groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
                largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
                at_once = min(_PARQUET_ROWS, max(1, PART_BYTES // max(largest, 1)))
                for rows in table.iter_batches(batch_size=at_once, columns=columns):
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
    if isinstance(value, str) and "\0" in value:
        raise BadRecord(record.where, f'{NUL} (field "{field}")')
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise BadRecord(record.where, f'field "{field}" is not text but {kind}; set data.text_field')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"half a character (U+{ord(value[error.start]):04X}) at position {error.start}"
        raise BadRecord(record.where, f'field "{field}" holds {half}, which is not Unicode text') from None
    return value
