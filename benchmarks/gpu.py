"""Our train step beside the same model in torch on one GPU: tokens per second and MFU, model and step only.

    benchmarks/gpu.sh                                   # the four sizes of GPT-2; see there for what must be installed
    python benchmarks/gpu.py --model 124M 1.5B --rounds 5
    python benchmarks/gpu.py --model tiny --steps 3     # anywhere, on the CPU: does this script work?

bfloat16, 1024 positions, no dropout, synthetic tokens that lie on the GPU already. The peer is GPT-2 in plain torch
as its users train it: torch.compile, flash attention (F.scaled_dot_product_attention), bfloat16 autocast, fused AdamW,
clipping. Each side has a process of its own and compiles while the other one does; then they take turns, a round each.
A size that does not fit, or does not answer in time, is reported and left out. MFU counts 6 FLOPs a parameter and
token, and causal attention, over the dense bfloat16 peak.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SIZES = {  # name: (layers, heads, width, positions)
    "124M": (12, 12, 768, 1024),
    "355M": (24, 16, 1024, 1024),
    "774M": (36, 20, 1280, 1024),
    "1.5B": (48, 25, 1600, 1024),
    "tiny": (2, 2, 64, 64),
}
# Sequences in a batch, by the GPU's memory in GB: the most whose states and activations fit there twice, once for each
# side (about 34 x width x layers bytes a token, 16 bytes a parameter, and the logits). Where not even the smallest
# batch worth measuring does, the sides run one after the other.
BATCHES = {
    130: {"124M": 32, "355M": 32, "774M": 16, "1.5B": 8, "tiny": 2},
    70: {"124M": 32, "355M": 16, "774M": 8, "1.5B": 8, "tiny": 2},
    0: {"124M": 8, "355M": 4, "774M": 2, "1.5B": 1, "tiny": 2},
}
ALONE = {(70, "1.5B"), (0, "774M"), (0, "1.5B")}
VOCABULARY, PADDED = 50257, 50304
LEARNING_RATE, BETAS, EPSILON, DECAY, CLIP = 6e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


# ---------------------------------------------------------------- the two sides, each in its own process


def tokens(size: str, batch: int):
    """int32 (batch, positions + 1): the same for both sides."""
    import numpy as np

    return np.random.default_rng(0).integers(0, VOCABULARY, (batch, SIZES[size][3] + 1), dtype=np.int32)


class Ours:
    """The package's jitted step, on one device."""

    def __init__(self, size: str, batch: int, scan: bool):
        import jax
        import numpy as np

        from jaxgpt.config import Config
        from jaxgpt.data.pipeline import Batch
        from jaxgpt.model.sizes import flops_per_token
        from jaxgpt.parallel.mesh import build_mesh
        from jaxgpt.parallel.sharding import micro_batches_sharding
        from jaxgpt.settings import MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
        from jaxgpt.training.metrics import peak_flops
        from jaxgpt.training.step import build_program

        layers, heads, width, positions = SIZES[size]
        model = ModelConfig(n_layer=layers, n_head=heads, n_embd=width, n_positions=positions, scan_layers=scan)
        optimizer = OptimizerConfig(
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPSILON,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
        )
        config = Config(
            model=model,
            optimizer=optimizer,
            train=TrainConfig(max_steps=100_000, per_device_train_batch_size=batch),
            mesh=MeshConfig(data=1),
        )
        mesh = build_mesh(config.mesh, jax.devices()[:1])
        self._jax, self._program = jax, build_program(config, VOCABULARY, mesh)
        self._state = self._program.init()
        window = tokens(size, batch)[None]
        rows = Batch(window[..., :-1], window[..., 1:], np.ones(window[..., 1:].shape, np.float32))
        self._rows = jax.device_put(rows, micro_batches_sharding(mesh))
        device = jax.devices()[0]
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self._state.params))
        self.facts = {
            "device": device.device_kind,
            "peak": peak_flops(device.device_kind),
            "flops": flops_per_token(model, VOCABULARY, positions),
            "parameters": parameters,
            "attention": self._program.attention,
            "version": f"jax {jax.__version__}",
        }

    def steps(self, count: int) -> float:
        """Train `count` steps, and wait for the last one; its loss."""
        for _ in range(count):
            self._state, metrics = self._program.train_step(self._state, self._rows)
        return float(metrics["loss_sum"] / metrics["count"])

    def peak_bytes(self) -> int:
        statistics_of_memory = self._jax.devices()[0].memory_stats() or {}
        return statistics_of_memory.get("peak_bytes_in_use", 0)


class Peer:
    """The same network and optimizer in torch."""

    def __init__(self, size: str, batch: int, scan: bool):
        import torch

        torch.set_float32_matmul_precision("high")
        torch.manual_seed(0)
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = torch_gpt2(*SIZES[size]).to(self._device)
        decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPSILON,
            fused=True,
        )
        self._parameters = list(model.parameters())
        self._model = torch.compile(model)
        window = torch.from_numpy(tokens(size, batch)).long().to(self._device)
        self._inputs, self._targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        parameters = sum(parameter.numel() for parameter in self._parameters)
        self.facts = {"parameters": parameters, "version": f"torch {torch.__version__}"}

    def steps(self, count: int) -> float:
        for _ in range(count):
            with self._torch.autocast(self._device, self._torch.bfloat16):
                loss = self._model(self._inputs, self._targets)
            loss.backward()
            self._torch.nn.utils.clip_grad_norm_(self._parameters, CLIP)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits

    def peak_bytes(self) -> int:
        return self._torch.cuda.max_memory_allocated() if self._device == "cuda" else 0


def torch_gpt2(layers: int, heads: int, width: int, positions: int):
    """GPT-2 with a tied head and the padded vocabulary; (tokens, targets) -> mean loss."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            rows, length, _ = x.shape
            qkv = self.qkv(self.ln_1(x)).view(rows, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(*qkv, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
            return x + self.down(functional.gelu(self.up(self.ln_2(x)), approximate="tanh"))

    class GPT2(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(PADDED, width), nn.Embedding(positions, width)
            self.blocks, self.ln_f = nn.ModuleList(Block() for _ in range(layers)), nn.LayerNorm(width)
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    residual = name.endswith(("out.weight", "down.weight"))
                    nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
            for block in self.blocks:
                x = block(x)
            logits = functional.linear(self.ln_f(x), self.wte.weight)
            return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return GPT2()


def worker(side: str, size: str, batch: int, steps: int, scan: bool) -> None:
    """Serve rounds: a line on stdin runs one; answers are lines of JSON on stdout."""
    started = time.perf_counter()
    runner = {"ours": Ours, "peer": Peer}[side](size, batch, scan)
    loss = runner.steps(1)
    runner.steps(2)  # the first steps after compilation are slower
    ready = {"loss": loss, "start": time.perf_counter() - started, **runner.facts}
    print(json.dumps(ready), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        runner.steps(steps)
        seconds = (time.perf_counter() - began) / steps
        print(json.dumps({"seconds": seconds, "bytes": runner.peak_bytes()}), flush=True)


# ---------------------------------------------------------------- the parent


class Side:
    """A child process that is asked for rounds, and killed when the time is over."""

    def __init__(self, name: str, size: str, batch: int, arguments: argparse.Namespace, deadline: float, alone: bool):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        # Both sides share the GPU: neither may take all of its memory beforehand.
        environment |= (
            {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} if alone else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        )
        if size == "tiny":
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, "--worker", name, "--model", size, "--batch", str(batch)]
        command += ["--steps", str(arguments.steps), *(["--scan"] if arguments.scan else [])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self._timer = threading.Timer(max(deadline - time.monotonic(), 1), self._process.kill)
        self._timer.start()
        self.failure: str | None = None

    def answer(self) -> dict | None:
        """The next line of the child; None once it has failed."""
        if self.failure:
            return None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.failure = self._why()
        return None

    def ask(self) -> dict | None:
        if self.failure:
            return None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: reading its answer says why
        return self.answer()

    def close(self) -> None:
        self._timer.cancel()
        if not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _why(self) -> str:
        if self._process.wait() == -9:
            return "no answer in time"
        self._log.seek(0)
        text = self._log.read()
        if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
            return "out of memory"
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1].strip()[:150] if lines else "it ended without a word"


def measure(size: str, batch: int, arguments: argparse.Namespace, deadline: float, alone: bool) -> dict[str, dict]:
    """What both sides say of themselves, their seconds a step in each round, and what went wrong."""
    results: dict[str, dict] = {}
    for group in [[side] for side in arguments.sides] if alone else [arguments.sides]:
        sides = {name: Side(name, size, batch, arguments, deadline, alone) for name in group}
        for name, side in sides.items():
            results[name] = {"rounds": [], "bytes": 0, **(side.answer() or {})}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                if answer := side.ask():
                    results[name]["rounds"].append(answer["seconds"])
                    results[name]["bytes"] = answer["bytes"]
        for name, side in sides.items():
            side.close()
            results[name]["failure"] = side.failure
    return results


def row(size: str, batch: int, results: dict[str, dict]) -> str:
    """The table's line of a size."""
    per_step = batch * SIZES[size][3]
    facts = results["ours"]
    cells, rates = [], {}
    for name in ("ours", "peer"):
        result = results.get(name)
        if not result or not result["rounds"]:
            cells += [(result or {}).get("failure") or "not run", "–", "–", "–"]
            continue
        seconds = statistics.median(result["rounds"])
        rates[name] = per_step / seconds
        mfu = rates[name] * facts["flops"] / facts["peak"] if facts.get("peak") else None
        spread = max(result["rounds"]) / min(result["rounds"]) - 1
        cells += [f"{1e3 * seconds:.1f}", f"{rates[name]:,.0f}", f"{mfu:.1%}" if mfu else "–", f"{spread:.0%}"]
    ratio = f"{rates['ours'] / rates['peer']:.3f}" if len(rates) == 2 else "–"
    memory = "/".join(f"{result['bytes'] / 2**30:.1f}" for result in results.values())
    losses = "/".join(f"{result['loss']:.3f}" if "loss" in result else "–" for result in results.values())
    starts = "/".join(f"{result['start']:.0f}" if "start" in result else "–" for result in results.values())
    return "| " + " | ".join([size, f"{batch} x {SIZES[size][3]}", *cells, ratio, memory, losses, starts]) + " |"


def gpu() -> tuple[str, float] | None:
    """(name, GB of memory) of the first GPU; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    if done.returncode or not done.stdout.strip():
        return None
    name, memory = done.stdout.splitlines()[0].rsplit(",", 1)
    return name.strip(), float(memory) * 2**20 / 1e9


def check_packages(arguments: argparse.Namespace) -> None:
    missing = [name for name in ("jax", "flax", "optax", "pydantic") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: our side needs {', '.join(missing)}: pip install {' '.join(missing)} (benchmarks/gpu.sh --install)"
        )
    if "peer" in arguments.sides and importlib.util.find_spec("torch") is None:
        print("torch is not installed: our side runs alone\n", flush=True)
        arguments.sides = ["ours"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SIZES, default=["124M", "355M", "774M", "1.5B"])
    parser.add_argument("--batch", type=int, help="sequences of a batch [by the GPU's memory]")
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8, help="after these, what is not measured is left out")
    parser.add_argument("--sides", nargs="+", choices=("ours", "peer"), default=["ours", "peer"])
    parser.add_argument("--scan", action="store_true", help="our layers under lax.scan: compiles faster")
    parser.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.model[0], arguments.batch, arguments.steps, arguments.scan)
        return
    end = time.monotonic() + 60 * arguments.minutes
    found = gpu()
    if not found and arguments.model != ["tiny"]:
        sys.exit("error: nvidia-smi finds no GPU here; --model tiny runs on the CPU, to see that this script works")
    check_packages(arguments)
    name, memory = found if found and arguments.model != ["tiny"] else ("CPU: these figures mean nothing", 0)
    limit = next(limit for limit in BATCHES if memory >= limit)
    rounds = f"{arguments.rounds} rounds of {arguments.steps} steps"
    print(f"{time.strftime('%Y-%m-%d')}, {name}, {memory:.0f} GB; bfloat16, {rounds}")
    side = "tok/s | MFU | spread"
    head = f"size | batch | ours ms | {side} | peer ms | {side} | ratio | GiB | first loss | start s"
    print(f"\n| {head} |\n|{'---|' * (head.count('|') + 1)}", flush=True)
    notes = set()
    for number, size in enumerate(arguments.model):
        batch = arguments.batch or BATCHES[limit][size]
        # What one size does not use of its share of the time, the following ones have.
        share = (end - time.monotonic()) / (len(arguments.model) - number) * 1.6
        deadline = min(end, time.monotonic() + share)
        results = measure(size, batch, arguments, deadline, alone=(limit, size) in ALONE)
        print(row(size, batch, results), flush=True)
        counts = {result["parameters"] for result in results.values() if "parameters" in result}
        if len(counts) > 1:
            sys.exit(f"error: the sides have different models: {counts} parameters")
        notes |= {result[key] for result in results.values() for key in ("version", "attention") if key in result}
    print("\n" + ", ".join(sorted(notes)) + f"; {arguments.minutes - (end - time.monotonic()) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
