"""Benchmarks out of TFDS: the features that its builders write become the questions of the benchmark's own file."""

import json

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.evaluation.task_catalog import read_tasks
from jaxgpt.evaluation.tasks import read_task


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
    own = read_task(found.name, file)
    assert found.questions == own.questions and found.metrics == own.metrics
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
