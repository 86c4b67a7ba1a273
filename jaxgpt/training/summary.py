"""The lines that a run prints at its start and its end."""

import shutil
from pathlib import Path

from jaxgpt.config import Config
from jaxgpt.data.dataset import TokenDataset
from jaxgpt.model.sizes import checkpoint_bytes, checkpoints_at_once, parameter_count
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.start import Start


def _warn_of_little_room(config: Config, vocab_size: int, workdir: Path) -> None:
    """Warn when the checkpoints to come will not fit on the disk."""
    needed, free = checkpoints_at_once(config) * checkpoint_bytes(config, vocab_size), shutil.disk_usage(workdir).free
    if needed > free:
        print(
            f"warning  {workdir}: {free / 1e9:.1f} GB free, but the checkpoints to be kept need {needed / 1e9:.1f} GB; "
            "make room or set a smaller checkpoint.save_total_limit",
            flush=True,
        )


def print_header(start: Start) -> None:
    """Print what is about to run, on what, and from where; then what the lint and the tasks have to say."""
    config, dataset, program = start.config, start.dataset, start.program
    model = config.model
    parameters = parameter_count(model, dataset.vocab_size)
    shape = " x ".join(f"{axis} {size}" for axis, size in start.mesh.shape.items())
    devices = start.mesh.devices.flatten()
    print(
        f"model    {parameters / 1e6:.1f}M parameters: {model.n_layer} layers, {model.n_head} heads, width "
        f"{model.n_embd}, {model.dtype}\n"
        f"data     {dataset.train.num_tokens:,} training and {dataset.validation.num_tokens:,} validation tokens"
        f"{_learned(dataset)}, vocabulary {dataset.vocab_size:,} ({dataset.path})\n"
        f"devices  {devices.size} x {devices[0].device_kind} ({shape}), attention by {program.attention}\n"
        f"batch    {config.global_batch_size} sequences of {config.block_size} tokens, "
        f"{config.gradient_accumulation_steps} micro-batches; {config.max_steps:,} steps\n"
        f"run      {start.workdir}, " + (f"resumed after step {start.step}" if start.step else "from step 0"),
        flush=True,
    )
    if weights := start.weights:
        new = dataset.vocab_size - weights.vocab_size
        rows = f"; {new} new tokens start as the mean of its {weights.vocab_size:,} embeddings" if new else ""
        print(f"weights  {weights.setting}{rows}", flush=True)
    _warn_of_little_room(config, dataset.vocab_size, start.workdir)
    for note in start.notes:
        print(note, flush=True)


def _learned(dataset: TokenDataset) -> str:
    """The number of learned tokens, if it is not all of them."""
    facts = dataset.train.facts()
    return f" ({facts['learned_tokens']:,} learned, in {facts['rows']:,} rows)" if "rows" in facts else ""


def print_footer(workdir: Path, best_step: int | None, early: str) -> None:
    """Print the last figures and where everything is. `early`: why the run ended before its last step, or ""."""
    last = [line for line in read_metrics(workdir) if "eval_loss" in line][-1]
    stopping, how = "", '--prompt "..."'
    if "eval_stop_rate" in last:
        how = "--chat"
        stopping = f"answers that end by themselves: {last['eval_stop_rate']:.0%} of those to validation prompts\n"
    note = f"{early}; a larger eval.early_stopping_patience goes on\n" if early else ""
    whose = f"the weights of step {best_step}, the best checkpoint, " if early else ""
    best = f"{best_step}, {workdir}@best" if best_step != last["step"] else best_step
    where = f"{workdir}@best" if early else workdir
    print(
        f"\n{note}"
        f"validation loss {last['eval_loss']:.4f}, perplexity {last['eval_perplexity']:.2f}, "
        f"{last['eval_bits_per_byte']:.4f} bits per byte after {last['step']:,} steps (best: step {best})\n"
        f"{stopping}"
        f"checkpoints {workdir / 'checkpoints'}\nhf          {workdir / 'hf'} ({whose}for transformers)\n"
        f"report      {workdir / 'report.html'}\n"
        f"sample      python -m jaxgpt.sample --checkpoint {where} {how}"
    )
