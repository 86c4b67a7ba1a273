"""Sources of documents: files, public catalogs, made-up dialogues, or a weighted mixture of them.

A source is read from start to end, always in the same order, and is never held in memory as a whole. `source_key` tells
what it holds, wherever it lies; `source_state` tells cheaply, without reading it, whether it is still the same.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os.path
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

from tqdm import tqdm

from jaxgpt.data.chat import from_plain
from jaxgpt.errors import BadRecord, UserError
from jaxgpt.preparation import docstrings, skills, source_files
from jaxgpt.preparation.catalogs import HUGGINGFACE, TFDS, catalog_content, catalog_facts, catalog_splits, tfds_on_disk
from jaxgpt.preparation.dialogues import RECORDS_VERSION, conversation, support_records
from jaxgpt.preparation.documents import BadRecords, Document, SourceRecord, is_utf8
from jaxgpt.settings import DataConfig, SourceConfig, sources_of
from jaxgpt.storage.files import write_file

_CHAT_ONLY = ("skills", "support", "sgd")
_TEXT_ONLY = ("docstrings", "stdlib", "text", "html")
_AT_HAND = ("docstrings", "stdlib", "skills", "support")  # sources that come with Python, its packages and jaxgpt
_REMEMBERED = 64 << 20  # bytes of files whose digests are worth a file that remembers them: a tenth of a second
_ALL_WITHOUT = 100  # records without data.text_field at the beginning: then the setting is wrong, not the records


@dataclasses.dataclass
class Reading:
    """Facts that `documents` gathers for a report; a number for each part of the mixture."""

    num_documents: list[int] = dataclasses.field(default_factory=list)
    num_bytes: list[int] = dataclasses.field(default_factory=list)  # UTF-8 bytes of the documents
    ended_by: int | None = None
    """The part that was exhausted and so ended the mixture; None if data.max_bytes did, or there is only one part."""


def documents(data: DataConfig, bad: BadRecords | None = None, reading: Reading | None = None) -> Iterator[Document]:
    """The documents of `data` without blank ones, up to `data.max_bytes` of UTF-8.

    A document is a text file (a long one in parts), an HTML page, a line of JSON or a row of a table. With `max_bytes`,
    a validation split of a catalog comes first and gets the share `validation_fraction`; the last document is cut
    between two characters, and a last conversation that is too long is left out.

    A mixture ends where a part of it is used up, because continuing would change the shares. In one of conversations, a
    source of text gives documents of text in their canonical form (see chat.py), which may be cut as any text.

    Raises:
        UserError: the source is missing, empty or broken; names the file and the line or byte.
    """
    bad = BadRecords(data.on_bad_record) if bad is None else bad
    reading = Reading() if reading is None else reading
    parts = sources_of(data)
    check_format(data)
    reading.num_documents, reading.num_bytes, reading.ended_by = [0] * len(parts), [0] * len(parts), None
    total = sum(part.weight for part in parts)
    readers = [_nonempty(data, number, bad, part.weight / total) for number, part in enumerate(parts)]
    source = readers[0] if len(parts) == 1 else _mixed(readers, [part.weight for part in parts], reading, data)
    for document in _limited(source, data.max_bytes):
        reading.num_documents[document.part] += not document.continues
        reading.num_bytes[document.part] += len(document.text.encode())
        is_text = data.format == "chat" and not document.where
        yield document._replace(text=from_plain(document.text)) if is_text else document
    if not any(reading.num_documents):
        raise UserError(f"{describe(data)}: no text in it; the corpus is empty{bad.described()}")


def describe(data: DataConfig) -> str:
    """The source as its settings name it, for messages."""
    parts = sources_of(data)
    if data.source == "builtin":
        return 'data.source = "builtin"'
    if len(parts) == 1:
        return _described(parts[0], "data.source")
    return " and ".join(_described(part, f"data.source[{number}]") for number, part in enumerate(parts))


def short_name(data: DataConfig) -> str:
    """A name for folders: "stdlib", the stem of a file or folder, "tfds-NAME"; for a mixture, all of its names."""
    names = ["builtin"] if data.source == "builtin" else []
    for part in () if names else sources_of(data):
        is_file = part.source in source_files.SUFFIXES
        name = Path(os.path.abspath(part.path)).stem if is_file and part.path else part.source
        names.append("".join(c if c.isalnum() and c.isascii() else "-" for c in name).strip("-") or part.source)
    return "-".join(names)[:60].strip("-")


def is_at_hand(data: DataConfig) -> bool:
    """Whether asking for the state of the source does not download it."""
    return all(tfds_on_disk(part) for part in sources_of(data) if part.source.startswith(TFDS))


def source_state(data: DataConfig) -> str:
    """A digest of facts that change with the source on this machine: places, file names, sizes and times.

    Version 0.1 named prepared datasets by it, so they are found while the source stays as it was.
    """
    facts = []
    for lines, found in map(_facts, sources_of(data)):
        stats = ((name, file.stat()) for name, file in found)
        facts += [*lines, *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)]
    return _digest_of(facts)


def source_key(data: DataConfig, memory: Path | None = None) -> str:
    """A digest of what the source holds: the bytes of its files in their order, or the version of a catalog's dataset.

    The digests of large files are kept in the file `memory`, with their sizes and times, and not computed again.
    """
    check_format(data)
    facts: list[str] = []
    for lines, files in map(_content, sources_of(data)):
        facts += [*lines, *_digests(files, memory)]
    return _digest_of(facts)


def _digest_of(facts: list[str]) -> str:
    return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()


def _digests(files: list[Path], memory: Path | None) -> list[str]:
    """The SHA-256 of each file."""
    known: dict[str, list] = {}
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged: then they are computed
        known = json.loads(memory.read_bytes()) if memory else {}
    found: list[str] = []
    total = 0
    for file in tqdm(files, desc="looking at the source", unit="file", disable=None, leave=False):
        name, stat = str(file.resolve()), file.stat()
        state = [stat.st_size, stat.st_mtime_ns]
        if known.get(name, [])[:2] != state:
            try:
                with open(file, "rb", buffering=0) as stream:
                    known[name] = [*state, hashlib.file_digest(stream, "sha256").hexdigest()]
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror})") from None
            total += stat.st_size
        found.append(known[name][2])
    if memory and total >= _REMEMBERED:
        with contextlib.suppress(OSError):  # a folder that cannot be written: they are computed each time
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_file(memory, json.dumps(known))
    return found


def _content(part: SourceConfig) -> tuple[list[str], list[Path]]:
    """Lines that describe what a source holds, and files whose content belongs to it."""
    if part.source in _AT_HAND:
        return _facts(part)[0], []
    if part.source.startswith((TFDS, HUGGINGFACE)):
        return catalog_content(part)
    return [], [file for _, file in source_files.source_files(part)]


def _facts(part: SourceConfig) -> tuple[list[str], list[tuple[str, Path]]]:
    """Lines that describe the state of a source, and files whose sizes and times belong to it."""
    if part.source.startswith((TFDS, HUGGINGFACE)):
        return catalog_facts(part)
    if part.source == "stdlib":  # without times: the same on every machine with this version
        sizes = [f"{name} {file.stat().st_size}" for name, file in source_files.source_files(part)]
        return [platform.python_implementation(), platform.python_version(), *sizes], []
    if part.source == "docstrings":
        return docstrings.packages(), []
    if part.source == "skills":
        return [skills.version()], []
    if part.source == "support":
        return list(RECORDS_VERSION), []
    return [str(source_files.source_root(part).resolve())], source_files.source_files(part)


def _described(part: SourceConfig, name: str) -> str:
    return f'{name} = "{part.source}"' + (f", data.path = {part.path}" if part.path else "")


def check_format(data: DataConfig) -> None:
    """Raise `UserError` if the format, or the encoding, does not fit the source."""
    if not is_utf8(data.encoding) and not any(p.source in source_files.ENCODED for p in sources_of(data)):
        raise UserError(f"data.encoding = {data.encoding} is for {', '.join(source_files.ENCODED)}: leave it out")
    if len(text_parts(data)) == len(parts := sources_of(data)):
        raise UserError(f'data.source = "{parts[0].source}" holds no conversations: set data.format = "text"')
    for part in parts:
        if data.format == "text" and part.source in _CHAT_ONLY:
            raise UserError(f'data.source = "{part.source}" holds conversations: set data.format = "chat"')
    skills.weights(data.skills)


def text_parts(data: DataConfig) -> frozenset[int]:
    """The numbers of the sources that give plain text among conversations; none where all is text."""
    is_chat = data.format == "chat"
    return frozenset(n for n, part in enumerate(sources_of(data)) if is_chat and part.source in _TEXT_ONLY)


def _nonempty(data: DataConfig, number: int, bad: BadRecords, share: float) -> Iterator[Document]:
    """The documents of one part of the mixture, which gives `share` of the text; an error if there is none."""
    part = sources_of(data)[number]
    found = False
    for document in _documents(data, part, bad, data.max_bytes and max(1, int(data.max_bytes * share))):
        found = True
        yield document if number == 0 else document._replace(part=number)
    if not found:
        raise UserError(f"{_described(part, 'data.source')}: no text in it; the corpus is empty{bad.described()}")


def _documents(data: DataConfig, part: SourceConfig, bad: BadRecords, max_bytes: int | None) -> Iterator[Document]:
    if part.source in ("stdlib", "text"):
        data = data if part.source == "text" else dataclasses.replace(data, encoding="utf-8")
        yield from source_files.text_documents(part, bad, data)
    elif part.source == "docstrings":
        yield from docstrings.documents(bad)
    elif part.source == "html":
        yield from source_files.html_documents(part, bad, data)
    elif part.source.startswith((TFDS, HUGGINGFACE)):
        for split, records in catalog_splits(part, bad, part.text_field if data.format == "text" else None):
            share = max_bytes and max(1, int(max_bytes * data.validation_fraction)) if split == "validation" else None
            yield from _limited(_texts(records, data, part, bad), share)
    else:
        yield from _texts(_records(data, part, bad), data, part, bad)


def _records(data: DataConfig, part: SourceConfig, bad: BadRecords) -> Iterator[SourceRecord]:
    if part.source == "jsonl":
        return source_files.jsonl_records(part, bad, data)
    if part.source == "parquet":
        return source_files.parquet_records(part, bad, [part.text_field] if data.format == "text" else None)
    if part.source == "sgd":
        return source_files.sgd_dialogues(part, bad)
    if part.source == "skills":
        return skills.skill_records(data.skills, data.validation_fraction, endless=bool(data.max_bytes))
    return (SourceRecord(f"support, conversation {n}", record) for n, record in enumerate(support_records()))


def _texts(
    records: Iterable[SourceRecord], data: DataConfig, part: SourceConfig, bad: BadRecords
) -> Iterator[Document]:
    """The documents of the records; records without text go to `bad`."""
    is_chat, has_field = data.format == "chat", False
    suspicious = 1 if data.on_bad_record == "refuse" else _ALL_WITHOUT
    for number, record in enumerate(records, 1):
        try:
            if is_chat:
                text = conversation(record.value, record.where, bad.conversations)
            else:
                has_field |= part.text_field in record.value
                text = source_files.text_of(record, part.text_field)
            if len(text.encode()) > data.max_record_bytes:
                raise source_files.too_long(record.where, data)
        except BadRecord as error:
            if number == suspicious and not is_chat and not has_field:  # the setting is wrong
                raise UserError(str(error)) from None
            bad.add(error)
            continue
        if text.strip():
            yield Document(text, record.split, where=record.where if is_chat else "")
        else:
            bad.empty(record.where)


def _mixed(
    readers: Sequence[Iterator[Document]], weights: Sequence[float], reading: Reading, data: DataConfig
) -> Iterator[Document]:
    """Documents from the parts in turn, so that the bytes of each follow its weight; at the end they equal it.

    A level is bytes for a weight of 1. The next is the document that reaches the lowest level, so none goes beyond what
    the others have; where a part is used up, the documents that the others are at are cut there.
    """
    heads: list[Document | None] = [next(reader) for reader in readers]
    levels, turns = [0.0] * len(readers), range(len(readers))
    end_of = lambda n: levels[n] + len(head.text.encode()) / weights[n] if (head := heads[n]) else math.inf
    ends = [end_of(turn) for turn in turns]
    last = data.max_bytes / sum(weights) if data.max_bytes else math.inf
    while (end := min(ends)) <= last:
        turn = ends.index(end)
        yield cast(Document, heads[turn])
        heads[turn], levels[turn] = next(readers[turn], None), end
        ends[turn] = end_of(turn)
        if heads[turn] is None and end < last:
            reading.ended_by, last = turn, end
    for head, level, weight in zip(heads, levels, weights):
        if head and head.where:
            if not level:  # whole conversations only, but none of the parts is left out
                yield head
        elif head and (text := head.text.encode()[: round((last - level) * weight)].decode(errors="ignore")):
            yield head._replace(text=text)  # cut between two characters


def _limited(source: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """The documents up to `max_bytes`; the last one is cut, or left out if it is a conversation."""
    left = max_bytes
    for document in source:
        if left is None:
            yield document
            continue
        text = document.text.encode()[:left].decode(errors="ignore")  # cut between two characters
        if len(text) < len(document.text) and document.where:
            return
        left -= len(text.encode())
        if text:
            yield document._replace(text=text)
        if left <= 0 or len(text) < len(document.text):
            return
