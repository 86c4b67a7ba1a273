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

from jaxgpt import checks
from jaxgpt.errors import UserError
from jaxgpt.settings import (
    AugmentationConfig,
    ChatConfig,
    CheckpointConfig,
    CleaningConfig,
    DataConfig,
    EvalConfig,
    FaultsConfig,
    InitConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    section,
)


@section(frozen=True, kw_only=True)
class Config:
    """All settings of an experiment. Build it with `load_config` or directly; either way it is validated."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    cleaning: CleaningConfig = dataclasses.field(default_factory=CleaningConfig)
    chat: ChatConfig = dataclasses.field(default_factory=ChatConfig)
    augmentation: AugmentationConfig = dataclasses.field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    faults: FaultsConfig = dataclasses.field(default_factory=FaultsConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        checks.check_shapes(self.model, self.mesh, self.data)
        checks.check_data(self.data, self.tokenizer, self.augmentation)
        checks.check_schedule(self.train, self.optimizer, self.eval, self.checkpoint, self.log)
        checks.check_start(self.init, self.tokenizer)

    @property
    def block_size(self) -> int:
        """Tokens in a training window."""
        return self.data.block_size or self.model.n_positions

    # What a user may leave open, once the devices and the data have settled it (training/start.py).

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return _resolved(self.train.max_steps)

    @property
    def global_batch_size(self) -> int:
        """Sequences in one step, over all devices."""
        return _resolved(self.train.global_batch_size)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches in one step."""
        return _resolved(self.train.gradient_accumulation_steps)

    @property
    def per_device_train_batch_size(self) -> int:
        """Sequences of a micro-batch on each device of the data and fsdp axes."""
        return _resolved(self.train.per_device_train_batch_size)

    @property
    def per_device_eval_batch_size(self) -> int:
        """Sequences on each device of an evaluation."""
        return self.eval.per_device_eval_batch_size or self.per_device_train_batch_size


def _resolved(value: int | str | None) -> int:
    assert isinstance(value, int), f"{value}: the config is not resolved yet"
    return value


def with_settings(config: Config, **settings: object) -> Config:
    """`config` with other values: with_settings(config, model_remat="block", mesh_fsdp=8)."""
    changed: dict[str, dict] = {}
    for name, value in settings.items():
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
    settings: dict[str, object] = {}
    origin: dict[str, str] = {}
    if path is not None:
        for file in _with_bases(Path(path)):
            for key, value in _read_settings(file).items():
                settings[key], origin[key] = value, str(file)
    for key, value in (overrides or {}).items():
        settings[key], origin[key] = value, "command line"
    return _build(settings, origin)


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
        raise UserError(f"{path}: no such config file{_nearest_file(path)}") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable TOML file ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: TOML syntax error: {error}") from None


def _nearest_file(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _read_settings(path: Path) -> dict[str, object]:
    """{"model.n_layer": 4, ...} of one file, `base` left out."""
    settings: dict[str, object] = {}
    for name, fields in _read_toml(path).items():
        if name == "base":
            continue
        if not isinstance(fields, dict):
            raise UserError(f"{path}: {unknown_setting(name)}")
        if name not in sections():
            raise UserError(f"{path}: there is no section [{name}]{_suggest(name, sections())}")
        settings |= {f"{name}.{key}": value for key, value in fields.items()}
    return settings


def _build(settings: dict[str, object], origin: dict[str, str]) -> Config:
    known = config_fields()
    for key in settings:
        if key not in known:
            raise UserError(f"{origin[key]}: {unknown_setting(key)}")
    nested: dict[str, dict] = {}
    for key, value in settings.items():
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
        raise UserError(
            f"{origin[key]}: {key} = {first['input']!r}, but it must be {describe_type(known[key].type)}"
        ) from None


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
