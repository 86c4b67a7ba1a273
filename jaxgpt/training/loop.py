"""The one training loop: dispatch step n, then read the metrics of step n - 1, so the device never waits for us."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxgpt.cli import Interrupted
from jaxgpt.config import Config
from jaxgpt.data.pipeline import eval_batches, train_batches, windows_per_epoch
from jaxgpt.data.rows import TokenDataset
from jaxgpt.model.sizes import flops_per_token
from jaxgpt.parallel import sharding
from jaxgpt.parallel.mesh import batch_shards
from jaxgpt.training.checkpoint import Checkpoints
from jaxgpt.training.faults import NonFiniteLoss, StopSignal
from jaxgpt.training.metrics import MetricLog, TimeSplit, peak_flops
from jaxgpt.training.step import Program, TrainState
from jaxgpt.training.trace import StepTrace


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of. Its config is resolved: max_steps and global_batch_size are numbers."""

    config: Config
    workdir: Path
    mesh: Mesh
    dataset: TokenDataset
    program: Program
    checkpoints: Checkpoints
    log: MetricLog
    sample: Callable[[dict], str] | None
    """Parameters -> a text that the model wrote; None turns samples off."""


def fit(run: Run, state: TrainState, start_step: int) -> TrainState:
    """Train from `start_step` to max_steps: metrics, evaluations, samples and checkpoints on their schedules.

    Raises:
        NonFiniteLoss: the loss or gradient norm of a step is not finite; nothing after it was saved.
        Interrupted: SIGTERM or Ctrl-C arrived; the state after the step in hand was saved.
    """
    config, last_step = run.config, run.config.train.max_steps
    split = TimeSplit()
    meter = Meter(run, split)
    pending: tuple[int, dict] | None = None  # the step that was dispatched and not read yet
    with StopSignal() as stop, StepTrace(config.log.profile, run.workdir, start_step) as trace:
        batches = training_batches(run, start_step)
        for step in range(start_step + 1, last_step + 1):
            with split("data"):
                batch = next(batches)
            if trace.starts(step):
                pending = meter.read_all(pending)
                trace.start()
            with split("step"), jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = run.program.train_step(state, batch)
                if pending:
                    meter.read(*pending)  # waits for step n - 1 while the device works on step n
            pending = (step, metrics)
            if step == start_step + 1:
                meter.skip_compilation(metrics)
            if trace.ends(step):
                pending = meter.read_all(pending)
                run.log.say(trace.stop())
            run.log.advance(step)

            evaluate_now = step % config.eval.eval_steps == 0 or step == last_step
            save_now = step % config.checkpoint.save_steps == 0 or step == last_step
            if not (evaluate_now or save_now or stop.requested):
                continue
            pending = meter.read_all(pending)  # before anything is saved, so that no damaged state ever is
            eval_loss = None
            if evaluate_now:
                with split("eval"):
                    values = evaluate(run, state.params)
                    if run.sample:
                        values["sample"] = run.sample(state.params)
                run.log.write(step, values)
                eval_loss = values["eval_loss"]
            if save_now or stop.requested:
                with split("save"):
                    run.checkpoints.save(step, state, checkpoint_metadata(run, step), eval_loss)
            if stop.requested and step < last_step:
                run.checkpoints.wait()
                raise Interrupted(
                    f"{stop.requested} at step {step} of {last_step}; the state is saved, "
                    "run the same command again to go on"
                )
        batches.close()
        run.checkpoints.wait()
    return state


def training_batches(run: Run, start_step: int):
    config = run.config
    return train_batches(
        run.dataset.train,
        seed=config.train.seed,
        start_step=start_step,
        stop_step=config.train.max_steps,
        global_batch_size=config.train.global_batch_size,
        accumulation=config.train.gradient_accumulation_steps,
        block_size=config.block_size,
        sharding=sharding.micro_batches_sharding(run.mesh),
        num_threads=config.data.num_threads,
        prefetch_batches=config.data.prefetch_batches,
    )


def evaluate(run: Run, params: dict) -> dict[str, float]:
    """Mean loss over the validation tokens (nats), its perplexity, and bits per UTF-8 byte of the text."""
    config, validation = run.config, run.dataset.validation
    per_device = config.eval.per_device_eval_batch_size or config.train.per_device_train_batch_size
    batches = eval_batches(
        validation,
        global_batch_size=per_device * batch_shards(run.mesh),
        block_size=config.block_size,
        sharding=sharding.rows_sharding(run.mesh),
        max_batches=config.eval.eval_batches,
    )
    # Dispatched one after the other; the sums are read once, and added in Python's float64.
    sums = jax.device_get([run.program.eval_step(params, batch) for batch in batches])
    loss = math.fsum(float(loss_sum) for loss_sum, _ in sums) / math.fsum(float(count) for _, count in sums)
    tokens_per_byte = validation.num_tokens / validation.num_bytes
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),  # exp(710) overflows a float64
        "eval_bits_per_byte": loss / math.log(2) * tokens_per_byte,
    }


def checkpoint_metadata(run: Run, step: int) -> dict:
    """What a resumed run must find unchanged, and what a reader of the folder wants to know."""
    return {
        "step": step,
        "vocab_size": run.dataset.vocab_size,
        "tokenizer_digest": run.dataset.tokenizer_digest,
        "data_fingerprint": run.dataset.fingerprint,
    }


class Meter:
    """Reads the metrics of finished steps and writes a line of them every `logging_steps`."""

    def __init__(self, run: Run, split: TimeSplit):
        config = run.config
        self._run = run
        self._split = split
        self._tokens_per_step = config.train.global_batch_size * config.block_size
        self._windows = windows_per_epoch(run.dataset.train.num_tokens, config.block_size)
        devices = run.mesh.devices.flatten()
        peak = peak_flops(devices[0].device_kind)
        flops = flops_per_token(config.model, run.dataset.vocab_size, config.block_size)
        self._mfu_of_token_rate = flops / (peak * devices.size) if peak else None
        self._loss_sum = self._count = 0.0
        self._timed_steps = 0
        self._first_line: dict[str, float] = {}
        self._started = time.perf_counter()

    def read(self, step: int, metrics: dict) -> None:
        """Wait for `step`, check it, and write a line if one is due. The loss is the mean since the last line."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        loss = values["loss_sum"] / max(values["count"], 1.0)
        if not (math.isfinite(loss) and math.isfinite(values["grad_norm"])):
            last_good = self._run.checkpoints.latest_step()
            raise NonFiniteLoss(step, loss, values["grad_norm"], values["learning_rate"], last_good)
        self._loss_sum += values["loss_sum"]
        self._count += values["count"]
        self._timed_steps += 1
        if step % self._run.config.log.logging_steps == 0 or step == self._run.config.train.max_steps:
            self._write(step, values)

    def read_all(self, pending: tuple[int, dict] | None) -> None:
        """Wait for the step that was dispatched and not read yet, if there is one: nothing is pending after it."""
        if pending:
            with self._split("step"):
                self.read(*pending)

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
            "epoch": step * self._run.config.train.global_batch_size / self._windows,
            "loss": self._loss_sum / max(self._count, 1.0),
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": rate,
            "mfu": rate * self._mfu_of_token_rate if rate and self._mfu_of_token_rate else None,
            "batch_hash": values["batch_hash"],
            **seconds,
            **self._first_line,
        }
        self._first_line = {}
        self._loss_sum = self._count = 0.0
        self._timed_steps = 0
        self._run.log.write(step, line)
