"""The results of reading a source: documents, and counts of the records that cannot be used, by reason."""

import codecs
import collections
import contextlib
import io
import re
from collections.abc import Mapping
from typing import Any, BinaryIO, Literal, NamedTuple

from jaxgpt.errors import BadRecord, UserError

NUL = "not text: it holds the character NUL"
_SAMPLE = 4096  # bytes from which an encoding is guessed
_EXAMPLES = 5
_REASONS = 50  # kinds kept apart: a reason that quotes the data could be a new one in each record
SplitName = Literal["train", "validation"]
Tally = dict[str, dict[str, int]]
"""Of conversations: {"forms": {form: how many}, "turns": {what became of some: ...}, "fields not read": {name: ...}}"""


class Document(NamedTuple):
    text: str  # or the canonical JSON of a conversation (dialogues.py)
    split: SplitName | None = None  # that the source assigns; None if the source has no splits
    part: int = 0  # number of the mixture's source that it comes from
    continues: bool = False  # the document before it: the next part of one long text file
    where: str = ""  # file and line of a conversation, for messages; empty for text


class SourceRecord(NamedTuple):
    """One row of a source that has rows, before its text is extracted."""

    where: str
    value: Mapping[str, Any]
    split: SplitName | None = None


class BadRecords:
    """Counts the records that are left out, by reason, and what is in the others; or refuses the first bad one.

    `data.on_bad_record` is the policy. Empty files and records are counted under either and never refused.
    """

    def __init__(self, policy: Literal["refuse", "skip"] = "refuse"):
        self._policy = policy
        self.counts: collections.Counter[str] = collections.Counter()
        """Reason (up to its first colon, semicolon, comma or bracket) -> records left out."""
        self.examples: dict[str, list[str]] = {}
        """Reason -> the first few, each as "where: reason"."""
        self.conversations: Tally = {}

    def add(self, error: BadRecord) -> None:
        """Count a record, or raise a UserError if the policy is to refuse."""
        if self._policy == "refuse":
            raise UserError(f'{error} (data.on_bad_record = "skip" leaves such records out)') from None
        kind = re.sub(r"(?<![\w-])\d+", "N", re.split(r"[:;,(]", error.reason, maxsplit=1)[0]).strip()
        self._count(kind, str(error))

    def is_shown(self, kind: str) -> bool:
        """Whether the next bad record of this kind is told with its place."""
        return self._policy == "refuse" or self.counts[kind] < _EXAMPLES

    def unread(self, kind: str, file: str) -> None:
        """Count a file of a folder that the source does not read, by its suffix."""
        self._count(f"not read, {kind}", file)

    def described(self) -> str:
        """What was left out, for a message; empty if nothing was."""
        counts = [f"{n:,}: {reason} ({self.examples[reason][0]})" for reason, n in self.counts.most_common(3)]
        return f"; left out {', '.join(counts)}" if counts else ""

    def empty(self, where: str) -> None:
        """Count an empty file or record."""
        self._count("empty", where)

    def summary(self) -> dict[str, dict]:
        """{reason: {"count", "where": the first few}}, ready for JSON."""
        return {reason: {"count": count, "where": self.examples[reason]} for reason, count in self.counts.items()}

    def _count(self, reason: str, example: str) -> None:
        reason = reason if reason in self.counts or len(self.counts) < _REASONS else "other reasons"
        self.counts[reason] += 1
        if self.counts[reason] <= _EXAMPLES:
            self.examples.setdefault(reason, []).append(example)


# ---------------------------------------------------------------- bytes that are no UTF-8


def as_utf8(stream: BinaryIO, encoding: str) -> BinaryIO:
    """The stream, which holds text in that encoding, as one of UTF-8."""
    return stream if is_utf8(encoding) else io.BufferedReader(_AsUtf8(stream, encoding))


class _AsUtf8(io.RawIOBase):
    def __init__(self, stream: BinaryIO, encoding: str):
        self._text = io.TextIOWrapper(stream, encoding, newline="")
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or self._text.read(1 << 16).encode(errors="replace")
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def is_utf8(encoding: str) -> bool:
    """Whether data.encoding is the default; a UserError says that Python knows no such encoding of text."""
    with contextlib.suppress(LookupError, ValueError):  # ValueError: a NUL in the name
        if (found := codecs.lookup(encoding))._is_text_encoding:
            return found.name == "utf-8"
    raise UserError(f"data.encoding = {encoding}: Python knows no such encoding; for example gb18030, utf-16, cp1252")


def decoded(content: bytes, where: str, bad: BadRecords) -> str:
    """The text of the UTF-8; a BadRecord says that it is something else."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(where, content, error.start, error.start, bad) from None
    if "\0" in text:
        raise holds_nul(where, content, bad)
    return text


def not_utf8(where: str, content: bytes, at: int, position: int, bad: BadRecords) -> BadRecord:
    """Byte `at` of the content, which is byte `position` of the file or line, is not UTF-8."""
    begin = content.rfind(b"\n", 0, at) + 1 if at > _SAMPLE else 0
    advice = _advice(content[begin:], "a binary file? Else convert it to UTF-8", "not UTF-8 at byte N", bad)
    return BadRecord(where, f"not UTF-8 at byte {position} (0x{content[at]:02x}){advice}")


def holds_nul(where: str, content: bytes, bad: BadRecords) -> BadRecord:
    """The content, read as UTF-8, holds NUL, as UTF-16 and binary files do."""
    return BadRecord(where, NUL + _advice(content, "a binary file, or an archive to unpack?", NUL, bad))


def _advice(content: bytes, otherwise: str, kind: str, bad: BadRecords) -> str:
    found = _guessed(content[:_SAMPLE]) if bad.is_shown(kind) else None  # guessing takes some milliseconds
    if found is None:
        return f"; {otherwise}"
    shown = " ".join(content[:_SAMPLE].decode(found, errors="ignore").split())[:20]
    return f'; it looks like {found} ("{shown}…"): set data.encoding = "{found}"'


def _guessed(content: bytes) -> str | None:
    """The encoding, other than UTF-8, that the content is probably in, by Python's name for it."""
    import charset_normalizer

    for bom, name in ((codecs.BOM_UTF32_LE, "32"), (codecs.BOM_UTF16_LE, "16"), (codecs.BOM_UTF16_BE, "16")):
        if content.startswith(bom):
            return f"utf-{name}"
    ends = range(len(content), max(0, len(content) - 4), -1)  # one of them is not in the middle of a character
    found = [one for end in ends for one in charset_normalizer.from_bytes(content[:end]) if "\0" not in str(one)]
    # Of the western encodings, which are all alike, there is most of cp1252.
    western = lambda one: "cp1252" in one.could_be_from_charset
    likely = lambda one: one.coherence - one.chaos + one.multi_byte_usage + 0.1 * western(one)
    best = max(found, key=likely, default=None)
    name = "cp1252" if best and western(best) else best.encoding.replace("_", "-") if best else "ascii"
    return None if name in ("ascii", "utf-8") else name
