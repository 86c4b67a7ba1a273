"""Finds exact and near duplicates among documents.

Each document has a signature: a digest and, for near duplicates, MinHash values. The share of values in which two
documents agree estimates the Jaccard similarity of their sets of shingles (all runs of five characters, so that Chinese
needs no words). Documents that agree in all values of a band are compared; the number of bands is chosen so that at
least 99 % of the pairs at the threshold are, and the estimate from all values decides.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxgpt.errors import UserError, how_to_install
from jaxgpt.settings import CleaningConfig

STEPS = ("drop_duplicates", "near_duplicates")

_DIGEST_BYTES = 16
_VALUES = 128  # 16 bits of each are kept: two different ones agree once in 65,536, which does not change the estimate
_SEED = 1
_SHINGLE = 5  # characters
_CHUNK = 1 << 20  # characters hashed at once
_RECALL = 0.99
_BUCKET = 1000  # documents of one band that others are compared with: keeps the time linear


class Repeats(NamedTuple):
    """The duplicates among N documents."""

    of: np.ndarray  # int64 [N]: number of the kept document that this one repeats; -1 if it is kept itself
    near: np.ndarray  # bool [N]: dropped as a near duplicate, not as an exact one


def is_on(settings: CleaningConfig) -> bool:
    """Whether any duplicates are to be dropped."""
    return settings.drop_duplicates or settings.near_duplicates > 0


def algorithm(settings: CleaningConfig) -> str:
    """The name of the algorithm of signatures; only signatures of the same one can be compared."""
    if not settings.near_duplicates:
        return "blake2b"
    try:
        import rensa
    except ImportError:
        raise UserError(f"cleaning.near_duplicates needs the package rensa: {how_to_install('clean')}") from None
    return f"blake2b, rensa {rensa.RMinHash.ALGORITHM_VERSION}"


def signature_bytes(settings: CleaningConfig) -> int:
    """The length of a signature."""
    return _DIGEST_BYTES + (2 * _VALUES if settings.near_duplicates else 0)


def signature(text: str, settings: CleaningConfig) -> bytes:
    """The digest of the text and, for near duplicates, its MinHash values; the same in every process."""
    digest = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()
    return digest + _min_hashes(text).tobytes() if settings.near_duplicates else digest


def find_repeats(signatures: np.ndarray, is_validation: np.ndarray, settings: CleaningConfig) -> Repeats:
    """The documents to drop. The first of equal ones is kept, a validation document before any training document.

    Needs about 200 bytes a document beside the signatures.

    `signatures` are uint8 [N, signature_bytes] of all documents, in order; training documents that repeat one known to
    be for validation (bool [N]) are dropped.
    """
    order = np.argsort(~is_validation, kind="stable")
    of = np.full(len(order), -1, np.int64)
    if settings.drop_duplicates:
        _find_exact(signatures[:, :_DIGEST_BYTES], order, of)
    exact = of >= 0
    if settings.near_duplicates:
        values = signatures[:, _DIGEST_BYTES:].view("<u2")
        _find_near(values, order[~exact[order]], settings.near_duplicates, of)
    onward = np.where(exact, of[of], -1)  # an exact duplicate of a document that was dropped as a near one
    return Repeats(np.where(onward >= 0, onward, of), (of >= 0) & ~exact)


def _find_exact(digests: np.ndarray, order: np.ndarray, of: np.ndarray) -> None:
    """Set of[n] to the first document in `order` with the digest of document n, if that is another one."""
    words = digests[order].view("<u8")  # [N, 2]
    by_digest = np.lexsort((words[:, 1], words[:, 0]))  # stable: the first of equals stays first
    same = np.zeros(len(order), bool)
    same[1:] = (words[by_digest[1:]] == words[by_digest[:-1]]).all(axis=1)
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    of[order[by_digest[same]]] = order[by_digest[first[same]]]


def _min_hashes(text: str) -> np.ndarray:
    """uint16 [_VALUES]"""
    import rensa

    hashes = np.concatenate(list(_shingle_hashes(text)))
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, [0, len(hashes)], _VALUES, _SEED)
    return np.array(matrix.to_rows()[0], np.uint32).astype("<u2")


def _shingle_hashes(text: str) -> Iterator[np.ndarray]:
    """uint64 hashes of every run of _SHINGLE characters; of the whole text if it is shorter."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    length = min(_SHINGLE, len(codes))
    for start in range(0, max(1, len(codes) - length + 1), _CHUNK):
        count = min(_CHUNK, len(codes) - length + 1 - start)
        hashes = np.zeros(count, np.uint64)
        for offset in range(length):
            hashes *= np.uint64(0x9E3779B97F4A7C15)
            hashes += codes[start + offset : start + offset + count]
        yield _mixed(hashes)


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3: each bit of the result depends on all bits of the hash."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes ^= hashes >> np.uint64(33)
        hashes *= np.uint64(factor)
    hashes ^= hashes >> np.uint64(33)
    return hashes


def bands(threshold: float) -> tuple[int, int]:
    """(number of bands, values in each): the longest bands that find at least _RECALL of the pairs at the threshold."""
    for rows in range(_VALUES, 1, -1):
        if 1 - (1 - threshold**rows) ** (_VALUES // rows) >= _RECALL:
            return _VALUES // rows, rows
    return _VALUES, 1


def _find_near(values: np.ndarray, order: np.ndarray, threshold: float, of: np.ndarray) -> None:
    """Set of[n] to the most similar kept document before n in `order` [M], if one is similar enough."""
    groups = _groups(values, order, *bands(threshold))
    kept: dict[int, list[int]] = {}  # group -> its kept documents; groups of one have no entry
    for place in np.flatnonzero((groups >= 0).any(axis=1)).tolist():
        number, mine = order[place], [group for group in groups[place].tolist() if group >= 0]
        others = list({other: None for group in mine for other in kept.get(group, ())})
        if others:
            similarity = (values[others] == values[number]).mean(axis=1)
            best = int(similarity.argmax())
            if similarity[best] >= threshold:
                of[number] = others[best]
                continue
        for group in mine:
            members = kept.setdefault(group, [])
            if len(members) < _BUCKET:
                members.append(number)


def _groups(values: np.ndarray, order: np.ndarray, num_bands: int, rows: int) -> np.ndarray:
    """int32 [M, num_bands]: the same number for documents that agree in all values of the band; -1 for those alone."""
    groups = np.full((len(order), num_bands), -1, np.int32)
    total = 0
    for band in range(num_bands):
        keys = np.zeros(len(order), np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            keys = _mixed(keys + values[order, column])
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        shared = counts > 1
        new = np.where(shared, total + np.cumsum(shared) - 1, -1)
        groups[:, band] = new[inverse]
        total += int(shared.sum())
    return groups
