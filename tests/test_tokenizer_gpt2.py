"""Our tokenizer and transformers' agree on GPT-2's files: vocab.json and merges.txt.

GPT-2's own vocabulary is not in this repository. JAXGPT_GPT2_TOKENIZER names a folder that holds it; without,
a byte-level BPE is trained here and written in the same form.
"""

import json
import os
import random
import sys
from pathlib import Path

import pytest

from jaxgpt.data.tokenizer import END_OF_TEXT, train_bpe
from jaxgpt.data.tokenizer_folder import load_tokenizer

CODE = """def f(x):
\tif x >= 10:
        return {"a": x**2, 'b': [x // 3]}  # it's we'll


    raise ValueError(f"{x!r}")
"""
pytestmark = pytest.mark.system
TEXTS = {
    "english": "Hello world! It's the cat's; we'd don't they've I'm you're HE'LL 3.14159 1,000,000  two  spaces ",
    "chinese": "你好，世界。我们今天去北京，天气很好。繁體字也要對：龍龜鬱。𠀀𪚥 全角ＡＢＣ１２３",
    "other scripts": "日本語のテキスト、한국어 텍스트, русский текст, اللغة العربية, עברית, हिन्दी, ไทย, ελληνικά",
    "emoji": "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇨🇳 👍🏽 ❤️ ☎︎ 🧬",
    "combining marks": "e\u0301 o\u0302\u0323 Z\u0351\u036b\u0343a\u0323\u0302l\u0300g\u0321o \u1e9b\u0323 \u212b",
    "code": CODE,
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x85\x9f\x00\x00 a\x00b\x1b[31m",
    "spaces": " \t\n\r\n \u00a0\u2003\u2028\u2029\u3000\u200b\u200d\ufeff  x   \n\n  \n y\t\t",
    "odd characters": "\ufffd\ufffe\uffff\ue000\U0010ffff\U000e0001\ufdd0",
    "numbers": "٣٤٥ ½ Ⅷ ① 1st x² 0x1F",
    "empty": "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    given = os.environ.get("JAXGPT_GPT2_TOKENIZER")
    if given:
        return Path(given)
    trained, folder = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("gpt2")
    train_bpe([*TEXTS.values(), Path(json.__file__).read_text()], 1500).save(trained)
    model = json.loads((trained / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    # As GPT-2 has it: the bytes, the merged tokens, and end-of-text last.
    tokens = sorted(model["vocab"], key=lambda token: (token == END_OF_TEXT, model["vocab"][token]))
    vocab = json.dumps({token: i for i, token in enumerate(tokens)})
    (folder / "vocab.json").write_text(vocab)
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=["GPT2TokenizerFast", "AutoTokenizer"])
def theirs(request, folder):
    import transformers

    if request.param == "GPT2TokenizerFast":
        return transformers.GPT2TokenizerFast.from_pretrained(folder)
    config = transformers.GPT2Config()  # a tokenizer's folder of two files does not say whose it is
    return transformers.AutoTokenizer.from_pretrained(folder, config=config)


def random_text(rng: random.Random, length: int) -> str:
    """Any characters, half of them of the kinds that occur; no lone surrogates, which UTF-8 does not have."""
    points = (rng.randrange(rng.choice([0x80, 0x3000, 0x10000, sys.maxunicode + 1])) for _ in range(length))
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def test_the_sizes_and_end_of_text_agree(ours, theirs):
    assert ours.vocab_size == len(theirs) > 1000
    assert ours.end_of_text == theirs.eos_token_id == ours.vocab_size - 1
    assert ours.decode([ours.end_of_text]) == theirs.decode([theirs.eos_token_id]) == END_OF_TEXT
    if os.environ.get("JAXGPT_GPT2_TOKENIZER"):
        assert ours.vocab_size == 50257


@pytest.mark.parametrize("name", TEXTS)
def test_encode_agrees_and_decode_gives_the_text_back(ours, theirs, name):
    text = TEXTS[name]
    for part in (text, " " + text, text * 2, *text.split()):
        ids = ours.encode(part)
        assert ids == theirs(part)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == part


def test_random_unicode_agrees(ours, theirs):
    rng = random.Random(0)
    texts = [random_text(rng, rng.randrange(60)) for _ in range(500)]
    for text, ids in zip(texts, theirs(texts)["input_ids"], strict=True):
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == theirs(texts)["input_ids"]


def test_any_ids_decode_alike_even_when_they_cut_characters(ours, theirs):
    rng = random.Random(1)
    for _ in range(1000):
        ids = [rng.randrange(rng.choice([256, ours.vocab_size])) for _ in range(rng.randrange(20))]
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    replaced = 0
    for name in ("chinese", "emoji", "other scripts"):
        ids = ours.encode(TEXTS[name])
        for start in range(len(ids)):
            part = ids[start : start + 7]
            text = ours.decode(part)
            replaced += "\ufffd" in text
            assert text == theirs.decode(part, clean_up_tokenization_spaces=False)
    assert replaced > 10


def test_the_letters_of_end_of_text_are_text_to_us_and_the_token_to_them(ours, theirs):
    text = f"one{END_OF_TEXT}two"
    assert ours.end_of_text not in ours.encode(text) and ours.decode(ours.encode(text)) == text
    assert ours.encode("one") + [ours.end_of_text] + ours.encode("two") == theirs(text)["input_ids"]


def test_what_we_save_is_read_back_as_the_same_tokenizer_by_both(ours, theirs, tmp_path):
    from transformers import AutoTokenizer

    ours.save(tmp_path)
    again, auto = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.digest == ours.digest
    for text in TEXTS.values():
        assert again.encode(text) == auto(text)["input_ids"] == theirs(text)["input_ids"]
