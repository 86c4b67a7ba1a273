"""From TOML files and a command line to a `Config`, and from exceptions to exit codes. No jax import.

A config file holds sections of settings; `base = "other.toml"` names a file whose settings it starts from.
`--section.field value` on the command line goes before both.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import json
import os
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from jaxgpt.config import Config, UserError

# What a disk or a mounted bucket says when it is full, broken or no longer writable.
STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
EXIT_DONE, EXIT_FAILED, EXIT_USER, EXIT_RESUME, EXIT_STORAGE, EXIT_WATCHDOG = 0, 1, 2, 42, 74, 75


class RunFailed(Exception):
    """The run cannot go on, for a reason that fits in a line. Exit code 1, unless a subclass says another one."""

    exit_code = EXIT_FAILED


class StorageFailed(RunFailed):
    """A disk or bucket refused what the run has to write. Exit code 74 (EX_IOERR of sysexits.h)."""

    exit_code = EXIT_STORAGE


class HostLost(RunFailed):
    """A host of the run is dead or hangs. Exit code 75 (EX_TEMPFAIL): run the same command again."""

    exit_code = EXIT_WATCHDOG


class Interrupted(BaseException):
    """The run was told to stop and has saved its state: run the same command again. Exit code 42.

    Not an Exception, as KeyboardInterrupt is none: a signal raises it anywhere, and no library may swallow it.
    """


def command(main: Callable[[Sequence[str] | None], int | None]):
    """Decorator of every verb's `main`: turns the exceptions a user can cause into one line and an exit code."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or EXIT_DONE
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER
        except Interrupted as error:
            print(f"stopped: {error}", file=sys.stderr)
            return EXIT_RESUME
        except RunFailed as error:
            print(f"failed: {error}", file=sys.stderr)
            return error.exit_code
        except BrokenPipeError:  # the reader of our output left (`| head`): not our failure
            sys.stderr.close()
            return EXIT_DONE
        except OSError as error:
            if error.errno not in STORAGE_ERRNOS:
                raise
            print(f"failed: {error.filename or 'storage'}: {error.strerror}", file=sys.stderr)
            return EXIT_STORAGE
        except KeyboardInterrupt:  # outside of training, which saves first and then raises Interrupted
            print("stopped: Ctrl-C", file=sys.stderr)
            return EXIT_FAILED

    return run


def leave(code: int) -> typing.NoReturn:
    """End the process now. A thread that hangs in a read would keep Python from ending, or crash it on its way out."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader of our output left
            stream.flush()
    os._exit(code)


def sections() -> dict[str, type]:
    """{"model": ModelConfig, ...}"""
    return {field.name: field.type for field in dataclasses.fields(Config)}


def config_fields() -> dict[str, dataclasses.Field]:
    """{"model.n_layer": field, ...}, in the order of the file config.py."""
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
    chain: list[Path] = []
    while path is not None:
        if path.resolve() in [seen.resolve() for seen in chain]:
            raise UserError(f"{path}: its chain of base files comes back to itself")
        chain.append(path)
        base = _read_toml(path).get("base")
        path = path.parent / base if base else None
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
    settings = {}
    for name, fields in _read_toml(path).items():
        if name == "base":
            continue
        if not isinstance(fields, dict):
            raise UserError(f"{path}: {_unknown(name)}")
        if name not in sections():
            raise UserError(f"{path}: there is no section [{name}]{_suggest(name, sections())}")
        settings |= {f"{name}.{key}": value for key, value in fields.items()}
    return settings


def _build(settings: dict[str, object], origin: dict[str, str]) -> Config:
    known = config_fields()
    for key in settings:
        if key not in known:
            raise UserError(f"{origin[key]}: {_unknown(key)}")
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


def _takes_list(annotation, text: str) -> bool:
    """Whether the text of a command line stands for a list; where text is allowed besides, a list is JSON."""
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


def _unknown(key: str) -> str:
    return f"there is no setting {key}{_suggest(key, config_fields())}"


def _suggest(word: str, known) -> str:
    """The nearest known name, comparing whole dotted names first and then the part after the dot."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    if not near:
        tails = {name.split(".")[-1]: name for name in known}
        near = [tails[t] for t in difflib.get_close_matches(word.split(".")[-1], tails, n=1)]
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(list(known)[:12])}"


_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def describe_type(annotation) -> str:
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


# ---------------------------------------------------------------- the command line


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors of one line, with the nearest option."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            if word.startswith("--") and "." in word:
                raise UserError(f"command line: {_unknown(word[2:])}")
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(word, options, n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (see {self.prog} --help)"
            raise UserError(f"unknown argument {word}{hint}")
        return parsed


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser for `jaxgpt VERB`; its errors are `UserError`s."""
    return _Parser(
        prog=f"jaxgpt {verb}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_arguments(command_parser: argparse.ArgumentParser) -> None:
    """--checkpoint and --weights, of whatever makes texts with a trained model."""
    command_parser.add_argument(
        "--checkpoint",
        metavar="WHERE",
        required=True,
        help="run folder (its latest step), RUN@best, one step's folder, a Hugging Face folder, or hf:NAME",
    )
    command_parser.add_argument(
        "--weights",
        choices=["float32", "bfloat16", "int8"],
        help="number format of the weights: smaller is faster, and less exact [the model's compute type]",
    )


def add_config_arguments(command_parser: argparse.ArgumentParser) -> None:
    """`--config FILE` and one `--section.field` for every setting."""
    command_parser.usage = "%(prog)s --config FILE [options] [--section.field value ...]"
    command_parser.add_argument("--config", metavar="FILE", help="TOML file of settings")
    for name, cls in sections().items():
        group = command_parser.add_argument_group(f"[{name}]")
        for field in dataclasses.fields(cls):
            group.add_argument(
                f"--{name}.{field.name}",
                default=argparse.SUPPRESS,
                metavar="V",
                help=_field_help(cls, field).replace("%", "%%"),
            )


def _field_help(cls: type, field: dataclasses.Field) -> str:
    default = "none" if field.default is None else field.default
    if isinstance(default, bool):
        default = str(default).lower()
    elif default in ("", ()):
        default = "empty"
    text = cls.__pydantic_fields__[field.name].description
    return f"{text} [{describe_type(field.type)}; default {default}]"


def config_from(arguments: argparse.Namespace) -> Config:
    """The Config that parsed arguments ask for: `--config` with the `--section.field` overrides."""
    if not arguments.config:
        raise UserError("give a config file, for example --config configs/quickstart.toml")
    overrides = {key: value for key, value in vars(arguments).items() if "." in key}
    return load_config(arguments.config, overrides)
