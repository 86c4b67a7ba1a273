"""From a source of documents to a prepared dataset: read, clean, drop duplicates, split, tokenize, write.

The idea: the folder's name is a digest of everything that decides its content, so a second run finds it and does
nothing, and other settings make another folder beside it. On the way there each stage is a map over chunks of some MB
(chunks.py) that any process may do (runners.py), so memory does not grow with the data, and work that was done before
a kill is not done again.

    reading.py    source -> "read" chunks         in order, in this process
    stages.py     "read" -> "clean"               each chunk by itself; left out where nothing is to be cleaned
    splitting.py  all rows -> rows.npy, plan.json duplicates, splits; then the tokenizer
    stages.py     "clean" -> "tokens"             each chunk by itself; conversations are augmented here
    writer.py     "tokens" -> the dataset         in order, in this process
"""

import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxgpt.config import Config
from jaxgpt.data import chat
from jaxgpt.data.dataset import FORMAT_VERSION, TokenDataset, check_window, open_dataset
from jaxgpt.data.tokenizer import Tokenizer, char_tokenizer, load_tokenizer, spread, train_bpe
from jaxgpt.errors import UserError
from jaxgpt.failpoints import failpoint
from jaxgpt.preparation import duplicates, preparation_report, sources, splitting, stages
from jaxgpt.preparation.augmentation import Augmenter
from jaxgpt.preparation.chunks import WorkFolder, held_work_folder, read_json, read_rows, remove, whole, write_json
from jaxgpt.preparation.reading import progress, read
from jaxgpt.preparation.runners import Processes, Runner
from jaxgpt.preparation.writer import DatasetWriter, PackedWriter
from jaxgpt.settings import ChatConfig, CleaningConfig, DataConfig, sources_of
from jaxgpt.storage import manifest
from jaxgpt.storage.files import new_folder

Inspect = Callable[[TokenDataset], dict[str, object]]
"""Further facts for the report, told by the finished dataset."""


def given_tokenizer(config: Config, locate: Callable[[str], Path] = Path) -> Tokenizer | None:
    """The tokenizer that tokenizer.path names, its special tokens added; None where one is made from the data.

    `locate` finds the folder of a hub name, hf:NAME.
    """
    settings = config.tokenizer
    if settings.type != "folder":
        return None
    folder = locate(settings.path) if settings.path.startswith("hf:") else settings.path
    return _with_tokens(load_tokenizer(folder), config)


def _with_tokens(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    tokenizer = tokenizer.with_special_tokens(config.tokenizer.special_tokens)
    return chat.with_chat_tokens(tokenizer) if config.data.format == "chat" else tokenizer


def prepare(
    config: Config, tokenizer: Tokenizer | None = None, runner: Runner | None = None, inspect: Inspect | None = None
) -> Path:
    """The folder of the finished dataset for the settings, made now if it is not there; it holds report.html, too.

    `tokenizer` is the `given_tokenizer` of the settings, where it has been read already. `runner` works on the chunks;
    None: data.num_proc processes on this machine, which start anew, so that a program that calls this must do so below
    `if __name__ == "__main__"`.

    Raises:
        UserError: the source or the tokenizer is missing or wrong, the text is too short for one window, or the folder
            found is damaged, as far as that shows without reading the tokens.
    """
    tokenizer = tokenizer or given_tokenizer(config)
    final = place_of(config, tokenizer)
    if final.exists():
        return _found(final, config, tokenizer)
    sizes = {"format": FORMAT_VERSION, "signatures": duplicates.algorithm(config.cleaning)}
    with held_work_folder(final, sizes) as work:
        if final.exists():  # made by the process that was waited for
            remove(work)
            return _found(final, config, tokenizer)
        with Processes(config.data.num_proc) as processes:
            report = _prepare(config, tokenizer, runner or processes, work, final, inspect)
        remove(work)
    print(preparation_report.as_text(final, report))
    return final


def _found(final: Path, config: Config, tokenizer: Tokenizer | None) -> Path:
    dataset = open_dataset(final, verify="sizes")  # whoever goes on to read the tokens verifies them
    _check_settings(dataset, _settings(config, tokenizer))
    dataset.train.check(config.block_size)
    print(f"prepared data: {final} (found, nothing to do)")
    return final


def _prepare(
    config: Config,
    tokenizer: Tokenizer | None,
    runner: Runner,
    work: WorkFolder,
    final: Path,
    inspect: Inspect | None,
) -> dict:
    """All stages, each of which does what of its work is not done; returns the report."""
    clock = _Clock()
    if _is_cleaned(config):
        stages.cleaner(config.cleaning)  # all libraries are there, before the source is read
    if config.augmentation.copies:
        Augmenter(config.augmentation)
    facts = read(config.data, work)
    clock.lap("read")
    chunks, stage = range(len(facts["rows"])), "read"
    if _is_cleaned(config):
        stage = "clean"
        _each(runner, stages.clean_chunk, work, config, chunks, "cleaning", facts)
        clock.lap("clean")
    plan = _decided(work, stage, len(chunks), config, tokenizer)
    clock.lap("decide")
    tokenize = functools.partial(stages.tokenize_chunk, stage=stage)
    _each(runner, tokenize, work, config, chunks, "tokenizing", facts)
    clock.lap("tokenize")
    settings = _settings(config, tokenizer)
    with new_folder(final, existing="keep") as folder:
        tokenizer = load_tokenizer(work.path / "tokenizer")
        counts = _write(folder, tokenizer, work, chunks, config, {**plan["about"], "settings": settings})
        clock.lap("write")
        report = preparation_report.collect(config, work, facts, plan, counts, tokenizer, settings)
        dataset = open_dataset(folder, verify="sizes")
        report |= preparation_report.epochs(config, dataset) | (inspect(dataset) if inspect else {})
        report["seconds"] = clock.seconds
        preparation_report.write(folder, report)
        manifest.add(folder, preparation_report.FILES)
        failpoint("prepare.write")
    return report


class _Clock:
    """Seconds by stage, those that were done before a kill left out."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 3), now


def _is_cleaned(config: Config) -> bool:
    """Whether there is anything to do between reading and tokenizing."""
    return config.cleaning != CleaningConfig()


def _each(
    runner: Runner, task: Callable, work: WorkFolder, config: Config, chunks: range, label: str, facts: dict
) -> None:
    """Have `runner` do `task` for the chunks that are not done."""
    ends_in = work.tokens if label == "tokenizing" else functools.partial(work.rows, "clean")
    missing = [number for number in chunks if not ends_in(number).exists()]
    with progress(label, sum(facts["bytes"][number] for number in missing)) as bar:
        runner.each(functools.partial(task, work=work, config=config), missing, bar.update)


# ---------------------------------------------------------------- decisions about all documents


def _decided(work: WorkFolder, stage: str, num_chunks: int, config: Config, tokenizer: Tokenizer | None) -> dict:
    """plan.json: made now, with rows.npy and the tokenizer, if it is not there."""
    file = work.path / "plan.json"
    if file.exists():
        return read_json(file)
    plan = splitting.decide(work, stage, num_chunks, config.data.validation_fraction, config.cleaning)
    if not plan.codes.any():
        raise UserError(
            f"{sources.describe(config.data)}: [cleaning] drops all of its {len(plan.codes):,} documents; "
            "drop less: min_chars, max_chars, max_symbol_ratio, language"
        )
    tokenizer = tokenizer or _made_tokenizer(work, stage, plan, config)
    tokenizer.save(work.path / "tokenizer")
    with whole(work.path / "rows.npy") as temporary, open(temporary, "wb") as array:
        np.save(array, plan.codes)
    told = {
        "first": plan.first,
        "border": plan.border,
        "stage": stage,
        "tokenizer_digest": tokenizer.digest,
        "about": {"fingerprint": _fingerprint(plan, config)},
        "overlap": plan.overlap,
        "repeats": preparation_report.repeats(plan),
    }
    write_json(file, told)
    failpoint("prepare.decided")
    return told


def _made_tokenizer(work: WorkFolder, stage: str, plan: splitting.Plan, config: Config) -> Tokenizer:
    settings = config.tokenizer
    texts = _texts(work, stage, plan, config)
    if settings.type == "char":
        tokenizer = char_tokenizer(texts)
    else:
        sample = spread(texts, settings.train_bytes, stages.PIECE)
        bar = tqdm(sample, desc="training BPE", unit="part", disable=None, leave=False)
        tokenizer = train_bpe(bar, settings.vocab_size, sys.stderr.isatty())
    return _with_tokens(tokenizer, config)


def _texts(work: WorkFolder, stage: str, plan: splitting.Plan, config: Config) -> Iterator[str]:
    """What a tokenizer is made from: every text that is left, of conversations their turns.

    An alphabet has to hold the letters of changed copies as well; merges do very well without them.
    """
    unchanged = dataclasses.replace(config.augmentation, copies=0)
    source = config if config.tokenizer.type == "char" else dataclasses.replace(config, augmentation=unchanged)
    for number in range(len(plan.first) - 1):
        rows = read_rows(work.rows(stage, number), ("texts", "parts", "numbers", "wheres"))
        codes = plan.of_chunk(number).tolist()
        if config.data.format == "chat":
            for _, _, _, text, _ in stages.conversations(rows, codes, source):
                yield from chat.plain_texts(text, config.chat)
        else:
            yield from (text for text, code in zip(rows.texts, codes, strict=True) if code != splitting.DROPPED)


def _fingerprint(plan: splitting.Plan, config: Config) -> str:
    """The digest of what the dataset holds: the documents, and for conversations how they are told and changed."""
    if config.data.format == "text":
        return plan.fingerprint
    facts = [plan.fingerprint, _chat_settings(config)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- writing


def _write(
    folder: Path, tokenizer: Tokenizer, work: WorkFolder, chunks: range, config: Config, about: dict
) -> dict[str, dict[str, int]]:
    """The dataset, its report left out; returns what was counted of each split."""
    is_chat = config.data.format == "chat"
    if is_chat:
        writer = PackedWriter(folder, tokenizer, config.block_size, config.chat.packing)
    else:
        writer = DatasetWriter(folder, tokenizer)
    for number in tqdm(chunks, desc="writing", unit="chunk", disable=None, leave=False):
        arrays = stages.read_tokens(work, number)
        if is_chat:
            _add_conversations(writer, arrays)
        else:
            _add_streams(writer, arrays, read_json(work.counts("tokens", number))["splits"])
    _check_counts(writer.counts, config)
    writer.finish(about)
    return writer.counts


def _check_counts(counts: dict[str, dict[str, int]], config: Config) -> None:
    if config.data.format == "text":
        check_window(counts["train"]["num_tokens"], config.block_size)
    elif not counts["train"]["num_supervised"]:
        raise UserError(
            "the training split has no conversation with an answer that could be learned; give more conversations "
            "or a smaller data.validation_fraction"
        )
    if not counts["validation"]["num_tokens"]:
        raise UserError(
            "nothing is left for validation; give more documents, a larger data.validation_fraction or less [cleaning]"
        )


def _add_streams(writer: DatasetWriter, arrays: dict[str, np.ndarray], counts: dict) -> None:
    for split, tokens in arrays.items():
        writer.add(split, tokens, counts[split]["num_bytes"], starts_document=False)  # end-of-text is among them
        writer.counts[split]["num_documents"] += counts[split]["num_documents"]
    writer.flush()


def _add_conversations(writer: PackedWriter, arrays: dict[str, np.ndarray]) -> None:
    borders = np.cumsum(arrays["lengths"])[:-1]
    tokens, supervised = (np.split(arrays[name], borders) for name in ("tokens", "supervised"))
    columns = (arrays[name].tolist() for name in ("splits", "num_bytes", "documents"))
    for split, num_bytes, document, ids, learned in zip(*columns, tokens, supervised):
        writer.add(splitting.SPLITS[split], ids.astype(np.int32), learned, num_bytes, document)


# ---------------------------------------------------------------- which settings belong to a dataset


def _settings(config: Config, tokenizer: Tokenizer | None) -> dict[str, object]:
    """The settings that decide what is in the dataset; `tokenizer` where it is given, not made from the data.

    Those of later versions are left out where they are at their defaults, so that older datasets are still found.
    """
    data, chosen = config.data, config.tokenizer
    settings = {
        **_source_settings(data),
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
    for name in ("on_bad_record", "max_record_bytes"):
        if getattr(data, name) != getattr(DataConfig(), name):
            settings[name] = getattr(data, name)
    if cleaning := _changed(config.cleaning):
        settings["cleaning"] = cleaning
    if data.format == "chat":
        settings |= {"format": "chat", "block_size": config.block_size, **_chat_settings(config)}
    return settings


def _source_settings(data: DataConfig) -> dict[str, object]:
    if not isinstance(data.source, str):
        return {"source": [_source(part) | {"weight": part.weight} for part in sources_of(data)]}
    return _source(sources_of(data)[0])


def _source(part) -> dict[str, object]:
    """A source's settings; where it lies is no part of them, but of its state."""
    has_field = part.source.startswith(("jsonl", "parquet", "tfds:", "huggingface:"))
    return {"source": part.source, "text_field": part.text_field if has_field else None}


def _chat_settings(config: Config) -> dict[str, object]:
    settings = {"chat": dataclasses.asdict(config.chat)} if config.chat != ChatConfig() else {}
    if config.augmentation.copies:
        augmentation = dataclasses.asdict(config.augmentation)
        if file := augmentation.pop("synonyms"):
            augmentation["synonyms_digest"] = _file_digest(Path(file))
        settings["augmentation"] = augmentation
    return settings


def _file_digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"augmentation.synonyms = {file}: cannot be read ({error.strerror})") from None


def _changed(settings) -> dict[str, object]:
    """The fields of a section that are not at their defaults."""
    default = type(settings)()
    values = dataclasses.asdict(settings).items()
    return {name: value for name, value in values if value != getattr(default, name)}


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
