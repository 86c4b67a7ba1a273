"""Runs a sweep: one trial after another, each by the ordinary training loop in a run folder of its own.

    WORKDIR/trials/NUMBER/  config.json  checkpoints/  metrics.jsonl

A trial that was killed, or paused at a rung of successive halving, goes on from its latest checkpoint. A trial that
will not go on is recorded in trials.jsonl and its folder deleted.
"""

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from jaxgpt.config import Config, to_json, with_settings
from jaxgpt.data.dataset import TokenDataset, open_dataset
from jaxgpt.data.pipeline import read_skip_list
from jaxgpt.errors import Interrupted, UserError
from jaxgpt.model.huggingface import locate
from jaxgpt.model.sizes import parameter_count
from jaxgpt.parallel import distributed, sharding
from jaxgpt.parallel.accelerator import refuse_silent_cpu
from jaxgpt.parallel.compiler import compiler_options, initial_values_options, use_compilation_cache
from jaxgpt.parallel.mesh import batch_shards, build_mesh
from jaxgpt.preparation.make_dataset import given_tokenizer, prepare
from jaxgpt.storage.files import write_file
from jaxgpt.storage.lease import Lease
from jaxgpt.training import resume
from jaxgpt.training.bad_steps import BadStep
from jaxgpt.training.checkpoint import Checkpoints
from jaxgpt.training.loop import fit
from jaxgpt.training.metrics import MetricLog, read_metrics
from jaxgpt.training.optimizer import Arguments, arguments
from jaxgpt.training.run_state import Run, position
from jaxgpt.training.signals import SAVE, START, Activity, StopSignal
from jaxgpt.training.step import Program, build_functions, build_program, lay_out, resolve_batch, resolve_steps
from jaxgpt.tuning import sweep_folder, sweep_table
from jaxgpt.tuning.search import Search, SweepRequest, requested_search, with_rungs
from jaxgpt.tuning.space import Point
from jaxgpt.tuning.sweep_folder import DIVERGED, FINISHED, PAUSED, Records, TrialRecord
from jaxgpt.tuning.sweep_table import PageWriter, conclude, describe


def program_key(config: Config) -> Config:
    """`config` without the values of `Arguments`, and dropout as above 0 or not (without it no masks are drawn)."""
    default = Config().optimizer
    values = {f"optimizer_{name}": getattr(default, name) for name in Arguments._fields if hasattr(default, name)}
    values["optimizer_warmup_steps"] = 0  # whatever else is set, a config without a warm-up is valid
    return with_settings(config, train_seed=0, model_dropout=0.5 if config.model.dropout else 0.0, **values)


class SharedProgram:
    """The compiled functions of all trials that differ in `Arguments` alone."""

    def __init__(self, config: Config, vocab_size: int, mesh: Mesh):
        """`config` is resolved. Compiles nothing yet."""
        key, devices = program_key(config), list(mesh.devices.flat)
        functions = build_functions(key, vocab_size, mesh)
        states, self._everywhere = functions.state_shardings, sharding.replicated(mesh)
        self._program = build_program(key, vocab_size, mesh)
        self.init = jax.jit(functions.init, out_shardings=states, compiler_options=initial_values_options(devices))
        """(arguments) -> a fresh state."""
        self.train_step = jax.jit(
            functions.train_step,
            in_shardings=(self._everywhere, states, sharding.micro_batches_sharding(mesh)),
            out_shardings=(states, self._everywhere),
            donate_argnums=1,
            compiler_options=compiler_options(devices),
        )
        """(arguments, state, batch of (A, B, T)) -> (state, metrics); the given state's memory is reused."""

    def bind(self, given: Arguments) -> Program:
        """The program of the training with these arguments."""
        given = jax.device_put(given, self._everywhere)
        return dataclasses.replace(
            self._program,
            init=functools.partial(self.init, given),
            train_step=functools.partial(self.train_step, given),
        )


@dataclasses.dataclass(frozen=True)
class Bench:
    """Devices, data and initial weights: the same for all trials."""

    mesh: Mesh
    dataset: TokenDataset
    weights: resume.Weights | None
    """The weights that every trial starts from; None for fresh ones by its seed."""

    def resolved(self, config: Config) -> Config:
        """`config` with batch, block size and number of steps as numbers."""
        config = self.dataset.fit(config)
        windows = self.dataset.train.rows_per_epoch(config.block_size)
        return resolve_steps(resolve_batch(config, batch_shards(self.mesh)), windows)


def prepare_bench(config: Config, trials: Sequence[Config]) -> Bench:
    """Set up devices, data and weights. Raises UserError, as `train`, where they do not suit one of the `trials`."""
    if distributed.place_in(os.environ, config.mesh.distributed) is not None:
        raise UserError("sweep runs in one process; start it on one host, or set --mesh.distributed off")
    weights = [resume.weights_to_start_from(trial, None) for trial in _one_of_each(trials, "model")][0]
    tokenizer = given_tokenizer(config, locate)
    resume.check_tokenizer(weights, tokenizer)
    refuse_silent_cpu()
    mesh = build_mesh(config.mesh)
    use_compilation_cache(config.train.compilation_cache_dir)
    for trial in _one_of_each(trials, "train"):
        resolve_batch(trial, batch_shards(mesh))
    dataset = open_dataset(prepare(config, tokenizer), verify=config.data.verify)
    dataset = resume.check_data(Path(), None, weights, dataset)
    for trial in _one_of_each(trials, "model"):
        lay_out(trial, dataset.vocab_size, mesh)
    return Bench(mesh, dataset, weights)


def _one_of_each(trials: Sequence[Config], section: str) -> list[Config]:
    """The first of all trials that are alike in a section."""
    return list({getattr(trial, section): trial for trial in reversed(trials)}.values())


class Trial(NamedTuple):
    number: int
    settings: Point
    config: Config
    """Resolved: batch, block size and number of steps are numbers."""


class TrialRunner:
    """Trains trials one after another; those with equal `program_key`s share a program."""

    def __init__(self, workdir: Path, bench: Bench):
        self._folder, self._bench = workdir / "trials", bench
        self._programs: dict[Config, SharedProgram] = {}

    def run(self, trials: Sequence[Trial], until: int | None = None) -> Iterator[TrialRecord]:
        """Train each to `until` steps, or to its last, and yield how it stands then.

        The folder of a trial that will not go on is deleted when the next record is asked for. SIGTERM or Ctrl-C saves
        the state of the trial in hand and raises Interrupted.
        """
        activity = Activity()
        with StopSignal(activity) as stop:
            for trial in trials:
                activity.is_at(START, 0)
                record = self._train(trial, until, stop, activity)
                yield record
                if record.status != PAUSED:
                    self.forget(trial.number)
                if stop.requested:
                    raise Interrupted(f"{stop.requested}; run the same command again to go on")

    def forget(self, number: int) -> None:
        shutil.rmtree(self._folder / str(number), ignore_errors=True)

    def _train(self, trial: Trial, until: int | None, stop: StopSignal, activity: Activity) -> TrialRecord:
        workdir, bench, began = self._folder / str(trial.number), self._bench, time.monotonic()
        workdir.mkdir(parents=True, exist_ok=True)
        write_file(workdir / "config.json", to_json(trial.config))
        config = _config_of_loop(trial.config, until)
        step = resume.take_up(workdir, trial.config)
        program = self._program(trial.config)
        checkpoints = Checkpoints(workdir, config.checkpoint)
        start, diverged = position(checkpoints, step), False
        try:
            state = resume.initial_state(program, checkpoints, step, bench.weights, bench.dataset.vocab_size)
            with MetricLog(workdir, config.log, config.max_steps, start.step, is_writer=True, quiet=True) as log:
                before = sum(line.get("seconds_total", 0.0) for line in read_metrics(workdir))
                run = Run(
                    config, workdir, bench.mesh, bench.dataset, program, checkpoints, log,
                    sample=None, stop=stop, activity=activity, skip=read_skip_list(config.data.skip_list),
                )  # fmt: skip
                fit(run, state, start)
        except BadStep:
            diverged = True
        finally:
            activity.is_at(SAVE, activity.now[1])
            stop.is_heard()
            checkpoints.close()
        step = activity.now[1] if diverged else config.max_steps
        return self._record(trial, step, diverged, before + time.monotonic() - began)

    def _record(self, trial: Trial, step: int, diverged: bool, seconds: float) -> TrialRecord:
        lines, config = read_metrics(self._folder / str(trial.number)), trial.config
        curve = lambda key: [[line["step"], line[key]] for line in lines if line.get(key) is not None]
        last = [line["eval_loss"] for line in lines if "eval_loss" in line][-1:]
        diverged |= last == [None]  # it was not finite
        return TrialRecord(
            number=trial.number,
            settings=trial.settings,
            step=step,
            status=DIVERGED if diverged else FINISHED if step == config.max_steps else PAUSED,
            eval_loss=None if diverged else last[0],
            losses=curve("loss"),
            eval_losses=curve("eval_loss"),
            parameters=parameter_count(config.model, self._bench.dataset.vocab_size),
            tokens=step * config.global_batch_size * config.block_size,
            seconds=round(seconds, 3),
        )

    def _program(self, config: Config) -> Program:
        key = program_key(config)
        if key not in self._programs:
            self._programs[key] = SharedProgram(config, self._bench.dataset.vocab_size, self._bench.mesh)
        return self._programs[key].bind(arguments(config))


def _config_of_loop(config: Config, until: int | None) -> Config:
    """The config of a trial's loop: it ends at `until`, keeps the last state, and does not stop early.

    The schedule belongs to the program, which knows the whole trial's length; a warm-up could exceed `until`.
    """
    return with_settings(
        config,
        train_max_steps=until or config.max_steps,
        optimizer_warmup_steps=0,
        checkpoint_save_total_limit=1,
        checkpoint_keep_best=False,
        eval_early_stopping_patience=None,
        log_tensorboard=False,
        log_wandb_project=None,
        log_profile="",
    )


def sweep(config: Config, request: SweepRequest, write_page: PageWriter) -> None:
    """Run the trials that are not recorded yet, print what all of them show, and write best.toml and the page.

    Raises:
        UserError: the input is wrong; found before anything is written.
        Interrupted: SIGTERM or Ctrl-C arrived; what was recorded stays.
    """
    # 1. What can be wrong with the input, and what an earlier start of this sweep has left.
    search, folder = requested_search(config, request), request.workdir
    if before := sweep_folder.earlier(folder):
        sweep_folder.check_same(folder, before, search.asked(), config)
        search = dataclasses.replace(search, rungs=tuple(before["rungs"]))
        if search.next_round(records := Records(folder)) is None:
            print(f"sweep    {folder}: all {len(records.latest())} trials are done; their results:", flush=True)
            return conclude(search, records, request, write_page)

    # 2. Devices and data, as for `train`; with them, what the config leaves open.
    known = [search.space.config(point) for point in search.known_points()]
    bench = prepare_bench(config, known)
    if not before:
        search = with_rungs(search, [bench.resolved(trial) for trial in known])

    # 3. The trials.
    folder.mkdir(parents=True, exist_ok=True)
    with Lease(folder):
        sweep_folder.start(folder, search.asked() | {"rungs": search.rungs}, config)
        records = Records(folder)
        describe(search, bench.resolved(known[0]), records, folder)
        try:
            _run_rounds(search, records, bench, TrialRunner(folder, bench))
        except Interrupted:
            if records.latest():
                conclude(search, records, request, write_page)
            raise
        conclude(search, records, request, write_page)


def _run_rounds(search: Search, records: Records, bench: Bench, runner: TrialRunner) -> None:
    """Run what is left, recording each trial as it ends."""
    with tqdm(total=search.trials, initial=len(records.ended()), desc="trials", unit="trial", disable=None) as bar:
        while (now := search.next_round(records)) is not None:
            for record in records.latest():
                if record.number not in now.alive:
                    runner.forget(record.number)
            configs = {number: bench.resolved(search.space.config(point)) for number, point in now.points.items()}
            trials = [Trial(number, now.points[number], config) for number, config in configs.items()]
            for record in runner.run(trials, now.until):
                records.add(record)
                bar.update(len(records.ended()) - bar.n)
                best = sweep_table.best(records)
                bar.set_postfix_str(f"best {best.loss:.4f}" if best else "")
                if bar.disable:
                    print(sweep_table.one_line(search.space, record), flush=True)
    for record in records.latest():
        runner.forget(record.number)
