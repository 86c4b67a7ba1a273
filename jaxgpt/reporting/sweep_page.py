"""report.html of a sweep: the table, loss against each variable, all trials at once, their curves, the scaling law.

Every drawing takes a matplotlib figure; colours and the page itself are reporting/figures.py's.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxgpt.reporting import figures, sweep_figures
from jaxgpt.tuning import sweep_table
from jaxgpt.tuning.scaling import LEVEL, Scaling
from jaxgpt.tuning.search import Search
from jaxgpt.tuning.space import Variable
from jaxgpt.tuning.sweep_folder import BEST, DIVERGED, PAUSED, REPORT, Record, Records

RANGE_TEST = "learning_rate.json"
_HALF, _WIDE, _NARROW = (5, 3.6), (10.4, 4.2), (5, 4.2)  # inches: half a page, a page, a phone


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What the page shows."""

    search: Search
    records: Records
    scaling: Scaling | None
    effects: Sequence[tuple[Variable, float]]
    doubts: Sequence[str]

    @property
    def variables(self) -> tuple[Variable, ...]:
        return self.search.space.variables


def write_page(folder: Path, sweep: Sweep | None) -> Path:
    """Write report.html of what the folder holds: a sweep, a range test, or both."""
    found = read_range_test(folder)
    drawn = _sweep_figures(sweep) if sweep else []
    best = folder / BEST
    text = figures.page(
        _BODY,
        title=f"{folder.resolve().name} · jaxgpt sweep",
        name=folder.resolve().name,
        subtitle=_subtitle(sweep),
        headline=_headline(sweep) if sweep else [],
        doubts=sweep.doubts if sweep else [],
        drawn=drawn + (_range_figures(found) if found else []),
        table=_table(sweep) if sweep else None,
        facts=_facts(sweep) if sweep else {},
        best=best.read_text(encoding="utf-8") if sweep and best.exists() else "",
    )
    return figures.write_page(folder / REPORT, text)


def read_range_test(folder: Path) -> dict | None:
    """What the range finder left: {"rates", "losses", "steepest", "highest_safe"}."""
    file = folder / RANGE_TEST
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


# ---------------------------------------------------------------- words and numbers


def _subtitle(sweep: Sweep | None) -> str:
    if sweep is None:
        return "jaxgpt sweep · learning-rate range test"
    ended, asked = len(sweep.records.ended()), sweep.search.trials
    left = len([record for record in sweep.records.latest() if record.status == PAUSED])
    early = f", {left} of them stopped early" if left else ""
    return f"jaxgpt sweep · {sweep.search.method} · {ended + left} of {asked} trials{early}"


def _headline(sweep: Sweep) -> list[tuple[str, str, str]]:
    """(name, figure, remark) of the numbers that a reader wants first."""
    best, everything = sweep_table.best(sweep.records), sweep.records.latest()
    found = []
    if best:
        found.append(("best validation loss", f"{best.loss:.4f}", f"nats per token, trial {best.number}"))
        found += [(f"best {_spaced(variable)}", variable.of(best.settings), "") for variable in sweep.variables]
    seconds = sum(record.seconds for record in everything)
    unit, name = figures.time_unit(seconds)
    found.append(("trained", figures.big(sum(record.tokens for record in everything)), "tokens, all trials"))
    found.append(("time", f"{seconds / unit:.1f}", f"{name}, all trials added up"))
    return found


def _facts(sweep: Sweep) -> dict[str, str]:
    facts = {variable.name: variable.describe() for variable in sweep.variables}
    for variable, nats in sweep.effects if len(sweep.effects) > 1 else ():
        facts[f"{variable.label}: between its values"] = f"{nats:.4f} nats per token, mean losses"
    if sweep.search.rungs:
        facts["a third goes on after step"] = ", ".join(f"{rung:,}" for rung in sweep.search.rungs[:-1])
    if sweep.scaling and sweep.scaling.law.factor:
        law, guess = sweep.scaling.law, sweep.scaling.next
        facts["scaling law"] = (
            f"loss = {law.floor:.4g} + {law.factor:.4g} × N^-{law.exponent:.3g}, N without embeddings"
        )
        facts[f"{guess.parameters:,} parameters"] = (
            f"{guess.loss:.4f} nats per token predicted, {LEVEL:.0%} interval {guess.low:.4f} to {guess.high:.4f}"
        )
    return facts


def _table(sweep: Sweep) -> dict:
    """{"head", "rows"} with a row for each trial, the best first."""
    head = [
        "trial",
        *(variable.label for variable in sweep.variables),
        "loss",
        "step",
        "parameters",
        "tokens",
        "seconds",
    ]
    rows = [
        [
            str(record.number),
            *(variable.of(record.settings) for variable in sweep.variables),
            sweep_table.loss_of(record),
            f"{record.step:,}",
            f"{record.parameters:,}",
            f"{record.tokens:,}",
            f"{record.seconds:,.1f}",
        ]
        for record in sweep.records.ranking()
    ]
    return {"head": head, "rows": rows}


# ---------------------------------------------------------------- figures


def _card(title: str, draw: Callable, note: str, label: str, size=_HALF, width: str = "") -> dict:
    return {"title": title, "note": note, "svg": figures.svg(draw, label, size), "width": width}


def _both(title: str, draw: Callable, note: str, label: str) -> list[dict]:
    """As wide as the page, and again for a phone."""
    return [
        _card(title, draw, note, label, _WIDE, "wide"),
        _card(title, draw, note, f"{label} (narrow)", _NARROW, "narrow"),
    ]


def _sweep_figures(sweep: Sweep) -> list[dict]:
    variables, records, everything = sweep.variables, sweep.records, sweep.records.latest()
    drawn = []
    if any(math.isfinite(record.loss) for record in everything):
        drawn += itertools.chain(*(_against(everything, variable, len(variables) == 1) for variable in variables))
        if len(variables) > 1:
            draw = lambda figure: sweep_figures.draw_parallel(figure, variables, records)
            note = "A line is a trial: violet the lowest loss, yellow the highest, the thick one the best."
            drawn += _both("All variables", draw, note, "Trials by all variables")
    if everything:
        draw = lambda figure: sweep_figures.draw_curves(figure, variables, records)
        drawn += _both("Learning curves", draw, _curves_note(everything), "Loss of all trials by step")
    if sweep.scaling and sweep.scaling.law.factor:
        draw = lambda figure: sweep_figures.draw_scaling(figure, sweep.scaling)
        note = (
            f"Each point is the best trial of a size; the line is the fitted law, the band its {LEVEL:.0%} interval "
            "for one more model that learns from as many tokens."
        )
        drawn += _both("Scaling", draw, note, "Loss by model size")
    return drawn


def _against(everything: Sequence[Record], variable: Variable, alone: bool) -> list[dict]:
    top = sweep_figures.ceiling([record.loss for record in everything])
    notes = ["Line: the best of each value." if not variable.is_range else "Each point is a trial; ring: the best."]
    if any(record.status == PAUSED for record in everything):
        notes.append("Pale: stopped early, at an earlier step.")
    if any(record.loss > top and record.status != DIVERGED for record in everything):
        notes.append("Triangles at the top edge lie above.")
    if any(record.status == DIVERGED for record in everything):
        notes.append("Crosses at the top edge diverged.")
    draw = lambda figure: sweep_figures.draw_against(figure, variable, everything)
    title, label = f"Loss by {_spaced(variable)}", f"Loss by {variable.name}"
    return _both(title, draw, " ".join(notes), label) if alone else [_card(title, draw, " ".join(notes), label)]


def _spaced(variable: Variable) -> str:
    """The label, with places where a line may break."""
    return variable.label.replace("+", " + ")


def _curves_note(everything: Sequence[Record]) -> str:
    named = len(everything) <= sweep_figures.MAX_NAMED
    note = "" if named else "Violet: the lowest loss at the end, yellow the highest; the thick one is the best."
    return f"{note} Crosses: where a trial diverged.".strip() if any(r.status == DIVERGED for r in everything) else note


def _range_figures(found: dict) -> list[dict]:
    note = (
        f"The learning rate rises at every step of one run. The loss falls fastest at {found['steepest']:.2g}; a tenth "
        f"of the rate at which it was lowest is {found['highest_safe']:.2g}."
    )
    return _both(
        "Learning-rate range test",
        lambda figure: sweep_figures.draw_range(figure, found),
        note,
        "Loss by learning rate",
    )


# ---------------------------------------------------------------- the page

_BODY = """<h1>{{ name }}</h1><p class="muted">{{ subtitle }}</p>
{% for doubt in doubts %}<p class="warning">{{ doubt }}</p>{% endfor %}
{% if headline %}<section><dl class="headline">{% for title, value, remark in headline %}
<div><dt>{{ title }}</dt><dd class="value">{{ value }}</dd><dd class="note">{{ remark }}</dd></div>
{% endfor %}</dl></section>{% endif %}
{{ figures(drawn) }}
{% if best %}<section><h2>The best settings: best.toml</h2><pre>{{ best }}</pre></section>{% endif %}
{% if table %}<section><h2>Trials, the best first</h2><div class="scroll"><table><tr>
{% for name in sweep_table.head %}<th class="number">{{ name }}{% endfor %}</tr>
{% for row in sweep_table.rows %}<tr>{% for cell in row %}<td class="number">{{ cell }}{% endfor %}</tr>
{% endfor %}</table></div></section>{% endif %}
{% if facts %}<section><h2>What was varied</h2>{{ pairs(facts) }}</section>{% endif %}
"""
