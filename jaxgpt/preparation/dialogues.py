"""Two sources of conversations: a made-up customer service, and the files of the Schema-Guided Dialogue dataset.

The made-up conversations need no file and no network. A model that learned some of them answers the others, so every
step from data to `sample --chat` can be tried. They are the same on every machine, and no two are equal.
"""

import functools
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgpt.errors import BadRecord
from jaxgpt.preparation.augmentation import Draw

COUNT = 6000
RECORDS_VERSION = (
    "bf2e5a51f3202378a51baecbbc08750f7f5ae7f2d425e72d80979950472cf736",
    "4e0e6cda16bca0059d0a19bf086b9982b094593cd18774fc6b6fefb754ed65e8",
)
"""Identifies the records of `support_records`: part of the names of datasets made from them. Change it with them."""
_CHINESE_SHARE = 0.15
_SPEAKERS = {"USER": "user", "SYSTEM": "assistant"}


def support_records() -> Iterator[dict]:
    """COUNT different conversations of a customer service as {"messages": [...]}, always the same in the same order."""
    draw = Draw(0)
    seen: set[tuple[str, ...]] = set()
    while len(seen) < COUNT:
        messages = _conversation("chinese" if draw.chance(_CHINESE_SHARE) else "english", draw)
        key = tuple(message["content"] for message in messages)
        if key not in seen:
            seen.add(key)
            yield {"messages": messages}


@functools.cache
def _phrases() -> dict[str, Any]:
    """The content of support.toml, which explains its form."""
    return tomllib.loads(Path(__file__).with_name("support.toml").read_text(encoding="utf-8"))


def _wording(wordings: str, draw: Draw) -> str:
    return draw.one(wordings.split("|"))


def _slot_value(wordings: str, draw: Draw) -> str:
    text = re.sub("#", lambda _: draw.one("123456789"), _wording(wordings, draw), count=1)
    return re.sub("#", lambda _: draw.one("0123456789"), text)


def _conversation(name: str, draw: Draw) -> list[dict[str, str]]:
    language = _phrases()[name]
    topics = language["topics"]
    pairs = [language["greeting"]] if (greets := draw.chance(0.25)) else []
    first = draw.one(list(topics))
    pairs += _pairs(topics[first], draw)
    if draw.chance(0.25):
        pairs += _pairs(topics[draw.one([other for other in topics if other != first])], draw)
    if draw.chance(0.5):
        pairs.append(language["closing"])
    values = {slot: _slot_value(wordings, draw) for slot, wordings in language["slots"].items()}
    messages = []
    for number, (user, answer) in enumerate(pairs):
        said = _wording(user, draw).format(**values)
        if number == 0 and not greets:
            before, after = _wording(language["before"], draw), _wording(language["after"], draw)
            if before.endswith((", ", ": ")) and not said.startswith("I "):
                said = said[0].lower() + said[1:]
            said = before + said + after
        said = said.lower().rstrip(".?") if name == "english" and "@" not in said and draw.chance(0.15) else said
        answered = _wording(answer, draw).format(**values)
        answered = answered[0].upper() + answered[1:]
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
    return messages


def _pairs(topic: dict[str, list], draw: Draw) -> list[list[str]]:
    extras = topic.get("extras")
    return [*topic["steps"], *([draw.one(extras)] if extras and draw.chance(0.4) else [])]


def sgd_records(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, {"messages": [...]}) of each dialogue in a dialogues_*.json file.

    Consecutive turns of one speaker are joined. A dialogue in another form is passed on for `chat.conversation` to
    refuse; a file that is no JSON list in UTF-8 is a BadRecord.
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


def _sgd_record(dialogue: Any) -> Any:
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
