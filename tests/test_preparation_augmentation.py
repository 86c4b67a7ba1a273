"""Copies are changed where users speak, the same whoever makes them, and never in what is learned."""

import json
import random

import pytest

from jaxgpt.data.chat import from_plain
from jaxgpt.errors import UserError
from jaxgpt.preparation.augmentation import Augmenter
from jaxgpt.settings import AugmentationConfig

TURNS = [
    {"role": "system", "content": "Be kind. Be brief."},
    {"role": "user", "content": "My parcel is late. Where is order A-4711? Please write to me@example.com."},
    {"role": "assistant", "content": "I am sorry. Your parcel is late. Please wait."},
    {"role": "user", "content": "How long? Parcels are never so slow."},
    {"role": "assistant", "content": "A day. Or two."},
    {"role": "user", "content": "我的包裹呢？请快一点。谢谢！"},
    {"role": "assistant", "content": "好的。马上。"},
]
TEXT = json.dumps(TURNS, ensure_ascii=False)


@pytest.fixture
def synonyms(tmp_path) -> str:
    (tmp_path / "words.txt").write_text(
        "# of a shop\nparcel, package, box\n包裹，快递\nplease, kindly\n", encoding="utf-8"
    )
    return str(tmp_path / "words.txt")


def contents(text: str, role: str) -> list[str]:
    return [turn["content"] for turn in json.loads(text) if turn["role"] == role]


def settings(synonyms: str, copies: int = 20, **changes) -> AugmentationConfig:
    return AugmentationConfig(copies=copies, synonyms=synonyms, **changes)


def test_without_a_rate_there_is_no_copy(synonyms):
    assert Augmenter(settings(synonyms)).copies(TEXT, 3) == []


def test_answers_and_system_are_never_changed_and_copies_differ(synonyms):
    how = dict(shuffle_sentences=0.5, synonym_rate=0.5, typo_rate=0.1)
    assert Augmenter(settings(synonyms, **how)).copies(from_plain("A quick question. Is it fast?"), 3) == []
    copies = Augmenter(settings(synonyms, **how)).copies(TEXT, 3)
    assert len(copies) > 15 and len({TEXT, *copies}) == len(copies) + 1
    for copy in copies:
        for role in ("assistant", "system"):
            assert contents(copy, role) == contents(TEXT, role)
        assert contents(copy, "user") != contents(TEXT, "user")


def test_a_copy_depends_on_seed_and_number_and_on_nothing_else(synonyms):
    how = dict(shuffle_sentences=0.5, synonym_rate=0.5, typo_rate=0.1, drop_turns=0.3)
    augmenter = Augmenter(settings(synonyms, **how))
    numbers = list(range(12))
    in_order = {number: augmenter.copies(TEXT, number) for number in numbers}
    random.Random(0).shuffle(numbers)
    fresh = Augmenter(settings(synonyms, **how))
    assert {number: fresh.copies(TEXT, number) for number in numbers} == in_order
    assert len({tuple(copies) for copies in in_order.values()}) == 12
    assert Augmenter(settings(synonyms, seed=1, **how)).copies(TEXT, 3) != in_order[3]
    fewer = Augmenter(settings(synonyms, copies=5, **how)).copies(TEXT, 3)
    assert fewer == in_order[3][: len(fewer)]


def test_sentences_change_places_and_none_is_lost(synonyms):
    copies = Augmenter(settings(synonyms, shuffle_sentences=0.99)).copies(TEXT, 0)
    firsts, chinese = set(), set()
    for copy in copies:
        first, second, third = contents(copy, "user")
        assert sorted(first.split()) == sorted(TURNS[1]["content"].split())
        assert sorted(third.replace("？", "。").replace("！", "。").split("。")) == sorted(
            ["", "我的包裹呢", "请快一点", "谢谢"]
        )
        firsts.add(first)
        chinese.add(third)
    assert "Where is order A-4711? My parcel is late. Please write to me@example.com." in firsts
    assert len(firsts) > 3 and len(chinese) > 3


def test_words_of_the_users_table_replace_each_other_with_their_capitals(synonyms):
    copies = Augmenter(settings(synonyms, synonym_rate=0.9999)).copies(TEXT, 0)
    texts = [" ".join(contents(copy, "user")) for copy in copies]
    assert all("Kindly write" in text and "我的快递呢" in text and "Parcels are" in text for text in texts)
    assert {text.split()[1] for text in texts} == {"package", "box"}


def test_letters_are_mistyped_at_their_rate_and_what_an_answer_may_repeat_is_not(synonyms):
    word = "abcdefghij" * 50
    turns = json.dumps(
        [{"role": "user", "content": f"{word} A-4711 me@example.com 你好"}, TURNS[2]], ensure_ascii=False
    )
    [copy] = Augmenter(settings(synonyms, copies=1, typo_rate=0.1)).copies(turns, 0)
    mistyped, *kept = contents(copy, "user")[0].split()
    assert kept == ["A-4711", "me@example.com", "你好"]
    doubled_and_left_out = abs(len(mistyped) - len(word))
    assert mistyped != word and doubled_and_left_out < 40
    assert sum(mistyped.count(pair) for pair in ("ab", "bc", "cd", "de", "ef", "fg", "gh", "hi", "ij")) > 300


def test_dropping_takes_a_question_with_its_answer_and_never_the_last(synonyms):
    copies = Augmenter(settings(synonyms, copies=60, drop_turns=0.5)).copies(TEXT, 0)
    kept = {tuple(turn["content"] for turn in json.loads(copy)) for copy in copies}
    system, *turns = (turn["content"] for turn in TURNS)
    pairs = [tuple(turns[i : i + 2]) for i in (0, 2, 4)]
    assert kept == {(system, *pairs[0], *pairs[2]), (system, *pairs[1], *pairs[2]), (system, *pairs[2])}


@pytest.mark.parametrize(
    "content, told",
    [
        (b"parcel, package\nbox\n", ":2: a group is two words or more"),
        (b"parcel,, package\n", ":1: a group is two words or more"),
        (b"a, b\nb, c\n", ":2: 'b' is in two groups"),
        (b"a, b\n\xff, c\n", ":2: not UTF-8"),
        (b"\n# nothing\n", ": holds no words"),
        (None, "No such file"),
    ],
)
def test_a_bad_table_is_told_with_its_line(tmp_path, content, told):
    if content is not None:
        (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(UserError) as error:
        Augmenter(AugmentationConfig(copies=1, synonyms=str(tmp_path / "words.txt"), synonym_rate=0.5))
    assert told in str(error.value) and "\n" not in str(error.value)
