"""The figures of an evaluation as tables for a terminal, beside what OpenAI published of its four GPT-2 models."""

from collections.abc import Iterator, Mapping, Sequence

from jaxgpt.evaluation.perplexity import ANSWERS
from jaxgpt.evaluation.skill_accuracy import skill_table

_NO_METRICS = {"questions", "cut", "few_shot"}


def report(found: Mapping) -> str:
    """The tables of what `measure` found."""
    step = f", step {found['step']:,}" if found["step"] else ""
    parts = [f"{found['checkpoint']}{step}, {found['dtype']} on {found['devices']}"]
    if found["texts"]:
        parts.append(_texts(found))
    if found["tasks"]:
        parts.append(_tasks(found["tasks"]))
    if found["generation"]:
        parts.append(_generation(found["generation"]))
    if found.get("skills"):
        parts.append(skill_table(found["skills"]))
    return "\n".join(parts)


def _texts(found: Mapping) -> str:
    width = max(len("text"), *(len(each["name"]) for each in found["texts"]))
    how = f"windows of {found['window']:,} tokens that move on by {found['stride']:,}"
    if found["texts"][0]["name"] == ANSWERS:
        how = f"conversations of up to {found['window']:,} tokens, of which what is learned is scored"
    lines = [
        how,
        f"{'text':<{width}}  {'tokens':>12}  {'bytes':>12}  {'loss':>8}  {'perplexity':>10}  {'bits/byte':>9}",
    ]
    for each in found["texts"]:
        lines.append(
            f"{each['name']:<{width}}  {each['tokens']:>12,}  {each['bytes']:>12,}  {each['loss']:>8.4f}  "
            f"{each['perplexity']:>10.2f}  {each['bits_per_byte']:>9.4f}"
        )
    return "\n".join(lines)


def metrics_of(task: Mapping) -> list[str]:
    """The names of a task's figures, without those of their errors."""
    numbers = [name for name, value in task.items() if isinstance(value, (int, float))]
    return [name for name in numbers if name not in _NO_METRICS and not name.partition("[")[0].endswith("_stderr")]


def _tasks(tasks: Sequence[Mapping]) -> str:
    rows = [row for task in tasks for row in _rows(task)]
    names, metrics = (max(len(word), *(len(row[i]) for row in rows)) for word, i in (("task", 0), ("metric", 2)))
    head = f"{'task':<{names}}  {'questions':>9}  {'metric':<{metrics}}  {'value':>10}  {'error':>7}"
    published = any(figures for *_, figures, _ in rows)
    lines = [head + "".join(f"  {model:>10}" for model in _SIZES if published)]
    for name, count, metric, value, error, figures, data in rows:
        cells = "".join(f"  {_number(figure):>10}" for figure in figures)
        lines.append(
            f"{name:<{names}}  {count:>9}  {metric:<{metrics}}  {value:>10}  {error:>7}{cells}  {data}".rstrip()
        )
    for task in tasks:
        if task["cut"]:
            longer = f"{task['cut']:,} contexts were longer than the model reads"
            lines.append(f"  {task['task']}: {longer} and lost their beginning")
    sources = dict.fromkeys(data for task in tasks for _, data, _ in _published(task))
    return "\n".join([*lines, *(f"  published: {_PAPER}: {data}" for data in sources)])


def _rows(task: Mapping) -> Iterator[tuple[str, str, str, str, str, Sequence[float], str]]:
    """(task, questions, metric, value, error, published figures by size, their data set)."""
    examples = f", {task['few_shot']} examples" if task.get("few_shot") else ""
    name, count = f"{task['task']}{examples}", f"{task['questions']:,}"
    for metric in metrics_of(task):
        label, bracket, filtered = metric.partition("[")
        error = task.get(f"{label}_stderr{bracket}{filtered}", task.get(f"{metric}_stderr"))
        error_cell = f"{error:.4f}" if isinstance(error, float) else ""
        own = (name, count, metric, _number(task[metric]), error_cell)
        beside = [(figures, data.partition(";")[0]) for of, data, figures in _published(task) if of == metric]
        for figures, data in beside or [((), "")]:
            yield *own, figures, data
            own = ("", "", "", "", "")


def _number(value: float) -> str:
    return f"{value:,.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def _generation(found: Mapping) -> str:
    columns = ("distinct_1", "distinct_2", "distinct_3", "rep_4", "stops", "tokens")
    lines = [
        f"{found['prompts']:,} texts of up to {found['max_new_tokens']:,} tokens at temperature "
        f"{found['temperature']:g}, after {found['origin']}",
        "      " + "".join(f"  {column.replace('_', '-'):>10}" for column in columns),
    ]
    for name in ("model", "real"):
        if found[name]:
            values = [found[name][column] for column in columns]
            cells = ["" if value is None else f"{value:.4f}" for value in values[:-1]] + [f"{values[-1]:.1f}"]
            lines.append(f"{name:<6}" + "".join(f"  {value:>10}" for value in cells))
    if found["cut"]:
        lines.append(f"  {found['cut']:,} prompts were too long and lost their beginning")
    return "\n".join(lines)


# Radford et al. 2019 call the first two sizes 117M and 345M; they have 124 and 355 million parameters.
_SIZES = ("GPT-2 124M", "GPT-2 355M", "GPT-2 774M", "GPT-2 1.5B")
_PAPER = "Radford et al. 2019, table 3"
_OWN_DETOKENIZER = "OpenAI's own detokenizer, which was not published: it does not compare exactly"
_OWN_LAMBADA = "OpenAI's own version of the text; its accuracy leaves out stop words: it does not compare exactly"

_FIGURES: dict[str, list[tuple[str, str, tuple[float, ...]]]] = {
    "lambada": [
        ("perplexity", f"LAMBADA; {_OWN_LAMBADA}", (35.13, 15.60, 10.87, 8.63)),
        ("acc", f"LAMBADA; {_OWN_LAMBADA}", (0.4599, 0.5548, 0.6012, 0.6324)),
    ],
    "cbt": [
        ("acc", "CBT-CN, common nouns", (0.8765, 0.9235, 0.9345, 0.9330)),
        ("acc", "CBT-NE, named entities", (0.834, 0.871, 0.880, 0.8905)),
    ],
    "wikitext": [
        ("word_perplexity", f"WikiText-2; {_OWN_DETOKENIZER}", (29.41, 22.76, 19.93, 18.34)),
        ("word_perplexity", f"WikiText-103; {_OWN_DETOKENIZER}", (37.50, 26.37, 22.05, 17.48)),
    ],
}
_SAME = {"lambada_openai": "lambada", "lambada_standard": "lambada"}  # the harness's names


def _published(task: Mapping) -> list[tuple[str, str, tuple[float, ...]]]:
    """[(metric, data set and remark, figures by size), ...]"""
    return _FIGURES.get(_SAME.get(task["task"], task["task"]), [])


def with_published(task: dict) -> dict:
    """A task's result with [{"model", "metric", "value", "source"}, ...] under "published", if there are any."""
    figures = [
        {"model": model, "metric": metric, "value": value, "source": f"{_PAPER}: {data}"}
        for metric, data, values in _published(task)
        for model, value in zip(_SIZES, values, strict=True)
    ]
    return {**task, "published": figures} if figures else task
