"""Questions in a benchmark's own format or from TFDS become the harness's prompts; results by hand; bad questions."""

import json
import math

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.evaluation.scoring import Score
from jaxgpt.evaluation.tasks import FORMATS, Question, Task, read_tasks

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


def read(name: str, file) -> Task:
    [task] = read_tasks([f"{name}={file}"])
    return task


@pytest.mark.parametrize("name", FORMATS)
def test_a_record_becomes_the_pairs_that_are_scored(name, tmp_path):
    record, pairs, answer = EXAMPLES[name]
    [question] = read(name, write(tmp_path, record)).questions
    assert (question.pairs, question.answer) == (pairs, answer)


def scored(*logprobs: float, greedy: bool = False, cut: int = 0) -> list[Score]:
    return [Score(logprob, greedy, cut) for logprob in logprobs]


def test_accuracies_and_their_errors_are_those_worked_out_by_hand():
    long_and_short = Question([("", "abcd"), ("", "b")], ["abcd", "b"], 0)
    task = Task("choices", [long_and_short] * 4, ("acc", "acc_norm"))
    # By the sum the first is right in two of four; by the sum over the characters in three.
    scores = [*scored(-1, -2), *scored(-3, -4), *scored(-3, -2, cut=5), *scored(-9, -2)]
    found = task.results(scores)
    assert (found["acc"], found["acc_norm"], found["questions"], found["cut"]) == (0.5, 0.75, 4, 2)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert found["acc_norm_stderr"] == pytest.approx(math.sqrt(0.1875 / 3))


def test_a_single_choice_is_right_where_the_model_would_have_written_it():
    question = Question([("a", " b")], ["b"], 0)
    task = Task("lambada", [question] * 2, ("acc", "perplexity"))
    found = task.results([*scored(-1.0, greedy=True), *scored(-3.0)])
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
        read(name, write(tmp_path, *records))


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nothing.jsonl: No such file"):
        read("piqa", tmp_path / "nothing.jsonl")


# ---------------------------------------------------------------- out of TFDS: the features that its builders write


def text_features(*names: str) -> dict:
    import tensorflow_datasets as tfds

    return {name: tfds.features.Text() for name in names}


def label(*names: str):
    import tensorflow_datasets as tfds

    return tfds.features.ClassLabel(names=list(names))


def sequence(*parts):
    import tensorflow_datasets as tfds

    return tfds.features.Sequence(*parts)


def write_tfds(folder, name: str, split: str, features: dict, examples: list[dict], version="1.0.0") -> None:
    """As TFDS's own builder of this name leaves it, in ArrayRecord form."""
    import tensorflow_datasets as tfds

    place = folder / name / version
    place.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name.split("/")[0], version=tfds.core.Version(version), data_dir=str(place), module_name="tests"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, 100, file_format="array_record")
    writer.initialize_splits([split])
    writer.add_examples({split: examples})
    writer.close_all()


def hellaswag(folder):
    features = {
        **text_features("context", "activity_label", "split_type", "source_id"),
        "endings": sequence(text_features("x")["x"]),
        "label": np.int32,
    }
    common = {"activity_label": "Sailing", "split_type": "indomain", "endings": ["a [x] b.", "c", "d", "e"], "label": 2}
    examples = [
        {**common, "context": "A boat. It is seen. the man", "source_id": "activitynet~v_1"},
        {**common, "context": "[header] How to sail [title] Find a boat. buy it", "source_id": "wikihow~2"},
    ]
    write_tfds(folder, "hellaswag", "validation", features, examples, "1.1.0")
    own = {"activity_label": "Sailing", "endings": common["endings"], "label": 2}
    return "hellaswag", [
        {**own, "ctx_a": "A boat. It is seen.", "ctx_b": "the man"},
        {**own, "ctx_a": examples[1]["context"], "ctx_b": ""},
    ]


def lambada(folder):
    write_tfds(folder, "lambada", "test", text_features("passage"), [{"passage": "he took his hat\n"}])
    return "lambada", [{"text": "he took his hat"}]


def piqa(folder):
    record = {"id": "7", "goal": "Dry hair", "sol1": "towel", "sol2": "oil"}
    write_tfds(
        folder, "piqa", "validation", {**text_features(*record), "label": label("0", "1")}, [{**record, "label": 1}]
    )
    return "piqa", [{**record, "label": 1}]


def winogrande(folder):
    record = {"sentence": "Ann paid Bob, as _ was poor.", "option1": "Ann", "option2": "Bob"}
    features = {**text_features(*record), "label": label("1", "2")}
    write_tfds(folder, "winogrande", "validation", features, [{**record, "label": "2"}], "1.2.0")
    return "winogrande", [{**record, "answer": "2"}]


def arc(folder):
    letters = label(*"ABCDE")
    features = {
        **text_features("id", "question"),
        "choices": sequence({"text": text_features("x")["x"], "label": letters}),
        "answerKey": letters,
    }
    choices = {"text": ["so", "not", "both"], "label": ["A", "B", "C"]}
    example = {"id": "1", "question": "Why?", "choices": choices, "answerKey": "C"}
    write_tfds(folder, "ai2_arc/ARC-Easy", "test", features, [example])
    return "arc=tfds:ai2_arc/ARC-Easy", [example]


def openbookqa(folder):
    letters = "ABCD"
    features = {
        "question": text_features("stem", *(f"choice_{letter}" for letter in letters)),
        **text_features("fact1", "turkIdAnonymized"),
        **dict.fromkeys(["humanScore", "clarity"], np.float32),
        "answerKey": label(*letters),
    }
    texts = dict(zip(letters, ["cold", "hot", "dry", "old"]))
    question = {"stem": "Ice is", **{f"choice_{letter}": text for letter, text in texts.items()}}
    example = {"question": question, "fact1": "f", "turkIdAnonymized": "t", "humanScore": 1.0, "clarity": 1.0}
    write_tfds(folder, "openbookqa", "test", features, [{**example, "answerKey": "B"}], "0.1.0")
    choices = [{"text": text, "label": letter} for letter, text in texts.items()]
    return "openbookqa", [{"question": {"stem": "Ice is", "choices": choices}, "answerKey": "B"}]


def blimp(folder):
    record = {"sentence_good": "She sings.", "sentence_bad": "She sing."}
    flags = dict.fromkeys(["simple_LM_method", "one_prefix_method", "two_prefix_method", "lexically_identical"], True)
    rest = dict.fromkeys(["field", "linguistics_term", "UID"], "x")
    features = {**text_features(*record, *rest), **dict.fromkeys(flags, np.bool_), "pair_id": np.int32}
    write_tfds(folder, "blimp/adjunct_island", "train", features, [{**record, **flags, **rest, "pair_id": 0}], "0.1.0")
    return "blimp=tfds:blimp/adjunct_island", [record]


@pytest.mark.parametrize("write", [lambada, hellaswag, piqa, winogrande, arc, openbookqa, blimp])
def test_what_tfds_keeps_gives_the_questions_of_the_benchmarks_own_file(write, tmp_path):
    word, records = write(tmp_path / "tfds")
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    [found] = read_tasks([word], tmp_path / "tfds")
    own = read(found.name, file)
    content = lambda task: [question._replace(where="") for question in task.questions]
    assert content(found) == content(own) and found.metrics == own.metrics
    assert found.source.startswith("tfds:") and "split" in found.source


def test_only_the_first_questions_are_read_where_one_says_so(tmp_path):
    hellaswag(tmp_path)
    [whole], [first] = read_tasks(["hellaswag"], tmp_path), read_tasks(["hellaswag"], tmp_path, limit=1)
    assert first.questions == whole.questions[:1] != whole.questions


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("cbt", "task cbt: TFDS has no dataset of this task; give a file: cbt=FILE"),
        ("wikitext", "give a file: wikitext=FILE"),
        ("arc", "task arc: TFDS keeps it in parts; name one: arc=tfds:ai2_arc/ARC-Easy"),
        ("nothing", "task nothing: no such format; there are lambada, .*, wikitext"),
        ("piqa", "tfds:piqa has no split validation, only train"),
        ("winogrande", "stored as tfrecord"),
        ("openbookqa", r"tfds:openbookqa, split test, example 0: no feature 'question'; it has text"),
        ("lambada=tfds:no_such_set_here", "TFDS knows no dataset of this name"),
    ],
)
def test_what_tfds_cannot_give_is_one_line(word, complaint, tmp_path):
    write_tfds(tmp_path, "piqa", "train", text_features("goal"), [{"goal": "g"}])
    write_tfds(tmp_path, "winogrande", "validation", text_features("sentence"), [{"sentence": "g"}])
    write_tfds(tmp_path, "openbookqa", "test", text_features("text"), [{"text": "g"}])
    stored = tmp_path / "winogrande" / "1.0.0" / "dataset_info.json"
    stored.write_text(stored.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=complaint):
        read_tasks([word], tmp_path)
