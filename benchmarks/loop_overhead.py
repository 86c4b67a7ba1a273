"""What the training loop adds to a step: data, dispatch, metrics, logging; everything but the device's work.

    python benchmarks/loop_overhead.py

Trains a model so small that its step is short, once in the real loop (`jaxgpt.train`, with metrics every 10
steps) and once with nothing around the jitted step, and prints the difference of the two times for a step.
"""

import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from train_step import machine

from jaxgpt.config import load_config
from jaxgpt.data.dataset import open_dataset
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.preparation.make_dataset import prepare
from jaxgpt.train import train
from jaxgpt.training.loop import Position, Run, training_batches
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.step import build_program, resolve_batch, resolve_steps

STEPS = 2000
SETTINGS = {
    "model.n_layer": "1",
    "model.n_head": "2",
    "model.n_embd": "32",
    "model.n_positions": "64",
    "model.dtype": "float32",
    "tokenizer.type": "char",
    "data.source": "text",
    "train.per_device_train_batch_size": "12",
    "train.max_steps": str(STEPS),
    "eval.eval_steps": str(STEPS),
    "checkpoint.save_steps": str(STEPS),
    "eval.sample_tokens": "0",
}


def loop_seconds(config, workdir: Path) -> float:
    """Median over the logged lines of the wall time a step."""
    with contextlib.redirect_stdout(io.StringIO()):
        train(config, workdir)
    lines = [line for line in read_metrics(workdir) if "loss" in line][2:]
    return statistics.median(line["seconds_total"] / config.log.logging_steps for line in lines)


def bare_seconds(config) -> float:
    """The same jitted step on the same batches, dispatched back to back, each awaited as the loop awaits it."""
    mesh = build_mesh(config.mesh, jax.devices()[:1])
    dataset = open_dataset(prepare(config))
    config = resolve_steps(resolve_batch(config, 1), dataset.train.rows_per_epoch(config.block_size))
    program = build_program(config, dataset.vocab_size, mesh)
    state = program.init()
    nothing = dict.fromkeys(("checkpoints", "log", "sample", "stop", "activity"))
    batches = training_batches(Run(config, Path(), mesh, dataset, program, **nothing), Position())
    held = [next(batches) for _ in range(50)]
    batches.close()
    times, previous = [], None
    for step in range(STEPS):
        start = time.perf_counter()
        state, metrics = program.train_step(state, held[step % len(held)])
        if previous is not None:
            jax.block_until_ready(previous)
        previous = metrics
        times.append(time.perf_counter() - start)
    chunks = np.asarray(times[20:]).reshape(-1, 10)
    return float(np.median(chunks.mean(1)))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "after", "it"]
        text.write_text(" ".join(np.random.default_rng(0).choice(words, 200_000)))
        settings = SETTINGS | {"data.path": str(text), "data.prepared_dir": str(Path(folder) / "prepared")}
        config = load_config(None, settings)
        rounds = []
        for number in range(3):
            rounds.append((loop_seconds(config, Path(folder) / f"run{number}"), bare_seconds(config)))
        in_loop, bare = (statistics.median(side) for side in zip(*rounds))
        print(f"{time.strftime('%Y-%m-%d')}, {machine()}, jax {jax.__version__}")
        print(f"step in the loop {1e3 * in_loop:.3f} ms, bare {1e3 * bare:.3f} ms: ", end="")
        print(f"the loop adds {1e3 * (in_loop - bare):.3f} ms")


if __name__ == "__main__":
    main()
