"""What becomes of each document once all are known: left out as a duplicate, learned from, or held out.

The idea: of a document only a few numbers are in memory here, about a hundred bytes, or what near duplicates need.
"""

import dataclasses
import hashlib

import numpy as np

from jaxgpt.preparation import duplicates
from jaxgpt.preparation.chunks import SPLIT_CODES, WorkFolder, read_rows
from jaxgpt.preparation.duplicates import Repeats
from jaxgpt.settings import CleaningConfig

# What becomes of a row of a chunk: it is left out, or goes to a split, or is cut in two at Plan.border.
DROPPED, TRAIN, VALIDATION, CUT = 0, 1, 2, 3
STARTS = 4  # added: it begins a document
SPLITS = ("train", "validation")


@dataclasses.dataclass
class Plan:
    """What is decided about all rows."""

    first: list[int]
    """Row at which each chunk begins."""
    codes: np.ndarray
    """uint8 [rows]: DROPPED, ..., with STARTS."""
    border: int
    """Characters of the row CUT that are learned from."""
    fingerprint: str
    """SHA-256 over the rows that are left, and the splits that the source gives them."""
    repeats: Repeats
    """The rows that are left out because they repeat others."""
    overlap: int
    """How many of them would be learned from and repeat what is held out."""

    def of_chunk(self, number: int) -> np.ndarray:
        return self.codes[self.first[number] : self.first[number + 1]]


@dataclasses.dataclass
class _Table:
    """All rows of all chunks, without their text."""

    first: list[int]
    given: np.ndarray
    """int8 [rows]: SPLIT_CODES of the source's split."""
    parts: np.ndarray
    """int32 [rows]"""
    numbers: np.ndarray
    """int64 [rows]: of the documents."""
    draws: np.ndarray
    """uint64 [rows]: pseudo-random bits, the same in all rows of a document."""


def decide(work: WorkFolder, stage: str, num_chunks: int, validation_fraction: float, cleaning: CleaningConfig) -> Plan:
    """Find duplicates among the rows that `stage` left, and give the others their splits.

    What is held out is drawn among the rows that are left, so that its share is as asked for. A validation split of a
    source is kept: of two rows that are alike the one in it stays. Of the other sources' documents the last
    `validation_fraction` of the characters is held out where there is a single one; of several each is whose draw falls
    below that share, and at least one lands on either side. A draw depends on nothing but the document's number and
    text.
    """
    table = _read_table(work, stage, num_chunks)
    drawn = ~np.isin(table.parts, np.unique(table.parts[table.given == SPLIT_CODES["validation"]]))
    given = table.given == SPLIT_CODES["validation"]
    repeats = _repeats(work, stage, table, given, cleaning)
    kept = repeats.of < 0
    overlap = int((~kept & ~given & given[repeats.of]).sum())
    held_out = _held_out(table, drawn, kept, validation_fraction)
    codes = np.where(kept, np.where(held_out, VALIDATION, TRAIN), DROPPED).astype(np.uint8)
    border = 0
    if drawn.all() and len(np.unique(table.numbers[kept])) == 1:
        codes, border = _cut_in_two(work, stage, table, kept, validation_fraction)
    codes[_starts(table, codes)] += STARTS
    return Plan(table.first, codes, border, _fingerprint(work, stage, table, kept), repeats, overlap)


def _read_table(work: WorkFolder, stage: str, num_chunks: int) -> _Table:
    first, columns = [0], []
    number_before, draw = None, 0
    for chunk in range(num_chunks):
        rows = read_rows(work.rows(stage, chunk), ("splits", "parts", "numbers", "contents"))
        draws = np.empty(len(rows), np.uint64)
        for place, (number, content) in enumerate(zip(rows.numbers, rows.contents, strict=True)):
            if number != number_before:
                draw = int.from_bytes(hashlib.sha256(f"{number}:".encode() + content).digest()[:8], "little")
            draws[place], number_before = draw, number
        columns.append((np.array(rows.splits, np.int8), np.array(rows.parts, np.int32), rows.numbers, draws))
        first.append(first[-1] + len(rows))
    kinds = (np.int8, np.int32, np.int64, np.uint64)
    return _Table(
        first, *(np.concatenate(parts).astype(kind) for parts, kind in zip(zip(*columns), kinds, strict=True))
    )


def _held_out(table: _Table, drawn: np.ndarray, kept: np.ndarray, fraction: float) -> np.ndarray:
    """bool [rows]: which rows are for validation, if no document is cut in two."""
    held_out = table.given == SPLIT_CODES["validation"]
    draws = table.draws[drawn & kept]
    if len(draws):
        # The document that drew lowest is always below the limit, the one that drew highest never.
        limit = min(max(int(fraction * 2**64), int(draws.min()) + 1), int(draws.max()))
        held_out |= drawn & (table.draws < np.uint64(limit))
    return held_out


def _cut_in_two(work: WorkFolder, stage: str, table: _Table, kept: np.ndarray, fraction: float):
    """(codes, characters of the row CUT) where a single document is left."""
    lengths = np.zeros(len(kept), np.int64)
    for chunk, (begin, end) in enumerate(zip(table.first, table.first[1:])):
        lengths[begin:end] = [len(text) for text in read_rows(work.rows(stage, chunk), ("texts",)).texts]
    lengths[~kept] = 0
    ends = np.cumsum(lengths)
    border = int(int(ends[-1]) * (1 - fraction))
    codes = np.where(ends <= border, TRAIN, np.where(ends - lengths >= border, VALIDATION, CUT)).astype(np.uint8)
    codes[~kept] = DROPPED
    (cut,) = np.nonzero(codes == CUT)
    return codes, border - int(ends[cut[0]] - lengths[cut[0]]) if len(cut) else 0


def _starts(table: _Table, codes: np.ndarray) -> np.ndarray:
    """int64: the rows with which a document begins in its split: the first that is left of it."""
    (left,) = np.nonzero(codes)
    documents, splits = table.numbers[left], codes[left]
    is_new = np.ones(len(left), bool)
    is_new[1:] = documents[1:] != documents[:-1]
    is_new[1:] |= (splits[1:] == VALIDATION) & (splits[:-1] == TRAIN)  # the rest of a document that was cut
    return left[is_new]


def _fingerprint(work: WorkFolder, stage: str, table: _Table, kept: np.ndarray) -> str:
    digest = hashlib.sha256()
    names = {code: f"{split}:".encode() for split, code in SPLIT_CODES.items()}
    for chunk, (begin, end) in enumerate(zip(table.first, table.first[1:])):
        contents = read_rows(work.rows(stage, chunk), ("contents",)).contents
        for split, content, is_kept in zip(table.given[begin:end].tolist(), contents, kept[begin:end], strict=True):
            if is_kept:
                digest.update(names[split] + content)
    return digest.hexdigest()


def _repeats(work: WorkFolder, stage: str, table: _Table, held_out: np.ndarray, cleaning: CleaningConfig) -> Repeats:
    """Which rows repeat others; none where nobody looks for them."""
    num_rows = len(table.numbers)
    if not duplicates.is_on(cleaning):
        return Repeats(np.full(num_rows, -1), np.zeros(num_rows, bool))
    signatures = np.empty((num_rows, duplicates.signature_bytes(cleaning)), np.uint8)
    for chunk, (begin, end) in enumerate(zip(table.first, table.first[1:])):
        joined = b"".join(read_rows(work.rows(stage, chunk), ("signatures",)).signatures)
        signatures[begin:end] = np.frombuffer(joined, np.uint8).reshape(end - begin, -1)
    return duplicates.find_repeats(signatures, held_out, cleaning)
