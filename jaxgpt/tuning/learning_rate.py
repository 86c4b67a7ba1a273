"""The range of learning rates worth trying, from one short training in which the rate rises at every step.

The learning-rate range test of Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3, with
the rate rising exponentially, as fast.ai does it. The loss falls steepest somewhat below the rate at which it begins to
rise; the peak of a schedule with a warm-up lies near it.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.data.dataset import TokenDataset
from jaxgpt.data.pipeline import train_batches
from jaxgpt.parallel import sharding
from jaxgpt.training.trials import build_trial_program, program_key, stack

SMOOTHING = 0.9  # of the moving average of the losses; fast.ai takes 0.98 for noisier ones of small batches
BLOWN_UP = 2.0  # the test ends where the smoothed loss is this many times the lowest, or no number (fast.ai: 4)


@dataclasses.dataclass(frozen=True)
class RangeFound:
    rates: list[float]
    losses: list[float]
    """Smoothed training loss after each step, nats per token."""
    steepest: float
    """The rate at which the loss falls fastest with the logarithm of the rate: a good peak for a schedule."""
    highest_safe: float
    """A tenth of the rate at which the smoothed loss was lowest (fast.ai's other rule)."""


def find(
    config: Config, dataset: TokenDataset, mesh: Mesh, lowest: float = 1e-7, highest: float = 1.0, steps: int = 100
) -> RangeFound:
    """Train `steps` steps with rates from `lowest` to `highest`, or until the loss blows up.

    `config` is resolved; its schedule and warm-up are left out of it. A step whose loss is no number ends the test.
    """
    rates = np.geomspace(lowest, highest, steps)
    optimizer = dataclasses.replace(config.optimizer, lr_scheduler_type="constant", warmup_steps=0)
    config = dataclasses.replace(config, optimizer=optimizer)
    program = build_trial_program(program_key(config), dataset.vocab_size, mesh, 1)
    given = stack([config])
    states, losses = program.init(given), []
    batches = train_batches(
        dataset.train,
        seed=config.train.seed,
        start_step=0,
        stop_step=steps,
        global_batch_size=config.train.global_batch_size,
        accumulation=config.train.gradient_accumulation_steps,
        block_size=config.block_size,
        sharding=sharding.micro_batches_sharding(mesh),
    )
    for rate, batch in zip(rates, batches, strict=True):
        own = jax.tree.map(lambda x: x[None], batch)
        # Under muon both rates rise together.
        ratio = config.optimizer.muon_learning_rate / config.optimizer.learning_rate
        now = given._replace(
            learning_rate=np.array([rate], np.float32), muon_learning_rate=np.array([rate * ratio], np.float32)
        )
        states, metrics = program.train_step(now, states, own)
        loss = float(metrics["loss_sum"][0] / metrics["count"][0])
        if metrics["bad_step"][0] or not math.isfinite(loss):
            break
        losses.append(loss)
        if _smoothed(losses)[-1] > BLOWN_UP * min(_smoothed(losses)):
            break
    batches.close()
    return judged(rates[: len(losses)], losses)


def judged(rates: np.ndarray, losses: list[float]) -> RangeFound:
    """What the losses at these rates say. A loss was read before the update with its rate, so it tells of the rate
    before."""
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
