"""Where a run starts: its own latest checkpoint, else another model's weights, else fresh ones. Nothing is guessed.

Everything here that can refuse does so before the run writes anything.
"""

import dataclasses
import logging
from pathlib import Path

import jax
import numpy as np

from jaxgpt.config import Config, ModelConfig, UserError, resume_conflicts
from jaxgpt.data.rows import TokenDataset
from jaxgpt.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from jaxgpt.model import huggingface
from jaxgpt.model.gpt2 import padded_vocab
from jaxgpt.model.huggingface import HuggingFaceModel
from jaxgpt.training.checkpoint import FOLDER, Checkpoints, find_step, finished_steps, read_config, restore_params
from jaxgpt.training.step import Program, TrainState
from jaxgpt.training.weights import HUB, stored_vocab_size

logger = logging.getLogger(__name__)


def check_workdir(config: Config, workdir: Path) -> None:
    """Refuse a folder that holds another experiment's run, or weights that cannot be resumed.

    Raises:
        UserError: names every setting that differs, with both values.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file, not a folder")
    if not (workdir / "config.json").exists():
        if (workdir / FOLDER).exists():
            raise UserError(f"{workdir} holds {FOLDER}/ but no config.json, so it is no run; choose another --workdir")
        return
    steps = finished_steps(workdir)
    if steps and not (workdir / FOLDER / str(steps[-1]) / "optimizer").is_dir():
        raise UserError(
            f"{workdir} holds weights without an optimizer state, so it cannot be resumed; choose another --workdir "
            f'and start from these weights with init.from_checkpoint = "{workdir}"'
        )
    differ = resume_conflicts(read_config(workdir), config)
    if differ:
        listed = ", ".join(f"{name} was {old}, now {new}" for name, (old, new) in differ.items())
        raise UserError(f"{workdir} belongs to another config: {listed}; choose another --workdir")


# ---------------------------------------------------------------- another model's weights


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights that this run starts from: checked, and not read yet."""

    setting: str
    """What the user asked for: "init.from_huggingface = gpt2"."""
    source: tuple[Path, int] | HuggingFaceModel
    """A run folder and its step, or a Hugging Face folder."""
    vocab_size: int
    """Tokens that the embedding has rows for; the tokenizer may know fewer."""
    tokenizer: Tokenizer | None
    """What the weights were trained with; None where a Hugging Face folder does not hold it."""
    tokenizer_path: str
    """The tokenizer.path that gives the same tokenizer."""


def weights_to_start_from(config: Config, workdir: Path) -> Weights | None:
    """What init.from_checkpoint or init.from_huggingface names; None for a run that goes on from its own checkpoint.

    Raises:
        UserError: there is no such model, or it has another shape; names both numbers.
    """
    if finished_steps(workdir):
        return None
    if config.init.from_huggingface:
        return _huggingface_weights(config)
    if not config.init.from_checkpoint:
        return None
    setting = f"init.from_checkpoint = {config.init.from_checkpoint}"
    run, step = find_step(Path(config.init.from_checkpoint))
    _check_shape(setting, read_config(run).model, config.model)
    tokenizer = load_tokenizer(run / "tokenizer")
    vocab_size = stored_vocab_size(run, step) or tokenizer.vocab_size
    return Weights(setting, (run, step), vocab_size, tokenizer, str(run / "tokenizer"))


def _huggingface_weights(config: Config) -> Weights:
    name = config.init.from_huggingface
    setting = f"init.from_huggingface = {name}"
    model = huggingface.open_model(huggingface.locate(name))
    _check_shape(setting, model.config, config.model)
    tokenizer = load_tokenizer(model.folder) if has_tokenizer(model.folder) else None
    if tokenizer is None:
        logger.warning(
            "%s holds no tokenizer: only the size of its vocabulary, %d, is compared with the data's",
            setting, model.vocab_size,
        )  # fmt: skip
    is_folder = Path(name).expanduser() == model.folder
    return Weights(setting, model, model.vocab_size, tokenizer, name if is_folder else HUB + name.removeprefix(HUB))


def _check_shape(setting: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    shape = {name: getattr(theirs, name) for name in ("n_layer", "n_head", "n_embd", "n_positions")}
    for name, there in shape.items():
        if there != (here := getattr(ours, name)):
            fix = ", ".join(f"{key} = {value}" for key, value in shape.items())
            raise UserError(f"{setting} has model.{name} = {there}, but this config has {here}; set in [model] {fix}")


def check_tokenizer(weights: Weights | None, tokenizer: Tokenizer | None) -> None:
    """Refuse to feed tokens to weights that learned another vocabulary; None stands for what is not known yet."""
    if weights is None or tokenizer is None:
        return
    if weights.tokenizer is None:
        if padded_vocab(weights.vocab_size) != padded_vocab(tokenizer.vocab_size):
            raise UserError(
                f"{weights.setting} has a vocabulary of {weights.vocab_size} and no tokenizer, but the tokenizer of "
                f"the data has {tokenizer.vocab_size} tokens; put the model's own into its folder and use that"
            )
    elif not tokenizer.extends(weights.tokenizer):
        raise UserError(
            f"{weights.setting} has another tokenizer ({weights.tokenizer.vocab_size} tokens) than the data "
            f'({tokenizer.vocab_size}); set tokenizer.type = "folder" and tokenizer.path = "{weights.tokenizer_path}"'
        )


def grow(wte_VD: np.ndarray, known: int, wanted: int) -> np.ndarray:
    """The embedding for `wanted` tokens, padded; those after the `known` ones start as the mean of these.

    A new token is then as likely as an old one on average, and the odds among the old ones stay. Small random
    rows would have logits near 0, far above those of a trained model, and take most of the probability
    (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    """
    if wanted <= known:
        return wte_VD
    grown_VD = np.zeros((padded_vocab(wanted), wte_VD.shape[1]), np.float32)
    grown_VD[:known] = wte_VD[:known]
    grown_VD[known:wanted] = wte_VD[:known].mean(axis=0, dtype=np.float64)[None]
    return grown_VD


def read_weights(weights: Weights, vocab_size: int, target: dict) -> dict:
    """The parameters for a vocabulary of `vocab_size`, laid out as `target` (a tree of ShapeDtypeStructs) says."""

    def place(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        leaf = target
        for key in path:
            leaf = leaf[key]
        if path == ("wte",):
            array = grow(array, weights.vocab_size, vocab_size)
        # Each device gets its own part, on whichever host it is.
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    if isinstance(weights.source, HuggingFaceModel):
        return huggingface.read_params(weights.source, place)
    wte = target["wte"]
    rows = (padded_vocab(weights.vocab_size), wte.shape[1])
    everywhere = jax.sharding.NamedSharding(wte.sharding.mesh, jax.sharding.PartitionSpec())
    stored = {**target, "wte": jax.ShapeDtypeStruct(rows, wte.dtype, sharding=everywhere)}
    params = restore_params(*weights.source, stored, jax.tree.map(lambda leaf: leaf.sharding, stored))
    return {**params, "wte": place(("wte",), np.asarray(params["wte"].addressable_data(0)))}


# ---------------------------------------------------------------- data and state


def check_data(config: Config, workdir: Path, weights: Weights | None, dataset: TokenDataset) -> TokenDataset:
    """`dataset` with the vocabulary of the model, which may have rows for more tokens than its tokenizer knows.

    Raises:
        UserError: it is not what the run has read so far, or not in the language of the weights to start from.
    """
    check_tokenizer(weights, load_tokenizer(dataset.path / "tokenizer"))
    steps = finished_steps(workdir)
    if not steps:
        return dataclasses.replace(dataset, vocab_size=max(dataset.vocab_size, weights.vocab_size if weights else 0))
    checkpoints = Checkpoints(workdir, config.checkpoint)
    saved = checkpoints.metadata(steps[-1])
    checkpoints.close()
    now = {"tokenizer_digest": dataset.tokenizer_digest, "data_fingerprint": dataset.fingerprint}
    for name, value in now.items():
        if saved[name] != value:
            raise UserError(
                f"the prepared data in {dataset.path} is not what the run in {workdir} has read up to step {steps[-1]} "
                f"({name} was {saved[name][:12]}, now {value[:12]}); choose another --workdir"
            )
    return dataclasses.replace(dataset, vocab_size=saved["vocab_size"])


def initial_state(
    program: Program, checkpoints: Checkpoints, weights: Weights | None, vocab_size: int
) -> tuple[TrainState, int]:
    """(state, steps done). The order of preference is this function's order."""
    step = checkpoints.latest_step()
    if step is not None:
        return checkpoints.restore(step, program.abstract_state), step
    if weights:
        return program.fresh_optimizer(read_weights(weights, vocab_size, program.abstract_state.params)), 0
    return program.init(), 0
