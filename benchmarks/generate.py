"""Tokens per second of our decoder beside `transformers` generate, same weights, in interleaved rounds.

    pip install -e '.[parity]'
    python benchmarks/generate.py                                   # three models, batches of 1 and 8
    python benchmarks/generate.py --model 124M 1.5B --batch 1 64    # what an accelerator is asked
    python benchmarks/generate.py --perplexity runs/quickstart      # what smaller weights cost in quality

Prompts of 16 tokens, 64 new ones, drawn among the 50 likeliest. Each kind of weights on each side has a process of
its own, which waits while another works. In a round each repeats the call for a second and gives the median time; the
figure is the median over rounds.
"share" is weight bytes read a second over the bandwidth that this script measures first: a step of one row has to
read every weight once, so 100% is the limit. Before the rounds both sides continue the prompts greedily in float32:
the tokens must be the same. `--peer-python` runs the peer under another interpreter (one that has torch).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

MODELS = {  # name: (layers, heads, width, positions, vocabulary)
    "4x128": (4, 4, 128, 256, 65),
    "6x384": (6, 6, 384, 256, 65),
    "124M": (12, 12, 768, 1024, 50257),
    "1.5B": (48, 25, 1600, 1024, 50257),
}
PROMPT, NEW, TOP_K = 16, 64, 50
ROUND_SECONDS = 1.0  # a call of a small model takes a hundredth of that, and the first after a pause is slow
KINDS = {"ours": ("float32", "bfloat16", "int8"), "peer": ("float32", "bfloat16")}


def prompts(model: str, batch: int) -> list[list[int]]:
    return np.random.default_rng(batch).integers(0, MODELS[model][-1], (batch, PROMPT)).tolist()


def write_weights(model: str, folder: Path) -> None:
    """Random weights as a Hugging Face folder. Matrices of three times the usual size: the argmax is then decided."""
    import jax

    from jaxgpt.model import gpt2
    from jaxgpt.model.huggingface import write_model
    from jaxgpt.settings import ModelConfig

    layers, heads, width, positions, vocabulary = MODELS[model]
    config = ModelConfig(n_layer=layers, n_head=heads, n_embd=width, n_positions=positions, dtype="float32")
    params = jax.jit(gpt2.init_params, static_argnums=(0, 1))(config, vocabulary, jax.random.key(0))
    scale = lambda path, x: 3 * x if path[-1].key in ("kernel", "wte", "wpe") else x
    write_model(folder, config, vocabulary, jax.tree_util.tree_map_with_path(scale, params), None)


class Ours:
    def __init__(self, folder: Path, kind: str, batch: int):
        from jaxgpt.parallel.accelerator import keep_freed_memory

        keep_freed_memory()  # as `sample` does
        import jax

        from jaxgpt.inference.decoder import build_decoder
        from jaxgpt.model import huggingface

        model = huggingface.open_model(folder)
        params = jax.device_put(huggingface.read_params(model))
        self.decoder = build_decoder(model.config, model.vocab_size, params, None, kind, rows=batch)
        unread = self.decoder.weights["wpe"].nbytes  # one row of it a token
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.decoder.weights)) - unread

    def generate(self, prompts: list[list[int]], greedy: bool) -> list[list[int]]:
        from jaxgpt.inference.decoder import generate
        from jaxgpt.inference.sampling import SamplingOptions

        options = SamplingOptions(max_new_tokens=NEW, temperature=0.0 if greedy else 1.0, top_k=TOP_K, top_p=1.0)
        return [row.tokens for rows in generate(self.decoder, prompts, options) for row in rows]


class Peer:
    def __init__(self, folder: Path, kind: str, batch: int):
        import torch
        from transformers import GPT2LMHeadModel

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, kind)
        self.model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval().to(self.device)
        self.weight_bytes = 0

    def generate(self, prompts: list[list[int]], greedy: bool) -> list[list[int]]:
        torch = self.torch
        ids = torch.tensor(prompts, device=self.device)
        rules = dict(do_sample=False) if greedy else dict(do_sample=True, top_k=TOP_K, top_p=1.0, temperature=1.0)
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0, eos_token_id=None, **rules
        )
        return made[:, ids.shape[1] :].tolist()


def worker(side: str, kind: str, model: str, batch: int, folder: str) -> None:
    """Serve rounds: a line {"greedy"} on stdin runs one; seconds and tokens go to stdout as JSON."""
    runner = {"ours": Ours, "peer": Peer}[side](Path(folder), kind, batch)
    print(json.dumps({"weight_bytes": runner.weight_bytes}), flush=True)
    for line in sys.stdin:
        greedy, seconds = json.loads(line)["greedy"], []
        while not seconds or sum(seconds) < ROUND_SECONDS:
            began = time.perf_counter()
            tokens = runner.generate(prompts(model, batch), greedy)
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"seconds": statistics.median(seconds), "tokens": tokens}), flush=True)


class Process:
    """One side with one kind of weights."""

    def __init__(self, side: str, kind: str, model: str, batch: int, folder: Path, python: str):
        command = [python, __file__, "--worker", side, "--kind", kind, "--model", model, "--batch", str(batch)]
        command += ["--folder", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.weight_bytes = self._answer()["weight_bytes"]
        self.seconds: list[float] = []

    def run(self, greedy: bool = False) -> dict:
        self.process.stdin.write(json.dumps({"greedy": greedy}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker died; its error stands above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def bandwidth() -> float:
    """Bytes a second that all cores together read from memory, best of a few."""
    cores = len(os.sched_getaffinity(0))
    arrays = [np.ones(64_000_000, np.float32) for _ in range(cores)]
    best = 0.0
    with ThreadPoolExecutor(cores) as threads:
        for _ in range(8):
            began = time.perf_counter()
            list(threads.map(np.sum, arrays))
            best = max(best, sum(a.nbytes for a in arrays) / (time.perf_counter() - began))
    return best


def compare(model: str, batches: list[int], rounds: int, peer_python: str, memory: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_weights(model, Path(folder))
        python = {"ours": sys.executable, "peer": peer_python}
        for batch in batches:
            sides = {
                (side, kind): Process(side, kind, model, batch, Path(folder), python[side])
                for side in KINDS
                for kind in KINDS[side]
            }
            greedy = [sides[side, "float32"].run(greedy=True)["tokens"] for side in KINDS]
            same = sum(a == b for a, b in zip(*greedy))
            for number in range(rounds + 1):
                for process in sides.values():
                    seconds = process.run()["seconds"]
                    if number:  # the first round compiles
                        process.seconds.append(seconds)
            report(model, batch, same, sides, memory)
            for process in sides.values():
                process.close()


def report(model: str, batch: int, same: int, sides: dict, memory: float) -> None:
    rate = {key: batch * NEW / statistics.median(process.seconds) for key, process in sides.items()}
    spread = {key: max(process.seconds) / min(process.seconds) - 1 for key, process in sides.items()}
    best = max(rate["peer", kind] for kind in KINDS["peer"])
    for kind in KINDS["ours"]:
        ours = rate["ours", kind]
        share = ours / batch * sides["ours", kind].weight_bytes / memory
        peer = "".join(f" {rate['peer', k]:,.0f} |" for k in KINDS["peer"])
        print(
            f"| {model} | {batch} | {kind} | {ours:,.0f} |{peer} {ours / rate['peer', 'float32']:.2f} | "
            f"{ours / best:.2f} | {share:.0%} | {spread['ours', kind]:.0%} | {same}/{batch} |",
            flush=True,
        )


def perplexity(run: str) -> None:
    """Perplexity of a run's validation tokens with its weights stored in each way."""
    import dataclasses
    import math

    import jax
    import jax.numpy as jnp

    from jaxgpt.data.dataset import open_dataset
    from jaxgpt.data.pipeline import eval_batches
    from jaxgpt.model.quantized import pack
    from jaxgpt.parallel import sharding
    from jaxgpt.parallel.mesh import build_mesh
    from jaxgpt.preparation.make_dataset import prepare
    from jaxgpt.settings import MeshConfig
    from jaxgpt.training.models import load_model
    from jaxgpt.training.step import build_program

    loaded = load_model(run)
    config = dataclasses.replace(loaded.config, model=dataclasses.replace(loaded.config.model, dtype="float32"))
    validation = open_dataset(prepare(config)).validation
    mesh = build_mesh(MeshConfig(data=1), jax.devices()[:1])
    program = build_program(config, loaded.vocab_size, mesh)

    def stored(path, leaf, kind):
        """The matrix that decoding multiplies by when it is stored as `kind`."""
        name = path[-1].key
        if kind == "float32" or name not in ("kernel", "wte"):
            return leaf
        inputs = 2 if [p.key for p in path[-3:-1]] == ["attn", "c_proj"] else 1
        if name == "wte":
            packed = pack(leaf.T, 1, kind, tiled=False)
            return packed.column(jnp.arange(leaf.shape[0]))

        def one(layer):
            packed = pack(layer, inputs, kind, tiled=False)
            return packed.column(jnp.arange(math.prod(packed.outputs))).T.reshape(layer.shape)

        return jax.vmap(one)(leaf)

    print(f"{run}: validation perplexity over {validation.num_tokens:,} tokens\n\n| weights | perplexity | change |")
    print("|---|---|---|")
    first = None
    for kind in KINDS["ours"]:
        params = jax.tree_util.tree_map_with_path(lambda path, leaf, kind=kind: stored(path, leaf, kind), loaded.params)
        batches = eval_batches(
            validation, global_batch_size=8, block_size=config.block_size, sharding=sharding.rows_sharding(mesh)
        )
        sums = [tuple(map(float, program.eval_step(params, batch))) for batch in batches]
        value = math.exp(math.fsum(a for a, _ in sums) / math.fsum(b for _, b in sums))
        first = first or value
        print(f"| {kind} | {value:.4f} | {value / first - 1:+.3%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["4x128", "6x384", "124M"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--perplexity", metavar="RUN")
    for hidden in ("--worker", "--kind", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.kind, arguments.model[0], arguments.batch[0], arguments.folder)
        return
    if arguments.perplexity:
        perplexity(arguments.perplexity)
        return
    memory = bandwidth()
    print(
        f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} cores, reads {memory / 1e9:.1f} GB/s from memory"
    )
    names = ("model", "batch", "weights", "ours tok/s", "peer float32", "peer bfloat16", "to float32", "to best")
    print("\n| " + " | ".join((*names, "share", "spread", "same greedy")) + " |\n|" + "---|" * 11)
    for model in arguments.model:
        compare(model, arguments.batch, arguments.rounds, arguments.peer_python, memory)


if __name__ == "__main__":
    main()
