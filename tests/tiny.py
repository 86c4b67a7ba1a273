"""A tiny experiment for tests: a model that compiles in seconds, batches without a corpus, one trained run."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Config
from jaxgpt.data.pipeline import Batch
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.settings import MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.storage.files import new_folder
from jaxgpt.training.models import LoadedModel, write_run
from jaxgpt.training.step import build_program

VOCAB = 65
ONE_DEVICE = MeshConfig(data=1)
MODEL = ModelConfig(n_layer=2, n_head=4, n_embd=64, n_positions=32, dtype="float32")
CONFIG = Config(
    model=MODEL, optimizer=OptimizerConfig(warmup_steps=2, learning_rate=1e-2), train=TrainConfig(max_steps=20, seed=3)
)


def batch(step: int, accumulation: int = 1, rows: int = 8, block_size: int = 16) -> Batch:
    """Random tokens with uneven random weights; the same rows for every `accumulation`."""
    rng = np.random.default_rng(step)
    shape = (accumulation, rows // accumulation)
    tokens = rng.integers(0, VOCAB, (rows, block_size + 1)).reshape(*shape, block_size + 1)
    weights = (rng.random((rows, block_size)) < rng.random((rows, 1))).astype(np.float32).reshape(*shape, block_size)
    return Batch(jnp.asarray(tokens[..., :-1]), jnp.asarray(tokens[..., 1:]), jnp.asarray(weights))


def program(config: Config = CONFIG, mesh: MeshConfig = ONE_DEVICE):
    devices = mesh.data * mesh.fsdp * mesh.tensor
    config = dataclasses.replace(config, mesh=mesh)
    return build_program(config, VOCAB, build_mesh(mesh, jax.devices()[:devices]))


def run_steps(compiled, steps: int = 6, accumulation: int = 1):
    """(state, list of metrics) after `steps` steps of a program."""
    state, metrics = compiled.init(), []
    for step in range(steps):
        state, values = compiled.train_step(state, batch(step, accumulation))
        metrics.append({name: value.item() for name, value in values.items()})
    return state, metrics


def train(config: Config = CONFIG, mesh: MeshConfig = ONE_DEVICE, steps: int = 6, accumulation: int = 1):
    """(state, list of metrics) after `steps` steps."""
    return run_steps(program(config, mesh), steps, accumulation)


def losses(metrics: list[dict]) -> np.ndarray:
    """Loss and gradient norm of each step."""
    return np.array([(m["loss_sum"] / m["count"], m["grad_norm"]) for m in metrics])


# The beginning of a config file for whole runs on a character-level text in {folder}; [optimizer] goes on.
RUN = """
[model]
n_layer = 2
n_head = 2
n_embd = 32
n_positions = 32
dtype = "float32"
[tokenizer]
type = "char"
[data]
source = "text"
path = "{folder}/text.txt"
prepared_dir = "{folder}/prepared"
validation_fraction = 0.1
[optimizer]
learning_rate = 1e-2
"""


def overrides(**settings) -> list[str]:
    """Settings as options of a command: `model__n_layer=3` is --model.n_layer 3."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('__', '.')}", str(value))]


# One finished run for all tests that read one (see conftest.py): 6 steps, evaluations with a sample and checkpoints at
# steps 3 and 6.
TRAINED = (
    RUN
    + """warmup_steps = 2
[train]
max_steps = 6
per_device_train_batch_size = 1
seed = 7
[eval]
eval_steps = 3
sample_tokens = 8
[checkpoint]
save_steps = 3
[log]
logging_steps = 1
"""
)
WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "after", "it", "over", "a", "hill"]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A folder with a text, its config file, the prepared data (prepared/) and a finished run (run/)."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def arguments(self) -> list[str]:
        """The arguments of `train` that made the run, and resume it."""
        return ["--config", str(self.config), "--workdir", str(self.run)]

    def write_text_and_config(self) -> None:
        self.folder.mkdir(parents=True)
        self.text.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 2000)))
        self.config.write_text(TRAINED.format(folder=self.folder))

    def copy(self, folder: Path) -> "Trained":
        shutil.copytree(self.folder, folder)
        copy = Trained(folder)
        copy.config.write_text(TRAINED.format(folder=folder))
        return copy


def save_as_run(run: Path, model: LoadedModel) -> None:
    """A run folder that holds the weights of `model` as its step 0."""
    with new_folder(run) as partial:
        write_run(partial, model)
