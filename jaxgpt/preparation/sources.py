"""Sources of documents: files, public catalogs, made-up dialogues, or a weighted mixture of them.

A source is read from start to end, always in the same order, and is never held in memory as a whole. `source_key` tells
cheaply, without reading it, whether it is still the same.
"""

import dataclasses
import hashlib
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxgpt.errors import BadRecord, UserError
from jaxgpt.preparation import source_files
from jaxgpt.preparation.catalogs import HUGGINGFACE, TFDS, catalog_facts, catalog_splits
from jaxgpt.preparation.dialogues import RECORDS_VERSION, conversation, support_records
from jaxgpt.preparation.documents import BadRecords, Document, SourceRecord
from jaxgpt.settings import DataConfig, SourceConfig, sources_of

_CHAT_ONLY = ("support", "sgd")
_TEXT_ONLY = ("stdlib", "text", "html")


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

    In a mixture the next document comes from the part that has given the fewest bytes for its weight; the mixture ends
    when that part is exhausted, because continuing would change the shares.

    Raises:
        UserError: the source is missing, empty or broken; names the file and the line or byte.
    """
    bad = BadRecords(data.on_bad_record) if bad is None else bad
    reading = Reading() if reading is None else reading
    parts = sources_of(data)
    _check_format(data)
    reading.num_documents, reading.num_bytes, reading.ended_by = [0] * len(parts), [0] * len(parts), None
    total = sum(part.weight for part in parts)
    readers = [_nonempty(data, number, bad, part.weight / total) for number, part in enumerate(parts)]
    source = readers[0] if len(parts) == 1 else _mixed(readers, [part.weight for part in parts], reading)
    for document in _limited(source, data.max_bytes, data.format == "chat"):
        reading.num_documents[document.part] += not document.continues
        reading.num_bytes[document.part] += len(document.text.encode())
        yield document
    if not any(reading.num_documents):
        raise UserError(f"{describe(data)}: no text in it; the corpus is empty")


def describe(data: DataConfig) -> str:
    """The source as its settings name it, for messages."""
    parts = sources_of(data)
    if len(parts) == 1:
        return _described(parts[0], "data.source")
    return " and ".join(_described(part, f"data.source[{number}]") for number, part in enumerate(parts))


def short_name(data: DataConfig) -> str:
    """A name for folders: "stdlib", the stem of a file or folder, "tfds-NAME"; for a mixture, all of its names."""
    names = []
    for part in sources_of(data):
        name = Path(part.path).resolve().stem if part.source in source_files.SUFFIXES and part.path else part.source
        names.append("".join(c if c.isalnum() and c.isascii() else "-" for c in name).strip("-") or part.source)
    return "-".join(names)[:60].strip("-")


def source_key(data: DataConfig) -> str:
    """A digest of facts that change with the source: file names, sizes and times, or Python's version."""
    _check_format(data)
    facts = []
    for lines, found in map(_facts, sources_of(data)):
        stats = ((name, file.stat()) for name, file in found)
        facts += [*lines, *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)]
    return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()


def _facts(part: SourceConfig) -> tuple[list[str], list[tuple[str, Path]]]:
    """Lines that describe the state of a source, and files whose sizes and times belong to it."""
    if part.source.startswith((TFDS, HUGGINGFACE)):
        return catalog_facts(part)
    if part.source == "stdlib":  # without times: the same on every machine with this version
        sizes = [f"{name} {file.stat().st_size}" for name, file in source_files.source_files(part)]
        return [platform.python_implementation(), platform.python_version(), *sizes], []
    if part.source == "support":
        return list(RECORDS_VERSION), []
    return [str(source_files.source_root(part).resolve())], source_files.source_files(part)


def _described(part: SourceConfig, name: str) -> str:
    return f'{name} = "{part.source}"' + (f", data.path = {part.path}" if part.path else "")


def _check_format(data: DataConfig) -> None:
    for part in sources_of(data):
        if data.format == "chat" and part.source in _TEXT_ONLY:
            raise UserError(f'data.source = "{part.source}" holds no conversations: set data.format = "text"')
        if data.format == "text" and part.source in _CHAT_ONLY:
            raise UserError(f'data.source = "{part.source}" holds conversations: set data.format = "chat"')


def _nonempty(data: DataConfig, number: int, bad: BadRecords, share: float) -> Iterator[Document]:
    """The documents of one part of the mixture, which gives `share` of the text; an error if there is none."""
    part = sources_of(data)[number]
    found = False
    for document in _documents(data, part, bad, data.max_bytes and max(1, int(data.max_bytes * share))):
        found = True
        yield document if number == 0 else document._replace(part=number)
    if not found:
        raise UserError(f"{_described(part, 'data.source')}: no text in it; the corpus is empty")


def _documents(data: DataConfig, part: SourceConfig, bad: BadRecords, max_bytes: int | None) -> Iterator[Document]:
    limit = data.max_record_bytes
    if part.source in ("stdlib", "text"):
        yield from source_files.text_documents(part, bad, limit)
    elif part.source == "html":
        yield from source_files.html_documents(part, bad, limit)
    elif part.source.startswith((TFDS, HUGGINGFACE)):
        for split, records in catalog_splits(part, bad, part.text_field if data.format == "text" else None):
            share = max_bytes and max(1, int(max_bytes * data.validation_fraction)) if split == "validation" else None
            yield from _limited(_texts(records, data, part, bad), share, data.format == "chat")
    else:
        yield from _texts(_records(data, part, bad), data, part, bad)


def _records(data: DataConfig, part: SourceConfig, bad: BadRecords) -> Iterator[SourceRecord]:
    if part.source == "jsonl":
        return source_files.jsonl_records(part, bad, data.max_record_bytes)
    if part.source == "parquet":
        return source_files.parquet_records(part, bad, [part.text_field] if data.format == "text" else None)
    if part.source == "sgd":
        return source_files.sgd_dialogues(part, bad)
    return (SourceRecord(f"support, conversation {n}", record) for n, record in enumerate(support_records()))


def _texts(
    records: Iterable[SourceRecord], data: DataConfig, part: SourceConfig, bad: BadRecords
) -> Iterator[Document]:
    """The documents of the records; records without text go to `bad`."""
    for number, record in enumerate(records):
        try:
            if data.format == "chat":
                text = conversation(record.value, record.where, bad.conversations)
                yield Document(text, record.split, where=record.where)
                continue
            text = source_files.text_of(record, part.text_field)
        except BadRecord as error:
            if number == 0 and data.format == "text" and part.text_field not in record.value:  # the setting is wrong
                raise UserError(str(error)) from None
            bad.add(error)
            continue
        if text.strip():
            yield Document(text, record.split)
        else:
            bad.empty(record.where)


def _mixed(readers: Sequence[Iterator[Document]], weights: Sequence[float], reading: Reading) -> Iterator[Document]:
    """Whole documents from the parts in turn, so that the bytes of each follow its weight as closely as possible."""
    heads: list[Document | None] = [next(reader) for reader in readers]
    given = [0.0] * len(readers)  # bytes for a weight of 1
    while True:
        turn = given.index(min(given))
        document = heads[turn]
        if document is None:
            reading.ended_by = turn
            return
        while document is not None:
            given[turn] += len(document.text.encode()) / weights[turn]
            yield document
            heads[turn] = following = next(readers[turn], None)
            document = following if following and following.continues else None


def _limited(source: Iterable[Document], max_bytes: int | None, whole: bool) -> Iterator[Document]:
    """The documents up to `max_bytes`; the last one is cut, or left out if they must be `whole`."""
    left = max_bytes
    for document in source:
        if left is None:
            yield document
            continue
        text = document.text.encode()[:left].decode(errors="ignore")  # cut between two characters
        if len(text) < len(document.text) and whole:
            return
        left -= len(text.encode())
        if text:
            yield document._replace(text=text)
        if left <= 0 or len(text) < len(document.text):
            return
