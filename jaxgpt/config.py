"""Every setting, once: typed, frozen, validated when built. No jax import.

The name of a field is Hugging Face's where `TrainingArguments` or `GPT2Config` has the thing. The text
under a field is its help; `python -m jaxgpt.train --help` prints it with the type and the default.
Reading TOML files and the command line is `cli.py`'s work.
"""

import dataclasses
from typing import Annotated, Literal, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

section = dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True),
)


class UserError(Exception):
    """The user's input is wrong: one line that says what, where, and the fix. Exit code 2."""


@section
class ModelConfig:
    n_layer: PositiveInt = 12
    """Transformer blocks."""
    n_head: PositiveInt = 12
    """Attention heads; must divide n_embd."""
    n_embd: PositiveInt = 768
    """Width of the residual stream."""
    n_positions: PositiveInt = 1024
    """Learned positions: the longest sequence the model can read, in tokens."""
    dropout: Fraction = 0.0
    """Dropout rate on embeddings, attention weights and residual branches (GPT-2's three rates in one)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type of matmuls and activations; parameters, softmax, LayerNorm statistics and loss stay float32."""
    scan_layers: bool = False
    """Run the layers under lax.scan instead of a Python loop: compiles faster, runs slower; same parameters."""
    remat: Literal["none", "dots", "block"] = "none"
    """What the backward pass recomputes: nothing, all but matmuls and the attention kernel, or each whole block."""
    attention: Literal["auto", "flash", "cudnn", "xla"] = "auto"
    """How attention is computed: flash is a TPU kernel, cudnn NVIDIA's, xla runs anywhere; auto fits the device."""


@section
class TokenizerConfig:
    type: Literal["bpe", "char", "folder"] = "bpe"
    """bpe trains a byte-level BPE on the data; char is one token a character; folder loads tokenizer.path."""
    path: str | None = None
    """Hugging Face tokenizer folder, or hf:NAME for that of a model on the hub; for type = folder."""
    vocab_size: Annotated[int, Field(ge=257)] = 8192
    """Entries of a trained BPE, the 256 bytes and the end-of-text token included."""
    train_bytes: PositiveInt = 20_000_000
    """The BPE is trained on documents spread evenly over the corpus, up to this many bytes of UTF-8."""
    special_tokens: tuple[str, ...] = ()
    """Tokens added to the vocabulary, one id each, that ordinary text never becomes (roles of a chat)."""


@section
class DataConfig:
    source: Annotated[str, Field(pattern=r"^(stdlib|text|jsonl|tfds:.+)$")] = "stdlib"
    """Where documents come from: stdlib (this Python's own library), text, jsonl, or tfds:NAME."""
    path: str | None = None
    """File or folder for text and jsonl; the TFDS data_dir for tfds:NAME."""
    text_field: str = "text"
    """Field that holds the document, for jsonl and tfds."""
    max_bytes: PositiveInt | None = None
    """Stop reading the source after this many bytes of UTF-8; none reads it all."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share held out: whole documents, or the tail of a single one; a TFDS validation split goes before it."""
    prepared_dir: str = "prepared"
    """Folder that holds prepared datasets, one subfolder for each combination of data and tokenizer settings."""
    block_size: PositiveInt | None = None
    """Tokens in a training window; none means model.n_positions."""
    num_threads: PositiveInt = 2
    """Threads of a process that read and assemble batches."""
    prefetch_batches: PositiveInt = 4
    """Batches kept ready ahead of the step."""
    verify: Literal["digests", "sizes"] = "digests"
    """Check of the prepared data at each start: every byte (about a second a GB), or the sizes of the shards."""


@section
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of the weight matrices and leaves the rest to AdamW."""
    learning_rate: PositiveFloat = 6e-4
    """Peak learning rate of AdamW."""
    muon_learning_rate: PositiveFloat = 0.02
    """Peak learning rate of the matrices under muon; same schedule."""
    lr_scheduler_type: Literal["constant", "linear", "cosine", "inverse_sqrt", "warmup_stable_decay"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 100
    """Steps over which the learning rate rises linearly from 0 to its peak."""
    min_lr_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final learning rate as a share of the peak, for linear, cosine and warmup_stable_decay."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of max_steps that warmup_stable_decay spends decaying."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay on matrices and embeddings; biases and LayerNorms are never decayed."""
    adam_beta1: Fraction = 0.9
    """Decay of the first moment."""
    adam_beta2: Fraction = 0.95
    """Decay of the second moment."""
    adam_mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the first moment is kept; bfloat16 saves 2 bytes a parameter."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""


@section
class TrainConfig:
    max_steps: PositiveInt | None = None
    """Optimizer steps; when given, it goes before num_train_epochs."""
    num_train_epochs: PositiveFloat = 1.0
    """Passes over the training tokens."""
    per_device_train_batch_size: PositiveInt | Literal["auto"] = 8
    """Sequences a micro-batch holds on each device of the data and fsdp axes; auto takes the most that fit."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches whose gradients are summed inside one step; none derives it from global_batch_size, else 1."""
    global_batch_size: PositiveInt | None = None
    """Sequences in one step over all devices; none means per-device size x devices x accumulation."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Seed of the initial weights, the order of the data and dropout."""
    compilation_cache_dir: str = "~/.cache/jaxgpt/xla"
    """Folder that keeps compiled programs for the next start; empty turns it off."""


@section
class MeshConfig:
    data: Annotated[int, Field(ge=-1)] = -1
    """Devices that hold copies of the model and split the batch; -1 takes all that are left."""
    fsdp: PositiveInt = 1
    """Devices that split the batch and the parameters."""
    tensor: PositiveInt = 1
    """Devices that split heads, the MLP and the vocabulary; must divide n_head."""
    zero1: bool = True
    """Split the optimizer state over the data axis (ZeRO stage 1)."""
    distributed: Literal["auto", "on", "off"] = "auto"
    """Train with the processes of other hosts: on requires them, off is this one alone, auto asks the environment."""


@section
class CheckpointConfig:
    save_steps: PositiveInt = 500
    """Steps between checkpoints; the last step is always saved."""
    save_total_limit: PositiveInt = 2
    """Latest checkpoints kept."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss besides; save_steps must then be a multiple of eval_steps."""


@section
class FaultsConfig:
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    """What to do at a loss or gradient that is no number, or a spike: stop; skip the update; or go back to the last
    checkpoint and on with other data."""
    spike_sigma: NonNegativeFloat = 0.0
    """A loss or gradient norm this many standard deviations above the mean of the last 128 steps is bad; 0: never."""
    max_bad_steps: PositiveInt = 10
    """Bad steps in a row, or rollbacks without a new checkpoint between them, after which the run stops."""
    hang_seconds: NonNegativeFloat = 300.0
    """No step for this long, and for ten times the usual, ends the run with every thread's stack; 0: never."""
    host_timeout_seconds: Annotated[float, Field(ge=2)] = 15.0
    """Another host that gives no sign of life for this long is taken for dead, and the run ends on all of them."""


@section
class EvalConfig:
    eval_steps: PositiveInt = 500
    """Steps between evaluations; the last step is always evaluated."""
    eval_batches: PositiveInt | None = None
    """Validation batches of an evaluation; none reads the whole split."""
    per_device_eval_batch_size: PositiveInt | None = None
    """Sequences on each device during evaluation; none means per_device_train_batch_size."""
    sample_prompt: str = ""
    """Prompt continued at each evaluation; empty starts from the end-of-text token."""
    sample_tokens: NonNegativeInt = 100
    """Tokens sampled at each evaluation; 0 turns it off."""


@section
class LogConfig:
    logging_steps: PositiveInt = 10
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    wandb_project: str | None = None
    """Also send the metrics to this Weights & Biases project (pip install wandb)."""
    profile: Annotated[str, Field(pattern=r"^(|[1-9][0-9]*:[1-9][0-9]*)$")] = ""
    """Steps to trace for XProf, first:last (10:13); empty for none."""


@section
class InitConfig:
    from_checkpoint: str | None = None
    """Start from the weights of this jaxgpt run or step folder, with a fresh optimizer; none starts from scratch."""
    from_huggingface: str | None = None
    """Start from the GPT-2 weights of this Hugging Face folder or hub name (gpt2), with a fresh optimizer."""


@section
class Config:
    """All settings of an experiment. Build it with `cli.load_config` or directly; either way it is validated."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    faults: FaultsConfig = dataclasses.field(default_factory=FaultsConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)

    def __post_init__(self):
        _check_shapes(self)
        _check_schedule(self)
        _check_names(self)

    @property
    def block_size(self) -> int:
        """Tokens in a training window."""
        return self.data.block_size or self.model.n_positions


def _check_shapes(config: Config) -> None:
    model, mesh = config.model, config.mesh
    if model.n_embd % model.n_head:
        raise UserError(f"model.n_head = {model.n_head} does not divide model.n_embd = {model.n_embd}")
    if model.n_head % mesh.tensor:
        raise UserError(f"mesh.tensor = {mesh.tensor} does not divide model.n_head = {model.n_head}")
    if config.block_size > model.n_positions:
        raise UserError(f"data.block_size = {config.block_size} is longer than model.n_positions = {model.n_positions}")
    if mesh.data == 0:
        raise UserError("mesh.data = 0: give a number of devices, or -1 for all that are left")
    if config.data.source in ("text", "jsonl") and not config.data.path:
        raise UserError(f'data.source = "{config.data.source}" needs data.path, a file or a folder')
    if config.tokenizer.type == "folder" and not config.tokenizer.path:
        raise UserError('tokenizer.type = "folder" needs tokenizer.path, a Hugging Face tokenizer folder')


def _check_schedule(config: Config) -> None:
    save, evaluate, steps = config.checkpoint.save_steps, config.eval.eval_steps, config.train.max_steps
    if config.checkpoint.keep_best and save % evaluate:
        raise UserError(
            f"checkpoint.save_steps = {save} is not a multiple of eval.eval_steps = {evaluate}, "
            "so the best checkpoint cannot be known; change one or set checkpoint.keep_best = false"
        )
    if steps and config.optimizer.warmup_steps > steps:
        raise UserError(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} is more than train.max_steps = {steps}"
        )
    if config.log.profile:
        first, last = (int(step) for step in config.log.profile.split(":"))
        if last < first:
            raise UserError(f"log.profile = {config.log.profile} ends before it begins; give first:last, such as 10:13")
        if steps and last > steps:
            raise UserError(f"log.profile = {config.log.profile} goes beyond the last step, train.max_steps = {steps}")
    if steps and config.optimizer.lr_scheduler_type == "warmup_stable_decay":
        decay = round(config.optimizer.decay_rate * steps)
        if config.optimizer.warmup_steps + decay > steps:
            raise UserError(
                f"optimizer.warmup_steps = {config.optimizer.warmup_steps} and the {decay} steps of "
                f"optimizer.decay_rate are more than train.max_steps = {steps}"
            )


def _check_names(config: Config) -> None:
    init, tokens = config.init, config.tokenizer.special_tokens
    if init.from_checkpoint and init.from_huggingface:
        raise UserError(
            f"init.from_checkpoint = {init.from_checkpoint} and init.from_huggingface = {init.from_huggingface} "
            "are both set, but a run starts from one of them; leave the other out"
        )
    if "" in tokens:
        raise UserError("tokenizer.special_tokens holds an empty text; leave it out")
    for token in tokens:
        if tokens.count(token) > 1:
            raise UserError(f"tokenizer.special_tokens names {token!r} {tokens.count(token)} times; name it once")


def to_json(config: Config) -> str:
    return TypeAdapter(Config).dump_json(config, indent=2).decode()


def from_json(text: str) -> Config:
    """The Config that `to_json` wrote.

    Raises:
        UserError: the text is no config, or one of another version.
    """
    try:
        return TypeAdapter(Config).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"not a config of this version of jaxgpt: {where}: {first['msg']}") from None


def flatten(config: Config) -> dict[str, object]:
    """{"model.n_layer": 12, ...}: every setting under its dotted name."""
    return {
        f"{name}.{key}": value for name, fields in dataclasses.asdict(config).items() for key, value in fields.items()
    }


# May a setting change between two starts of one run? Each stands here once, by itself or with its section.
# fmt: off
ON_RESUME: dict[str, tuple[str, ...]] = {
    # Where and how it runs and is watched, not what it computes.
    "free": (
        "mesh", "checkpoint", "faults", "eval", "log",
        "model.scan_layers", "model.remat", "model.attention",  # the same sums, rounded in another order
        "tokenizer.path", "data.path",  # may be moved: their contents are compared by digest
        "data.prepared_dir", "data.num_threads", "data.prefetch_batches", "data.verify",
        "train.per_device_train_batch_size", "train.gradient_accumulation_steps",  # they share out the same rows
        "train.num_train_epochs",  # becomes max_steps, and is compared there
        "train.compilation_cache_dir",
    ),
    # Changes what follows and not what was: `train --force` accepts it.
    "forced": (
        "model.dropout", "model.dtype",
        "optimizer.learning_rate", "optimizer.muon_learning_rate", "optimizer.lr_scheduler_type",
        "optimizer.warmup_steps", "optimizer.min_lr_rate", "optimizer.decay_rate", "optimizer.weight_decay",
        "optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_epsilon", "optimizer.max_grad_norm",
        "train.max_steps",  # the schedule is stretched over it; free where it is not (ENDLESS)
    ),
    # Another experiment.
    "refused": (
        "model.n_layer", "model.n_head", "model.n_embd", "model.n_positions",
        "tokenizer.type", "tokenizer.vocab_size", "tokenizer.train_bytes", "tokenizer.special_tokens",
        "data.source", "data.text_field", "data.max_bytes",
        "data.validation_fraction",  # it would train on documents that were held out
        # Row r of step s is window s * global_batch_size + r, of block_size tokens. Another value would repeat
        # windows or skip them from the first step on, and the tokens of the steps before would be counted wrong.
        "data.block_size", "train.global_batch_size",
        "optimizer.name", "optimizer.adam_mu_dtype",  # they decide what the stored state of the optimizer is
        "train.seed",  # the order of the data, too
        "init",
    ),
}
# fmt: on
ENDLESS = ("constant", "inverse_sqrt")  # schedules that do not know max_steps

# None in a config that a user wrote, a number once devices and data are known.
RESOLVED = ("data.block_size", "train.global_batch_size", "train.max_steps")


class Change(NamedTuple):
    """A setting with another value than the run had so far."""

    old: object
    new: object
    kind: str
    """A key of ON_RESUME."""

    def __str__(self) -> str:
        return f"was {self.old}, now {self.new}"


def resume_conflicts(old: Config, new: Config) -> dict[str, Change]:
    """The settings in which `new` differs from the resolved `old`: {name: Change}.

    `new` may be unresolved; what it leaves open is no difference yet.
    """
    before, after = flatten(old), flatten(new)
    kinds = {entry: kind for kind, entries in ON_RESUME.items() for entry in entries}
    if {old.optimizer.lr_scheduler_type, new.optimizer.lr_scheduler_type} <= set(ENDLESS):
        kinds["train.max_steps"] = "free"
    return {
        name: Change(before[name], after[name], kinds.get(name) or kinds[name.split(".")[0]])
        for name in before
        if before[name] != after[name] and not (name in RESOLVED and after[name] is None)
    }
