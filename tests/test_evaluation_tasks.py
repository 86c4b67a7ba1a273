"""Questions in each benchmark's format become the harness's prompts; results by hand; what is wrong is named."""

import json
import math

import pytest

from jaxgpt.errors import UserError
from jaxgpt.evaluation.scoring import Score
from jaxgpt.evaluation.tasks import FORMATS, Question, Task, read_task, results

ARC = {"stem": "Why?", "choices": [{"text": "so", "label": "A"}, {"text": "not", "label": "B"}]}
EXAMPLES = {
    "lambada": ({"text": "he took his hat"}, [("he took his", " hat")], 0),
    "hellaswag": (
        {
            "activity_label": "Sailing",
            "ctx_a": "A boat [x] is seen.",
            "ctx_b": "the man",
            "endings": [" jumps. [title] Then ", "sits."],
            "label": "1",
        },
        [("Sailing: A boat is seen. The man", " jumps.. Then"), ("Sailing: A boat is seen. The man", " sits.")],
        1,
    ),
    "piqa": (
        {"goal": "Dry hair", "sol1": "towel", "sol2": "oil", "label": 0},
        [("Question: Dry hair\nAnswer:", " towel"), ("Question: Dry hair\nAnswer:", " oil")],
        0,
    ),
    "winogrande": (
        {"sentence": "Ann paid Bob, as _ was poor.", "option1": "Ann", "option2": "Bob", "answer": "2"},
        [("Ann paid Bob, as Ann", " was poor."), ("Ann paid Bob, as Bob", " was poor.")],
        1,
    ),
    "arc": (
        {"question": ARC, "answerKey": "B"},
        [("Question: Why?\nAnswer:", " so"), ("Question: Why?\nAnswer:", " not")],
        1,
    ),
    "openbookqa": (
        {"question_stem": "Ice is", "choices": {"text": ["cold", "hot"], "label": ["A", "B"]}, "answerKey": "A"},
        [("Ice is", " cold"), ("Ice is", " hot")],
        0,
    ),
    "blimp": (
        {"sentence_good": "She sings.", "sentence_bad": "She sing."},
        [("", " She sings."), ("", " She sing.")],
        0,
    ),
    "cbt": (
        {"sentences": ["One.", "Two."], "question": "Then XXXXX came.", "options": ["he", "it"], "answer": "it"},
        [("One.\nTwo.", "\nThen he came."), ("One.\nTwo.", "\nThen it came.")],
        1,
    ),
    "choices": (
        {"context": "1 + 1 =", "choices": ["2", "3"], "answer": 0},
        [("1 + 1 =", " 2"), ("1 + 1 =", " 3")],
        0,
    ),
}


def write(folder, *records) -> object:
    file = folder / "task.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", FORMATS)
def test_a_record_becomes_the_pairs_that_are_scored(name, tmp_path):
    record, pairs, answer = EXAMPLES[name]
    [question] = read_task(name, write(tmp_path, record)).questions
    assert (question.pairs, question.answer) == (pairs, answer)


def scored(*logprobs: float, greedy: bool = False, cut: int = 0) -> list[Score]:
    return [Score(logprob, greedy, cut) for logprob in logprobs]


def test_accuracies_and_their_errors_are_those_worked_out_by_hand():
    long_and_short = Question([("", "abcd"), ("", "b")], ["abcd", "b"], 0)
    task = Task("choices", [long_and_short] * 4, ("acc", "acc_norm"))
    # By the sum the first is right in two of four; by the sum over the characters in three.
    scores = [*scored(-1, -2), *scored(-3, -4), *scored(-3, -2, cut=5), *scored(-9, -2)]
    found = results(task, scores)
    assert (found["acc"], found["acc_norm"], found["questions"], found["cut"]) == (0.5, 0.75, 4, 2)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert found["acc_norm_stderr"] == pytest.approx(math.sqrt(0.1875 / 3))


def test_a_single_choice_is_right_where_the_model_would_have_written_it():
    question = Question([("a", " b")], ["b"], 0)
    task = Task("lambada", [question] * 2, ("acc", "perplexity"))
    found = results(task, [*scored(-1.0, greedy=True), *scored(-3.0)])
    assert found["acc"] == 0.5
    assert found["perplexity"] == pytest.approx(math.exp(2.0))


@pytest.mark.parametrize(
    ("name", "records", "complaint"),
    [
        ("piqa", [{"goal": "g", "sol1": "a", "label": 0}], r"task.jsonl:1: no field 'sol2'; it has goal, sol1, label"),
        ("piqa", [EXAMPLES["piqa"][0], {**EXAMPLES["piqa"][0], "label": 2}], r"task.jsonl:2: the answer is choice 2, "),
        ("piqa", [{**EXAMPLES["piqa"][0], "label": -1}], r"task.jsonl:1: the answer is choice -1"),
        ("piqa", [{**EXAMPLES["piqa"][0], "sol2": " "}], r"task.jsonl:1: a choice is missing or blank"),
        ("choices", [{"context": "a", "choices": ["b", None], "answer": 0}], r"task.jsonl:1: "),
        ("arc", [{"question": ARC, "answerKey": "E"}], r"task.jsonl:1: .*the answer 'E' is none of A, B"),
        ("winogrande", [{**EXAMPLES["winogrande"][0], "sentence": "no gap"}], r"task.jsonl:1: not a question"),
        ("lambada", ["{broken"], r"task.jsonl:1: not a question of this task"),
        ("lambada", ["[1]"], r"task.jsonl:1: a JSON list"),
        ("lambada", ["", ""], r"task.jsonl: no question in it"),
        ("nothing", [{}], r"task nothing: no such format; there are lambada"),
    ],
)
def test_a_bad_question_is_named_with_file_and_line(name, records, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        read_task(name, write(tmp_path, *records))


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nothing.jsonl: No such file"):
        read_task("piqa", tmp_path / "nothing.jsonl")
