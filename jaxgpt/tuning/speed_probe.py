"""How long a train step takes on this machine's devices, for models of any size, from steps of two sizes.

Each probe compiles the real step and runs it on random tokens. The time of a step is close to a straight line in its
FLOPs, so two sizes give that of the others; the second probe is the size that the first one suggests.
"""

import statistics
import time
from typing import NamedTuple

import jax
import numpy as np

from jaxgpt.config import Config
from jaxgpt.data.dataset import Batch
from jaxgpt.model.sizes import flops_per_token
from jaxgpt.parallel.mesh import batch_shards, build_mesh
from jaxgpt.training.step import build_program, resolve_batch

_STEPS, _SECONDS = 5, 3.0  # at least so many steps are timed, and more until this time is over
_MOST_STEPS = 50


class StepTime(NamedTuple):
    """A measured step."""

    flops: float
    """Model FLOPs of a step on all devices."""
    seconds: float
    """The median of the timed steps."""
    compile_seconds: float
    """Of the first step, and of the initial weights."""


def flops_of_step(config: Config, vocab_size: int, rows: int) -> float:
    return flops_per_token(config.model, vocab_size, config.block_size) * rows * config.block_size


def probe(config: Config, vocab_size: int) -> StepTime:
    """Compile and time the step of `config`, whose steps and batch are numbers."""
    mesh = build_mesh(config.mesh)
    config = resolve_batch(config, batch_shards(mesh))
    began = time.perf_counter()
    program = build_program(config, vocab_size, mesh)
    accumulation, rows = config.gradient_accumulation_steps, config.global_batch_size
    random = np.random.default_rng(0)
    tokens = random.integers(0, vocab_size, (accumulation, rows // accumulation, config.block_size + 1), np.int32)
    inputs, targets = tokens[..., :-1], tokens[..., 1:]
    batch = Batch(inputs, targets, np.ones(targets.shape, np.float32), np.zeros(targets.shape, np.int32))
    state, metrics = program.train_step(program.init(), batch)
    jax.block_until_ready(metrics)
    compiled = time.perf_counter()
    times: list[float] = []
    while len(times) < _STEPS or (sum(times) < _SECONDS and len(times) < _MOST_STEPS):
        start = time.perf_counter()
        state, metrics = program.train_step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    return StepTime(flops_of_step(config, vocab_size, rows), statistics.median(times), compiled - began)


def seconds_of(flops: float, probes: list[StepTime]) -> float:
    """The seconds of a step with so many FLOPs: on the line through the two nearest probes, or in proportion to one.

    Two probes that do not rise with the FLOPs are noise, and then the nearest one's rate holds.
    """
    near = sorted(probes, key=lambda each: abs(np.log(each.flops / flops)))[:2]
    first = near[0]
    if len(near) == 2 and (near[1].seconds - first.seconds) * (near[1].flops - first.flops) > 0:
        slope = (near[1].seconds - first.seconds) / (near[1].flops - first.flops)
        if (found := first.seconds + slope * (flops - first.flops)) > 0.2 * first.seconds * flops / first.flops:
            return found
    return first.seconds * flops / first.flops
