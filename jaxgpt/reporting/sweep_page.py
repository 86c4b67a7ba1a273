"""report.html of a sweep: the table, loss against each variable, all trials at once, their curves, the scaling law.

Losses far above the others would flatten those that matter: loss axes end at `ceiling`, and marks at the top edge
stand for what lies above.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxgpt.reporting import figures
from jaxgpt.reporting.figures import COLOURS, Drawn
from jaxgpt.tuning import sweep_table
from jaxgpt.tuning.learning_rate import RangeFound, read_range_test
from jaxgpt.tuning.scaling import LEVEL, Scaling
from jaxgpt.tuning.space import Variable
from jaxgpt.tuning.sweep_folder import BEST, DIVERGED, FINISHED, PAUSED, REPORT, Records, TrialRecord
from jaxgpt.tuning.sweep_table import Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS = "validation loss (nats per token)"
MAX_NAMED = 6  # curves with names in a legend
_UNITS = {
    "optimizer.learning_rate": "peak learning rate (per step)",
    "optimizer.weight_decay": "weight decay (per step, times the learning rate)",
    "optimizer.warmup_steps": "warm-up (steps)",
    "optimizer.min_lr_rate": "final learning rate (share of the peak)",
    "model.dropout": "dropout (share of values)",
    "model.n_layer": "layers",
    "model.n_embd": "width (values of a token)",
    "model.n_head": "attention heads",
    "train.global_batch_size": "batch (sequences a step)",
    "train.per_device_train_batch_size": "batch (sequences on a device)",
    "train.max_steps": "training (steps)",
    "train.seed": "seed",
}


def write_page(folder: Path, found: Findings | None) -> Path:
    """Write report.html of what the folder holds: a sweep, a range test, or both."""
    rates, best = read_range_test(folder), folder / BEST
    drawn = _sweep_figures(found) if found else []
    return figures.write_page(
        folder / REPORT,
        _BODY,
        f"{folder.resolve().name} · jaxgpt sweep",
        name=folder.resolve().name,
        subtitle=_subtitle(found),
        numbers=_headline(found) if found else [],
        doubts=found.doubts if found else [],
        drawn=drawn + ([_range_figure(rates)] if rates else []),
        table=_table(found) if found else [],
        facts=_facts(found) if found else {},
        best=best.read_text(encoding="utf-8") if found and best.exists() else "",
    )


def _subtitle(found: Findings | None) -> str:
    if found is None:
        return "jaxgpt sweep · learning-rate range test"
    ended, asked = len(found.records.ended()), found.search.trials
    left = len([record for record in found.records.latest() if record.status == PAUSED])
    early = f", {left} of them stopped early" if left else ""
    return f"jaxgpt sweep · {found.search.method} · {ended + left} of {asked} trials{early}"


def _headline(found: Findings) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the numbers that a reader wants first."""
    best, everything = sweep_table.best(found.records), found.records.latest()
    numbers = []
    if best:
        numbers.append(("best validation loss", f"{best.loss:.4f}", f"nats per token, trial {best.number}"))
        numbers += [
            (f"best {variable.label.replace('+', ' + ')}", variable.of(best.settings), "")
            for variable in found.variables
        ]
    seconds = sum(record.seconds for record in everything)
    unit, name = figures.time_unit(seconds)
    numbers.append(("trained", figures.big(sum(record.tokens for record in everything)), "tokens, all trials"))
    numbers.append(("time", f"{seconds / unit:.1f}", f"{name}, all trials added up"))
    return numbers


def _facts(found: Findings) -> dict[str, str]:
    facts = {variable.name: variable.describe() for variable in found.variables}
    for variable, nats in found.effects if len(found.effects) > 1 else ():
        facts[f"{variable.label}: between its values"] = f"{nats:.4f} nats per token, mean losses"
    if found.search.rungs:
        facts["a third goes on after step"] = ", ".join(f"{rung:,}" for rung in found.search.rungs[:-1])
    if found.scaling and found.scaling.law.factor:
        law, guess = found.scaling.law, found.scaling.next
        formula = f"loss = {law.floor:.4g} + {law.factor:.4g} × N^-{law.exponent:.3g}"
        facts["scaling law"] = f"{formula}, N without embeddings"
        facts[f"{guess.parameters:,} parameters"] = (
            f"{guess.loss:.4f} nats per token predicted, {LEVEL:.0%} interval {guess.low:.4f} to {guess.high:.4f}"
        )
    return facts


def _table(found: Findings) -> list[list[str]]:
    """The head, and a row for each trial, the best first."""
    labels = [variable.label for variable in found.variables]
    rows = [["trial", *labels, "loss", "step", "parameters", "tokens", "seconds"]]
    for record in found.records.ranking():
        values = [variable.of(record.settings) for variable in found.variables]
        counts = [f"{number:,}" for number in (record.step, record.parameters, record.tokens)]
        rows.append([str(record.number), *values, sweep_table.loss_of(record), *counts, f"{record.seconds:,.1f}"])
    return rows


def _card(title: str, note: str, label: str, draw: Callable[..., None], **given: object) -> Drawn:
    return Drawn(title, note, figures.svg(functools.partial(draw, **given), label))


def _sweep_figures(found: Findings) -> list[Drawn]:
    variables, records, everything = found.variables, found.records, found.records.latest()
    drawn: list[Drawn] = []
    if any(math.isfinite(record.loss) for record in everything):
        drawn += [_against(everything, variable) for variable in variables]
        if len(variables) > 1:
            note = "A line is a trial: blue the lowest loss, orange the highest, the thick one the best."
            label = "Trials by all variables"
            drawn.append(_card("All variables", note, label, _draw_parallel, variables=variables, records=records))
    if everything:
        notes = []
        if len(everything) > MAX_NAMED:
            notes.append("Blue: the lowest loss at the end, orange the highest; the thick one is the best.")
        if any(record.status == DIVERGED for record in everything):
            notes.append("Crosses: where a trial diverged.")
        note, label = " ".join(notes), "Loss of all trials by step"
        drawn.append(_card("Learning curves", note, label, _draw_curves, variables=variables, records=records))
    if found.scaling and found.scaling.law.factor:
        note = (
            f"Each point is the best trial of a size; the line is the fitted law, the band its {LEVEL:.0%} interval "
            "for one more model that learns from as many tokens."
        )
        drawn.append(_card("Scaling", note, "Loss by model size", _draw_scaling, scaling=found.scaling))
    return drawn


def _against(everything: Sequence[TrialRecord], variable: Variable) -> Drawn:
    top = ceiling([record.loss for record in everything])
    notes = ["Line: the best of each value." if not variable.is_range else "Each point is a trial; ring: the best."]
    if any(record.status == PAUSED for record in everything):
        notes.append("Pale: stopped early, at an earlier step.")
    if any(record.loss > top and record.status != DIVERGED for record in everything):
        notes.append("Triangles at the top edge lie above.")
    if any(record.status == DIVERGED for record in everything):
        notes.append("Crosses at the top edge diverged.")
    title, label = f"Loss by {variable.label.replace('+', ' + ')}", f"Loss by {variable.name}"
    return _card(title, " ".join(notes), label, _draw_against, variable=variable, everything=everything)


def _range_figure(found: RangeFound) -> Drawn:
    note = (
        f"The learning rate rises at every step of one run. The loss falls fastest at {found.steepest:.2g}; a tenth "
        f"of the rate at which it was lowest is {found.highest_safe:.2g}."
    )
    return _card("Learning-rate range test", note, "Loss by learning rate", _draw_range, found=found)


def ceiling(losses: Sequence[float]) -> float:
    """The end of a loss axis: low enough for the better half of the trials to look different."""
    known = sorted(loss for loss in losses if math.isfinite(loss))
    middle = known[len(known) // 2]
    return min(known[-1], middle + 2 * (middle - known[0])) if middle > known[0] else known[-1]


def _limit(ax: Axes, losses: Sequence[float]) -> float:
    """End the loss axis at the ceiling, with a margin. Returns the height of marks for what lies above."""
    low, high = min(losses), ceiling(losses)
    margin = 0.12 * (high - low) or 0.05 * abs(low) or 1.0
    ax.set_ylim(low - margin / 2, high + margin)
    return high + margin / 2


def _draw_against(figure: Figure, variable: Variable, everything: Sequence[TrialRecord]) -> None:
    ax = figure.subplots()
    ax.set_ylabel(LOSS)
    ax.set_xlabel(_UNITS.get(variable.name, variable.label))
    positions = _axis_of(ax, variable)
    finite = [record.loss for record in everything if math.isfinite(record.loss)]
    edge, top = _limit(ax, finite), ceiling(finite)
    for status, alpha in ((FINISHED, 1.0), (PAUSED, 0.4)):
        shown = [record for record in everything if record.status == status]
        for above in (False, True):
            points = [(positions(r), edge if above else r.loss) for r in shown if (r.loss > top) == above]
            if points:
                style: dict = {"color": COLOURS["train"], "alpha": alpha, "linestyle": "", "markersize": 6}
                ax.plot(*zip(*points), marker="^" if above else "o", **style)
    diverged = [positions(record) for record in everything if record.status == DIVERGED]
    ax.plot(diverged, [edge] * len(diverged), "x", color=COLOURS["validation"], markersize=8, markeredgewidth=2)
    finished = [record for record in everything if record.status == FINISHED and math.isfinite(record.loss)]
    if not finished:
        return
    finished.sort(key=lambda record: (-record.loss, -record.number))
    if not variable.is_range:
        lowest = {positions(record): record.loss for record in finished}
        ax.plot(*zip(*sorted(lowest.items())), color=COLOURS["train"], linewidth=1.4)
    best = finished[-1]
    ring: dict = {"markersize": 12, "fillstyle": "none", "markeredgewidth": 1.6, "color": COLOURS["validation"]}
    ax.plot(positions(best), best.loss, "o", **ring)


def _axis_of(ax: Axes, variable: Variable) -> Callable[[TrialRecord], float]:
    """Fit the x axis to a variable; returns a function that gives the place of a trial on it."""
    if not variable.is_number:
        names = variable.texts
        ax.set_xticks(range(len(names)), names, rotation=0 if sum(map(len, names)) < 40 else 20)
        ax.set_xlim(-0.5, len(names) - 0.5)
        return lambda record: names.index(variable.of(record.settings))
    low, high = variable.ends
    if variable.is_log:
        figures.log_axis(ax, low, high, figures.short)
    else:
        margin = 0.05 * (high - low) or 0.05 * abs(low) or 1.0
        ax.set_xlim(low - margin, high + margin)
        ax.locator_params(axis="x", integer=variable.is_integer, nbins=6)
        ax.xaxis.set_major_formatter(lambda value, _: figures.short(value))
    return lambda record: float(variable.of(record.settings))


def _draw_parallel(figure: Figure, variables: Sequence[Variable], records: Records) -> None:
    ax = figure.subplots()
    shown = sorted((r for r in records.latest() if math.isfinite(r.loss)), key=lambda r: -r.loss)
    losses = [record.loss for record in shown]
    low, high = min(losses), ceiling(losses)
    height = lambda loss: min((loss - low) / ((high - low) or 1.0), 1.0)
    best = sweep_table.best(records)
    for record in shown:
        heights = [*(variable.place(variable.of(record.settings)) for variable in variables), height(record.loss)]
        is_best = best is not None and record.number == best.number
        style: dict = {"color": figures.ramp(height(record.loss)), "linewidth": 3.5 if is_best else 1.3}
        ax.plot(heights, zorder=3 if is_best else 2, alpha=1 if is_best else 0.8, solid_joinstyle="round", **style)
    names = [variable.label.replace("+", "\n+ ") for variable in variables]
    ax.set_xticks(range(len(names) + 1), [*(_broken(name) for name in names), "validation loss\n(nats per token)"])
    ax.set_yticks([])
    ax.set_xlim(-0.25, len(names) + 0.45)
    ax.set_ylim(-0.06, 1.06)
    ax.grid(False)
    for place, variable in enumerate(variables):
        _draw_scale(ax, place, _marks(variable))
    above = "≥ " if high < max(losses) else ""
    _draw_scale(ax, len(names), [(share, f"{above if share == 1 else ''}{low + share * (high - low):.3f}")
                                 for share in (0, 0.25, 0.5, 0.75, 1)])  # fmt: skip


def _broken(name: str) -> str:
    """A long name in two lines, so that neighbours do not overlap."""
    places = [place for place, letter in enumerate(name, 1) if letter == "_"]
    if len(name) < 12 or "\n" in name or not places:
        return name
    half = min(places, key=lambda place: abs(place - 1 - len(name) / 2))
    return f"{name[:half]}\n{name[half:]}"


def _draw_scale(ax: Axes, place: int, marks: Sequence[tuple[float, str]]) -> None:
    ax.axvline(place, color=COLOURS["axis"], linewidth=1, zorder=1)
    for share, text in marks:
        ax.plot([place - 0.015, place + 0.015], [share, share], color=COLOURS["axis"], linewidth=1)
        behind = {"facecolor": COLOURS["axis"], "edgecolor": "none", "pad": 1.2, "alpha": 0.25}
        ax.text(place + 0.03, share, text, fontsize=9, va="center", zorder=4, bbox=behind)


def _marks(variable: Variable) -> list[tuple[float, str]]:
    """(height, text) of the marks on a variable's scale, about five."""
    if not variable.is_number:
        return [(variable.place(text), text) for text in variable.texts]
    texts = variable.texts or [variable.at(share)[0] for share in (0, 0.25, 0.5, 0.75, 1)]
    return [(variable.place(text), figures.short(float(text))) for text in texts[:: math.ceil(len(texts) / 7)]]


def _draw_curves(figure: Figure, variables: Sequence[Variable], records: Records) -> None:
    """The curves of validation losses, or of training losses where each trial was evaluated but once."""
    ax, everything = figure.subplots(), records.ranking()
    evaluated = any(len(record.eval_losses) > 1 for record in everything)
    ax.set_ylabel(LOSS if evaluated else "training loss (nats per token)")
    ax.set_xlabel("optimizer step")
    figures.whole_numbers(ax)
    named, best, drawn = len(everything) <= MAX_NAMED, sweep_table.best(records), []
    for rank, record in reversed(list(enumerate(everything))):
        curve = record.eval_losses if evaluated else record.losses
        points = np.array([point for point in curve if math.isfinite(point[1])], float).reshape(-1, 2)
        if not len(points):
            continue
        drawn.append(points[:, 1])
        label = ", ".join(f"{v.label} {v.of(record.settings)}" for v in variables) if named else None
        style = figures.series(rank) if named else {"color": figures.ramp(rank / max(len(everything) - 1, 1))}
        style["linewidth"] = 3 if best is not None and record.number == best.number else 1.3
        if len(points) == 1:  # a line would not be seen
            style |= {"marker": "o", "markersize": 4.5, "markevery": None}
        ax.plot(*figures.thin(*points.T), label=label, **style)
        if record.status == DIVERGED:
            ax.plot(*points[-1], "x", color=COLOURS["validation"], markersize=8, markeredgewidth=2)
    if drawn:
        low = min(line.min() for line in drawn)
        high = min(max(line[0] for line in drawn), max(line.max() for line in drawn))
        margin = 0.05 * (high - low) or 0.05 * abs(low) or 1.0
        ax.set_ylim(low - margin, high + margin)
    if named:
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], labels[::-1], fontsize=9)


def _draw_scaling(figure: Figure, scaling: Scaling) -> None:
    ax = figure.subplots()
    ax.set_xlabel("parameters without embeddings")
    ax.set_ylabel(LOSS)
    band, guess = scaling.band, scaling.next
    counts = [prediction.parameters for prediction in band]
    low, high = [p.low for p in band], [p.high for p in band]
    ax.fill_between(counts, low, high, color=COLOURS["train"], alpha=0.25, linewidth=0, label=f"{LEVEL:.0%} interval")
    ax.plot(counts, scaling.law(counts), color=COLOURS["train"], label="fitted law")
    tried = [(size.parameters, size.loss) for size in scaling.sizes]
    ax.plot(*zip(*tried), "o", color=COLOURS["eval"], label="best trials")
    reach = [[max(guess.loss - guess.low, 0)], [max(guess.high - guess.loss, 0)]]
    style: dict = {"color": COLOURS["validation"], "capsize": 4, "markersize": 7}
    ax.errorbar([guess.parameters], [guess.loss], reach, fmt="D", label="predicted", **style)
    figures.log_axis(ax, min(counts), max(counts), figures.big)
    ax.legend(fontsize=9)


def _draw_range(figure: Figure, found: RangeFound) -> None:
    ax = figure.subplots()
    ax.set_xlabel("learning rate (per step)")
    ax.set_ylabel("training loss (nats per token)")
    rates, losses = np.array(found.rates, float), np.array(found.losses, float)
    known = np.isfinite(losses)
    rates, losses = rates[known], losses[known]
    ax.plot(*figures.thin(rates, losses), color=COLOURS["train"], linewidth=1.6, label="loss")
    low, first = losses.min(), losses[: max(len(losses) // 10, 1)].mean()
    margin = 0.15 * (first - low) or 1.0
    ax.set_ylim(low - margin, first + 2 * margin)
    marks = ((found.steepest, "steepest", "-"), (found.highest_safe, "a tenth of the lowest's", (0, (4, 2))))
    for rate, words, style in marks:
        ax.axvline(rate, color=COLOURS["validation"], linestyle=style, label=f"{words}: {rate:.2g}")
    figures.log_axis(ax, rates[0], rates[-1], figures.short)
    ax.legend(fontsize=9)


_BODY = """<h1>{{ name }}</h1><p class="muted">{{ subtitle }}</p>
{% for doubt in doubts %}<p class="warning">{{ doubt }}</p>{% endfor %}
{{ headline(numbers) }}
{{ figures(drawn) }}
{% if best %}<section><h2>The best settings: best.toml</h2><pre>{{ best }}</pre></section>{% endif %}
{% if table %}<section><h2>Trials, the best first</h2><div class="scroll"><table><tr>
{% for name in table[0] %}<th class="number">{{ name }}{% endfor %}</tr>
{% for row in table[1:] %}<tr>{% for cell in row %}<td class="number">{{ cell }}{% endfor %}</tr>
{% endfor %}</table></div></section>{% endif %}
{% if facts %}<section><h2>What was varied</h2>{{ pairs(facts) }}</section>{% endif %}
"""
