"""report.html: what a run did, in one file to look at or send. `write_report(workdir)` makes it.

The page needs no network and no script. Its figures are inline SVG whose colours are CSS variables,
so that one drawing follows the reader's light or dark theme. Jinja2 fills the page because it
escapes whatever it is given unless told otherwise, and a generated text may well hold `<script>`.
"""

import io
import json
import math
import re
from datetime import timedelta
from pathlib import Path

import numpy as np

from jaxgpt.config import Config, flatten
from jaxgpt.training.metrics import read_metrics

MAX_POINTS = 800  # of a drawn line: about two a pixel column, more cannot be seen
NOISY, SMOOTHED = ("loss", "grad_norm", "tokens_per_second"), 100  # averaged from 100 lines on
MAX_SAMPLES, MAX_SAMPLE_CHARACTERS = 30, 2000  # with the points, what keeps it under a megabyte
ACTIVITIES = ("step", "data", "eval", "save", "other")


def write_report(workdir: Path) -> Path:
    """Write `workdir`/report.html from metrics.jsonl, and config.json and summary.json if there.

    Of summary.json "status" and "versions" have their place; all else in it is listed as it is.

    Raises:
        UserError: the folder has no metrics.jsonl.
    """
    workdir = Path(workdir)
    records = read_metrics(workdir)
    columns = _columns(records)
    summary = _read_json(workdir / "summary.json")
    changed, unchanged = _settings(_read_json(workdir / "config.json"))
    from jinja2 import Environment  # here and below: the loop imports this module at its start

    page = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    html = page.render(
        name=workdir.resolve().name,
        status=summary.pop("status", "no summary yet: running, or killed"),
        versions=summary.pop("versions", {}),
        facts=_flat(summary),
        headline=_headline(columns),
        warnings=_warnings(records),
        figures=_figures(columns),
        samples=_samples(records),
        changed=changed,
        unchanged=unchanged,
    )
    temporary = workdir / "report.html.tmp"
    temporary.write_text(html, encoding="utf-8", errors="replace")
    return temporary.replace(workdir / "report.html")


# ---------------------------------------------------------------- words and numbers


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _columns(records: list[dict]) -> dict[str, np.ndarray]:
    """Every numeric metric as one array over the lines, nan where a line does not know it."""
    keys = ["step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"]
    keys += ["mfu", "eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_stop_rate"]
    keys += [f"seconds_{name}" for name in ("total", *ACTIVITIES)]
    return {key: np.array([record.get(key) for record in records], float) for key in keys}


def _known(columns: dict, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric on the lines that know it."""
    known = ~np.isnan(columns[key])
    return columns["step"][known], columns[key][known]


def _seconds(columns: dict) -> np.ndarray:
    """Seconds by activity (rows) and line (columns); "other" is what of the total is left."""
    seconds = np.nan_to_num([columns[f"seconds_{name}"] for name in ACTIVITIES])
    seconds[-1] = np.maximum(0, np.nan_to_num(columns["seconds_total"]) - seconds[:-1].sum(axis=0))
    return seconds


def _flat(values: dict, prefix: str = "") -> dict[str, str]:
    """{"mesh data": "8", ...}: nested objects under joined names, numbers with thousands commas."""
    flat = {}
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            flat |= _flat(value, f"{name} ")
        elif isinstance(value, float) and not value.is_integer():
            flat[name] = f"{value:,.5g}"
        else:
            flat[name] = f"{value:,.0f}" if type(value) in (int, float) else _word(value)
    return flat


def _settings(config: dict) -> tuple[list[tuple], list[tuple]]:
    """(name, value, default) of the settings that differ from the default, and of the others.

    Read as plain JSON, so that a run made by another version still says what it did.
    """
    default = flatten(Config())
    rows = ([], [])
    for section, fields in config.items():
        for key, value in fields.items():
            name = f"{section}.{key}"
            normal = default.get(name, "not a setting of this version")
            rows[value == normal].append((name, _word(value), _word(normal)))
    return rows


def _word(value: object) -> str:
    """A value as config files write it."""
    text = str(value)
    return {"None": "none", "True": "true", "False": "false", "": '""'}.get(text, text)


def _big(value: float) -> str:
    """Three digits and a unit: 1.23 M."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _headline(columns: dict) -> list[tuple[str, str, str]]:
    """(name, figure, remark) of the numbers that a reader wants first."""
    last = {key: values[-1] for key in columns if len(values := _known(columns, key)[1])}
    found = []
    if "eval_loss" in last:
        steps, losses = _known(columns, "eval_loss")
        best = losses.argmin()
        found.append(("validation loss", f"{losses[-1]:.4f}", f"nats/token, step {steps[-1]:,.0f}"))
        found.append(("best", f"{losses[best]:.4f}", f"step {steps[best]:,.0f}"))
    elif "loss" in last:
        found.append(("training loss", f"{last['loss']:.4f}", "nats/token; no evaluation yet"))
    for key, name in (("eval_perplexity", "perplexity"), ("eval_bits_per_byte", "bits per byte")):
        if key in last:
            found.append((name, f"{last[key]:,.4g}", "validation"))
    if "eval_stop_rate" in last:
        found.append(("answers that stop", f"{last['eval_stop_rate']:.0%}", "by themselves, to validation prompts"))
    if "tokens" in last:
        epochs = f"{last['epoch']:.2f} epochs" if "epoch" in last else ""
        found.append(("tokens seen", _big(last["tokens"]), epochs))
    if "tokens_per_second" in last:
        speed = np.median(_known(columns, "tokens_per_second")[1])
        used = f", MFU {np.median(_known(columns, 'mfu')[1]):.1%}" if "mfu" in last else ""
        found.append(("tokens/s", _big(speed), f"median{used}"))
    if seconds := round(_seconds(columns).sum()):
        found.append(("training time", str(timedelta(seconds=seconds)), f"{last['step']:,.0f} steps"))
    return found


def _warnings(records: list[dict]) -> list[str]:
    bad = [record for record in records if record.get("nonfinite")]
    if not bad:
        return [] if records else ["No step has been logged yet."]
    first = ", ".join(f"{key} was {value}" for key, value in bad[0]["nonfinite"].items())
    return [f"Not finite: {first} at step {bad[0]['step']:,}; {len(bad):,} such lines in all."]


def _samples(records: list[dict]) -> list[tuple[int, str]]:
    """(step, text), newest first; thinned evenly from the newest on."""
    found = [(record["step"], record["sample"]) for record in records if record.get("sample")]
    every = math.ceil(len(found) / MAX_SAMPLES) or 1
    return [(step, text[:MAX_SAMPLE_CHARACTERS]) for step, text in found[::-1][::every]]


# ---------------------------------------------------------------- figures

# Stand-ins: what is drawn in one of these gets the CSS variable of that name.
_COLOURS = {
    name: f"#0{number:x}0{number:x}0{number:x}"
    for number, name in enumerate(("ink", "grid", "train", "validation", *ACTIVITIES), 1)
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
    "svg.hashsalt": "jaxgpt",  # the same run gives the same file
    "font.size": 10.5,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
    "grid.color": _COLOURS["grid"],
    "legend.frameon": False,
    **dict.fromkeys(("axes.labelcolor", "legend.labelcolor"), _COLOURS["ink"]),
    **dict.fromkeys(("xtick.color", "ytick.color"), _COLOURS["ink"]),
}


def _figures(columns: dict) -> list[dict]:
    """{"title", "note", "svg", "width"} of every figure that there are points for."""
    import matplotlib

    figures, known = [], {key for key in columns if len(_known(columns, key)[0])}
    with matplotlib.rc_context(_STYLE):
        if known & {"loss", "eval_loss"}:
            figures.append(_draw(_draw_loss, columns, "Loss", (10.4, 3.9), "wide"))
            figures.append(_draw(_draw_loss, columns, "Loss", (5, 3.6), "narrow"))
        if known & {"learning_rate", "grad_norm"}:
            figures.append(_draw(_draw_optimizer, columns, "Learning rate and gradient norm"))
        if "tokens_per_second" in known or _seconds(columns).any():
            figures.append(_draw(_draw_speed, columns, "Throughput and where the time goes"))
    return figures


def _draw(draw, columns: dict, title: str, size=(5, 3.9), width: str = "") -> dict:
    """One figure by `draw(figure, columns) -> note`, as an <svg> as wide as the page lets it be."""
    from matplotlib.figure import Figure  # the object interface: no window, no current figure

    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_visible(False)
    note = draw(figure, columns)
    for ax in figure.axes:
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        ax.set_xlim(0, columns["step"].max(initial=1) * 1.01)
    figure.axes[-1].set_xlabel("optimizer step")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", svg)
    svg = re.sub(r"px '?DejaVu Sans[^;\"]*", "px sans-serif", svg)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)  # not referred to, the same in every figure
    for name, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return {"title": title, "note": note, "svg": svg, "width": width}


def _line(ax, columns: dict, key: str, colour: str = "train", label: str = "") -> None:
    """Draw a metric over the steps: few points are marked, many of a noisy one averaged too."""
    steps, values = _known(columns, key)
    style = {"color": _COLOURS[colour], "linewidth": 1.6}
    if key in NOISY and len(steps) >= SMOOTHED:
        ax.plot(*_thin(steps, values), **style | {"linewidth": 0.8, "alpha": 0.35})
        values = _trailing_mean(values, len(values) // 50)
    marker = "o" if len(steps) < 40 else ""
    ax.plot(*_thin(steps, values), label=label, marker=marker, markersize=3.5, **style)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points, the lowest and highest of each stretch: no spike is lost."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), MAX_POINTS // 2)
    kept = np.unique([(p[values[p].argmin()], p[values[p].argmax()]) for p in parts])
    return steps[kept], values[kept]


def _trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    sums = np.concatenate([[0.0], values.cumsum()])
    starts = np.maximum(0, np.arange(1, len(sums)) - window)
    return (sums[1:] - sums[starts]) / (np.arange(1, len(sums)) - starts)


def _clip(ax, values: np.ndarray, also: np.ndarray) -> str:
    """End y where the first steps and lone spikes do not flatten the rest, and say so.

    That is the 97th percentile of what follows the first tenth; the later half of `also` fits too.
    """
    settled = values[len(values) // 10 :]
    shown = np.concatenate([values, also])
    tops = [np.quantile(settled, 0.97)] if len(settled) else []
    top = max([*tops, *also[len(also) // 2 :]], default=math.inf)
    low, high = shown.min(initial=math.inf), shown.max(initial=-math.inf)
    margin = 0.1 * (top - low)
    if not 0 < margin < high - top:
        return ""
    ax.set_ylim(low - margin, top + margin)
    return f"y is cut above the 97th percentile of the settled run; the maximum is {high:.4g}."


def _draw_loss(figure, columns: dict) -> str:
    ax = figure.subplots()
    ax.set_ylabel("loss (nats per token)")
    losses = _known(columns, "loss")[1]
    eval_steps, eval_losses = _known(columns, "eval_loss")
    notes = []
    if len(losses):
        _line(ax, columns, "loss", label="training")
    if len(losses) >= SMOOTHED:
        notes.append(f"Training: mean of {len(losses) // 50} lines, each line pale behind it.")
    if len(eval_losses):
        _line(ax, columns, "eval_loss", "validation", "validation")
        best, ring = eval_losses.argmin(), {"markersize": 11, "fillstyle": "none"}
        ax.plot(eval_steps[best], eval_losses[best], "o", color=_COLOURS["validation"], **ring)
        notes.append("Ring: the best validation loss.")
    notes.append(_clip(ax, losses, eval_losses))
    ax.legend()
    return " ".join(notes)


def _draw_optimizer(figure, columns: dict) -> str:
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.set_ylabel("learning rate")
    bottom.set_ylabel("gradient norm")
    _line(top, columns, "learning_rate")
    top.set_ylim(bottom=0)
    top.yaxis.set_major_formatter(lambda y, _: f"{y:.7f}".rstrip("0").rstrip("."))
    _line(bottom, columns, "grad_norm")
    clipped = _clip(bottom, _known(columns, "grad_norm")[1], np.empty(0))
    bottom.set_ylim(bottom=0)
    return clipped and f"Gradient norm: {clipped}"


def _draw_speed(figure, columns: dict) -> str:
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.set_ylabel("tokens per second")
    _line(top, columns, "tokens_per_second")
    top.set_ylim(bottom=0)
    top.yaxis.set_major_formatter(lambda y, _: _big(y))
    bottom.set_ylabel("share of wall time")
    bottom.set_ylim(0, 1)
    bottom.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    seconds = _seconds(columns)
    timed = np.flatnonzero(seconds.any(axis=0))
    if not len(timed):
        return ""
    # Twenty stretches: wide enough that most hold an evaluation, which comes only now and then.
    stretches = np.array_split(timed, min(20, len(timed)))
    sums = np.stack([seconds[:, part].sum(axis=1) for part in stretches], axis=1)
    shares = sums / sums.sum(axis=0)
    edges = [0, *(columns["step"][part[-1]] for part in stretches)]
    steps = np.concatenate([shares, shares[:, -1:]], axis=1)  # the last value closes the last step
    style = {"colors": [_COLOURS[name] for name in ACTIVITIES], "step": "post", "linewidth": 0}
    bottom.stackplot(edges, steps, labels=ACTIVITIES, **style)
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    whole = zip(ACTIVITIES, seconds.sum(axis=1) / seconds.sum(), strict=True)
    return "Whole run: " + ", ".join(f"{name} {share:.1%}" for name, share in whole) + "."


# ---------------------------------------------------------------- the page

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} · jaxgpt run report</title>
<style>
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1d2227; --muted: #626b75;
  --grid: #e3e6e9; --train: #2a6fc4; --validation: #cf5a0a; --step: #2a6fc4; --data: #e0972f;
  --eval: #3a9a6d; --save: #a55bb5; --other: #a9b0b8 }
@media screen and (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024;
  --ink: #e4e7ea; --muted: #99a3ad; --grid: #343a41; --train: #6ba8f0; --validation: #ff9a52;
  --step: #4682cf; --data: #d99a3d; --eval: #4fae81; --save: #b877c6; --other: #5c646d } }
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
@media (max-width: 700px) { .wide { display: none } .narrow { display: block } }
pre { margin: .25rem 0 0; padding: .75rem; background: var(--page); border-radius: 6px;
  font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: 400 }
td, th { padding: .2rem .75rem .2rem 0; vertical-align: top; border-bottom: 1px solid var(--grid) }
</style></head><body>
{% macro pairs(rows) %}<table>{% for name, value in rows.items() %}
<tr><th>{{ name }}<td>{{ value }}</tr>{% endfor %}</table>{% endmacro %}
{% macro settings(rows) %}<table><tr><th>setting<th>value<th>default</tr>
{% for name, value, default in rows %}
<tr><td>{{ name }}<td>{{ value }}<td class="muted">{{ default }}</tr>{% endfor %}
</table>{% endmacro %}
{% macro sample(step, text) %}<p class="muted">step {{ "{:,}".format(step) }}</p><pre>
{{ text }}</pre>{% endmacro %}
<h1>{{ name }}</h1><p class="muted">jaxgpt run · {{ status }}</p>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
{% if headline %}<section><dl class="headline">{% for title, value, remark in headline %}
<div><dt>{{ title }}</dt><dd class="value">{{ value }}</dd><dd class="note">{{ remark }}</dd></div>
{% endfor %}</dl></section>{% endif %}<div class="figures">{% for figure in figures %}
<section class="{{ figure.width }}"><h2>{{ figure.title }}</h2>
<div role="img" aria-label="{{ figure.title }} over the steps">{{ figure.svg | safe }}</div>
<p class="note">{{ figure.note }}</p></section>
{% endfor %}</div>{% if samples %}<section><h2>Samples</h2>{{ sample(*samples[0]) }}
{% if samples[1:] %}<details><summary>{{ samples[1:] | length }} older</summary>
{% for older in samples[1:] %}{{ sample(*older) }}{% endfor %}</details>{% endif %}
</section>{% endif %}
{% if facts %}<section><h2>Run</h2>{{ pairs(facts) }}</section>{% endif %}
<section><h2>Settings</h2>
{% if changed %}{{ settings(changed) }}{% endif %}
{% if unchanged %}<details><summary>{{ unchanged | length }} settings at their defaults</summary>
{{ settings(unchanged) }}</details>{% endif %}
{% if not changed and not unchanged %}<p>There is no config.json.</p>{% endif %}</section>
{% if versions %}<section><h2>Versions</h2>{{ pairs(versions) }}</section>{% endif %}
</body></html>
"""
