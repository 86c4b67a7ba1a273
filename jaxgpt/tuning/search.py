"""Which trials to run next: grid, random, successive halving, or Optuna's tree-structured Parzen estimator.

What comes next is a function of the request and of the trials recorded so far, and of nothing else. A sweep that was
killed and goes on therefore does what it would have done.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxgpt.config import Config
from jaxgpt.errors import UserError
from jaxgpt.tuning.scaling import check_sizes
from jaxgpt.tuning.space import Point, Space, Variable, corners, draw, grid, read_space
from jaxgpt.tuning.sweep_folder import Records, TrialRecord

ETA = 3  # halving keeps a third; the theory's best is e, and the loss around it is flat (Li et al. 2018, section 2.6)
DEFAULT_TRIALS = {"random": 20, "halving": 27, "tpe": 30}


@dataclasses.dataclass(frozen=True)
class SweepRequest:
    """A sweep as the command line asks for it."""

    file: str
    overrides: dict[str, str]
    """Settings that hold for every trial."""
    vary: Sequence[str]
    """KEY=VALUES, as space.py reads them."""
    method: str | None
    trials: int | None
    seed: int
    workdir: Path
    predict: int | None
    """Parameters without embeddings whose loss is to be predicted."""
    json: Path | None


class Round(NamedTuple):
    """Trials to run now."""

    points: dict[int, Point]
    """{number: settings}"""
    until: int | None
    """The step to run them to; None for their last."""
    alive: frozenset[int]
    """Trials that may go on later."""


@dataclasses.dataclass(frozen=True)
class Search:
    """How a sweep looks for the best settings."""

    method: str
    space: Space
    seed: int
    trials: int
    rungs: tuple[int, ...] = ()
    """Steps at which halving compares, the last step included."""

    def asked(self) -> dict[str, object]:
        """The parts of the request that have to stay the same when the sweep goes on."""
        variables = {variable.name: variable.text for variable in self.space.variables}
        return {"method": self.method, "variables": variables, "seed": self.seed, "trials": self.trials}

    def known_points(self) -> list[Point]:
        """The settings of all trials, to be checked before any runs. The estimator's proposals are not known yet:
        random points stand for them."""
        if self.method == "grid":
            return grid(self.space.variables)
        return [draw(self.space.variables, self.seed, number) for number in range(self.trials)]

    def next_round(self, records: Records) -> Round | None:
        """The trials to run next; None when the sweep is done."""
        if self.method == "halving":
            return self._halving_round(dict(enumerate(self.known_points())), records)
        ended = records.ended()
        if self.method == "tpe":
            number = next((number for number in range(self.trials) if number not in ended), self.trials)
            if number == self.trials:
                return None
            left = {number: propose(self.space.variables, self.seed, [ended[before] for before in range(number)])}
        else:
            left = {number: point for number, point in enumerate(self.known_points()) if number not in ended}
        return Round(left, None, frozenset(left)) if left else None

    def _halving_round(self, points: dict[int, Point], records: Records) -> Round | None:
        """Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization"."""
        alive = list(points)
        for rung in self.rungs:
            reached = [record for number in alive if (record := records.at(number, rung))]
            left = {number: points[number] for number in alive if number not in {record.number for record in reached}}
            if left:
                return Round(left, None if rung == self.rungs[-1] else rung, frozenset(alive))
            alive = best_third(reached)
        return None


def requested_search(config: Config, request: SweepRequest) -> Search:
    """The search that the command line asks for. Raises UserError where a value or a combination of them is wrong."""
    variables = read_space(request.vary, config)
    space = Space(request.file, request.overrides, variables).fixed(config)
    default = "random" if request.trials or any(variable.is_range for variable in variables) else "grid"
    method = request.method or default
    if method == "grid":
        trials = len(grid(variables))
        if request.trials not in (None, trials):
            raise UserError(f"--trials {request.trials}: the grid has {trials} points; leave it out")
    else:
        trials = request.trials or DEFAULT_TRIALS[method]
    if method == "tpe" and importlib.util.find_spec("optuna") is None:
        raise UserError("--method tpe needs Optuna: pip install -e '.[sweep]' (or use --method random)")
    for variable in variables if method == "halving" else ():
        if length := {"train.max_steps", "train.num_train_epochs"} & set(variable.keys):
            raise UserError(
                f"--method halving compares after equal numbers of steps, so {length.pop()} cannot be varied"
            )
    if method == "halving" and config.train.max_steps:
        rungs_of(config, trials)  # if it is not known yet: once the data is there
    search = Search(method, space, request.seed, trials)
    points = search.known_points()
    space.check([*points, *(corners(variables) if method != "grid" else ())])
    if request.predict:
        check_sizes([space.config(point).model for point in points])
    return search


def with_rungs(search: Search, configs: Sequence[Config]) -> Search:
    """The search with its rungs, which depend on the number of steps of the trials' resolved `configs`. Raises
    UserError where halving cannot compare the trials at equal numbers of steps."""
    if search.method != "halving":
        return search
    lengths = sorted({config.max_steps for config in configs})
    if len(lengths) > 1:
        raise UserError(
            f"--method halving compares after equal numbers of steps, but num_train_epochs gives {lengths[0]} to "
            f"{lengths[-1]}; set --train.max_steps"
        )
    return dataclasses.replace(search, rungs=rungs_of(configs[0], search.trials))


def rungs_of(config: Config, trials: int) -> tuple[int, ...]:
    """The steps at which successive halving compares: max_steps, a third of it, a ninth, ..., where evaluations are.
    Raises UserError where no evaluation is early enough."""
    steps, every = config.max_steps, config.eval_steps
    levels = int(math.log(trials, ETA) + 1e-9)
    early = {max(round(steps / ETA**level / every), 1) * every for level in range(1, levels + 1)}
    rungs = sorted(rung for rung in early if rung < steps)
    if levels < 1:
        raise UserError(f"--method halving: {trials} trials are too few to choose among; {ETA} are needed")
    if not rungs:
        raise UserError(
            f"--method halving: there is no evaluation before the last step, {steps}; set --eval.eval_steps to "
            f"{max(steps // ETA**levels, 1)}"
        )
    return (*rungs, steps)


def best_third(reached: Sequence[TrialRecord]) -> list[int]:
    """The numbers of the trials that go on; none that diverged, unless nothing is left."""
    kept = max(len(reached) // ETA, 1)
    ordered = sorted(reached, key=lambda record: (record.loss, record.number))[:kept]
    return sorted(record.number for record in ordered if math.isfinite(record.loss)) or [ordered[0].number]


def propose(variables: Sequence[Variable], seed: int, known: Sequence[TrialRecord]) -> Point:
    """The next point of a tree-structured Parzen estimator (Bergstra et al. 2011) that has seen `known`.

    The study is built anew from the records each time: it costs milliseconds, and there is no database to keep.
    """
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

    distributions: dict[str, BaseDistribution] = {}
    for variable in variables:
        if not variable.is_range:
            distributions[variable.name] = CategoricalDistribution(tuple(range(len(variable.values))))
        elif variable.is_integer:
            distributions[variable.name] = IntDistribution(int(variable.low), int(variable.high), log=variable.is_log)
        else:
            distributions[variable.name] = FloatDistribution(variable.low, variable.high, log=variable.is_log)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + len(known)) % 2**32)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    for record in known:
        params = {variable.name: _param(variable, record.settings) for variable in variables}
        study.add_trial(optuna.trial.create_trial(value=record.loss, params=params, distributions=distributions))
    proposed, point = study.ask(distributions).params, Point()
    for variable in variables:
        value = proposed[variable.name]
        point |= zip(variable.keys, (variable.write(value),) if variable.is_range else variable.values[value])
    return point


def _param(variable: Variable, point: Point) -> float | int:
    """The value of a point as Optuna stores it."""
    value = tuple(point[key] for key in variable.keys)
    if not variable.is_range:
        return variable.values.index(value)
    return int(value[0]) if variable.is_integer else float(value[0])
