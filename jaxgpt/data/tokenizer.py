"""Text to token ids and back: a thin layer over the `tokenizers` library, stored in Hugging Face's files.

A tokenizer is its JSON text, written once when the tokenizer is made and copied unchanged from then on, so its digest
identifies it whatever library version reads it. Text is always only text: the letters "<|endoftext|>" in a document or
a prompt are thirteen characters and never the end-of-text token, which has only its id.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxgpt.errors import UserError
from jaxgpt.storage.files import write_file

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] | trim + '<|im_end|>' }}"
    "{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The chat template that is saved with a tokenizer: what Hugging Face calls chat_template. chat.py explains it."""
FILE, GENERATION = "tokenizer.json", "generation_config.json"

_LONG = 4096  # characters, a millisecond

# GPT-2's pattern never joins a line break after a visible character with a visible character that follows, so the
# tokens of a text cut there are the tokens of the whole.
_SAFE_BORDER = re.compile(r"(?<=\S\n)(?=\S)")


@dataclasses.dataclass(frozen=True)
class Declared:
    """What a Hugging Face folder says beside its vocabulary."""

    special: Mapping[str, str] = dataclasses.field(default_factory=dict)  # {"eos_token": "<|end|>", ...}
    ends: tuple[int, ...] = ()  # tokens that end a text
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)  # {"default": its chat template, ...}
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # generation_config.json without eos


class Tokenizer:
    """A tokenizer of the `tokenizers` library with the id of its end-of-text token."""

    def __init__(self, json_text: str, end_of_text: str = END_OF_TEXT, declared: Declared = Declared()):
        """`json_text` is the content of a tokenizer.json with the token `end_of_text`."""

        content = json.loads(json_text)
        self._json = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        self.backend = tokenizers.Tokenizer.from_str(json_text)
        self.backend.encode_special_tokens = True
        self._end_of_text = end_of_text
        added = _added_tokens(self.backend).items()
        self.declared = declared
        self.why_no_chat = f"its tokenizer has no {END_OF_TURN}"
        self._special = {token: number for token, (number, is_special) in added if is_special}
        end = self.backend.token_to_id(end_of_text)
        assert end is not None, f"no token {end_of_text}"
        self.end_of_text: int = end
        self.vocab_size: int = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
        self._characters = _characters(content, end_of_text)
        self._cuttable = self._characters is not None or _is_gpt2_like(content)

    @property
    def dtype(self) -> np.dtype:
        """The type in which prepared data stores tokens."""
        return np.dtype("uint16" if self.vocab_size < 65_536 else "uint32")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's canonical JSON, in hexadecimal."""
        return hashlib.sha256(f"{self._json}\n{self._end_of_text}".encode()).hexdigest()

    @property
    def own_template(self) -> str | None:
        """The chat template that the folder brings; None if it has none, or `TEMPLATE`."""
        template = self.declared.templates.get("default")
        return None if template == TEMPLATE else template

    @functools.cached_property
    def end_of_turn(self) -> int | None:
        """The token that ends an answer; None for a tokenizer that cannot chat, for the reason in `why_no_chat`."""
        if self.own_template is None:
            return self._special.get(END_OF_TURN) if START_OF_TURN in self._special else None
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
        try:
            self.render(messages[:1], for_answer=True)
            tail = self.encode_rendered(self.render(messages).rpartition("Good day")[2]).ids
        except UserError as error:
            self.why_no_chat = str(error)
            return None
        special = {*self._special.values(), *self.declared.ends}
        return next((token for token in tail if token in special), self.end_of_text)

    @property
    def ends(self) -> list[int]:
        """The tokens that end every text: those of the folder, end-of-text, and our own template's end of a turn."""
        turn = self.end_of_turn if self.own_template is None else None
        return [end for end in dict.fromkeys((turn, *self.declared.ends, self.end_of_text)) if end is not None]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never special tokens; a character that the tokenizer does not know is a UserError."""
        self._check_characters(text)
        with library_errors("the tokenizer cannot read this text"):
            if len(text) > _LONG:  # a batch releases the GIL; a single text does not
                return self.backend.encode_batch([text], add_special_tokens=False)[0].ids
            return self.backend.encode(text, add_special_tokens=False).ids

    def encode_from(self, text: str, start: int) -> tuple[list[int], int]:
        """The ids of `text`, and how many of them come before character `start` of it."""
        self._check_characters(text)
        with library_errors("the tokenizer cannot read this text"):
            encoding = self.backend.encode(text, add_special_tokens=False)
        before = next((i for i, (_, end) in enumerate(encoding.offsets) if end > start), len(encoding.ids))
        return encoding.ids, before

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text of any length, and the character before which each of them ends."""
        self._check_characters(text)
        ids, ends, start = list[int](), list[int](), 0
        for piece in self.pieces(text, _LONG):
            with library_errors("the tokenizer cannot read this text"):
                encoding = self.backend.encode(piece, add_special_tokens=False)
            ids += encoding.ids
            ends += [start + end for _, end in encoding.offsets]
            start += len(piece)
        return ids, ends

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts as int32 arrays, encoded on all cores."""
        for text in texts:
            self._check_characters(text)
        with library_errors("the tokenizer cannot read one of these texts"):
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """The parts of the text by `cut`, or the whole text if cutting could change its tokens."""
        return cut(text, size) if self._cuttable else iter([text])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, including special tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, str]], for_answer: bool = False) -> str:
        """The text of messages by the folder's chat template, in the sandbox and with the limits of transformers.

        `for_answer` adds the beginning of an answer.

        Raises:
            UserError: the template fails or refuses them, or they hold a token's name, which it would turn into that.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        template, values = self.own_template or TEMPLATE, dict[str, Any](self.declared.special)
        for name, (_, is_special) in _added_tokens(self.backend).items():
            if (is_special or name in template) and any(name in message["content"] for message in messages):
                raise UserError(f"the conversation holds {name!r}, which would become that token; write it otherwise")
        chats = [[dict(message) for message in messages]]
        try:
            made: Any = render_jinja_template(chats, chat_template=template, add_generation_prompt=for_answer, **values)
        except Exception as error:  # noqa: BLE001 - a template is a program: it can raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"its chat template fails or refuses the conversation ({reason})") from None
        return made[0][0]

    def encode_rendered(self, text: str) -> tokenizers.Encoding:
        """The tokens of a rendered conversation, in which the names of special tokens are the tokens."""
        with library_errors("the tokenizer cannot read this conversation"):
            return self._marking.encode(text, add_special_tokens=False)

    @functools.cached_property
    def _marking(self) -> tokenizers.Tokenizer:
        content = json.loads(self._json) | {"post_processor": None}  # it would trim the space before a word
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    def with_end(self, end: int) -> "Tokenizer":
        """This tokenizer, which declares that `end` ends a text, too."""
        ends = tuple(dict.fromkeys((end, *self.declared.ends)))
        return Tokenizer(self._json, self._end_of_text, dataclasses.replace(self.declared, ends=ends))

    def with_special_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """This tokenizer with `tokens` added at the end of its vocabulary, except those that it has already.

        Raises:
            UserError: ordinary text can become one of them, or one cannot be decoded as it is written.
        """
        new = [token for token in tokens if token not in self._special]
        if not new:
            return self
        content = json.loads(self._json)
        added = content.setdefault("added_tokens", [])
        for token in [token for token in added if token["content"] in new]:  # it has its id, and is special from now on
            token |= {"special": True, "normalized": False}
            new.remove(token["content"])
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token_id, token in enumerate(new, start=self.vocab_size):
            if self.backend.token_to_id(token) is not None:
                raise UserError(
                    f"tokenizer.special_tokens: {token!r} is an ordinary token of the tokenizer, which text may "
                    "hold; choose another name, for example <|user|>"
                )
            added.append({"id": token_id, "content": token, "special": True, **plain})
        extended = Tokenizer(json.dumps(content, ensure_ascii=False), self._end_of_text, self.declared)
        for token_id, token in enumerate(new, start=self.vocab_size):
            # The library chooses the ids of added tokens, and its decoder may take a letter for a byte.
            if extended.backend.token_to_id(token) != token_id or extended.decode([token_id]) != token:
                raise UserError(f"tokenizer.special_tokens: {token!r} cannot be added to this tokenizer; use ASCII")
        return extended

    def extends(self, other: "Tokenizer") -> bool:
        """Whether ids of `other` mean the same here, so that weights trained with it can be used with this one.

        Both split text alike, and every token of `other` has the same id; this one may have more special tokens.
        """
        ours, theirs = _added_tokens(self.backend), _added_tokens(other.backend)
        same_end = self.end_of_text == other.end_of_text
        same_ids = all(
            token in ours and ours[token][0] == number and ours[token][1] >= is_special
            for token, (number, is_special) in theirs.items()
        )
        return same_end and same_ids and _rules(self.backend) == _rules(other.backend)

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """Write the files that `transformers.AutoTokenizer` reads; with chat tokens the chat template, too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / FILE, self._json)
        splitter = json.loads(self._json).get("pre_tokenizer") or {}
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": bool(splitter.get("add_prefix_space", False)),
            "clean_up_tokenization_spaces": False,
            **(self.declared.special or dict.fromkeys(("bos_token", "eos_token", "unk_token"), self._end_of_text)),
        }
        settings.setdefault("eos_token", self._end_of_text)
        if model_max_length is not None:
            settings["model_max_length"] = model_max_length
        templates = dict(self.declared.templates)
        if self.own_template is None and self.end_of_turn is not None:
            templates["default"] = TEMPLATE
        if list(templates) == ["default"]:
            settings["chat_template"] = templates["default"]  # for older readers
            write_file(folder / "chat_template.jinja", templates["default"])
        elif templates:
            settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        write_file(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        turn = self.end_of_turn if self.own_template is None else None
        if {*self.ends} != {turn, self.end_of_text} - {None} or self.declared.generation:
            write_file(folder / GENERATION, json.dumps(self.generation_config, indent=2, sort_keys=True) + "\n")

    @property
    def generation_config(self) -> dict[str, Any]:
        """The generation_config.json with which transformers' `generate` ends a text where we do."""
        padding = dict.fromkeys(("bos_token_id", "pad_token_id"), self.end_of_text)
        ends = self.ends if len(self.ends) > 1 else self.end_of_text
        return padding | dict(self.declared.generation) | {"eos_token_id": ends}

    def _check_characters(self, text: str) -> None:
        if self._characters is None:
            return
        unknown = set(text) - self._characters
        if unknown:
            first = min(unknown, key=text.index)
            raise UserError(
                f"the character-level tokenizer has no token for {first!r} (U+{ord(first):04X}): it knows "
                f"only the {len(self._characters)} characters of its corpus; leave it out or use "
                'tokenizer.type = "bpe"'
            )


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns what the `tokenizers` library raises into a UserError of one line that begins with `what`."""
    try:
        yield
    except BaseException as error:  # a panic of its Rust code is no Exception
        if type(error) is Exception or isinstance(error, ValueError) or type(error).__name__ == "PanicException":
            raise UserError(f"{what} ({' '.join(str(error).split())[:200]})") from None
        raise


def train_bpe(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> Tokenizer:
    """A byte-level BPE like GPT-2's, trained on `texts`: the end-of-text token, the 256 bytes, merges.

    Unlike GPT-2's it never joins digits, so that a number is read digit by digit: what a small model learns of 47 then
    holds for 48 (docs/data.md has figures). The same texts give the same tokenizer. A small corpus may give fewer than
    `vocab_size` entries, as a pair must occur twice to be merged.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str())


def char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer with one token for each character of `texts`, in the order of code points, then end-of-text."""
    characters = sorted(set(itertools.chain.from_iterable(texts)))
    vocab = {token: i for i, token in enumerate([*characters, END_OF_TEXT])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=END_OF_TEXT))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend.to_str())


def cut(text: str, size: int) -> Iterator[str]:
    """The text in parts of about `size` characters, cut only where GPT-2's pattern always cuts.

    The tokens of the parts are those of the whole, encoded on all cores in little memory. Without such a border a part
    is longer.
    """
    start = 0
    while len(text) - start > size:
        border = _SAFE_BORDER.search(text, start + size)
        if border is None:
            break
        yield text[start : border.start()]
        start = border.start()
    if start < len(text):
        yield text[start:]


def spread(texts: Iterable[str], max_bytes: int, size: int) -> list[str]:
    """A sample of parts of about `size` characters, spread evenly over all `texts`, of at most `max_bytes` of UTF-8.

    It has all of the texts if they are not longer than that, else at least half of `max_bytes`.
    """
    kept: list[tuple[str, int]] = []
    stride, number, total = 1, 0, 0
    for text in texts:
        for piece in cut(text, max(1, min(size, max_bytes // 16))):
            if number % stride == 0:
                kept.append((piece, len(piece.encode())))
                total += kept[-1][1]
            number += 1
            while total > max_bytes and len(kept) > 1:  # drop every other part, and take half as many from now on
                kept, stride = kept[::2], 2 * stride
                total = sum(bytes_ for _, bytes_ in kept)
    return [piece for piece, _ in kept]


def _characters(content: dict, end_of_text: str) -> frozenset[str] | None:
    """The alphabet of a tokenizer made by `char_tokenizer`; None for any other."""
    if content["model"].get("type") != "WordLevel":
        return None
    alphabet = frozenset(content["model"]["vocab"]) - {end_of_text}
    return alphabet if all(len(token) == 1 for token in alphabet) else None


def _is_gpt2_like(content: dict) -> bool:
    """Whether text is split by GPT-2's pattern, perhaps after its digits, and not changed before."""
    splitter = content.get("pre_tokenizer") or {}
    if splitter.get("type") == "Sequence" and len(parts := splitter["pretokenizers"]) == 2:
        splitter = parts[1] if parts[0] == {"type": "Digits", "individual_digits": True} else splitter
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return gpt2.items() <= splitter.items() and content.get("normalizer") is None


def _rules(backend: tokenizers.Tokenizer) -> dict[str, object]:
    """The parts of the JSON that decide the ids of a text, without added tokens, comparable between writers.

    The post-processor is left out: it adds tokens that are never used here. Settings of the model that old files omit
    or write as "", null or false are equal.
    """
    content = json.loads(backend.to_str())
    content["model"] = {key: value for key, value in content["model"].items() if value}
    return {key: value for key, value in content.items() if key not in ("added_tokens", "post_processor", "version")}


def _added_tokens(backend: tokenizers.Tokenizer) -> dict[str, tuple[int, bool]]:
    """{token: (id, whether it is special: ordinary text never becomes it)}"""
    return {token.content: (number, token.special) for number, token in backend.get_added_tokens_decoder().items()}
