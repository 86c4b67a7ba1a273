"""Figures and pages that need no network and no script: `svg(draw, label)` draws one, `page(body, title)` holds them.

A figure is inline SVG as matplotlib writes it, on a transparent ground. One drawing serves light and dark pages: every
colour of COLOURS stands out from both, and the style sheet gives the text of figures the colour of the page's text.
Jinja2 fills the pages because it escapes values: a generated text may well hold `<script>`.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxgpt.storage.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 800  # of a drawn line: about two a pixel column, more cannot be seen
SMOOTHED = 100  # a noisy line is averaged from this many points on
HALF_PAGE = (5.0, 3.7)  # inches of 72 units, with text 10.5 units high: half a desktop page, or a phone's


# Okabe and Ito's palette ("Color Universal Design", 2008), which readers who see few hues can tell apart; two of its
# colours are darkened so that each has a contrast of 3 or more to the light page and to the dark one.
_BLUE, _VERMILION, _GREEN, _PURPLE, _OCHRE, _GREY = "#0072b2", "#d55e00", "#009e73", "#c2679b", "#a67c00", "#808080"
SERIES = (_BLUE, _VERMILION, _GREEN, _PURPLE, _OCHRE, _GREY)  # of the lines in one figure, see `series`
COLOURS = {"axis": _GREY, "train": _BLUE, "validation": _VERMILION, "step": _BLUE, "data": _OCHRE, "eval": _GREEN}
COLOURS |= {"save": _PURPLE, "other": _GREY}
_MARKERS = "os^DvX"
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 1.6, 1, 1.6)))


def series(number: int) -> dict:
    """The look of line `number` of several, for `ax.plot`: 6 colours, each with its marker, in 4 kinds of line.

    Markers stand at few places, whatever the number of points.
    """
    kind, colour = divmod(number, len(SERIES))
    look = {"color": SERIES[colour], "linewidth": 1.6, "linestyle": _DASHES[kind % len(_DASHES)]}
    return look | {"marker": _MARKERS[colour], "markersize": 4.5, "markevery": (0.02 + 0.03 * (number % 5), 0.17)}


def series_line(ax: Axes, x: np.ndarray, y: np.ndarray, number: int, mean_of: int = 0) -> None:
    """Draw line `number` of several; `mean_of` points are averaged into each where there are SMOOTHED or more."""
    style = series(number)
    if mean_of and len(x) >= SMOOTHED:
        y = trailing_mean(y, mean_of)
    if len(x) <= 25:
        style["markevery"] = 1
    ax.plot(*thin(x, y), **style)


def ramp(share: float) -> tuple[float, float, float]:
    """The colour of a place between low (0: blue) and high (1: vermilion), through grey."""
    ends = [[int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)] for colour in (_BLUE, _GREY, _VERMILION)]
    red, green, blue = (float(np.interp(share, (0, 0.5, 1), channel)) for channel in zip(*ends))
    return red, green, blue


class Drawn(NamedTuple):
    """A figure of a page."""

    title: str
    note: str
    """How to read it."""
    svg: str
    legend: Sequence[tuple[int, str]] = ()
    """(number, name) of lines drawn as `series(number)`."""


def svg(draw: Callable[[Figure], object], label: str, size: tuple[float, float] = HALF_PAGE) -> str:
    """HTML with the SVG that `draw(figure)` draws on a new matplotlib Figure, as wide as its place on the page.

    `label` says what is to be seen to readers who do not see it; it has to differ between the figures of a page.
    """
    import matplotlib
    from matplotlib.figure import Figure  # the object interface: no window, no current figure

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": label}):  # the same run gives the same file
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    return f'<figure role="img" aria-label="{escape(label)}">{text[text.index("<svg") :]}</figure>'


_STYLE: dict = {
    "svg.fonttype": "none",  # text stays text: small, and searchable
    "font.size": 10.5,
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}tick.{kind}.size": 0 for axis in "xy" for kind in ("major", "minor")},
    "grid.color": _GREY,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "legend.labelcolor", "xtick.color", "ytick.color"), _GREY),
}


def swatch(number: int) -> str:
    """A short piece of line `series(number)`, to stand before a name in a legend or a table."""

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("none")
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set_axis_off()
        ax.set(xlim=(0, 1), ylim=(-1, 1))
        ax.plot([0.02, 0.5, 0.98], [0, 0, 0], **series(number) | {"markevery": [1], "linewidth": 2, "markersize": 6})

    return f'<span class="swatch">{svg(draw, f"line {number + 1}", (0.5, 0.17))}</span>'


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points, the lowest and highest of each stretch: no spike is lost."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), MAX_POINTS // 2)
    kept = np.unique([(p[values[p].argmin()], p[values[p].argmax()]) for p in parts])
    return steps[kept], values[kept]


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and the `window` - 1 before it, or of as many as there are."""
    sums = np.concatenate([[0.0], values.cumsum()])
    starts = np.maximum(0, np.arange(1, len(sums)) - window)
    return (sums[1:] - sums[starts]) / (np.arange(1, len(sums)) - starts)


def clip(ax: Axes, noisy: Sequence[np.ndarray], also: Sequence[np.ndarray]) -> str:
    """End the y axis where the first steps and lone spikes do not flatten the rest; returns a note if it did.

    That is the 97th percentile of what follows the first tenth of each of the `noisy` lines; the later half of the
    lines in `also` fits too.
    """
    settled = [line[len(line) // 10 :] for line in noisy if len(line)]
    tops = [np.quantile(line, 0.97) for line in settled] + [line[len(line) // 2 :].max() for line in also if len(line)]
    shown = np.concatenate([*noisy, *also, []])
    top, low, high = max(tops, default=math.inf), shown.min(initial=math.inf), shown.max(initial=-math.inf)
    if not 0 < (margin := 0.1 * (top - low)) < high - top:
        return ""
    ax.set_ylim(low - margin, top + margin)
    return f"y is cut above where the curves settle; the maximum is {high:.4g}."


def word(value: object) -> str:
    """The value of a setting as config files write it."""
    text = str(value)
    return {"None": "none", "True": "true", "False": "false", "": '""'}.get(text, text)


def big(value: float) -> str:
    """Three digits and a unit: 1.23 M."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def whole_numbers(ax: Axes) -> None:
    """Let the x axis count whole things, such as steps: 1,000, 2,000."""
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.locator_params(axis="x", integer=True, nbins=6)


def short(value: float) -> str:
    """A number on an axis: 0.001, 3e-05, 1,000."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.6g}"
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else f"{float(f'{value:.3g}'):.0e}".replace("e-0", "e-")


def log_axis(ax: Axes, low: float, high: float, write: Callable[[float], str]) -> None:
    """A logarithmic x axis for values from `low` to `high`, with a handful of numbers, each by `write`."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.set_xlim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 200 else (1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(lambda value, _: write(value))
    ax.xaxis.set_minor_formatter(NullFormatter())


def time_unit(seconds: float) -> tuple[float, str]:
    """(its seconds, name) of the unit that suits a time: minutes, hours, ..."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return size, name
    return 1, "seconds"


def write_page(path: Path, body: str, title: str, **values: object) -> Path:
    """Write a whole HTML page. `body` is a Jinja2 template that is filled with `values`, all of them escaped.

    It may use the macros `figures(list of Drawn)`, a card each, `legend([(number, name), ...])` of lines drawn as
    `series(number)`, `swatch(number)`, a piece of such a line, `headline([(title, value, remark), ...])` and
    `pairs({name: value})`, a table of two columns; and the classes of PAGE_STYLE: <section> is a card, "muted",
    "note", "warning", "scroll" (around a table that may be wider than the page).
    """
    from jinja2 import Environment  # here: the training loop imports this module at its start

    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(_HEAD + _MACROS + body + "</body></html>\n")
    text = template.render(title=title, page_style=PAGE_STYLE, swatch=functools.cache(swatch), **values)
    write_file(path, text.encode("utf-8", errors="replace"))
    return path


PAGE_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1d2227; --muted: #626b75; --line: #e3e6e9 }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14171a; --card: #1c2024; --ink: #e4e7ea; --muted: #99a3ad; --line: #343a41 } }
@media print { :root { color-scheme: light; --page: #fff } section { break-inside: avoid } }
body { margin: 0 auto; max-width: 1100px; padding: 1.5rem 1rem 3rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.05rem; margin: 0 0 .5rem }
p, dd { margin: .2rem 0 } dl, figure { margin: 0 } .muted, .note, dt, th { color: var(--muted) }
.note { font-size: .85rem; line-height: 1.35 } summary { cursor: pointer; margin-top: .75rem }
.warning { border-left: 4px solid #d55e00; padding-left: .75rem }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem; margin-top: 1rem; min-width: 0 }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: 1rem }
.value { font-size: 1.4rem; font-weight: 600; line-height: 1.2; white-space: nowrap }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); column-gap: 1rem }
* { box-sizing: border-box } svg { display: block; width: 100%; height: auto }
svg text { fill: var(--ink) !important }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.25rem; margin: 0; padding: 0; list-style: none }
.legend li { display: flex; align-items: center; gap: .5rem }
.swatch { display: inline-block; width: 36px; flex: none; vertical-align: middle }
pre { margin: .25rem 0 0; padding: .75rem; background: var(--page); border-radius: 6px;
  font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: 400 }
td, th { padding: .2rem .75rem .2rem 0; vertical-align: top; border-bottom: 1px solid var(--line) }
.scroll { overflow-x: auto } .scroll table { width: auto; min-width: 100% }
.scroll td, .scroll th { overflow-wrap: normal } .scroll td.words { overflow-wrap: anywhere; text-align: right }
.scroll td.words { min-width: 9rem } td.number, th.number { text-align: right; white-space: nowrap }
@media (min-width: 700px) { .scroll td:first-child { white-space: nowrap } }
.scroll td:first-child, .scroll th:first-child { position: sticky; left: 0; background: var(--card) }
"""

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ page_style | safe }}</style></head><body>
"""

_MACROS = """{% macro pairs(rows) %}<table>{% for name, value in rows.items() %}
<tr><th>{{ name }}<td>{{ value }}</tr>{% endfor %}</table>{% endmacro %}
{% macro headline(numbers) %}{% if numbers %}<section><dl class="headline">{% for title, value, remark in numbers %}
<div><dt>{{ title }}</dt><dd class="value">{{ value }}</dd><dd class="note">{{ remark }}</dd></div>
{% endfor %}</dl></section>{% endif %}{% endmacro %}
{% macro figures(drawn) %}<div class="figures">{% for figure in drawn %}
<section><h2>{{ figure.title }}</h2>
{{ figure.svg | safe }}{% if figure.legend %}{{ legend(figure.legend) }}{% endif %}
<p class="note">{{ figure.note }}</p></section>
{% endfor %}</div>{% endmacro %}
{% macro legend(lines) %}<ul class="legend">{% for number, name in lines %}
<li>{{ swatch(number) | safe }}{{ name }}</li>{% endfor %}</ul>{% endmacro %}
"""
