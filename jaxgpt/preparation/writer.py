"""Writers of prepared datasets: a token stream for text, packed rows for conversations (see data/dataset.py).

Conversations are packed by bounded best fit: each goes into the fullest of the OPEN_ROWS open rows that has room for
it. The same conversations in the same order give the same rows.
"""

import dataclasses
from pathlib import Path

import numpy as np

from jaxgpt.data.dataset import FORMAT_VERSION, RECORD_TOKENS, SHARDS, SPLITS
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.storage import manifest

SHARD_RECORDS = 65_536  # 256 MB of uint16
OPEN_ROWS = 64  # more gain little: rows of 1024 filled with conversations of 40 to 400 tokens are 1 % empty with 64
_ROWS_AT_ONCE = 256


class _Writer:
    """The common part of both writers: the files, and the metadata written at the end."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, description: str, features: dict, counted: tuple[str, ...]):
        import tensorflow_datasets as tfds

        self._folder = folder
        self._tokenizer = tokenizer
        identity = tfds.core.DatasetIdentity(
            name="jaxgpt_tokens",
            version=tfds.core.Version(f"{FORMAT_VERSION}.0.0"),
            data_dir=str(folder),
            module_name="jaxgpt.data.dataset",
        )
        tensor = lambda shape, dtype: tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding="bytes")
        self._info = tfds.core.DatasetInfo(
            builder=identity,
            description=description,
            features=tfds.features.FeaturesDict({name: tensor(*how) for name, how in features.items()}),
            metadata=tfds.core.MetadataDict(),
        )
        self._writer = tfds.core.SequentialWriter(self._info, SHARD_RECORDS, file_format="array_record")
        self._writer.initialize_splits(list(SPLITS))
        self.counts: dict[str, dict[str, int]] = {split: dict.fromkeys(counted, 0) for split in SPLITS}
        """{"train": {"num_tokens": ..., "num_bytes": ..., ...}, "validation": ...} written so far."""
        tokenizer.save(folder / "tokenizer")

    def _write(self, split: str, records: list[dict]) -> None:
        if records:
            self._writer.add_examples({split: records})

    def _close(self, about: dict[str, object]) -> None:
        """Close the files, and write the metadata and the manifest; then the dataset can be opened."""
        self._writer.close_all()
        shards = sorted(self._folder.glob(SHARDS))
        self._info.metadata.update(
            about,
            format_version=FORMAT_VERSION,
            vocab_size=self._tokenizer.vocab_size,
            end_of_text=self._tokenizer.end_of_text,
            tokenizer_digest=self._tokenizer.digest,
            token_dtype=self._tokenizer.dtype.name,
            splits=self.counts,
            file_bytes={shard.name: shard.stat().st_size for shard in shards},
        )
        self._info.write_to_directory(str(self._folder))
        manifest.write(self._folder)


class DatasetWriter(_Writer):
    """Writes a dataset of text document by document; holds a few thousand records in memory."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        """Start an empty dataset in the existing `folder`, with the tokenizer."""
        self._dtype = tokenizer.dtype
        super().__init__(
            folder,
            tokenizer,
            "A stream of token ids: end-of-text before each document, cut into records.",
            {"tokens": ((None,), self._dtype)},
            ("num_tokens", "num_bytes", "num_documents"),
        )
        self._pending: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}

    def add(self, split: str, tokens: np.ndarray, num_bytes: int, starts_document: bool) -> None:
        """Append the next part of a document, `num_bytes` of UTF-8 as text."""
        if starts_document:
            self._pending[split].append(np.array([self._tokenizer.end_of_text], np.int32))
        self._pending[split].append(tokens)
        counts = self.counts[split]
        counts["num_tokens"] += len(tokens) + starts_document
        counts["num_bytes"] += num_bytes
        counts["num_documents"] += starts_document

    def flush(self, last: bool = False) -> None:
        """Write the full records, and with `last` also the one that is not full."""
        for split, parts in self._pending.items():
            tokens = np.concatenate(parts).astype(self._dtype) if parts else np.empty(0, self._dtype)
            end = len(tokens) if last else len(tokens) // RECORD_TOKENS * RECORD_TOKENS
            self._write(split, [{"tokens": tokens[i : i + RECORD_TOKENS]} for i in range(0, end, RECORD_TOKENS)])
            parts[:] = [tokens[end:]]

    def finish(self, about: dict[str, object]) -> None:
        """Close the files and write the metadata: `about`, the "fingerprint" and the "settings" of TokenDataset."""
        self.flush(last=True)
        self._close({**about, "format": "text"})


@dataclasses.dataclass(eq=False)
class _OpenRow:
    """A row with room for more conversations: (tokens, supervised, document) of each is in `parts`."""

    room: int
    parts: list[tuple[np.ndarray, np.ndarray, int]] = dataclasses.field(default_factory=list)


class PackedWriter(_Writer):
    """Writes a dataset of conversations; holds some hundred rows in memory."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, block_size: int, packing: bool):
        """Start an empty dataset of rows of `block_size` positions in the existing `folder`, with the tokenizer.

        Without `packing` each conversation has a row of its own.
        """
        self._block_size = block_size
        self._dtype = tokenizer.dtype
        self._most_open = OPEN_ROWS if packing else 0
        super().__init__(
            folder,
            tokenizer,
            "Rows of conversations: tokens, which of them are learned, which conversation they belong to.",
            {
                "tokens": ((block_size,), self._dtype),
                "supervised": ((block_size,), np.uint8),
                "segments": ((block_size,), np.uint16),
                "documents": ((None,), np.int64),
            },
            ("num_rows", "num_conversations", "num_supervised", "num_tokens", "num_bytes", "num_documents"),
        )
        self._open: dict[str, list[_OpenRow]] = {split: [] for split in SPLITS}
        self._full: dict[str, list[_OpenRow]] = {split: [] for split in SPLITS}
        self._last_document: dict[str, int | None] = dict.fromkeys(SPLITS)

    def add(
        self,
        split: str,
        tokens: np.ndarray,
        supervised: np.ndarray,
        num_bytes: int,
        document: int,
        continues: bool = False,
    ) -> None:
        """Add a conversation or the next part of a long one: int32 [n] and bool [n], n <= block_size.

        The supervised tokens are `num_bytes` of UTF-8 as text; `document` is the conversation's number in the source.
        A text that `continues` one of which a part came before others is no new document.
        """
        if not 0 < len(tokens) <= self._block_size:
            raise ValueError(f"a conversation of {len(tokens)} tokens in rows of {self._block_size}")
        counts = self.counts[split]
        counts["num_conversations"] += 1
        counts["num_documents"] += document != self._last_document[split] and not continues
        counts["num_tokens"] += len(tokens)
        counts["num_bytes"] += num_bytes
        counts["num_supervised"] += int(np.count_nonzero(supervised[1:]))  # the first token is no target
        self._last_document[split] = document
        self._place(split, tokens, supervised, document)

    def _place(self, split: str, tokens: np.ndarray, supervised: np.ndarray, document: int) -> None:
        open_rows = self._open[split]
        row = min((row for row in open_rows if row.room >= len(tokens)), key=lambda row: row.room, default=None)
        if row is None:
            row = _OpenRow(self._block_size)
            open_rows.append(row)
        row.parts.append((tokens, supervised, document))
        row.room -= len(tokens)
        if row.room == 0:
            self._end(split, row)
        elif len(open_rows) > self._most_open:
            self._end(split, min(open_rows, key=lambda row: row.room))  # the fullest, the oldest of these

    def _end(self, split: str, row: _OpenRow) -> None:
        self._open[split].remove(row)
        self._full[split].append(row)
        if len(self._full[split]) >= _ROWS_AT_ONCE:
            self._flush(split)

    def _flush(self, split: str) -> None:
        full = self._full[split]
        self._write(split, [self._record(row) for row in full])
        self.counts[split]["num_rows"] += len(full)
        full.clear()

    def _record(self, row: _OpenRow) -> dict[str, np.ndarray]:
        record = {
            "tokens": np.full(self._block_size, self._tokenizer.end_of_text, self._dtype),
            "supervised": np.zeros(self._block_size, np.uint8),
            "segments": np.zeros(self._block_size, np.uint16),
            "documents": np.array([document for _, _, document in row.parts], np.int64),
        }
        begin = 0
        for segment, (tokens, supervised, _) in enumerate(row.parts, start=1):
            there = slice(begin, begin + len(tokens))
            record["tokens"][there], record["supervised"][there] = tokens, supervised
            record["segments"][there] = segment
            begin += len(tokens)
        return record

    def finish(self, about: dict[str, object]) -> None:
        """As `DatasetWriter.finish`."""
        for split in SPLITS:
            for row in list(self._open[split]):
                self._end(split, row)
            self._flush(split)
        self._close({**about, "format": "chat", "block_size": self._block_size})
