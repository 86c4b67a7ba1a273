"""Conversations: their canonical text, their tokens, and how learned tokens are shown.

A conversation is one canonical JSON text, a list of {"role", "content"}, from the moment it is read; only this module
turns it into tokens. Each turn is "<|im_start|>ROLE\nCONTENT<|im_end|>\n" (ChatML), CONTENT stripped of whitespace.
An assistant's CONTENT and the <|im_end|> after it are learned (supervised), which is how a model learns to stop, unless
the message has "weight": 0:

    <|im_start|> user \n Hello <|im_end|> \n <|im_start|> assistant \n Good day <|im_end|> \n
                                                                       ^^^^^^^^ ^^^^^^^^^^

With `tokenizer.TEMPLATE`, Hugging Face's `apply_chat_template` gives the same ids and the same mask, except that it
knows no weights, and that the letters "<|im_end|>" in a user's text become the token there (unless
sanitize_control_tokens = True). Here they stay text: a user must not be able to end their own turn and begin an
assistant's.

A document of plain text among conversations is one message, [{"role": "text", "content": TEXT}], TEXT as it is. Its
tokens are end-of-text and those of TEXT, without any of a turn, and all of them are learned.

A tokenizer from a Hugging Face folder may bring a template of its own, which is then used: an answer is what the
template adds to the prompt for it, up to the token that ends it. Where that cannot be told, it is refused.
"""

import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.data.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer
from jaxgpt.errors import BadRecord, UserError
from jaxgpt.settings import ChatConfig

COLOUR, BRACKETS = ("\033[32m", "\033[0m"), ("[[", "]]")
_TEXT = '[{"role": "text", '  # how the canonical JSON of a document of text begins


def to_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The canonical JSON of messages."""
    strip = lambda message: message["content"] if message["role"] == "text" else message["content"].strip()
    plain = [{"role": message["role"], "content": strip(message)} for message in messages]
    for message, short in zip(messages, plain):
        short |= {"weight": 0} if message["role"] == "assistant" and not _is_learned(message) else {}
    return json.dumps(plain, ensure_ascii=False)


def from_plain(text: str) -> str:
    """The canonical JSON of a document of plain text."""
    return to_text([{"role": "text", "content": text}])


def plain_of(text: str) -> str | None:
    """The plain text that a canonical JSON holds; None for a conversation."""
    return json.loads(text)[0]["content"] if text.startswith(_TEXT) else None


def check_messages(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Require at most one system message, at the start, an answer at the end, and no blank turn, else BadRecord."""
    if any(message["role"] == "text" for message in messages):
        if len(messages) > 1:
            raise BadRecord(where, "a text among turns; it stands alone")
        return
    for number, message in enumerate(messages, 1):
        _check_content(message["content"], f"{where}, turn {number}")
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        place = 1 + roles.index("system", 1)
        raise BadRecord(where, f"a system turn after the first: turn {place}; there may be one, before all others")
    if "assistant" not in roles:
        raise BadRecord(where, "no assistant turn, so nothing to learn")
    if roles[-1] == "user":
        raise BadRecord(where, "ends in a user turn, which no answer follows; drop it")


def _check_content(content: object, where: str) -> None:
    if not isinstance(content, str):
        raise BadRecord(where, f"its content is {'missing' if content is None else 'no text'}")
    if not content.strip():
        raise BadRecord(where, "its content is blank")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(where, f"not valid Unicode: lone surrogate U+{ord(content[error.start]):04X}") from None


def with_chat_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the two tokens of a turn, or one whose own template can be learned; the same if it is that.

    Raises:
        UserError: a template of its own does not show what to learn; says why.
    """
    if tokenizer.own_template is None:
        return tokenizer.with_special_tokens((START_OF_TURN, END_OF_TURN))
    probe = [{"role": role, "content": f"word {n}"} for n in range(2) for role in ("user", "assistant")]
    try:
        ChatEncoder(tokenizer, ChatConfig(), sys.maxsize).encode(to_text(probe))
    except BadRecord as error:
        fix = "use a folder without it (chat_template.jinja, tokenizer_config.json), which gets jaxgpt's"
        raise UserError(f"the tokenizer's own chat template cannot be learned: {error.reason}; {fix}") from None
    assert tokenizer.end_of_turn is not None
    return tokenizer.with_end(tokenizer.end_of_turn)


def with_system(messages: Sequence[Mapping[str, str]], system: str) -> list[Mapping[str, str]]:
    """The messages, with `system` in front if they have no system message of their own and are no text."""
    has_one = bool(messages) and messages[0]["role"] in ("system", "text")
    return list(messages) if has_one or not system.strip() else [{"role": "system", "content": system}, *messages]


def plain_texts(text: str, settings: ChatConfig) -> list[str]:
    """The texts of a canonical conversation that a tokenizer is trained on: one a turn, without special tokens."""
    if (plain := plain_of(text)) is not None:
        return [plain]
    messages = with_system(json.loads(text), settings.system)
    return [f"{message['role']}\n{message['content'].strip()}" for message in messages]


class Encoded(NamedTuple):
    """The tokens of a conversation or of a part of one."""

    tokens: np.ndarray  # int32 [n]
    supervised: np.ndarray  # bool [n]: the token is learned: of an answer, or the <|im_end|> after it; all of a text
    num_bytes: int  # UTF-8 bytes of the answers, or of the text


class ChatEncoder:
    """Turns canonical conversations into tokens."""

    def __init__(self, tokenizer: Tokenizer, settings: ChatConfig, block_size: int):
        """`tokenizer` has the chat tokens; a conversation is cut into parts of at most `block_size` tokens."""
        self._tokenizer, self._system, self._block_size = tokenizer, settings.system, block_size
        if tokenizer.own_template is not None:
            return
        start, end = tokenizer.backend.token_to_id(START_OF_TURN), tokenizer.backend.token_to_id(END_OF_TURN)
        assert start is not None and end is not None, "call with_chat_tokens first"
        self._start, self._end = start, end
        self._line_break = tokenizer.encode("\n")

    def encode(self, text: str, where: str = "a conversation") -> list[Encoded]:
        """The parts of a canonical conversation: one if it fits the block, else as few as possible, cut between turns.

        Each part begins with the system message, if there is one, and a user turn (in the first part, what the
        assistant said before it), and ends with a whole answer. Nothing is lost; text before a cut is not visible
        after it. A text is cut at any character, and each further part begins with the token that the one before ended
        with: the first token of a part is no target, so every token of the text is one once.

        Raises:
            BadRecord: `check_messages` refuses it, or one question and its answer do not fit the block.
        """
        messages = with_system(json.loads(text), self._system)
        check_messages(messages, where)
        if messages[0]["role"] == "text":
            return self._text_parts(messages[0]["content"], where)
        if self._tokenizer.own_template is not None:
            return self._parts(messages, where)
        turns = [self._turn(message) for message in messages]
        begin, ends = _exchanges(messages)
        head, room = turns[:begin], self._block_size - sum(len(turn.tokens) for turn in turns[:begin])
        parts, size = [], room + 1
        for end in ends:
            pair = turns[begin:end]
            length = sum(len(turn.tokens) for turn in pair)
            if length > room:
                beside = f" beside a system message of {self._block_size - room}" if head else ""
                reason = f"a question and its answer are {length} tokens{beside}, data.block_size = {self._block_size}"
                raise BadRecord(f"{where}, turns {begin + 1} and {end}", f"longer than a block: {reason}")
            if size + length > room:
                parts.append(list(head))
                size = 0
            parts[-1] += pair
            size, begin = size + length, end
        columns = (zip(*part) for part in parts)
        return [Encoded(np.concatenate(ids), np.concatenate(learned), sum(sizes)) for ids, learned, sizes in columns]

    def _text_parts(self, text: str, where: str) -> list[Encoded]:
        found, at = self._tokenizer.encode_with_ends(text)
        ids, ends = np.array([self._tokenizer.end_of_text, *found], np.int32), np.maximum.accumulate([0, *at])
        if self._block_size < 2:
            raise BadRecord(where, "longer than a block: a text needs two tokens, data.block_size = 1")
        ends[-1] = len(text)
        parts: list[Encoded] = []
        begin = 0
        while not parts or begin < len(ids) - 1:
            end = last = min(begin + self._block_size, len(ids))
            while end > begin + 1 and end < len(ids) and ends[end - 1] == ends[end]:
                end -= 1  # the next token has a part of the same character
            end = end if end > begin + 1 else last
            size = len(text[ends[begin] : ends[end - 1]].encode())
            parts.append(Encoded(ids[begin:end], np.ones(end - begin, bool), size))
            begin = end - 1
        return parts

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation that ends in a user turn, followed by the start of an assistant turn."""
        messages = with_system(messages, self._system)
        if self._tokenizer.own_template is not None:
            return self._tokenizer.encode_rendered(self._tokenizer.render(messages, for_answer=True)).ids
        turns = [self._turn(message) for message in messages]
        tokens = [int(token) for turn in turns for token in turn.tokens]
        return [*tokens, self._start, *self._tokenizer.encode("assistant\n")]

    def _turn(self, message: Mapping[str, Any]) -> Encoded:
        role, content = message["role"], message["content"].strip()
        ids, first = self._tokenizer.encode_from(f"{role}\n{content}", len(role) + 1)
        tokens = np.array([self._start, *ids, self._end, *self._line_break], np.int32)
        supervised = np.zeros(len(tokens), bool)
        if not _is_learned(message):
            return Encoded(tokens, supervised, 0)
        supervised[1 + first : 2 + len(ids)] = True
        return Encoded(tokens, supervised, len(content.encode()))

    def _parts(self, messages: Sequence[Mapping[str, Any]], where: str) -> list[Encoded]:
        """The same parts as `encode`, by the tokenizer's own template."""
        begin, ends = _exchanges(messages)
        head, parts = messages[:begin], []
        while ends:
            for count in range(len(ends), 0, -1):
                part = self._rendered([*head, *messages[begin : ends[count - 1]]], where)
                if len(part.tokens) <= self._block_size:
                    break
            else:
                reason = f"longer than a block: {len(part.tokens)} tokens, data.block_size = {self._block_size}"
                raise BadRecord(f"{where}, turns {begin + 1} and {ends[0]}", reason)
            parts.append(part)
            begin, ends = ends[count - 1], ends[count:]
        return parts

    def _rendered(self, messages: Sequence[Mapping[str, Any]], where: str) -> Encoded:
        """A whole conversation by the tokenizer's own template. Each answer must be there what follows its prompt."""
        render, spans = self._tokenizer.render, []
        answers = [number for number, message in enumerate(messages) if _is_learned(message)]
        try:
            whole = render(messages)
            for number in answers:
                prompt, answered = render(messages[:number], for_answer=True), render(messages[: number + 1])
                if not (answered.startswith(prompt) and whole.startswith(answered)):
                    raise UserError(f"its chat template writes turn {number + 1} otherwise before other turns")
                spans.append((len(prompt), len(answered)))
            found = self._tokenizer.encode_rendered(whole)
        except UserError as error:
            raise BadRecord(where, str(error)) from None
        tokens, (starts, stops) = np.array(found.ids, np.int32), np.array(found.offsets).T
        supervised = np.zeros(len(tokens), bool)
        for begin, end in spans:
            inside = np.flatnonzero((starts >= begin) & (stops <= end))
            ends = inside[tokens[inside] == self._tokenizer.end_of_turn]
            if not len(ends):
                raise BadRecord(where, "its chat template ends an answer with no token of its own, so none would stop")
            if ((starts < begin) & (stops > begin)).any():
                raise BadRecord(where, "its chat template begins an answer within a token")
            supervised[inside[0] : ends[0] + 1] = True
        return Encoded(tokens, supervised, sum(len(messages[number]["content"].encode()) for number in answers))


def _is_learned(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(message.get("weight", 1))


def _exchanges(messages: Sequence[Mapping[str, Any]]) -> tuple[int, list[int]]:
    """The number of system messages, and where each question with its answer ends; the first takes a greeting along."""
    begin = int(messages[0]["role"] == "system")
    return begin, [n for n, message in enumerate(messages, 1) if message["role"] == "assistant" and n > begin + 1]


def marks(colour: bool | None = None) -> tuple[str, str]:
    """The marks before and after a learned text; with None, colour is used if stdout is a terminal without NO_COLOR."""
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return COLOUR if colour else BRACKETS


def pieces(tokens: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of tokens [n] as [(text, whether it is learned)], cut where `learned`, bool [n], changes."""
    borders = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
    spans = itertools.pairwise(borders)
    return [(tokenizer.decode(tokens[begin:end]), bool(learned[begin])) for begin, end in spans if end > begin]


def marked(parts: list[tuple[str, bool]], between: tuple[str, str], longest: int) -> str:
    """The text of `pieces`, at most `longest` characters, the learned ones between the two `marks`."""
    text, left = "", longest
    for piece, is_learned in parts:
        # A terminal would obey control characters in the data.
        safe = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in piece[:left])
        text += f"{between[0]}{safe}{between[1]}" if is_learned else safe
        left -= len(piece)
        if left <= 0:
            return f"{text} ..."
    return text.rstrip("\n")
