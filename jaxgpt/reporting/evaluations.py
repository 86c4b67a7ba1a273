"""evaluations.jsonl, what `evaluate` has found of a run, as rows for its report: the newest figure of each kind."""

import json
from pathlib import Path
from typing import NamedTuple

FILE = "evaluations.jsonl"
_TEXT_METRICS = ("loss", "perplexity", "bits_per_byte")
_NO_METRICS = ("published", "questions", "cut", "few_shot")


class Row(NamedTuple):
    """One figure."""

    name: str
    """Task or text."""
    metric: str
    value: str
    error: str
    """Standard error, "" where there is none."""
    step: str
    how: str
    beside: list[str]
    """What others came to, one source a line."""


def rows(workdir: Path) -> list[Row]:
    """The figures of the newest evaluation of each task, text and kind of writing in each way of doing it."""
    newest: dict[tuple, list[Row]] = {}
    for found in _lines(workdir / FILE):
        for identity, made in _parts(found):
            newest.pop(identity, None)  # so that the newest come last
            newest[identity] = made
    return [row for made in newest.values() for row in made]


def _lines(path: Path) -> list[dict]:
    """The objects of the file; a line that is being written is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [each for each in found if isinstance(each, dict)]


def _parts(found: dict) -> list[tuple[tuple, list[Row]]]:
    """(what it is a figure of and how it was made, its rows) of each text, task and writing of one evaluation."""
    step = f"{found['step']:,}" if found.get("step") is not None else ""
    dtype, parts = str(found.get("dtype", "")), []

    def add(result: dict, name: str, metrics: list[str], how: str) -> None:
        cells = [_row(result, name, metric, step, f"{how}, {dtype}") for metric in metrics]
        parts.append(((name, how, dtype, step), cells))

    for text in found.get("texts") or ():
        how = f"windows of {found.get('window')} tokens, stride {found.get('stride')}"
        add(text, text["name"], [key for key in _TEXT_METRICS if text.get(key) is not None], how)
    for task in found.get("tasks") or ():
        metrics = [key for key, value in task.items() if _is_metric(key, value)]
        examples = f", {task['few_shot']} examples" if task.get("few_shot") else ""
        source = f", {task['source']}" if task.get("source") else ""
        add(task, task["task"], metrics, f"{task['questions']:,} questions{examples}{source}")
    if writing := found.get("generation"):
        real = {key: value for key, value in (writing.get("real") or {}).items() if value is not None}
        published = [{"model": "real texts", "metric": key, "value": real[key], "source": ""} for key in real]
        figures = {key: value for key, value in writing["model"].items() if value is not None}
        how = f"{writing['prompts']:,} prompts, temperature {writing['temperature']}"
        add({**figures, "published": published}, "what it writes", list(figures), how)
    return parts


def _is_metric(key: str, value: object) -> bool:
    return isinstance(value, float) and "_stderr" not in key and key not in _NO_METRICS


def _row(result: dict, name: str, metric: str, step: str, how: str) -> Row:
    error = result.get(f"{metric}_stderr")
    by_source: dict[str, list[str]] = {}
    for each in result.get("published") or ():
        if each["metric"] == metric:
            by_source.setdefault(each["source"], []).append(f"{each['model']}: {_form(metric, each['value'])}")
    beside = [" · ".join(figures) + (f" ({source})" if source else "") for source, figures in by_source.items()]
    told = "" if error is None else f"± {_form(metric, error)}"
    return Row(name, metric, _form(metric, result[metric]), told, step, how, beside)


def _form(metric: str, value: float) -> str:
    if metric.startswith(("acc", "exact_match")):
        return f"{100 * value:.2f} %"
    return f"{value:,.4g}" if abs(value) >= 10 else f"{value:.4f}"
