"""report.html of a sweep: the table, loss against each variable, all trials at once, their curves, the scaling law."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxgpt.reporting import figures, sweep_figures
from jaxgpt.reporting.figures import Drawn
from jaxgpt.tuning import sweep_table
from jaxgpt.tuning.learning_rate import RangeFound, read_range_test
from jaxgpt.tuning.scaling import LEVEL
from jaxgpt.tuning.space import Variable
from jaxgpt.tuning.sweep_folder import BEST, DIVERGED, PAUSED, REPORT, TrialRecord
from jaxgpt.tuning.sweep_table import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


# ---------------------------------------------------------------- words and numbers


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
        numbers += [(f"best {_spaced(variable)}", variable.of(best.settings), "") for variable in found.variables]
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
        facts["scaling law"] = (
            f"loss = {law.floor:.4g} + {law.factor:.4g} × N^-{law.exponent:.3g}, N without embeddings"
        )
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


# ---------------------------------------------------------------- figures


def _card(title: str, draw: Callable[[Figure], None], note: str, label: str) -> Drawn:
    return Drawn(title, note, figures.svg(draw, label))


def _sweep_figures(found: Findings) -> list[Drawn]:
    variables, records, everything = found.variables, found.records, found.records.latest()
    drawn: list[Drawn] = []
    if any(math.isfinite(record.loss) for record in everything):
        drawn += [_against(everything, variable) for variable in variables]
        if len(variables) > 1:
            draw = functools.partial(sweep_figures.draw_parallel, variables=variables, records=records)
            note = "A line is a trial: blue the lowest loss, orange the highest, the thick one the best."
            drawn.append(_card("All variables", draw, note, "Trials by all variables"))
    if everything:
        draw = functools.partial(sweep_figures.draw_curves, variables=variables, records=records)
        drawn.append(_card("Learning curves", draw, _curves_note(everything), "Loss of all trials by step"))
    if found.scaling and found.scaling.law.factor:
        draw = functools.partial(sweep_figures.draw_scaling, scaling=found.scaling)
        note = (
            f"Each point is the best trial of a size; the line is the fitted law, the band its {LEVEL:.0%} interval "
            "for one more model that learns from as many tokens."
        )
        drawn.append(_card("Scaling", draw, note, "Loss by model size"))
    return drawn


def _against(everything: Sequence[TrialRecord], variable: Variable) -> Drawn:
    top = sweep_figures.ceiling([record.loss for record in everything])
    notes = ["Line: the best of each value." if not variable.is_range else "Each point is a trial; ring: the best."]
    if any(record.status == PAUSED for record in everything):
        notes.append("Pale: stopped early, at an earlier step.")
    if any(record.loss > top and record.status != DIVERGED for record in everything):
        notes.append("Triangles at the top edge lie above.")
    if any(record.status == DIVERGED for record in everything):
        notes.append("Crosses at the top edge diverged.")
    draw = functools.partial(sweep_figures.draw_against, variable=variable, everything=everything)
    return _card(f"Loss by {_spaced(variable)}", draw, " ".join(notes), f"Loss by {variable.name}")


def _spaced(variable: Variable) -> str:
    """The label, with places where a line may break."""
    return variable.label.replace("+", " + ")


def _curves_note(everything: Sequence[TrialRecord]) -> str:
    named = len(everything) <= sweep_figures.MAX_NAMED
    note = "" if named else "Blue: the lowest loss at the end, orange the highest; the thick one is the best."
    return f"{note} Crosses: where a trial diverged.".strip() if any(r.status == DIVERGED for r in everything) else note


def _range_figure(found: RangeFound) -> Drawn:
    note = (
        f"The learning rate rises at every step of one run. The loss falls fastest at {found.steepest:.2g}; a tenth "
        f"of the rate at which it was lowest is {found.highest_safe:.2g}."
    )
    draw = functools.partial(sweep_figures.draw_range, found=found)
    return _card("Learning-rate range test", draw, note, "Loss by learning rate")


# ---------------------------------------------------------------- the page

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
