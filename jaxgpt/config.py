"""The settings of an experiment as one `Config`: built from TOML files and overrides, written and read as JSON.

A config file holds sections of settings; `base = "other.toml"` names a file whose settings it starts from. Overrides
(`--section.field value` on the command line) go before both. No jax import.
"""

import dataclasses
import difflib
import json
import logging
import math
import os
import re
import tomllib
import typing
from collections.abc import Iterable
from pathlib import Path

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from jaxgpt import settings
from jaxgpt.errors import UserError
from jaxgpt.settings import describe_type, remove_digest, section, sources_of, with_digest

logger = logging.getLogger(__name__)
# Settings of earlier versions, whose files are still read.
REMOVED = ("data.num_threads", "data.prefetch_batches", "train.compilation_cache_dir", "optimizer.muon_learning_rate")
LARGEST_FILE = 100_000  # bytes of a config file; a hundred settings take ten


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
        return _resolved("train.max_steps", self.train.max_steps)

    @property
    def global_batch_size(self) -> int:
        return _resolved("train.global_batch_size", self.train.global_batch_size)

    @property
    def gradient_accumulation_steps(self) -> int:
        return _resolved("train.gradient_accumulation_steps", self.train.gradient_accumulation_steps)

    @property
    def per_device_train_batch_size(self) -> int:
        return _resolved("train.per_device_train_batch_size", self.train.per_device_train_batch_size)

    @property
    def per_device_eval_batch_size(self) -> int:
        return self.eval.per_device_eval_batch_size or self.per_device_train_batch_size

    # What follows from the length of the run where it is not set.

    @property
    def warmup_steps(self) -> int:
        if self.optimizer.warmup_steps is not None:
            return self.optimizer.warmup_steps
        stable = self.optimizer.lr_scheduler_type == "warmup_stable_decay"
        decay = round(self.optimizer.decay_rate * self.max_steps) if stable else 0
        return min(100, self.max_steps // 10, self.max_steps - decay)

    @property
    def eval_steps(self) -> int:
        save = self.checkpoint.save_steps if self.checkpoint.keep_best else None
        if self.eval.eval_steps or not save:
            return self.eval.eval_steps or self._tenth
        divisors = [n for n in range(1, min(save, 2 * self._tenth) + 1) if save % n == 0]
        return min([*divisors, save], key=lambda n: abs(math.log(n / self._tenth)))

    @property
    def save_steps(self) -> int:
        every = self.eval.eval_steps if self.checkpoint.keep_best else None
        return self.checkpoint.save_steps or (every or 1) * max(self._tenth // (every or 1), 1)

    @property
    def _tenth(self) -> int:
        return min(max(self.max_steps // 10, 1), 500)


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
    if not sources_of(data):
        raise UserError('data.source = [] names no source; give one, such as "text" with data.path, or leave it out')
    for part in sources_of(data):
        if part.source in ("text", "html", "jsonl", "parquet", "sgd") and not part.path:
            where = "data.path" if isinstance(data.source, str) else "a path in its table"
            raise UserError(f'data.source = "{part.source}" needs {where}, a file or a folder')
    if data.skills and not any(part.source == "skills" for part in sources_of(data)):
        raise UserError('data.skills is for data.source = "skills": set that, or leave it out')
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
    warmup = optimizer.warmup_steps or 0
    if checkpoint.keep_best and save and evaluate and save % evaluate:
        raise UserError(
            f"checkpoint.save_steps = {save} is not a multiple of eval.eval_steps = {evaluate}, "
            "so the best checkpoint cannot be known; change one or set checkpoint.keep_best = false"
        )
    if evaluation.early_stopping_patience and not checkpoint.keep_best:
        raise UserError(
            f"eval.early_stopping_patience = {evaluation.early_stopping_patience} needs checkpoint.keep_best = true, "
            "since the run ends with its best checkpoint; set it, or leave the patience out"
        )
    if steps and warmup > steps:
        raise UserError(f"optimizer.warmup_steps = {warmup} is more than train.max_steps = {steps}")
    if log.profile:
        first, last = (int(step) for step in log.profile.split(":"))
        if last < first:
            raise UserError(f"log.profile = {log.profile} ends before it begins; give first:last, such as 10:13")
        if steps and last > steps:
            raise UserError(f"log.profile = {log.profile} goes beyond the last step, train.max_steps = {steps}")
    if steps and optimizer.lr_scheduler_type == "warmup_stable_decay":
        decay = round(optimizer.decay_rate * steps)
        if warmup + decay > steps:
            raise UserError(
                f"optimizer.warmup_steps = {warmup} and the {decay} steps of "
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


def _resolved(name: str, value: int | str | None) -> int:
    if not isinstance(value, int):
        raise UserError(f"{name} is {value or 'none'}, where a run that has started has a number")
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
    """Every setting, as config.json holds it, and the digest of them all."""
    return json.dumps(with_digest(TypeAdapter(Config).dump_python(config, mode="json")), indent=2)


def from_json(text: str | bytes) -> Config:
    """The Config that `to_json` wrote, now or earlier; `UserError` where the text is none, or was changed since."""
    try:
        read = pydantic_core.from_json(text)
    except ValueError as error:  # also of what is not UTF-8, or nested too deeply
        raise UserError(f"not a config of jaxgpt: {error}") from None
    remove_digest(read)
    for part, _, name in (removed.partition(".") for removed in REMOVED):
        if isinstance(read, dict) and isinstance(read.get(part), dict):
            read[part].pop(name, None)
    try:
        return TypeAdapter(Config).validate_python(read)
    except ValidationError as error:
        where, told = error.errors()[0]["loc"] or ["the file"], error.errors()[0]["msg"]
        raise UserError(f"not a config of this version of jaxgpt: {'.'.join(map(str, where))}: {told}") from None


def read_json(file: Path) -> Config:
    """The Config in a config.json. Raises UserError, which names the file."""
    try:
        return from_json(file.read_bytes())
    except (OSError, UserError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', error)}") from None


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
    for file, content in [] if path is None else _with_bases(Path(path)):
        given |= {key: (value, str(file)) for key, value in _settings_in(file, content).items()}
    given |= {key: (value, "command line") for key, value in (overrides or {}).items()}
    return _build(given)


def _with_bases(path: Path) -> list[tuple[Path, dict]]:
    """`path` and its content, preceded by the file it is based on, and that by its own, the root first."""
    chain = [(path, _read_toml(path))]
    while (base := chain[-1][1].get("base")) is not None:
        if not isinstance(base, str) or not base.strip() or "\0" in base:
            raise UserError(f"{chain[-1][0]}: base = {_shown(base)}, but it must be the name of another config file")
        file = chain[-1][0].parent / os.path.expanduser(base)
        if any(os.path.realpath(file) == os.path.realpath(seen) for seen, _ in chain):
            raise UserError(f"{file}: its chain of base files comes back to itself")
        chain.append((file, _read_toml(file)))
    return chain[::-1]


def _read_toml(path: Path) -> dict:
    content = b""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE or content.count(b".") > LARGEST_FILE / 50:  # keys of many parts take long
            raise UserError(f"{path}: more than {LARGEST_FILE:,} bytes, or all dots, so it is no config file")
        return tomllib.loads(content.decode("utf-8-sig"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: no such config file{hint}") from None
    except OSError as error:
        raise UserError(f"{path}: not a readable TOML file ({error.strerror})") from None
    except (RecursionError, ValueError) as error:
        if b"\0" in content or content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: the file is UTF-16; save it as UTF-8") from None
        if isinstance(error, UnicodeDecodeError):
            line = content.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path}:{line}: not UTF-8, but TOML must be; save the file as UTF-8") from None
        if isinstance(error, RecursionError):
            raise UserError(f"{path}: nested too deeply; a config has sections and settings") from None
        hint = "; write a Windows path in single quotes, or with /" if re.search(r"'\\'|hex", str(error)) else ""
        raise UserError(f"{path}: TOML syntax error: {error}{hint}") from None


def _settings_in(path: Path, content: dict) -> dict[str, object]:
    """{"model.n_layer": 4, ...} of the content of a file, `base` left out."""
    found: dict[str, object] = {}
    for name, fields in ((name, fields) for name, fields in content.items() if name != "base"):
        if not isinstance(fields, dict):
            raise UserError(f"{path}: {unknown_setting(name)}")
        if name not in sections():
            raise UserError(f"{path}: there is no section [{name}]{_suggest(name, sections())}")
        found |= {f"{name}.{key}": value for key, value in fields.items()}
    for key in sorted(found.keys() & {*REMOVED}):
        logger.warning("%s: %s; it does nothing", path, unknown_setting(key))
        del found[key]
    return found


def _build(given: dict[str, tuple[object, str]]) -> Config:
    known = config_fields()
    nested: dict[str, dict] = {}
    for key, (value, origin) in given.items():
        if key not in known:
            raise UserError(f"{origin}: {unknown_setting(key)}")
        name, field = key.split(".")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):  # bytes of the command line
            raise UserError(f"{origin}: {key} = {_shown(value)} is not UTF-8")
        if value == "none" and type(None) in typing.get_args(known[key].type):
            value = None
        elif isinstance(value, str) and _takes_list(known[key].type, value):
            value = _read_list(value)
        elif isinstance(value, bool) and known[key].type is not bool:  # which pydantic takes for 0 or 1
            raise UserError(f"{origin}: {key} = {_shown(value)}, but it must be {describe_type(known[key].type)}")
        nested.setdefault(name, {})[field] = value
    try:
        return Config(**{name: cls(**nested[name]) for name, cls in sections().items() if name in nested})
    except ValidationError as error:
        name = next(name for name, cls in sections().items() if cls.__name__ == error.title)
        key = f"{name}.{error.errors()[0]['loc'][0]}"
        raise UserError(f"{given[key][1]}: {_complaint(name, error)}") from None


def _complaint(section: str, error: ValidationError) -> str:
    """What is wrong with a value, or with a part of a list: "data.source[0].weight = 0, but it must be ..."."""
    first = max(error.errors(), key=lambda found: any(isinstance(step, int) for step in found["loc"]))
    key = f"{section}.{first['loc'][0]}"
    wanted = config_fields()[key].type
    for step in first["loc"][1:]:
        if isinstance(step, int):
            parts = [arg for arg in (wanted, *typing.get_args(wanted)) if typing.get_origin(arg) is tuple]
            key, wanted = f"{key}[{step}]", typing.get_args(parts[0])[0]
        elif dataclasses.is_dataclass(wanted):  # not the name that pydantic gives to a part of a union
            names = {field.name: field.type for field in dataclasses.fields(wanted)}
            if step not in names:
                return f"there is no setting {key}.{step}{_suggest(step, names)}"
            key, wanted = f"{key}.{step}", names[step]
    if first["type"] in ("missing", "value_error"):
        return f"{key} = {_shown(first['input'])} {first['ctx']['error']}" if "ctx" in first else f"{key} is missing"
    must, shown = describe_type(wanted), _shown(first["input"])
    near = difflib.get_close_matches(shown.strip("'"), re.findall(r"[\w:]+", must.partition("one of ")[2]), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if key == "data.path" and isinstance(first["input"], list):
        hint = "; name their folder, or give data.source a table for each"
    return f"{key} = {shown}, but it must be {must}{hint}"


def _shown(value: object) -> str:
    """A value as a complaint shows it: as TOML and Python write it, and short."""
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except (ValueError, RecursionError):  # Python does not write integers of more than 4,300 digits
        return "a value that fills pages"
    return text if len(text) <= 120 else f"{text[:120]}..."


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
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()
        return found
    except (ValueError, RecursionError):
        return text  # which is no list: the settings' own check says so


def unknown_setting(key: str) -> str:
    """The complaint about a setting that does not exist, with the nearest one that does."""
    if key in REMOVED:
        return f"{key} is no longer a setting; leave it out"
    return f"there is no setting {key if key.isprintable() else repr(key)}{_suggest(key, config_fields())}"


def _suggest(word: str, known: Iterable[str]) -> str:
    """The nearest known name, comparing whole dotted names first and then the part after the dot."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.75)
    if not near:
        tails = {name.split(".")[-1]: name for name in names}
        near = [tails[t] for t in difflib.get_close_matches(word.split(".")[-1], tails, n=1)]
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names[:12])}"
