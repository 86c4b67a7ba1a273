"""The one training loop: dispatch step n, then read the metrics of step n - 1, so the device never waits for us."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Generator, Iterator

import jax

from jaxgpt.data.dataset import Batch, TokenDataset
from jaxgpt.data.pipeline import eval_batches, train_batches
from jaxgpt.errors import Interrupted, StorageFailed
from jaxgpt.failpoints import failpoint
from jaxgpt.model.sizes import flops_per_token
from jaxgpt.parallel import sharding
from jaxgpt.parallel.distributed import StopVote, is_alone, is_writer
from jaxgpt.parallel.mesh import batch_shards
from jaxgpt.training.bad_steps import BadStep, BadSteps, all_finite
from jaxgpt.training.checkpoint import CONFIG, STORAGE_ERRORS
from jaxgpt.training.metrics import TimeSplit, peak_flops
from jaxgpt.training.models import write_settings
from jaxgpt.training.recovery import record_fault
from jaxgpt.training.resume import newest_step
from jaxgpt.training.run_state import EvaluationHistory, GoOn, Position, Run, position
from jaxgpt.training.signals import DATA, EVAL, SAVE, START, STEP
from jaxgpt.training.step import TrainState
from jaxgpt.training.trackers import StepTrace

EVAL_AHEAD = 4  # evaluation batches in flight: enough to keep the devices busy, few enough to stop at once


class RolledBack(Exception):
    """The step, its argument, was bad: the run goes on from its last checkpoint, with other data."""


def fit(run: Run, state: TrainState, start: Position) -> tuple[TrainState, str]:
    """Train from `start` to max_steps: metrics, evaluations, samples and checkpoints on their schedules.

    Returns:
        The last state, and why it came before max_steps; "" where it did not.

    Raises:
        BadStep: a loss or gradient that ends the run by faults.on_bad_step; nothing after it was saved.
        Interrupted: SIGTERM or Ctrl-C arrived; the state after the current step was saved.
        StorageFailed: a checkpoint could not be written.
        FolderLost: another process has taken the run folder.
    """
    bad_steps = BadSteps(run.config.faults, start.bad_steps)
    while True:
        try:
            return _Loop(run, state, start, bad_steps).train()
        except RolledBack as back:
            bad_step = back.args[0]
        del state  # its memory, free once the exception is gone, is needed for the restored one
        step = newest_step(run.workdir)
        assert step is not None, "a rollback needs a checkpoint"
        offset = start.data_offset + bad_step - step
        start = dataclasses.replace(position(run.checkpoints, step), data_offset=offset, bad_steps=0, evaluated=True)
        run.log.rewind(step)
        state = run.checkpoints.restore(step, run.program.abstract_state)


class _StopEvaluating(Exception):
    """A stop signal came in the middle of an evaluation."""


class _Loop:
    """From one start to the end of the run, or to the next rollback."""

    def __init__(self, run: Run, state: TrainState, start: Position, bad_steps: BadSteps):
        self._run = run
        self._state = state
        self._start = start
        self._bad_steps = bad_steps
        self._split = run.split
        self._vote = StopVote()
        self._history = EvaluationHistory(run.config, start)
        self._meter = Meter(run, self._split, bad_steps, self._history)
        self._pending: tuple[int, dict] | None = None  # the step that was dispatched and not read yet
        self._saved = start.step
        run.stop.kept = lambda: run.checkpoints.on_disk

    def train(self) -> tuple[TrainState, str]:
        run, config, last_step = self._run, self._run.config, self._run.config.max_steps
        if not self._start.evaluated:
            self._evaluate_late()
        if early := self._history.reason(self._start.step):
            return self._state, early
        with (
            contextlib.closing(training_batches(run, self._start)) as batches,
            StepTrace(config.log.profile, run.workdir, self._start.step) as trace,
        ):
            for step in range(self._start.step + 1, last_step + 1):
                batch = self._wait_for_data(batches, step)
                stop = self._dispatch(step, batch, trace)
                evaluate_now = self._is_evaluated_at(step)
                save_now = step % config.save_steps == 0 or step == last_step or run.checkpoints.poll()
                if not (evaluate_now or save_now or stop):
                    continue
                self._read_pending()  # before anything is saved, so that no damaged state ever is
                eval_loss = None
                if evaluate_now and not stop:
                    eval_loss, stop = self._evaluate(step)
                evaluated = not evaluate_now or eval_loss is not None
                early = self._history.reason(step)
                ended = bool(early) or (step == last_step and evaluated)
                if save_now or stop or ended:
                    self._save(step, eval_loss, evaluated=evaluated, surely=stop or ended)
                if ended and not stop:
                    break
                if stop:
                    raise self._interrupted(step)
        return self._state, early

    def _wait_for_data(self, batches: Iterator[Batch], step: int) -> Batch:
        first = step == self._start.step + 1
        self._run.activity.is_at(START if first else DATA, step)
        try:
            with self._split("data"):
                batch = next(batches)
        except (Interrupted, *STORAGE_ERRORS) as error:
            if first or not self._cannot_read(error):
                raise
            self._run.activity.is_at(SAVE, step - 1)  # no longer waiting for data: not to be interrupted again
            self._read_pending()
            if self._saved != step - 1:
                self._save(step - 1, None, evaluated=True, surely=True)
            self._run.checkpoints.wait()
            if isinstance(error, Interrupted):
                raise self._interrupted(step - 1) from None
            raise self._data_lost(step - 1, error) from None
        if not first:
            self._run.activity.is_at(STEP, step)
        return batch

    def _dispatch(self, step: int, batch: Batch, trace: StepTrace) -> bool:
        """Start `step` and read the one before it. Returns whether all processes are to stop."""
        if self._run.lease:
            self._run.lease.check()
        if trace.starts(step) or self._is_line_due():
            self._read_pending()
        if trace.starts(step):
            trace.start()
        with self._split("step"), jax.profiler.StepTraceAnnotation("train", step_num=step):
            self._state, metrics = self._run.program.train_step(self._state, batch)
            stop = self._vote.poll(self._run.stop.requested is not None)
            if self._pending:
                self._meter.read(*self._pending)  # waits for step n - 1 while the device works on step n
        self._pending = (step, metrics)
        if step == self._start.step + 1:
            self._meter.skip_compilation(metrics)
            self._run.activity.is_at(STEP, step)
        if trace.ends(step):
            self._read_pending()
            with self._run.stop.saved_by(functools.partial(self._save_stopped, step)):
                self._run.log.say(trace.stop())
        self._run.log.advance(step)
        return stop

    def _is_line_due(self) -> bool:
        """Is the last step done, and a line of metrics to be written for it?

        Some devices compute a step while it is dispatched, as CPUs may. The next one must not count in that line. With
        several processes all read at the same place, so none may go ahead.
        """
        if not self._pending or jax.process_count() > 1:
            return False
        step, metrics = self._pending
        return self._meter.writes(step) and metrics["loss_sum"].is_ready()

    def _read_pending(self) -> None:
        """Wait for the step that was dispatched and not read yet, if there is one: nothing is pending after it."""
        if self._pending:
            with self._split("step"):
                self._meter.read(*self._pending)
            self._pending = None

    def _evaluate(self, step: int) -> tuple[float | None, bool]:
        """(validation loss, whether to stop); the loss is None where a stop signal cut the evaluation off."""
        run = self._run

        def go_on() -> None:
            run.activity.is_at(EVAL, step)
            if self._vote.poll(run.stop.requested is not None):
                raise _StopEvaluating

        with self._split("eval"), run.stop.saved_by(functools.partial(self._save_stopped, step)):
            try:
                values: dict[str, str | float] = {**evaluate(run, self._state.params, go_on)}
                if run.score:
                    values |= run.score(self._state.params, go_on)
                if run.sample:
                    go_on()
                    values |= run.sample(self._state.params)
            except _StopEvaluating:
                return None, True
            except STORAGE_ERRORS as error:
                if not self._cannot_read(error):
                    raise
                self._save_stopped(step)
                raise self._data_lost(step, error) from None
        run.log.write(step, values)
        eval_loss = float(values["eval_loss"])
        overfitted = self._history.now.overfits
        self._history.note(step, eval_loss)
        if self._history.now.overfits and not overfitted:
            run.log.say(f"overfit  {self._history.now.overfits}; more text, fewer steps or model.dropout would help")
        return eval_loss, False

    def _evaluate_late(self) -> None:
        """The evaluation that a stop cut off, so that the record is that of an undisturbed run."""
        step = self._start.step
        eval_loss, stop = self._evaluate(step)
        if stop:
            raise self._interrupted(step)
        ended = step == self._run.config.max_steps or bool(self._history.reason(step))
        self._save(step, eval_loss, evaluated=True, surely=ended)

    def _save(self, step: int, eval_loss: float | None, *, evaluated: bool, surely: bool) -> None:
        run = self._run
        run.activity.is_at(SAVE, step)
        if run.stop.requested:
            run.stop.is_heard()
        if not all_finite(self._state):
            raise BadStep(
                f"step {step}: the state holds numbers that are not finite, though loss and gradient were; "
                f"it is not saved, the last checkpoint is step {run.checkpoints.latest_step()}"
            )
        if run.lease:
            run.lease.check(look=True)
        if is_writer() and not (run.workdir / CONFIG).exists():
            run.log.say(f"removed  {run.workdir / CONFIG} is gone, and written again; look for what else may be")
            write_settings(run.workdir, run.config, run.dataset.tokenizer)
            run.log.rewind(step)
        offset, bad_steps = self._start.data_offset, self._bad_steps.in_a_row
        here = dataclasses.replace(
            self._history.now, step=step, data_offset=offset, bad_steps=bad_steps, evaluated=evaluated,
            loss_sum=self._meter.loss_sum, count=self._meter.count,
        )  # fmt: skip
        with self._split("save"):
            metadata = checkpoint_metadata(run.dataset) | dataclasses.asdict(here)
            metadata["why_best"] = here.overfits or self._history.reason(step)
            run.checkpoints.save(step, self._state, metadata, eval_loss, surely)
        self._bad_steps.saved(step)
        self._saved = step
        run.stop.is_saved()

    def _save_stopped(self, step: int) -> None:
        """Save the state in which an evaluation of `step`, or what else takes long, was cut off."""
        if self._saved != step:
            self._save(step, None, evaluated=not self._is_evaluated_at(step), surely=True)
        self._run.checkpoints.wait()

    def _cannot_read(self, error: BaseException) -> bool:
        """Whether a batch does not come for a reason that leaves the state whole, and this process can save it."""
        if isinstance(error, Interrupted):
            return True
        return is_alone() and (isinstance(error, OSError) or not self._run.dataset.path.is_dir())

    def _data_lost(self, step: int, error: BaseException) -> StorageFailed:
        return StorageFailed(
            f"{self._run.dataset.path}: the prepared data cannot be read ({str(error).splitlines()[0]}); the state of "
            f"step {step} is saved: put it back, and run the same command again"
        )

    def _is_evaluated_at(self, step: int) -> bool:
        return step % self._run.config.eval_steps == 0 or step == self._run.config.max_steps

    def _interrupted(self, step: int) -> Interrupted:
        signal = self._run.stop.requested or "a stop signal to another process"
        return Interrupted(
            f"{signal} at step {step} of {self._run.config.max_steps}; the state is saved, "
            "run the same command again to go on"
        )


def training_batches(run: Run, start: Position) -> Generator[Batch]:
    """The batches of the steps after `start`, on the devices."""
    config = run.config
    return train_batches(
        run.dataset.train,
        seed=config.train.seed,
        start_step=start.step + start.data_offset,
        stop_step=config.max_steps + start.data_offset,
        global_batch_size=config.global_batch_size,
        accumulation=config.gradient_accumulation_steps,
        block_size=config.block_size,
        sharding=sharding.micro_batches_sharding(run.mesh),
        skip=run.skip,
    )


def evaluate(run: Run, params: dict, go_on: GoOn = lambda: None) -> dict[str, float]:
    """Mean loss over the validation targets (nats), its perplexity, bits per byte. `go_on` is called before a batch."""
    config, validation = run.config, run.dataset.validation
    batches = eval_batches(
        validation,
        global_batch_size=config.per_device_eval_batch_size * batch_shards(run.mesh),
        block_size=config.block_size,
        sharding=sharding.rows_sharding(run.mesh),
        max_batches=config.eval.eval_batches,
    )
    sums: list[tuple[jax.Array, jax.Array]] = []
    with contextlib.closing(batches):
        for batch in batches:
            failpoint("evaluate")
            go_on()
            sums.append(run.program.eval_step(params, batch))
            if len(sums) > EVAL_AHEAD:
                jax.block_until_ready(sums[-EVAL_AHEAD])
    sums = jax.device_get(sums)  # read once, and added in Python's float64
    loss = math.fsum(float(loss_sum) for loss_sum, _ in sums) / max(math.fsum(float(count) for _, count in sums), 1.0)
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),  # exp(710) overflows a float64
        "eval_bits_per_byte": loss / math.log(2) * validation.targets_per_byte,
    }


def checkpoint_metadata(dataset: TokenDataset) -> dict:
    """The facts about the data that a resumed run must find unchanged, for metadata.json."""
    return {
        "vocab_size": dataset.vocab_size,
        "tokenizer_digest": dataset.tokenizer_digest,
        "data_fingerprint": dataset.fingerprint,
        "data_path": str(dataset.path.absolute()),
    }


class Meter:
    """Reads the metrics of finished steps and writes a line of them every `logging_steps`."""

    def __init__(self, run: Run, split: TimeSplit, bad_steps: BadSteps, history: EvaluationHistory):
        config = run.config
        self._run = run
        self._split = split
        self._bad_steps = bad_steps
        self._history = history
        self._tokens_per_step = config.global_batch_size * config.block_size
        self._rows_per_epoch = run.dataset.train.rows_per_epoch(config.block_size)
        devices = run.mesh.devices.flatten()
        peak = peak_flops(devices[0].device_kind)
        flops = flops_per_token(config.model, run.dataset.vocab_size, config.block_size)
        self._mfu_of_token_rate = flops / (peak * devices.size) if peak else None
        self.loss_sum, self.count = history.now.loss_sum, history.now.count  # of the steps that no line tells of yet
        self._timed_steps = 0
        self._first_line: dict[str, float] = {}
        self._started = time.perf_counter()

    def read(self, step: int, metrics: dict) -> None:
        """Wait for `step`, check it, and write a line if one is due. The loss is the mean since the last line."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if values["bad_step"]:
            self._run.checkpoints.wait()  # the one being written may be the one to go back to
        outcome = self._bad_steps.check(step, values, self._run.checkpoints.latest_step())
        if outcome:
            self._run.log.say(self._bad_steps.message)
            record_fault(self._run.workdir, step=step, what="bad step", message=self._bad_steps.message)
        else:
            self.loss_sum += values["loss_sum"]
            self.count += values["count"]
            self._history.add(values["loss_sum"], values["count"])
        if outcome == "rollback":
            raise RolledBack(step)
        self._timed_steps += 1
        if self.writes(step):
            self._write(step, values)

    def writes(self, step: int) -> bool:
        """Whether a line is written for `step`."""
        return step % self._run.config.log.logging_steps == 0 or step == self._run.config.max_steps

    def skip_compilation(self, metrics: dict) -> None:
        """Leave the first step, which compiled the program, out of the times and rates that follow."""
        jax.block_until_ready(metrics)
        self._first_line["seconds_compile"] = time.perf_counter() - self._started
        self._split.take()
        self._timed_steps = -1  # reading the first step brings it to 0

    def _write(self, step: int, values: dict) -> None:
        seconds = self._split.take()
        training = seconds["seconds_data"] + seconds["seconds_step"]
        rate = self._timed_steps * self._tokens_per_step / training if training and self._timed_steps > 0 else None
        line = {
            "epoch": step * self._run.config.global_batch_size / self._rows_per_epoch,
            "loss": self.loss_sum / self.count if self.count else None,
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": rate,
            "mfu": rate * self._mfu_of_token_rate if rate and self._mfu_of_token_rate else None,
            "batch_hash": values["batch_hash"],
            **({"skipped_steps": values["skipped_steps"]} if values["skipped_steps"] else {}),
        }
        self._run.log.write(step, line | seconds | self._first_line)
        self._first_line = {}
        self.loss_sum = self.count = 0.0
        self._timed_steps = 0
