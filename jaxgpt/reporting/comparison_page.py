"""The page of `compare`: curves of all runs in one figure, their cards, and the settings that differ."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.reporting import comparison, figures, run_files
from jaxgpt.reporting.comparison import ComparedRun
from jaxgpt.reporting.figures import SMOOTHED, Drawn, big, word
from jaxgpt.reporting.run_card import shown_as

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = ("step", "tokens", "time")  # columns that a curve may be drawn over
_LOSSES = ("loss", "eval_loss", "eval_bits_per_byte")  # other measures are accuracies


def compare(folders: Sequence[Path], json: Path | None, html: Path | None, by: str | None) -> None:
    """Print the comparison of the runs in `folders`, and write it to the files `json` and `html` that are asked for.

    `by`: the only axis (of AXES) that the curves are drawn over.

    Raises:
        UserError: a folder is no run, or a file cannot be written.
    """
    runs = comparison.read_runs(folders)
    print(comparison.text_report(runs, shutil.get_terminal_size((120, 24)).columns))
    if json:
        _write(json, "--json", lambda file: file.write_text(comparison.as_json(runs), encoding="utf-8"))
    if html:
        _write(html, "--html", lambda file: write_page(file, runs, [by] if by else AXES))
        print(f"\npage {html}")


def _write(file: Path, option: str, write: Callable[[Path], object]) -> None:
    try:
        write(file)
    except OSError as error:
        raise UserError(f"{option} {file}: cannot be written ({error})") from None


def write_page(path: Path, runs: Sequence[ComparedRun], axes: Sequence[str] = AXES) -> Path:
    """Write the comparison to `path`, its curves over each of `axes`."""
    comparable, warnings = comparison.comparability(runs)
    rows = []
    for key, values in comparison.table(runs).items():
        cells = [comparison.formatted(key, value) for value in values]
        best, mark = comparison.best_of(key, values, comparable), comparison.DIFFERS * comparison.differs(values)
        rows.append((shown_as(key).label, mark, cells, best, "words" if key in comparison.LONG else "number"))
    return figures.write_page(
        path,
        _BODY,
        f"{len(runs)} jaxgpt runs",
        runs=runs,
        names=[run.name for run in runs],
        warnings=warnings,
        drawn=_figures(runs, axes, per_byte="token" not in comparable),
        settings={name: [*map(word, values)] for name, values in comparison.differing_settings(runs).items()},
        rows=rows,
    )


def _figures(runs: Sequence[ComparedRun], axes: Sequence[str], per_byte: bool) -> list[Drawn]:
    evaluated = ("eval_loss", "Validation loss", "validation loss (nats per token)")
    if per_byte:
        evaluated = ("eval_bits_per_byte", "Validation loss in bits per byte", "validation loss (bits per byte)")
    measures = [evaluated, ("loss", "Training loss", "training loss (nats per token)")]
    accuracies = {key: name for run in runs for key, name in run_files.accuracies(run.columns).items()}
    measures += [(key, name, f"{name} (% right)") for key, name in accuracies.items()]
    drawn = [_figure(runs, *measure, axis) for axis in axes for measure in measures]
    return [figure for figure in drawn if figure]


def _figure(runs: Sequence[ComparedRun], key: str, title: str, label: str, axis: str) -> Drawn | None:
    """One measure of all runs over one axis; None where no run knows it."""
    lines = {number: run_files.known(run.columns, key, axis) for number, run in enumerate(runs)}
    lines = {number: line for number, line in lines.items() if len(line[0])}
    if not lines:
        return None
    notes: list[str] = []

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        ax.set_ylabel(label, parse_math=False)  # the name of a task may hold anything
        scale = _set_x(ax, axis, max(x.max() for x, _ in lines.values()))
        for number, (x, y) in lines.items():
            y = y if key in _LOSSES else 100 * y
            figures.series_line(ax, x / scale, y, number, mean_of=len(y) // 50 if key == "loss" else 0)
        notes.append(_set_y(ax, key, [y for _, y in lines.values()]))

    title = f"{title} by {axis}"
    svg = figures.svg(draw, title)
    return Drawn(title, notes[0], svg, [(number, runs[number].name) for number in lines])


def _set_x(ax: Axes, axis: str, last: float) -> float:
    """Label the x axis; returns the number to divide values by."""
    scale, unit = figures.time_unit(last) if axis == "time" else (1.0, "")
    labels = {"step": "optimizer step", "tokens": "tokens seen", "time": f"training time ({unit})"}
    ax.set_xlabel(labels[axis])
    if axis == "step":
        figures.whole_numbers(ax)
    else:
        ax.locator_params(axis="x", nbins=6)
    if axis == "tokens":
        ax.xaxis.set_major_formatter(lambda value, _: big(value))
    ax.set_xlim(0, max(last, 1e-9) / scale * 1.02)
    return scale


def _set_y(ax: Axes, key: str, lines: list[np.ndarray]) -> str:
    """Fit the y axis; returns a note about it."""
    if key == "loss":
        many = any(len(line) >= SMOOTHED for line in lines)
        mean = f"Runs of {SMOOTHED} lines and more: means of a fiftieth of the run." if many else ""
        return f"{mean} {figures.clip(ax, lines, [])}".strip()
    if key not in _LOSSES:
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        return ""
    return figures.clip(ax, [], lines) if max(map(len, lines)) >= 6 else ""


_BODY = """<h1>{{ runs | length }} runs compared</h1><p class="muted">jaxgpt comparison</p>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
{% macro heads() %}<tr><th>{% for name in names %}
<th class="number">{{ swatch(loop.index0) | safe }} {{ name }}{% endfor %}</tr>{% endmacro %}
<section><h2>Cards</h2><div class="scroll"><table>{{ heads() }}
{% for label, mark, values, best, kind in rows %}
<tr><td>{{ label }} {{ mark }}{% for value in values %}
<td class="{{ kind }}">{% if loop.index0 in best %}<b>{{ value }}</b>{% else %}{{ value }}{% endif %}{% endfor %}</tr>
{% endfor %}</table></div><p class="note">Bold: the best, where the runs compare. ≠: not the same.</p></section>
{{ figures(drawn) }}
<section><h2>Settings that differ</h2>{% if settings %}<div class="scroll"><table>{{ heads() }}
{% for name, values in settings.items() %}<tr><td>{{ name }}{% for value in values %}
<td class="number">{{ value }}{% endfor %}</tr>{% endfor %}</table></div>
{% else %}<p>None: the runs have the same settings.</p>{% endif %}</section>
{% for run in runs if run.card.samples %}<section><h2>Conversations of {{ run.name }}</h2>
{% for text in run.card.samples %}<pre>
{{ text }}</pre>{% endfor %}</section>{% endfor %}
<section><h2>Runs</h2><table>{% for run in runs %}<tr><th>{{ run.name }}<td>{{ run.path }}</tr>{% endfor %}</table>
</section>
"""
