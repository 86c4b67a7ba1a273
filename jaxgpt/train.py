"""Pretrain, continue or fine-tune: `python -m jaxgpt.train --config configs/quickstart.toml`.

From text to samples in one command: the dataset is prepared when it is not there, the run resumes by itself
when its folder holds a checkpoint, and ends with an evaluation, a sample of text, report.html and hf/, the
weights as a folder that Hugging Face's transformers reads.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.config import Config, to_json
from jaxgpt.errors import STORAGE_ERRNOS, HostLost, Interrupted, RunFailed, StorageFailed, UserError

PREPARE_SECONDS = 24 * 3600.0  # that other processes wait for the one which prepares the data


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("train", __doc__)
    parser.add_argument("--workdir", metavar="DIR", type=Path, help="run folder [default runs/NAME of the config]")
    parser.add_argument("--force", action="store_true", help="go on with settings that change what follows")
    cli.add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    config = cli.config_from(arguments)
    train(config, arguments.workdir or Path("runs") / Path(arguments.config).stem, arguments.force)


def train(config: Config, workdir: Path, force: bool = False) -> None:
    """Start or resume the run of `config` in `workdir`, alone or as one process of several.

    What is wrong with the input is found before anything is written; `force` accepts settings that change what
    follows in a run and not what was.
    """
    from jaxgpt.parallel.host_memory import keep_freed_memory

    keep_freed_memory()  # before jax starts its threads
    from jaxgpt.parallel import distributed
    from jaxgpt.parallel.host_watch import PeerWatch
    from jaxgpt.training.signals import Activity, StopSignal, record_lost_host

    activity = Activity()
    record = functools.partial(record_lost_host, workdir)
    with contextlib.ExitStack() as held:
        distributed.join(config.mesh.distributed, config.faults.host_timeout_seconds)
        stop = held.enter_context(StopSignal(activity, distributed.is_alone()))
        ended_well = False
        try:
            with PeerWatch(config.faults.host_timeout_seconds, lambda: activity.now[1], record):
                inputs = checked_inputs(config, workdir, force, held)
                with crashes_recorded(config, workdir, activity):
                    run(inputs, workdir, stop, activity, held)
            ended_well = True
        except Interrupted:
            ended_well = True
            raise
        finally:
            distributed.leave(ended_well)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run starts from; all of it has been checked."""

    config: Config
    """Resolved: batch, block size and number of steps are numbers."""
    changes: dict
    """Settings with other values than the run had so far."""
    skip: frozenset[int]
    """Training rows that weigh nothing."""
    mesh: object
    dataset: object
    weights: object
    """Another model's, to start from; None for a run that goes on, or starts from scratch."""
    step: int | None
    """The checkpoint to go on from."""
    sample: Callable[[dict], dict] | None
    score: object
    """What scores eval.tasks; None where there are none."""
    show_lint: Callable[[], None] | None
    """Prints what there is to know about conversations before they are learned; None for text, or for a run that
    goes on."""
    program: object


def checked_inputs(config: Config, workdir: Path, force: bool, held: contextlib.ExitStack) -> Inputs:
    """Find what is wrong with the input. A run that is there is taken into `held`, and nothing else is written."""
    from jaxgpt.data.dataset import open_dataset
    from jaxgpt.data.skip_list import read_skip_list
    from jaxgpt.data.tokenizer import load_tokenizer
    from jaxgpt.evaluation.in_training import read_tasks, task_scores
    from jaxgpt.model.huggingface import locate
    from jaxgpt.parallel import distributed
    from jaxgpt.parallel.accelerator import refuse_silent_cpu
    from jaxgpt.parallel.compiler import use_compilation_cache
    from jaxgpt.parallel.mesh import build_mesh
    from jaxgpt.preparation.preparation import given_tokenizer
    from jaxgpt.storage.lease import Lease
    from jaxgpt.training import resume
    from jaxgpt.training.step import build_program, resolve_steps

    # 1. The run folder belongs to this experiment, or to none; the weights to start from are there and fit.
    skip = read_skip_list(config.data.skip_list)
    tasks = read_tasks(config.eval.tasks)
    resume.check_workdir(config, workdir, force)
    step = None
    if (workdir / "config.json").is_file():
        if distributed.is_writer():
            held.enter_context(Lease(workdir))
        step = resume.take_up(workdir, config)
    weights = resume.weights_to_start_from(config, step)
    tokenizer = given_tokenizer(config, locate)
    resume.check_tokenizer(weights, tokenizer)

    # 2. Devices and their mesh; with them, the batch.
    refuse_silent_cpu()
    mesh = build_mesh(config.mesh)
    use_compilation_cache(config.train.compilation_cache_dir)  # nothing was compiled so far
    config = resolve_batch_on(mesh, config, workdir)

    # 3. The data, prepared now if it is not there; with it, an automatic batch and the number of steps.
    dataset = open_dataset(
        prepared(config, tokenizer), verify=config.data.verify if distributed.is_writer() else "sizes"
    )
    config = resolve_batch_on(mesh, config, workdir, max(dataset.vocab_size, weights.vocab_size if weights else 0))
    config = resolve_steps(config, dataset.train.rows_per_epoch(config.block_size))
    changes = resume.check_workdir(config, workdir, force)
    dataset = resume.check_data(workdir, step, weights, dataset)

    # 4. The program, laid on the mesh.
    sample = sampler(config, dataset)
    score = task_scores(tasks, config, dataset.vocab_size, load_tokenizer(dataset.path / "tokenizer"), mesh)
    show_lint = linted(dataset) if step is None else None
    program = build_program(config, dataset.vocab_size, mesh)
    return Inputs(config, changes, skip, mesh, dataset, weights, step, sample, score, show_lint, program)


def prepared(config: Config, tokenizer) -> Path:
    """The folder of the prepared data. One process makes it, the others wait for that and find it."""
    from jaxgpt.parallel import distributed
    from jaxgpt.preparation.preparation import prepare

    if not distributed.is_writer():
        distributed.barrier("prepared", PREPARE_SECONDS)
        return prepare(config, tokenizer)
    folder = prepare(config, tokenizer)
    distributed.barrier("prepared", PREPARE_SECONDS)
    return folder


def run(inputs: Inputs, workdir: Path, stop, activity, held: contextlib.ExitStack) -> None:
    """From checked inputs to a finished run: the state, the loop, the report, and the weights for everyone."""
    from jaxgpt.parallel import distributed
    from jaxgpt.storage.lease import Lease
    from jaxgpt.training import resume, summary
    from jaxgpt.training.auto_batch import out_of_memory_explained
    from jaxgpt.training.checkpoint import Checkpoints
    from jaxgpt.training.loop import fit
    from jaxgpt.training.metrics import MetricLog
    from jaxgpt.training.run_state import Run, position
    from jaxgpt.training.signals import Watchdog

    config, dataset, program, step = inputs.config, inputs.dataset, inputs.program, inputs.step
    is_writer = distributed.is_writer()
    if is_writer:
        is_new = not (workdir / "config.json").is_file()
        workdir.mkdir(parents=True, exist_ok=True)
        if is_new:
            held.enter_context(Lease(workdir))
        resume.record_changes(workdir, step or 0, inputs.changes)
        start_run_folder(workdir, config, dataset)
    checkpoints = Checkpoints(workdir, config.checkpoint, is_writer)
    if is_writer:
        checkpoints.delete_old()
    start = position(checkpoints, step)
    watchdog = Watchdog(workdir, activity, config.faults.hang_seconds)
    with watchdog, out_of_memory_explained(config, dataset.vocab_size, inputs.mesh):
        # 5. The state: this run's latest checkpoint, else the weights that init names, else fresh ones.
        state = resume.initial_state(program, checkpoints, step, inputs.weights, dataset.vocab_size)
        if is_writer:
            summary.print_header(config, dataset, inputs.mesh, program, workdir, step, inputs.weights)
            summary.warn_of_little_room(program.abstract_state, config, workdir)
            if inputs.score:
                print(inputs.score.message(), flush=True)
            if inputs.show_lint:
                inputs.show_lint()

        # 6. The loop, and the report of how it went, however it ended; of a finished run the weights for everyone.
        started, status = time.time(), "failed"
        with MetricLog(workdir, config.log, config.train.max_steps, start.step, is_writer) as log:
            parts = (config, workdir, inputs.mesh, dataset, program, checkpoints, log)
            whole = Run(*parts, inputs.sample, stop, activity, inputs.skip, inputs.score)
            try:
                state, early = fit(whole, state, start)
                status = f"finished ({early})" if early else "finished"
            except Interrupted:
                status = "interrupted"
                raise
            finally:
                stop.is_heard()
                checkpoints.close()
                if is_writer:
                    write_report(whole, status, time.time() - started)
        params = best_weights(workdir, state.params) if early else state.params
        del state
        export(whole, params, is_writer)
    if is_writer:
        summary.print_footer(workdir, checkpoints.best_step(), early)


def write_report(run, status: str, seconds: float) -> None:
    """summary.json and report.html; a disk without room for them is no reason to hide how the run ended."""
    from jaxgpt.training import summary

    try:
        summary.write_report(run, status, seconds)
    except OSError as error:
        print(f"warning  no report: {error.filename or run.workdir}: {error.strerror}", flush=True)


@contextlib.contextmanager
def crashes_recorded(config: Config, workdir: Path, activity) -> Iterator[None]:
    """Leave a line about an exception that is nobody's decision: three at one step and the run goes back."""
    from jaxgpt.training.recovery import record_fault
    from jaxgpt.training.resume import identity

    try:
        yield
    except (UserError, StorageFailed, HostLost):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
            raise
        facts = {
            "step": activity.now[1],
            "identity": identity(config),
            "error": f"{type(error).__name__}: {error}",
        }
        record_fault(workdir, what="crash", **{**facts, "error": facts["error"][:500]})
        raise


def resolve_batch_on(mesh, config: Config, workdir: Path, vocab_size: int | None = None) -> Config:
    """`config` with its batch filled in for the devices of `mesh`.

    An "auto" batch needs the vocabulary to be tried; until that is known, only what can be wrong is found. A run that
    goes on keeps the sequences of a step that it began with.
    """
    from jaxgpt.config import with_settings
    from jaxgpt.parallel.mesh import batch_shards
    from jaxgpt.training.auto_batch import largest_batch
    from jaxgpt.training.checkpoint import finished_steps, read_config
    from jaxgpt.training.memory import batch_sizes
    from jaxgpt.training.step import resolve_batch

    shards = batch_shards(mesh)
    if config.train.global_batch_size is None and finished_steps(workdir):
        config = with_settings(config, train_global_batch_size=read_config(workdir).train.global_batch_size)
    if config.train.per_device_train_batch_size != "auto":
        return resolve_batch(config, shards)
    sizes = batch_sizes(config, shards)
    if vocab_size is None:
        return config
    size = largest_batch(config, vocab_size, mesh)
    print(f"batch    per_device_train_batch_size = auto: {size}, of {sizes[0]} to {sizes[-1]}", flush=True)
    return resolve_batch(with_settings(config, train_per_device_train_batch_size=size), shards)


def start_run_folder(workdir: Path, config: Config, dataset) -> None:
    from jaxgpt.data.tokenizer import load_tokenizer
    from jaxgpt.storage.files import write_file

    workdir.mkdir(parents=True, exist_ok=True)
    write_file(workdir / "config.json", to_json(config))
    load_tokenizer(dataset.path / "tokenizer").save(workdir / "tokenizer", config.model.n_positions)


def linted(dataset) -> Callable[[], None] | None:
    """A function that prints what the lint says of the conversations of a chat dataset; None for text.

    Raises:
        UserError: they cannot be learned from as they are.
    """
    if dataset.format == "text":
        return None
    from jaxgpt.data.tokenizer import load_tokenizer
    from jaxgpt.preparation import lint

    found = lint.check(dataset, load_tokenizer(dataset.path / "tokenizer"))
    return lambda: print(lint.show(found), flush=True)


def sampler(config: Config, dataset):
    """A function that has the model write something at each evaluation, or None when samples are off."""
    if not config.eval.sample_tokens:
        return None
    from jaxgpt.data.tokenizer import load_tokenizer
    from jaxgpt.inference.answers import answering, continuing

    tokenizer = load_tokenizer(dataset.path / "tokenizer")
    if dataset.format == "text":
        return continuing(config, dataset.vocab_size, tokenizer)
    if not config.eval.chat_prompts:
        return None
    return answering(config, dataset.vocab_size, tokenizer, dataset.validation)


def best_weights(workdir: Path, last: dict) -> dict:
    """The parameters of the best checkpoint, laid out as the `last` ones are."""
    import jax

    from jaxgpt.parallel.distributed import broadcast_from_writer
    from jaxgpt.training.checkpoint import best_step, restore_params
    from jaxgpt.training.recovery import check_weights

    step = broadcast_from_writer(best_step(workdir))
    check_weights(workdir, step)
    return restore_params(workdir, step, last, jax.tree.map(lambda leaf: leaf.sharding, last))


def export(run, params: dict, is_writer: bool) -> None:
    """Write hf/: the weights and the tokenizer as Hugging Face has them.

    Raises:
        RunFailed: it cannot be written; the run itself is on disk by now.
    """
    from jaxgpt.data.tokenizer import load_tokenizer
    from jaxgpt.training.checkpoint import whole
    from jaxgpt.training.models import export_model

    folder, tokenizer = run.workdir / "hf", load_tokenizer(run.dataset.path / "tokenizer")
    model = (run.config.model, run.dataset.vocab_size, params, tokenizer)
    try:
        export_model(folder, *model, replace=True, whole=whole, is_writer=is_writer)
    except OSError as error:
        raise RunFailed(
            f"the run is finished and saved, but {folder} cannot be written ({error}); make room and run the same "
            "command again, which writes it"
        ) from None


if __name__ == "__main__":
    cli.leave(main())
