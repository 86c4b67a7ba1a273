"""report.html: what a run did, in one file to look at or send. `write_report(workdir)` makes it."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxgpt import __version__
from jaxgpt.config import Config, flatten
from jaxgpt.model.sizes import parameter_count
from jaxgpt.reporting import figures, run_files
from jaxgpt.reporting.figures import COLOURS, SMOOTHED, Drawn, big, word
from jaxgpt.reporting.run_card import checkout_commit, clock, read_card, shown_as
from jaxgpt.reporting.run_files import ACTIVITIES, Columns
from jaxgpt.storage.files import append_json, write_file
from jaxgpt.training.checkpoint import EVALUATIONS, find_step, finished_steps, step_to_use
from jaxgpt.training.metrics import METRICS_FILE, read_metrics
from jaxgpt.training.models import is_huggingface
from jaxgpt.training.recovery import record_process
from jaxgpt.training.run_state import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOISY = ("loss", "grad_norm", "tokens_per_second")
MAX_SAMPLES, MAX_SAMPLE_CHARACTERS = 30, 2000  # with the points, what keeps it under a megabyte
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")

# fmt: off
# Parts of summary.json that the card has, and fields of the card that have other places on the page.
_IN_CARD = (
    "status", "parameters", "seconds", "price_per_hour", "device", "devices", "command", "commit", "versions",
)
_ELSEWHERE = (
    "status", "eval_loss", "best_eval_loss", "best_step", "predicted_loss", "predicted_low", "predicted_high",
    "bits_per_byte", "skills_english", "skills_chinese", "skills_questions", "answers_that_stop", "tokens", "epochs",
    "tokens_per_second", "mfu", "seconds", "processes", "price_per_hour", "cost", "samples",
)
# fmt: on


def write_summary(run: Run, status: str, seconds: float) -> None:
    """Write summary.json (what ran, on what, and how it ended) and report.html of a run that has ended."""
    config, dataset, devices = run.config, run.dataset, run.mesh.devices.flatten()
    if run.lease:
        unlogged = {name: round(seconds, 3) for name, seconds in run.split.take().items()}
        record_process(run.workdir, run.lease.owner, time.time(), status=status, unlogged=unlogged)
    packages = {name: version(name) for name in PACKAGES}
    summary = {
        "status": status,
        "checkpoint": run.checkpoints.latest_step(),
        "seconds": round(seconds, 1),
        "parameters": parameter_count(config.model, dataset.vocab_size),
        "tokens_per_step": config.global_batch_size * config.block_size,
        "price_per_hour": config.log.price_per_hour,
        "device": devices[0].device_kind,
        "devices": int(devices.size),
        "mesh": dict(run.mesh.shape),
        "data": {
            "path": str(dataset.path),
            "fingerprint": dataset.fingerprint,
            "training_tokens": dataset.train.num_tokens,
            "validation_tokens": dataset.validation.num_tokens,
            **dataset.train.facts(),
            "vocabulary": dataset.vocab_size,
        },
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "commit": checkout_commit(),
        "versions": {"jaxgpt": __version__, "python": platform.python_version(), **packages},
    }
    write_file(run.workdir / "summary.json", json.dumps(summary, indent=2))
    if (run.workdir / METRICS_FILE).exists():  # a run that failed in its first step has none
        write_report(run.workdir)


def write_report(workdir: Path) -> Path:
    """Write `workdir`/report.html and card.json from metrics.jsonl, and what else of a run's files is there.

    Raises UserError where the folder has no metrics.jsonl.
    """
    records = read_metrics(workdir)
    columns, summary = run_files.columns(records), _read_json(workdir / "summary.json")
    config = _read_json(workdir / "config.json")
    card = read_card(workdir, records, config, summary)
    text = json.dumps({"name": workdir.resolve().name, **card}, indent=2, ensure_ascii=False)
    write_file(workdir / "card.json", (text + "\n").encode("utf-8", errors="replace"))
    changed, unchanged = _settings(config)
    rows = {shown_as(key).label: shown_as(key).form(card[key]) for key in card if key not in _ELSEWHERE}
    return figures.write_page(
        workdir / "report.html",
        _BODY,
        f"{workdir.resolve().name} · jaxgpt run report",
        name=workdir.resolve().name,
        status=card["status"],
        facts=_flat({key: value for key, value in summary.items() if key not in _IN_CARD}),
        numbers=_headline(columns, card),
        card=rows,
        conversations=card.get("samples", []),
        warnings=_warnings(records, workdir),
        drawn=_figures(columns),
        evaluated=run_files.evaluation_rows(workdir),
        samples=_samples(records),
        changed=changed,
        unchanged=unchanged,
    )


def add_evaluation(checkpoint: str, found: dict[str, object]) -> None:
    """Add an evaluation to the run of the checkpoint and to its report; a Hugging Face folder keeps none."""
    if is_huggingface(checkpoint):
        return
    run, _ = find_step(Path(checkpoint))
    try:
        append_json(run / EVALUATIONS, found)
        if (run / "metrics.jsonl").exists():
            write_report(run)
    except OSError as error:  # another user's run, or a full disk: the figures are printed
        print(f"warning: {error.filename or run}: {error.strerror}; the run keeps no record of this", file=sys.stderr)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _flat(values: dict, prefix: str = "") -> dict[str, str]:
    """{"mesh data": "8", ...}: nested objects under joined names, numbers with thousands commas."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            flat |= _flat(value, f"{name} ")
        elif isinstance(value, float) and not value.is_integer():
            flat[name] = f"{value:,.5g}"
        else:
            flat[name] = f"{value:,.0f}" if type(value) in (int, float) else word(value)
    return flat


def _settings(config: dict) -> tuple[list[tuple[str, str, str]], ...]:
    """(name, value, default) of the settings that differ from the default, and of the others.

    Read as plain JSON, so that a run made by another version still says what it did.
    """
    default = json.loads(json.dumps(flatten(Config())))
    rows: tuple[list[tuple[str, str, str]], ...] = ([], [])
    for section, fields in config.items():
        for key, value in fields.items() if isinstance(fields, dict) else ():
            name = f"{section}.{key}"
            normal = default.get(name, "not a setting of this version")
            rows[value == normal].append((name, word(value), word(normal)))
    return rows


def _headline(columns: Columns, card: dict) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the numbers that a reader wants first."""
    last = {key: values[-1] for key in columns if len(values := run_files.known(columns, key)[1])}
    found = []
    if "eval_loss" in last:
        steps, losses = run_files.known(columns, "eval_loss")
        best = losses.argmin()
        found.append(("validation loss", f"{losses[-1]:.4f}", f"nats/token, step {steps[-1]:,.0f}"))
        found.append(("best", f"{losses[best]:.4f}", f"step {steps[best]:,.0f}"))
        if "predicted_loss" in card:
            off = f"; reached {losses[-1] / card['predicted_loss'] - 1:+.1%}"
            spread = f"{card['predicted_low']:.4f} to {card['predicted_high']:.4f}{off}"
            found.append(("predicted", f"{card['predicted_loss']:.4f}", spread))
    elif "loss" in last:
        found.append(("training loss", f"{last['loss']:.4f}", "nats/token; no evaluation yet"))
    for key, name in (("eval_perplexity", "perplexity"), ("eval_bits_per_byte", "bits per byte")):
        if key in last:
            found.append((name, f"{last[key]:,.4g}", "validation"))
    asked = f"of {card['skills_questions']:,} questions" if "skills_questions" in card else "to validation prompts"
    for key in ("skills_english", "skills_chinese", "answers_that_stop"):
        if key in card:
            what = f"by themselves, {asked}" if key == "answers_that_stop" else "mean of the skills"
            found.append((shown_as(key).label, f"{card[key]:.1%}", what))
    if "tokens" in last:
        epochs = f"{last['epoch']:.2f} epochs" if "epoch" in last else ""
        found.append(("tokens seen", big(last["tokens"]), epochs))
    if "tokens_per_second" in last:
        speed = np.median(run_files.known(columns, "tokens_per_second")[1])
        used = f", MFU {np.median(run_files.known(columns, 'mfu')[1]):.1%}" if "mfu" in last else ""
        found.append(("tokens/s", big(speed), f"median{used}"))
    if round(card.get("seconds", 0)):
        parts = f", {card['processes']} processes" if card.get("processes", 1) > 1 else ""
        found.append(("time", clock(card["seconds"]), f"{card.get('steps', 0):,.0f} steps{parts}"))
    if "cost" in card:
        found.append(("cost", shown_as("cost").form(card["cost"]), f"{card['price_per_hour']:,.6g} an hour"))
    return found


def _warnings(records: list[dict], workdir: Path) -> list[str]:
    step, why = step_to_use(workdir) if finished_steps(workdir) else (0, "")
    found = [f"{why[0].upper()}{why[1:]}. Used where no step is named: step {step:,}."] if why else []
    bad = [record for record in records if record.get("nonfinite")]
    if not bad:
        return found if records else ["No step has been logged yet."]
    first = ", ".join(f"{key} was {value}" for key, value in bad[0]["nonfinite"].items())
    return [*found, f"Not finite: {first} at step {bad[0]['step']:,}; {len(bad):,} such lines in all."]


def _samples(records: list[dict]) -> list[tuple[int, str]]:
    """(step, text), newest first; thinned evenly from the newest on."""
    found = [(record["step"], record["sample"]) for record in records if record.get("sample")]
    every = math.ceil(len(found) / MAX_SAMPLES) or 1
    return [(step, text[:MAX_SAMPLE_CHARACTERS]) for step, text in found[::-1][::every]]


def _figures(columns: Columns) -> list[Drawn]:
    """Every figure that there are points for."""
    drawn, known = [], {key for key in columns if len(run_files.known(columns, key)[0])}
    if known & {"loss", "eval_loss"}:
        drawn.append(_draw(_draw_loss, columns, "Loss"))
    if known & {"learning_rate", "grad_norm"}:
        drawn.append(_draw(_draw_optimizer, columns, "Learning rate and gradient norm"))
    if "tokens_per_second" in known or run_files.seconds(columns).any():
        drawn.append(_draw(_draw_speed, columns, "Throughput and where the time goes"))
    if tasks := run_files.accuracies(columns):
        legend = list(enumerate(tasks.values()))
        drawn.append(_draw(_draw_tasks, columns, "Tasks during training")._replace(legend=legend))
    return drawn


def _draw(draw: Callable[[Figure, Columns], str], columns: Columns, title: str) -> Drawn:
    """One figure over the steps by `draw(figure, columns) -> note`."""
    notes = []

    def over_steps(figure: Figure) -> None:
        notes.append(draw(figure, columns))
        for ax in figure.axes:
            figures.whole_numbers(ax)
            ax.set_xlim(0, columns["step"].max(initial=1) * 1.01)
        figure.axes[-1].set_xlabel("optimizer step")

    svg = figures.svg(over_steps, f"{title} over the steps")
    return Drawn(title, notes[0], svg)


def _line(ax: Axes, columns: Columns, key: str, colour: str = "train", label: str = "") -> None:
    """Draw a metric over the steps: few points are marked, many of a noisy one averaged too."""
    steps, values = run_files.known(columns, key)
    style: dict = {"color": COLOURS[colour], "linewidth": 1.6}
    if key in NOISY and len(steps) >= SMOOTHED:
        ax.plot(*figures.thin(steps, values), **{**style, "linewidth": 0.8, "alpha": 0.35})
        values = figures.trailing_mean(values, len(values) // 50)
    marker = "o" if len(steps) < 40 else ""
    ax.plot(*figures.thin(steps, values), label=label, marker=marker, markersize=3.5, **style)


def _draw_loss(figure: Figure, columns: Columns) -> str:
    ax = figure.subplots()
    ax.set_ylabel("loss (nats per token)")
    losses, notes = run_files.known(columns, "loss")[1], []
    eval_steps, eval_losses = run_files.known(columns, "eval_loss")
    if len(losses):
        _line(ax, columns, "loss", label="training")
    if len(losses) >= SMOOTHED:
        notes.append(f"Training: mean of {len(losses) // 50} lines, each line pale behind it.")
    if len(eval_losses):
        _line(ax, columns, "eval_loss", "validation", "validation")
        best = eval_losses.argmin()
        ring: dict = {"color": COLOURS["validation"], "markersize": 11, "fillstyle": "none"}
        ax.plot(eval_steps[best], eval_losses[best], "o", **ring)
        notes.append("Ring: the best validation loss.")
    notes.append(figures.clip(ax, [losses], [eval_losses]))
    ax.legend()
    return " ".join(notes)


def _draw_optimizer(figure: Figure, columns: Columns) -> str:
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.set_ylabel("learning rate")
    bottom.set_ylabel("gradient norm")
    _line(top, columns, "learning_rate")
    top.set_ylim(bottom=0)
    top.yaxis.set_major_formatter(lambda y, _: f"{y:.7f}".rstrip("0").rstrip("."))
    _line(bottom, columns, "grad_norm")
    clipped = figures.clip(bottom, [run_files.known(columns, "grad_norm")[1]], [])
    bottom.set_ylim(bottom=0)
    return clipped and f"Gradient norm: {clipped}"


def _draw_tasks(figure: Figure, columns: Columns) -> str:
    ax = figure.subplots()
    ax.set_ylabel("questions answered right")
    for number, key in enumerate(run_files.accuracies(columns)):
        figures.series_line(ax, *run_files.known(columns, key), number)
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    return ""


def _draw_speed(figure: Figure, columns: Columns) -> str:
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.set_ylabel("tokens per second")
    _line(top, columns, "tokens_per_second")
    top.set_ylim(bottom=0)
    top.yaxis.set_major_formatter(lambda y, _: big(y))
    bottom.set_ylabel("share of wall time")
    bottom.set_ylim(0, 1)
    bottom.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    seconds = run_files.seconds(columns)
    timed = np.flatnonzero(seconds.any(axis=0))
    if not len(timed):
        return ""
    # Twenty stretches: wide enough that most hold an evaluation, which comes only now and then.
    stretches = np.array_split(timed, min(20, len(timed)))
    sums = np.stack([seconds[:, part].sum(axis=1) for part in stretches], axis=1)
    shares = sums / sums.sum(axis=0)
    edges = [0, *(columns["step"][part[-1]] for part in stretches)]
    steps = np.concatenate([shares, shares[:, -1:]], axis=1)  # the last value closes the last step
    style: dict = {"colors": [COLOURS[name] for name in ACTIVITIES], "step": "post", "linewidth": 0}
    bottom.stackplot(edges, steps, labels=ACTIVITIES, **style)
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    whole = zip(ACTIVITIES, seconds.sum(axis=1) / seconds.sum(), strict=True)
    return "Whole run: " + ", ".join(f"{name} {share:.1%}" for name, share in whole) + "."


_BODY = """{% macro settings(rows) %}<table><tr><th>setting<th>value<th>default</tr>
{% for name, value, default in rows %}
<tr><td>{{ name }}<td>{{ value }}<td class="muted">{{ default }}</tr>{% endfor %}
</table>{% endmacro %}
{% macro sample(step, text) %}<p class="muted">step {{ "{:,}".format(step) }}</p><pre>
{{ text }}</pre>{% endmacro %}
<h1>{{ name }}</h1><p class="muted">jaxgpt run · {{ status }}</p>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
{{ headline(numbers) }}<section><h2>Card</h2>{{ pairs(card) }}
{% if conversations %}<details open><summary>Conversations</summary>{% for text in conversations %}<pre>
{{ text }}</pre>{% endfor %}</details>{% endif %}</section>
{{ figures(drawn) }}
{% if evaluated %}<section><h2>Evaluation</h2><div class="scroll"><table>
<tr><th>task or text<th>metric<th class="number">value<th class="number">error<th class="number">step<th>how</tr>
{% for row in evaluated %}<tr><td>{{ row.name }}<td>{{ row.metric }}<td class="number">{{ row.value }}
<td class="number">{{ row.error }}<td class="number">{{ row.step }}<td class="muted">{{ row.how }}</tr>
{% for line in row.beside %}<tr><td><td colspan="5" class="note">{{ line }}</tr>{% endfor %}{% endfor %}
</table></div></section>{% endif %}
{% if samples %}<section><h2>Samples</h2>{{ sample(*samples[0]) }}
{% if samples[1:] %}<details><summary>{{ samples[1:] | length }} older</summary>
{% for older in samples[1:] %}{{ sample(*older) }}{% endfor %}</details>{% endif %}
</section>{% endif %}
{% if facts %}<section><h2>Run</h2>{{ pairs(facts) }}</section>{% endif %}
<section><h2>Settings</h2>
{% if changed %}{{ settings(changed) }}{% endif %}
{% if unchanged %}<details><summary>{{ unchanged | length }} settings at their defaults</summary>
{{ settings(unchanged) }}</details>{% endif %}
{% if not changed and not unchanged %}<p>There is no config.json.</p>{% endif %}</section>
"""
