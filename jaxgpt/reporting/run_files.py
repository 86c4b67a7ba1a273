"""The records of a run folder as tables: metrics.jsonl as columns, evaluations.jsonl as rows."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.storage.files import read_json_lines
from jaxgpt.training.checkpoint import EVALUATIONS

Columns = dict[str, np.ndarray]
"""One float array [lines] for each metric, nan where a line does not know it."""

ACTIVITIES = ("step", "data", "eval", "save", "other")
"""Parts of the seconds of a line."""
_KEYS = (
    *("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu"),
    *("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_stop_rate", "seconds_total"),
    "seconds_compile",
    *(f"seconds_{name}" for name in ACTIVITIES),
)


def columns(records: Sequence[dict]) -> Columns:
    """The metrics of training, of evaluation, and of the tasks that were scored during training."""
    keys = dict.fromkeys((*_KEYS, *(key for record in records for key in record if _accuracy(key))))
    return {key: np.array([record.get(key) for record in records], float) for key in keys}


def known(table: Columns, key: str, over: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """Steps (or column `over`) and values of a metric, from the lines that hold both."""
    if key not in table:  # the task of another run
        return np.empty(0), np.empty(0)
    both = ~np.isnan(table[key]) & ~np.isnan(table[over])
    return table[over][both], table[key][both]


def accuracies(table: Columns) -> dict[str, str]:
    """{"eval_piqa_acc_norm": "piqa, acc_norm", ...}: the tasks' columns that hold a number, and their names."""
    return {key: _accuracy(key) for key in table if _accuracy(key) and len(known(table, key)[0])}


def _accuracy(key: str) -> str:
    """The name of a task's accuracy; "" for what is none."""
    found = re.fullmatch(r"eval_(.+?)_(acc|acc_norm)", key)
    return "" if not found else found[1] if found[2] == "acc" else f"{found[1]}, {found[2]}"


def seconds(table: Columns) -> np.ndarray:
    """Seconds by activity (rows) and line (columns); "other" is the rest of the total."""
    each = np.nan_to_num([table[f"seconds_{name}"] for name in ACTIVITIES])
    each[-1] = np.maximum(0, np.nan_to_num(table["seconds_total"]) - each[:-1].sum(axis=0))
    return each


def with_time(table: Columns) -> Columns:
    """The table with "time", the seconds of training until each line, and with "tokens" on every line.

    Lines of evaluations hold neither: both are interpolated by steps between the lines of training around them.
    """
    spent = seconds(table).sum(axis=0)
    time = np.where(spent > 0, spent.cumsum(), np.nan)
    return table | {"time": _filled(table["step"], time), "tokens": _filled(table["step"], table["tokens"])}


def _filled(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values`, which are 0 at step 0, with the unknown ones interpolated; unchanged where none is known."""
    there = ~np.isnan(values)
    if not there.any():
        return values
    last, between = steps[there][-1], np.interp(steps, np.append(0, steps[there]), np.append(0, values[there]))
    beyond = values[there][-1] * steps / max(last, 1)
    return np.where(there, values, np.where(steps > last, beyond, between))


_TEXT_METRICS = ("loss", "perplexity", "bits_per_byte")
_NO_METRICS = ("published", "questions", "cut", "few_shot")


class EvaluationRow(NamedTuple):
    """One figure."""

    name: str
    """Task or text."""
    metric: str
    value: str
    error: str
    """The standard error, or ""."""
    step: str
    how: str
    beside: list[str]
    """Published figures, one source a line."""


def evaluation_rows(workdir: Path) -> list[EvaluationRow]:
    """The figures of the newest evaluation of each task, text and kind of writing in each way of doing it."""
    newest: dict[tuple, list[EvaluationRow]] = {}
    for found in read_json_lines(workdir / EVALUATIONS):
        for identity, made in _parts(found):
            newest.pop(identity, None)  # so that the newest come last
            newest[identity] = made
    return [row for made in newest.values() for row in made]


def task_metrics(task: dict) -> list[str]:
    """The names of a task's figures, without those of their errors."""
    names = [key for key, value in task.items() if isinstance(value, float)]
    return [key for key in names if "_stderr" not in key and key not in _NO_METRICS]


def _parts(found: dict) -> list[tuple[tuple, list[EvaluationRow]]]:
    """(identity, rows) of each text, task and kind of writing in one evaluation."""
    step = f"{found['step']:,}" if found.get("step") is not None else ""
    dtype, parts = str(found.get("dtype", "")), []

    def add(result: dict, name: str, metrics: list[str], how: str) -> None:
        cells = [_row(result, name, metric, step, f"{how}, {dtype}") for metric in metrics]
        parts.append(((name, how, dtype, step), cells))

    for text in found.get("texts") or ():
        how = f"windows of {found.get('window')} tokens, stride {found.get('stride')}"
        add(text, text["name"], [key for key in _TEXT_METRICS if text.get(key) is not None], how)
    for task in found.get("tasks") or ():
        examples = f", {task['few_shot']} examples" if task.get("few_shot") else ""
        source = f", {task['source']}" if task.get("source") else ""
        add(task, task["task"], task_metrics(task), f"{task['questions']:,} questions{examples}{source}")
    if writing := found.get("generation"):
        real = {key: value for key, value in (writing.get("real") or {}).items() if value is not None}
        published = [{"model": "real texts", "metric": key, "value": real[key], "source": ""} for key in real]
        figures = {key: value for key, value in writing["model"].items() if value is not None}
        how = f"{writing['prompts']:,} prompts, temperature {writing['temperature']}"
        add({**figures, "published": published}, "what it writes", list(figures), how)
    for one in (found.get("skills") or {}).get("rows", ()):
        cells = {"acc": one["right"] / one["questions"], "stops": one["stops"] / one["questions"]}
        add(cells, f"{one['skill']}, {one['language']}", list(cells), f"{one['questions']:,} held-out questions")
    return parts


def _row(result: dict, name: str, metric: str, step: str, how: str) -> EvaluationRow:
    error = result.get(f"{metric}_stderr")
    by_source: dict[str, list[str]] = {}
    for each in result.get("published") or ():
        if each["metric"] == metric:
            by_source.setdefault(each["source"], []).append(f"{each['model']}: {_form(metric, each['value'])}")
    beside = [" · ".join(figures) + (f" ({source})" if source else "") for source, figures in by_source.items()]
    spread = "" if error is None else f"± {_form(metric, error)}"
    return EvaluationRow(name, metric, _form(metric, result[metric]), spread, step, how, beside)


def _form(metric: str, value: float) -> str:
    if metric.startswith(("acc", "exact_match")):
        return f"{100 * value:.2f} %"
    return f"{value:,.4g}" if abs(value) >= 10 else f"{value:.4f}"
