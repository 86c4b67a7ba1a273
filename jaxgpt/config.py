"""The settings of an experiment as one `Config`: built from TOML files and overrides, written and read as JSON.

A config file holds sections of settings; `base = "other.toml"` names a file whose settings it starts from. Overrides
(`--section.field value` on the command line) go before both. No jax import.
"""

import dataclasses
import difflib
import functools
import json
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from jaxgpt import settings
from jaxgpt.errors import UserError
from jaxgpt.settings import section, sources_of


@section(frozen=True, kw_only=True)
class Config:
    """All settings of an experiment. Build it with `load_config` or directly; either way it is validated."""

    model: settings.ModelConfig = dataclasses.field(default_factory=settings.ModelConfig)
    tokenizer: settings.TokenizerConfig = dataclasses.field(default_factory=settings.TokenizerConfig)
    data: settings.DataConfig = dataclasses.field(default_factory=settings.DataConfig)
    cleaning: settings.CleaningConfig = dataclasses.field(default_factory=settings.CleaningConfig)
    chat: settings.ChatConfig = dataclasses.field(default_factory=settings.ChatConfig)
    augmentation: settings.AugmentationConfig = dataclasses.field(default_factory=settings.AugmentationConfig)
    optimizer: settings.OptimizerConfig = dataclasses.field(default_factory=settings.OptimizerConfig)
    train: settings.TrainConfig = dataclasses.field(default_factory=settings.TrainConfig)
    mesh: settings.MeshConfig = dataclasses.field(default_factory=settings.MeshConfig)
    checkpoint: settings.CheckpointConfig = dataclasses.field(default_factory=settings.CheckpointConfig)
    faults: settings.FaultsConfig = dataclasses.field(default_factory=settings.FaultsConfig)
    eval: settings.EvalConfig = dataclasses.field(default_factory=settings.EvalConfig)
    log: settings.LogConfig = dataclasses.field(default_factory=settings.LogConfig)
    init: settings.InitConfig = dataclasses.field(default_factory=settings.InitConfig)

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_data(self)
        _check_schedule(self)
        _check_start(self)

    @property
    def block_size(self) -> int:
        """Tokens in a training window."""
        return self.data.block_size or self.model.n_positions

    # What a user may leave open, once the devices and the data have settled it (training/start.py); settings.py says
    # what each is.

    @property
    def max_steps(self) -> int:
        return _resolved(self.train.max_steps)

    @property
    def global_batch_size(self) -> int:
        return _resolved(self.train.global_batch_size)

    @property
    def gradient_accumulation_steps(self) -> int:
        return _resolved(self.train.gradient_accumulation_steps)

    @property
    def per_device_train_batch_size(self) -> int:
        return _resolved(self.train.per_device_train_batch_size)

    @property
    def per_device_eval_batch_size(self) -> int:
        return self.eval.per_device_eval_batch_size or self.per_device_train_batch_size


# ---------------------------------------------------------------- settings that contradict each other: both are named


def _check_shapes(config: Config) -> None:
    model, mesh, data = config.model, config.mesh, config.data
    if model.n_embd % model.n_head:
        raise UserError(f"model.n_head = {model.n_head} does not divide model.n_embd = {model.n_embd}")
    if model.n_head % mesh.tensor:
        raise UserError(f"mesh.tensor = {mesh.tensor} does not divide model.n_head = {model.n_head}")
    if data.block_size and data.block_size > model.n_positions:
        raise UserError(f"data.block_size = {data.block_size} is longer than model.n_positions = {model.n_positions}")
    if mesh.data == 0:
        raise UserError("mesh.data = 0: give a number of devices, or -1 for all that are left")


def _check_data(config: Config) -> None:
    data, tokenizer, augmentation = config.data, config.tokenizer, config.augmentation
    for part in sources_of(data):
        if part.source in ("text", "html", "jsonl", "parquet", "sgd") and not part.path:
            where = "data.path" if isinstance(data.source, str) else "a path in its table"
            raise UserError(f'data.source = "{part.source}" needs {where}, a file or a folder')
    if tokenizer.type == "folder" and not tokenizer.path:
        raise UserError('tokenizer.type = "folder" needs tokenizer.path, a Hugging Face tokenizer folder')
    if data.format == "text" and augmentation.copies:
        raise UserError('augmentation.copies is for conversations: set data.format = "chat", or leave it out')
    changes = ("shuffle_sentences", "synonym_rate", "typo_rate", "drop_turns")
    if augmentation.copies and not any(getattr(augmentation, name) for name in changes):
        raise UserError(f"augmentation.copies makes copies without a change; set one of {', '.join(changes)}")
    if augmentation.synonym_rate and not augmentation.synonyms:
        raise UserError("augmentation.synonym_rate needs augmentation.synonyms, a file of words")


def _check_schedule(config: Config) -> None:
    optimizer, evaluation, checkpoint, log = config.optimizer, config.eval, config.checkpoint, config.log
    save, evaluate, steps = checkpoint.save_steps, evaluation.eval_steps, config.train.max_steps
    if checkpoint.keep_best and save % evaluate:
        raise UserError(
            f"checkpoint.save_steps = {save} is not a multiple of eval.eval_steps = {evaluate}, "
            "so the best checkpoint cannot be known; change one or set checkpoint.keep_best = false"
        )
    if evaluation.early_stopping_patience and not checkpoint.keep_best:
        raise UserError(
            f"eval.early_stopping_patience = {evaluation.early_stopping_patience} needs checkpoint.keep_best = true, "
            "since the run ends with its best checkpoint; set it, or leave the patience out"
        )
    if steps and optimizer.warmup_steps > steps:
        raise UserError(f"optimizer.warmup_steps = {optimizer.warmup_steps} is more than train.max_steps = {steps}")
    if log.profile:
        first, last = (int(step) for step in log.profile.split(":"))
        if last < first:
            raise UserError(f"log.profile = {log.profile} ends before it begins; give first:last, such as 10:13")
        if steps and last > steps:
            raise UserError(f"log.profile = {log.profile} goes beyond the last step, train.max_steps = {steps}")
    if steps and optimizer.lr_scheduler_type == "warmup_stable_decay":
        decay = round(optimizer.decay_rate * steps)
        if optimizer.warmup_steps + decay > steps:
            raise UserError(
                f"optimizer.warmup_steps = {optimizer.warmup_steps} and the {decay} steps of "
                f"optimizer.decay_rate are more than train.max_steps = {steps}"
            )


def _check_start(config: Config) -> None:
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


# ---------------------------------------------------------------- a Config and its settings


def _resolved(value: int | str | None) -> int:
    assert isinstance(value, int), f"{value}: the config is not resolved yet"
    return value


def with_settings(config: Config, **values: object) -> Config:
    """`config` with other values: with_settings(config, model_remat="block", mesh_fsdp=8)."""
    changed: dict[str, dict] = {}
    for name, value in values.items():
        section, _, field = name.partition("_")
        changed.setdefault(section, {})[field] = value
    parts = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changed.items()}
    return dataclasses.replace(config, **parts)


def to_json(config: Config) -> str:
    """Every setting, as config.json holds it."""
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


def sections() -> dict[str, typing.Any]:
    """{"model": ModelConfig, ...}: the classes of settings.py."""
    return {field.name: field.type for field in dataclasses.fields(Config)}


def config_fields() -> dict[str, dataclasses.Field]:
    """{"model.n_layer": field, ...}, in the order of settings.py."""
    return {f"{name}.{field.name}": field for name, cls in sections().items() for field in dataclasses.fields(cls)}


# ---------------------------------------------------------------- files and overrides to a Config


def load_config(path: str | Path | None, overrides: dict[str, str] | None = None) -> Config:
    """Read `path` and its bases, apply `overrides` ({"model.n_layer": "4"}), validate.

    Raises:
        UserError: a missing file, bad TOML, an unknown key or a bad value; names the file and the key.
    """
    given: dict[str, tuple[object, str]] = {}  # with where it comes from
    for file in [] if path is None else _with_bases(Path(path)):
        given |= {key: (value, str(file)) for key, value in _read_settings(file).items()}
    given |= {key: (value, "command line") for key, value in (overrides or {}).items()}
    return _build(given)


def _with_bases(path: Path) -> list[Path]:
    """`path` preceded by the file it is based on, and that by its own, the root first."""
    chain = [path]
    while base := _read_toml(chain[-1]).get("base"):
        file = chain[-1].parent / base
        if file.resolve() in [seen.resolve() for seen in chain]:
            raise UserError(f"{file}: its chain of base files comes back to itself")
        chain.append(file)
    return chain[::-1]


@functools.cache
def _read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: no such config file{hint}") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable TOML file ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: TOML syntax error: {error}") from None


def _read_settings(path: Path) -> dict[str, object]:
    """{"model.n_layer": 4, ...} of one file, `base` left out."""
    found: dict[str, object] = {}
    for name, fields in _read_toml(path).items():
        if name == "base":
            continue
        if not isinstance(fields, dict):
            raise UserError(f"{path}: {unknown_setting(name)}")
        if name not in sections():
            raise UserError(f"{path}: there is no section [{name}]{_suggest(name, sections())}")
        found |= {f"{name}.{key}": value for key, value in fields.items()}
    return found


def _build(given: dict[str, tuple[object, str]]) -> Config:
    known = config_fields()
    nested: dict[str, dict] = {}
    for key, (value, origin) in given.items():
        if key not in known:
            raise UserError(f"{origin}: {unknown_setting(key)}")
        name, field = key.split(".")
        if value == "none" and type(None) in typing.get_args(known[key].type):
            value = None
        elif isinstance(value, str) and _takes_list(known[key].type, value):
            value = _read_list(value)
        nested.setdefault(name, {})[field] = value
    try:
        return Config(**{name: cls(**nested[name]) for name, cls in sections().items() if name in nested})
    except ValidationError as error:
        section = next(name for name, cls in sections().items() if cls.__name__ == error.title)
        first = error.errors()[0]
        key = f"{section}.{first['loc'][0]}"
        must = f"it must be {describe_type(known[key].type)}"
        raise UserError(f"{given[key][1]}: {key} = {first['input']!r}, but {must}") from None


def _takes_list(annotation: typing.Any, text: str) -> bool:
    """Is the text of a command line a list? Where the setting also allows text, only JSON is."""
    if typing.get_origin(annotation) is tuple:
        return True
    return any(typing.get_origin(arg) is tuple for arg in typing.get_args(annotation)) and text.lstrip().startswith("[")


def _read_list(text: str) -> list | str:
    """The list that a command line writes as JSON or with commas; text that is no JSON comes back as it is."""
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",")] if text else []
    try:
        return json.loads(text)
    except ValueError:
        return text  # which is no list: the settings' own check says so


def unknown_setting(key: str) -> str:
    """The complaint about a setting that does not exist, with the nearest one that does."""
    return f"there is no setting {key}{_suggest(key, config_fields())}"


def _suggest(word: str, known: Iterable[str]) -> str:
    """The nearest known name, comparing whole dotted names first and then the part after the dot."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.75)
    if not near:
        tails = {name.split(".")[-1]: name for name in names}
        near = [tails[t] for t in difflib.get_close_matches(word.split(".")[-1], tails, n=1)]
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names[:12])}"


_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def describe_type(annotation: typing.Any) -> str:
    """A field's type in a user's words: "int > 0 or none", "one of adamw, muon"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(args)
    if origin is tuple:
        return f"a list of {describe_type(args[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if origin is typing.Annotated:
        limits = args[1].metadata
        bounds = [f"{sign} {getattr(m, key)}" for m in limits for key, sign in _SIGNS if hasattr(m, key)]
        patterns = [f"matching {m.pattern}" for m in limits if hasattr(m, "pattern")]
        return " ".join([describe_type(args[0]), *patterns, " and ".join(bounds)]).strip()
    if dataclasses.is_dataclass(annotation):
        return "tables of " + ", ".join(field.name for field in dataclasses.fields(annotation))
    return {type(None): "none", bool: "true or false", str: "text"}.get(annotation, annotation.__name__)
