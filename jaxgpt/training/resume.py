"""Where a run starts: its own latest checkpoint, else another run's weights, else fresh ones. Nothing is guessed.

Everything here that can refuse does so before the run writes anything.
"""

import dataclasses
from pathlib import Path

import jax

from jaxgpt.config import Config, UserError, resume_conflicts
from jaxgpt.data.rows import TokenDataset
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.training.checkpoint import FOLDER, Checkpoints, find_step, read_config, restore_params
from jaxgpt.training.step import Program, TrainState


def check_workdir(config: Config, workdir: Path) -> None:
    """Refuse a folder that holds another experiment's run.

    Raises:
        UserError: names every setting that differs, with both values.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file, not a folder")
    if not (workdir / "config.json").exists():
        if (workdir / FOLDER).exists():
            raise UserError(f"{workdir} holds {FOLDER}/ but no config.json, so it is no run; choose another --workdir")
        return
    differ = resume_conflicts(read_config(workdir), config)
    if differ:
        listed = ", ".join(f"{name} was {old}, now {new}" for name, (old, new) in differ.items())
        raise UserError(f"{workdir} belongs to another config: {listed}; choose another --workdir")


@dataclasses.dataclass(frozen=True)
class Weights:
    """A step of another run that this one starts from."""

    run: Path
    step: int
    tokenizer_digest: str


def weights_to_start_from(config: Config) -> Weights | None:
    """The checkpoint that init.from_checkpoint names, if any.

    Raises:
        UserError: it is no checkpoint, or its model has another shape; names both numbers.
    """
    path = config.init.from_checkpoint
    if not path:
        return None
    run, step = find_step(Path(path))
    theirs = read_config(run).model
    for name in ("n_layer", "n_head", "n_embd", "n_positions"):
        there, here = getattr(theirs, name), getattr(config.model, name)
        if there != here:
            raise UserError(f"init.from_checkpoint = {path} has model.{name} = {there}, but this config has {here}")
    return Weights(run, step, load_tokenizer(run / "tokenizer").digest)


def check_tokenizer(config: Config, weights: Weights | None, dataset: TokenDataset) -> None:
    """Refuse to feed tokens to weights that learned another vocabulary."""
    if weights and weights.tokenizer_digest != dataset.tokenizer_digest:
        raise UserError(
            f"init.from_checkpoint = {config.init.from_checkpoint} has another tokenizer than the prepared data in "
            f'{dataset.path}; set tokenizer.type = "folder" and tokenizer.path = "{weights.run / "tokenizer"}"'
        )


def check_data(config: Config, workdir: Path, dataset: TokenDataset) -> None:
    """Refuse to go on with a run on data that is not what it has read so far."""
    if not (workdir / FOLDER).is_dir():
        return
    checkpoints = Checkpoints(workdir, config.checkpoint)
    step = checkpoints.latest_step()
    saved = checkpoints.metadata(step) if step is not None else None
    checkpoints.close()
    now = {"tokenizer_digest": dataset.tokenizer_digest, "data_fingerprint": dataset.fingerprint}
    for name, value in now.items():
        if saved and saved[name] != value:
            raise UserError(
                f"the prepared data in {dataset.path} is not what the run in {workdir} has read up to step {step} "
                f"({name} was {saved[name][:12]}, now {value[:12]}); choose another --workdir"
            )


def initial_state(program: Program, checkpoints: Checkpoints, weights: Weights | None) -> tuple[TrainState, int]:
    """(state, steps done). The order of preference is this function's order."""
    step = checkpoints.latest_step()
    if step is not None:
        return checkpoints.restore(step, program.abstract_state), step
    if weights:
        shapes = program.abstract_state.params
        layout = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        return program.fresh_optimizer(restore_params(weights.run, weights.step, shapes, layout)), 0
    return program.init(), 0
