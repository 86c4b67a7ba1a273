"""What a speedrun trains: the size, the tokens and the settings of its two runs, from the time there is.

Of the sizes in SIZES the one with the lowest predicted loss is taken, given how many tokens each can read in the time.
What a run costs besides its steps (the start, compiling, evaluating, saving) is taken off first.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.config import Config
from jaxgpt.settings import ModelConfig
from jaxgpt.tuning.loss_law import LossGuess, builtin_law
from jaxgpt.tuning.scaling import without_embeddings
from jaxgpt.tuning.speed_probe import StepTime, flops_of_step, seconds_of

SIZES = (
    (3, 96), (4, 128), (4, 192), (5, 256), (6, 320), (6, 384), (8, 512), (12, 768), (24, 1024), (36, 1280),
)  # fmt: skip
"""(layers, width) of the models that it chooses from, each two to three times as large as the one before."""
CHAT_SHARE, MOST_CHAT = 0.75, 30_000_000  # of the training time, and tokens, after which skills hardly get better
CHAT_RATE = 0.006  # of Muon: 0.0035, 0.01, 0.015 and 0.02 learned the skills more slowly (docs/speedrun.md)
TEXT_SHARE = 0.05  # of the text in the chat data, so that the model does not forget its pretraining
RESERVE = 0.04  # of all the time, for what goes slower than it was measured
OTHER_SECONDS = 18.0  # of a run besides its steps and compiling: evaluations, samples, checkpoints, the report, hf/
SLOWER = 1.05  # a step among data and metrics, beside a probe's
CHAT_BYTES_PER_TOKEN = 3.7  # of the skills' JSON, with a vocabulary of 2,048
TEXT_BYTES_PER_TOKEN = 2.6  # of the built-in text
MADE_BYTES, MADE_BYTES_A_MINUTE = 60_000_000, 1_800_000  # of made-up conversations, at most; then they are read again
_TOKENS_PER_PARAMETER = 20  # beyond the measured law: Hoffmann et al. 2022, table 3


class Length(NamedTuple):
    """The batch and the steps of a run."""

    rows: int
    steps: int


@dataclasses.dataclass(frozen=True)
class SpeedrunPlan:
    """What a speedrun trains. It is written down before the first step, and not changed by what comes after."""

    n_layer: int
    n_embd: int
    pretrain: Length
    chat: Length
    prediction: LossGuess | None
    """The loss of pretraining, for built-in text of a size that the law was measured for."""
    seconds: float
    """The time that both runs are expected to take."""

    def to_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        return found | {
            name: value._asdict() for name in ("pretrain", "chat", "prediction") if (value := getattr(self, name))
        }

    @classmethod
    def from_json(cls, read: Mapping[str, Any]) -> "SpeedrunPlan":
        guess = LossGuess(**read["prediction"]) if read["prediction"] else None
        lengths = {name: Length(**read[name]) for name in ("pretrain", "chat")}
        return cls(**{**read, **lengths, "prediction": guess})


class Frame(NamedTuple):
    """What models of all sizes have in common on a machine."""

    n_positions: int
    vocab_size: int
    devices: int
    is_cpu: bool

    def model(self, n_layer: int, n_embd: int) -> ModelConfig:
        return ModelConfig(
            n_layer=n_layer,
            n_head=n_embd // (32 if n_embd <= 384 else 64),
            n_embd=n_embd,
            n_positions=self.n_positions,
            dtype="float32" if self.is_cpu else "bfloat16",  # XLA's CPU matmuls are slower in bfloat16
        )

    def rows(self, tokens: float) -> int:
        """Sequences of a step, a multiple of the devices: 2,048 tokens in runs of up to 16 M tokens, and with the power
        0.85 of theirs from there to the half million of GPT-2's 10 billion. Larger ones leave a short run few steps."""
        wanted = 2048 * 2 ** max(0, round(0.85 * math.log2(max(tokens, 1) / 16e6))) / self.n_positions
        return self.devices * max(1, round(wanted / self.devices))

    def length(self, tokens: float) -> Length:
        rows = self.rows(tokens)
        return Length(rows, max(20, round(tokens / (rows * self.n_positions))))

    def shares(self, seconds: float, rate: float) -> tuple[float, float]:
        """Tokens of pretraining and of chat that `seconds` are enough for, at `rate` tokens a second."""
        chat = min(CHAT_SHARE * seconds * rate, MOST_CHAT)
        return seconds * rate - chat, chat

    def token_rate(self, n_layer: int, n_embd: int, measured: Sequence[StepTime]) -> float:
        """Tokens a second of training with a model of this size, by the steps that were measured."""
        config, rows = Config(model=self.model(n_layer, n_embd)), 8 * self.devices
        seconds = seconds_of(flops_of_step(config, self.vocab_size, rows), list(measured))
        return rows * self.n_positions / (SLOWER * seconds)


class ReachableSize(NamedTuple):
    """A size, and what it can reach in the time."""

    n_layer: int
    n_embd: int
    parameters: int
    """Without embeddings."""
    tokens: float
    """Of pretraining."""
    loss: float
    """By the law."""


def frame_for(minutes: float, devices: int, is_cpu: bool) -> Frame:
    """Short rows and a small vocabulary where the time is short."""
    if not is_cpu:
        return Frame(1024, 16384, devices, is_cpu)
    return Frame(256, 2048 if minutes <= 45 else 4096, devices, is_cpu)


def candidates(seconds: float, measured: Sequence[StepTime], frame: Frame) -> list[ReachableSize]:
    """What each size can reach in `seconds` of steps of both runs, the best first.

    By the law, or, where that leads beyond what was measured, the largest model with enough tokens for a parameter.
    """
    law, found = builtin_law(), []
    for size in SIZES:
        tokens = frame.shares(seconds, frame.token_rate(*size, measured))[0]
        parameters = without_embeddings(frame.model(*size))
        found.append(ReachableSize(*size, parameters, tokens, law.loss(parameters, max(tokens, 1.0))))
    found.sort(key=lambda each: each.loss)
    if law.predict(found[0].parameters, found[0].tokens) is None:
        is_enough = lambda each: each.tokens >= _TOKENS_PER_PARAMETER * each.parameters
        found.sort(key=lambda each: -each.parameters if is_enough(each) else each.parameters)
    return found


def settings_of(
    plan: SpeedrunPlan, stage: str, data: Mapping[str, Any], folder: str, seed: int, frame: Frame
) -> dict[str, Any]:
    """{"model.n_layer": 4, ...}: the config of the run `stage` ("pretrain" or "chat") in `folder`.

    `data` has the settings of [data] that the texts decide, {"source": ..., "path": ..., ...}.
    """
    model = frame.model(plan.n_layer, plan.n_embd)
    length: Length = getattr(plan, stage)
    every = max(1, length.steps // 5)
    settings: dict[str, Any] = {
        **{f"model.{name}": getattr(model, name) for name in ("n_layer", "n_head", "n_embd", "n_positions", "dtype")},
        **{f"data.{name}": value for name, value in data.items()},
        "data.on_bad_record": "skip",  # and counted: the time is short, and the report says what was left out
        "data.prepared_dir": f"{folder}/prepared",
        "tokenizer.type": "folder",
        "tokenizer.path": f"{folder}/tokenizer",
        "optimizer.name": "muon",
        **({"optimizer.learning_rate": CHAT_RATE} if stage == "chat" else {}),
        "optimizer.adam_beta2": 0.99,
        "optimizer.lr_scheduler_type": "cosine",
        "train.max_steps": length.steps,
        "train.per_device_train_batch_size": length.rows // frame.devices if frame.is_cpu else "auto",
        "train.global_batch_size": length.rows,
        "train.seed": seed,
        "eval.eval_steps": every,
        "eval.eval_batches": 40,
        "checkpoint.save_steps": every,
        "log.logging_steps": max(1, length.steps // 40),
    }
    if stage == "pretrain":
        return settings | {"data.validation_fraction": 0.03}
    return settings | {
        "data.format": "chat",
        "data.validation_fraction": 0.02,
        "init.from_checkpoint": f"{folder}/pretrain@best",
    }
