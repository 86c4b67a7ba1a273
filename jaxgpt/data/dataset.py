"""Prepared data on disk: a TFDS dataset in ArrayRecord form, read without TensorFlow. writer.py writes it.

For each split, a dataset of format "text" holds one stream of tokens, each document preceded by the end-of-text token,
in records of RECORD_TOKENS tokens (the last may be shorter): token i lies in record i // RECORD_TOKENS, and any span
can be read. One of format "chat" holds rows of block_size positions, each with one or several conversations. A folder
is complete or not there: it is written under another name and renamed at the end.

    {folder}/  dataset_info.json features.json metadata.json jaxgpt_tokens-{split}.array_record-*  tokenizer/
               manifest.sha256, written last: the digest of every other file
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from jaxgpt.config import Config, with_settings
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.storage import manifest

if TYPE_CHECKING:
    import jax

FORMAT_VERSION = 2
SPLITS = ("train", "validation")
RECORD_TOKENS = 2048  # 40 us to read; a window of 1024 touches one or two records
SHARDS = "*.array_record-*"
_CACHE_BYTES = 256 << 20
_LONG = 1_000_000_000  # bytes that take about a second to verify: more than that gets a progress bar

Records = Sequence[Mapping[str, np.ndarray]]
"""The records of a split, as `tfds.data_source` gives them."""


class Batch(NamedTuple):
    """Rows of tokens. All arrays have the same shape [..., T]."""

    tokens_BT: "np.ndarray | jax.Array"
    """int32 inputs."""
    targets_BT: "np.ndarray | jax.Array"
    """int32: the token that follows each input."""
    weights_BT: "np.ndarray | jax.Array"
    """float32: 1 where the target counts, 0 where it does not."""
    segments_BT: "np.ndarray | jax.Array | None" = None
    """int32: number of the conversation at each position, 0 for padding. None: one segment a row."""


# ---------------------------------------------------------------- text


def check_window(num_tokens: int, block_size: int) -> None:
    """Raise UserError if a training stream cannot fill one window of block_size + 1 tokens."""
    if num_tokens < block_size + 1:
        raise UserError(
            f"the training split has {num_tokens} tokens, fewer than the {block_size + 1} of one window "
            f"(data.block_size = {block_size}, plus 1); give more text or a smaller data.block_size"
        )


@dataclasses.dataclass(eq=False)
class TokenStream:
    """A split of text: `num_tokens` tokens in a circle. Threads may read at the same time.

    Epoch e starts at a pseudo-random position o_e and cuts the circle into W = ceil(N / T) windows; window k holds the
    T targets that follow position o_e + kT:

        stream      ... t0 t1 t2 t3 t4 t5 t6 t7 t8 ...          T = 4, o_e at t1
        tokens            [t1 t2 t3 t4][t5 t6 t7 t8]
        targets              [t2 t3 t4 t5][t6 t7 t8 ...

    The last window goes past the end of the circle; repeated targets have weight 0, so each token is a target exactly
    once in an epoch.
    """

    records: Records  # records[i]["tokens"] holds the tokens of record i
    num_tokens: int
    num_bytes: int  # UTF-8 bytes of the learned text
    num_documents: int
    dtype: npt.DTypeLike

    def __post_init__(self) -> None:
        # A split that fits is kept in memory as it is read: 64-token windows then cost 3 us, not 40.
        fits = self.num_tokens * np.dtype(self.dtype).itemsize <= _CACHE_BYTES
        self._cache = np.empty(self.num_tokens, self.dtype) if fits else None
        self._cached = np.zeros(len(self.records), bool)

    @property
    def targets_per_byte(self) -> float:
        """Learned tokens per byte of their text: converts a loss per token into one per byte."""
        return self.num_tokens / self.num_bytes

    def facts(self) -> dict[str, int]:
        """Further counts for a report."""
        return {}

    def check(self, block_size: int) -> None:
        """Raise UserError if no training row of `block_size` positions can be read."""
        check_window(self.num_tokens, block_size)

    def rows_per_epoch(self, block_size: int) -> int:
        """Number of rows in one pass over the split."""
        return -(-self.num_tokens // block_size)

    def rows_to_evaluate(self, block_size: int) -> int:
        """Number of rows that hold every possible target once, in order: every token but the first."""
        return -(-(self.num_tokens - 1) // block_size)

    def training_rows(self, places: Sequence[tuple[int, int]], block_size: int) -> Batch:
        """Training rows as numpy arrays [len(places), T]. A place is (row in its epoch, random bits of the epoch)."""
        starts = [block_size * window for window, _ in places]
        spans = [self.read(draw % self.num_tokens + block_size * window, block_size + 1) for window, draw in places]
        positions_BT = np.array(starts, np.int64).reshape(-1, 1) + np.arange(block_size)
        return _windows(spans, block_size, positions_BT < self.num_tokens)

    def evaluation_rows(self, numbers: Sequence[int], block_size: int) -> Batch:
        """Evaluation rows as numpy arrays [len(numbers), T]; rows from `rows_to_evaluate` on have weight 0."""
        spans = [self.read(window * block_size, block_size + 1) for window in numbers]
        targets_BT = np.array(numbers, np.int64).reshape(-1, 1) * block_size + np.arange(1, block_size + 1)
        return _windows(spans, block_size, targets_BT < self.num_tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start, start + 1, ... of the circle (indices modulo num_tokens), int32 [length]."""
        tokens = np.empty(length, np.int32)
        done = 0
        while done < length:
            begin = (start + done) % self.num_tokens
            count = min(length - done, self.num_tokens - begin)
            self._copy(begin, tokens[done : done + count])
            done += count
        return tokens

    def _copy(self, begin: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `begin` on, which do not pass the end of the stream."""
        end = begin + len(out)
        for record in range(begin // RECORD_TOKENS, -(-end // RECORD_TOKENS)):
            first = record * RECORD_TOKENS
            low, high = max(begin, first), min(end, first + RECORD_TOKENS)
            out[low - begin : high - begin] = self._record(record)[low - first : high - first]

    def _record(self, record: int) -> np.ndarray:
        if self._cache is None:
            return self.records[record]["tokens"]
        kept = self._cache[record * RECORD_TOKENS : (record + 1) * RECORD_TOKENS]
        if not self._cached[record]:  # two threads may both fill it, with the same tokens
            kept[:] = self.records[record]["tokens"]
            self._cached[record] = True
        return kept


def _windows(spans: list[np.ndarray], block_size: int, counts_BT: np.ndarray) -> Batch:
    spans_BT = np.array(spans, np.int32).reshape(-1, block_size + 1)
    return Batch(spans_BT[:, :-1], spans_BT[:, 1:], counts_BT.astype(np.float32))


# ---------------------------------------------------------------- conversations


def check_answers(num_supervised: int) -> None:
    """Raise UserError if a training split of conversations has no learned token."""
    if not num_supervised:
        raise UserError(
            "the training split has no conversation with an answer that could be learned; give more conversations "
            "or a smaller data.validation_fraction"
        )


class PackedRow(NamedTuple):
    """One row of T positions as stored on disk."""

    tokens: np.ndarray  # [T]; padding is end-of-text
    supervised: np.ndarray  # bool [T]: the learned tokens: an assistant's, and all of a text
    segments: np.ndarray  # [T]: 0 for padding, else the number of the conversation in the row, from 1
    documents: np.ndarray  # int64: documents[s - 1] is the number of segment s's conversation in the source

    def conversations(self) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(number of the document, tokens, which of them are supervised) of each conversation."""
        places = ((document, self.segments == i) for i, document in enumerate(self.documents.tolist(), start=1))
        return [(document, self.tokens[there], self.supervised[there]) for document, there in places]


@dataclasses.dataclass(eq=False)
class PackedRows:
    """A split of conversations: rows of `block_size` positions, each read once in an epoch.

    Its methods are those of TokenStream, so that training and evaluation read both alike.
    """

    records: Records  # records[i] holds the fields of PackedRow i
    dtype: npt.DTypeLike
    block_size: int
    num_rows: int
    num_conversations: int  # packed parts; a long document gives several
    num_supervised: int
    num_tokens: int  # without padding
    num_bytes: int  # UTF-8 bytes of the supervised tokens only
    num_documents: int

    def __post_init__(self) -> None:
        kinds: dict[str, npt.DTypeLike] = {"tokens": self.dtype, "supervised": np.uint8, "segments": np.uint16}
        shape = (self.num_rows, self.block_size)
        fits = math.prod(shape) * sum(np.dtype(kind).itemsize for kind in kinds.values()) <= _CACHE_BYTES
        self._cache = {name: np.empty(shape, kind) for name, kind in kinds.items()} if fits else None
        self._cached = np.zeros(self.num_rows, bool)

    @property
    def targets_per_byte(self) -> float:
        return self.num_supervised / max(self.num_bytes, 1)

    def facts(self) -> dict[str, int]:
        return {"rows": self.num_rows, "conversations": self.num_conversations, "learned_tokens": self.num_supervised}

    def check(self, block_size: int) -> None:
        if block_size != self.block_size:
            raise UserError(
                f"the conversations are packed into rows of {self.block_size} tokens, but data.block_size = "
                f"{block_size}; set it back, or prepare again"
            )
        check_answers(self.num_supervised)

    def rows_per_epoch(self, block_size: int) -> int:
        self.check(block_size)
        return self.num_rows

    def rows_to_evaluate(self, block_size: int) -> int:
        return self.num_rows

    def training_rows(self, places: Sequence[tuple[int, int]], block_size: int) -> Batch:
        return self._batch([number for number, _ in places])

    def evaluation_rows(self, numbers: Sequence[int], block_size: int) -> Batch:
        batch = self._batch([number % self.num_rows for number in numbers])
        batch.weights_BT[np.array(numbers) >= self.num_rows] = 0.0
        return batch

    def row(self, number: int) -> PackedRow:
        """Row `number` (0 <= number < num_rows) with the numbers of its documents."""
        record = self.records[number]
        return PackedRow(record["tokens"], record["supervised"].astype(bool), record["segments"], record["documents"])

    def _batch(self, numbers: list[int]) -> Batch:
        shape = (len(numbers), self.block_size)
        tokens_BT, segments_BT = np.empty(shape, np.int32), np.empty(shape, np.int32)
        targets_BT, weights_BT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for place, number in enumerate(numbers):
            row = self._read(number)
            tokens_BT[place], segments_BT[place] = row["tokens"], row["segments"]
            weights_BT[place, :-1] = row["supervised"][1:]
        targets_BT[:, :-1] = tokens_BT[:, 1:]
        # The first token of a conversation is no target, whatever comes before it in the row.
        weights_BT[:, :-1] *= segments_BT[:, 1:] == segments_BT[:, :-1]
        return Batch(tokens_BT, targets_BT, weights_BT, segments_BT)

    def _read(self, number: int) -> Mapping[str, np.ndarray]:
        if self._cache is None:
            return self.records[number]
        if not self._cached[number]:  # two threads may both fill it, with the same row
            record = self.records[number]
            for name, kept in self._cache.items():
                kept[number] = record[name]
            self._cached[number] = True
        return {name: kept[number] for name, kept in self._cache.items()}


Split = TokenStream | PackedRows


@dataclasses.dataclass(frozen=True)
class TokenDataset:
    """A prepared dataset: its two splits, its tokenizer, and the settings it was made with."""

    path: Path
    format: Literal["text", "chat"]
    vocab_size: int
    end_of_text: int
    tokenizer_digest: str
    fingerprint: str  # SHA-256 over the documents
    settings: dict[str, object]  # those that decide the content
    train: Split  # a TokenStream for format "text", PackedRows for "chat"
    validation: Split

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer saved in the dataset's folder, loaded at the first use."""
        return load_tokenizer(self.path / "tokenizer")

    def fit(self, config: Config) -> Config:
        """`config` with a window as long as a short text allows, where data.block_size is not set."""
        room = max(self.train.num_tokens - 1, 1)
        if config.data.block_size or self.format == "chat" or room >= config.model.n_positions:
            return config
        return with_settings(config, data_block_size=room)


def open_dataset(path: str | Path, verify: Literal["digests", "sizes"] = "digests") -> TokenDataset:
    """Open a prepared dataset and check that it is complete and belongs to the tokenizer saved in it.

    `verify` = "sizes" compares only the sizes of the shards, and the digests of the other files. Where several
    processes open one folder, one verifies the digests and the others the sizes.

    Raises:
        UserError: no finished dataset at `path`, or it is damaged; names the file.
    """
    path = Path(path)
    if not (path / "dataset_info.json").is_file() or not (path / "metadata.json").is_file():
        raise UserError(f"{path}: no finished prepared dataset here; run: jaxgpt prepare --config FILE")
    if not (path / manifest.NAME).exists():
        raise UserError(
            f"{path}: holds no {manifest.NAME}, so a version of jaxgpt before format {FORMAT_VERSION} prepared it, or "
            f"it was deleted; delete {path} and prepare again"
        )
    _refuse_damage(path, manifest.problems(path, unread=SHARDS))
    about = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
    if about.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: prepared in format {about.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}; prepare again"
        )
    sizes = {name: (path / name).stat().st_size for name in about["file_bytes"]}
    for name, size in about["file_bytes"].items():
        if sizes[name] != size:
            raise UserError(f"{path / name}: {sizes[name]} bytes instead of {size}; delete {path} and prepare again")
    if verify == "digests":
        total = sum(sizes.values())
        disable = None if total > _LONG else True  # None: hidden if stderr is not a terminal
        with tqdm(total=total, desc="verifying data", unit="B", unit_scale=True, disable=disable, leave=False) as bar:
            _refuse_damage(path, manifest.problems(path, bar.update))
    return _open_verified(path, about)


def _open_verified(path: Path, about: dict) -> TokenDataset:
    import tensorflow_datasets as tfds

    sources = tfds.builder_from_directory(path).as_data_source()
    is_chat = about.get("format", "text") == "chat"
    kind, extra = (PackedRows, {"block_size": about["block_size"]}) if is_chat else (TokenStream, {})
    splits = {
        split: kind(sources[split], dtype=about["token_dtype"], **extra, **about["splits"][split]) for split in SPLITS
    }
    names = ("vocab_size", "end_of_text", "tokenizer_digest", "fingerprint", "settings")
    facts = {name: about[name] for name in names} | splits
    dataset = TokenDataset(path=path, format="chat" if is_chat else "text", **facts)
    if dataset.tokenizer.digest != dataset.tokenizer_digest:
        raise UserError(
            f"the tokenizer in {path / 'tokenizer'} does not match the prepared data beside it; "
            f"delete {path} and prepare again"
        )
    return dataset


def _refuse_damage(path: Path, problems: list[str]) -> None:
    if not problems:
        return
    more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
    extra = all(problem.endswith("(extra)") for problem in problems)
    fix = "remove it" if extra else f"delete {path} and prepare again"
    raise UserError(f"{path}/{problems[0]}{more}; {fix}")
