"""The start of a run: one straight line from a config to everything that the loop needs, each thing once.

The weights of another model come before the data because a wrong name must be found before hours of preparation.
Until the end of `start` nothing is written but the lock and the prepared data.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

from jax.sharding import Mesh

from jaxgpt.config import Config, with_settings
from jaxgpt.data.dataset import TokenDataset, open_dataset
from jaxgpt.data.pipeline import read_skip_list
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.inference.answers import Sampler, sampler
from jaxgpt.model import huggingface
from jaxgpt.parallel import distributed
from jaxgpt.parallel.accelerator import refuse_silent_cpu
from jaxgpt.parallel.compiler import use_compilation_cache
from jaxgpt.parallel.mesh import batch_shards, build_mesh
from jaxgpt.preparation import lint
from jaxgpt.preparation.make_dataset import given_tokenizer, prepare
from jaxgpt.storage import lease
from jaxgpt.training import resume
from jaxgpt.training.auto_batch import batch_sizes, largest_batch
from jaxgpt.training.recovery import record_process
from jaxgpt.training.resume import Change
from jaxgpt.training.run_state import Scorer
from jaxgpt.training.step import Program, build_program, lay_out, resolve_batch, resolve_steps

PREPARE_SECONDS = 24 * 3600.0  # that other processes wait for the one which prepares the data
BuildScorer = Callable[[Config, int, Tokenizer, Mesh], Scorer | None]
"""(resolved config, vocabulary, tokenizer, mesh) -> what scores eval.tasks; None where there are none."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Everything that a run starts from; all of it has been checked."""

    config: Config  # resolved: batch, block size and number of steps are numbers
    workdir: Path
    step: int | None  # the checkpoint to go on from; None for a new run
    changes: dict[str, Change]  # settings with other values than the run had so far
    weights: resume.Weights | None
    """Another model's, to start from; None for a run that goes on, or starts from scratch."""
    mesh: Mesh
    dataset: TokenDataset
    """The prepared data, which carries its tokenizer. Its vocab_size is the model's."""
    skip: frozenset[int]  # training rows that weigh nothing (data.skip_list)
    sample: Sampler | None  # has the model write at each evaluation; None turns samples off
    score: Scorer | None  # scores eval.tasks; None where there are none
    notes: tuple[str, ...]  # lines about the data and the tasks, to print before the first step
    program: Program
    lease: lease.Lease | None  # the hold on the run folder, in the process that writes


@contextlib.contextmanager
def start(config: Config, workdir: Path, force: bool, build_scorer: BuildScorer) -> Iterator[Start]:
    """Check all input and lay the run on its devices. The run folder is locked until the block ends.

    With `force`, settings may differ from those of the run so far if they decide only what follows. `build_scorer`
    makes what scores eval.tasks.

    Raises:
        UserError: something in the input is wrong.
    """
    # 1. The run folder belongs to this experiment or to none, and to this process alone.
    if config.log.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb_project needs a package that is missing: pip install wandb")
    skip = read_skip_list(config.data.skip_list)
    resume.check_workdir(config, workdir, force)
    with locked(workdir) if distributed.is_writer() else contextlib.nullcontext() as held:
        step = resume.take_up(workdir, config)

        # 2. The weights to start from exist and fit the model and the tokenizer.
        weights = resume.weights_to_start_from(config, step)
        tokenizer = given_tokenizer(config, huggingface.locate_tokenizer)
        resume.check_tokenizer(weights, tokenizer)

        # 3. Devices and mesh; they share out the batch, and suit the model, whatever its vocabulary.
        refuse_silent_cpu()
        mesh = build_mesh(config.mesh)
        use_compilation_cache()  # nothing was compiled so far
        config = _with_given_batch(resume.as_before(config, workdir), batch_shards(mesh))
        lay_out(config, 128 * mesh.size, mesh)

        # 4. The data, prepared now if it is not there.
        verify = config.data.verify if distributed.is_writer() else "sizes"
        dataset = resume.check_data(workdir, step, weights, open_dataset(_prepared(config, tokenizer), verify=verify))

        # 5. Batch and steps become numbers, and with them the settings can be compared with the run's so far.
        config = _with_automatic_batch(dataset.fit(config), dataset.vocab_size, mesh)
        config = resolve_steps(config, dataset.train.rows_per_epoch(config.block_size))
        changes = resume.check_workdir(config, workdir, force)

        # 6. The program, and what evaluates the model beside it.
        sample = sampler(config, dataset)
        score = build_scorer(config, dataset.vocab_size, dataset.tokenizer, mesh)
        notes = _notes(score, dataset if step is None else None)
        program = build_program(config, dataset.vocab_size, mesh)
        yield Start(config, workdir, step, changes, weights, mesh, dataset, skip, sample, score, notes, program, held)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[lease.Lease]:
    """Hold the run folder's lock, in a new folder if there is none. A folder that stays empty is removed again.

    Raises:
        UserError: another process holds the lock, or the folder cannot be made.
    """
    is_new = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (PermissionError, NotADirectoryError) as error:
        raise UserError(f"--workdir {workdir}: the folder cannot be made ({error.strerror})") from None
    try:
        with lease.Lease(workdir) as held:
            record_process(workdir, held.left, held.left.get("beat"), status="killed")
            yield held
    finally:
        if is_new and workdir.is_dir() and [path.name for path in workdir.iterdir()] == [lease.FILE]:
            (workdir / lease.FILE).unlink()
            workdir.rmdir()


def _prepared(config: Config, tokenizer: Tokenizer | None) -> Path:
    """The folder of the prepared data. One process makes it; the others wait for that and find it."""
    folder = prepare(config, tokenizer) if distributed.is_writer() else None
    distributed.barrier("prepared", PREPARE_SECONDS)
    return folder or prepare(config, tokenizer)


def _with_given_batch(config: Config, shards: int) -> Config:
    """The batch as numbers, unless it is "auto": then only what is wrong with it is found."""
    if config.train.per_device_train_batch_size != "auto":
        return resolve_batch(config, shards)
    batch_sizes(config, shards)
    return config


def _with_automatic_batch(config: Config, vocab_size: int, mesh: Mesh) -> Config:
    """An "auto" batch needs the vocabulary, and so the data, to be tried."""
    if config.train.per_device_train_batch_size != "auto":
        return config
    shards = batch_shards(mesh)
    size, sizes = largest_batch(config, vocab_size, mesh), batch_sizes(config, shards)
    print(f"batch    per_device_train_batch_size = auto: {size}, of {sizes[0]} to {sizes[-1]}", flush=True)
    return resolve_batch(with_settings(config, train_per_device_train_batch_size=size), shards)


def _notes(score: Scorer | None, dataset: TokenDataset | None) -> tuple[str, ...]:
    """Lines about the tasks to score, and the lint of new conversations, which may raise `UserError`."""
    notes = [score.describe()] if score else []
    if dataset is not None and dataset.format == "chat":
        notes.append(lint.show(lint.check(dataset)))
    return tuple(notes)
