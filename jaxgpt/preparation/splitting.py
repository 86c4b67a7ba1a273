"""Decides for each document, once all are known: dropped as a duplicate, for training, or for validation.

Only a few numbers of each document are in memory here, about a hundred bytes, plus what near duplicates need.
"""

import dataclasses
import hashlib

import numpy as np

from jaxgpt.preparation import duplicates
from jaxgpt.preparation.chunks import SPLIT_CODES, WorkFolder, read_rows
from jaxgpt.preparation.duplicates import Repeats
from jaxgpt.settings import CleaningConfig

# The code of a row: it is dropped, or goes to a split, or is cut in two at SplitPlan.border.
DROPPED, TRAIN, VALIDATION, CUT = 0, 1, 2, 3
STARTS = 4  # added to the code of a row that begins a document


@dataclasses.dataclass
class SplitPlan:
    """The decisions about all rows."""

    first: list[int]  # number of the first row of each chunk, and of all rows
    codes: np.ndarray  # uint8 [rows]: DROPPED, ..., with STARTS
    border: int  # characters of the row CUT that are for training
    fingerprint: str  # SHA-256 over the rows that are kept, and the splits that the source assigns
    repeats: Repeats  # the rows that are dropped because they repeat others
    overlap: int  # how many of those would be for training and repeat a row for validation


@dataclasses.dataclass
class _Table:
    """All rows of all chunks, without their text."""

    first: list[int]
    given: np.ndarray  # int8 [rows]: SPLIT_CODES of the split that the source assigns
    parts: np.ndarray  # int32 [rows]
    numbers: np.ndarray  # int64 [rows]: number of the document
    draws: np.ndarray  # uint64 [rows]: pseudo-random bits, the same in all rows of a document


def decide(
    work: WorkFolder, stage: str, num_chunks: int, validation_fraction: float, cleaning: CleaningConfig
) -> SplitPlan:
    """Find duplicates among the rows that `stage` left, and assign the others to the splits.

    A validation split of a source is kept, and wins over training rows that it repeats. The documents of other sources
    are divided after duplicates are dropped: a single document is cut, and its last `validation_fraction` of the
    characters is for validation; of several, those whose pseudo-random draw is below `validation_fraction`, and at
    least one document goes to each side. A draw depends only on the document's number and text.
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
    return SplitPlan(table.first, codes, border, _fingerprint(work, stage, table, kept), repeats, overlap)


def _read_table(work: WorkFolder, stage: str, num_chunks: int) -> _Table:
    first, columns, number_before, draw = [0], [], None, 0
    for chunk in range(num_chunks):
        rows = read_rows(work.rows(stage, chunk), ("splits", "parts", "numbers", "contents"))
        draws = np.empty(len(rows), np.uint64)
        for place, (number, content) in enumerate(zip(rows.numbers, rows.contents, strict=True)):
            if number != number_before:
                draw = int.from_bytes(hashlib.sha256(f"{number}:".encode() + content).digest()[:8], "little")
            draws[place], number_before = draw, number
        columns.append((np.array(rows.splits, np.int8), np.array(rows.parts, np.int32), rows.numbers, draws))
        first.append(first[-1] + len(rows))
    kinds = zip(zip(*columns), (np.int8, np.int32, np.int64, np.uint64), strict=True)
    return _Table(first, *(np.concatenate(parts).astype(kind) for parts, kind in kinds))


def _held_out(table: _Table, drawn: np.ndarray, kept: np.ndarray, fraction: float) -> np.ndarray:
    """bool [rows]: the rows for validation, if no document is cut in two."""
    held_out = table.given == SPLIT_CODES["validation"]
    draws = table.draws[drawn & kept]
    if len(draws):
        # The lowest draw is always below the limit, the highest never.
        limit = min(max(int(fraction * 2**64), int(draws.min()) + 1), int(draws.max()))
        held_out |= drawn & (table.draws < np.uint64(limit))
    return held_out


def _cut_in_two(
    work: WorkFolder, stage: str, table: _Table, kept: np.ndarray, fraction: float
) -> tuple[np.ndarray, int]:
    """(codes, characters of the row CUT) if a single document is kept."""
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
    """int64: the rows that begin a document in its split: the first that is kept."""
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
    """Which rows repeat others; none if `cleaning` drops no duplicates."""
    num_rows = len(table.numbers)
    if not duplicates.is_on(cleaning):
        return Repeats(np.full(num_rows, -1), np.zeros(num_rows, bool))
    signatures = np.empty((num_rows, duplicates.signature_bytes(cleaning)), np.uint8)
    for chunk, (begin, end) in enumerate(zip(table.first, table.first[1:])):
        joined = b"".join(read_rows(work.rows(stage, chunk), ("signatures",)).signatures)
        signatures[begin:end] = np.frombuffer(joined, np.uint8).reshape(end - begin, -1)
    return duplicates.find_repeats(signatures, held_out, cleaning)
