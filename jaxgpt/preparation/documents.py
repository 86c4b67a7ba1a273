"""The results of reading a source: documents, and counts of the records that cannot be used, by reason."""

import collections
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxgpt.errors import BadRecord, UserError

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
        known = kind in self.counts or len(self.counts) < _REASONS
        self._count(kind if known else "other reasons", str(error))

    def empty(self, where: str) -> None:
        """Count an empty file or record."""
        self._count("empty", where)

    def summary(self) -> dict[str, dict]:
        """{reason: {"count", "where": the first few}}, ready for JSON."""
        return {reason: {"count": count, "where": self.examples[reason]} for reason, count in self.counts.items()}

    def _count(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= _EXAMPLES:
            self.examples.setdefault(reason, []).append(example)
