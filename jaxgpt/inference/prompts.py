"""Prompts as users write them: on the command line, in a file, at a terminal. No jax import."""

import contextlib
import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prompt:
    text: str
    where: str
    """Where the user wrote it, for messages."""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a text file, one a line, or of a .jsonl file.

    Raises:
        UserError: the file cannot be read, or a line is empty, not UTF-8 or not such an object; names the line.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"--prompt-file {path}: {error.strerror}") from None
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path}: no prompt in it; write one a line")
    is_json = path.suffix in (".jsonl", ".json")
    return [_read_line(line.removesuffix(b"\r"), f"{path}, line {i}", is_json) for i, line in enumerate(lines, 1)]


def _read_line(line: bytes, where: str, is_json: bool) -> Prompt:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        bad = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
        raise UserError(f"{where}: not UTF-8 ({bad}); save the file as UTF-8") from None
    if not text.strip():
        raise UserError(f"{where}: an empty line; remove it (a .jsonl file may hold an empty prompt)")
    if not is_json:
        return Prompt(text, where)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise UserError(f'{where}: it must be an object with a text "prompt", such as {{"prompt": "Once"}}')
    check_unicode(content["prompt"], where)
    return Prompt(content["prompt"], where)


def check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Python reads the byte 0x80 + n that is not UTF-8 as the lone surrogate U+DC80 + n.
        bad = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
        raise UserError(f"{where}: not valid Unicode ({bad} at position {error.start + 1})") from None


def typed_lines() -> Iterator[str]:
    """What the user types, line by line, without empty lines."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - with it, `input` has the arrow keys and a history
    while True:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:  # forget the line, as a shell does
            print()
            continue
        if line.strip() == "/quit":
            return
        if line:
            yield line


@contextlib.contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """Within it, Ctrl-C sets the event, which nothing is lost by; a second one is a KeyboardInterrupt as usual."""
    asked = threading.Event()

    def on_signal(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
