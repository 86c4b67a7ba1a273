"""The range of learning rates worth trying, from one short training in which the rate rises at every step.

The learning-rate range test of Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3, with
the rate rising exponentially, as fast.ai does it. The loss falls steepest somewhat below the rate at which it begins to
rise; the peak of a schedule with a warm-up lies near it.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config, with_settings
from jaxgpt.data.dataset import TokenDataset
from jaxgpt.data.pipeline import train_batches
from jaxgpt.errors import UserError
from jaxgpt.parallel import sharding
from jaxgpt.storage.files import write_file
from jaxgpt.storage.lease import Lease
from jaxgpt.training.optimizer import arguments
from jaxgpt.tuning import sweep_folder
from jaxgpt.tuning.search import SweepRequest
from jaxgpt.tuning.sweep_table import PageWriter, write_json
from jaxgpt.tuning.trial_runner import SharedProgram, prepare_bench

RANGE_TEST = "learning_rate.json"
SMOOTHING = 0.9  # of the moving average of the losses; fast.ai takes 0.98 for noisier ones of small batches
BLOWN_UP = 2.0  # the test ends where the smoothed loss is this many times the lowest, or is not finite (fast.ai: 4)


@dataclasses.dataclass(frozen=True)
class RangeFound:
    rates: list[float]
    losses: list[float]
    """Smoothed training loss after each step, nats per token."""
    steepest: float
    """The rate at which the loss falls fastest with the logarithm of the rate: a good peak for a schedule."""
    highest_safe: float
    """A tenth of the rate at which the smoothed loss was lowest (fast.ai's other rule)."""


def find_learning_rate(config: Config, request: SweepRequest, write_page: PageWriter) -> None:
    """Run the range test in a folder of its own, and print the rates that are worth a sweep.

    Raises:
        UserError: the input is wrong, or the folder holds a sweep.
    """
    if sweep_folder.earlier(folder := request.workdir):
        raise UserError(f"{folder} holds a sweep, whose report would be lost; choose another --workdir")
    if config.init.from_checkpoint or config.init.from_huggingface:
        raise UserError("--find-learning-rate trains from fresh weights; leave [init] out")
    bench = prepare_bench(config, [config])
    folder.mkdir(parents=True, exist_ok=True)
    with Lease(folder):
        found = find(bench.resolved(config), bench.dataset, bench.mesh)
        write_file(folder / RANGE_TEST, json.dumps(dataclasses.asdict(found)))
        report = write_page(folder, None)
    low, high = sorted([found.steepest / 4, max(found.highest_safe, found.steepest) * 2])
    print(f"range    {len(found.rates)} steps, learning rate {found.rates[0]:.2g} to {found.rates[-1]:.2g}")
    print(f"steepest {found.steepest:.2g}: where the loss fell fastest, a good peak for a schedule")
    print(f"safe     {found.highest_safe:.2g}: a tenth of the rate at which the loss was lowest")
    vary = f"optimizer.learning_rate={low:.1g}..{high:.1g}:7"
    print(f"next     python -m jaxgpt.sweep --config {request.file} --vary {vary}")
    print(f"report   {report}", flush=True)
    if request.json:
        write_json(request.json, dataclasses.asdict(found))


def read_range_test(folder: Path) -> RangeFound | None:
    """The result of the range test in a folder; None where there was none."""
    file = folder / RANGE_TEST
    return RangeFound(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def find(
    config: Config, dataset: TokenDataset, mesh: Mesh, lowest: float = 1e-7, highest: float = 1.0, steps: int = 100
) -> RangeFound:
    """Train `steps` steps with rates from `lowest` to `highest`, or until the loss blows up.

    `config` is resolved; its schedule and warm-up are left out. A step whose loss is not finite ends the test.
    """
    rates = np.geomspace(lowest, highest, steps)
    config = with_settings(config, optimizer_lr_scheduler_type="constant", optimizer_warmup_steps=0)
    program, given = SharedProgram(config, dataset.vocab_size, mesh), arguments(config)
    batches = train_batches(
        dataset.train,
        seed=config.train.seed,
        start_step=0,
        stop_step=steps,
        global_batch_size=config.global_batch_size,
        accumulation=config.gradient_accumulation_steps,
        block_size=config.block_size,
        sharding=sharding.micro_batches_sharding(mesh),
    )
    state, losses = program.init(given), []
    for rate, batch in zip(rates.tolist(), batches, strict=True):
        now = given._replace(learning_rate=rate)
        state, metrics = program.train_step(now, state, batch)
        loss = float(metrics["loss_sum"] / metrics["count"])
        if metrics["bad_step"] or not math.isfinite(loss):
            break
        losses.append(loss)
        if _smoothed(losses)[-1] > BLOWN_UP * min(_smoothed(losses)):
            break
    return judged(rates[: len(losses)], losses)


def judged(rates: np.ndarray, losses: list[float]) -> RangeFound:
    """Judge rates by the losses at them. A loss is computed before the update with its rate, so it belongs to the
    rate before."""
    smooth = np.array(_smoothed(losses))
    lowest = int(smooth.argmin())
    slope = np.gradient(smooth[: lowest + 1], np.log(rates[: lowest + 1])) if lowest > 1 else np.zeros(1)
    steepest = int(slope.argmin())
    return RangeFound(rates.tolist(), smooth.tolist(), float(rates[steepest]), float(rates[lowest] / 10))


def _smoothed(losses: list[float]) -> list[float]:
    """The exponential moving average, its start corrected as Adam's is (Kingma & Ba 2015, section 3)."""
    average, found = 0.0, []
    for number, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        found.append(average / (1 - SMOOTHING**number))
    return found
