"""Documents come in one fixed order, and what is wrong with a source is named by file and place."""

import bz2
import codecs
import gzip
import itertools
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.errors import BadRecord, UserError
from jaxgpt.preparation.documents import BadRecords
from jaxgpt.preparation.source_files import source_files
from jaxgpt.preparation.sources import Document, Reading, describe, documents, short_name, source_key, source_state
from jaxgpt.settings import DataConfig, SourceConfig


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
        with pytest.raises(UserError, match="no .jsonl, .ndjson, .json file in this folder$"):
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
        (b'{"text": "\xff"}', r"a\.jsonl:2: not UTF-8 at byte 10 \(0xff\)"),
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
    names = [name for name, _ in source_files(SourceConfig(source="stdlib"))]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    unwanted = ("/test/", "/tests/", "site-packages", "idlelib", "__pycache__", "_sysconfigdata")
    assert not [name for name in names if any(word in f"/{name}" for word in unwanted)]


def test_source_key_changes_with_the_files_and_only_then(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    data = DataConfig(source="text", path=str(tmp_path))
    before, state = source_key(data), source_state(data)
    os.utime(file, (1, 1))
    file.rename(tmp_path / "moved.md")
    assert source_key(data) == before and source_state(data) != state
    (tmp_path / "moved.md").write_text("One")
    assert source_key(data) != before
    before = source_key(data)
    (tmp_path / "b.txt").write_text("two")
    assert source_key(data) != before
    assert source_key(DataConfig()) == source_key(DataConfig())


def test_short_name_is_fit_for_a_folder(tmp_path):
    assert short_name(DataConfig()) == "stdlib"
    assert short_name(DataConfig(source="text", path=str(tmp_path / "my file.v2.txt"))) == "my-file-v2"
    assert short_name(DataConfig(source="tfds:lm1b/sub:1.0.0")) == "tfds-lm1b-sub-1-0-0"


# ---------------------------------------------------------------- compressed, long, HTML, Parquet


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]
)
def test_compressed_files_are_read_as_what_is_in_them_and_damaged_ones_are_named(suffix, compress, tmp_path):
    (tmp_path / f"a.txt.{suffix}").write_bytes(compress("one\n中文".encode()))
    assert texts(source="text", path=str(tmp_path)) == ["one\n中文"]
    whole = compress(b'{"text": "line"}\n' * 9)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(whole)
    assert texts(source="jsonl", path=str(tmp_path)) == ["line"] * 9
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"a\.jsonl\.{suffix}: damaged, or not {suffix}"):
        texts(source="jsonl", path=str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "A line.\nAnother one, longer.\n\n" * 50,
        "word " * 500,
        "中文🙂" * 200,
        "x" * 1500,
        "a\r\n\r\nb\r\n" * 90,
        "\n" * 999 + "x" * 300,
    ],
    ids=["paragraphs", "words", "no space", "one word", "carriage returns", "blank"],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_long_text_comes_in_parts_that_joined_give_it_again(text, compressed, tmp_path):
    file = tmp_path / ("a.txt.gz" if compressed else "a.txt")
    content = b"\xef\xbb\xbf" + text.encode()
    file.write_bytes(gzip.compress(content) if compressed else content)
    found = list(documents(DataConfig(source="text", path=str(file), max_record_bytes=200)))
    assert "".join(document.text for document in found).strip() == text.strip()
    assert all(len(document.text.encode()) <= 201 for document in found)
    assert [document.continues for document in found] == [False] + [True] * (len(found) - 1)
    assert len(found) > 1


def test_parts_are_cut_before_paragraphs_and_tokens_are_those_of_the_whole(tmp_path):
    from jaxgpt.data.tokenizer import train_bpe

    text = "The first paragraph,\nin two lines.\n\nA second  one.\n\n\n" * 40
    (tmp_path / "a.txt").write_text(text)
    parts = texts(source="text", path=str(tmp_path), max_record_bytes=300)
    assert all(part.startswith("\n\n") for part in parts[1:])
    tokenizer = train_bpe([text], 300)
    assert list(itertools.chain(*(tokenizer.encode(part) for part in parts))) == list(tokenizer.encode(text))


def test_a_long_text_needs_little_memory_and_is_used_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"word " * 6_000_000)
    data = DataConfig(source="text", path=str(file), max_record_bytes=1_000_000)
    tracemalloc.start()
    size = sum(len(document.text) for document in documents(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 30_000_000 and peak < 8_000_000
    with open(file, "r+b") as content:
        content.seek(25_000_000)
        content.write(b"\xe4\xb8")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 25000000 \(0xe4\)"):
        next(documents(data))


def test_html_is_one_document_a_page_with_its_tags(tmp_path):
    for name in ("b.html", "a.htm", "c.txt"):
        (tmp_path / name).write_text(f"<p>{name}</p>")
    assert texts(source="html", path=str(tmp_path)) == ["<p>a.htm</p>", "<p>b.html</p>"]


def write_parquet(file, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=2)


def test_parquet_gives_the_column_of_each_row(tmp_path):
    write_parquet(tmp_path / "a.parquet", body=["one", "中文", "three"], id=[1, 2, 3])
    data = {"source": "parquet", "path": str(tmp_path)}
    assert texts(**data, text_field="body") == ["one", "中文", "three"]
    with pytest.raises(UserError, match=r'a\.parquet: no field "text"; it has body, id: set data.text_field'):
        texts(**data, on_bad_record="skip")
    with pytest.raises(UserError, match=r'a\.parquet, row 0: field "id" is not text but int'):
        texts(**data, text_field="id")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"b\.parquet, from row 0 on: damaged, or not Parquet"):
        texts(**data, text_field="body")


# ---------------------------------------------------------------- folders as people have them


def test_suffixes_are_read_whatever_their_case_and_the_other_files_are_counted(tmp_path):
    for name in ("a.TXT", "b.text", "c.rst", "d.Md", "f", "g.pdf", "h.PDF", "i.tar.gz", ".hidden.txt", "sub/j.Txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "e.txt.GZ").write_bytes(gzip.compress(b"e.txt.GZ"))
    bad = BadRecords()
    found = [document.text for document in documents(DataConfig(source="text", path=str(tmp_path)), bad)]
    assert found == ["a.TXT", "b.text", "c.rst", "d.Md", "e.txt.GZ", "sub/j.Txt"]
    counts = {".pdf": 2, ".tar": 1, "hidden": 1, "without a suffix": 1}
    assert bad.counts == {f"not read, {kind}": count for kind, count in counts.items()}
    assert bad.examples["not read, without a suffix"] == [str(tmp_path / "f")]


def test_json_files_of_any_form_are_records_and_those_beside_the_data_are_not(tmp_path):
    line = lambda name: json.dumps({"text": name})
    (tmp_path / "a.jsonl").write_text(line("a"))
    (tmp_path / "b.ndjson").write_text(line("b"))
    (tmp_path / "c.JSONL").write_text(line("c"))
    (tmp_path / "d.json").write_text(f"{line('d0')}\n\n{line('d1')}\n")
    (tmp_path / "e.json").write_text(json.dumps([{"text": "e0"}, {"text": "e1"}], indent=2))
    (tmp_path / "f.json").write_text(json.dumps({"text": "f"}, indent=2))
    (tmp_path / "g.json").write_bytes(codecs.BOM_UTF8 + b'[{"text": "g"}]')
    (tmp_path / "dataset_info.json").write_text('{"features": []}')
    data = {"source": "jsonl", "path": str(tmp_path)}
    assert texts(**data) == ["a", "b", "c", "d0", "d1", "e0", "e1", "f", "g"]
    bad = BadRecords("skip")
    (tmp_path / "h.json").write_text('[{"text": "h"}, 3, {"body": 1}]')
    (tmp_path / "i.json").write_text('{"text": "cut\n' + line("i"))
    found = [document.text for document in documents(DataConfig(**data, on_bad_record="skip"), bad)]
    assert found[9:] == ["h", "i"] and sum(bad.counts.values()) == 4
    assert "h.json, item 1: a JSON int" in bad.examples["a JSON int"][0]
    assert bad.counts["not read, .json"] == 1


def test_links_to_folders_are_followed_once_and_what_leads_nowhere_is_counted(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root / "real", other):
        folder.mkdir(parents=True)
        (folder / f"{folder.name}.txt").write_text(folder.name)
    (root / "books").symlink_to(other)
    (root / "again").symlink_to(other)
    (root / "loop").symlink_to(root)
    (root / "real" / "up").symlink_to("..")
    (root / "gone.txt").symlink_to(tmp_path / "gone")
    (root / "file.txt").symlink_to(other / "other.txt")
    os.mkfifo(root / "pipe.txt")
    bad = BadRecords()
    found = [document.text for document in documents(DataConfig(source="text", path=str(root)), bad)]
    assert sorted(found) == ["other", "other", "real"]
    counts = {"dangling links": 1, "not files": 1, "links to folders that are read anyway": 3}
    assert bad.counts == {f"not read, {kind}": count for kind, count in counts.items()}
    for path in (root / "pipe.txt", Path("/dev/null")):
        with pytest.raises(UserError, match="neither a file nor a folder, but a pipe or a device"):
            texts(source="text", path=str(path))


def test_prepared_data_and_runs_inside_the_folder_are_not_read(tmp_path):
    for name, files in (("prepared/a", ["manifest.sha256", "b.json"]), ("run", ["config.json", "metrics.jsonl"])):
        (tmp_path / name).mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).write_text("[]")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    assert texts(source="jsonl", path=str(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    ("source", "files", "message"),
    [
        ("sgd", ["a.json", "b.json"], r"no dialogues\*.json file in this folder; it holds 2 .json: .*= \"jsonl\""),
        ("text", ["a.csv", "b.pdf", "c.csv"], r"no .txt, .*; it holds 2 .csv, 1 .pdf$"),
        ("jsonl", ["a.parquet"], r"no .jsonl, .*; it holds 1 .parquet: set data.source = \"parquet\""),
    ],
)
def test_a_folder_without_such_files_says_what_it_holds(source, files, message, tmp_path):
    for name in files:
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=message):
        source_key(DataConfig(source=source, path=str(tmp_path), format="chat" if source == "sgd" else "text"))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("at home")
    assert texts(source="text", path="~/x.txt") == ["at home"]
    assert texts(source=(SourceConfig(source="text", path="~/x.txt"),)) == ["at home"]


# ---------------------------------------------------------------- other encodings

CHINESE = "今天天气很好，我们一起去公园散步。人工智能正在改变世界，机器学习的模型需要大量的数据。\n" * 3
FRENCH = "Le café était fermé à l'époque où j'étais élève; très drôle, n'est-ce pas? Où êtes-vous?\n" * 3


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        (CHINESE, "gb18030", "gb18030"),
        (CHINESE.translate(str.maketrans("气们园", "氣們園")).replace("华", ""), "utf-16", "utf-16"),
        (CHINESE.replace("\n", "") * 40, "gbk", "gb18030"),  # longer than what is looked at
        ("床前明月光，疑是地上霜。举头望明月，低头思故乡。" * 200, "gb18030", "gb18030"),
        ("Die Größe der Übung fällt schwer; schön.\n" * 9, "latin-1", "cp1252"),
        (FRENCH, "utf-16-le", "utf-16-le"),
        (FRENCH, "utf-16-be", "utf-16-be"),
        (FRENCH, "cp1252", "cp1252"),
        ("今天天氣很好，我們去公園散步。" * 9, "big5", "big5"),
        ("今日は天気がいいので、公園を散歩しましょう。" * 9, "shift_jis", "cp932|shift"),
    ],
)
def test_another_encoding_is_named_and_read_if_it_is_set(text, encoding, named, tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode(encoding))
    data = {"source": "text", "path": str(file)}
    with pytest.raises(UserError, match=rf'a\.txt: not .*it looks like ({named}).*: set data.encoding = "({named})'):
        texts(**data)
    assert texts(**data, encoding=encoding) == [text]
    assert "".join(texts(**data, encoding=encoding, max_record_bytes=200)) == text  # in parts
    (tmp_path / "b.jsonl").write_bytes((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode(encoding) * 2)
    lines = {"source": "jsonl", "path": str(tmp_path / "b.jsonl")}
    assert texts(**lines, encoding=encoding) == [text, text]
    with pytest.raises(UserError, match="b.jsonl.*: not "):
        texts(**lines)
    if encoding == "utf-16":
        with pytest.raises(UserError, match=r"a\.txt: not gb18030, which data.encoding says"):
            texts(**data, encoding="gb18030")


@pytest.mark.parametrize(
    ("data", "message"), [({"encoding": "latin17"}, "no such encoding"), ({}, "is for text, html")]
)
def test_an_encoding_that_is_not_there_or_not_for_the_source_is_refused(data, message):
    with pytest.raises(UserError, match=f"data.encoding = .*{message}"):
        source_key(DataConfig(**{"encoding": "gb18030", **data}))


def test_text_with_nul_is_a_bad_record_wherever_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"head\0\0\0\0" * 9)  # an archive
    with gzip.open(tmp_path / "b.tar.gz", "wb") as file:
        file.write(b"name" + b"\0" * 500)
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "a\0b"}))
    write_parquet(tmp_path / "d.parquet", text=["a\0b"])
    (tmp_path / "e.txt").write_bytes(b"word " * 100 + b"\0")
    cases = {"a.txt": "text", "b.tar.gz": "text", "c.jsonl": "jsonl", "d.parquet": "parquet", "e.txt": "text"}
    for name, source in cases.items():
        with pytest.raises(UserError, match=f"{name}.*: not text: it holds the character NUL"):
            next(documents(DataConfig(source=source, path=str(tmp_path / name), max_record_bytes=300)))


def test_a_row_over_the_limit_is_a_bad_record_of_every_source(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=["x" * 99, "y" * 100, "中" * 34, "z" * 101, "short"])
    bad = BadRecords("skip")
    data = DataConfig(source="parquet", path=str(tmp_path), max_record_bytes=100, on_bad_record="skip")
    assert [len(document.text) for document in documents(data, bad)] == [99, 100, 5]
    assert bad.counts == {"longer than data.max_record_bytes = N": 2}


# ---------------------------------------------------------------- bad records


def bad_jsonl(folder) -> None:
    turns = [("user", "q"), ("assistant", "a")]
    lines = [
        json.dumps({"text": "good", "messages": messages(*turns)}),
        '{"text": "cut',
        json.dumps({"text": 3, "messages": [{"content": "no role"}]}),
        json.dumps({"body": "no text", "messages": messages(("system", "x"), ("system", "y"), *turns)}),
        json.dumps({"text": " ", "messages": messages(("user", "no answer"))}),
        '"' + "x" * 1000 + '"',
        "[" * 500,
        json.dumps({"text": "last", "messages": messages(*turns)}),
    ]
    (folder / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}')
    (folder / "b.jsonl").write_bytes(b"")


def messages(*turns) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def test_bad_records_are_skipped_and_counted_with_their_places(tmp_path):
    bad_jsonl(tmp_path)
    data = DataConfig(source="jsonl", path=str(tmp_path), on_bad_record="skip", max_record_bytes=800)
    bad = BadRecords("skip")
    assert [document.text for document in documents(data, bad)] == ["good", "last"]
    assert sum(bad.counts.values()) == 8
    places = {
        place.partition("a.jsonl:")[2].partition(":")[0] for examples in bad.examples.values() for place in examples
    }
    assert places == {"2", "3", "4", "5", "6", "7", "9", ""}  # "" is the empty file
    assert bad.counts["empty"] == 2 and any("b.jsonl" in place for place in bad.examples["empty"])
    assert bad.counts["longer than data.max_record_bytes = N"] == 1


def test_bad_conversations_are_skipped_and_counted_or_refused(tmp_path):
    bad_jsonl(tmp_path)
    data = {"source": "jsonl", "path": str(tmp_path), "format": "chat", "max_record_bytes": 800}
    bad = BadRecords("skip")
    canonical = json.dumps(messages(("user", "q"), ("assistant", "a")))
    found = documents(DataConfig(**data, on_bad_record="skip"), bad)
    assert [document.text for document in found] == [canonical, canonical]
    assert sum(bad.counts.values()) == 8  # the last line has no turns, and is no UTF-8
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON.*data.on_bad_record = .skip. leaves such records out"):
        texts(**data)


def test_reasons_are_counted_without_their_numbers_and_errors_travel_between_processes():
    bad = BadRecords("skip")
    for number in range(9):
        bad.add(BadRecord(f"a:{number}", "not JSON: x"))
        bad.add(pickle.loads(pickle.dumps(BadRecord(f"b:{number}", f"turn {number}; why"))))
    bad.empty("c")
    assert bad.counts == {"not JSON": 9, "turn N": 9, "empty": 1}
    assert bad.summary()["turn N"] == {"count": 9, "where": [f"b:{number}: turn {number}; why" for number in range(5)]}


def test_reasons_that_quote_the_data_stay_few():
    bad = BadRecords("skip")
    for number in range(1000):
        bad.add(BadRecord("a", "x" * number))
    assert len(bad.counts) <= 51 and sum(bad.counts.values()) == 1000


def test_a_line_of_200_megabytes_is_passed_over_without_being_held(tmp_path):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"text": "before"}\n')
        file.seek(200_000_000, os.SEEK_CUR)  # zeros that take no place on the disk
        file.write(b'\n{"text": "after"}\n')
    bad = BadRecords("skip")
    tracemalloc.start()
    found = list(documents(DataConfig(source="jsonl", path=str(tmp_path), max_record_bytes=3_000_000), bad))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [document.text for document in found] == ["before", "after"]
    assert bad.examples == {
        "longer than data.max_record_bytes = N": [f"{tmp_path}/a.jsonl:2: longer than data.max_record_bytes = 3000000"]
    }
    assert peak < 10_000_000


def test_a_line_may_be_as_long_as_the_limit_and_no_longer(tmp_path):
    line = json.dumps({"text": "x" * 88})
    (tmp_path / "a.jsonl").write_bytes(f"{line}\r\n{line}\n{line}".encode())
    data = {"source": "jsonl", "path": str(tmp_path)}
    assert texts(**data, max_record_bytes=len(line)) == ["x" * 88] * 3
    with pytest.raises(UserError, match=r"a\.jsonl:1: longer than data.max_record_bytes = 99"):
        texts(**data, max_record_bytes=99)


def test_a_wrong_field_is_a_wrong_setting_even_where_bad_records_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 3)
    with pytest.raises(UserError, match=r'a\.jsonl:1: no field "text"; it has body: set data.text_field'):
        texts(source="jsonl", path=str(tmp_path), on_bad_record="skip")


def test_a_first_record_without_the_field_is_skipped_like_any_other(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"meta": "version 1"}\n' + '{"text": "x"}\n' * 3 + '{"body": 1}\n' * 200)
    bad = BadRecords("skip")
    data = {"source": "jsonl", "path": str(tmp_path)}
    assert len(list(documents(DataConfig(**data, on_bad_record="skip"), bad))) == 3
    assert sum(bad.counts.values()) == 201
    with pytest.raises(UserError, match=r'a\.jsonl:1: no field "text"; it has meta: set data.text_field$'):
        texts(**data)
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 1000)  # the setting is wrong: told before all is read
    with pytest.raises(UserError, match=r'a\.jsonl:100: no field "text"; it has body: set data.text_field$'):
        texts(**data, on_bad_record="skip")


def test_a_source_without_text_says_what_was_left_out_and_why(tmp_path):
    lines = [{"messages": [{"role": "assistant"}]}] * 7
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "[\n")
    data = {"source": "jsonl", "path": str(tmp_path), "format": "chat", "on_bad_record": "skip"}
    with pytest.raises(UserError, match=r"no text in it; the corpus is empty; left out 7: .*a\.jsonl:1.*1: not JSON"):
        texts(**data)


def test_text_files_that_cannot_be_read_are_skipped_and_empty_ones_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_text("good")
    bad = BadRecords("skip")
    assert [document.text for document in documents(DataConfig(source="text", path=str(tmp_path)), bad)] == ["good"]
    assert bad.counts == {"not UTF-8 at byte N": 1, "empty": 1}
    (tmp_path / "c.txt").unlink()
    with pytest.raises(UserError, match="no text in it; the corpus is empty"):
        list(documents(DataConfig(source="text", path=str(tmp_path)), bad))


# ---------------------------------------------------------------- conversations


def test_the_made_up_dialogues_and_those_of_files_are_conversations(tmp_path):
    first = next(documents(DataConfig(source="support", format="chat")))
    assert [turn["role"] for turn in json.loads(first.text)][:2] == ["user", "assistant"]
    turns = [{"speaker": "USER", "utterance": "A table, please."}, {"speaker": "SYSTEM", "utterance": "For when?"}]
    (tmp_path / "dialogues_001.json").write_text(json.dumps([{"dialogue_id": "1", "turns": turns}]))
    (tmp_path / "schema.json").write_text("[]")
    expected = json.dumps(messages(("user", "A table, please."), ("assistant", "For when?")))
    assert texts(source="sgd", path=str(tmp_path), format="chat") == [expected]


def test_a_conversation_is_never_cut_by_max_bytes():
    data = DataConfig(source="support", format="chat", max_bytes=2000)
    found = list(documents(data))
    assert found and all(json.loads(document.text) for document in found)
    assert 0 < sum(len(document.text.encode()) for document in found) <= 2000


@pytest.mark.parametrize(("source", "format"), [("stdlib", "chat"), ("support", "text")])
def test_text_is_no_conversation_and_a_conversation_no_text(source, format):
    for use in (source_key, lambda data: next(documents(data))):
        with pytest.raises(UserError, match=f'data.source = "{source}" holds (no )?conversations.*set data.format'):
            use(DataConfig(source=source, format=format))


def test_turns_in_parquet_may_be_a_list_a_table_of_columns_or_json(tmp_path):
    turns = messages(("user", "q"), ("assistant", "a"))
    columns = {"role": ["user", "assistant"], "content": ["q", "a"]}
    for number, stored in enumerate((turns, columns, json.dumps(turns))):
        write_parquet(tmp_path / f"{number}.parquet", messages=[stored], conversations=[None])
    assert texts(source="parquet", path=str(tmp_path), format="chat") == [json.dumps(turns)] * 3


# ---------------------------------------------------------------- mixtures


def mixture(tmp_path, **settings) -> DataConfig:
    """a: 40 documents of 10 bytes, b: 100 of 30 bytes, one byte of a for three of b."""
    for name, count, size in (("a", 40, 10), ("b", 100, 30)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({name: name * size}) + "\n" for _ in range(count)))
    parts = tuple(
        SourceConfig(source="jsonl", path=str(tmp_path / f"{name}.jsonl"), text_field=name, weight=weight)
        for name, weight in (("a", 0.5), ("b", 1.5))
    )
    return DataConfig(source=parts, **settings)


def test_a_mixture_follows_its_weights_all_along_and_tells_what_ended_it(tmp_path):
    data, reading = mixture(tmp_path), Reading()
    found = list(documents(data, reading=reading))
    given = np.cumsum([[len(d.text) * (d.part == part) for part in (0, 1)] for d in found], axis=0)
    assert np.abs(given[:, 0] * 3 - given[:, 1]).max() <= 30  # never more than a document off
    assert [set(d.text) for d in found if d.part == 1][0] == {"b"}
    assert reading.ended_by == 0 and reading.num_documents == [40, 40] and reading.num_bytes == [400, 1200]
    assert found == list(documents(data))


def test_max_bytes_ends_a_mixture_without_a_part_being_used_up(tmp_path):
    reading = Reading()
    assert sum(len(d.text) for d in documents(mixture(tmp_path, max_bytes=800), reading=reading)) == 800
    assert reading.ended_by is None and reading.num_bytes == [200, 600]


@pytest.mark.parametrize("max_bytes", [None, 2000, 12])
@pytest.mark.parametrize("sizes", [(5000, 400), (400, 5000), (10, 9), (3000, 3000)])
def test_the_weights_of_a_mixture_hold_whatever_the_sizes_of_its_files(sizes, max_bytes, tmp_path):
    parts, weights = [], (1.0, 3.0)
    for number, (size, weight) in enumerate(zip(sizes, weights)):
        (tmp_path / f"{number}.txt").write_text("word " * (size // 5) + "x" * (size % 5))
        parts.append(SourceConfig(source="text", path=str(tmp_path / f"{number}.txt"), weight=weight))
    reading = Reading()
    data = DataConfig(source=tuple(parts), max_record_bytes=100, max_bytes=max_bytes)
    found = list(documents(data, reading=reading))
    most = min(size / weight for size, weight in zip(sizes, weights))
    most = min(most, max_bytes / 4) if max_bytes else most
    assert reading.num_bytes == pytest.approx([most, 3 * most], abs=1)
    assert reading.num_documents == [1, 1] and len(found) > most / 40
    turns = [document.part for document in found]
    assert most < 200 or max(len(list(same)) for _, same in itertools.groupby(turns)) <= 4  # all along


def test_conversations_of_a_mixture_stay_whole_and_none_of_its_sources_is_left_out(tmp_path):
    for name, size, count in (("long", 900, 1), ("short", 5, 9)):
        lines = [json.dumps({"prompt": f"{name} {n}", "response": "x" * size}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    parts = tuple(SourceConfig(source="jsonl", path=str(tmp_path / f"{name}.jsonl")) for name in ("long", "short"))
    found = list(documents(DataConfig(source=parts, format="chat")))
    assert sorted(document.part for document in found) == [0] + [1] * 9
    assert all(json.loads(document.text) for document in found)


def test_a_mixture_is_described_named_and_keyed_by_all_its_parts(tmp_path):
    data = mixture(tmp_path)
    assert describe(data).count(".jsonl") == 2 and short_name(data) == "a-b"
    before = source_key(data)
    (tmp_path / "b.jsonl").write_text('{"b": "other"}')
    assert source_key(data) != before


def test_an_empty_part_of_a_mixture_is_named(tmp_path):
    data = mixture(tmp_path)
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(UserError, match=r"b\.jsonl: no text in it"):
        list(documents(data))


# ---------------------------------------------------------------- Hugging Face


def test_huggingface_keeps_its_splits_and_names_a_wrong_column(tmp_path, monkeypatch):
    monkeypatch.setenv("USE_TORCH", "0")  # seconds of imports
    pytest.importorskip("datasets")
    write_parquet(tmp_path / "train.parquet", text=["one", "two"], id=[1, 2])
    write_parquet(tmp_path / "test.parquet", text=["held out"], id=[3])
    data = DataConfig(source="huggingface:parquet", path=str(tmp_path))
    expected = [Document("held out", "validation"), Document("one", "train"), Document("two", "train")]
    assert list(documents(data)) == expected
    before = source_key(data)
    assert source_key(data) == before and short_name(data) == "huggingface-parquet"
    os.utime(tmp_path / "train.parquet", (1, 1))
    assert source_key(data) == before
    write_parquet(tmp_path / "train.parquet", text=["one", "other"], id=[1, 2])
    assert source_key(data) != before
    with pytest.raises(UserError, match='huggingface:parquet: no feature "body"; it has text, id: set data.text_field'):
        texts(source="huggingface:parquet", path=str(tmp_path), text_field="body")
    with pytest.raises(UserError, match="huggingface:parquet: datasets cannot open it"):
        texts(source="huggingface:parquet", path=str(tmp_path / "gone"))


def test_a_revision_reaches_the_hub_and_a_commit_needs_no_hub_to_be_found_again(monkeypatch):
    pytest.importorskip("datasets")
    asked = []

    def offline(name, config, **options):
        asked.append((name, config, options["revision"]))
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    monkeypatch.setattr("datasets.load_dataset_builder", offline)
    commit = "0123456789abcdef" * 2 + "01234567"
    names = ["o/set", "o/set:part", "o/set@main", "o/set:part@refs/pr/1", f"o/set:part@{commit}"]
    for name in names:
        with pytest.raises(UserError, match="datasets cannot open it .*no network") as error:
            texts(source=f"huggingface:{name}")
        assert "\n" not in str(error.value)
    expected = [("o/set", None), ("o/set", "part"), ("o/set", None), ("o/set", "part"), ("o/set", "part")]
    assert asked == [(*words, revision) for words, revision in zip(expected, [None, None, "main", "refs/pr/1", commit])]
    keys = [
        source_key(DataConfig(source=f"huggingface:{name}@{commit}")) for name in ("o/set", "o/set:part", "o/other")
    ]
    assert len({*keys, source_key(DataConfig(source=f"huggingface:o/set@{commit[::-1]}"))}) == 4 and len(asked) == 5
    for name in names[:4]:  # these may change
        with pytest.raises(UserError, match="no network"):
            source_key(DataConfig(source=f"huggingface:{name}"))


def test_without_the_datasets_package_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets: pip install -e '.*\[huggingface\]'"):
        source_key(DataConfig(source="huggingface:some/set"))


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


@pytest.mark.system
def test_importing_sources_imports_nothing_heavy():
    code = (
        "import sys, jaxgpt.preparation.sources, jaxgpt.data.tokenizer, jaxgpt.data.dataset\n"
        "print(sorted({'jax', 'tensorflow_datasets', 'transformers', 'grain'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


GOOD = json.dumps({"text": "a good line"}).encode()
PIECES = st.sampled_from(
    [b"{", b'"text"', b":", b'"x"', b"}", b"[", b"]", b",", b"\0", b"\xff", b"\\ud800", b"null", b" ", b"9" * 5000]
)
LINES = st.lists(PIECES, max_size=9).map(b"".join) | st.binary(max_size=20) | st.just(GOOD)


NAMES = st.sampled_from(
    [
        "a.txt",
        "B.TXT",
        "c.md",
        "d.jsonl",
        "E.JSONL",
        "f.ndjson",
        "g.json",
        "h.html",
        "i.csv",
        "j",
        "k.txt.gz",
        "l.tar",
        "m.jsonl.gz",
    ]
)
FILES = st.dictionaries(NAMES, st.lists(LINES, max_size=6), max_size=5)
KINDS = st.sampled_from(["file", "file", "file", "folder", "link to a file", "link to nothing", "link to its folder"])


def check_folder(folder: Path, files: dict, kinds: list, source: str) -> None:
    """A folder of anything is read and counted: each file, and each line of JSON, is a document or counted."""
    expected = 1
    for (name, lines), kind in zip(files.items(), kinds):
        path, lines = folder / name, [line.replace(b"\n", b"").replace(b"\r", b"") for line in lines]
        whole = b"\n".join(lines)
        if kind == "folder":
            path.mkdir()
            path /= name
        if kind in ("file", "folder"):
            path.write_bytes(gzip.compress(whole) if name.endswith("gz") else whole)
        elif kind == "link to a file":
            (folder.parent / f"{folder.name}-{name}").write_bytes(
                gzip.compress(whole) if name.endswith("gz") else whole
            )
            path.symlink_to(folder.parent / f"{folder.name}-{name}")
        else:
            path.symlink_to(folder if kind == "link to its folder" else folder / "nothing")
        is_lines = source == "jsonl" and re.search(r"\.(jsonl|ndjson)(\.gz)?$", name.lower()) and "nothing" not in kind
        filled = sum(bool(line.strip()) for line in lines) if is_lines else 1
        expected += 0 if kind == "link to its folder" else max(1, filled)  # a folder is entered once
    (folder / ("z.txt" if source == "text" else "z.jsonl")).write_bytes(b"good" if source == "text" else GOOD)
    bad = BadRecords("skip")
    data = DataConfig(source=source, path=str(folder), on_bad_record="skip", max_record_bytes=3000)
    found = list(documents(data, bad))
    assert all("\0" not in document.text and document.text.encode() for document in found)
    assert sum(not document.continues for document in found) + sum(bad.counts.values()) >= expected, (bad.counts, files)


def fuzz(factory: pytest.TempPathFactory, examples: int) -> None:
    @settings(max_examples=examples, deadline=10_000, database=None, derandomize=True)
    @given(FILES, st.lists(KINDS, min_size=5, max_size=5), st.sampled_from(["text", "jsonl"]))
    def one(files, kinds, source):
        check_folder(factory.mktemp("fuzz"), files, kinds, source)

    one()


def test_a_folder_of_anything_is_read_and_counted(tmp_path_factory):
    fuzz(tmp_path_factory, 50)


@pytest.mark.system
def test_thousands_of_folders_of_anything_are_read_and_counted(tmp_path_factory):
    fuzz(tmp_path_factory, 2000)


@settings(max_examples=100, deadline=10_000, database=None, derandomize=True)
@given(lines=st.lists(LINES, max_size=6), suffix=st.sampled_from(["jsonl", "json", "txt", "html"]))
def test_what_is_read_and_what_is_counted_is_all_that_there_is(lines, suffix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    lines = [line.replace(b"\n", b"").replace(b"\r", b"") for line in lines]
    (folder / f"a.{suffix}").write_bytes(b"\n".join(lines))
    (folder / f"b.{suffix}").write_bytes(GOOD if "json" in suffix else b"good")
    source, bad = {"json": "jsonl", "txt": "text"}.get(suffix, suffix), BadRecords("skip")
    data = DataConfig(source=source, path=str(folder), on_bad_record="skip", max_record_bytes=3000)
    found = list(documents(data, bad))
    assert all("\0" not in document.text and document.text.encode() for document in found)
    counted = sum(not document.continues for document in found) + sum(bad.counts.values())
    if suffix == "jsonl":
        filled = sum(bool(line.strip()) for line in lines)
        assert counted == 1 + max(1, filled)  # a file without a line is counted, too
    else:
        assert counted >= 2
