"""Prepared data on disk: token streams as a TFDS dataset in ArrayRecord form, written and read without TensorFlow.

The idea: a split is one stream of tokens, each document preceded by the end-of-text token, stored in records
of RECORD_TOKENS tokens (the last may be shorter), so token i lies in record i // RECORD_TOKENS and any span can
be read. A folder is either complete or not there: it is written beside its place and renamed at the end.

    {folder}/  dataset_info.json features.json metadata.json jaxgpt_tokens-{split}.array_record-*  tokenizer/
               manifest.sha256, written last: the digest of every other file
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from jaxgpt.config import UserError
from jaxgpt.data import manifest
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 2
SPLITS = ("train", "validation")
RECORD_TOKENS = 2048  # 40 us to read; a window of 1024 touches one or two records
SHARD_RECORDS = 65_536  # 256 MB of uint16
_SHARDS = "*.array_record-*"
_CACHE_BYTES = 256 << 20
_LONG = 1_000_000_000  # bytes that take about a second to verify: more of them get a progress bar


def check_window(num_tokens: int, block_size: int) -> None:
    """Raise UserError when a training stream cannot fill one window of block_size + 1 tokens."""
    if num_tokens < block_size + 1:
        raise UserError(
            f"the training split has {num_tokens} tokens, fewer than the {block_size + 1} of one window "
            f"(data.block_size = {block_size}, plus 1); give more text or a smaller data.block_size"
        )


# ---------------------------------------------------------------- reading


class TokenStream:
    """One split: `num_tokens` tokens in a circle. Threads may read at the same time."""

    def __init__(self, records, num_tokens: int, num_bytes: int, num_documents: int, dtype: str):
        """`records[i]["tokens"]` is the i-th record, as `tfds.data_source` gives it."""
        self.num_tokens = num_tokens
        self.num_bytes = num_bytes
        """Bytes of the documents in UTF-8."""
        self.num_documents = num_documents
        self._records = records
        # A split that fits is kept in memory as it is read: 64-token windows then cost 3 us, not 40.
        fits = num_tokens * np.dtype(dtype).itemsize <= _CACHE_BYTES
        self._cache = np.empty(num_tokens, dtype) if fits else None
        self._cached = np.zeros(len(records), bool)

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
        """Fill `out` with the tokens from `begin` on; they do not pass the end of the stream."""
        end = begin + len(out)
        for record in range(begin // RECORD_TOKENS, -(-end // RECORD_TOKENS)):
            first = record * RECORD_TOKENS
            low, high = max(begin, first), min(end, first + RECORD_TOKENS)
            out[low - begin : high - begin] = self._record(record)[low - first : high - first]

    def _record(self, record: int) -> np.ndarray:
        if self._cache is None:
            return self._records[record]["tokens"]
        kept = self._cache[record * RECORD_TOKENS : (record + 1) * RECORD_TOKENS]
        if not self._cached[record]:  # two threads may both fill it, with the same tokens
            kept[:] = self._records[record]["tokens"]
            self._cached[record] = True
        return kept


@dataclasses.dataclass(frozen=True)
class TokenDataset:
    """A prepared dataset: what it was made with, and its two splits."""

    path: Path
    vocab_size: int
    end_of_text: int
    tokenizer_digest: str
    fingerprint: str
    """SHA-256 over the documents."""
    settings: dict[str, object]
    """Those of [data] and [tokenizer] that decided what is in it."""
    train: TokenStream
    validation: TokenStream


def open_dataset(path: str | Path, verify: Literal["digests", "sizes"] = "digests") -> TokenDataset:
    """Open a prepared dataset and check that it is whole and belongs to the tokenizer saved in it.

    With `verify` = "sizes" the shards have to be there with their sizes, and what is in them is not read. Of several
    processes that open the same folder, one verifies the digests and the others the sizes.

    Raises:
        UserError: nothing finished lies at `path`, or it is damaged; names the file.
    """
    path = Path(path)
    if not (path / "dataset_info.json").is_file() or not (path / "metadata.json").is_file():
        raise UserError(f"{path}: no finished prepared dataset here; run: jaxgpt prepare --config FILE")
    if not (path / manifest.NAME).exists():
        raise UserError(
            f"{path}: holds no {manifest.NAME}, so a version of jaxgpt before format {FORMAT_VERSION} prepared it, or "
            f"it was deleted; delete {path} and prepare again"
        )
    _refuse_damage(path, manifest.problems(path, unread=_SHARDS))
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
        _verify(path, sum(sizes.values()))
    return _open_verified(path, about)


def _open_verified(path: Path, about: dict) -> TokenDataset:
    import tensorflow_datasets as tfds

    if load_tokenizer(path / "tokenizer").digest != about["tokenizer_digest"]:
        raise UserError(
            f"the tokenizer in {path / 'tokenizer'} does not match the prepared data beside it; "
            f"delete {path} and prepare again"
        )
    sources = tfds.builder_from_directory(path).as_data_source()
    streams = {
        split: TokenStream(sources[split], dtype=about["token_dtype"], **about["splits"][split]) for split in SPLITS
    }
    facts = {name: about[name] for name in ("vocab_size", "end_of_text", "tokenizer_digest", "fingerprint", "settings")}
    return TokenDataset(path=path, **facts, **streams)


def _verify(path: Path, size: int) -> None:
    """Read and compare every file; the shards have `size` bytes."""
    disable = None if size > _LONG else True  # None: where stderr is no terminal
    with tqdm(total=size, desc="verifying data", unit="B", unit_scale=True, disable=disable, leave=False) as bar:
        _refuse_damage(path, manifest.problems(path, bar.update))


def _refuse_damage(path: Path, problems: list[str]) -> None:
    if not problems:
        return
    more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
    extra = all(problem.endswith("(extra)") for problem in problems)
    fix = "remove it" if extra else f"delete {path} and prepare again"
    raise UserError(f"{path}/{problems[0]}{more}; {fix}")


# ---------------------------------------------------------------- writing


class DatasetWriter:
    """Writes a prepared dataset document by document; memory holds a few thousand records at most."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        """Start an empty dataset in the existing `folder`, the tokenizer saved in it."""
        import tensorflow_datasets as tfds

        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = np.dtype("uint16" if tokenizer.vocab_size < 65_536 else "uint32")
        tokens = tfds.features.Tensor(shape=(None,), dtype=self._dtype, encoding="bytes")
        identity = tfds.core.DatasetIdentity(
            name="jaxgpt_tokens",
            version=tfds.core.Version(f"{FORMAT_VERSION}.0.0"),
            data_dir=str(folder),
            module_name="jaxgpt.data.rows",
        )
        self._info = tfds.core.DatasetInfo(
            builder=identity,
            description="A stream of token ids: end-of-text before each document, cut into records.",
            features=tfds.features.FeaturesDict({"tokens": tokens}),
            metadata=tfds.core.MetadataDict(),
        )
        self._writer = tfds.core.SequentialWriter(self._info, SHARD_RECORDS, file_format="array_record")
        self._writer.initialize_splits(list(SPLITS))
        self._pending: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        counted = ("num_tokens", "num_bytes", "num_documents")
        self.counts: dict[str, dict[str, int]] = {split: dict.fromkeys(counted, 0) for split in SPLITS}
        """{"train": {"num_tokens", "num_bytes", "num_documents"}, "validation": ...} written so far."""
        tokenizer.save(folder / "tokenizer")

    def add(self, split: str, tokens: np.ndarray, num_bytes: int, starts_document: bool) -> None:
        """Append the next part of a document, which came from `num_bytes` of UTF-8."""
        if starts_document:
            self._pending[split].append(np.array([self._tokenizer.end_of_text], np.int32))
        self._pending[split].append(tokens)
        counts = self.counts[split]
        counts["num_tokens"] += len(tokens) + starts_document
        counts["num_bytes"] += num_bytes
        counts["num_documents"] += starts_document

    def flush(self, last: bool = False) -> None:
        """Write the full records, and with `last` the one that is not full."""
        for split, parts in self._pending.items():
            tokens = np.concatenate(parts).astype(self._dtype) if parts else np.empty(0, self._dtype)
            end = len(tokens) if last else len(tokens) // RECORD_TOKENS * RECORD_TOKENS
            records = [{"tokens": tokens[i : i + RECORD_TOKENS]} for i in range(0, end, RECORD_TOKENS)]
            if records:
                self._writer.add_examples({split: records})
            parts[:] = [tokens[end:]]

    def finish(self, about: dict[str, object]) -> None:
        """Close the files, write the metadata, `about` added, and the manifest; now the dataset can be opened.

        `about` holds the "fingerprint" and the "settings" of TokenDataset.
        """
        self.flush(last=True)
        self._writer.close_all()
        shards = sorted(self._folder.glob(_SHARDS))
        self._info.metadata.update(
            about,
            format_version=FORMAT_VERSION,
            vocab_size=self._tokenizer.vocab_size,
            end_of_text=self._tokenizer.end_of_text,
            tokenizer_digest=self._tokenizer.digest,
            token_dtype=self._dtype.name,
            splits=self.counts,
            file_bytes={shard.name: shard.stat().st_size for shard in shards},
        )
        self._info.write_to_directory(str(self._folder))
        manifest.write(self._folder)


@contextlib.contextmanager
def finished_together(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its place when the block ends well, and else disappears.

    Two processes may make the same folder at once: the first to end wins and the other's work is dropped.
    What a killed process left is removed by the next one on the same host.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"data.prepared_dir = {final.parent}: cannot be made ({error.strerror})") from None
    host = socket.gethostname()
    for leftover in final.parent.glob(f".*.{host}.*.partial"):
        pid = int(leftover.name.split(".")[-3])
        if pid == os.getpid() or not _is_alive(pid):  # a restarted container gets the same pid again
            shutil.rmtree(leftover, ignore_errors=True)
    folder = final.parent / f".{final.name}.{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"
    folder.mkdir()
    try:
        yield folder
        for file in [*folder.rglob("*"), folder]:
            fsync(file)
        try:
            os.rename(folder, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        fsync(final.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # another error: it is alive, and another user's
    return True


def fsync(path: Path) -> None:
    """Have the kernel write a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
