"""The page of `compare`: the curves of all runs on one plot, what was set differently, and the final numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxgpt.reporting import curves, figures
from jaxgpt.reporting.comparison import ABSENT, Run, best_of, comparability, differing_settings, table, told
from jaxgpt.reporting.figures import SMOOTHED, big, word

AXES = {"step": "step", "tokens": "tokens", "time": "time"}
"""What a curve may be drawn over, and the column that holds it."""


def write_page(path: Path, runs: Sequence[Run], axes: Sequence[str] = tuple(AXES)) -> Path:
    """Write the comparison to `path`, its curves over each of `axes`."""
    comparable, warnings = comparability(runs)
    settings = {name: [word(value) for value in values] for name, values in differing_settings(runs).items()}
    rows = [
        (told(key).label, [formatted(key, value) for value in values], best_of(key, values, comparable))
        for key, values in table(runs).items()
    ]
    text = figures.page(
        _BODY,
        f"{len(runs)} jaxgpt runs",
        runs=runs,
        names=[run.name for run in runs],
        warnings=warnings,
        drawn=_figures(runs, axes, per_byte="token" not in comparable),
        settings=settings,
        rows=rows,
    )
    return figures.write_page(path, text)


def formatted(key: str, value: object) -> str:
    """A final number as it is shown."""
    return ABSENT if value is None else told(key).form(value)


# ---------------------------------------------------------------- figures


def _figures(runs: Sequence[Run], axes: Sequence[str], per_byte: bool) -> list[dict]:
    evaluated = ("eval_loss", "Validation loss", "validation loss (nats per token)")
    if per_byte:
        evaluated = ("eval_bits_per_byte", "Validation loss in bits per byte", "validation loss (bits per byte)")
    measures = [evaluated, ("loss", "Training loss", "training loss (nats per token)")]
    measures += [(key, name, f"{name} (% right)") for key, name in _accuracies(runs).items()]
    drawn = [_figure(runs, *measure, axis) for axis in axes for measure in measures]
    return [figure for figure in drawn if figure]


def _accuracies(runs: Sequence[Run]) -> dict[str, str]:
    found: dict[str, str] = {}
    for run in runs:
        found |= curves.accuracies(run.columns)
    return found


def _is_accuracy(key: str) -> bool:
    return key not in ("loss", "eval_loss", "eval_bits_per_byte")


def _figure(runs: Sequence[Run], key: str, title: str, label: str, axis: str) -> dict | None:
    """One measure of all runs over one axis; None where no run knows it."""
    lines = {number: curves.known(run.columns, key, AXES[axis]) for number, run in enumerate(runs)}
    lines = {number: line for number, line in lines.items() if len(line[0])}
    if not lines:
        return None
    notes = []

    def draw(figure):
        ax = figure.subplots()
        ax.set_ylabel(label, parse_math=False)  # the name of a task may hold anything
        scale = _set_x(ax, axis, max(x.max() for x, _ in lines.values()))
        for number, (x, y) in lines.items():
            y = 100 * y if _is_accuracy(key) else y
            figures.series_line(ax, x / scale, y, number, mean_of=len(y) // 50 if key == "loss" else 0)
        notes.append(_set_y(ax, key, [y for _, y in lines.values()]))

    title = f"{title} by {axis}"
    svg = figures.svg(draw, title, (5, 3.7))
    names = [(number, runs[number].name) for number in lines]
    return {"title": title, "note": " ".join(filter(None, notes)), "svg": svg, "width": "", "legend": names}


def _set_x(ax, axis: str, last: float) -> float:
    """Label the x axis; returns what values are to be divided by."""
    scale, label = 1.0, "optimizer step"
    if axis == "time":
        scale, unit = figures.time_unit(last)
        label = f"training time ({unit})"
    elif axis == "tokens":
        label = "tokens seen"
    ax.set_xlabel(label)
    if axis == "step":
        figures.whole_numbers(ax.xaxis)
    else:
        ax.xaxis.get_major_locator().set_params(nbins=6)
    if axis == "tokens":
        ax.xaxis.set_major_formatter(lambda value, _: big(value))
    ax.set_xlim(0, max(last, 1e-9) / scale * 1.02)
    return scale


def _set_y(ax, key: str, lines: list[np.ndarray]) -> str:
    """Fit the y axis; returns what is to be said about it."""
    if key == "loss":
        many = any(len(line) >= SMOOTHED for line in lines)
        mean = f"Runs of {SMOOTHED} lines and more: means of a fiftieth of the run." if many else ""
        return f"{mean} {figures.clip(ax, lines, [])}".strip()
    if _is_accuracy(key):
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        return ""
    return figures.clip(ax, [], lines) if max(map(len, lines)) >= 6 else ""


# ---------------------------------------------------------------- the page

_BODY = """<h1>{{ runs | length }} runs compared</h1><p class="muted">jaxgpt comparison</p>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
{% macro heads() %}<tr><th>{% for name in names %}
<th class="number">{{ swatch(loop.index0) | safe }} {{ name }}{% endfor %}</tr>{% endmacro %}
<section><h2>Final numbers</h2><div class="scroll"><table>{{ heads() }}
{% for label, values, best in rows %}
<tr><td>{{ label }}{% for value in values %}
<td class="number">{% if loop.index0 in best %}<b>{{ value }}</b>{% else %}{{ value }}{% endif %}{% endfor %}</tr>
{% endfor %}</table></div>{% if rows %}<p class="note">Bold: the best, where the runs compare.</p>{% endif %}</section>
{{ figures(drawn) }}
<section><h2>Settings that differ</h2>{% if settings %}<div class="scroll"><table>{{ heads() }}
{% for name, values in settings.items() %}<tr><td>{{ name }}{% for value in values %}
<td class="number">{{ value }}{% endfor %}</tr>{% endfor %}</table></div>
{% else %}<p>None: the runs have the same settings.</p>{% endif %}</section>
<section><h2>Runs</h2><table>{% for run in runs %}<tr><th>{{ run.name }}<td>{{ run.path }}</tr>{% endfor %}</table>
</section>
"""
