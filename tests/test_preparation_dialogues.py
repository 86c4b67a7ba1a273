"""Made-up conversations are always the same, and none is there twice; the reader of Schema-Guided Dialogue files."""

import contextlib
import hashlib
import itertools
import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt.data.chat import END_OF_TURN, ChatEncoder, to_text, with_chat_tokens
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.errors import BadRecord, UserError
from jaxgpt.preparation.dialogues import COUNT, conversation, sgd_records, support_records
from jaxgpt.preparation.documents import BadRecords
from jaxgpt.preparation.sources import documents
from jaxgpt.settings import ChatConfig, DataConfig


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


# ---------------------------------------------------------------- forms of records


def said(*contents: str, system: str | None = None, unlearned: tuple[int, ...] = ()) -> list[dict]:
    """Messages of user and assistant in turn; the answers `unlearned`, by number, have weight 0."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    for number in unlearned:
        turns[2 * number + 1]["weight"] = 0
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


def two(speaker: str, words: str, user: str, assistant: str) -> list[dict]:
    return [{speaker: user, words: "q"}, {speaker: assistant, words: "a"}]


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


GREETED = [{"role": "assistant", "content": "hello"}, *said("q", "a")]
TOLD = "answers not learned (weight 0, history, before a question)"
JOINED = "turns joined to the one before, of the same speaker"
FORMS = {  # record, its messages, its form, what is counted besides
    "messages": ({"messages": said("q", "a")}, said("q", "a"), "messages", {}),
    "sharegpt": ({"conversations": two("from", "value", "human", "gpt")}, said("q", "a"), "conversations", {}),
    "roles": ({"conversations": two("role", "content", "User", "bot")}, said("q", "a"), "conversations", {}),
    "chinese": ({"conversation": two("role", "text", "用户", "助手")}, said("q", "a"), "conversation", {}),
    "under the roles": ({"conversation": [{"assistant": "a", "human": "q"}]}, said("q", "a"), "conversation", {}),
    "null messages": (
        {"messages": None, "prompt": "", "conversations": two("from", "value", "human", "chatbot")},
        said("q", "a"),
        "conversations",
        {},
    ),
    "parts": (
        {"messages": [{"role": "user", "content": parts("q", " r")}, {"role": "model", "content": parts("a")}]},
        said("q r", "a"),
        "messages",
        {},
    ),
    "columns": ({"messages": {"role": ["user", "gpt"], "content": ["q", "a"]}}, said("q", "a"), "messages", {}),
    "json": ({"messages": json.dumps(said("q", "a"))}, said("q", "a"), "messages", {}),
    "developer": (
        {"messages": [{"role": "developer", "content": "S"}, *said("q", "a")]},
        said("q", "a", system="S"),
        "messages",
        {},
    ),
    "system beside": ({"system": "S", "messages": said("q", "a")}, said("q", "a", system="S"), "messages", {}),
    "system twice": (
        {"system": "S", "messages": said("q", "a", system="S")},
        said("q", "a", system="S"),
        "messages",
        {},
    ),
    "greeting": (
        {"messages": GREETED},
        [{**GREETED[0], "weight": 0}, *said("q", "a")],
        "messages",
        {"turns": {TOLD: 1}},
    ),
    "weight": (
        {
            "messages": [
                *said("q", "bad", unlearned=(0,)),
                *said("r"),
                {"role": "assistant", "content": "a", "weight": 1},
            ]
        },
        said("q", "bad", "r", "a", unlearned=(0,)),
        "messages",
        {"turns": {TOLD: 1}},
    ),
    "train": (
        {"messages": [*said("q"), {"role": "assistant", "content": "bad", "train": False}, *said("r", "a")]},
        said("q", "bad", "r", "a", unlearned=(0,)),
        "messages",
        {"turns": {TOLD: 1}},
    ),
    "two users": (
        {"messages": [*said("one"), *said("two", "a")]},
        said("one\n\ntwo", "a"),
        "messages",
        {"turns": {JOINED: 1}},
    ),
    "two answers": (
        {"messages": [*said("q", "a"), {"role": "assistant", "content": " b"}]},
        said("q", "a\n\nb"),
        "messages",
        {"turns": {JOINED: 1}},
    ),
    "trl": (
        {"prompt": said("p", "h", "q", system="S"), "completion": said("q", "a")[1:]},
        said("p", "h", "q", "a", system="S", unlearned=(0,)),
        "prompt/completion",
        {"turns": {TOLD: 1}},
    ),
    "trl texts": ({"prompt": "q", "completion": " a"}, said("q", "a"), "prompt/completion", {}),
    "alpaca": (
        {"instruction": "add", "input": "1 2", "output": "3", "system": "S"},
        said("add\n\n1 2", "3", system="S"),
        "instruction/input/output",
        {},
    ),
    "alpaca alone": ({"instruction": "q", "input": "", "output": "a"}, said("q", "a"), "instruction/output", {}),
    "dolly": (
        {"instruction": "q", "context": "c", "response": "a", "category": "x"},
        said("q\n\nc", "a"),
        "instruction/context/response",
        {"fields not read": {"category": 1}},
    ),
    "chatglm": (
        {"prompt": "q", "response": "a", "history": [["p", "h"], ["r", "i"]]},
        said("p", "h", "r", "i", "q", "a", unlearned=(0, 1)),
        "history/prompt/response",
        {"turns": {TOLD: 2}},
    ),
    "history of turns": (
        {"query": "q", "response": "a", "history": json.dumps(said("p", "h"))},
        said("p", "h", "q", "a", unlearned=(0,)),
        "history/query/response",
        {"turns": {TOLD: 1}},
    ),
    "openorca": (
        {"id": 3, "system_prompt": "S", "question": "q", "response": "a"},
        said("q", "a", system="S"),
        "question/response",
        {"fields not read": {"id": 1}},
    ),
    "fields not read": (
        {
            "messages": [{**said("q")[0], "name": "Ann"}, {**said("q", "a")[1], "thinking": "hm"}],
            "source": "x",
            "tools": "[]",
        },
        said("q", "a"),
        "messages",
        {"fields not read": {"source": 1, "tools": 1, "user's name": 1, "assistant's thinking": 1}},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_canonical_text_and_what_was_found_is_counted(name):
    record, expected, form, counted = FORMS[name]
    tally: dict = {}
    assert json.loads(conversation(record, "x", tally)) == expected
    assert tally == {"forms": {form: 1}, **counted}


CALL = {"role": "assistant", "content": "Let me look.", "tool_calls": [{"function": {"name": "get"}}]}
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}, *parts("what?")]
LEARNED = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"messages": [*said("q"), CALL]}, 'x, turn 2: "tool_calls" cannot be learned'),
        ({"messages": said("q", "a"), "tools": [{"name": "get"}]}, 'x: "tools" cannot be learned'),
        ({"messages": said("q", "a"), "images": ["a.png"]}, 'x: "images" cannot be learned'),
        ({"prompt": "q", "response": "a", "function_call": {}, "image": "a"}, 'x: "image" cannot be learned'),
        (
            {"messages": [{"role": "user", "content": IMAGE}, LEARNED]},
            "x, turn 1: its content is no text: a part of it is image_url",
        ),
        ({"messages": said("q\0", "a")}, "x, turn 1: not text: it holds the character NUL"),
        ({"messages": said("q", "a"), "prompt": "q", "response": "a"}, "x: two forms at once"),
        ({"messages": said("q", "a"), "conversations": said("q", "a")}, "x: two forms at once: messages and conv"),
        ({"prompt": "q", "response": "a", "completion": "b"}, "x: two forms at once: response and completion"),
        ({"system": "S", "messages": said("q", "a", system="T")}, "x: a system turn after the first: turn 2"),
        (
            {"messages": [*said("q"), {**LEARNED, "weight": 0.5}]},
            'turn 2: a weight other than 0 and 1: "weight" is 0.5',
        ),
        ({"messages": [*said("q"), {**LEARNED, "weight": "0"}]}, 'turn 2: a weight other than 0 and 1: "weight" is 0'),
        ({"messages": [*said("q"), {**LEARNED, "train_detail": [{}]}]}, 'turn 2: "train_detail" cannot be learned'),
        ({"messages": said("q", "a", unlearned=(0,))}, "x: nothing to learn"),
        ({"messages": said("q", "a"), "weight": 0}, "x: nothing to learn"),
        ({"messages": said("q", "a"), "weight": 2}, 'x: a weight other than 0 and 1: "weight" is 2'),
        ({"prompt": "q", "completion": "a", "label": False}, "x: nothing to learn"),
        (
            {"messages": [*said("q", "a", unlearned=(0,)), LEARNED]},
            "x: two answers in a row, one of them with weight 0",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "x: unknown format: it has prompt, chosen, rejected"),
        ({"prompt": "q", "response": "a", "history": "soon"}, "x: no turns: a text that is not JSON"),
        ({"prompt": "q", "response": "a", "history": ["p", "h"]}, "x, history 1: not an object"),
        ({"messages": {"role": ["user"], "content": ["q", "a"]}}, "x: no turns"),
        ({"instruction": 3, "input": "q", "output": "a"}, "x: a question that is no text"),
        ({"prompt": "q", "response": ["a", "b"]}, "x, turn 1: not an object"),
        ({"pro\x1b[31m\ud800": "q"}, "x: unknown format: it has pro?[31m?"),
    ],
)
def test_what_would_be_lost_or_has_two_meanings_is_a_bad_record_by_name(record, told):
    with pytest.raises(BadRecord) as error:
        conversation(record, "x")
    assert told in str(error.value) and str(error.value).isprintable()


def test_a_field_that_was_not_read_is_counted_apart_up_to_a_limit():
    tally: dict = {}
    for number in range(200):
        conversation({"messages": said("q", "a"), f"key {number}": 1}, "x", tally)
    assert len(tally["fields not read"]) == 51 and sum(tally["fields not read"].values()) == 200


# ---------------------------------------------------------------- mutated records

ODD = st.one_of(
    st.sampled_from([None, "", " ", [], {}, 0, 1, 0.5, True, False, "[]", "[[", "\ud800", float("nan"), "9" * 5000]),
    st.sampled_from([[["a", "b"]], [[None, "b"]], {"role": ["user"], "content": ["q"]}, [{}], [{"text": "t"}], "tool"]),
    st.text(max_size=5),
    st.just(json.loads("[" * 400 + "]" * 400)),
)
KEYS = sorted(
    {key for record, *_ in FORMS.values() for key in record} | {"role", "content", "from", "value", "tool_calls"}
)
RECORDS = [record for record, *_ in FORMS.values()]


@st.composite
def mutated(draw) -> object:
    """A record of one of the forms in which a few values are replaced, removed, added, swapped or joined."""
    record = json.loads(json.dumps(draw(st.sampled_from(RECORDS))))
    for _ in range(draw(st.integers(0, 3))):
        places = [record]  # every object and list in it
        for place in places:
            values = place.values() if isinstance(place, dict) else place
            places += [value for value in values if isinstance(value, dict | list) and value]
        place = draw(st.sampled_from(places))
        value = draw(st.one_of(ODD, st.sampled_from(RECORDS).map(lambda other: next(iter(other.values())))))
        value = json.loads(json.dumps(value))  # a copy
        key = draw(st.sampled_from([*place] if isinstance(place, dict) and place and draw(st.booleans()) else KEYS))
        kind = draw(st.sampled_from(["set", "remove", "double"]))
        if isinstance(place, list):
            key = draw(st.integers(0, max(len(place) - 1, 0)))
            if not place or kind == "double":
                place.append(place[key] if place else value)
            elif kind == "remove":
                del place[key]
            else:
                place[key] = value
        elif kind == "remove":
            place.pop(key, None)
        else:
            place[key] = value
    return record


TOKENIZER = with_chat_tokens(train_bpe(["some words"] * 3, 257))
ENCODER = ChatEncoder(TOKENIZER, ChatConfig(), 100_000)


def check_lines(file, records: list) -> None:
    """The real reader of JSONL: what is not a document is counted, and its text is whole."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"source": "jsonl", "path": str(file), "format": "chat"}
    bad, found = BadRecords("skip"), []
    with contextlib.suppress(UserError):  # none of them is one
        found += documents(DataConfig(**settings, on_bad_record="skip"), bad)
    assert len(found) + sum(bad.counts.values()) == len(records)
    assert sum(bad.conversations.get("forms", {}).values()) == len(found)
    for document in found:
        turns = json.loads(document.text)
        assert to_text(turns) == document.text
        assert turns[-1]["role"] == "assistant" and all(turn["content"].strip() for turn in turns)
        before = [turn["role"] for turn in turns if turn["role"] != "system"]
        assert all(one != other for one, other in itertools.pairwise(before))
        learned = [turn["content"] for turn in turns if turn["role"] == "assistant" and turn.get("weight", 1)]
        [made] = ENCODER.encode(document.text)
        assert TOKENIZER.decode(made.tokens[made.supervised]) == "".join(text + END_OF_TURN for text in learned) != ""
    if bad.counts:
        with pytest.raises(UserError):
            list(documents(DataConfig(**settings)))


def fuzz(file, examples: int) -> None:
    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=10_000, suppress_health_check=list(HealthCheck)
    )
    @given(records=st.lists(mutated(), min_size=1, max_size=3))
    def run(records: list) -> None:
        check_lines(file, records)

    run()


def test_a_mutated_record_is_a_conversation_or_counted(tmp_path):
    fuzz(tmp_path / "a.jsonl", 80)


@pytest.mark.system
def test_thousands_of_mutated_records_are_conversations_or_counted(tmp_path):
    fuzz(tmp_path / "a.jsonl", 2000)


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
        ({"dialogue_id": "7", "turns": [turn(None, "Hi")]}, "dialogue 7, turn 1: no role"),
        (
            {"dialogue_id": "7", "turns": [turn("USER", 3), turn("USER", "Hi")]},
            "dialogue 7, turn 1: its content is no text",
        ),
        (
            {"dialogue_id": "7", "turns": [turn("USER", None), turn("USER", "Hi")]},
            "dialogue 7, turn 1: its content is missing",
        ),
        (
            {"dialogue_id": "7", "turns": [turn("USER", "Hi"), turn("USER", None)]},
            "dialogue 7, turn 2: its content is missing",
        ),
        ({"dialogue_id": "7", "turns": []}, "dialogue 7: unknown format"),
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
        (b"[" + b"9" * 5000 + b"]", "not JSON"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path, content, told):
    (tmp_path / "dialogues_001.json").write_bytes(content)
    with pytest.raises(BadRecord, match=told):
        list(sgd_records(tmp_path / "dialogues_001.json"))
