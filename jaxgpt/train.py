"""Pretrain, continue or fine-tune: `python -m jaxgpt.train --config configs/quickstart.toml`.

From text to samples in one command: the dataset is prepared when it is not there, the run resumes by itself
when its folder holds a checkpoint, and ends with an evaluation, a sample of text, report.html and hf/, the
weights as a folder that Hugging Face's transformers reads.
"""

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jaxgpt import __version__, cli
from jaxgpt.config import Config, UserError, to_json


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("train", __doc__)
    parser.add_argument("--workdir", metavar="DIR", type=Path, help="run folder [default runs/NAME of the config]")
    cli.add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    config = cli.config_from(arguments)
    train(config, arguments.workdir or Path("runs") / Path(arguments.config).stem)


def train(config: Config, workdir: Path) -> None:
    """Start or resume the run of `config` in `workdir`. What is wrong with the input is found in steps 1 to 4."""
    from jaxgpt.parallel.host import keep_freed_memory

    keep_freed_memory()  # before jax starts its threads
    import jax

    from jaxgpt.data.pipeline import windows_per_epoch
    from jaxgpt.data.preparation import given_tokenizer, prepare
    from jaxgpt.data.rows import open_dataset
    from jaxgpt.model.huggingface import locate
    from jaxgpt.parallel.compiler import use_compilation_cache
    from jaxgpt.parallel.mesh import build_mesh
    from jaxgpt.planning.local import out_of_memory_explained
    from jaxgpt.training import resume
    from jaxgpt.training.checkpoint import Checkpoints
    from jaxgpt.training.loop import Run, fit
    from jaxgpt.training.metrics import MetricLog
    from jaxgpt.training.step import build_program

    # 1. The run folder belongs to this experiment, or to none; the weights to start from are there and fit.
    resume.check_workdir(config, workdir)
    weights = resume.weights_to_start_from(config, workdir)
    tokenizer = given_tokenizer(config, locate)
    resume.check_tokenizer(weights, tokenizer)

    # 2. Devices and their mesh; with them, the batch.
    mesh = build_mesh(config.mesh)
    use_compilation_cache(config.train.compilation_cache_dir)  # nothing was compiled so far
    config = resolve_batch_on(mesh, config, workdir)

    # 3. The data, prepared now if it is not there; with it, an automatic batch and the number of steps.
    dataset = open_dataset(prepare(config, tokenizer))
    config = resolve_batch_on(mesh, config, workdir, max(dataset.vocab_size, weights.vocab_size if weights else 0))
    config = resolve_steps(config, windows_per_epoch(dataset.train.num_tokens, config.block_size))
    resume.check_workdir(config, workdir)
    dataset = resume.check_data(config, workdir, weights, dataset)
    sample = sampler(config, dataset)

    # 4. The program, laid on the mesh.
    program = build_program(config, dataset.vocab_size, mesh)
    is_writer = jax.process_index() == 0
    if is_writer:
        start_run_folder(workdir, config, dataset)
    checkpoints = Checkpoints(workdir, config.checkpoint)

    with out_of_memory_explained(config, dataset.vocab_size, mesh):
        # 5. The state: this run's latest checkpoint, else the weights that init names, else fresh ones.
        state, start_step = resume.initial_state(program, checkpoints, weights, dataset.vocab_size)
        print_header(config, dataset, mesh, program, workdir, start_step, weights)

        # 6. The loop, and the report of how it went, however it ended; of a finished run the weights for everyone.
        started, status = time.time(), "failed"
        with MetricLog(workdir, config.log, config.train.max_steps, start_step, is_writer) as log:
            run = Run(config, workdir, mesh, dataset, program, checkpoints, log, sample)
            try:
                state = fit(run, state, start_step)
                status = "finished"
            except cli.Interrupted:
                status = "interrupted"
                raise
            finally:
                best_step = checkpoints.best_step()
                checkpoints.close()
                if is_writer:
                    write_report(run, status, time.time() - started)
    export(run, state.params, is_writer)
    if is_writer:
        print_footer(workdir, best_step)


def resolve_batch_on(mesh, config: Config, workdir: Path, vocab_size: int | None = None) -> Config:
    """`config` with its batch filled in for the devices of `mesh`.

    An "auto" batch needs the vocabulary to be tried; until that is known, only what can be wrong is found. A run that
    goes on keeps the sequences of a step that it began with.
    """
    from jaxgpt.parallel.mesh import batch_shards
    from jaxgpt.planning.local import largest_batch
    from jaxgpt.planning.memory import batch_sizes, with_settings
    from jaxgpt.training.checkpoint import finished_steps, read_config
    from jaxgpt.training.step import resolve_batch

    shards = batch_shards(mesh)
    if config.train.per_device_train_batch_size != "auto":
        return resolve_batch(config, shards)
    if config.train.global_batch_size is None and finished_steps(workdir):
        config = with_settings(config, train_global_batch_size=read_config(workdir).train.global_batch_size)
    sizes = batch_sizes(config, shards)
    if vocab_size is None:
        return config
    size = largest_batch(config, vocab_size, mesh)
    print(f"batch    per_device_train_batch_size = auto: {size}, of {sizes[0]} to {sizes[-1]}", flush=True)
    return resolve_batch(with_settings(config, train_per_device_train_batch_size=size), shards)


def resolve_steps(config: Config, windows: int) -> Config:
    """`config` with block_size and max_steps filled in: num_train_epochs passes over `windows` windows."""
    steps = config.train.max_steps
    if steps is None:
        steps = max(round(config.train.num_train_epochs * windows / config.train.global_batch_size), 1)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, block_size=config.block_size),
        train=dataclasses.replace(config.train, max_steps=steps),
    )


def start_run_folder(workdir: Path, config: Config, dataset) -> None:
    from jaxgpt.data.tokenizer import load_tokenizer

    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "config.json", to_json(config))
    load_tokenizer(dataset.path / "tokenizer").save(workdir / "tokenizer", config.model.n_positions)


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def sampler(config: Config, dataset):
    """A function that has the model continue eval.sample_prompt, or None when samples are off."""
    if not config.eval.sample_tokens:
        return None
    from jaxgpt.data.tokenizer import load_tokenizer
    from jaxgpt.inference.decode import build_decoder, generate
    from jaxgpt.inference.sampling import SamplingOptions

    tokenizer = load_tokenizer(dataset.path / "tokenizer")
    prompt = tokenizer.encode(config.eval.sample_prompt)
    room = config.model.n_positions - max(len(prompt), 1)
    if room < 1:
        raise UserError(
            f"eval.sample_prompt has {len(prompt)} tokens, which leaves no room in model.n_positions = "
            f"{config.model.n_positions}; shorten it, or set eval.sample_tokens = 0"
        )
    options = SamplingOptions(
        max_new_tokens=min(config.eval.sample_tokens, room), temperature=0.8, top_k=50, seed=config.train.seed
    )

    def sample(params) -> str:
        decoder = build_decoder(config.model, dataset.vocab_size, params, tokenizer.end_of_text)
        [[continuation]] = generate(decoder, [prompt], options)
        return config.eval.sample_prompt + tokenizer.decode(continuation.tokens)

    return sample


def export(run, params: dict, is_writer: bool) -> None:
    """Write hf/: the weights and the tokenizer as Hugging Face has them.

    Raises:
        RunFailed: it cannot be written; the run itself is on disk by now.
    """
    from jaxgpt.data.tokenizer import load_tokenizer
    from jaxgpt.training.checkpoint import whole
    from jaxgpt.training.weights import export_model

    folder, tokenizer = run.workdir / "hf", load_tokenizer(run.dataset.path / "tokenizer")
    model = (run.config.model, run.dataset.vocab_size, params, tokenizer)
    try:
        export_model(folder, *model, replace=True, whole=whole, is_writer=is_writer)
    except OSError as error:
        raise cli.RunFailed(
            f"the run is finished and saved, but {folder} cannot be written ({error}); make room and run the same "
            "command again, which writes it"
        ) from None


def print_header(config: Config, dataset, mesh, program, workdir: Path, start_step: int, weights) -> None:
    from jaxgpt.model.sizes import parameter_count

    model, train = config.model, config.train
    parameters = parameter_count(model, dataset.vocab_size)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    devices = mesh.devices.flatten()
    print(
        f"model    {parameters / 1e6:.1f}M parameters: {model.n_layer} layers, {model.n_head} heads, width "
        f"{model.n_embd}, {model.dtype}\n"
        f"data     {dataset.train.num_tokens:,} training and {dataset.validation.num_tokens:,} validation tokens, "
        f"vocabulary {dataset.vocab_size:,} ({dataset.path})\n"
        f"devices  {devices.size} x {devices[0].device_kind} ({shape}), attention by {program.attention}\n"
        f"batch    {train.global_batch_size} sequences of {config.block_size} tokens, "
        f"{train.gradient_accumulation_steps} micro-batches; {train.max_steps:,} steps\n"
        f"run      {workdir}, " + (f"resumed after step {start_step}" if start_step else "from step 0"),
        flush=True,
    )
    if weights:
        new = dataset.vocab_size - weights.vocab_size
        rows = f"; {new} new tokens start as the mean of its {weights.vocab_size:,} embeddings" if new else ""
        print(f"weights  {weights.setting}{rows}", flush=True)


def write_report(run, status: str, seconds: float) -> None:
    """summary.json and report.html: what ran, on what, and how it ended."""
    from jaxgpt.model.sizes import parameter_count
    from jaxgpt.training import report

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
            "vocabulary": dataset.vocab_size,
        },
        "versions": {
            "jaxgpt": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }
    write_atomically(run.workdir / "summary.json", json.dumps(summary, indent=2))
    if (run.workdir / "metrics.jsonl").exists():  # a run that failed in its first step has none
        report.write_report(run.workdir)


def print_footer(workdir: Path, best_step: int | None) -> None:
    from jaxgpt.training.metrics import read_metrics

    last = [line for line in read_metrics(workdir) if "eval_loss" in line][-1]
    print(
        f"\nvalidation loss {last['eval_loss']:.4f}, perplexity {last['eval_perplexity']:.2f}, "
        f"{last['eval_bits_per_byte']:.4f} bits per byte after {last['step']:,} steps (best: step {best_step})\n"
        f"checkpoints {workdir / 'checkpoints'}\nhf          {workdir / 'hf'} (for transformers)\n"
        f"report      {workdir / 'report.html'}\n"
        f'sample      python -m jaxgpt.sample --checkpoint {workdir} --prompt "..."'
    )


if __name__ == "__main__":
    sys.exit(main())
