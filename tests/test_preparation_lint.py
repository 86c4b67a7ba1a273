"""The lint shows what is learned of prepared conversations, counts what is odd, and refuses answers without an end."""

import dataclasses
import json

import numpy as np
import pytest

from jaxgpt.data import chat
from jaxgpt.data.dataset import PackedRows, open_dataset
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.errors import UserError
from jaxgpt.preparation import lint
from jaxgpt.preparation.writer import PackedWriter
from jaxgpt.settings import ChatConfig

PLAIN = train_bpe(["user\nassistant\nWhere is my parcel? 你好"] * 3, 300)
TOKENIZER = chat.with_chat_tokens(PLAIN)
BLOCK = 128


def conversation(*contents: str) -> str:
    return json.dumps([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)])


def prepared(folder, conversations, change=lambda number, tokens, supervised: None):
    """A dataset of the conversations, each as `change` left its tokens and mask."""
    folder.mkdir()
    writer = PackedWriter(folder, TOKENIZER, BLOCK, packing=True)
    encoder = chat.ChatEncoder(TOKENIZER, ChatConfig(), BLOCK)
    for split in ("train", "validation"):
        for number, text in enumerate(conversations):
            for part in encoder.encode(text):
                change(number, part.tokens, part.supervised)
                writer.add(split, part.tokens, part.supervised, part.num_bytes, number)
    writer.finish({"fingerprint": "", "settings": {}})
    return open_dataset(folder)


def test_the_counts_are_those_of_the_conversations(tmp_path):
    texts = [
        conversation("Hi", "Good day", "Hi", "Good day again"),  # one repeated turn
        conversation("Hi", "Good day"),
        conversation(*[f"{i} long enough to be cut somewhere" for i in range(8)]),
    ]
    encoder = chat.ChatEncoder(TOKENIZER, ChatConfig(), BLOCK)
    parts = [part for text in texts for part in encoder.encode(text)]
    found = lint.check(prepared(tmp_path / "data", texts))
    assert found.num_conversations == len(parts) > found.num_documents == 3
    assert found.num_tokens == sum(len(part.tokens) for part in parts)
    assert found.num_supervised == sum(part.supervised.sum() for part in parts)
    assert (found.num_in_parts, found.duplicate_turns, found.empty_turns, found.without_answer) == (1, 1, 0, 0)
    told = lint.show(found, colour=False)
    assert f"({found.num_supervised / found.num_tokens:.1%})" in told and "warning" not in told


def test_empty_turns_and_conversations_without_an_answer_are_counted(tmp_path):
    def change(number, tokens, supervised):
        if number == 1:
            tokens[-6:-2] = TOKENIZER.encode(" ")[0]  # an answer of spaces
        if number == 2:
            supervised[:] = False

    texts = [conversation("Hi", "Good day"), conversation("Hi", "abcd"), conversation("Hi", "Ho")]
    assert len(TOKENIZER.encode("abcd")) == 4
    found = lint.check(prepared(tmp_path / "data", texts, change))
    assert (found.empty_turns, found.without_answer) == (1, 1)
    assert "warning: 1 of them have nothing to learn" in lint.show(found)


def test_an_answer_that_does_not_end_in_the_stop_token_is_refused_with_its_number(tmp_path):
    def change(number, tokens, supervised):
        if number == 6:
            supervised[np.flatnonzero(supervised)[-1]] = False  # the mask of most home-made templates

    dataset = prepared(tmp_path / "data", [conversation("Hi", f"Good day {i}") for i in range(9)], change)
    with pytest.raises(UserError) as error:
        lint.check(dataset)
    assert f"{tmp_path / 'data'}: conversation 7: an answer does not end in <|im_end|>" in str(error.value)


def test_a_tokenizer_without_a_stop_token_is_refused(tmp_path):
    dataset = prepared(tmp_path / "data", [conversation("Hi", "Ho")])
    PLAIN.save(tmp_path / "data" / "tokenizer")
    with pytest.raises(UserError, match=r"no <\|im_end\|>, so no answer would stop"):
        lint.check(dataclasses.replace(dataset))  # which has not read its tokenizer yet


def test_three_conversations_are_shown_with_what_is_learned_marked(tmp_path, monkeypatch):
    texts = [conversation("Hi 你好", f"Good \x1b[31m day {i}", "And?", "No") for i in range(30)]
    found = lint.check(prepared(tmp_path / "data", texts))
    assert len({example.document for example in found.examples}) == 3
    plain = lint.show(found)  # stdout is no terminal here
    assert plain.count("<|im_start|>user\nHi 你好<|im_end|>\n<|im_start|>assistant\n[[Good ") == 3
    assert plain.count("[[No<|im_end|>]]") == 3 and "\x1b" not in plain and "Good \\x1b[31m day" in plain
    coloured = plain.replace("[[marked]]", "green").replace("[[", "\033[32m").replace("]]", "\033[0m")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert lint.show(found) == coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert lint.show(found) == plain


def test_of_many_rows_evenly_spread_ones_are_looked_at_and_that_is_said(tmp_path, monkeypatch):
    texts = [conversation("Hi", f"Good day {i} " + "x" * 60) for i in range(30)]
    dataset = prepared(tmp_path / "data", texts)
    monkeypatch.setattr(lint, "MOST_ROWS", 5)
    found = lint.check(dataset)
    assert found.rows_read == 5 < found.num_rows == dataset.train.num_rows
    assert f"5 of {found.num_rows} rows" in lint.show(found)
    assert found.examples[-1].document > 15


def test_an_empty_split_is_no_failure(tmp_path):
    dataset = prepared(tmp_path / "data", [conversation("Hi", "Ho")])
    rows = PackedRows([], "uint16", BLOCK, *[0] * 6)
    empty = dataclasses.replace(dataset, train=rows)
    assert lint.check(empty).num_conversations == 0
