"""Runs trials: those that share a program side by side, all of them resumable.

A trial is killed and started again as a run is: `checkpoint.save_steps` says how often the states of the trials in
hand are written, and whoever runs the same trials again goes on from there (states.py).
"""

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.data.dataset import Batch, TokenDataset
from jaxgpt.data.pipeline import eval_rows, read_skip_list, train_rows
from jaxgpt.errors import Interrupted
from jaxgpt.model.sizes import parameter_count
from jaxgpt.parallel.mesh import batch_shards
from jaxgpt.training.signals import EVAL, SAVE, START, STEP, Activity, StopSignal
from jaxgpt.training.step import TrainState
from jaxgpt.training.trials import TrialProgram, build_trial_program, program_key, stack
from jaxgpt.tuning.trial_states import Progress, States

EVAL_AHEAD = 4  # evaluation batches in flight
# Parameters of the trials that one device runs side by side, and how many at most. On 2 CPU cores, milliseconds a step
# of each of 1, 4, 12 trials: 5 thousand parameters 0.38, 0.16, 0.14; 800 thousand 89, 80, 97; seconds of each of 12
# trials of 240 steps, 1, 3, 12 at a time: 110 thousand 6.1, 4.3, 4.1. Not measured on accelerators, where small
# matrices leave far more idle.
TOGETHER = {"cpu": 1_500_000}
TOGETHER_ON_ACCELERATORS = 20_000_000
MOST_TOGETHER = 16


class Trial(NamedTuple):
    number: int
    config: Config
    """Resolved: batch, block size and number of steps are numbers."""


@dataclasses.dataclass(frozen=True)
class Result:
    number: int
    step: int
    """Steps done."""
    status: str
    """finished; paused, at fewer steps than it is to have; or diverged, by the rule of faults.on_bad_step."""
    eval_loss: float | None
    """Of the last evaluation, nats per token; None for a trial that has diverged."""
    losses: list[list[float]]
    """[step, mean training loss since the point before]."""
    eval_losses: list[list[float]]
    """[step, loss]."""
    parameters: int
    tokens: int
    seconds: float
    """Its share of the wall time of those that ran beside it."""


class Runner:
    """Trains trials on the devices of `mesh`, up to `side_by_side` of them in one program."""

    def __init__(
        self,
        workdir: Path,
        dataset: TokenDataset,
        mesh: Mesh,
        side_by_side: int,
        weights: dict | None = None,
        say: Callable[[str], None] = print,
    ):
        """`weights`: parameters on the host that all trials start from; None for fresh ones by their seed."""
        self._dataset, self._mesh, self._weights, self._say = dataset, mesh, weights, say
        self._side_by_side = side_by_side
        self._programs: dict[tuple[Config, int], TrialProgram] = {}
        self._states = States(workdir / "states")

    @property
    def programs(self) -> int:
        """Programs built so far: each is compiled once."""
        return len(self._programs)

    def forget(self, number: int) -> None:
        """Delete the state of a trial that will not go on."""
        self._states.forget([number])

    def run(self, trials: Sequence[Trial], until: int | None = None) -> Iterator[Result]:
        """Train each to `until` steps, or to its end, and yield how it stands then.

        Raises:
            Interrupted: SIGTERM or Ctrl-C arrived; the states of the trials in hand were saved.
        """
        started = self._states.steps()
        activity = Activity()
        with StopSignal(activity) as stop:
            # Those that share a program and a step go together, in the order they were given in.
            group = lambda trial: (program_key(trial.config), started.get(trial.number, 0))
            groups: dict[object, list[Trial]] = {}
            for trial in trials:
                groups.setdefault(group(trial), []).append(trial)
            for (key, _), members in groups.items():
                count = self._count(key, len(members))
                for first in range(0, len(members), count):
                    activity.is_at(START, 0)
                    chunk = _Chunk(self, members[first : first + count], self._program(key, count), count)
                    yield from chunk.train(until, stop, activity)
                    activity.is_at(START, 0)

    def _count(self, key: Config, trials: int) -> int:
        """How many at once: as even as `side_by_side` lets them be, or a program that is there, if half full."""
        for known, count in self._programs:
            if known == key and count / 2 <= trials:
                return count
        count = -(-trials // -(-trials // self._side_by_side))
        devices = self._mesh.size
        return count if count == 1 else -(-count // devices) * devices

    def _program(self, key: Config, count: int) -> TrialProgram:
        if (key, count) not in self._programs:
            program = build_trial_program(key, self._dataset.vocab_size, self._mesh, count)
            self._programs[key, count] = program
        return self._programs[key, count]


def side_by_side(config: Config, vocab_size: int, mesh: Mesh, trials: int) -> int:
    """How many trials like `config` to run at once: as many as gain by it. A split model takes the mesh alone."""
    if config.mesh.fsdp * config.mesh.tensor > 1:
        return 1
    budget = TOGETHER.get(mesh.devices.flat[0].platform, TOGETHER_ON_ACCELERATORS)
    on_a_device = min(budget // parameter_count(config.model, vocab_size), MOST_TOGETHER)
    return max(min(on_a_device * mesh.size, trials), 1)


class _Chunk:
    """Trials that run side by side, from where they stand."""

    def __init__(self, runner: Runner, trials: list[Trial], program: TrialProgram, count: int):
        self._runner, self._trials, self._program = runner, trials, program
        self._numbers = [trial.number for trial in trials]
        # What fills up is a copy of the last trial, and nobody reads its results.
        self._configs = [trial.config for trial in trials] + [trials[-1].config] * (count - len(trials))
        self._config = trials[0].config
        self._given = stack(self._configs)
        self._seeds = _distinct([config.train.seed for config in self._configs])
        self._dataset = runner._dataset
        self._losses = Losses(self._config, len(trials))

    def train(self, until: int | None, stop: StopSignal, activity: Activity) -> Iterator[Result]:
        config, began = self._config, time.monotonic()
        end = min(until or config.train.max_steps, config.train.max_steps)
        states, progress = self._start()
        batches = self._batches(progress.step, end)
        pending = None
        for step in range(progress.step + 1, end + 1):
            states, metrics = self._program.train_step(self._given, states, next(batches))
            if pending:
                self._losses.read(*pending, progress)  # while the devices work on this step
            pending = (step, metrics)
            activity.is_at(STEP, step)
            last = step == end
            if step % config.eval.eval_steps == 0 or last:
                self._losses.read(*pending, progress)
                pending = None
                activity.is_at(EVAL, step)
                stop.is_heard()  # it takes as long as it takes
                self._evaluate(states.params, step, progress)
                stop.is_saved()
                last = last or all(progress.diverged)
            if stop.requested or last or step % config.checkpoint.save_steps == 0:
                if pending:
                    self._losses.read(*pending, progress)
                    pending = None
                activity.is_at(SAVE, step)
                stop.is_heard()
                progress.step = step
                progress.seconds += (time.monotonic() - began) / len(self._trials)
                began = time.monotonic()
                if stop.requested or step < config.train.max_steps:
                    self._runner._states.save(self._numbers, states, progress)
                stop.is_saved()
            if stop.requested and not last:
                raise Interrupted(f"{stop.requested}; the trials are saved, run the same command again to go on")
            if last:
                break
        batches.close()
        yield from self._results(progress)

    def _start(self) -> tuple[TrainState, Progress]:
        stored = self._runner._states.restore(self._numbers, self._program.abstract_state)
        if stored:
            self._losses.resume(stored[1])
            return stored
        weights = self._runner._weights
        states = self._program.init(self._given) if weights is None else self._program.fresh_optimizer(weights)
        return states, Progress.of(len(self._trials))

    def _results(self, progress: Progress) -> Iterator[Result]:
        config, diverged = self._config, progress.diverged
        finished = progress.step == config.train.max_steps
        for place, trial in enumerate(self._trials):
            curve = progress.eval_losses[place]
            yield Result(
                number=trial.number,
                step=progress.step,
                status="diverged" if diverged[place] else "finished" if finished else "paused",
                eval_loss=None if diverged[place] else curve[-1][1],
                losses=progress.losses[place],
                eval_losses=curve,
                parameters=parameter_count(config.model, self._dataset.vocab_size),
                tokens=progress.step * config.train.global_batch_size * config.block_size,
                seconds=round(progress.seconds, 3),
            )
        if finished or all(diverged):  # whoever asked has recorded the results by now
            self._runner._states.forget(self._numbers)

    def _batches(self, start: int, end: int) -> Iterator[Batch]:
        """The batches of the steps after `start`, read ahead by threads: (S, A, B, T) on the devices."""
        config = self._config
        accumulation, rows = config.train.gradient_accumulation_steps, config.train.global_batch_size
        sharding = self._program.batch_sharding(len(self._seeds))
        skip = read_skip_list(config.data.skip_list)

        def read(step: int) -> Batch:
            parts = [
                train_rows(
                    self._dataset.train,
                    seed=seed,
                    step=step,
                    global_batch_size=rows,
                    block_size=config.block_size,
                    rows=range(rows),
                    skip=skip,
                )
                for seed in self._seeds
            ]
            shape = (len(parts), accumulation, rows // accumulation, config.block_size)
            return jax.tree.map(lambda *x: np.stack(x).reshape(shape), *parts)

        with ThreadPoolExecutor(config.data.num_threads) as pool:
            ahead: collections.deque[Future] = collections.deque()
            steps = iter(range(start, end))
            for step in itertools.islice(steps, config.data.prefetch_batches):
                ahead.append(pool.submit(read, step))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(read, step) for step in itertools.islice(steps, 1))
                yield jax.device_put(batch, sharding)

    def _evaluate(self, params: dict, step: int, progress: Progress) -> None:
        losses = evaluate(self._config, self._dataset, self._runner._mesh, self._program, params)
        for place, curve in enumerate(progress.eval_losses):
            progress.diverged[place] |= not math.isfinite(losses[place])
            if not progress.diverged[place]:
                curve.append([step, float(losses[place])])


def evaluate(config: Config, dataset: TokenDataset, mesh: Mesh, program: TrialProgram, params: dict) -> np.ndarray:
    """The mean validation loss of each trial, nats per token, [K] in float64."""
    rows = (config.eval.per_device_eval_batch_size or config.train.per_device_train_batch_size) * batch_shards(mesh)
    batches = -(-dataset.validation.rows_to_evaluate(config.block_size) // rows)
    sums = []
    for number in range(min(batches, config.eval.eval_batches or batches)):
        batch = eval_rows(
            dataset.validation, step=number, global_batch_size=rows, block_size=config.block_size, rows=range(rows)
        )
        sums.append(program.eval_step(params, jax.device_put(batch, program.eval_sharding)))
        if len(sums) > EVAL_AHEAD:
            jax.block_until_ready(sums[-EVAL_AHEAD])
    totals, counts = (np.sum(np.asarray(part, np.float64), axis=0) for part in zip(*jax.device_get(sums)))
    return totals / np.maximum(counts, 1.0)


class Losses:
    """Reads the metrics of steps: the curve of each trial, and which of them have diverged."""

    def __init__(self, config: Config, trials: int):
        self._config = config
        self._sums, self._counts = np.zeros((2, trials))
        self._bad = np.zeros(trials, int)

    def resume(self, progress: Progress) -> None:
        """Go on with the points of a curve that were begun before."""
        self._sums, self._counts, self._bad = (np.array(part) for part in progress.since)

    def read(self, step: int, metrics: dict, progress: Progress) -> None:
        values = {name: np.asarray(metrics[name])[: len(self._bad)] for name in ("loss_sum", "count", "bad_step")}
        bad, faults = values["bad_step"].astype(bool), self._config.faults
        self._sums += np.where(bad, 0.0, values["loss_sum"])
        self._counts += np.where(bad, 0.0, values["count"])
        self._bad = np.where(bad, self._bad + 1, 0)
        limit = 1 if faults.on_bad_step == "stop" else faults.max_bad_steps
        for place in np.flatnonzero(self._bad >= limit):
            progress.diverged[place] = True
        if step % self._config.log.logging_steps == 0 or step == self._config.train.max_steps:
            for place, curve in enumerate(progress.losses):
                if self._counts[place] and not progress.diverged[place]:
                    curve.append([step, float(self._sums[place] / self._counts[place])])
            self._sums[:] = self._counts[:] = 0.0
        progress.since = [self._sums.tolist(), self._counts.tolist(), self._bad.tolist()]


def _distinct(seeds: list[int]) -> list[int]:
    """One seed if all are equal, so that their batch is read and sent once; else that of each trial."""
    return seeds[:1] if len(set(seeds)) == 1 else seeds
