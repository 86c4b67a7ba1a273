"""The results of a sweep in lines: the table, how much each variable matters, and what to doubt."""

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxgpt.config import Config
from jaxgpt.errors import UserError
from jaxgpt.tuning import scaling
from jaxgpt.tuning.scaling import Scaling, Size, without_embeddings
from jaxgpt.tuning.search import Search, SweepRequest
from jaxgpt.tuning.space import Space, Variable
from jaxgpt.tuning.sweep_folder import DIVERGED, FINISHED, Records, TrialRecord, train_command, write_best

MAX_ROWS = 30
SEED = "train.seed"
# More of these is better or another question: that the best one is the largest tried is no news.
_COSTS = ("model.n_layer", "model.n_embd", "model.n_head", "model.n_positions", "train.max_steps",
          "train.num_train_epochs")  # fmt: skip
_BORDER = 0.05  # of a range: this near its end the best may lie beyond it


@dataclasses.dataclass(frozen=True)
class Findings:
    """The results of a sweep so far."""

    search: Search
    records: Records
    scaling: Scaling | None
    """None where too few sizes were tried."""
    effects: Sequence[tuple[Variable, float]]
    doubts: Sequence[str]

    @property
    def variables(self) -> tuple[Variable, ...]:
        return self.search.space.variables


PageWriter = Callable[[Path, Findings | None], Path]
"""Writes report.html of a sweep's folder (reporting/sweep_page.py); without findings, of a range test alone."""


def describe(search: Search, config: Config, records: Records, folder: Path) -> None:
    """Print what is going to happen; `config` is that of the first trial, resolved."""
    how = {"grid": "every combination", "random": "drawn at random", "tpe": "each proposed after the one before"}
    how["halving"] = f"successive halving, a third goes on after each of the steps {', '.join(map(str, search.rungs))}"
    print(f"sweep    {search.trials} trials, {how[search.method]}; in {folder}")
    for variable in search.space.variables:
        print(f"vary     {variable.name}: {variable.describe()}")
    print(
        f"trial    {config.max_steps:,} steps of {config.global_batch_size * config.block_size:,} tokens, "
        f"evaluated every {config.eval_steps:,}"
    )
    if search.rungs and search.rungs[0] <= 2 * (warm_up := config.warmup_steps):
        print(
            f"doubt    the first trials are dropped at step {search.rungs[0]}, and the warm-up takes {warm_up}: small "
            "learning rates have hardly begun by then; fewer --trials, or a later --eval.eval_steps"
        )
    if done := records.latest():
        print(f"resume   {len(done)} trials are recorded")
    sys.stdout.flush()


def conclude(search: Search, records: Records, request: SweepRequest, write_page: PageWriter) -> None:
    """Print the results, and write best.toml, the page and --json; also of a sweep that was stopped."""
    space, folder = search.space, request.workdir
    by_size = sizes(space, records)
    law = scaling.fit_sizes(by_size, request.predict)
    # The trials that halving let finish were chosen, so their means say little.
    matter = effects(space, records) if search.method != "halving" else []
    found = Findings(search, records, law, matter, doubts(space, records))
    print(table(space, records))
    if len(matter) > 1:
        listed = ", ".join(f"{variable.label} {nats:.4f}" for variable, nats in matter)
        print(f"matters  {listed} nats between values")
    if lines := scaling.report(by_size, law):
        print(lines)
    for doubt in found.doubts:
        print(f"doubt    {doubt}")
    winner = best(records)
    if winner is None:
        print("best     no trial has finished with a loss yet")
    else:
        file = write_best(folder, space, winner)
        print(f"best     trial {winner.number}, validation loss {winner.loss:.4f}: {file}")
        print(f"train    {train_command(file)}")
    print(f"report   {write_page(folder, found)}", flush=True)
    if request.json:
        content = {
            "method": search.method,
            "variables": {variable.name: variable.text for variable in space.variables},
            "best": dataclasses.asdict(winner) if winner else None,
            "trials": [dataclasses.asdict(record) for record in records.ranking()],
            "scaling": dataclasses.asdict(law) if law else None,
        }
        write_json(request.json, content)


def write_json(file: Path, content: dict) -> None:
    """Write what --json asks for. Raises UserError where that fails."""
    try:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file} cannot be written ({error.strerror})") from None


def best(records: Records) -> TrialRecord | None:
    """The finished trial with the lowest validation loss."""
    finished = [record for record in records.latest() if record.status == FINISHED and record.loss < float("inf")]
    return min(finished, key=lambda record: (record.loss, record.number), default=None)


def table(space: Space, records: Records) -> str:
    """A line a trial, the best first."""
    ranking = records.ranking()
    steps = {record.step for record in ranking if record.status != DIVERGED}
    rows = [["trial", *(variable.label for variable in space.variables), "loss", "tokens", "seconds", "step"]]
    for record in ranking[:MAX_ROWS]:
        values = [variable.of(record.settings) for variable in space.variables]
        counts = [f"{record.tokens:,}", f"{record.seconds:,.1f}", f"{record.step:,}"]
        rows.append([str(record.number), *values, loss_of(record), *counts])
    if len(steps) < 2:
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    if len(ranking) > MAX_ROWS:
        lines.append(f"... and {len(ranking) - MAX_ROWS} more in trials.jsonl")
    return "\n".join(lines)


def loss_of(record: TrialRecord) -> str:
    """The loss of a trial as it is shown."""
    if record.status == DIVERGED:
        return "diverged"
    return f"{record.eval_loss:.4f}" if record.eval_loss is not None else "-"


def one_line(space: Space, record: TrialRecord) -> str:
    """A trial that has just ended, in a line."""
    settings = ", ".join(f"{variable.label} {variable.of(record.settings)}" for variable in space.variables)
    return f"trial {record.number}: {settings}: step {record.step:,}, loss {loss_of(record)}"


def effects(space: Space, records: Records) -> list[tuple[Variable, float]]:
    """(variable, nats), the largest first: how far apart the mean losses of the values of a variable lie.

    Least squares of loss = constant + one number for each value of each variable; on a full grid these are the
    differences of the means. The lower, middle and upper third of a range count as its values. Only finished trials
    count; [] where they are too few.
    """
    finished = [record for record in records.latest() if record.status == FINISHED]
    variables, columns = [], [[1.0] * len(finished)]
    for variable in space.variables:
        levels: list = [variable.of(record.settings) for record in finished]
        if variable.is_range:
            levels = [min(int(3 * variable.place(value)), 2) for value in levels]
        others = sorted(set(levels), key=str)[1:]  # the first one is in the constant
        if others:
            variables.append((variable, len(others)))
            columns += [[float(level == other) for level in levels] for other in others]
    if len(finished) <= len(columns):
        return []
    losses = np.array([record.loss for record in finished])
    found = np.linalg.lstsq(np.array(columns).T, losses, rcond=None)[0][1:]
    shares = np.split(found, np.cumsum([count for _, count in variables])[:-1])
    spreads = [float(np.ptp([0.0, *share])) for share in shares]
    return sorted(((variable, nats) for (variable, _), nats in zip(variables, spreads)), key=lambda pair: -pair[1])


def doubts(space: Space, records: Records) -> list[str]:
    """Reasons to doubt that the winner is the best."""
    if (winner := best(records)) is None:
        return []
    found = [_at_the_border(variable, winner) for variable in space.variables]
    return [line for line in (*found, _within_noise(space, records)) if line]


def _at_the_border(variable: Variable, winner: TrialRecord) -> str:
    if not variable.is_number or variable.keys[0] in (*_COSTS, SEED):
        return ""
    if not variable.is_range and len(variable.values) < 3:  # of two, one is always at a border
        return ""
    value, near, margin = variable.of(winner.settings), "at", 1e-9
    if variable.is_range:
        near, margin = "near", _BORDER
    if (where := variable.place(value)) >= 1 - margin:
        side = "largest"
    elif where <= margin and variable.ends[0] != 0:
        side = "smallest"
    else:
        return ""
    return f"the best {variable.label}, {value}, is {near} the {side} tried; widen the range"


def _within_noise(space: Space, records: Records) -> str:
    """A line if seeds were varied and change the loss more than the best two settings differ."""
    others = [variable for variable in space.variables if SEED not in variable.keys]
    if len(others) == len(space.variables) or not others:
        return ""
    groups: dict[str, list[float]] = {}
    for record in records.latest():
        if record.status == FINISHED:
            name = ", ".join(f"{variable.label} {variable.of(record.settings)}" for variable in others)
            groups.setdefault(name, []).append(record.loss)
    several = [losses for losses in groups.values() if len(losses) > 1]
    if not several or len(groups) < 2:
        return ""
    pooled = (sum(statistics.variance(losses) * (len(losses) - 1) for losses in several)
              / sum(len(losses) - 1 for losses in several)) ** 0.5  # fmt: skip
    means = {name: statistics.fmean(losses) for name, losses in groups.items()}
    first, second = sorted(means, key=means.__getitem__)[:2]
    apart = means[second] - means[first]
    if apart >= pooled:
        return ""
    return (
        f"the best two settings ({first}; {second}) differ by {apart:.4f} in their mean loss, and seeds alone by "
        f"{pooled:.4f} (one standard deviation): try more seeds before you choose between them"
    )


def sizes(space: Space, records: Records) -> list[Size]:
    """The best finished trial of each size of model."""
    found: dict[int, Size] = {}
    for record in sorted(records.latest(), key=lambda record: record.loss):
        if record.status == FINISHED:
            count = without_embeddings(space.config(record.settings).model)
            found.setdefault(count, Size(count, record.parameters, record.loss, record.number))
    return sorted(found.values())
