"""Several runs beside each other: the settings that differ, the final numbers, and what makes these incomparable.

All of it is read from what the runs have written, config.json as plain JSON, so that runs that go on still and runs of
other versions compare as well.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.config import Config, flatten
from jaxgpt.errors import UserError
from jaxgpt.reporting import curves
from jaxgpt.reporting.figures import big
from jaxgpt.training.metrics import read_metrics

RUNNING = "no summary yet: running, or killed"
ABSENT = "–"


@dataclasses.dataclass(frozen=True)
class Run:
    path: Path
    name: str
    """What tells it from the others."""
    settings: dict[str, object]
    """{"model.n_layer": 12, ...} as config.json has them."""
    summary: dict
    """Empty while the run goes on."""
    columns: dict[str, np.ndarray]
    """Those of curves.py, with "time"."""


# ---------------------------------------------------------------- reading


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, in this order.

    Raises:
        UserError: fewer than two, one given twice, or a folder that is no run; names it.
    """
    if len(folders) < 2:
        raise UserError(f"compare needs two runs or more, got {len(folders)}; name their folders: compare RUN RUN ...")
    places = [folder.resolve() for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            first = folders[places.index(place)]
            same = "twice" if str(first) == str(folders[number]) else f"twice, as {first} and as {folders[number]}"
            raise UserError(f"{folders[number]}: the same run {same}; name each run once")
    return [_read_run(*each) for each in zip(folders, distinguishing_names(places), strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the --workdir of a run")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no run, as it holds no config.json; name the --workdir of a run")
    config, summary = _read_object(folder / "config.json"), {}
    if (folder / "summary.json").exists():
        summary = _read_object(folder / "summary.json")
    settings = {
        f"{section}.{key}": value
        for section, fields in config.items()
        for key, value in (fields.items() if isinstance(fields, dict) else ())
    }
    return Run(folder, name, settings, summary, curves.with_time(curves.columns(read_metrics(folder))))


def _read_object(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, but a run's is an object")
    return found


def distinguishing_names(paths: Sequence[Path]) -> list[str]:
    """The last folder of each path, and before it as many more as tell it from those that end alike."""
    names = []
    for path in paths:
        alike = [other for other in paths if other.name == path.name]
        depth = next(
            depth
            for depth in range(1, 1 + len(path.parts))
            if len({other.parts[-depth:] for other in alike}) == len(alike)
        )
        names.append("/".join(path.parts[-depth:]))
    return names


# ---------------------------------------------------------------- settings


def differing_settings(runs: Sequence[Run]) -> dict[str, list[object]]:
    """{"model.n_layer": [4, 6], ...}: a value for each run, of the settings that are not the same in all of them.

    A run whose version does not know a setting has done what its default does; its value is ABSENT.
    """
    defaults = json.loads(json.dumps(flatten(Config())))
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        effective = [run.settings.get(name, defaults.get(name)) for run in runs]
        if any(value != effective[0] for value in effective):
            found[name] = [run.settings.get(name, ABSENT) for run in runs]
    return found


# ---------------------------------------------------------------- final numbers


class Number(NamedTuple):
    """How a final number is told."""

    label: str
    form: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None = None
    """min or max, where one of them is better."""
    per: str = ""
    """ "token" or "byte": it compares only where these are the same."""


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


_NUMBERS = {
    "status": Number("status", str),
    "steps": Number("steps", "{:,.0f}".format),
    "tokens": Number("tokens seen", big),
    "parameters": Number("parameters", big),
    "train_loss": Number("training loss, last", "{:.4f}".format, min, "token"),
    "eval_loss": Number("validation loss, last", "{:.4f}".format, min, "token"),
    "best_eval_loss": Number("validation loss, best", "{:.4f}".format, min, "token"),
    "best_step": Number("step of the best", "{:,.0f}".format),
    "best_perplexity": Number("perplexity of the best", "{:,.4g}".format, min, "token"),
    "best_bits_per_byte": Number("bits per byte of the best", "{:.4f}".format, min, "byte"),
    "tokens_per_second": Number("tokens/s, median", big, max),
    "mfu": Number("MFU, median", "{:.1%}".format, max),
    "seconds": Number("training time", _time),
    "device": Number("device", str),
}


def told(key: str) -> Number:
    """How the number of this name in `numbers` is told."""
    return _NUMBERS.get(key) or Number(f"{key.removeprefix('accuracy ')}, last", "{:.1%}".format, max)


def numbers(run: Run) -> dict[str, object]:
    """What the run has come to, by the names of `_NUMBERS` and "accuracy TASK"; None for what is not known."""

    def of(key: str, pick: Callable) -> float | None:
        values = curves.known(run.columns, key)[1]
        return pick(values).item() if len(values) else None

    last = lambda values: values[-1]
    found = {
        "status": run.summary.get("status", RUNNING),
        "steps": of("step", max),
        "tokens": of("tokens", max),
        "parameters": run.summary.get("parameters"),
        "train_loss": of("loss", last),
        "eval_loss": of("eval_loss", last),
        "best_eval_loss": None,
        "tokens_per_second": of("tokens_per_second", np.median),
        "mfu": of("mfu", np.median),
        "seconds": of("time", max),
        "device": f"{run.summary['devices']} x {run.summary['device']}" if "device" in run.summary else None,
    }
    losses = run.columns["eval_loss"]
    if not np.isnan(losses).all():
        at = np.nanargmin(losses)
        found |= {"best_eval_loss": losses[at].item(), "best_step": run.columns["step"][at].item()}
        for key in ("perplexity", "bits_per_byte"):
            value = run.columns[f"eval_{key}"][at].item()
            found[f"best_{key}"] = None if np.isnan(value) else value
    found |= {f"accuracy {name}": of(key, last) for key, name in curves.accuracies(run.columns).items()}
    return found


def table(runs: Sequence[Run]) -> dict[str, list[object]]:
    """{"steps": [500, 300], ...}: the final numbers that any run knows, a value for each run."""
    each = [numbers(run) for run in runs]
    names = dict.fromkeys((*_NUMBERS, *(name for found in each for name in found)))
    rows = {name: [found.get(name) for found in each] for name in names}
    return {name: values for name, values in rows.items() if any(value is not None for value in values)}


def best_of(key: str, values: Sequence, comparable: set[str]) -> set[int]:
    """The numbers of the runs whose value of `key` is the best; none where it cannot be said."""
    number, there = told(key), [value for value in values if value is not None]
    if not number.best or len(set(there)) < 2 or (number.per and number.per not in comparable):
        return set()
    return {place for place, value in enumerate(values) if value == number.best(there)}


# ---------------------------------------------------------------- do they compare?


def comparability(runs: Sequence[Run]) -> tuple[set[str], list[str]]:
    """(of "token" and "byte" those per which losses compare, a sentence for each thing that speaks against it)."""
    comparable, told_of = {"token", "byte"}, []
    tokenizers = [_tokenizer(run) for run in runs]
    if len({digest for digest in tokenizers if digest}) > 1:
        comparable -= {"token"}
        told_of.append(
            f"The tokenizers differ ({_groups(runs, tokenizers)}), so losses and perplexities, which are per token, do "
            "not compare. Bits per byte do, of the same text."
        )
    data = [_fingerprint(run) for run in runs]
    if len({fingerprint for fingerprint in data if fingerprint}) > 1:
        comparable = set()
        told_of.append(f"The data differ ({_groups(runs, data)}), so the losses are of different texts.")
    if unknown := [run.name for run, *ids in zip(runs, tokenizers, data, strict=True) if not all(ids)]:
        told_of.append(
            f"{', '.join(unknown)}: not known before the first checkpoint which data it reads, so whether its losses "
            "compare has not been checked."
        )
    for key, sentence in (
        ("data.block_size", "The windows differ ({} tokens): longer ones give a token more context, so a lower loss."),
        ("eval", "Validation losses are means of different numbers of rows ({})."),
    ):
        values = [_evaluated(run) if key == "eval" else _block_size(run) for run in runs]
        if len({value for value in values if value}) > 1:
            told_of.append(sentence.format(_groups(runs, values, named=True)))
    told_of += [f"{run.name}: no step has been logged yet." for run in runs if not len(run.columns["step"])]
    return comparable, told_of


def _groups(runs: Sequence[Run], values: Sequence, named: bool = False) -> str:
    """Which runs are alike: "a, b | c", or with the values "256: a, b | 512: c"."""
    groups: dict = {}
    for run, value in zip(runs, values, strict=True):
        if value:
            groups.setdefault(value, []).append(run.name)
    return " | ".join(f"{value}: {', '.join(names)}" if named else ", ".join(names) for value, names in groups.items())


def _tokenizer(run: Run) -> str | None:
    file = run.path / "tokenizer" / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _fingerprint(run: Run) -> str | None:
    """That of the documents and their split, which tokenizers have no part in."""
    if fingerprint := run.summary.get("data", {}).get("fingerprint"):
        return fingerprint
    for file in run.path.glob("checkpoints/*/metadata.json"):  # all say the same
        return _read_object(file).get("data_fingerprint")
    return None


def _block_size(run: Run) -> int | None:
    return run.settings.get("data.block_size") or run.settings.get("model.n_positions")


def _evaluated(run: Run) -> str | None:
    """How many rows the validation loss is a mean of; of a small validation split the batches may hold more."""
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
