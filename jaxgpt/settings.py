"""Every setting, once: typed and frozen. No jax import.

The name of a field is Hugging Face's where `TrainingArguments` or `GPT2Config` has the thing. The text under a field
is its help; `python -m jaxgpt.train --help` prints it with the type and the default. `config.py` puts the sections
together, reads them from files, and says what must hold between them.
"""

import dataclasses
import functools
import hashlib
import json
import os
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import pydantic.dataclasses
from pydantic import AfterValidator, ConfigDict, Field

from jaxgpt.errors import UserError

if TYPE_CHECKING:  # type checkers understand the standard library's decorator best, and pydantic's makes the same class
    from dataclasses import dataclass as section
else:
    _config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    section = functools.partial(pydantic.dataclasses.dataclass, config=_config)

LARGEST = 2**63  # no number of steps, tokens or bytes reaches it
PositiveInt = Annotated[int, Field(gt=0, lt=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _expand(place: str) -> str:
    """`place` with the home folder in place of ~, also in a task such as choices=~/own.jsonl."""
    if min(place, default=" ") < " ":
        raise ValueError("has a control character; in TOML write 'C:\\temp' or \"C:/temp\"")
    form, equals, file = place.partition("=~")
    return form + equals[:1] + os.path.expanduser("~" + file) if equals else os.path.expanduser(place)


Place = Annotated[str, Field(), AfterValidator(_expand)]  # a file or a folder, or the name of something else


@section(frozen=True, kw_only=True)
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


@section(frozen=True, kw_only=True)
class TokenizerConfig:
    type: Literal["bpe", "char", "folder"] = "bpe"
    """bpe trains a byte-level BPE on the data; char is one token a character; folder loads tokenizer.path."""
    path: Place | None = None
    """Hugging Face tokenizer folder, or hf:NAME for that of a model on the hub; for type = folder."""
    vocab_size: Annotated[int, Field(ge=257, lt=LARGEST)] | None = None
    """Entries of a trained BPE, the 256 bytes and the end-of-text token included; a short text gives fewer. none: 8192,
    or as many as the text gives."""
    train_bytes: PositiveInt = 20_000_000
    """The BPE is trained on documents spread evenly over the corpus, up to this many bytes of UTF-8."""
    special_tokens: tuple[str, ...] = ()
    """Tokens added to the vocabulary, one id each, that ordinary text never becomes (roles of a chat)."""

    @property
    def entries(self) -> int:
        """The most entries that a trained BPE gets."""
        return self.vocab_size or 8192


_PLAIN = ("builtin", "stdlib", "docstrings", "text", "html", "jsonl", "parquet", "skills", "support", "sgd")
SOURCES = (*_PLAIN, "tfds:NAME", "huggingface:NAME")
Source = Annotated[str, Field(pattern=f"^({'|'.join(SOURCES)})$".replace("NAME", ".+"))]


@section(frozen=True, kw_only=True)
class SourceConfig:
    """One part of a mixture."""

    source: Source
    path: Place | None = None
    text_field: str = "text"
    weight: PositiveFloat = 1.0
    """Share of the text that comes from it, beside the weights of the others."""


@section(frozen=True, kw_only=True)
class DataConfig:
    source: Source | tuple[SourceConfig, ...] = "stdlib"
    """Where documents come from: stdlib (this Python's own library), docstrings (of the installed packages), builtin
    (three parts of docstrings, one of stdlib), text, html, jsonl, parquet, tfds:NAME,
    huggingface:NAME[:CONFIG][@REVISION], skills (made-up questions with answers that can be checked), support (made-up
    customer service dialogues), sgd (Schema-Guided Dialogue), or a list of them, each a table of source, path,
    text_field and weight."""
    path: Place | None = None
    """File or folder for text, html, jsonl, parquet and sgd; the TFDS data_dir for tfds:NAME."""
    text_field: str = "text"
    """Field that holds the document, for jsonl, parquet, tfds and huggingface."""
    encoding: str = "utf-8"
    """Encoding of text, html and jsonl files, by Python's name: gb18030, big5, utf-16, cp1252."""
    format: Literal["text", "chat"] = "text"
    """text: documents, every token is learned; chat: conversations, only their answers are learned, and
    beside them in a mixture sources of text, of which every token is."""
    on_bad_record: Literal["refuse", "skip"] = "refuse"
    """A record that cannot be used (broken JSON, a missing role, not UTF-8) ends the preparation, or is left out and
    counted in the report."""
    max_record_bytes: PositiveInt = 50_000_000
    """A longer JSON line or HTML page is a bad record; a text file comes in parts of at most 8 MB, or of this."""
    skills: tuple[str, ...] = ()
    """How often skills and languages come in the source skills, if not as usual: addition=4, service=0, chinese=0.5."""
    max_bytes: PositiveInt | None = None
    """Stop reading the source after this many bytes of UTF-8; none reads it all."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the text that is held out, of each source: whole short documents, the ends of long ones; a catalog's own
    validation split goes before it."""
    prepared_dir: Place = "prepared"
    """Folder that holds prepared datasets, one subfolder for each combination of data and tokenizer settings."""
    block_size: PositiveInt | None = None
    """Tokens in a training window; none means model.n_positions, or what a shorter text has."""
    verify: Literal["digests", "sizes"] = "digests"
    """Check of the prepared data at each start: every byte (about a second a GB), or the sizes of the shards."""
    num_proc: PositiveInt | None = None
    """Processes that clean and tokenize; none means one a core."""
    skip_list: Place | None = None
    """File of training rows that weigh nothing, one number a line, as `jaxgpt replay` writes it."""


@section(frozen=True, kw_only=True)
class CleaningConfig:
    """Steps that each document passes before it is tokenized, in this order; all are off by default."""

    html: bool = False
    """Take the text out of HTML."""
    fix_encoding: bool = False
    """Repair text that was decoded wrongly (mojibake)."""
    unicode: Literal["keep", "NFC", "NFKC"] = "keep"
    """Unicode normalisation; NFKC also turns full-width letters into plain ones."""
    control_characters: bool = False
    """Remove control characters other than line breaks and tabs, and invisible ones."""
    emoji: Literal["keep", "strip"] = "keep"
    """Emoji."""
    urls: Literal["keep", "mask"] = "keep"
    """mask writes <url> in place of web addresses."""
    emails: Literal["keep", "mask"] = "keep"
    """mask writes <email> in place of e-mail addresses."""
    whitespace: bool = False
    """Collapse runs of spaces and blank lines, and strip the ends of lines."""
    min_chars: NonNegativeInt = 0
    """Drop documents of fewer characters."""
    max_chars: PositiveInt | None = None
    """Drop documents of more characters."""
    max_symbol_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Drop documents with a larger share of characters that are neither letters, digits nor whitespace; 1 is off."""
    language: str = ""
    """Drop documents in other languages than these codes, commas between (en,zh); empty is off."""
    drop_duplicates: bool = False
    """Drop documents that were there before, letter for letter."""
    near_duplicates: Fraction = 0.0
    """Drop documents whose estimated Jaccard similarity with an earlier one is at least this (0.8); 0 is off."""


@section(frozen=True, kw_only=True)
class ChatConfig:
    """Conversations, where data.format = chat."""

    system: str = ""
    """System message of conversations that have none; empty for none."""
    packing: bool = True
    """Put several conversations into one row, hidden from each other; false pads each to a row of its own."""


@section(frozen=True, kw_only=True)
class AugmentationConfig:
    """Changed copies of training conversations; user turns are changed, answers never."""

    copies: NonNegativeInt = 0
    """Changed copies of each training conversation; 0 turns augmentation off."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of all changes."""
    shuffle_sentences: Fraction = 0.0
    """Chance that the sentences of a user turn change places."""
    synonyms: Place | None = None
    """File of words that may replace each other, one group a line, commas between."""
    synonym_rate: Fraction = 0.0
    """Chance of a word of the synonyms file to be replaced."""
    typo_rate: Fraction = 0.0
    """Chance of a letter to be mistyped."""
    drop_turns: Fraction = 0.0
    """Chance of a pair of turns before the last one to be left out."""


@section(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of the weight matrices and leaves the rest to AdamW."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate; none: 6e-4 for adamw, 0.015 for muon."""
    lr_scheduler_type: Literal["constant", "linear", "cosine", "inverse_sqrt", "warmup_stable_decay"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt | None = None
    """Steps over which the learning rate rises linearly from 0 to its peak; none: a tenth of the run, at most 100."""
    min_lr_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final learning rate as a share of the peak, for linear, cosine and warmup_stable_decay."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of max_steps that warmup_stable_decay spends decaying."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay on matrices and embeddings; biases and LayerNorms are never decayed."""
    adam_beta1: Fraction = 0.9
    """Decay of the first moment; under muon, of the matrices' momentum too."""
    adam_beta2: Fraction = 0.95
    """Decay of the second moment."""
    adam_mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the first moment is kept; bfloat16 saves 2 bytes a parameter."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or {"adamw": 6e-4, "muon": 0.015}[self.name]


@section(frozen=True, kw_only=True)
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


@section(frozen=True, kw_only=True)
class MeshConfig:
    data: Annotated[int, Field(ge=-1, lt=LARGEST)] = -1
    """Devices that hold copies of the model and split the batch; -1 takes all that are left."""
    fsdp: PositiveInt = 1
    """Devices that split the batch and the parameters."""
    tensor: PositiveInt = 1
    """Devices that split heads, the MLP and the vocabulary; must divide n_head."""
    zero1: bool = True
    """Split the optimizer state over the data axis (ZeRO stage 1)."""
    distributed: Literal["auto", "on", "off"] = "auto"
    """Train with the processes of other hosts: on requires them, off is this one alone, auto asks the environment."""


@section(frozen=True, kw_only=True)
class CheckpointConfig:
    save_steps: PositiveInt | None = None
    """Steps between checkpoints; the last step is always saved. none: as eval_steps, or a multiple of it."""
    save_total_limit: PositiveInt = 2
    """Latest checkpoints kept."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss besides; save_steps must then be a multiple of eval_steps."""


@section(frozen=True, kw_only=True)
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


@section(frozen=True, kw_only=True)
class EvalConfig:
    eval_steps: PositiveInt | None = None
    """Steps between evaluations; the last step is always evaluated. none: a tenth of the run, at most 500, or a near
    divisor of save_steps."""
    eval_batches: PositiveInt | None = None
    """Validation batches of an evaluation; none reads the whole split."""
    per_device_eval_batch_size: PositiveInt | None = None
    """Sequences on each device during evaluation; none means per_device_train_batch_size."""
    sample_prompt: str = ""
    """Prompt continued at each evaluation; empty starts from the end-of-text token. (A chat model: chat_prompts.)"""
    sample_tokens: NonNegativeInt = 100
    """Tokens sampled at each evaluation, the most of an answer; 0 turns it off."""
    chat_prompts: NonNegativeInt = 16
    """Validation conversations answered at each evaluation of a chat model, to see which answers stop; 0: none."""
    tasks: tuple[Place, ...] = ()
    """Questions scored at each evaluation, written as for `evaluate --task`; metrics eval_NAME_acc and so on."""
    early_stopping_patience: PositiveInt | None = None
    """Evaluations in a row without a better validation loss after which the run ends, and hf/ gets the best checkpoint;
    none: never. The learning rate stays as it is for all of max_steps. Needs checkpoint.keep_best."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """For early stopping a loss is better if it is lower than the best before it by more than this, in nats."""


@section(frozen=True, kw_only=True)
class LogConfig:
    logging_steps: PositiveInt = 10
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    wandb_project: str | None = None
    """Also send the metrics to this Weights & Biases project (pip install wandb)."""
    price_per_hour: NonNegativeFloat | None = None
    """Price of an hour of all devices, in a currency of yours: the card of the run says what it has cost."""
    profile: Annotated[str, Field(pattern=r"^(|[1-9][0-9]{0,9}:[1-9][0-9]{0,9})$")] = ""
    """Steps to trace for XProf, first:last (10:13); empty for none."""


@section(frozen=True, kw_only=True)
class InitConfig:
    from_checkpoint: Place | None = None
    """Start from the weights of this jaxgpt run or step folder, with a fresh optimizer; none starts from scratch."""
    from_huggingface: Place | None = None
    """Start from the GPT-2 weights of this Hugging Face folder or hub name (gpt2), with a fresh optimizer."""


def sources_of(data: DataConfig) -> tuple[SourceConfig, ...]:
    """The parts of the mixture; a single source is a mixture of one, and builtin is one of two."""
    parts = data.source
    if isinstance(parts, str):
        parts = (SourceConfig(source=parts, path=data.path, text_field=data.text_field),)
    return tuple(one for part in parts for one in (_builtin(part.weight) if part.source == "builtin" else [part]))


def _builtin(weight: float) -> list[SourceConfig]:
    """English prose beside code; the weights are shares of the text."""
    shares = (("docstrings", 0.75), ("stdlib", 0.25))
    return [SourceConfig(source=source, weight=share * weight) for source, share in shares]


# ---------------------------------------------------------------- types in words

_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def describe_type(annotation: Any) -> str:
    """A field's type in a user's words: "int > 0 or none", "one of adamw, muon"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal or annotation == Source:
        return "one of " + ", ".join(SOURCES if annotation == Source else args)
    if origin is tuple:
        return f"a list of {describe_type(args[0])}"
    if origin in (Union, UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if origin is Annotated:
        limits = [limit for limit in args[1].metadata if getattr(limit, "lt", None) != LARGEST]
        bounds = [f"{sign} {getattr(m, key)}" for m in limits for key, sign in _SIGNS if hasattr(m, key)]
        patterns = [f"matching {m.pattern}" for m in limits if hasattr(m, "pattern")]
        return " ".join([describe_type(args[0]), *patterns, " and ".join(bounds)]).strip()
    if dataclasses.is_dataclass(annotation):
        return "tables of " + ", ".join(field.name for field in dataclasses.fields(annotation))
    return {type(None): "none", bool: "true or false", str: "text"}.get(annotation, annotation.__name__)


def with_digest(plain: dict) -> dict:
    """The settings as JSON has them, and their SHA-256 under a key of its own."""
    return {**plain, "sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def remove_digest(read: object) -> None:
    """Take the key of `with_digest` away, if it is there; `UserError` where the settings have another digest."""
    if isinstance(read, dict) and (written := read.pop("sha256", None)) not in (None, with_digest(read)["sha256"]):
        raise UserError(
            f"is not as it was written; put that back, or delete its line sha256 ({written!s:.8}…) if you changed it"
        )
