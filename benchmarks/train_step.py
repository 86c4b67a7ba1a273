"""Tokens per second of our train step beside the same model and optimizer in torch, in interleaved rounds.

    pip install -e '.[parity]'
    python benchmarks/train_step.py                     # all three shapes
    python benchmarks/train_step.py --shape char-cpu    # one of them

The peer is `transformers.GPT2LMHeadModel` (eager, as shipped) with `torch.optim.AdamW(fused=True)`, clipping and
the same decay mask, on the same batches. "tuned" is the same peer whose allocator keeps freed memory as ours does
(jaxgpt/parallel/accelerator.py), which nobody's torch does by itself. Each side runs in a process of its own that waits
while another one works; the figure is the median over rounds of the round's median step. The first losses are
compared too: started from the same weights, all sides must agree.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPES = {  # name: (layers, heads, width, positions, vocabulary, rows, steps of a round)
    "char-cpu": (4, 4, 128, 64, 65, 12, 60),
    "char-gpu": (6, 6, 384, 256, 65, 16, 4),
    "124M": (12, 12, 768, 256, 50257, 2, 3),
}
SIDES = ("ours", "peer", "tuned")  # ours first: it writes the weights that all start from
LEARNING_RATE, BETAS, EPSILON, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0


def batch(shape: str, step: int) -> np.ndarray:
    """int32 (rows, positions + 1): random tokens, the same for both sides."""
    _, _, _, positions, vocabulary, rows, _ = SHAPES[shape]
    return np.random.default_rng(step).integers(0, vocabulary, (rows, positions + 1), dtype=np.int32)


class Ours:
    """The jitted step of the package, on one device."""

    def __init__(self, shape: str, dtype: str, weights: Path):
        from jaxgpt.parallel.accelerator import keep_freed_memory

        keep_freed_memory()  # as `train` does
        import jax

        from jaxgpt.config import Config
        from jaxgpt.model.huggingface import write_model
        from jaxgpt.parallel.mesh import build_mesh
        from jaxgpt.settings import MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
        from jaxgpt.training.step import build_program

        layers, heads, width, positions, vocabulary, _, _ = SHAPES[shape]
        config = Config(
            model=ModelConfig(n_layer=layers, n_head=heads, n_embd=width, n_positions=positions, dtype=dtype),
            optimizer=OptimizerConfig(
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                warmup_steps=0,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                adam_epsilon=EPSILON,
                weight_decay=DECAY,
                max_grad_norm=CLIP,
            ),
            train=TrainConfig(max_steps=1000),
            mesh=MeshConfig(data=1),
        )
        self.shape, self.jax = shape, jax
        self.program = build_program(config, vocabulary, build_mesh(config.mesh, jax.devices()[:1]))
        self.state = self.program.init()
        write_model(weights, config.model, vocabulary, self.state.params, None)

    def step(self, number: int) -> float:
        from jaxgpt.data.pipeline import Batch

        tokens = batch(self.shape, number)[None]
        rows = Batch(tokens[..., :-1], tokens[..., 1:], np.ones(tokens[..., 1:].shape, np.float32))
        self.state, metrics = self.program.train_step(self.state, rows)
        return float(metrics["loss_sum"] / metrics["count"])


class Peer:
    """transformers' GPT-2 in eager torch; bfloat16 means autocast, as its users run it."""

    def __init__(self, shape: str, dtype: str, weights: Path):
        import torch
        from transformers import GPT2LMHeadModel

        self.torch, self.shape, self.dtype = torch, shape, dtype
        self.model = GPT2LMHeadModel.from_pretrained(weights).train()  # its dropout rates are written as 0
        decayed = [p for name, p in self.model.named_parameters() if p.ndim == 2]
        others = [p for name, p in self.model.named_parameters() if p.ndim != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPSILON,
            fused=True,
        )

    def step(self, number: int) -> float:
        torch = self.torch
        tokens = torch.from_numpy(batch(self.shape, number).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            logits = self.model(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.item()


def worker(side: str, shape: str, dtype: str, weights: str) -> None:
    """Serve rounds: a line on stdin runs one, whose step times and losses go to stdout as JSON."""
    start = time.perf_counter()
    if side == "tuned":
        from jaxgpt.parallel.accelerator import keep_freed_memory

        keep_freed_memory()  # before torch is imported
    runner = (Ours if side == "ours" else Peer)(shape, dtype, Path(weights))
    first = runner.step(0)
    print(json.dumps({"ready": time.perf_counter() - start, "losses": [first]}), flush=True)
    number = 1
    for _ in sys.stdin:
        times, losses = [], []
        for _ in range(SHAPES[shape][-1]):
            began = time.perf_counter()
            losses.append(runner.step(number))
            times.append(time.perf_counter() - began)
            number += 1
        print(json.dumps({"times": times, "losses": losses}), flush=True)


def start(side: str, shape: str, dtype: str, weights: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--worker", side, "--shape", shape, "--dtype", dtype, "--weights", weights]
    return subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def compare(shape: str, dtype: str, rounds: int) -> dict:
    """Median step seconds of each side over interleaved rounds; the first round warms up and is left out."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder)
        sides, medians, losses = {}, {side: [] for side in SIDES}, {}
        for side in SIDES:
            sides[side] = start(side, shape, dtype, weights)
            losses[side] = json.loads(sides[side].stdout.readline())["losses"]
        for number in range(rounds + 1):
            for side, process in sides.items():
                process.stdin.write("\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                losses[side] += answer["losses"]
                if number:
                    medians[side].append(statistics.median(answer["times"]))
        for process in sides.values():
            process.stdin.close()
            process.wait()
    difference = max(abs(a - b) for side in SIDES for a, b in zip(losses["ours"][:5], losses[side][:5]))
    return {"shape": shape, "dtype": dtype, "difference": difference, **medians}


def report(result: dict) -> None:
    rows, positions = SHAPES[result["shape"]][5], SHAPES[result["shape"]][3]
    ours, peer, tuned = (statistics.median(result[side]) for side in SIDES)
    spread = "/".join(f"{100 * (max(result[side]) / min(result[side]) - 1):.0f}%" for side in SIDES)
    print(
        f"| {result['shape']} | {result['dtype']} | {rows} x {positions} | {1e3 * ours:.1f} | {1e3 * peer:.1f} | "
        f"{1e3 * tuned:.1f} | {rows * positions / ours:,.0f} | {peer / ours:.2f} | {tuned / ours:.2f} | {spread} | "
        f"{result['difference']:.1e} |",
        flush=True,
    )


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return f"{os.cpu_count()} cores of {model}"


def versions() -> str:
    from importlib.metadata import version

    named = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "torch", "transformers"))
    return f"Python {platform.python_version()}, {named}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.shape, arguments.dtype, arguments.weights)
        return
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}; {versions()}\n")
    print("| shape | dtype | batch | ours ms | peer ms | tuned ms | ours tok/s | peer / ours | tuned / ours |", end="")
    print(" spread | loss difference |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for shape in [arguments.shape] if arguments.shape else SHAPES:
        for dtype in [arguments.dtype] if arguments.dtype else ("float32", "bfloat16"):
            report(compare(shape, dtype, arguments.rounds))


if __name__ == "__main__":
    main()
