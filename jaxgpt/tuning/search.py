"""Which trials to run next: grid, random, successive halving, or Optuna's tree-structured Parzen estimator.

The idea: what comes next is a function of what was asked and of the trials recorded so far, and of nothing else. A
sweep that goes on after it was killed therefore does what it would have done.
"""

import dataclasses
import importlib.util
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from jaxgpt.config import Config
from jaxgpt.errors import UserError
from jaxgpt.tuning.space import Point, Space, Variable, draw, grid
from jaxgpt.tuning.sweep_folder import Record, Records

METHODS = ("grid", "random", "halving", "tpe")
ETA = 3  # halving keeps a third; the theory's best is e, and the loss around it is flat (Li et al. 2018, section 2.6)
DEFAULT_TRIALS = {"random": 20, "halving": 27, "tpe": 30}


class Round(NamedTuple):
    """Trials to run now."""

    points: dict[int, Point]
    """{number: settings}"""
    until: int | None
    """The step to run them to; None for their last."""
    alive: frozenset[int]
    """Trials whose state may be wanted again."""


@dataclasses.dataclass(frozen=True)
class Search:
    """How a sweep looks for the best settings."""

    method: str
    space: Space
    seed: int
    trials: int
    together: int
    """Trials that the estimator proposes at once, before it learns how they went."""
    rungs: tuple[int, ...] = ()
    """Steps at which halving compares, the last step included."""

    def known_points(self) -> list[Point]:
        """The settings of all trials, for checking them before any runs; for the estimator, whose proposals are not
        known yet, random ones in their place."""
        if self.method == "grid":
            return grid(self.space.variables)
        return [draw(self.space.variables, self.seed, number) for number in range(self.trials)]

    def next_round(self, records: Records) -> Round | None:
        """The trials to run next; None when the sweep is done."""
        if self.method == "tpe":
            return self._estimated_round(records)
        points = dict(enumerate(self.known_points()))
        if self.method == "halving":
            return self._halving_round(points, records)
        ended = records.ended()
        left = {number: point for number, point in points.items() if number not in ended}
        return Round(left, None, frozenset(left)) if left else None

    # ------------------------------------------------------------ successive halving

    def _halving_round(self, points: dict[int, Point], records: Records) -> Round | None:
        """Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization"."""
        alive = list(points)
        for rung in self.rungs:
            found = {number: records.at(number, rung) for number in alive}
            left = {number: points[number] for number in alive if found[number] is None}
            if left:
                return Round(left, None if rung == self.rungs[-1] else rung, frozenset(alive))
            alive = best_third(list(found.values()))
        return None

    # ------------------------------------------------------------ Optuna

    def _estimated_round(self, records: Records) -> Round | None:
        """Proposals come in blocks of `together`; a block follows from the trials of the blocks before it."""
        ended = records.ended()
        number = next((number for number in range(self.trials) if number not in ended), None)
        if number is None:
            return None
        first = number - number % self.together
        known = [ended[before] for before in range(first)]
        numbers = range(first, min(first + self.together, self.trials))
        points = dict(zip(numbers, propose(self.space.variables, self.seed, known, len(numbers))))
        left = {number: point for number, point in points.items() if number not in ended}
        return Round(left, None, frozenset(left))


def rungs_of(config: Config, trials: int) -> tuple[int, ...]:
    """The steps at which successive halving compares: max_steps, a third of it, a ninth, ..., where evaluations are.

    Raises:
        UserError: there is no evaluation early enough.
    """
    steps, every = config.train.max_steps, config.eval.eval_steps
    levels = int(math.log(trials, ETA) + 1e-9)
    rungs = {max(round(steps / ETA**level / every), 1) * every for level in range(1, levels + 1)}
    rungs = sorted(rung for rung in rungs if rung < steps)
    if levels < 1:
        raise UserError(f"--method halving: {trials} trials are too few to choose among; {ETA} are needed")
    if not rungs:
        raise UserError(
            f"--method halving: there is no evaluation before the last step, {steps}; set --eval.eval_steps to "
            f"{max(steps // ETA**levels, 1)}"
        )
    return (*rungs, steps)


def kept_of(count: int) -> int:
    """Trials that go on after a rung that `count` have reached."""
    return max(count // ETA, 1)


def best_third(reached: Sequence[Record]) -> list[int]:
    """The numbers of the trials that go on; none that diverged, unless nothing is left."""
    ordered = sorted(reached, key=lambda record: (record.loss, record.number))[: kept_of(len(reached))]
    return sorted(record.number for record in ordered if math.isfinite(record.loss)) or [ordered[0].number]


def check_estimator() -> None:
    """
    Raises:
        UserError: Optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError("--method tpe needs Optuna: pip install -e '.[sweep]' (or use --method random)")


def propose(variables: Sequence[Variable], seed: int, known: Sequence[Record], count: int) -> list[Point]:
    """The next `count` points of a tree-structured Parzen estimator (Bergstra et al. 2011) that has seen `known`.

    The study is built anew from the records each time: it costs milliseconds, and there is no database to keep.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # constant_liar, before Optuna 5
        sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + len(known)) % 2**32, constant_liar=True)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    distributions = {variable.name: _distribution(variable) for variable in variables}
    for record in known:
        params = {variable.name: _param(variable, record.settings) for variable in variables}
        study.add_trial(optuna.trial.create_trial(value=record.loss, params=params, distributions=distributions))
    asked = [study.ask(distributions).params for _ in range(count)]
    return [
        {key: text for variable in variables for key, text in zip(variable.keys, _value(variable, params))}
        for params in asked
    ]


def _distribution(variable: Variable):
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not variable.is_range:
        return CategoricalDistribution(tuple(range(len(variable.values))))
    if variable.is_integer:
        return IntDistribution(int(variable.low), int(variable.high), log=variable.is_log)
    return FloatDistribution(variable.low, variable.high, log=variable.is_log)


def _param(variable: Variable, point: Point) -> float | int:
    """What Optuna calls the value of a point."""
    value = tuple(point[key] for key in variable.keys)
    if not variable.is_range:
        return variable.values.index(value)
    return int(value[0]) if variable.is_integer else float(value[0])


def _value(variable: Variable, params: dict) -> tuple[str, ...]:
    proposed = params[variable.name]
    return (variable.write(proposed),) if variable.is_range else variable.values[proposed]
