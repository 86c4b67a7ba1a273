"""From a source of documents to a prepared dataset: survey, make the tokenizer, tokenize, write.

The idea: the folder's name is a digest of everything that decides its content, so a second run finds it and
does nothing, and other settings make another folder beside it.
"""

import collections
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from jaxgpt.config import Config, UserError
from jaxgpt.data import sources
from jaxgpt.data.rows import (
    FORMAT_VERSION,
    DatasetWriter,
    TokenDataset,
    check_window,
    finished_together,
    open_dataset,
)
from jaxgpt.data.tokenizer import Tokenizer, char_tokenizer, load_tokenizer, spread, train_bpe

_PIECE = 32_768  # characters tokenized at once
_BATCH = 4_000_000  # characters shared out to the cores at once


def given_tokenizer(config: Config, locate: Callable[[str], Path] = Path) -> Tokenizer | None:
    """The tokenizer that tokenizer.path names, its special tokens added; None where one is made from the data.

    `locate` finds the folder of a hub name, hf:NAME.
    """
    settings = config.tokenizer
    if settings.type != "folder":
        return None
    folder = locate(settings.path) if settings.path.startswith("hf:") else settings.path
    return load_tokenizer(folder).with_special_tokens(settings.special_tokens)


def prepare(config: Config, tokenizer: Tokenizer | None = None) -> Path:
    """The folder of the finished dataset for the settings [data] and [tokenizer], made now if it is not there.

    `tokenizer` is the `given_tokenizer` of the settings, where it has been read already.

    The source is read twice, front to back: once for its digest, its number of documents and the tokenizer,
    once to tokenize it. A validation split of the source is kept. Otherwise the last `validation_fraction` of
    the characters of a single document is held out; of several documents each is, where a hash of its number
    and text falls below that share, and at least one lands on either side.

    Raises:
        UserError: the source or the tokenizer is missing or wrong, the text is too short for one window, or the folder
            found is damaged, as far as that shows without reading the tokens.
    """
    settings = config.tokenizer
    tokenizer = tokenizer or given_tokenizer(config)
    final = place_of(config, tokenizer)
    if final.exists():
        dataset = open_dataset(final, verify="sizes")  # whoever goes on to read the tokens verifies them
        _check_settings(dataset, _settings(config, tokenizer))
        check_window(dataset.train.num_tokens, config.block_size)
        print(f"prepared data: {final} (found, nothing to do)")
        return final
    survey = _Survey()
    texts = (document.text for document, _ in survey.watch(config, "reading"))
    if settings.type == "char":
        tokenizer = char_tokenizer(texts)
    elif settings.type == "bpe":
        sample = spread(texts, settings.train_bytes, _PIECE)
        tokenizer = train_bpe(_bar(sample, "training BPE", "part"), settings.vocab_size, sys.stderr.isatty())
    else:
        collections.deque(texts, maxlen=0)
    tokenizer = tokenizer.with_special_tokens(settings.special_tokens)
    with finished_together(final) as folder:
        writer = DatasetWriter(folder, tokenizer)
        _tokenize(config, survey, writer, tokenizer)
        check_window(writer.counts["train"]["num_tokens"], config.block_size)
        writer.finish({"fingerprint": survey.fingerprint, "settings": _settings(config, tokenizer)})
    _report(final, writer.counts, tokenizer)
    return final


class _Survey:
    """What one reading of the source tells: how many documents, which splits, and the digest of it all."""

    def __init__(self):
        self.num_documents = 0
        self.splits: set[str | None] = set()
        self._digest = hashlib.sha256()
        self._lowest, self._highest = 2**64, 0

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()

    def watch(self, config: Config, label: str) -> Iterator[tuple[sources.Document, int]]:
        """The documents of the source, each with 64 pseudo-random bits made from its number and text."""
        for document in _bar(sources.documents(config.data), label, "doc"):
            content = hashlib.sha256(document.text.encode()).digest()
            self._digest.update(f"{document.split}:".encode() + content)
            numbered = hashlib.sha256(f"{self.num_documents}:".encode() + content).digest()
            draw = int.from_bytes(numbered[:8], "little")
            self.num_documents += 1
            self.splits.add(document.split)
            self._lowest, self._highest = min(self._lowest, draw), max(self._highest, draw)
            yield document, draw

    def parts(self, document: sources.Document, draw: int, fraction: float) -> list[tuple[str, str]]:
        """[(split, text)]: where the document goes, once the whole source has been seen."""
        if "validation" in self.splits:
            return [(document.split, document.text)]
        if self.num_documents == 1:
            border = int(len(document.text) * (1 - fraction))
            return [("train", document.text[:border]), ("validation", document.text[border:])]
        # the document that drew lowest is always below the limit, the one that drew highest never
        limit = min(max(int(fraction * 2**64), self._lowest + 1), self._highest)
        return [("validation" if draw < limit else "train", document.text)]


def _tokenize(config: Config, survey: _Survey, writer: DatasetWriter, tokenizer: Tokenizer) -> None:
    """Read the source again and write its tokens."""
    again = _Survey()
    batch: list[tuple[str, bool, str]] = []  # split, starts a document, text
    size = 0

    def write() -> None:
        tokens = tokenizer.encode_batch([text for _, _, text in batch])
        for (split, starts, text), ids in zip(batch, tokens, strict=True):
            writer.add(split, ids, len(text.encode()), starts)
        writer.flush()
        batch.clear()

    for document, draw in again.watch(config, "tokenizing"):
        for split, text in survey.parts(document, draw, config.data.validation_fraction):
            for number, piece in enumerate(tokenizer.pieces(text, _PIECE)):
                batch.append((split, number == 0, piece))
                size += len(piece)
                if size >= _BATCH:
                    write()
                    size = 0
    write()
    if again.fingerprint != survey.fingerprint:
        raise UserError(f"{sources.describe(config.data)}: changed while it was read; prepare again")


def _settings(config: Config, tokenizer: Tokenizer | None) -> dict[str, object]:
    """The settings that decide what is in the dataset; `tokenizer` where it is given, not made from the data."""
    data, chosen = config.data, config.tokenizer
    settings = {
        "source": data.source,
        "text_field": data.text_field if data.source not in ("stdlib", "text") else None,
        "max_bytes": data.max_bytes,
        "validation_fraction": data.validation_fraction,
        "tokenizer": chosen.type,
    }
    if chosen.type == "bpe":
        settings |= {"vocab_size": chosen.vocab_size, "train_bytes": chosen.train_bytes}
    if chosen.type == "folder":
        settings["tokenizer_digest"] = tokenizer.digest  # special tokens included
    elif chosen.special_tokens:
        settings["special_tokens"] = chosen.special_tokens
    return settings


def _check_settings(dataset: TokenDataset, settings: dict[str, object]) -> None:
    """The folder is named after its settings; what was copied into it later may have been prepared with others."""
    settings = json.loads(json.dumps(settings))  # as they are read back
    for name in sorted(settings.keys() | dataset.settings.keys()):
        if (there := dataset.settings.get(name)) != (here := settings.get(name)):
            raise UserError(
                f"{dataset.path}: holds data that was prepared with {name} = {there}, not {here}; "
                f"delete {dataset.path} and prepare again"
            )


def place_of(config: Config, tokenizer: Tokenizer | None) -> Path:
    """Where the dataset of these settings and this state of the source lies."""
    facts = [FORMAT_VERSION, _settings(config, tokenizer), sources.source_key(config.data)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Path(config.data.prepared_dir) / f"{sources.short_name(config.data)}-{digest[:12]}"


def _bar(items: Iterable, label: str, unit: str) -> Iterable:
    """The items, counted on stderr where that is a terminal."""
    return tqdm(items, desc=label, unit=unit, disable=None, leave=False)


def _report(path: Path, counts: dict[str, dict[str, int]], tokenizer: Tokenizer) -> None:
    print(f"prepared data: {path} (vocabulary {tokenizer.vocab_size:,})")
    for split, count in counts.items():
        documents, size, tokens = count["num_documents"], count["num_bytes"], count["num_tokens"]
        each = f"{size / tokens:.2f} bytes per token"
        print(f"  {split:<10} documents {documents:,}, bytes {size:,}, tokens {tokens:,}, {each}")
