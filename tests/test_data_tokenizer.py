"""Text becomes ids and comes back unchanged, with the same tokenizer wherever it is read."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxgpt.data.tokenizer import END_OF_TEXT, char_tokenizer, cut, spread, train_bpe
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import UserError

ODD = "Hello  world\r\n\n\t  你好，世界 🙂👩‍👩‍👧 e\u0301 \x00\x07\x1c\x7f\u2028\u00a0\ufeff fin \n"
CORPUS = ["the cat sat on the mat.\n" * 20, "def f(x):\n    return x + 1\n" * 20, ODD]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(CORPUS, vocab_size=300)


@pytest.fixture(scope="module")
def char():
    return char_tokenizer([*CORPUS, END_OF_TEXT])


@pytest.fixture(params=["bpe", "char"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_decode_of_encode_is_the_text(tokenizer):
    for text in (*CORPUS, "", " ", "\n\n", END_OF_TEXT):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_takes_any_text_even_what_its_corpus_lacks(bpe):
    text = "ќ 한국어 \U0001f9ec \x01"
    assert bpe.decode(bpe.encode(text)) == text


def test_the_letters_of_end_of_text_are_never_the_token(tokenizer):
    text = f"a{END_OF_TEXT}t"
    assert tokenizer.end_of_text not in tokenizer.encode(text)
    assert tokenizer.end_of_text not in tokenizer.encode_batch([text])[0]
    assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT


def test_encode_batch_is_encode_of_each(tokenizer):
    batch = tokenizer.encode_batch(CORPUS)
    assert [ids.dtype for ids in batch] == [np.int32] * len(CORPUS)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in CORPUS]


def test_every_id_is_below_vocab_size_and_end_of_text_is_one_of_them(tokenizer):
    assert max(tokenizer.encode("".join(CORPUS))) < tokenizer.vocab_size
    assert 0 <= tokenizer.end_of_text < tokenizer.vocab_size


def test_char_vocabulary_is_the_sorted_characters_and_end_of_text():
    tokenizer = char_tokenizer(["ba\n", "cb"])
    assert tokenizer.encode("\nabc") == [0, 1, 2, 3]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (5, 4)


def test_char_tokenizer_names_an_unknown_character_and_its_code_point():
    tokenizer = char_tokenizer(["abc"])
    with pytest.raises(UserError, match=r"'中' \(U\+4E2D\)"):
        tokenizer.encode("ab中c")
    with pytest.raises(UserError, match=r"U\+4E2D"):
        tokenizer.encode_batch(["a", "中"])


@pytest.mark.system
def test_bpe_training_is_deterministic_across_processes(bpe):
    code = (
        "from jaxgpt.data.tokenizer import train_bpe; import sys, json\n"
        "print(train_bpe(json.loads(sys.stdin.read()), 300).digest)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(CORPUS), capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == bpe.digest


def test_saved_and_loaded_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert loaded.digest == tokenizer.digest
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert loaded.encode(ODD) == tokenizer.encode(ODD)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_digest_tells_tokenizers_apart(bpe, char):
    assert len({bpe.digest, char.digest, train_bpe(CORPUS, 270).digest}) == 3


@pytest.mark.system
def test_auto_tokenizer_reads_the_folder_and_agrees(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path, model_max_length=64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == theirs.bos_token == theirs.unk_token == END_OF_TEXT
    assert theirs.eos_token_id == tokenizer.end_of_text
    assert theirs.model_max_length == 64
    assert len(theirs) == tokenizer.vocab_size
    for text in CORPUS[:1] + [ODD]:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"][: len(ids)] == ids
        assert theirs.decode(ids) == text


def test_gpt2_files_make_the_same_tokenizer_as_tokenizer_json(bpe, tmp_path):
    bpe.save(tmp_path / "json")
    model = json.loads((tmp_path / "json" / "tokenizer.json").read_text())["model"]
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "gpt2" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    old = load_tokenizer(tmp_path / "gpt2")
    assert (old.vocab_size, old.end_of_text) == (bpe.vocab_size, bpe.end_of_text)
    for text in CORPUS:
        assert old.encode(text) == bpe.encode(text)
        assert old.decode(old.encode(text)) == text


def test_an_eos_token_of_another_name_is_the_end_of_text(bpe, tmp_path):
    bpe.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / name
        file.write_text(file.read_text().replace(END_OF_TEXT, "</s>"))
    assert load_tokenizer(tmp_path).end_of_text == bpe.end_of_text
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model": {}}', '{"model": {"vocab": 3}}'])
def test_a_folder_without_a_whole_tokenizer_is_a_user_error(content, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


ROLES = ("<|user|>", "<|assistant|>", "<role: 1>")


def test_special_tokens_come_after_the_vocabulary_and_leave_everything_else_alone(tokenizer):
    extended = tokenizer.with_special_tokens(ROLES)
    size = tokenizer.vocab_size
    assert (extended.vocab_size, extended.end_of_text) == (size + 3, tokenizer.end_of_text)
    assert [extended.decode([size + i]) for i in range(3)] == list(ROLES)
    assert [extended.encode(text) for text in CORPUS] == [tokenizer.encode(text) for text in CORPUS]
    assert tokenizer.vocab_size == size
    assert extended.digest != tokenizer.digest


def test_the_letters_of_a_special_token_are_never_the_token():
    tokenizer = char_tokenizer(["".join(ROLES)])
    for plain in (tokenizer, train_bpe(CORPUS, 270)):
        extended = plain.with_special_tokens(ROLES)
        for text in ("".join(ROLES), ROLES[0], f"{ROLES[1]} {ROLES[0]}".replace(" ", "")):
            assert extended.encode(text) == plain.encode(text)
            assert max(extended.encode_batch([text])[0]) < plain.vocab_size
            assert extended.decode(extended.encode(text)) == text


@pytest.mark.system
def test_special_tokens_are_saved_and_every_reader_finds_them(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    extended = tokenizer.with_special_tokens(ROLES)
    extended.save(tmp_path)
    assert load_tokenizer(tmp_path).digest == extended.digest
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids(list(ROLES)) == [extended.vocab_size - 3 + i for i in range(3)]
    assert len(theirs) == extended.vocab_size


def test_a_special_token_that_is_there_is_not_added_again(tokenizer):
    assert tokenizer.with_special_tokens(()).digest == tokenizer.digest
    assert tokenizer.with_special_tokens([END_OF_TEXT]).digest == tokenizer.digest
    twice = tokenizer.with_special_tokens(ROLES[:1]).with_special_tokens(ROLES)
    assert twice.digest == tokenizer.with_special_tokens(ROLES).digest


@pytest.mark.parametrize(("token", "words"), [("t", "ordinary token"), ("<é>", "cannot be added")])
def test_a_special_token_that_text_can_become_or_bytes_garble_is_refused(bpe, token, words):
    with pytest.raises(UserError, match=f"'{token}'.*{words}"):
        bpe.with_special_tokens(["<|user|>", token])


def test_a_tokenizer_extends_what_it_was_made_from_and_nothing_else(bpe, char):
    one, both = bpe.with_special_tokens(ROLES[:1]), bpe.with_special_tokens(ROLES[:2])
    assert bpe.extends(bpe) and one.extends(bpe) and both.extends(bpe) and both.extends(one)
    assert not bpe.extends(one) and not one.extends(both)
    assert not both.extends(bpe.with_special_tokens(ROLES[1:2]))  # the same token under another id
    assert not bpe.extends(char) and not char.extends(bpe)
    assert not bpe.extends(train_bpe(CORPUS, 270)) and not train_bpe(CORPUS, 270).extends(bpe)


@pytest.mark.parametrize(
    ("part", "change"), [("pre_tokenizer", {"add_prefix_space": True}), ("model", {"ignore_merges": True})]
)
def test_a_tokenizer_that_splits_text_otherwise_does_not_extend(bpe, tmp_path, part, change):
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    changed = content[part]["pretokenizers"][1] if part == "pre_tokenizer" else content[part]
    changed |= change
    file.write_text(json.dumps(content))
    assert not load_tokenizer(tmp_path).extends(bpe)


@pytest.mark.system
def test_one_tokenizer_in_three_spellings_extends_itself(bpe, tmp_path):
    """GPT-2's own files, our tokenizer.json and the one that transformers writes differ in what changes no id."""
    from transformers import GPT2TokenizerFast

    bpe.save(tmp_path / "ours")
    file = tmp_path / "ours" / "tokenizer.json"
    content = json.loads(file.read_text())
    model, content["pre_tokenizer"] = content["model"], content["pre_tokenizer"]["pretokenizers"][1]  # joins digits
    file.write_text(json.dumps(content))
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "gpt2" / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    GPT2TokenizerFast.from_pretrained(tmp_path / "gpt2").save_pretrained(tmp_path / "theirs")
    spellings = [load_tokenizer(tmp_path / name) for name in ("ours", "gpt2", "theirs")]
    assert len({tokenizer.digest for tokenizer in spellings}) > 1
    for one in spellings:
        for other in spellings:
            assert one.with_special_tokens(ROLES).extends(other)
            assert not one.extends(other.with_special_tokens(ROLES))


def test_a_number_is_read_digit_by_digit():
    bpe = train_bpe(["12 apples for 12 people, 12 in all\n" * 20], 300)
    pieces = [bpe.decode([token]) for token in bpe.encode("1212 apples")]
    assert pieces == ["1", "2", "1", "2", " apples"]


@pytest.mark.parametrize("size", [1, 7, 40])
def test_a_text_cut_into_parts_keeps_its_tokens(tokenizer, size):
    text = "a\n\nb\n  c \n d\n\te\nthe\nmat's\n's the\n \n\nx\r\ny\n1\n\x1c\n.\n" + ODD * 3 + "the cat\n" * 30
    known = "".join(c for c in text if c in set("".join(CORPUS)))
    parts = list(tokenizer.pieces(known, size))
    assert len(parts) > 3
    assert "".join(parts) == known
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(known)


def test_a_tokenizer_that_changes_text_first_gets_it_whole(bpe, tmp_path):
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    file.write_text(json.dumps(content))
    assert list(load_tokenizer(tmp_path).pieces("a\n" * 50, 10)) == ["a\n" * 50]


def test_spread_takes_all_of_a_small_corpus_and_evenly_of_a_large_one():
    texts = [f"{number:03}\n" * 8 for number in range(1000)]
    assert "".join(spread(texts, 10**6, 100)) == "".join(texts)
    taken = spread(texts, 4_000, 100)
    assert 2_000 <= sum(map(len, taken)) <= 4_000
    numbers = [int(part[:3]) for part in taken]
    assert set(np.diff(numbers)) == {numbers[1] - numbers[0]}
    assert numbers[-1] > 900


def test_cut_leaves_a_text_without_line_breaks_whole():
    assert list(cut("x" * 100, 10)) == ["x" * 100]
