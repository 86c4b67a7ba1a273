"""Prompts, as users write them and as made of conversations, and tokens, as users read them. No jax import.

The prompt of a conversation is whole turns or nothing. Where the context is full, the oldest question and answer are
left out together, and the system message stays; so the model never reads half a turn, as it never did in training.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers

from jaxgpt.data.chat import ChatEncoder
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.settings import ChatConfig


@dataclasses.dataclass(frozen=True)
class Prompt:
    text: str
    where: str  # the place where the user wrote it, for messages


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


class ChatPrompt(NamedTuple):
    ids: list[int]
    dropped: int  # oldest turns that did not fit


class ChatPrompts:
    """Makes prompts of conversations for one model."""

    def __init__(self, tokenizer: Tokenizer, n_positions: int, where: str):
        """A UserError says when the tokenizer has no chat tokens; `where` is the model's name in the message."""
        if tokenizer.end_of_turn is None:
            fix = 'fine-tune it with data.format = "chat" (configs/support_chat.toml), or '
            fix = "" if tokenizer.own_template else fix
            raise UserError(f"{where}: no chat model, as {tokenizer.why_no_chat}; {fix}continue plain texts")
        self.end_of_turn: int = tokenizer.end_of_turn
        self._encoder = ChatEncoder(tokenizer, ChatConfig(), n_positions)
        self._n_positions = n_positions

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a whole conversation that ends in a user turn, however long it is."""
        return self._encoder.prompt(messages)

    def fit(self, messages: Sequence[Mapping[str, str]], max_new_tokens: int) -> ChatPrompt:
        """The tokens of a conversation that ends in a user turn, without its oldest turns where it is too long.

        Raises:
            UserError: system message and last turn alone leave no room for `max_new_tokens`.
        """
        head = [message for message in messages[:1] if message["role"] == "system"]
        turns = list(messages[len(head) :])
        room, dropped = self._n_positions - max_new_tokens, 0
        while len(ids := self._encoder.prompt([*head, *turns[dropped:]])) > room:
            if len(turns) - dropped <= 2:
                beside = " with the system message" if head else ""
                raise UserError(
                    f"the message{beside} takes {len(ids)} tokens, with {max_new_tokens} new ones more than "
                    f"the model's n_positions = {self._n_positions}; shorten it, or ask for fewer new tokens"
                )
            dropped += 2
        return ChatPrompt(ids, dropped)


class ChatSession:
    """One conversation: messages as they come, each answered before the next."""

    def __init__(self, prompts: ChatPrompts, system: str = ""):
        self.system = system
        self._prompts = prompts
        self._turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        head = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return head + self._turns

    def ask(self, message: str, max_new_tokens: int) -> ChatPrompt:
        """The prompt for the answer to `message` (see `ChatPrompts.fit`); `answered` adds both to the conversation."""
        if not message.strip():
            raise UserError("the message is blank; write something")
        asked = [*self.messages, {"role": "user", "content": message}]
        prompt = self._prompts.fit(asked, max_new_tokens)
        self._turns = self._turns[prompt.dropped :]
        return prompt

    def answered(self, message: str, answer: str) -> None:
        """Keep a message with its answer; one that was stopped before its first word leaves no trace."""
        if answer.strip():
            self._turns += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        """Forget all but the system message."""
        self._turns = []


# ---------------------------------------------------------------- tokens to read

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token; they may be part of a character."""
    backend = tokenizer.backend
    written = backend.id_to_token(token) or ""
    if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
        is_byte = BYTE_TOKEN.fullmatch(written)
        return bytes.fromhex(written[3:5]) if is_byte else tokenizer.decode([token]).encode()
    byte_of = byte_of_character()
    is_bytes = all(character in byte_of for character in written)
    return bytes(byte_of[character] for character in written) if is_bytes else written.encode()


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a visible Latin-1 character is its own byte, the 68 other bytes are U+0100 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def token_piece(tokenizer: Tokenizer, token: int) -> str:
    """The piece of a token as Python quotes it: text, or bytes if it is a part of a character."""
    written = tokenizer.backend.id_to_token(token) or ""
    if not isinstance(tokenizer.backend.decoder, tokenizers.decoders.ByteLevel) and not BYTE_TOKEN.fullmatch(written):
        return repr(written)  # as "##ing"
    part = token_bytes(tokenizer, token)
    try:
        return repr(part.decode())
    except UnicodeDecodeError:
        return repr(part)
