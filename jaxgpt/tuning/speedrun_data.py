"""What a speedrun reads, from one word: `builtin`, a preset's name, or the path of texts or conversations."""

import functools
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.config import Config
from jaxgpt.errors import BadRecord, UserError
from jaxgpt.preparation.dialogues import conversation
from jaxgpt.preparation.documents import BadRecords
from jaxgpt.preparation.source_files import SUFFIXES, is_read_by, jsonl_records, parquet_records
from jaxgpt.settings import SourceConfig

BUILTIN = "builtin"
_FROM_FILES = ("text", "html", "jsonl", "parquet")


class SpeedrunData(NamedTuple):
    """The sources of both runs, each a table of `data.source`."""

    text: dict[str, Any]
    chat: dict[str, Any]
    notes: tuple[str, ...]
    """Licences and sizes of what is fetched."""

    @property
    def has_skills(self) -> bool:
        return self.chat["source"] == "skills"

    @property
    def text_can_be_mixed(self) -> bool:
        """Whether the text may stand among conversations: rows of tables would be read as such (docs/data.md)."""
        return self.text["source"] in (BUILTIN, "text", "html")


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    return tomllib.loads(Path(__file__).with_name("presets.toml").read_text(encoding="utf-8"))


def chosen_data(data: str, chat: str | None) -> SpeedrunData:
    """The sources that `--data` and `--chat` name. Files are looked at, a hub is not asked.

    Raises:
        UserError: no preset and no file has that name, or a file holds neither texts nor conversations.
    """
    text: dict[str, Any] = {"source": BUILTIN}
    talk: dict[str, Any] = {"source": "skills"}
    notes: tuple[str, ...] = ()
    if data in presets():
        preset = presets()[data]
        parts = {name: dict(preset[name]) for name in ("text", "chat") if name in preset}
        notes = tuple(f"{p['source']}: licence {p.pop('licence')}, {p.pop('size')}" for p in parts.values())
        text, talk = parts["text"], parts.get("chat", talk)
    elif data != BUILTIN:
        part, is_chat = _in_files(data, "--data")
        text, talk = (text, part) if is_chat else (part, talk)
        if is_chat and chat:
            raise UserError(f"--data {data} holds conversations, and so does --chat; give texts as --data")
    if chat:
        talk, is_chat = _in_files(chat, "--chat")
        if not is_chat:
            raise UserError(f"--chat {chat} holds texts, and no conversations; give them as --data")
    return SpeedrunData(text, talk, notes)


def _in_files(path: str, flag: str) -> tuple[dict[str, Any], bool]:
    """(the source that reads a file or folder, whether it holds conversations), by its first record."""
    place = Path(path).expanduser()
    if not place.exists():
        names = ", ".join([BUILTIN, *presets()])
        raise UserError(f"{flag} {path}: no such file or folder, and no set of that name; the sets are {names}")
    kinds = {kind: _files(kind, place) for kind in _FROM_FILES}
    kind = max(kinds, key=lambda kind: kinds[kind])
    if not kinds[kind]:
        suffixes = " ".join(sorted({suffix for kind in _FROM_FILES for suffix in SUFFIXES[kind]}))
        raise UserError(f"{flag} {path}: nothing in it that can be read; it reads {suffixes}, also compressed")
    source: dict[str, Any] = {"source": kind, "path": str(place.absolute())}
    if kind in ("text", "html"):
        return source, False
    part, bad, config = SourceConfig(**source), BadRecords("skip"), Config()
    records = jsonl_records(part, bad, config.data) if kind == "jsonl" else parquet_records(part, bad, None)
    first = next(iter(records), None)
    if first is None:
        raise UserError(f"{flag} {path}: holds no record{bad.described()}")
    try:
        conversation(first.value, first.where)
    except BadRecord as error:
        if isinstance(first.value.get("text"), str):
            return source, False
        fields = [name for name, value in first.value.items() if isinstance(value, str) and len(value) > 100]
        if len(fields) == 1:
            return source | {"text_field": fields[0]}, False
        raise UserError(
            f"{flag} {path}: neither a text nor a conversation ({error}); docs/data.md has the forms"
        ) from None
    return source, True


def _files(kind: str, place: Path) -> int:
    """How many files of the place the source `kind` reads."""
    names = (file.name for file in place.rglob("*")) if place.is_dir() else [place.name]
    return sum(is_read_by(name, kind) for name in names)
