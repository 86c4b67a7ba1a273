"""What a run says at its start and its end: lines for a person, summary.json and run_page.html for later."""

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from jax.sharding import Mesh

from jaxgpt import __version__
from jaxgpt.config import Config
from jaxgpt.data.dataset import TokenDataset
from jaxgpt.model.sizes import checkpoint_bytes, checkpoints_at_once, parameter_count
from jaxgpt.reporting import run_page
from jaxgpt.storage.files import write_file
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.step import Program


def warn_of_little_room(config: Config, vocab_size: int, workdir: Path) -> None:
    """Say so when the checkpoints to come will not fit on the disk."""
    needed, free = checkpoints_at_once(config) * checkpoint_bytes(config, vocab_size), shutil.disk_usage(workdir).free
    if needed > free:
        print(
            f"warning  {workdir}: {free / 1e9:.1f} GB free, but the checkpoints to be kept need {needed / 1e9:.1f} GB; "
            "make room or set a smaller checkpoint.save_total_limit",
            flush=True,
        )


def print_header(
    config: Config, dataset: TokenDataset, mesh: Mesh, program: Program, workdir: Path, step: int | None, weights
) -> None:
    """What is about to run, on what, and from where. `weights`: those of another model, or None."""
    model, train = config.model, config.train
    parameters = parameter_count(model, dataset.vocab_size)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    devices = mesh.devices.flatten()
    print(
        f"model    {parameters / 1e6:.1f}M parameters: {model.n_layer} layers, {model.n_head} heads, width "
        f"{model.n_embd}, {model.dtype}\n"
        f"data     {dataset.train.num_tokens:,} training and {dataset.validation.num_tokens:,} validation tokens"
        f"{_learned(dataset)}, vocabulary {dataset.vocab_size:,} ({dataset.path})\n"
        f"devices  {devices.size} x {devices[0].device_kind} ({shape}), attention by {program.attention}\n"
        f"batch    {train.global_batch_size} sequences of {config.block_size} tokens, "
        f"{train.gradient_accumulation_steps} micro-batches; {train.max_steps:,} steps\n"
        f"run      {workdir}, " + (f"resumed after step {step}" if step else "from step 0"),
        flush=True,
    )
    if weights:
        new = dataset.vocab_size - weights.vocab_size
        rows = f"; {new} new tokens start as the mean of its {weights.vocab_size:,} embeddings" if new else ""
        print(f"weights  {weights.setting}{rows}", flush=True)


def _learned(dataset: TokenDataset) -> str:
    """How many of the tokens are learned, where that is not all of them."""
    facts = dataset.train.facts()
    return f" ({facts['learned_tokens']:,} learned, in {facts['rows']:,} rows)" if "rows" in facts else ""


def write_report(run, status: str, seconds: float) -> None:
    """summary.json and run_page.html: what ran, on what, and how it ended."""
    config, dataset, devices = run.config, run.dataset, run.mesh.devices.flatten()
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")
    summary = {
        "status": status,
        "seconds": round(seconds, 1),
        "parameters": parameter_count(config.model, dataset.vocab_size),
        "tokens_per_step": config.train.global_batch_size * config.block_size,
        "device": devices[0].device_kind,
        "devices": int(devices.size),
        "mesh": dict(run.mesh.shape),
        "data": {
            "path": str(dataset.path),
            "fingerprint": dataset.fingerprint,
            "training_tokens": dataset.train.num_tokens,
            "validation_tokens": dataset.validation.num_tokens,
            **dataset.train.facts(),
            "vocabulary": dataset.vocab_size,
        },
        "versions": {
            "jaxgpt": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }
    write_file(run.workdir / "summary.json", json.dumps(summary, indent=2))
    if (run.workdir / "metrics.jsonl").exists():  # a run that failed in its first step has none
        run_page.write_report(run.workdir)


def print_footer(workdir: Path, best_step: int | None, early: str) -> None:
    """Where everything is. `early`: why the run ended before its last step, "" where it did not."""
    last = [line for line in read_metrics(workdir) if "eval_loss" in line][-1]
    stopping, how = "", '--prompt "..."'
    if "eval_stop_rate" in last:
        how = "--chat"
        stopping = f"answers that end by themselves: {last['eval_stop_rate']:.0%} of those to validation prompts\n"
    told = f"{early}; a larger eval.early_stopping_patience goes on\n" if early else ""
    whose = f"the weights of step {best_step}, the best checkpoint, " if early else ""
    best = f"{best_step}, {workdir}@best" if best_step != last["step"] else best_step
    where = f"{workdir}@best" if early else workdir
    print(
        f"\n{told}"
        f"validation loss {last['eval_loss']:.4f}, perplexity {last['eval_perplexity']:.2f}, "
        f"{last['eval_bits_per_byte']:.4f} bits per byte after {last['step']:,} steps (best: step {best})\n"
        f"{stopping}"
        f"checkpoints {workdir / 'checkpoints'}\nhf          {workdir / 'hf'} ({whose}for transformers)\n"
        f"report      {workdir / 'report.html'}\n"
        f"sample      python -m jaxgpt.sample --checkpoint {where} {how}"
    )
