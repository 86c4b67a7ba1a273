"""Made-up questions: every answer is right and every changed one wrong, and none that is held out is ever learned."""

import itertools
import json
import re

import pytest

from jaxgpt.config import Config
from jaxgpt.errors import UserError
from jaxgpt.preparation import skills
from jaxgpt.preparation.augmentation import Draw
from jaxgpt.preparation.dialogues import conversation
from jaxgpt.preparation.skills import LANGUAGES, held_out, is_held_out, skill_names, skill_records, weights
from jaxgpt.preparation.sources import documents, source_key
from jaxgpt.settings import DataConfig


@pytest.fixture(scope="module")
def learned() -> list[list[skills.Turn]]:
    """20,000 training conversations."""
    shares = weights(())
    return [skills.conversation(Draw(number), shares, False) for number in range(20_000)]


@pytest.fixture(scope="module")
def asked() -> list[list[skills.Turn]]:
    return [turns for skill in skill_names() for language in LANGUAGES for turns in held_out(skill, language, 20)]


def test_nothing_that_is_held_out_is_in_20_000_training_conversations(learned, asked):
    turns = [turn for each in learned for turn in each]
    assert not any(is_held_out(*turn.wording) or is_held_out(*turn.operands) for turn in turns)
    for turn in (turn for each in asked for turn in each):
        assert turn.operands == () or is_held_out(*turn.operands)
    last = [each[-1] for each in asked]
    assert {turn.wording for turn in turns}.isdisjoint(turn.wording for turn in last)
    assert {turn.question for turn in turns}.isdisjoint(turn.question for turn in last)
    sums = {tuple(sorted(numbers(turn.question))) for turn in turns if turn.skill == "addition"}
    assert sums.isdisjoint(tuple(sorted(numbers(turn.question))) for turn in last if turn.skill == "addition")


def test_all_skills_come_in_both_languages_alone_and_mixed(learned, asked):
    turns = [turn for each in learned for turn in each]
    assert {(turn.skill, turn.language) for turn in turns} == {*itertools.product(skill_names(), LANGUAGES)}
    assert {len(each) for each in learned} == {1, 2, 3, 4}
    assert 0.3 < sum(len(each) > 1 for each in learned) / len(learned) < 0.5
    for language, low, high in (("english", 0.45, 0.55), ("chinese", 0.45, 0.55)):
        assert low < sum(turn.language == language for turn in turns) / len(turns) < high
    chinese = [turn for turn in turns if turn.language == "chinese"]
    assert all(re.search("[\u4e00-\u9fff=]", turn.question) for turn in chinese if turn.skill != "service")
    marks = set("{}|#")
    assert not any(marks & {*turn.question, *turn.answer} for turn in turns)
    for skill, language in itertools.product(skill_names(), LANGUAGES):
        own = [each for each in asked if (each[-1].skill, each[-1].language) == (skill, language)]
        assert len({tuple(turn.question for turn in each) for each in own}) == len(own) == 20


def test_answers_are_right_and_changed_ones_are_not(learned, asked):
    for turn in (turn for each in [*learned[:2000], *asked] for turn in each):
        answer = turn.answer
        assert turn.is_right(answer) and turn.is_right(f" {answer}\n"), turn
        last = max(place for place, character in enumerate(answer) if character.isalnum())
        other = "?" if turn.skill == "service" else "7" if answer[last] != "7" else "3"  # any price is one
        changed = [answer[:last] + other + answer[last + 1 :], answer[: last - 1], answer + " No.", answer * 2, ""]
        if turn.skill == "service" or ("," not in answer and "，" not in answer):
            changed.append("No " + answer)  # before a result there may be any working
        for wrong in changed:
            assert not turn.is_right(wrong), (turn, wrong)


def numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def test_results_are_those_of_the_questions_and_every_step_holds(learned):
    for turn in (turn for each in learned[:4000] for turn in each):
        found, steps = numbers(turn.question), re.findall(r"[\d+x-]+[<>=]\d+", turn.answer)
        if turn.skill in ("addition", "subtraction", "comparison", "prices", "times"):
            for step in steps:
                left, sign, right = re.fullmatch(r"([\d+x-]+)([<>=])(\d+)", step).groups()
                assert eval(f"{left.replace('x', '*')} {sign.replace('=', '==')} {right}"), turn
        if turn.skill == "addition":
            assert numbers(turn.answer)[-1] == sum(found), turn
            assert len(steps) == len(str(max(found)))
        elif turn.skill == "subtraction":
            assert numbers(turn.answer)[-1] == max(found) - min(found), turn
        elif turn.skill == "prices":
            assert numbers(turn.answer)[-1] == found[0] * found[1], turn
        elif turn.skill == "times":
            before, after = re.search(r"\d+:\d\d", turn.question)[0], turn.answer
            minutes = [60 * hour + minute for hour, minute in (numbers(before), numbers(after)[-2:])]
            [more] = numbers(turn.question.replace(before, ""))
            assert minutes[1] - minutes[0] == more, turn


def made(kind: str, digits: tuple, monkeypatch) -> str:
    """The answer to a question about these two numbers."""
    monkeypatch.setattr(skills, "_pair", lambda draw: digits)
    monkeypatch.setattr(Draw, "chance", lambda draw, probability: False)
    return skills._MAKERS[kind](Draw(0), skills._texts()["english"])[1]


@pytest.mark.parametrize(
    ("kind", "digits", "steps", "result"),
    [
        ("sum", (128, 367), "8+7=15, 2+6+1=9, 1+3=4", "495"),
        ("sum", (999, 1), "9+1=10, 9+0+1=10, 9+0+1=10", "1000"),
        ("sum", (0, 7), "0+7=7", "7"),
        ("difference", (158, 402), "12-8=4, 10-5-1=4, 4-1-1=2", "244"),
        ("difference", (98, 105), "15-8=7, 10-9-1=0, 1-0-1=0", "7"),
        ("larger", (128, 67), "3>2 digits, 128>67", ""),
        ("larger", (34, 38), "3=3, 4<8, 34<38", ""),
        ("larger", (3, 8), "3<8", ""),
    ],
)
def test_working_goes_from_the_right_with_carries_and_comparisons_from_the_left(
    kind, digits, steps, result, monkeypatch
):
    values = made(kind, digits, monkeypatch)
    assert (values["steps"], values.get("result", "")) == (steps, result)


def test_the_same_seed_gives_the_same_conversations_and_each_stands_for_itself():
    first = [record.value for record in itertools.islice(skill_records((), 0.05, False), 200)]
    assert first == [record.value for record in itertools.islice(skill_records((), 0.05, True), 200)]
    assert first != [record.value for record in itertools.islice(skill_records((), 0.05, True, seed=1), 200)]
    assert len({json.dumps(one) for one in first}) > 190
    for record in itertools.islice(skill_records((), 0.05, True), 50):
        assert json.loads(conversation(record.value, record.where))[1]["role"] == "assistant"
    shares = [record.split for record in itertools.islice(skill_records((), 0.2, True), 1000)]
    assert 150 < shares.count("validation") < 250


def test_weights_choose_skills_and_languages():
    data = DataConfig(source="skills", format="chat", max_bytes=20_000, skills=("addition=5", "chinese=0"))
    found = list(documents(data))
    assert {document.split for document in found} == {"train", "validation"}
    assert not any("\u4e00" <= character <= "\u9fff" for document in found for character in document.text)
    only = [f"{name}=0" for name in skill_names() if name != "spelling"]
    shares = weights(only)
    assert {turn.skill for n in range(50) for turn in skills.conversation(Draw(n), shares, False)} == {"spelling"}
    assert source_key(data) == source_key(data)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("adding=2", "data.skills = adding=2: write NAME=WEIGHT with one of identity, greeting"),
        ("addition", "data.skills = addition: write NAME=WEIGHT"),
        ("addition=-1", "write NAME=WEIGHT"),
        ("english=nan", "write NAME=WEIGHT"),
        ("chinese=0,english=0", "every language has the weight 0"),
    ],
)
def test_weights_that_cannot_be_are_named_before_anything_is_read(entry, complaint):
    data = DataConfig(source="skills", format="chat", skills=tuple(entry.split(",")))
    for use in (source_key, lambda data: next(documents(data))):
        with pytest.raises(UserError, match=complaint):
            use(data)


def test_weights_without_the_source_are_refused():
    with pytest.raises(UserError, match='data.skills is for data.source = "skills"'):
        Config(data=DataConfig(source="support", format="chat", skills=("addition=2",)))
