"""Makes a prepared dataset from a source: read, clean, drop duplicates, split, tokenize, write.

The folder's name ends in a digest of the source's content and of all settings that decide the dataset's, so a second
run finds it, wherever both lie, and other settings make another folder beside it. Each stage is a map over chunks of
some MB (chunks.py) that any process may do (runners.py): memory does not grow with the data, and work done before a
kill is not done again.

    stages.py     source -> "read" chunks         in order, in this process
    stages.py     "read" -> "clean"               chunk by chunk; omitted if [cleaning] does nothing
    splitting.py  all rows -> rows.npy, plan.json duplicates, splits; then the tokenizer
    stages.py     "clean" -> "tokens"             chunk by chunk; conversations are augmented here
    writer.py     "tokens" -> the dataset         in order, in this process
"""

import functools
import glob
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxgpt.config import Config, with_settings
from jaxgpt.data import chat
from jaxgpt.data.dataset import FORMAT_VERSION, SPLITS, TokenDataset, check_answers, check_window, open_dataset
from jaxgpt.data.tokenizer import Tokenizer, char_tokenizer, spread, train_bpe
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.failpoints import failpoint
from jaxgpt.preparation import duplicates, preparation_report, sources, splitting, stages
from jaxgpt.preparation.augmentation import Augmenter
from jaxgpt.preparation.chunks import WorkFolder, held_work_folder, read_arrays, read_json, read_rows, write_json
from jaxgpt.preparation.runners import ChunkRunner, Processes
from jaxgpt.preparation.writer import DatasetWriter, PackedWriter
from jaxgpt.settings import ChatConfig, CleaningConfig, DataConfig, sources_of
from jaxgpt.storage import manifest
from jaxgpt.storage.files import new_file, new_folder

Inspect = Callable[[TokenDataset], dict[str, object]]
"""Gives further facts for the report, from the finished dataset."""


class DatasetPlace(NamedTuple):
    """Where a dataset is, or will be."""

    path: Path
    state: str  # `sources.source_state` when its source was looked at; empty if it was not
    why_unseen: str = ""  # why it was not


def given_tokenizer(config: Config, locate: Callable[[str], Path] = Path) -> Tokenizer | None:
    """The tokenizer of tokenizer.path, or None if it is made from the data; `locate` finds the folder of hf:NAME."""
    path = config.tokenizer.path
    if config.tokenizer.type != "folder" or path is None:
        return None
    return _with_tokens(load_tokenizer(locate(path) if path.startswith("hf:") else path), config)


def _with_tokens(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    tokenizer = tokenizer.with_special_tokens(config.tokenizer.special_tokens)
    return chat.with_chat_tokens(tokenizer) if config.data.format == "chat" else tokenizer


def prepare(
    config: Config,
    tokenizer: Tokenizer | None = None,
    runner: ChunkRunner | None = None,
    inspect: Inspect | None = None,
) -> Path:
    """The folder of the finished dataset for the settings, with its report; made now if it is not there.

    `tokenizer` is the `given_tokenizer` of the settings, if it has been read already. Without `runner`, data.num_proc
    processes work on the chunks; they are spawned, so the calling program needs `if __name__ == "__main__"`.

    Raises:
        UserError: the source or the tokenizer is missing or wrong, the text is too short for one window, or the folder
            found is damaged (its tokens are not read).
    """
    tokenizer = tokenizer or given_tokenizer(config)
    place = place_of(config, tokenizer)
    final = place.path
    if final.exists():
        return _found(place, config, tokenizer)
    versions: dict[str, int | str] = {
        "format": FORMAT_VERSION,
        "rows": 2,
        "signatures": duplicates.algorithm(config.cleaning),
    }
    with held_work_folder(final, versions) as work:
        if final.exists():  # made by the process that this one has waited for
            work.remove()
            return _found(place, config, tokenizer)
        with Processes(config.data.num_proc) as processes:
            report = _prepare(config, tokenizer, runner or processes, work, place, inspect)
        work.remove()
    print(preparation_report.as_text(final, report))
    return final


def _found(place: DatasetPlace, config: Config, tokenizer: Tokenizer | None) -> Path:
    dataset = open_dataset(place.path, verify="sizes")  # the reader of the tokens verifies them
    _check_settings(dataset, _settings(config, tokenizer))
    dataset.train.check(dataset.fit(config).block_size)
    how = f"found by its name and settings; its source was not looked at: {place.why_unseen}"
    print(f"prepared data: {place.path} ({how if place.why_unseen else 'found, nothing to do'})")
    return place.path


def _prepare(
    config: Config,
    tokenizer: Tokenizer | None,
    runner: ChunkRunner,
    work: WorkFolder,
    place: DatasetPlace,
    inspect: Inspect | None,
) -> dict[str, Any]:
    """Run all stages, each of which skips what is done; returns the report."""
    clock = _Clock()
    is_cleaned = config.cleaning != CleaningConfig()
    if is_cleaned:
        stages.cleaner(config.cleaning)  # fails before the source is read, if a library is missing
    if config.augmentation.copies:
        Augmenter(config.augmentation)
    facts = stages.read(config.data, work, place.state)
    clock.lap("read")
    chunks, stage = range(len(facts["rows"])), "read"
    if is_cleaned:
        stage = "clean"
        _each(runner, stages.clean_chunk, work, config, "cleaning", facts)
        clock.lap("clean")
    plan = _decided(work, stage, len(chunks), config, tokenizer)
    clock.lap("decide")
    tokenize = functools.partial(stages.tokenize_chunk, stage=stage)
    _each(runner, tokenize, work, config, "tokenizing", facts)
    clock.lap("tokenize")
    settings = _settings(config, tokenizer)
    with new_folder(place.path, existing="keep") as folder:
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
    """Seconds by stage, without those spent before a kill."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 3), now


def _each(
    runner: ChunkRunner, task: Callable[..., int], work: WorkFolder, config: Config, label: str, facts: dict[str, Any]
) -> None:
    """Run `task` for the chunks that are not done."""
    ends_in = work.tokens if label == "tokenizing" else functools.partial(work.rows, "clean")
    missing = {number: size for number, size in enumerate(facts["bytes"]) if not ends_in(number).exists()}
    with stages.progress(label, sum(missing.values())) as bar:
        runner.each(functools.partial(task, work=work, config=config), list(missing), bar.update)


# ---------------------------------------------------------------- decisions about all documents


def _decided(
    work: WorkFolder, stage: str, num_chunks: int, config: Config, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """plan.json; if it is not there, it is made now, with rows.npy and the tokenizer."""
    file = work.path / "plan.json"
    if file.exists():
        return read_json(file)
    is_chat = config.data.format == "chat"
    fraction, texts = config.data.validation_fraction, sources.text_parts(config.data)
    plan = splitting.decide(work, stage, num_chunks, fraction, config.cleaning, is_chat, texts)
    if is_chat and np.count_nonzero(plan.codes) == 1:
        raise UserError(
            f"{sources.describe(config.data)}: one conversation is left of {len(plan.codes):,}, which cannot be both "
            "learned and held out for validation; give two or more, or less [cleaning]"
        )
    if not plan.codes.any():
        raise UserError(
            f"{sources.describe(config.data)}: [cleaning] drops all of its {len(plan.codes):,} documents; "
            "drop less: min_chars, max_chars, max_symbol_ratio, language"
        )
    tokenizer = tokenizer or _made_tokenizer(work, stage, plan, config)
    tokenizer.save(work.path / "tokenizer")
    with new_file(work.path / "rows.npy") as array:
        np.save(array, plan.codes)
    fingerprint = plan.fingerprint
    if is_chat:  # and the settings that change conversations
        fingerprint = _digest([fingerprint, _chat_settings(config)])
    decided = {
        "first": plan.first,
        "borders": plan.borders,
        "divided": plan.divided,
        "is_given": plan.is_given,
        "stage": stage,
        "tokenizer_digest": tokenizer.digest,
        "about": {"fingerprint": fingerprint},
        "overlap": plan.overlap,
        "repeats": preparation_report.repeats(plan),
    }
    write_json(file, decided)
    failpoint("prepare.decided")
    return decided


def _made_tokenizer(work: WorkFolder, stage: str, plan: splitting.SplitPlan, config: Config) -> Tokenizer:
    settings = config.tokenizer
    texts = _texts(work, stage, plan, config)
    if settings.type == "char":
        tokenizer = char_tokenizer(texts)
    else:
        sample = spread(texts, settings.train_bytes, stages.PIECE)
        bar = tqdm(sample, desc="training BPE", unit="part", disable=None, leave=False)
        tokenizer = train_bpe(bar, settings.entries, sys.stderr.isatty())
        if (found := tokenizer.vocab_size) < (settings.vocab_size or 0):
            print(f"tokenizer  tokenizer.vocab_size = {settings.vocab_size:,}, but the text gives only {found:,}")
    return _with_tokens(tokenizer, config)


def _texts(work: WorkFolder, stage: str, plan: splitting.SplitPlan, config: Config) -> Iterator[str]:
    """The texts that a tokenizer is made from: all that are kept; the turns of conversations.

    An alphabet must have the letters of changed copies, too; merges do not need them.
    """
    source = config if config.tokenizer.type == "char" else with_settings(config, augmentation_copies=0)
    for number, (begin, end) in enumerate(itertools.pairwise(plan.first)):
        rows = read_rows(work.rows(stage, number), ("texts", "parts", "numbers", "wheres"))
        codes = plan.codes[begin:end].tolist()
        if config.data.format == "chat":
            borders = [plan.borders.get(row, 0) for row in range(begin, end)]
            for _, _, _, text, _, _ in stages.conversations(rows, codes, borders, source):
                yield from chat.plain_texts(text, config.chat)
        else:
            yield from (text for text, code in zip(rows.texts, codes, strict=True) if code != splitting.DROPPED)


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- writing


def _write(
    folder: Path, tokenizer: Tokenizer, work: WorkFolder, chunks: range, config: Config, about: dict[str, object]
) -> dict[str, dict[str, int]]:
    """Write the dataset without its report; returns the counts of each split."""
    bar = tqdm(chunks, desc="writing", unit="chunk", disable=None, leave=False)
    writer: DatasetWriter | PackedWriter
    if config.data.format == "chat":
        writer = packed = PackedWriter(folder, tokenizer, config.block_size, config.chat.packing)
        for number in bar:
            _add_conversations(packed, read_arrays(work.tokens(number)))
        check_answers(writer.counts["train"]["num_supervised"])
    else:
        writer = stream = DatasetWriter(folder, tokenizer)
        for number in bar:
            counts = read_json(work.counts("tokens", number))["splits"]
            for split, tokens in read_arrays(work.tokens(number)).items():  # they contain end-of-text
                stream.add(split, tokens, counts[split]["num_bytes"], starts_document=False)
                stream.counts[split]["num_documents"] += counts[split]["num_documents"]
            stream.flush()
        check_window(writer.counts["train"]["num_tokens"], config.data.block_size or 1)
    if not writer.counts["validation"]["num_tokens"]:
        raise UserError(
            "nothing is left for validation; give more documents, a larger data.validation_fraction or less [cleaning]"
        )
    writer.finish(about)
    return writer.counts


def _add_conversations(writer: PackedWriter, arrays: dict[str, np.ndarray]) -> None:
    borders = np.cumsum(arrays["lengths"])[:-1]
    tokens, supervised = (np.split(arrays[name], borders) for name in ("tokens", "supervised"))
    columns = (arrays[name].tolist() for name in ("splits", "num_bytes", "documents", "continues"))
    for split, num_bytes, document, continues, ids, learned in zip(*columns, tokens, supervised):
        writer.add(SPLITS[split], ids.astype(np.int32), learned, num_bytes, document, bool(continues))


# ---------------------------------------------------------------- the name of a dataset


def place_of(config: Config, tokenizer: Tokenizer | None) -> DatasetPlace:
    """The folder of the dataset for these settings and this content of the source.

    Where the source is not at hand, it is the folder that has the name and the settings, if there is one.
    """
    data, settings = config.data, _settings(config, tokenizer)
    folder, name = Path(data.prepared_dir), sources.short_name(data)
    try:
        if not sources.is_at_hand(data) and (found := _without_source(folder, name, settings)):
            return DatasetPlace(found, "", "it is to be downloaded")
        found_here = _named(folder, settings, state := sources.source_state(data))  # as version 0.1 named it
        key = "" if found_here else sources.source_key(data, folder / ".sources.json")
    except UserError as error:
        if found := _without_source(folder, name, settings):
            return DatasetPlace(found, "", str(error))
        raise
    new = folder / f"{name}-{_digest([FORMAT_VERSION, settings, key])[:12]}"
    return DatasetPlace(next(iter(found_here or _named(folder, settings, key)), new), state)


def found_without_source(folder: Path, config: Config, tokenizer: Tokenizer | None) -> Path | None:
    """The dataset in `folder` that a machine takes that cannot look at the source; a UserError if several fit."""
    return _without_source(folder, sources.short_name(config.data), _settings(config, tokenizer))


def _named(folder: Path, settings: dict[str, object], key: str) -> list[Path]:
    """The datasets whose name ends in the digest of the settings and the key, whatever it begins with."""
    return sorted(folder.glob(f"*-{_digest([FORMAT_VERSION, settings, key])[:12]}"))


def _without_source(folder: Path, name: str, settings: dict[str, object]) -> Path | None:
    """The dataset of that name and with these settings; a UserError if several fit."""
    named = sorted(folder.glob(f"{glob.escape(name)}-????????????/metadata.json"))
    wanted = json.loads(json.dumps(settings))  # as they are read back
    found = [file.parent for file in named if json.loads(file.read_bytes()).get("settings") == wanted]
    if found[1:]:
        raise UserError(f"{' and '.join(map(str, found))} fit these settings, and the source is not here; keep one")
    return found[0] if found else None


def _settings(config: Config, tokenizer: Tokenizer | None) -> dict[str, object]:
    """The settings that decide the content of the dataset; `tokenizer` if it is given, not made from the data.

    Settings added in later versions are omitted at their defaults, so that older datasets are still found.
    """
    data, chosen = config.data, config.tokenizer
    settings = {
        **_source_settings(data),
        "max_bytes": data.max_bytes,
        "validation_fraction": data.validation_fraction,
        "tokenizer": chosen.type,
    }
    if chosen.type == "bpe":
        settings |= {"vocab_size": chosen.entries, "train_bytes": chosen.train_bytes}
    if chosen.type == "folder":
        assert tokenizer is not None
        settings["tokenizer_digest"] = tokenizer.digest  # includes special tokens
        if data.format == "chat" and tokenizer.own_template is not None:
            settings["chat_template"] = tokenizer.own_template
    elif chosen.special_tokens:
        settings["special_tokens"] = chosen.special_tokens
    for name in ("on_bad_record", "max_record_bytes", "encoding"):
        if getattr(data, name) != getattr(DataConfig(), name):
            settings[name] = getattr(data, name)
    if data.skills:
        settings["skills"] = sorted(data.skills)
    default = vars(CleaningConfig())
    if cleaning := {name: value for name, value in vars(config.cleaning).items() if value != default[name]}:
        settings["cleaning"] = cleaning
    if data.format == "chat":
        settings |= {"format": "chat", "block_size": config.block_size, **_chat_settings(config)}
    return settings


def _source_settings(data: DataConfig) -> dict[str, object]:
    """The settings of one source or of several; their paths belong to `sources.source_key`."""
    parts, with_field = sources_of(data), ("jsonl", "parquet", "tfds:", "huggingface:")
    fields = [part.text_field if part.source.startswith(with_field) else None for part in parts]
    if isinstance(data.source, str):
        return {"source": data.source, "text_field": fields[0]}
    columns = zip(parts, fields)
    return {"source": [{"source": part.source, "text_field": f, "weight": part.weight} for part, f in columns]}


def _chat_settings(config: Config) -> dict[str, object]:
    settings: dict[str, object] = {"chat": vars(config.chat)} if config.chat != ChatConfig() else {}
    if config.augmentation.copies:
        augmentation = dict(vars(config.augmentation))
        if file := augmentation.pop("synonyms"):
            try:
                augmentation["synonyms_digest"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
            except OSError as error:
                raise UserError(f"augmentation.synonyms = {file}: cannot be read ({error.strerror})") from None
        settings["augmentation"] = augmentation
    return settings


def _check_settings(dataset: TokenDataset, settings: dict[str, object]) -> None:
    """Refuse a folder whose dataset was prepared with other settings and copied there."""
    settings = json.loads(json.dumps(settings))  # as they are read back
    for name in sorted(settings.keys() | dataset.settings.keys()):
        if (there := dataset.settings.get(name)) != (here := settings.get(name)):
            raise UserError(
                f"{dataset.path}: holds data that was prepared with {name} = {there}, not {here}; "
                f"delete {dataset.path} and prepare again"
            )
