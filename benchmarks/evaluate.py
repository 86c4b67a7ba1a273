"""Questions a second through our evaluation beside lm-eval's own torch path, same weights, in interleaved rounds.

    pip install -e '.[eval,parity]'
    python benchmarks/evaluate.py
    python benchmarks/evaluate.py --model 124M --documents 24 --rounds 5

Both sides answer the same requests of lm-eval (texts in, log-probabilities out) in float32 on this machine's cores,
each in a process of its own, which waits while the other works. "choices" is HellaSwag's shape: contexts of 40 to 120
tokens with four endings of 10 to 30; "word" is LAMBADA's: contexts of 60 to 110 tokens and a last word. Each side takes
the best of the batch sizes, found on a few documents that are not timed again. Ours compiles a program for each shape,
so its first call is told as well: "with compiling" is the rate of that call alone, all compiling included. The answers
of the first calls are compared. `--peer-python` runs the peer under another interpreter.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

MODELS = {"6x384": (6, 6, 384, 1024, 50257), "124M": (12, 12, 768, 1024, 50257)}
"""name: (layers, heads, width, positions, vocabulary)"""
BATCHES = (1, 4, 8, 16)
PROBE = 4  # documents that a batch size is judged by
WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "en", "il", "or", "ump", "ash", "ine")]


def documents(kind: str, count: int, seed: int) -> list[list[tuple[str, str]]]:
    """The (context, target) pairs of each question; a word is a token."""
    draw = np.random.default_rng(seed)
    words = lambda low, high: " ".join(draw.choice(WORDS, draw.integers(low, high + 1)))

    def one() -> list[tuple[str, str]]:
        if kind == "word":
            return [(words(60, 110), f" {draw.choice(WORDS)}")]
        context = words(40, 120)
        return [(context, f" {words(10, 30)}") for _ in range(4)]

    return [one() for _ in range(count)]


def write_model(name: str, folder: Path) -> None:
    """Random weights as a Hugging Face folder, with a tokenizer that has a token for each word."""
    import jax

    from jaxgpt.data.tokenizer import train_bpe
    from jaxgpt.model import gpt2
    from jaxgpt.settings import ModelConfig
    from jaxgpt.training.models import write_huggingface

    layers, heads, width, positions, vocabulary = MODELS[name]
    config = ModelConfig(n_layer=layers, n_head=heads, n_embd=width, n_positions=positions, dtype="float32")
    params = jax.jit(gpt2.init_params, static_argnums=(0, 1))(config, vocabulary, jax.random.key(0))
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)  # predictions that are worth comparing
    tokenizer = train_bpe([" ".join(["", *WORDS]) * 20], 1000)
    write_huggingface(folder, config, vocabulary, params, tokenizer)


class Ours:
    def __init__(self, folder: Path):
        from jaxgpt.parallel.accelerator import keep_freed_memory

        keep_freed_memory()
        import jax

        jax.config.update("jax_enable_compilation_cache", False)  # the first call says what compiling takes
        from jaxgpt.evaluation import harness

        self.open = lambda batch: harness.open_model(folder, rows_per_device=batch)
        self.models: dict = {}

    def model(self, batch: int, fresh: bool):
        if fresh or batch not in self.models:
            self.models.clear()  # one at a time in memory
            self.models[batch] = self.open(batch)
        return self.models[batch]


class Peer:
    def __init__(self, folder: Path):
        from lm_eval.models.huggingface import HFLM

        self.lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)

    def model(self, batch: int, fresh: bool):
        self.lm.batch_size_per_gpu = batch
        return self.lm


def worker(side: str, folder: str) -> None:
    """Serve calls: a line {"batch", "pairs", "fresh"} on stdin; seconds and answers go to stdout as JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # lm-eval prints
    runner = {"ours": Ours, "peer": Peer}[side](Path(folder))
    from lm_eval.api.instance import Instance

    names = {"ours": ["jax", "lm_eval"], "peer": ["torch", "transformers", "lm_eval"]}[side]
    print(json.dumps({name: importlib.metadata.version(name) for name in names}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=0) for pair in asked["pairs"]
        ]
        for request in requests:
            request.task_name = "benchmark"
        model = runner.model(asked["batch"], asked["fresh"])
        began = time.perf_counter()
        found = model.loglikelihood(requests, disable_tqdm=True)
        print(json.dumps({"seconds": time.perf_counter() - began, "found": found}), file=answers, flush=True)


class Side:
    """One side's process."""

    def __init__(self, side: str, folder: Path, python: str):
        command = [python, __file__, "--worker", side, "--folder", str(folder)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._answer()

    def run(self, batch: int, questions: list, fresh: bool = False) -> dict:
        """`fresh`: with nothing compiled."""
        pairs = [pair for question in questions for pair in question]
        self.process.stdin.write(json.dumps({"batch": batch, "pairs": pairs, "fresh": fresh}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def best_batch(self, questions: list, batches: list[int]) -> int:
        """The quickest of the batch sizes, each asked twice: the first call compiles."""
        if len(batches) == 1:
            return batches[0]
        return min(batches, key=lambda batch: [self.run(batch, questions)["seconds"] for _ in range(2)][1])

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker died; its error stands above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(model: str, kinds: list[str], arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, Path(folder))
        python = {"ours": sys.executable, "peer": arguments.peer_python}
        sides = {side: Side(side, Path(folder), python[side]) for side in python}
        for kind in kinds:
            questions = documents(kind, arguments.documents * (4 if kind == "word" else 1), seed=1)
            probe = documents(kind, PROBE * (4 if kind == "word" else 1), seed=2)
            batch = {name: side.best_batch(probe, arguments.batch) for name, side in sides.items()}
            first = {name: side.run(batch[name], questions, fresh=True) for name, side in sides.items()}
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(arguments.rounds):
                for name, side in sides.items():
                    seconds[name].append(side.run(batch[name], questions)["seconds"])
            report(model, kind, len(questions), batch, first, seconds)
        print(f"\n{model}: " + ", ".join(f"{k} {v}" for s in sides.values() for k, v in s.versions.items()) + "\n")
        for side in sides.values():
            side.close()


def report(model: str, kind: str, count: int, batch: dict, first: dict, seconds: dict) -> None:
    pairs = [(a[0], b[0]) for a, b in zip(first["ours"]["found"], first["peer"]["found"], strict=True)]
    apart, relative = max(abs(a - b) for a, b in pairs), max(abs(a - b) / abs(b) for a, b in pairs)
    rate = {name: (count / min(times), count / statistics.median(times)) for name, times in seconds.items()}
    compiled = count / first["ours"]["seconds"]
    spread = {name: max(times) / min(times) - 1 for name, times in seconds.items()}
    print(
        f"| {model} | {kind} | {count} | {batch['ours']} | {batch['peer']} | "
        f"{rate['ours'][0]:.2f} / {rate['ours'][1]:.2f} | {rate['peer'][0]:.2f} / {rate['peer'][1]:.2f} | "
        f"{rate['ours'][0] / rate['peer'][0]:.2f} / {rate['ours'][1] / rate['peer'][1]:.2f} | {compiled:.2f} | "
        f"{first['ours']['seconds'] - statistics.median(seconds['ours']):.1f} s | "
        f"{spread['ours']:.0%} / {spread['peer']:.0%} | {apart:.1e} ({relative:.1e}) |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kind", nargs="+", choices=["choices", "word"], default=["choices", "word"])
    parser.add_argument("--documents", type=int, default=12, help="with choices; of the others 4 times as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH")
    for hidden in ("--worker", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.folder)
        return
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} cores, load {load}, float32, best / median\n")
    names = ("model", "questions", "count", "our batch", "peer's", "ours a second", "peer's a second", "ratio")
    print("| " + " | ".join((*names, "with compiling", "compiling", "spread", "largest difference (relative)")) + " |")
    print("|" + "---|" * 12)
    for model in arguments.model:
        compare(model, arguments.kind, arguments)


if __name__ == "__main__":
    main()
