"""The stages of a preparation that work chunk by chunk: read the source, clean documents, turn them into tokens.

Reading is one pass over the source in one process. Each other stage is a function that reads one chunk file of the
stage before and writes one for the next; a chunk whose file exists is done, so any process may do any chunk. This
module imports no JAX: a worker process starts in half a second and needs little memory.
"""

import dataclasses
import functools
import json
import os.path
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxgpt.config import Config
from jaxgpt.data import chat
from jaxgpt.data.dataset import SPLITS
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import BadRecord, UserError
from jaxgpt.failpoints import failpoint
from jaxgpt.preparation import duplicates, sources
from jaxgpt.preparation.augmentation import Augmenter
from jaxgpt.preparation.chunks import SPLIT_CODES, Rows, WorkFolder, read_json, read_rows, write_json, write_rows
from jaxgpt.preparation.cleaning import Cleaned, Cleaner
from jaxgpt.preparation.documents import BadRecords
from jaxgpt.preparation.splitting import CUT, DROPPED, RESUMES, STARTS, TRAIN
from jaxgpt.settings import CleaningConfig, DataConfig, sources_of
from jaxgpt.storage.files import new_file

CHUNK_BYTES = 4_000_000  # of text: a second or two of work, so that all cores stay busy and little is lost by a kill
PIECE = 32_768  # characters tokenized at once
BATCH = 2_000_000  # characters whose encodings are in memory at once: some 100 bytes a token
EXAMPLES = 5  # of each kind, for the report
EXAMPLE_CHARACTERS = 200
_BEFORE = 40  # characters shown before the first difference


# ---------------------------------------------------------------- reading


def read(data: DataConfig, work: WorkFolder, state: str) -> dict[str, Any]:
    """Write the chunks "read" and return facts about them; the same facts after a kill.

    They are {"rows": [of each chunk], "bytes": [of each chunk], "documents": their number, "conversations": a Tally,
    "bad": `BadRecords.summary` of what was left out, "mixture": the fields of sources.Reading}. `state` is the
    `sources.source_state` before the source was first looked at.
    """
    file = work.path / "read.json"
    if file.exists():
        return read_json(file)
    bad, reading = BadRecords(data.on_bad_record), sources.Reading()
    rows_of: list[int] = []
    bytes_of: list[int] = []
    chunk, size, numbers = Rows(), 0, [-1] * len(sources_of(data))

    def end_chunk() -> None:
        there = work.rows("read", len(rows_of))
        if not (there.exists() and read_rows(there, ["contents"]).contents == chunk.contents):
            write_rows(there, chunk)
            failpoint("prepare.read")
        rows_of.append(len(chunk))
        bytes_of.append(size)

    with progress("reading") as bar:
        for document in sources.documents(data, bad, reading):
            num_bytes = len(document.text.encode())
            part = document.part
            numbers[part] = numbers[part] if document.continues else max(numbers) + 1
            split = SPLIT_CODES[document.split]
            chunk.append(document.text, split, part, numbers[part], document.continues, document.where)
            size += num_bytes
            bar.update(num_bytes)
            if size >= CHUNK_BYTES:
                end_chunk()
                chunk, size = Rows(), 0
        if len(chunk):
            end_chunk()
    if sources.source_state(data) != state:
        raise UserError(f"{sources.describe(data)}: changed while it was read; prepare again")
    facts = {"rows": rows_of, "bytes": bytes_of, "documents": max(numbers) + 1}
    facts |= {"bad": bad.summary(), "conversations": bad.conversations, "mixture": dataclasses.asdict(reading)}
    write_json(file, facts)
    return facts


def progress(label: str, total: int | None = None) -> tqdm:
    """A progress bar of bytes on stderr, hidden if that is not a terminal."""
    return tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=None, leave=False)


# ---------------------------------------------------------------- cleaning


@functools.lru_cache(maxsize=1)
def cleaner(settings: CleaningConfig) -> Cleaner:
    """The cleaner for the settings, built once in a process."""
    return Cleaner(settings)


def clean_chunk(number: int, *, work: WorkFolder, config: Config) -> int:
    """Write the chunk "clean": the kept documents, cleaned, with signatures. Returns the bytes of text read."""
    rows = read_rows(work.rows("read", number))
    clean = cleaner(config.cleaning)
    is_signed = duplicates.is_on(config.cleaning)
    kept, size = Rows(), 0
    steps: dict[str, dict[str, Any]] = {}
    columns = (rows.texts, rows.splits, rows.parts, rows.numbers, rows.continues, rows.wheres)
    for text, split, part, document, continues, where in zip(*columns, strict=True):
        size += len(text.encode())
        cleaned = clean.chat(text, continues) if config.data.format == "chat" else clean(text, continues)
        _count(steps, text, cleaned)
        if cleaned.text is None:
            continue
        kept.append(cleaned.text, split, part, document, continues, where)
        if is_signed:
            compared = cleaned.text
            if config.data.format == "chat":  # brackets and roles would make conversations more alike than they are
                compared = "\n".join(message["content"] for message in json.loads(compared))
            kept.signatures.append(duplicates.signature(compared, config.cleaning))
    write_json(work.counts("clean", number), {"steps": steps, "rows": len(kept)})
    write_rows(work.rows("clean", number), kept)
    failpoint("prepare.clean")
    return size


def _count(steps: dict[str, dict[str, Any]], before: str, cleaned: Cleaned) -> None:
    """Count what the steps did to one document, and keep the first examples."""
    for step in cleaned.changed_by:
        add_counts(steps, step, changed=1)
        if cleaned.text is not None and len(examples := steps[step].setdefault("changes", [])) < EXAMPLES:
            examples.append(difference(before, cleaned.text))
    if cleaned.dropped_by is not None:
        add_counts(steps, cleaned.dropped_by, dropped=1, dropped_bytes=len(before.encode()))
        if len(examples := steps[cleaned.dropped_by].setdefault("drops", [])) < EXAMPLES:
            examples.append(shortened(before))


def shortened(text: str) -> str:
    """The text, or its beginning, short enough for an example in a report."""
    return text if len(text) <= EXAMPLE_CHARACTERS else text[: EXAMPLE_CHARACTERS - 1] + "…"


def difference(before: str, after: str) -> dict[str, str]:
    """{"before", "after"}: both shortened, from shortly before the first character that differs."""
    begin = max(0, len(os.path.commonprefix([before, after])) - _BEFORE)
    lead = "…" if begin else ""
    return {"before": shortened(lead + before[begin:]), "after": shortened(lead + after[begin:])}


# ---------------------------------------------------------------- tokens


def tokenize_chunk(number: int, *, work: WorkFolder, config: Config, stage: str) -> int:
    """Write the tokens of the chunk that `stage` left; plan.json and rows.npy say where its rows go."""
    plan = read_json(work.path / "plan.json")
    rows = read_rows(work.rows(stage, number), ("texts", "parts", "numbers", "wheres"))
    first = plan["first"][number]
    codes = np.load(work.path / "rows.npy", mmap_mode="r")[first : first + len(rows)].tolist()
    tokenizer = _tokenizer(str(work.path / "tokenizer"), plan["tokenizer_digest"])
    borders = [plan["borders"].get(str(row), 0) for row in range(first, first + len(rows))]
    if config.data.format == "chat":
        arrays, counts = _chat_tokens(rows, codes, borders, tokenizer, config)
    else:
        arrays, counts = _text_tokens(rows, codes, borders, tokenizer)
    write_json(work.counts("tokens", number), counts)
    with new_file(work.tokens(number), shared=True) as file:
        np.savez(file, **arrays)
    failpoint("prepare.tokenize")
    return sum(len(text.encode()) for text in rows.texts)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: str, digest: str) -> Tokenizer:
    """The tokenizer of the work folder; `digest` is part of the cache key, as another preparation may replace it."""
    tokenizer = load_tokenizer(Path(folder))
    assert tokenizer.digest == digest
    return tokenizer


def placed(text: str, code: int, border: int) -> Iterator[tuple[int, int, str]]:
    """(split, STARTS or RESUMES or 0, text) of a row; two of them if the row is cut."""
    starts = code & (STARTS | RESUMES)
    where = code - starts
    if where == CUT:
        yield 0, starts, text[:border]
        yield 1, STARTS, text[border:]
    elif where != DROPPED:
        yield where - TRAIN, starts, text


def add_counts(counts: dict[Any, dict[str, Any]], key: int | str, **values: int) -> None:
    """Add the values to the counts under `key`."""
    there = counts.setdefault(key, {})
    for name, value in values.items():
        there[name] = there.get(name, 0) + value


def _text_tokens(rows: Rows, codes: list[int], borders: list[int], tokenizer: Tokenizer) -> tuple[dict, dict]:
    """({"train": tokens, "validation": tokens}, counts); end-of-text precedes what follows another document."""
    found: list[list[np.ndarray]] = [[np.empty(0, np.int32)] for _ in SPLITS]
    splits: dict[str, dict[str, int]] = {name: {"num_bytes": 0, "num_documents": 0} for name in SPLITS}
    parts: dict[int, dict[str, int]] = {}
    for batch in _batches(rows, codes, borders, tokenizer):
        encoded = tokenizer.encode_batch([text for *_, text in batch])
        for (split, starts, part, text), tokens in zip(batch, encoded, strict=True):
            size = len(text.encode())
            found[split] += [np.array([tokenizer.end_of_text], np.int32), tokens] if starts else [tokens]
            add_counts(splits, SPLITS[split], num_bytes=size, num_documents=starts == STARTS)
            num_tokens = len(tokens) + bool(starts)
            add_counts(parts, part, num_documents=starts == STARTS, num_bytes=size, num_tokens=num_tokens)
    arrays = {name: np.concatenate(arrays).astype(tokenizer.dtype) for name, arrays in zip(SPLITS, found)}
    return arrays, {"splits": splits, "parts": parts}


def _batches(
    rows: Rows, codes: list[int], borders: list[int], tokenizer: Tokenizer
) -> Iterator[list[tuple[int, int, int, str]]]:
    """Lists of (split, STARTS or RESUMES or 0, part of the mixture, text), each of about BATCH characters."""
    batch, size = [], 0
    for text, part, code, border in zip(rows.texts, rows.parts, codes, borders, strict=True):
        for split, starts, span in placed(text, code, border):
            for number, piece in enumerate(tokenizer.pieces(span, PIECE)):
                batch.append((split, 0 if number else starts, part, piece))
                size += len(piece)
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
    yield batch


def conversations(
    rows: Rows, codes: list[int], borders: list[int], config: Config
) -> Iterator[tuple[int, int, int, str, str, bool]]:
    """(split, part, number, text, where, whether it begins a document) of each conversation and each text.

    Changed copies follow a training conversation; a text has none.
    """
    augmenter = Augmenter(config.augmentation) if config.augmentation.copies else None
    columns = (rows.texts, rows.parts, rows.numbers, rows.wheres, codes, borders)
    for text, part, number, place, code, border in zip(*columns, strict=True):
        plain = chat.plain_of(text)
        for split, starts, whole in placed(text if plain is None else plain, code, border):
            whole = whole if plain is None else chat.from_plain(whole)
            yield split, part, number, whole, place, starts == STARTS
            for copy in augmenter.copies(whole, number) if augmenter and split == 0 else []:
                yield split, part, number, copy, place, False


def _chat_tokens(
    rows: Rows, codes: list[int], borders: list[int], tokenizer: Tokenizer, config: Config
) -> tuple[dict, dict]:
    """The tokens of all conversations with their lengths, and counts."""
    encoder = chat.ChatEncoder(tokenizer, config.chat, config.block_size)
    found, origins = [], []
    parts: dict[int, dict[str, int]] = {}
    bad = BadRecords(config.data.on_bad_record)
    counts = {"augmented": 0, "cut": 0}
    for split, part, number, text, where, begins in conversations(rows, codes, borders, config):
        is_chat = chat.plain_of(text) is None
        try:
            encoded = encoder.encode(text, where)
        except BadRecord as error:
            bad.add(error)
            continue
        counts["augmented"] += is_chat and not begins
        counts["cut"] += is_chat and len(encoded) > 1
        for piece in encoded:
            found.append(piece)
            origins.append((split, number, len(piece.tokens), piece.num_bytes, not (is_chat or begins)))
            add_counts(parts, part, num_bytes=piece.num_bytes, num_tokens=len(piece.tokens))
        add_counts(parts, part, num_documents=begins)
    columns = np.array(origins, np.int64).reshape(-1, 5).T
    arrays = dict(zip(("splits", "documents", "lengths", "num_bytes", "continues"), columns, strict=True))
    tokens = np.concatenate([np.empty(0, np.int32), *(piece.tokens for piece in found)])
    supervised = np.concatenate([np.empty(0, bool), *(piece.supervised for piece in found)])
    arrays |= {"tokens": tokens.astype(tokenizer.dtype), "supervised": supervised}
    return arrays, {**counts, "parts": parts, "bad": bad.summary()}
