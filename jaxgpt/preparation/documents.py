"""What readers hand on: documents, and the records that cannot be used, by where and why."""

import collections
import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from jaxgpt.errors import UserError

_EXAMPLES = 5
_REASONS = 50  # kinds kept apart: a reason that quotes the data could be another one in each record
EMPTY = "empty"


class Document(NamedTuple):
    text: str
    """The text, or the canonical JSON of a conversation (`chat.conversation`)."""
    split: Literal["train", "validation"] | None = None
    """The split that the source gives it; None where the source has no splits."""
    part: int = 0
    """Number of the mixture's source that it comes from."""
    continues: bool = False
    """It goes on where the document before it ends: the next part of one long text file."""
    where: str = ""
    """File and line of a conversation, for messages; empty for text."""


class Record(NamedTuple):
    """One row of a source of rows, before its text is taken out."""

    where: str
    value: Mapping[str, object]
    split: Literal["train", "validation"] | None = None


class BadRecord(ValueError):
    """One record of the source cannot be used: where it is, and why, each in a few words."""

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)  # both, so that it comes whole out of another process
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class BadRecords:
    """Counts what is left out of the data, by reason; or refuses it, as `data.on_bad_record` says.

    Empty files and records are counted under either policy and never refused: nothing is lost with them.
    """

    def __init__(self, policy: Literal["refuse", "skip"] = "refuse"):
        self._policy = policy
        self.counts: collections.Counter[str] = collections.Counter()
        """Reason (up to its first colon, semicolon, comma or bracket) -> records left out."""
        self.examples: dict[str, list[str]] = {}
        """Reason -> the first few, each as "where: reason"."""

    def add(self, error: BadRecord) -> None:
        """
        Raises:
            UserError: the policy is to refuse.
        """
        if self._policy == "refuse":
            raise UserError(f'{error} (data.on_bad_record = "skip" leaves such records out)') from None
        kind = re.sub(r"(?<![\w-])\d+", "N", re.split(r"[:;,(]", error.reason, maxsplit=1)[0]).strip()
        known = kind in self.counts or len(self.counts) < _REASONS
        self._count(kind if known else "other reasons", str(error))

    def empty(self, where: str) -> None:
        self._count(EMPTY, where)

    def add_all(self, other: "BadRecords") -> None:
        """Count what another process has left out, too."""
        for reason, count in other.counts.items():
            self.counts[reason] += count
            known = self.examples.setdefault(reason, [])
            known += other.examples[reason][: _EXAMPLES - len(known)]

    def __iter__(self) -> Iterator[tuple[str, int, list[str]]]:
        """(reason, count, examples), the most frequent first."""
        return ((reason, count, self.examples[reason]) for reason, count in self.counts.most_common())

    def _count(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(example)
