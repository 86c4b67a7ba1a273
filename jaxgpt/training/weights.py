"""A trained model to use, wherever it lies: what sampling, evaluation and serving start from."""

import dataclasses
from pathlib import Path

import jax

from jaxgpt.config import Config
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.model import gpt2
from jaxgpt.training.checkpoint import find_step, read_config, restore_params


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model: what sampling, evaluation and serving start from."""

    config: Config
    vocab_size: int
    params: dict
    tokenizer: Tokenizer
    step: int


def load_model(path: str | Path) -> LoadedModel:
    """The weights and tokenizer of a run folder (its latest step) or of one step's folder.

    The arrays lie on the default device, whatever mesh wrote them.

    Raises:
        UserError: the folder is not a run or a step of one; says what was looked for.
    """
    run, step = find_step(Path(path))
    config = read_config(run)
    tokenizer = load_tokenizer(run / "tokenizer")
    _, shapes, _ = gpt2.abstract_model(config.model, tokenizer.vocab_size)
    params = restore_params(run, step, shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return LoadedModel(config, tokenizer.vocab_size, params, tokenizer, step)
