"""Figures and pages that need no network and no script: `svg(draw, label)` draws one, `page(body, title)` holds them.

A figure is inline SVG by matplotlib whose colours are CSS variables, so that one drawing follows the reader's light
or dark theme. Draw in `COLOURS[name]`, in `series(number)` (one of several lines to be told apart) or in `ramp(share)`
(low to high): these are stand-ins, which `svg` replaces by the variable of that name. Jinja2 fills the pages because it
escapes whatever it is given unless told otherwise, and a generated text may well hold `<script>`.
"""

import functools
import io
import math
import re
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np

MAX_POINTS = 800  # of a drawn line: about two a pixel column, more cannot be seen
SMOOTHED = 100  # a noisy line is averaged from this many points on


# ---------------------------------------------------------------- colours

# Name: on a light page, on a dark one. The series differ in lightness as well as in hue, and each has its own marker,
# so that readers who see few or no hues can tell them apart; every colour has a contrast of 3 or more to its page.
_COLOURS = {
    "ink": ("#1d2227", "#e4e7ea"),
    "muted": ("#626b75", "#99a3ad"),
    "grid": ("#e3e6e9", "#343a41"),
    "card": ("#ffffff", "#1c2024"),
    "train": ("#2a6fc4", "#6ba8f0"),
    "validation": ("#cf5a0a", "#ff9a52"),
    "step": ("#2a6fc4", "#4682cf"),
    "data": ("#e0972f", "#d99a3d"),
    "eval": ("#3a9a6d", "#4fae81"),
    "save": ("#a55bb5", "#b877c6"),
    "other": ("#a9b0b8", "#5c646d"),
    "series-0": ("#1565c0", "#64a8f5"),
    "series-1": ("#d1540a", "#ff8a3d"),
    "series-2": ("#00876a", "#2cc79c"),
    "series-3": ("#a02c7d", "#e08ac8"),
    "series-4": ("#a67c00", "#f0cf57"),
    "series-5": ("#4a5560", "#c4ccd4"),
}
# Low to high, as in matplotlib's viridis but never as pale (on light) or as dark (on dark) as the page.
_RAMP = (
    ("#3b1260", "#472d7b", "#3b528b", "#2c728e", "#21908c", "#27a063", "#5aa32a", "#8f9a10", "#b58900"),
    ("#8f6fd0", "#7f86e0", "#5f9ee0", "#45b1cf", "#35c2a8", "#55cf7c", "#8fd94f", "#c8df3a", "#fde74c"),
)
_COLOURS |= {f"ramp-{number}": pair for number, pair in enumerate(zip(*_RAMP, strict=True))}

COLOURS = {name: "#" + 3 * f"{number:02x}" for number, name in enumerate(_COLOURS, 1)}
"""What to draw in, by name: stand-ins that `svg` replaces."""
_SERIES, _MARKERS = 6, "os^DvX"
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 1.6, 1, 1.6)))


def series(number: int, marked: bool = True) -> dict:
    """The look of line `number` of several, for `ax.plot`: 6 colours, each with its marker, in 4 kinds of line.

    Markers stand at few places, whatever the number of points; `marked=False` leaves them out.
    """
    colour = number % _SERIES
    style = {"color": COLOURS[f"series-{colour}"], "linewidth": 1.6}
    style["linestyle"] = _DASHES[number // _SERIES % len(_DASHES)]
    if marked:
        style |= {"marker": _MARKERS[colour], "markersize": 4.5, "markevery": (0.02 + 0.03 * (number % 5), 0.17)}
    return style


def series_line(ax, x: np.ndarray, y: np.ndarray, number: int, mean_of: int = 0) -> None:
    """Draw line `number` of several; `mean_of` points are averaged into each where there are SMOOTHED or more."""
    style = series(number)
    if mean_of and len(x) >= SMOOTHED:
        y = trailing_mean(y, mean_of)
    if len(x) <= 25:
        style["markevery"] = 1
    ax.plot(*thin(x, y), **style)


def ramp(share: float) -> str:
    """The colour of a place between low (0) and high (1), in 9 levels."""
    levels = len(_RAMP[0])
    return COLOURS[f"ramp-{min(levels - 1, max(0, int(share * levels)))}"]


# ---------------------------------------------------------------- drawing


def svg(draw: Callable, label: str, size: tuple[float, float] = (5, 3.9)) -> str:
    """What `draw(figure)` draws on a new matplotlib Figure, as <svg> that is as wide as the page lets it be.

    `label` says what is to be seen to readers who do not see it; differing labels or sizes on one page. `size` is in
    inches of 72 units; the text is 10.5 units high, so that 5 inches suit a phone and half a desktop page.
    """
    import matplotlib
    from matplotlib.figure import Figure  # the object interface: no window, no current figure

    with matplotlib.rc_context(_style(f"{label} {size}")):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", text)
    text = re.sub(r"px '?DejaVu Sans[^;\"]*", "px sans-serif", text)
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text)  # not referred to, the same in every figure
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # a hundredth is enough
    return _with_variables(text).replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _style(salt: str) -> dict:
    ink = COLOURS["ink"]
    return {
        "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
        "svg.hashsalt": salt,  # the same run gives the same file; two figures of a page share no id
        "font.size": 10.5,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.grid": True,
        **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
        **{f"{axis}tick.major.size": 0 for axis in "xy"},
        **{f"{axis}tick.minor.size": 0 for axis in "xy"},
        "grid.color": COLOURS["grid"],
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "legend.labelcolor", "xtick.color", "ytick.color"), ink),
    }


def _with_variables(text: str) -> str:
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def swatch(number: int) -> str:
    """A short piece of line `series(number)` as <svg>, to stand before a name in a legend or a table."""

    def draw(figure):
        figure.set_layout_engine("none")
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set_axis_off()
        ax.set(xlim=(0, 1), ylim=(-1, 1))
        style = series(number) | {"markevery": [1], "linewidth": 2, "markersize": 6}
        ax.plot([0.02, 0.5, 0.98], [0, 0, 0], **style)

    return svg(draw, f"line {number + 1}", (0.5, 0.17)).replace("<svg", '<svg class="swatch"', 1)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points, the lowest and highest of each stretch: no spike is lost."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), MAX_POINTS // 2)
    kept = np.unique([(p[values[p].argmin()], p[values[p].argmax()]) for p in parts])
    return steps[kept], values[kept]


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Each value with the `window` - 1 before it, or with as many as there are."""
    sums = np.concatenate([[0.0], values.cumsum()])
    starts = np.maximum(0, np.arange(1, len(sums)) - window)
    return (sums[1:] - sums[starts]) / (np.arange(1, len(sums)) - starts)


def clip(ax, noisy: list[np.ndarray], also: list[np.ndarray]) -> str:
    """End y where the first steps and lone spikes do not flatten the rest, and say so.

    That is the 97th percentile of what follows the first tenth of each of the `noisy` lines; the later half of the
    lines in `also` fits too.
    """
    settled = [line[len(line) // 10 :] for line in noisy if len(line)]
    tops = [np.quantile(line, 0.97) for line in settled] + [line[len(line) // 2 :].max() for line in also if len(line)]
    shown = np.concatenate([*noisy, *also, []])
    top, low, high = max(tops, default=math.inf), shown.min(initial=math.inf), shown.max(initial=-math.inf)
    margin = 0.1 * (top - low)
    if not 0 < margin < high - top:
        return ""
    ax.set_ylim(low - margin, top + margin)
    return f"y is cut above where the curves settle; the maximum is {high:.4g}."


# ---------------------------------------------------------------- numbers on axes and in tables


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


def whole_numbers(axis) -> None:
    """Let an axis (`ax.xaxis`) count whole things, steps say: 1,000, 2,000."""
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.get_major_locator().set_params(integer=True, nbins=6)


def time_unit(seconds: float) -> tuple[float, str]:
    """(seconds of it, name) of the unit that suits a time: minutes, hours, ..."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return size, name
    return 1, "seconds"


# ---------------------------------------------------------------- pages


def page(body: str, title: str, **values) -> str:
    """A whole HTML page. `body` is a Jinja2 template that is filled with `values`, all of them escaped.

    It may use the macros `figures(list of {"title", "note", "svg", "width"})`, a card each (width "wide": all of the
    page and hidden on a phone, "narrow": on a phone only, "": beside others; "legend": as the following, if there),
    `legend([(number, name), ...])` of lines drawn as `series(number)`, `swatch(number)`, a piece of such a line,
    and `pairs({name: value})`, a table of two columns; and the classes of PAGE_STYLE: <section> is a card, "muted",
    "note", "warning", "scroll" (around a table that may be wider than the page), "headline".
    """
    from jinja2 import Environment  # here: the loop of training imports this module at its start

    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(_HEAD + _MACROS + body + "</body></html>\n")
    return template.render(title=title, page_style=PAGE_STYLE, swatch=functools.cache(swatch), **values)


def write_page(path: Path, text: str) -> Path:
    """Put a page where it belongs at once: a reader never meets half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    return temporary.replace(path)


def _variables(theme: int) -> str:
    return " ".join(f"--{name}: {pair[theme]};" for name, pair in _COLOURS.items())


PAGE_STYLE = (
    f"""
:root {{ color-scheme: light dark; --page: #f7f7f5; {_variables(0)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ --page: #14171a; {_variables(1)} }} }}
"""
    + """
@media print { :root { color-scheme: light; --page: #fff } section { break-inside: avoid } }
body { margin: 0 auto; max-width: 1100px; padding: 1.5rem 1rem 3rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.05rem; margin: 0 0 .5rem }
p, dd { margin: .2rem 0 } dl { margin: 0 } .muted, .note, dt, th { color: var(--muted) }
.note { font-size: .85rem; line-height: 1.35 } summary { cursor: pointer; margin-top: .75rem }
.warning { border-left: 4px solid var(--validation); padding-left: .75rem }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 8px;
  padding: 1rem; margin-top: 1rem; min-width: 0 }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: 1rem }
.value { font-size: 1.4rem; font-weight: 600; line-height: 1.2; white-space: nowrap }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  column-gap: 1rem } .wide { grid-column: 1 / -1 } .narrow { display: none }
* { box-sizing: border-box } svg { display: block; width: 100%; height: auto }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.25rem; margin: 0; padding: 0; list-style: none }
.legend li { display: flex; align-items: center; gap: .5rem }
svg.swatch { display: inline-block; width: 36px; flex: none; vertical-align: middle }
@media (max-width: 700px) { .wide { display: none } .narrow { display: block } }
pre { margin: .25rem 0 0; padding: .75rem; background: var(--page); border-radius: 6px;
  font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: 400 }
td, th { padding: .2rem .75rem .2rem 0; vertical-align: top; border-bottom: 1px solid var(--grid) }
.scroll { overflow-x: auto } .scroll table { width: auto; min-width: 100% }
.scroll td, .scroll th { overflow-wrap: normal } td.number, th.number { text-align: right; white-space: nowrap }
@media (min-width: 700px) { .scroll td:first-child { white-space: nowrap } }
.scroll td:first-child, .scroll th:first-child { position: sticky; left: 0; background: var(--card) }
"""
)

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ page_style | safe }}</style></head><body>
"""

_MACROS = """{% macro pairs(rows) %}<table>{% for name, value in rows.items() %}
<tr><th>{{ name }}<td>{{ value }}</tr>{% endfor %}</table>{% endmacro %}
{% macro figures(drawn) %}<div class="figures">{% for figure in drawn %}
<section class="{{ figure.width }}"><h2>{{ figure.title }}</h2>
{{ figure.svg | safe }}{% if figure.legend %}{{ legend(figure.legend) }}{% endif %}
<p class="note">{{ figure.note }}</p></section>
{% endfor %}</div>{% endmacro %}
{% macro legend(lines) %}<ul class="legend">{% for number, name in lines %}
<li>{{ swatch(number) | safe }}{{ name }}</li>{% endfor %}</ul>{% endmacro %}
"""
