"""Several runs compared: the settings that differ, their cards, and what makes these incomparable.

Everything is read from the files of the runs, config.json as plain JSON, so that runs in progress and runs of other
versions compare as well.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt.config import Config, flatten
from jaxgpt.errors import UserError
from jaxgpt.reporting import run_files
from jaxgpt.reporting.figures import word
from jaxgpt.reporting.run_card import FIELDS, read_card, shown_as
from jaxgpt.reporting.run_files import Columns
from jaxgpt.training.metrics import read_metrics

ABSENT, DIFFERS = "–", "≠"
MAX_WORDS = 30  # characters of a cell of LONG, as there is one column a run; pages and JSON have all
LONG = ("model", "data", "started_from", "command", "commit", "versions")


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    path: Path
    name: str
    """The end of its path that differs from the others."""
    settings: dict[str, Any]
    """{"model.n_layer": 12, ...} as config.json has them."""
    summary: dict
    """Empty while the run goes on."""
    columns: Columns
    """The columns of metrics.jsonl, with "time"."""
    card: dict
    """Its `read_card`."""


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """The runs in these folders. Raises UserError for fewer than two, one given twice, or a folder that is no run."""
    if len(folders) < 2:
        raise UserError(f"compare needs two runs or more, got {len(folders)}; name their folders: compare RUN RUN ...")
    places = [folder.resolve() for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            first = folders[places.index(place)]
            same = "twice" if str(first) == str(folders[number]) else f"twice, as {first} and as {folders[number]}"
            raise UserError(f"{folders[number]}: the same run {same}; name each run once")
    return [_read_run(*each) for each in zip(folders, distinguishing_names(places), strict=True)]


def _read_run(folder: Path, name: str) -> ComparedRun:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the --workdir of a run")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no run, as it holds no config.json; name the --workdir of a run")
    config = _read_object(folder / "config.json")
    summary = _read_object(folder / "summary.json") if (folder / "summary.json").exists() else {}
    settings = {
        f"{section}.{key}": value
        for section, fields in config.items()
        for key, value in (fields.items() if isinstance(fields, dict) else ())
    }
    records = read_metrics(folder)
    card, columns = read_card(folder, records, config, summary), run_files.with_time(run_files.columns(records))
    return ComparedRun(folder, name, settings, summary, columns, card)


def _read_object(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, but a run's is an object")
    return found


def distinguishing_names(paths: Sequence[Path]) -> list[str]:
    """The last folder of each path, preceded by as many more as distinguish it from paths with the same end."""
    names = []
    for path in paths:
        alike = [other for other in paths if other.name == path.name]
        depth = 1
        while len({other.parts[-depth:] for other in alike}) < len(alike):
            depth += 1
        names.append("/".join(path.parts[-depth:]))
    return names


def differing_settings(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """{"model.n_layer": [4, 6], ...}: the settings that are not the same in all runs, a value for each run.

    A run of a version without a setting counts as having its default; the value shown is ABSENT.
    """
    defaults = json.loads(json.dumps(flatten(Config())))
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        effective = [run.settings.get(name, defaults.get(name)) for run in runs]
        if differs(effective):
            found[name] = [run.settings.get(name, ABSENT) for run in runs]
    return found


def table(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """{"steps": [500, 300], ...}: the fields that the card of any run has, a value for each run, or None."""
    names = dict.fromkeys((*FIELDS, *(name for run in runs for name in run.card)))
    rows = {name: [run.card.get(name) for run in runs] for name in names if name != "samples"}
    return {name: values for name, values in rows.items() if any(value is not None for value in values)}


def differs(values: Sequence) -> bool:
    """Whether the runs do not all have the same value."""
    return any(value != values[0] for value in values)


def best_of(key: str, values: Sequence, comparable: set[str]) -> set[int]:
    """The places of the runs with the best value of `key`; none where the values do not compare."""
    number, there = shown_as(key), [value for value in values if value is not None]
    if not number.best or len(set(there)) < 2 or (number.per and number.per not in comparable):
        return set()
    return {place for place, value in enumerate(values) if value == number.best(there)}


def comparability(runs: Sequence[ComparedRun]) -> tuple[set[str], list[str]]:
    """("token" and "byte": units per which losses compare, a sentence for each reason why numbers do not compare)."""
    comparable, warnings = {"token", "byte"}, []
    tokenizers = [_tokenizer(run) for run in runs]
    if len({digest for digest in tokenizers if digest}) > 1:
        comparable -= {"token"}
        warnings.append(
            f"The tokenizers differ ({_groups(runs, tokenizers)}), so losses and perplexities, which are per token, do "
            "not compare. Bits per byte do, of the same text."
        )
    data = [_fingerprint(run) for run in runs]
    if len({fingerprint for fingerprint in data if fingerprint}) > 1:
        comparable = set()
        warnings.append(f"The data differ ({_groups(runs, data)}), so the losses are of different texts.")
    if unknown := [run.name for run, *ids in zip(runs, tokenizers, data, strict=True) if not all(ids)]:
        warnings.append(
            f"{', '.join(unknown)}: not known before the first checkpoint which data it reads, so whether its losses "
            "compare has not been checked."
        )
    for of, sentence in (
        (_block_size, "The windows differ ({} tokens): longer ones give a token more context, so a lower loss."),
        (_evaluated, "Validation losses are means of different numbers of rows ({})."),
    ):
        values = [of(run) for run in runs]
        if len({value for value in values if value}) > 1:
            warnings.append(sentence.format(_groups(runs, values, named=True)))
    warnings += [f"{run.name}: no step has been logged yet." for run in runs if not len(run.columns["step"])]
    return comparable, warnings


def _groups(runs: Sequence[ComparedRun], values: Sequence, named: bool = False) -> str:
    """Runs with equal values: "a, b | c", or with the values "256: a, b | 512: c"."""
    groups: dict = {}
    for run, value in zip(runs, values, strict=True):
        if value:
            groups.setdefault(value, []).append(run.name)
    return " | ".join(f"{value}: {', '.join(names)}" if named else ", ".join(names) for value, names in groups.items())


def _tokenizer(run: ComparedRun) -> str | None:
    file = run.path / "tokenizer" / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _fingerprint(run: ComparedRun) -> str | None:
    """The fingerprint of the documents and their split, whatever the tokenizer."""
    if fingerprint := run.summary.get("data", {}).get("fingerprint"):
        return fingerprint
    for file in run.path.glob("checkpoints/*/metadata.json"):  # all say the same
        return _read_object(file).get("data_fingerprint")
    return None


def _block_size(run: ComparedRun) -> int | None:
    return run.settings.get("data.block_size") or run.settings.get("model.n_positions")


def _evaluated(run: ComparedRun) -> str | None:
    """The number of rows whose mean is the validation loss; "all" where the batches hold the whole split."""
    get = run.settings.get
    trained, rows = get("train.per_device_train_batch_size"), get("train.global_batch_size")
    batches, accumulation = get("eval.eval_batches"), get("train.gradient_accumulation_steps") or 1
    if batches is None:
        return "all"
    if not (trained and rows):
        return None
    shards = rows // (accumulation * trained)
    asked = batches * shards * (get("eval.per_device_eval_batch_size") or trained)
    tokens, block_size = run.summary.get("data", {}).get("validation_tokens"), _block_size(run)
    if get("data.format") == "text" and tokens and block_size and asked * block_size >= tokens - 1:
        return "all"
    return f"{asked:,}"


def formatted(key: str, value: object) -> str:
    """A field of a card as it is shown."""
    return ABSENT if value is None else shown_as(key).form(value)


def text_report(runs: Sequence[ComparedRun], width: int) -> str:
    """Warnings, settings and cards as tables at most `width` wide, if the names let them; long words are cut."""
    names = [run.name for run in runs]
    comparable, warnings = comparability(runs)
    settings = [[name, *map(word, values)] for name, values in differing_settings(runs).items()]
    lines = []
    for key, values in table(runs).items():
        best = best_of(key, values, comparable)
        marks = ["*" if place in best else " " * bool(best) for place in range(len(values))]
        words = [formatted(key, value) for value in values]
        if key in LONG:
            words = [text if len(text) <= MAX_WORDS else f"{text[: MAX_WORDS - 1]}…" for text in words]
        cells = [text + mark for text, mark in zip(words, marks, strict=True)]
        lines.append([f"{shown_as(key).label} {DIFFERS}" if differs(values) else shown_as(key).label, *cells])
    parts = [f"warning  {warning}" for warning in warnings] + ([""] if warnings else [])
    parts.append(
        _tables(["settings that differ", *names], settings, width) if settings else "The settings are the same."
    )
    parts += ["", _tables(["cards", *names], lines, width), f"* the best   {DIFFERS} not the same"]
    return "\n".join(parts)


def _tables(head: list[str], rows: list[list[str]], width: int) -> str:
    """The rows under `head`; columns that do not fit go into more tables below, each with the first column."""
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    groups: list[list[int]] = [[]]
    for place in range(1, len(head)):
        if groups[-1] and widths[0] + sum(2 + widths[other] for other in [*groups[-1], place]) > width:
            groups.append([])
        groups[-1].append(place)
    line = lambda row, group: [row[0].ljust(widths[0]), *(row[place].rjust(widths[place]) for place in group)]
    tables = [["  ".join(line(row, group)).rstrip() for row in [head, *rows]] for group in groups]
    return "\n\n".join(map("\n".join, tables))


def as_json(runs: Sequence[ComparedRun]) -> str:
    """{"runs": [{"name", "path", the fields of its card}], "differing": [names of fields], "settings", "warnings"}.

    "settings" is {name: a value for each run}. A field that no file of a run knows is null.
    """
    rows = table(runs)
    found = {
        "runs": [{"name": run.name, "path": str(run.path), **dict.fromkeys(FIELDS), **run.card} for run in runs],
        "differing": [key for key, values in rows.items() if differs(values)],
        "settings": differing_settings(runs),
        "warnings": comparability(runs)[1],
    }
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"
