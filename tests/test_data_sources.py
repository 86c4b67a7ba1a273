"""Documents come in one fixed order, and what is wrong with a source is named by file and place."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxgpt.config import DataConfig, UserError
from jaxgpt.data import sources
from jaxgpt.data.sources import Document, documents, short_name, source_key


def texts(**settings) -> list[str]:
    return [document.text for document in documents(DataConfig(**settings))]


def test_a_text_file_is_one_document_to_the_byte(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("one\r\ntwo\n\n中文 🙂".encode())
    assert list(documents(DataConfig(source="text", path=str(file)))) == [Document("one\r\ntwo\n\n中文 🙂")]


def test_a_folder_is_read_recursively_in_the_order_of_relative_paths(tmp_path):
    for name in ("b/z.md", "b.txt", "a.py", "b/.hidden.txt", ".git/x.txt", "c.bin", "blank.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(" \n" if name == "blank.txt" else name)
    assert texts(source="text", path=str(tmp_path)) == ["a.py", "b.txt", "b/z.md"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(source="text", path=str(tmp_path)) == ["hello"]


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"bad\.txt: not UTF-8 at byte 3 \(0xe9\)"):
        texts(source="text", path=str(tmp_path))


def test_a_missing_or_empty_source_is_a_user_error(tmp_path):
    gone = str(tmp_path / "gone.txt")
    for use in (texts, lambda **settings: source_key(DataConfig(**settings))):
        with pytest.raises(UserError, match="gone.txt: no such file or folder"):
            use(source="text", path=gone)
        with pytest.raises(UserError, match="no .jsonl file in this folder"):
            use(source="jsonl", path=str(tmp_path))
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(UserError, match=f"{tmp_path}: no text in it; the corpus is empty"):
        texts(source="text", path=str(tmp_path))


def test_jsonl_gives_the_text_field_of_each_line(tmp_path):
    lines = [json.dumps({"id": i, "body": f"text {i}\n中"}) for i in range(3)]
    (tmp_path / "b.jsonl").write_text("\n\n".join(lines))
    (tmp_path / "a.jsonl").write_text('{"body": "first"}\n')
    expected = ["first", "text 0\n中", "text 1\n中", "text 2\n中"]
    assert texts(source="jsonl", path=str(tmp_path), text_field="body") == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a\.jsonl:2: not JSON"),
        (b'{"body": "x", "id": 1}', r'a\.jsonl:2: no field "text"; it has body, id: set data.text_field'),
        (b'{"text": 3}', r'a\.jsonl:2: field "text" is not text but int'),
        (b'["text"]', r"a\.jsonl:2: a JSON list"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: not UTF-8 at byte 10 of the line"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2: .*U\+D800"),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        texts(source="jsonl", path=str(tmp_path))


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [
        (2, ["ab"]),
        (3, ["abc"]),
        (4, ["abc"]),
        (5, ["abc"]),
        (6, ["abc", "中"]),
        (8, ["abc", "中"]),
        (99, ["abc", "中文"]),
    ],
)
def test_max_bytes_cuts_the_last_document_between_characters(max_bytes, expected, tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("中文")
    assert texts(source="text", path=str(tmp_path), max_bytes=max_bytes) == expected


def test_stdlib_is_clean_source_in_a_fixed_order():
    data = DataConfig(max_bytes=1_000_000)
    first = list(documents(data))
    assert first == list(documents(data))
    assert sum(len(document.text.encode()) for document in first) == 1_000_000
    names = [name for name, _ in sources._files(DataConfig())]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    unwanted = ("/test/", "/tests/", "site-packages", "idlelib", "__pycache__", "_sysconfigdata")
    assert not [name for name in names if any(word in f"/{name}" for word in unwanted)]


def test_source_key_changes_with_the_files_and_only_then(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    data = DataConfig(source="text", path=str(tmp_path))
    before = source_key(data)
    assert source_key(data) == before
    os.utime(file, (1, 1))
    assert source_key(data) != before
    before = source_key(data)
    (tmp_path / "b.txt").write_text("two")
    assert source_key(data) != before
    assert source_key(DataConfig()) == source_key(DataConfig())


def test_short_name_is_fit_for_a_folder(tmp_path):
    assert short_name(DataConfig()) == "stdlib"
    assert short_name(DataConfig(source="text", path=str(tmp_path / "my file.v2.txt"))) == "my-file-v2"
    assert short_name(DataConfig(source="tfds:lm1b/sub:1.0.0")) == "tfds-lm1b-sub-1-0-0"


# ---------------------------------------------------------------- TFDS


def write_tfds(folder, splits: dict[str, list], name="small", file_format="array_record", version="1.0.0"):
    """A TFDS dataset of texts as TFDS itself writes it, without TensorFlow."""
    import tensorflow_datasets as tfds

    place = folder / name / version
    place.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name.split("/")[0], version=tfds.core.Version(version), data_dir=str(place), module_name="tests"
    )
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": tfds.features.Scalar(np.int64)})
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    if file_format != "array_record":
        info.set_file_format(file_format)
        info.set_splits(tfds.core.splits.SplitDict([]))
        info.write_to_directory(str(place))
        return
    writer = tfds.core.SequentialWriter(info, 2, file_format=file_format)
    writer.initialize_splits(list(splits))
    writer.add_examples({k: [{"text": text, "label": 0} for text in v] for k, v in splits.items()})
    writer.close_all()


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_tfds_keeps_its_splits_and_takes_test_for_want_of_validation(held_out, tmp_path):
    train = ["one\n", "two 中文", "three", "four", "five"]
    write_tfds(tmp_path, {"train": train, held_out: ["six", "seven"]})
    found = list(documents(DataConfig(source="tfds:small", path=str(tmp_path))))
    assert [d.text for d in found if d.split == "train"] == train
    assert [d.text for d in found if d.split == "validation"] == ["six", "seven"]


def test_tfds_without_a_held_out_split_leaves_the_split_open(tmp_path):
    write_tfds(tmp_path, {"train": ["one", "two"]}, name="small/config")
    found = list(documents(DataConfig(source="tfds:small/config", path=str(tmp_path))))
    assert found == [Document("one"), Document("two")]


def test_tfds_takes_the_newest_version_and_its_key_changes_with_it(tmp_path):
    data = DataConfig(source="tfds:small", path=str(tmp_path))
    write_tfds(tmp_path, {"train": ["old"]}, version="2.0.0")
    before = source_key(data)
    write_tfds(tmp_path, {"train": ["new"]}, version="10.0.0")
    assert [d.text for d in documents(data)] == ["new"]
    assert source_key(data) != before


def test_max_bytes_leaves_both_splits_of_tfds_their_share(tmp_path):
    write_tfds(tmp_path, {"train": ["t" * 10] * 20, "validation": ["v" * 10] * 20})
    found = list(documents(DataConfig(source="tfds:small", path=str(tmp_path), max_bytes=100, validation_fraction=0.2)))
    sizes = {s: sum(len(d.text) for d in found if d.split == s) for s in ("train", "validation")}
    assert sizes == {"train": 80, "validation": 20}


def test_a_wrong_text_field_of_tfds_names_the_features(tmp_path):
    write_tfds(tmp_path, {"train": ["one"]})
    with pytest.raises(UserError, match='no feature "body"; it has .*text.*: set data.text_field'):
        texts(source="tfds:small", path=str(tmp_path), text_field="body")
    with pytest.raises(UserError, match='example 0: field "label" is not text but int'):
        texts(source="tfds:small", path=str(tmp_path), text_field="label")


def test_a_tfrecord_dataset_is_refused_with_the_fix(tmp_path):
    write_tfds(tmp_path, {}, file_format="tfrecord")
    with pytest.raises(UserError, match="stored as tfrecord.*tfds build small --file_format=array_record"):
        texts(source="tfds:small", path=str(tmp_path))


def test_an_unknown_tfds_name_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="tfds:no_such_set_here: TFDS knows no dataset of this name"):
        texts(source="tfds:no_such_set_here", path=str(tmp_path))


def test_no_network_is_one_clear_line(tmp_path, monkeypatch):
    import requests
    import tensorflow_datasets as tfds

    class Builder:
        def download_and_prepare(self, **_):
            request = requests.Request("GET", "https://example.org/data.zip").prepare()
            raise requests.ConnectionError("a very\nlong story", request=request)

    monkeypatch.setattr(tfds, "builder", lambda *_, **__: Builder())
    with pytest.raises(UserError, match=r"no answer from https://example.org/data.zip") as caught:
        source_key(DataConfig(source="tfds:small", path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_importing_sources_imports_nothing_heavy():
    code = (
        "import sys, jaxgpt.data.sources, jaxgpt.data.tokenizer, jaxgpt.data.rows\n"
        "print(sorted({'jax', 'tensorflow_datasets', 'tokenizers', 'transformers', 'grain'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
