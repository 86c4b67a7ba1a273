"""What is done to one chunk, by whichever process: clean its documents, turn them into tokens.

The idea: each function reads the chunk's file of the stage before and writes one for the next; a chunk that has it is
done. This module imports no JAX, so a process for it starts in half a second and needs little memory.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxgpt.config import Config
from jaxgpt.data import chat
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.failpoints import failpoint
from jaxgpt.preparation import duplicates
from jaxgpt.preparation.augmentation import Augmenter
from jaxgpt.preparation.chunks import (
    Rows,
    WorkFolder,
    read_arrays,
    read_json,
    read_rows,
    write_arrays,
    write_json,
    write_rows,
)
from jaxgpt.preparation.documents import BadRecord, BadRecords
from jaxgpt.preparation.examples import EXAMPLES, difference, shortened
from jaxgpt.preparation.splitting import CUT, DROPPED, SPLITS, STARTS, TRAIN
from jaxgpt.settings import CleaningConfig

if TYPE_CHECKING:
    from jaxgpt.preparation.cleaning import Cleaned, Cleaner

PIECE = 32_768  # characters tokenized at once
BATCH = 2_000_000  # characters whose encodings are in memory at once: some 100 bytes a token


# ---------------------------------------------------------------- cleaning


@functools.lru_cache(maxsize=1)
def cleaner(settings: CleaningConfig) -> "Cleaner":
    """
    Raises:
        UserError: a library that a step needs is not installed.
    """
    from jaxgpt.preparation.cleaning import Cleaner

    return Cleaner(settings)


def clean_chunk(number: int, *, work: WorkFolder, config: Config) -> int:
    """Write the chunk "clean": the documents that are left, cleaned, with the signatures to find duplicates by."""
    file = work.rows("clean", number)
    rows = read_rows(work.rows("read", number))
    clean = cleaner(config.cleaning)
    is_signed = duplicates.is_on(config.cleaning)
    kept, steps, size = Rows(), {}, 0
    columns = (rows.texts, rows.splits, rows.parts, rows.numbers, rows.continues, rows.wheres)
    for text, split, part, document, continues, where in zip(*columns, strict=True):
        size += len(text.encode())
        cleaned = clean.chat(text) if config.data.format == "chat" else clean(text, continues)
        _count(steps, text, cleaned)
        if cleaned.text is None:
            continue
        kept.append(cleaned.text, split, part, document, continues, where)
        if is_signed:
            kept.signatures.append(duplicates.signature(_compared(cleaned.text, config), config.cleaning))
    write_json(work.counts("clean", number), {"steps": steps, "rows": len(kept)})
    write_rows(file, kept)
    failpoint("prepare.clean")
    return size


def _compared(text: str, config: Config) -> str:
    """What of a document is compared with others: of a conversation what was said.

    Brackets and roles, the same in all, would make conversations more alike than they are.
    """
    if config.data.format == "text":
        return text
    return "\n".join(message["content"] for message in json.loads(text))


def _count(steps: dict, before: str, cleaned: "Cleaned") -> None:
    """Count what the steps did to one document, and remember the first examples."""
    for step in cleaned.changed_by:
        found = steps.setdefault(step, {})
        found["changed"] = found.get("changed", 0) + 1
        if cleaned.text is not None and len(examples := found.setdefault("changes", [])) < EXAMPLES:
            examples.append(difference(before, cleaned.text))
    if cleaned.text is None:
        found = steps.setdefault(cleaned.dropped_by, {})
        found["dropped"] = found.get("dropped", 0) + 1
        found["dropped_bytes"] = found.get("dropped_bytes", 0) + len(before.encode())
        if len(examples := found.setdefault("drops", [])) < EXAMPLES:
            examples.append(shortened(before))


# ---------------------------------------------------------------- tokens


def tokenize_chunk(number: int, *, work: WorkFolder, config: Config, stage: str) -> int:
    """Write the tokens of the chunk that `stage` left, as plan.json and rows.npy say where its rows go."""
    plan = read_json(work.path / "plan.json")
    rows = read_rows(work.rows(stage, number), ("texts", "parts", "numbers", "wheres"))
    first = plan["first"][number]
    codes = np.load(work.path / "rows.npy", mmap_mode="r")[first : first + len(rows)].tolist()
    tokenizer = _tokenizer(str(work.path / "tokenizer"), plan["tokenizer_digest"])
    if config.data.format == "chat":
        arrays, counts = _chat_tokens(rows, codes, tokenizer, config)
    else:
        arrays, counts = _text_tokens(rows, codes, plan["border"], tokenizer)
    write_json(work.counts("tokens", number), counts)
    write_arrays(work.tokens(number), arrays)
    failpoint("prepare.tokenize")
    return sum(len(text.encode()) for text in rows.texts)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: str, digest: str) -> Tokenizer:
    """The tokenizer of the work folder; `digest`, because another preparation may make one at the same place."""
    tokenizer = load_tokenizer(Path(folder))
    assert tokenizer.digest == digest
    return tokenizer


def placed(text: str, code: int, border: int) -> Iterator[tuple[int, bool, str]]:
    """(split, whether a document starts, text) of a row; two of the row that is cut."""
    where, starts = code & ~STARTS, bool(code & STARTS)
    if where == CUT:
        yield 0, starts, text[:border]
        yield 1, True, text[border:]
    elif where != DROPPED:
        yield where - TRAIN, starts, text


class _Streams:
    """Tokens of the documents of a chunk, a stream for each split, and what is counted of them."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._end_of_text = np.array([tokenizer.end_of_text], np.int32)
        self._batch: list[tuple[int, bool, int, str]] = []
        self._size = 0
        self._tokens: list[list[np.ndarray]] = [[], []]
        self.counts = [{"num_bytes": 0, "num_documents": 0} for _ in SPLITS]
        self.parts: dict[int, dict[str, int]] = {}

    def add(self, split: int, starts: bool, part: int, text: str) -> None:
        for number, piece in enumerate(self._tokenizer.pieces(text, PIECE)):
            self._batch.append((split, starts and number == 0, part, piece))
            self._size += len(piece)
            if self._size >= BATCH:
                self._encode()

    def _encode(self) -> None:
        encoded = self._tokenizer.encode_batch([text for *_, text in self._batch])
        for (split, starts, part, text), tokens in zip(self._batch, encoded, strict=True):
            size = len(text.encode())
            if starts:
                self._tokens[split].append(self._end_of_text)
            self._tokens[split].append(tokens)
            self.counts[split]["num_bytes"] += size
            self.counts[split]["num_documents"] += starts
            add_counts(self.parts, part, num_documents=starts, num_bytes=size, num_tokens=len(tokens) + starts)
        self._batch, self._size = [], 0

    def end(self) -> dict[str, np.ndarray]:
        self._encode()
        kind = np.uint16 if self._tokenizer.vocab_size < 65_536 else np.uint32
        whole = [np.concatenate([np.empty(0, np.int32), *parts]).astype(kind) for parts in self._tokens]
        return dict(zip(SPLITS, whole, strict=True))


def add_counts(counts: dict, key: object, **values: int) -> None:
    """Add the values to those under `key`."""
    there = counts.setdefault(key, {})
    for name, value in values.items():
        there[name] = there.get(name, 0) + value


def _text_tokens(rows: Rows, codes: list[int], border: int, tokenizer: Tokenizer) -> tuple[dict, dict]:
    """({"train": tokens, "validation": tokens}, what was counted); end-of-text stands before each document."""
    streams = _Streams(tokenizer)
    for text, part, code in zip(rows.texts, rows.parts, codes, strict=True):
        for split, starts, span in placed(text, code, border):
            streams.add(split, starts, part, span)
    arrays = streams.end()
    return arrays, {"splits": dict(zip(SPLITS, streams.counts)), "parts": streams.parts}


def conversations(rows: Rows, codes: list[int], config: Config) -> Iterator[tuple[int, int, int, str, str]]:
    """(split, part, number, text, where) of each conversation, after each one for training its changed copies."""
    copies: Callable[[str, int], list[str]] = lambda text, number: []
    if config.augmentation.copies:
        copies = Augmenter(config.augmentation).copies
    columns = (rows.texts, rows.parts, rows.numbers, rows.wheres, codes)
    for text, part, number, place, code in zip(*columns, strict=True):
        for split, _, whole in placed(text, code, 0):
            for each in [whole, *(copies(whole, number) if split == 0 else [])]:
                yield split, part, number, each, place


def _chat_tokens(rows: Rows, codes: list[int], tokenizer: Tokenizer, config: Config) -> tuple[dict, dict]:
    """The conversations' tokens one after another with their lengths, and what was counted."""
    encoder = chat.ChatEncoder(tokenizer, config.chat, config.block_size)
    found, origins = [], []
    parts: dict[int, dict[str, int]] = {}
    bad = BadRecords(config.data.on_bad_record)
    counts = {"augmented": 0, "cut": 0}
    last = None
    for split, part, number, text, where in conversations(rows, codes, config):
        is_copy, last = number == last, number
        try:
            encoded = encoder.encode(text, where)
        except BadRecord as error:
            bad.add(error)
            continue
        counts["augmented"] += is_copy
        counts["cut"] += len(encoded) > 1
        for piece in encoded:
            found.append(piece)
            origins.append((split, number, len(piece.tokens), piece.num_bytes))
            add_counts(parts, part, num_bytes=piece.num_bytes, num_tokens=len(piece.tokens))
        add_counts(parts, part, num_documents=not is_copy)
    kind = np.uint16 if tokenizer.vocab_size < 65_536 else np.uint32
    columns = np.array(origins, np.int64).reshape(-1, 4).T
    arrays = dict(zip(("splits", "documents", "lengths", "num_bytes"), columns, strict=True))
    arrays["tokens"] = np.concatenate([np.empty(0, np.int32), *(piece.tokens for piece in found)]).astype(kind)
    arrays["supervised"] = np.concatenate([np.empty(0, bool), *(piece.supervised for piece in found)])
    return arrays, {**counts, "parts": parts, "bad": told(bad)}


def told(bad: BadRecords) -> dict[str, dict]:
    """{reason: {"count", "where": the first few}}"""
    return {reason: {"count": count, "where": bad.examples.get(reason, [])} for reason, count in bad.counts.items()}


def read_tokens(work: WorkFolder, number: int) -> dict[str, np.ndarray]:
    return read_arrays(work.tokens(number))
