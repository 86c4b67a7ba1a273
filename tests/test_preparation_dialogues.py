"""Made-up conversations are always the same, and none is there twice; the reader of Schema-Guided Dialogue files."""

import hashlib
import itertools
import json
from collections import Counter

import pytest

from jaxgpt.data import chat
from jaxgpt.errors import BadRecord
from jaxgpt.preparation.dialogues import COUNT, sgd_records, support_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return list(support_records())


def test_thousands_of_different_conversations_that_are_always_the_same(records):
    texts = [conversation(record, "support") for record in records]  # each can be learned from
    assert len(set(texts)) == len(texts) == COUNT >= 5000
    digest = hashlib.sha256("\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode())
    assert digest.hexdigest().startswith("38e1c3fb74e9d2ae"), "other records: RECORDS_VERSION has to change, too"
    again = [conversation(record, "support") for record in itertools.islice(support_records(), 50)]
    assert again == texts[:50]
    assert not any(mark in turn["content"] for record in records for turn in record["messages"] for mark in "{}#|")


def test_they_have_several_turns_two_languages_and_answers_that_take_up_what_was_said(records):
    lengths = Counter(len(record["messages"]) for record in records)
    assert sum(count for length, count in lengths.items() if length >= 4) > 0.8 * len(records)
    chinese = [record for record in records if any("\u4e00" <= c <= "\u9fff" for c in record["messages"][1]["content"])]
    assert 0.1 < len(chinese) / len(records) < 0.2
    named = [record for record in records if record["messages"][0]["content"].startswith("Please cancel order")]
    for record in named:
        number = record["messages"][0]["content"].split()[3].rstrip(".")
        assert number in record["messages"][1]["content"]
    assert len(named) > 10


def test_those_held_out_are_not_copies_of_the_others(records):
    answers = [tuple(turn["content"] for turn in record["messages"]) for record in records]
    first, held_out = set(answers[:-300]), answers[-300:]
    assert not first & set(held_out)


# ---------------------------------------------------------------- Schema-Guided Dialogue


def turn(speaker: object, utterance: object) -> dict:
    return {"frames": [], "speaker": speaker, "utterance": utterance}


def read(tmp_path, dialogues) -> list[tuple[str, dict]]:
    file = tmp_path / "dialogues_001.json"
    file.write_text(json.dumps(dialogues), encoding="utf-8")
    return list(sgd_records(file))


def test_turns_of_one_speaker_are_joined(tmp_path):
    said = [
        turn("USER", "Hi."),
        turn("USER", "A table?"),
        turn("SYSTEM", "Where?"),
        turn("USER", "Here"),
        turn("SYSTEM", "Ok"),
    ]
    [(where, record)] = read(tmp_path, [{"dialogue_id": "1_00000", "turns": said}])
    assert where == f"{tmp_path / 'dialogues_001.json'}, dialogue 1_00000"
    contents = [message["content"] for message in json.loads(conversation(record, where))]
    assert contents == ["Hi.\nA table?", "Where?", "Here", "Ok"]


@pytest.mark.parametrize(
    "dialogue, told",
    [
        ({"dialogue_id": "7", "turns": [turn("AGENT", "Hi")]}, "dialogue 7, turn 1: unknown role"),
        ({"dialogue_id": "7", "turns": [turn(None, "Hi")]}, "dialogue 7, turn 1: unknown role"),
        (
            {"dialogue_id": "7", "turns": [turn("USER", None), turn("USER", "Hi")]},
            "dialogue 7, turn 1: its content is missing",
        ),
        (
            {"dialogue_id": "7", "turns": [turn("USER", "Hi"), turn("USER", None)]},
            "dialogue 7, turn 2: its content is missing",
        ),
        ({"dialogue_id": "7", "turns": []}, "dialogue 7: no turns"),
        ({"dialogue_id": "7"}, "dialogue 7: unknown format: it has dialogue_id"),
        (3, "dialogue number 1: not an object"),
    ],
)
def test_a_dialogue_that_cannot_be_used_is_told_with_its_id(tmp_path, dialogue, told):
    [(where, record)] = read(tmp_path, [dialogue])
    with pytest.raises(BadRecord, match=told):
        conversation(record, where)


@pytest.mark.parametrize(
    "content, told",
    [
        (b'[\n{"turns": \n', ":3: not JSON"),
        (b"\xff\xfe", ": not UTF-8"),
        (b"{}", ": not a list"),
        (b"[" * 10**5, "not JSON"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path, content, told):
    (tmp_path / "dialogues_001.json").write_bytes(content)
    with pytest.raises(BadRecord, match=told):
        list(sgd_records(tmp_path / "dialogues_001.json"))
