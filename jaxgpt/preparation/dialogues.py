"""Two sources of conversations: a made-up customer service, and the files of the Schema-Guided Dialogue dataset.

The made-up ones need no file and no network: a model that learned some of them answers the others, so that every
step from data to `sample --chat` can be tried. They are the same on every machine and never the same twice.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.preparation.documents import BadRecord
from jaxgpt.preparation.support import CHINESE, ENGLISH, Language, Topic

COUNT = 6000
_CHINESE_SHARE = 0.15
_SPEAKERS = {"USER": "user", "SYSTEM": "assistant"}


def support_records() -> Iterator[dict]:
    """COUNT different conversations of a customer service as {"messages": [...]}, always the same ones in one order."""
    draw = _Draw(0)
    seen = set()
    while len(seen) < COUNT:
        messages = _conversation(CHINESE if draw.chance(_CHINESE_SHARE) else ENGLISH, draw)
        key = tuple(message["content"] for message in messages)
        if key not in seen:
            seen.add(key)
            yield {"messages": messages}


class _Draw:
    """Random choices by `Random.random` alone, which Python promises to be the same in every version."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def one(self, items):
        return items[int(self._random.random() * len(items))]

    def wording(self, wordings: str) -> str:
        return self.one(wordings.split("|"))

    def value(self, wordings: str) -> str:
        text = re.sub("#", lambda _: self.one("123456789"), self.wording(wordings), count=1)
        return re.sub("#", lambda _: self.one("0123456789"), text)


def _conversation(language: Language, draw: _Draw) -> list[dict]:
    pairs = [language.greeting] if draw.chance(0.25) else []
    names = list(language.topics)
    first = draw.one(names)
    pairs += _pairs(language.topics[first], draw)
    if draw.chance(0.25):
        pairs += _pairs(language.topics[draw.one([name for name in names if name != first])], draw)
    if draw.chance(0.5):
        pairs.append(language.closing)
    values = {slot: draw.value(wordings) for slot, wordings in language.slots.items()}
    messages = []
    for number, (user, answer) in enumerate(pairs):
        said = draw.wording(user).format(**values)
        if number == 0 and pairs[0] is not language.greeting:
            before, after = draw.wording(language.before), draw.wording(language.after)
            if before.endswith((", ", ": ")) and not said.startswith("I "):
                said = said[0].lower() + said[1:]
            said = before + said + after
        said = said.lower().rstrip(".?") if language is ENGLISH and "@" not in said and draw.chance(0.15) else said
        answered = draw.wording(answer).format(**values)
        answered = answered[0].upper() + answered[1:]
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
    return messages


def _pairs(topic: Topic, draw: _Draw) -> list[tuple[str, str]]:
    extra = [draw.one(topic.extras)] if topic.extras and draw.chance(0.4) else []
    return [*topic.steps, *extra]


def sgd_records(file: Path) -> Iterator[tuple[str, dict]]:
    """(where, {"messages": [...]}) for each dialogue of a dialogues_*.json file.

    Turns of the same speaker after one another are joined. A dialogue that is no such object is handed on as far as
    it can be, for `chat.conversation` to say what is wrong with it.

    Raises:
        BadRecord: the file is no JSON list in UTF-8.
    """
    try:
        dialogues = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord(str(file), f"not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"{file}:{error.lineno}", f"not JSON ({error.msg})") from None
    except RecursionError:
        raise BadRecord(str(file), "not JSON (nested too deeply)") from None
    if not isinstance(dialogues, list):
        raise BadRecord(str(file), "not a list of dialogues")
    for number, dialogue in enumerate(dialogues, 1):
        name = dialogue.get("dialogue_id", f"number {number}") if isinstance(dialogue, dict) else f"number {number}"
        yield f"{file}, dialogue {name}", _sgd_record(dialogue)


def _sgd_record(dialogue: object) -> dict:
    turns = dialogue.get("turns") if isinstance(dialogue, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return dialogue
    messages: list[dict] = []
    for turn in turns:
        speaker, said = turn.get("speaker"), turn.get("utterance")
        role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
        if messages and messages[-1]["role"] == role and isinstance(said, str) and messages[-1]["content"]:
            messages[-1]["content"] += f"\n{said}"
        else:
            messages.append({"role": role, "content": said})
    return {"messages": messages}
