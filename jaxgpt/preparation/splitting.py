"""Decides for each document, once all are known: dropped as a duplicate, for training, or for validation.

Only a few numbers of each document are in memory here, about a hundred bytes, plus what near duplicates need.
"""

import dataclasses
import hashlib
import math
from collections.abc import Collection, Iterator

import numpy as np

from jaxgpt.data.chat import plain_of
from jaxgpt.preparation import duplicates
from jaxgpt.preparation.chunks import SPLIT_CODES, WorkFolder, read_rows
from jaxgpt.preparation.duplicates import Repeats
from jaxgpt.settings import CleaningConfig

# The code of a row: it is dropped, or goes to a split, or is cut in two at its border.
DROPPED, TRAIN, VALIDATION, CUT = 0, 1, 2, 3
STARTS = 4  # added to the code of a row that begins a document
RESUMES = 8  # added to that of one that goes on with a document after rows of another one

SHORT = 1024  # bytes: a document up to this is not cut for the sake of its end
_LONG = 0.02  # a document with a larger share of the text is long
_CLOSE = 0.005  # the held-out share may be off by this much for the sake of a corpus that grows,
_SLACK = 0.009  # and by this much rather than that a short document is cut
_BREAKS = ("\n\n", "\n", "。", ". ", " ")  # where a text is cut, the best first


@dataclasses.dataclass
class SplitPlan:
    """The decisions about all rows."""

    first: list[int]  # number of the first row of each chunk, and of all rows
    codes: np.ndarray  # uint8 [rows]: DROPPED, ..., with STARTS or RESUMES
    borders: dict[int, int]  # row that is CUT -> its characters for training
    divided: int  # documents whose end is for validation and the rest for training
    is_given: bool  # a source has a validation split of its own
    fingerprint: str  # SHA-256 over the rows that are kept, and what decides their splits
    repeats: Repeats  # the rows that are dropped because they repeat others
    overlap: int  # how many of those would be for training and repeat a row for validation


@dataclasses.dataclass
class _Table:
    """All rows of all chunks, without their text."""

    is_chat: bool
    first: list[int]
    given: np.ndarray  # int8 [rows]: SPLIT_CODES of the split that the source assigns
    parts: np.ndarray  # int32 [rows]
    documents: np.ndarray  # int64 [rows]: number of the document
    sizes: np.ndarray  # int64 [rows]: bytes
    draws: np.ndarray  # uint64 [rows]: pseudo-random bits, the same in all rows of a document


def decide(
    work: WorkFolder,
    stage: str,
    num_chunks: int,
    fraction: float,
    cleaning: CleaningConfig,
    whole: bool,
    texts: Collection[int] = (),
) -> SplitPlan:
    """Find duplicates among the rows that `stage` left, and assign the others to the splits.

    A validation split of a source is kept, and wins over training rows that it repeats. The documents of each other
    source are divided after duplicates are dropped, so that `fraction` of its bytes is held out (`held_out`); none is
    cut if they must stay `whole`, as conversations must; the parts `texts` of such a mixture are text.
    """
    table = _read_table(work, stage, num_chunks, whole)
    given = table.given == SPLIT_CODES["validation"]
    drawn = ~np.isin(table.parts, np.unique(table.parts[given]))
    repeats = _repeats(work, stage, table, given, cleaning)
    kept = repeats.of < 0
    overlap = int((~kept & ~given & given[repeats.of]).sum())
    codes = np.where(kept, np.where(given, VALIDATION, TRAIN), DROPPED).astype(np.uint8)
    borders: dict[int, int] = {}
    divided, is_plain = 0, True
    for part in np.unique(table.parts[drawn & kept]):
        rows = np.flatnonzero(kept & (table.parts == part))
        _, begins, document = np.unique(table.documents[rows], return_index=True, return_inverse=True)
        sizes = np.bincount(document, table.sizes[rows]).astype(np.int64)
        if len(sizes) == 1 and len(rows) == kept.sum() and not whole:
            borders, divided = _cut(work, stage, table, rows, fraction, codes), 1
            break
        draws = table.draws[rows][begins]
        held = held_out(sizes, draws, fraction, whole and int(part) not in texts)
        is_plain &= bool((held == _drawn(sizes, draws, fraction)).all())
        codes[rows[(held == sizes)[document]]] = VALIDATION
        (cut,) = np.nonzero((held > 0) & (held < sizes))
        divided += len(cut)
        ordered = rows[np.argsort(document, kind="stable")]
        ends = np.cumsum(np.bincount(document))
        for number in cut.tolist():
            own = ordered[ends[number - 1] if number else 0 : ends[number]]
            borders |= _cut(work, stage, table, own, int(held[number]), codes)
    fingerprint = _fingerprint(work, stage, table, kept)
    if not is_plain:  # else it is that of version 0.1
        division = hashlib.sha256(codes[kept].tobytes() + repr(sorted(borders.items())).encode())
        fingerprint = hashlib.sha256(fingerprint.encode() + division.digest()).hexdigest()
    _mark_starts(table, codes)
    return SplitPlan(table.first, codes, borders, divided, not drawn.all(), fingerprint, repeats, overlap)


def held_out(sizes: np.ndarray, draws: np.ndarray, fraction: float, whole: bool = False) -> np.ndarray:
    """int64 [D]: how many bytes of each document, at its end, are for validation; together `fraction` of them all.

    `sizes` int64 [D] are bytes, `draws` uint64 [D] pseudo-random. Short documents are held out whole: those with a draw
    below `fraction`, which stay so in a corpus that grows, or if their share is not close, the lowest draws. Each long
    one gives its end, never all. If all must stay `whole`, the share is as close as documents allow.
    """
    total, close = int(sizes.sum()), min(_CLOSE, fraction / 10, (1 - fraction) / 10)
    long = sizes > max(SHORT, min(_LONG, fraction / 2, (1 - fraction) / 2) * total)
    long = (long | (len(sizes) == 1)) & (not whole)
    held = np.where(long, 0, _drawn(sizes, draws, fraction))
    order = np.argsort(draws, kind="stable")
    left = fraction * float(sizes[~long].sum())
    if abs(held.sum() - left) > close * total or (whole and not held.any()):
        held[:] = 0
        slack = math.inf if whole else min(_SLACK, fraction / 4, (1 - fraction) / 4) * total
        for number in order[~long[order]].tolist():
            size = int(sizes[number])
            if size <= 2 * left and size <= left + slack:
                held[number], left = size, left - size
            elif not whole:
                held[number] = int(left) if left > slack else 0
                break
    left = fraction * total - held.sum()
    for number in order[long[order]].tolist():
        size = int(sizes[number])
        held[number] = max(0, min(max(fraction * size, SHORT), max(fraction, 0.5) * size, left))
        left -= held[number]
    if not held.any():  # each side has some, if documents allow it
        smallest = int(sizes.argmin())
        held[smallest if whole else order[0]] = sizes[smallest] if whole else 1
    if (held == sizes).all():
        held[order[-1]] = 0
    return held


def _drawn(sizes: np.ndarray, draws: np.ndarray, fraction: float) -> np.ndarray:
    return np.where(draws < np.uint64(int(fraction * 2**64)), sizes, 0)


def _read_table(work: WorkFolder, stage: str, num_chunks: int, is_chat: bool) -> _Table:
    first, columns = [0], []
    last: dict[int, tuple[int, int]] = {}  # part -> (its last document, that one's draw)
    for chunk in range(num_chunks):
        rows = read_rows(work.rows(stage, chunk), ("splits", "parts", "numbers", "contents", "sizes"))
        draws = np.empty(len(rows), np.uint64)
        for place, (part, number, content) in enumerate(zip(rows.parts, rows.numbers, rows.contents, strict=True)):
            if part not in last or last[part][0] != number:
                bits = hashlib.sha256(f"{number}:".encode() + content).digest()[:8]
                last[part] = number, int.from_bytes(bits, "little")
            draws[place] = last[part][1]
        columns.append((rows.splits, rows.parts, rows.numbers, rows.sizes, draws))
        first.append(first[-1] + len(rows))
    kinds = zip(zip(*columns), (np.int8, np.int32, np.int64, np.int64, np.uint64), strict=True)
    return _Table(is_chat, first, *(np.concatenate(parts).astype(kind) for parts, kind in kinds))


def _cut(
    work: WorkFolder, stage: str, table: _Table, rows: np.ndarray, held: int | float, codes: np.ndarray
) -> dict[int, int]:
    """Set the codes of the rows of one document; returns the row that is cut and its border, if one is.

    About the last `held` bytes are for validation. Of a document that is the only one, `held` is a share of its
    characters, and it is cut exactly there, as version 0.1 did.
    """
    if held < 1:
        lengths = np.array([len(text) for text in _texts(work, stage, table, rows)])
        border = int(int(lengths.sum()) * (1 - held))
        place = int(np.searchsorted(np.cumsum(lengths), border, "right"))
        border, length = border - int(lengths[:place].sum()), int(lengths[place])
    else:
        after = np.cumsum(table.sizes[rows][::-1])[::-1]  # bytes from each row on
        place = int(np.flatnonzero(after >= held)[-1])
        (text,) = _texts(work, stage, table, rows[place : place + 1])
        encoded, size = text.encode(), int(table.sizes[rows[place]])  # of text among conversations, that of its JSON
        before = len(encoded[: int(after[place] - held) * len(encoded) // size].decode(errors="ignore"))
        reach = min(held / 8, _CLOSE * int(after[0])) * len(text) / size
        length = len(text)
        border = max(_nearest_break(text, before, int(reach)), int(place == 0))
        border = min(border, length - 1) if place == len(rows) - 1 else border
    row = int(rows[place])
    codes[rows[place + 1 :]] = VALIDATION
    codes[row] = CUT if 0 < border < length else TRAIN if border else VALIDATION
    return {row: border} if codes[row] == CUT else {}


def _texts(work: WorkFolder, stage: str, table: _Table, rows: np.ndarray) -> Iterator[str]:
    """The texts of the rows, which are in order and hold no conversations."""
    chunks = np.searchsorted(table.first, rows, "right") - 1
    for chunk in np.unique(chunks).tolist():
        texts = read_rows(work.rows(stage, chunk), ("texts",)).texts
        found = (texts[row - table.first[chunk]] for row in rows[chunks == chunk].tolist())
        yield from ((plain_of(text) or "" if table.is_chat else text) for text in found)


def _nearest_break(text: str, place: int, reach: int) -> int:
    """The end of the paragraph, else line, sentence or word, that is nearest to `place`, at most `reach` away."""
    low, high = max(0, place - reach), min(len(text), place + reach)
    for separator in _BREAKS:
        ends = [text.rfind(separator, low, place), text.find(separator, place, high)]
        if found := [end + len(separator) for end in ends if end >= 0]:
            return min(found, key=lambda end: abs(end - place))
    return place


def _mark_starts(table: _Table, codes: np.ndarray) -> None:
    """Add STARTS and RESUMES: in each split, what precedes a row may be of another document."""
    where = codes.copy()
    for split in (VALIDATION, TRAIN):  # what a row that is CUT has of validation always starts there
        there = np.flatnonzero((where == split) | (where == CUT))
        documents = table.documents[there]
        marks = np.full(len(there), RESUMES, np.uint8)
        marks[1:][documents[1:] == documents[:-1]] = 0
        marks[np.unique(documents, return_index=True)[1]] = STARTS
        codes[there] = where[there] + marks


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
    num_rows = len(table.documents)
    if not duplicates.is_on(cleaning):
        return Repeats(np.full(num_rows, -1), np.zeros(num_rows, bool))
    signatures = np.empty((num_rows, duplicates.signature_bytes(cleaning)), np.uint8)
    for chunk, (begin, end) in enumerate(zip(table.first, table.first[1:])):
        joined = b"".join(read_rows(work.rows(stage, chunk), ("signatures",)).signatures)
        signatures[begin:end] = np.frombuffer(joined, np.uint8).reshape(end - begin, -1)
    return duplicates.find_repeats(signatures, held_out, cleaning)
