"""Conversations in the forms that records have them in, and two sources of them.

The sources are a made-up customer service, and the files of the Schema-Guided Dialogue dataset. The made-up ones need
no file and no network. A model that learned some of them answers the others, so every step from data to `sample --chat`
can be tried. They are the same on every machine, and no two are equal.
"""

import functools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxgpt.data.chat import check_messages, to_text
from jaxgpt.errors import BadRecord
from jaxgpt.preparation.augmentation import Draw
from jaxgpt.preparation.documents import NUL, Tally

COUNT = 6000
RECORDS_VERSION = (
    "bf2e5a51f3202378a51baecbbc08750f7f5ae7f2d425e72d80979950472cf736",
    "4e0e6cda16bca0059d0a19bf086b9982b094593cd18774fc6b6fefb754ed65e8",
)
"""Identifies the records of `support_records`: part of the names of datasets made from them. Change it with them."""
_CHINESE_SHARE = 0.15
_SGD_ROLES = {"USER": "user", "SYSTEM": "assistant"}

_ROLES = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "用户", "人类"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "助手", "机器人"), "assistant"),
}
_SPEAKERS, _WORDS = ("role", "from", "speaker"), ("content", "value", "text")
_QUESTIONS, _ANSWERS = ("prompt", "instruction", "query", "question"), ("response", "completion", "output", "answer")
_PAIRED = _ROLES | dict.fromkeys(_QUESTIONS, "user") | dict.fromkeys(_ANSWERS, "assistant")
_FORMS = '"messages", "conversations", or a question and its answer ("prompt" and "response")'
_LISTS, _WEIGHTS = ("messages", "conversations", "conversation"), ("weight", "train", "training", "loss")
_NOT_TEXT = (
    *("tools", "tool_calls", "tool_call_id", "functions", "function_call", "function_calls", "refusal"),
    *("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio", "file", "files"),
    "train_detail",
)
"""Keys without which a conversation means something else, and which have no place in its tokens."""


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
def support_phrases() -> dict[str, Any]:
    """The content of support.toml, which explains its form."""
    return tomllib.loads(Path(__file__).with_name("support.toml").read_text(encoding="utf-8"))


def _wording(wordings: str, draw: Draw) -> str:
    return draw.one(wordings.split("|"))


def slot_value(wordings: str, draw: Draw) -> str:
    """One of the wordings, with digits in place of #."""
    text = re.sub("#", lambda _: draw.one("123456789"), _wording(wordings, draw), count=1)
    return re.sub("#", lambda _: draw.one("0123456789"), text)


def _conversation(name: str, draw: Draw) -> list[dict[str, str]]:
    language = support_phrases()[name]
    topics = language["topics"]
    pairs = [language["greeting"]] if (greets := draw.chance(0.25)) else []
    first = draw.one(list(topics))
    pairs += _pairs(topics[first], draw)
    if draw.chance(0.25):
        pairs += _pairs(topics[draw.one([other for other in topics if other != first])], draw)
    if draw.chance(0.5):
        pairs.append(language["closing"])
    values = {slot: slot_value(wordings, draw) for slot, wordings in language["slots"].items()}
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


def conversation(record: object, where: str, tally: Tally | None = None) -> str:
    """The canonical JSON of one record (see chat.py); adds what was found in it, and was not read, to `tally`.

    The fields that are filled decide the form: a list of turns (_LISTS), each with a speaker and a text, or a question
    and its answer (_QUESTIONS, _ANSWERS), each a text or a list of turns. "system" and "history" may stand beside both,
    "input" and "context" beside a question. Turns of one speaker in a row become one, with blank lines between.
    Beside a question only its answer is learned. No answer of weight 0 is, and none before the first question.

    Raises:
        BadRecord: no form or two, a field that changes the meaning and is no text, or `check_messages` refuses it.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(where, f"not an object with {_FORMS}")
    fields, found = _Fields(record, where), Counter[tuple[str, str]]()
    system = fields.take("system", "system_prompt")
    head = [] if system is None else [_message("system", system, where, found)]
    past = _history(fields.take("history"), where, found)
    messages = _form(fields, found)
    first = messages[:1] if messages[0]["role"] == "system" else []
    head += [message for message in first if message not in head]
    messages = [*head, *past, *messages[len(first) :]]
    check_messages(messages, where)
    for number, message in enumerate(messages, 1):
        if "\0" in message["content"]:
            raise BadRecord(f"{where}, turn {number}", NUL)
    messages = _joined(messages, where, found)
    if messages[len(head)]["role"] == "assistant":
        messages[len(head)]["weight"] = 0
    answers = [message["weight"] for message in messages if message["role"] == "assistant"]
    if not (fields.is_learned() and any(answers)) or fields.left.get("label") is False:
        raise BadRecord(
            where, "nothing to learn: each answer has weight 0, answers no question, or has the label false"
        )
    found["turns", "answers not learned (weight 0, history, before a question)"] += answers.count(0)
    fields.rest("", found)
    for (kind, name), count in (+found).items():
        counts = {} if tally is None else tally.setdefault(kind, {})
        name = name if name in counts or len(counts) < 50 else "others"
        counts[name] = counts.get(name, 0) + count
    return to_text(messages)


class _Fields:
    """The fields of an object that hold something (null and NaN do not), taken by name; `rest` counts the others."""

    def __init__(self, fields: Mapping[str, Any], where: str):
        # Not NaN either, which pandas writes for nothing.
        self.left = {
            name: value for name, value in fields.items() if value not in (None, "", [], {}) and value == value
        }
        self.all, self.taken, self.where = fields, list[str](), where

    def take(self, *names: str) -> Any:
        """The value of the one field of these names that holds something; None if none does."""
        found = [name for name in names if name in self.left]
        if len(found) > 1:
            raise BadRecord(self.where, f"two forms at once: {' and '.join(found)} are filled; leave one of them")
        self.taken += found
        return self.left.pop(found[0]) if found else None

    def is_learned(self) -> bool:
        """Whether no weight of 0 (train = false) turns learning off."""
        weights = {name: self.left.pop(name) for name in _WEIGHTS if name in self.left}
        for name, weight in weights.items():
            if weight not in (0, 1):
                raise BadRecord(self.where, f'a weight other than 0 and 1: "{name}" is {_shown(weight)}')
        return all(weights.values())

    def rest(self, of: str, found: Counter) -> None:
        """Count each field that was not read; a BadRecord names one without which the others mean something else."""
        for name, value in self.left.items():
            if name in _NOT_TEXT and value not in ("[]", "{}", "null"):
                raise BadRecord(self.where, f'"{name}" cannot be learned; drop the record, or the field')
            found["fields not read", of + _shown(name)] += 1


def _shown(value: object) -> str:
    """A value of the data for a message: short, without what a terminal would obey or could not print."""
    text = value if isinstance(value, str) else ascii(value) if isinstance(value, int | float) else type(value).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:40])


def _form(fields: _Fields, found: Counter) -> list[dict[str, Any]]:
    """The messages of the form that the record has, at least one."""
    where, filled = fields.where, fields.left.keys()
    if filled & _ANSWERS and filled & (*_QUESTIONS, "input"):
        if filled & _LISTS:
            raise BadRecord(where, "two forms at once: a list of turns, and a question with an answer; leave one")
        asked = [fields.take(*names) for names in (_QUESTIONS, ("input",), ("context",)) if filled & names]
        if len(asked) > 1 and not all(isinstance(value, str) for value in asked):
            raise BadRecord(where, 'a question that is no text, beside "input" or "context"')
        asked = _said("user", "\n\n".join(asked) if len(asked) > 1 else asked[0], where, found)
        answered = _said("assistant", fields.take(*_ANSWERS), where, found)
        messages = [*(message | {"weight": 0} for message in asked), *answered]
    elif filled & _LISTS:
        messages = _said("", fields.take(*_LISTS), where, found)
    else:
        keys = ", ".join(_shown(name) + ("" if name in fields.left else " (empty)") for name in fields.all)
        raise BadRecord(where, f"unknown format: it has {keys[:80] or 'nothing'}, but a conversation has {_FORMS}")
    found["forms", "/".join(name for name in fields.taken if not name.startswith("system"))] += 1
    return messages


def _said(role: str, value: Any, where: str, found: Counter) -> list[dict[str, Any]]:
    """The messages of a list of turns; with a `role`, also of a text that is its content."""
    if role and not isinstance(value, list | Mapping):
        return [_message(role, value, where, found)]
    turns = enumerate(_rows(value, where), 1)
    return [message for number, turn in turns for message in _turn(turn, f"{where}, turn {number}", found)]


def _rows(value: Any, where: str) -> list:
    """A list of objects, also from its JSON or from a table of columns, as Parquet and TFDS may have it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRecord(where, "no turns: a text that is not JSON stands for the list of them") from None
    if isinstance(value, Mapping):
        columns = {name: column for name, column in value.items() if column is not None}
        if all(isinstance(column, list) for column in columns.values()) and len(set(map(len, columns.values()))) == 1:
            value = [dict(zip(columns, row)) for row in zip(*columns.values())]
    if not isinstance(value, list) or not value:
        raise BadRecord(where, "no turns: there is no list of them, or an empty one")
    return value


def _turn(turn: Any, where: str, found: Counter) -> list[dict[str, Any]]:
    """The message of a turn; several of {"human": ..., "assistant": ...}, which has texts under the roles."""
    if not isinstance(turn, Mapping):
        raise BadRecord(where, "not an object")
    fields = _Fields(turn, where)
    role = fields.take(*_SPEAKERS)
    if role is None and fields.left and fields.left.keys() <= _PAIRED.keys():
        names = sorted(fields.left, key=lambda name: ("system", "user", "assistant").index(_PAIRED[name]))
        return [_message(_PAIRED[name], fields.left[name], where, found) for name in names]
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        what = 'no role: "role" is missing' if role is None else f"unknown role: {_shown(role)!r}"
        raise BadRecord(where, f"{what}; it is one of {', '.join(_ROLES)}")
    content, weight = fields.take(*_WORDS), known != "assistant" or fields.is_learned()
    fields.rest(f"{known}'s ", found)
    return [_message(known, content, where, found, weight)]


def _message(role: str, content: Any, where: str, found: Counter, weight: int = 1) -> dict[str, Any]:
    """A message; its content is a text or a list of text parts, which are joined as the server joins them."""
    if isinstance(content, Mapping) and isinstance(content.get("text"), str):
        content = [content]
    if isinstance(content, list | Mapping):
        content = "".join(_part(part, where, found) for part in _rows(content, where))
    return {"role": role, "content": content, "weight": int(weight)}


def _part(part: Any, where: str, found: Counter) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else part
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str) or kind not in (None, "text"):
        raise BadRecord(where, f"its content is no text: a part of it is {_shown(kind)}")
    _Fields({**part, "text": None, "type": None}, where).rest("part's ", found)
    return part["text"]


def _history(value: Any, where: str, found: Counter) -> list[dict[str, Any]]:
    """The messages of a history, none of them learned: pairs of question and answer, or turns."""
    if value is None or value in ("[]", "null"):
        return []
    messages = []
    for number, item in enumerate(_rows(value, where), 1):
        at = f"{where}, history {number}"
        if isinstance(item, list) and len(item) == 2:  # [None, text] is a greeting
            item = {"user": item[0], "assistant": item[1]}
        messages += _turn(item, at, found)
    return [message | {"weight": 0} for message in messages]


def _joined(messages: list[dict[str, Any]], where: str, found: Counter) -> list[dict[str, Any]]:
    """The messages, those of one speaker in a row as one."""
    joined = messages[:1]
    for number, message in enumerate(messages[1:], 2):
        last = joined[-1]
        if message["role"] != last["role"]:
            joined.append(message)
            continue
        if message["role"] == "assistant" and message["weight"] != last["weight"]:
            raise BadRecord(where, f"two answers in a row, one of them with weight 0: turns {number - 1} and {number}")
        last["content"] = f"{last['content'].strip()}\n\n{message['content'].strip()}"
        found["turns", "turns joined to the one before, of the same speaker"] += 1
    return joined


def sgd_records(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, {"messages": [...]}) of each dialogue in a dialogues_*.json file.

    Consecutive turns of one speaker are joined. A dialogue in another form is passed on for `conversation` to
    refuse; a file that is no JSON list in UTF-8 is a BadRecord.
    """
    try:
        dialogues = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord(str(file), f"not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except (ValueError, RecursionError) as error:  # as in source_files: wrong, or a number of thousands of digits
        raise BadRecord(f"{file}:{getattr(error, 'lineno', 1)}", f"not JSON that can be read ({error})") from None
    if not isinstance(dialogues, list):
        raise BadRecord(str(file), "not a list of dialogues")
    for number, dialogue in enumerate(dialogues, 1):
        name = dialogue.get("dialogue_id", f"number {number}") if isinstance(dialogue, dict) else f"number {number}"
        yield f"{file}, dialogue {_shown(name)}", _sgd_record(dialogue)


def _sgd_record(dialogue: Any) -> Any:
    turns = dialogue.get("turns") if isinstance(dialogue, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return dialogue
    messages: list[dict] = []
    for turn in turns:
        speaker, said = turn.get("speaker"), turn.get("utterance")
        role = _SGD_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        before = messages[-1]["content"] if messages and messages[-1]["role"] == role else None
        if isinstance(said, str) and isinstance(before, str) and before:
            messages[-1]["content"] = f"{before}\n{said}"
        else:
            messages.append({"role": role, "content": said})
    return {"messages": messages}
