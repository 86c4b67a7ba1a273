"""The command line: parsers with one-line errors, settings as options, exceptions as exit codes. No jax import."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxgpt import errors
from jaxgpt.config import Config, load_config, sections, unknown_setting
from jaxgpt.errors import UserError
from jaxgpt.settings import describe_type


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Decorator of every verb's `main`: turns the exceptions a user can cause into one line and an exit code."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or errors.EXIT_DONE
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return errors.EXIT_USER
        except errors.Interrupted as error:
            print(f"stopped: {error}", file=sys.stderr)
            return errors.EXIT_RESUME
        except errors.RunFailed as error:
            print(f"failed: {error}", file=sys.stderr)
            return error.exit_code
        except BrokenPipeError:  # the reader of our output left (`| head`): not our failure
            sys.stderr.close()
            return errors.EXIT_DONE
        except OSError as error:
            if error.errno not in errors.STORAGE_ERRNOS:
                raise
            print(f"failed: {error.filename or 'storage'}: {error.strerror}", file=sys.stderr)
            return errors.EXIT_STORAGE
        except KeyboardInterrupt:  # outside of training, which saves first and then raises Interrupted
            print("stopped: Ctrl-C", file=sys.stderr)
            return errors.EXIT_FAILED

    return run


def leave(code: int) -> typing.NoReturn:
    """End the process now. A thread that hangs in a read would keep Python from ending, or crash it on its way out."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader of our output left
            stream.flush()
    os._exit(code)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors of one line, with the nearest option."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_args(  # type: ignore[override]  # argparse has overloads for namespaces of a caller's own
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            if word.startswith("--") and "." in word:
                raise UserError(f"command line: {unknown_setting(word[2:])}")
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(word, options, n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (see {self.prog} --help)"
            raise UserError(f"unknown argument {word}{hint}")
        return parsed


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser for `jaxgpt VERB`; its errors are `UserError`s."""
    raw = argparse.RawDescriptionHelpFormatter
    return _Parser(prog=f"jaxgpt {verb}", description=description, allow_abbrev=False, formatter_class=raw)


def add_model_arguments(command_parser: argparse.ArgumentParser) -> None:
    """--checkpoint and --weights, of whatever makes texts with a trained model."""
    folders = (
        "run folder (its latest step; its best, if it overfitted), RUN@best, a step, Hugging Face folder, or hf:NAME"
    )
    command_parser.add_argument("--checkpoint", metavar="WHERE", required=True, help=folders)
    weights = "number format of the weights: smaller is faster, and less exact [the model's compute type]"
    command_parser.add_argument("--weights", choices=["float32", "bfloat16", "int8"], help=weights)


def tokenizer_arguments(
    command_parser: argparse.ArgumentParser, argv: Sequence[str] | None, name: str
) -> tuple[argparse.Namespace, str]:
    """The arguments of `encode` and `decode`, and the text of the argument `name`, --file or standard input."""
    folders = "a tokenizer's folder or tokenizer.json, a run, a checkpoint, a Hugging Face folder, or hf:NAME"
    command_parser.add_argument("--tokenizer", metavar="WHERE", required=True, help=folders)
    command_parser.add_argument("--file", metavar="FILE", help="read from this UTF-8 file instead")
    command_parser.add_argument("--json", metavar="FILE", help="also write the result there")
    arguments = command_parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # whatever the locale
        sys.stdout.reconfigure(encoding="utf-8")

    given, file = getattr(arguments, name), arguments.file
    if given not in (None, []):
        return arguments, given if isinstance(given, str) else " ".join(given)
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UserError(f"no {name}: give it as an argument, with --file FILE, or on standard input")
    try:
        raw = Path(file).read_bytes() if file is not None else sys.stdin.buffer.read().removesuffix(b"\n")
        return arguments, raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--file {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file or 'standard input'}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from None


def add_config_arguments(command_parser: argparse.ArgumentParser) -> None:
    """`--config FILE` and one `--section.field` for every setting."""
    command_parser.usage = "%(prog)s --config FILE [options] [--section.field value ...]"
    command_parser.add_argument("--config", metavar="FILE", help="TOML file of settings")
    for name, cls in sections().items():
        group = command_parser.add_argument_group(f"[{name}]")
        for field in dataclasses.fields(cls):
            text = _field_help(cls, field).replace("%", "%%")
            group.add_argument(f"--{name}.{field.name}", default=argparse.SUPPRESS, metavar="V", help=text)


def _field_help(cls: typing.Any, field: dataclasses.Field) -> str:
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
