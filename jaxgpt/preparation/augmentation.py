"""Augmentation of small sets of conversations: copies in which the user's text is changed, and the answers are not.

Every change is drawn from (seed, number of the conversation, number of the copy), so a copy does not depend on the
process that makes it. Words with a digit or an @ are never changed, because an answer may repeat them.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from jaxgpt.errors import UserError
from jaxgpt.settings import AugmentationConfig

T = TypeVar("T")
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_SENTENCE_BORDER = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*(?=\S)")
_WIDE = "。！？"  # no space follows these
_WORD = re.compile(r"\S+")
_FIXED = re.compile(r"[\d@]|://")
_FIRST_IDEOGRAPH = "\u2e80"  # from here on: scripts without spaces between words


class Draw:
    """Random choices by `Random.random` only, which Python promises to be the same in every version."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def one(self, items: Sequence[T]) -> T:
        return items[int(self._random.random() * len(items))]

    def shuffled(self, items: Sequence[T], count: int | None = None) -> list[T]:
        """The items in a random order, or `count` of them."""
        left, drawn = list(items), list[T]()
        while left and len(drawn) != count:
            drawn.append(left.pop(int(self._random.random() * len(left))))
        return drawn


class Augmenter:
    """Makes changed copies of conversations."""

    def __init__(self, settings: AugmentationConfig):
        """Read the file of synonyms, if the settings name one; a UserError names the line that is wrong."""
        self._settings = settings
        self._synonyms = _Synonyms(Path(settings.synonyms)) if settings.synonyms and settings.synonym_rate else None

    def copies(self, text: str, number: int) -> list[str]:
        """Up to `settings.copies` different changed copies of a canonical conversation, number `number` of the data."""
        made = [text]
        for copy in range(self._settings.copies):
            digest = hashlib.sha256(f"{self._settings.seed}:{number}:{copy}".encode()).digest()
            changed = self._change(json.loads(text), Draw(int.from_bytes(digest[:8], "little")))
            if changed not in made:
                made.append(changed)
        return made[1:]

    def _change(self, messages: list[dict], draw: Draw) -> str:
        kept: list[dict | None] = []  # None: a user turn that is dropped with its answer
        for place, message in enumerate(messages):
            begins_pair = message["role"] == "user" and place < len(messages) - 2
            if begins_pair and draw.chance(self._settings.drop_turns):
                kept.append(None)
            elif message["role"] == "assistant" and kept[-1:] == [None]:
                kept[-1:] = []
            elif message["role"] == "user":
                changed = self._change_words(message["content"], draw)
                kept.append({**message, "content": changed if changed.strip() else message["content"]})
            else:
                kept.append(message)
        return json.dumps(kept, ensure_ascii=False)

    def _change_words(self, text: str, draw: Draw) -> str:
        settings = self._settings
        if draw.chance(settings.shuffle_sentences):
            text = _shuffle_sentences(text, draw)
        if self._synonyms is not None:
            text = self._synonyms.replace(text, settings.synonym_rate, draw)
        if settings.typo_rate:
            text = _WORD.sub(lambda word: _mistype(word.group(), settings.typo_rate, draw), text)
        return text


class _Synonyms:
    """Groups of words that may replace each other, read from a file."""

    def __init__(self, file: Path):
        self._others: dict[str, list[str]] = {}
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"augmentation.synonyms = {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            row = 1 + error.object.count(b"\n", 0, error.start)
            raise UserError(f"{file}:{row}: not UTF-8; save the file as UTF-8") from None
        for number, group in enumerate(text.splitlines(), 1):
            words = [word.strip().lower() for word in group.replace("，", ",").split(",")]
            if not group.strip() or group.startswith("#"):
                continue
            if len(words) < 2 or "" in words:
                raise UserError(f"{file}:{number}: a group is two words or more with commas between: parcel, package")
            for word in words:
                if word in self._others:
                    raise UserError(f"{file}:{number}: {word!r} is in two groups; join them into one")
                self._others[word] = [other for other in words if other != word]
        if not self._others:
            raise UserError(f"{file}: holds no words; write one group a line: parcel, package")
        longest_first = sorted(self._others, key=lambda word: (-len(word), word))
        self._pattern = re.compile("|".join(map(_whole_word, longest_first)), re.IGNORECASE)

    def replace(self, text: str, rate: float, draw: Draw) -> str:
        def other(match: re.Match) -> str:
            word = match.group()
            others = self._others.get(word.lower())
            if not others or not draw.chance(rate):
                return word
            chosen = draw.one(others)
            return chosen[0].upper() + chosen[1:] if word[0].isupper() else chosen

        return self._pattern.sub(other, text)


def _whole_word(word: str) -> str:
    """A pattern that matches only the whole word, in scripts that separate words."""
    before = r"(?<!\w)" if word[0] < _FIRST_IDEOGRAPH else ""
    after = r"(?!\w)" if word[-1] < _FIRST_IDEOGRAPH else ""
    return before + re.escape(word) + after


def _shuffle_sentences(text: str, draw: Draw) -> str:
    sentences = [sentence for sentence in _SENTENCE_BORDER.split(text) if sentence]
    joined = ""
    for sentence in draw.shuffled(sentences):
        joined += sentence if not joined or joined[-1] in _WIDE else f" {sentence}"
    return joined if len(sentences) > 1 else text


def _mistype(word: str, rate: float, draw: Draw) -> str:
    """The word with typing errors: letters swapped with the next, left out, doubled, or replaced by a neighbour key."""
    if _FIXED.search(word):
        return word
    letters, typed, place = list(word), [], 0
    while place < len(letters):
        letter = letters[place]
        place += 1
        if not letter.isalpha() or letter >= _FIRST_IDEOGRAPH or not draw.chance(rate):
            typed.append(letter)
            continue
        kind = draw.one(("swap", "leave out", "double", "beside"))
        if kind == "swap" and place < len(letters):
            typed += [letters[place], letter]
            place += 1
        elif kind == "double":
            typed += [letter, letter]
        elif kind == "beside":
            typed.append(_beside(letter, draw))
    return "".join(typed)


def _beside(letter: str, draw: Draw) -> str:
    """A neighbour of the letter on the keyboard; the letter itself if it is not a Latin one."""
    for row in _KEYBOARD:
        at = row.find(letter.lower())
        if at >= 0:
            other = draw.one([row[i] for i in (at - 1, at + 1) if 0 <= i < len(row)])
            return other.upper() if letter.isupper() else other
    return letter
