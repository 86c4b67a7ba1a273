"""`encode` and `decode`: a text as tokens on the command line, with any tokenizer, and back."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_tokenizer_folders import bert, bpe, with_byte_fallback, write

from jaxgpt import decode, encode
from jaxgpt.data.tokenizer import END_OF_TEXT
from jaxgpt.data.tokenizer_folder import load_tokenizer

TEXT = "Hello World, 句子 🙂"


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path, bpe(END_OF_TEXT))
    return tmp_path


def standard_input(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_a_text_is_shown_token_by_token_and_comes_back(folder, capsys):
    ids = load_tokenizer(folder).encode(TEXT)
    assert encode.main([TEXT, "--tokenizer", str(folder), "--json", str(folder / "out.json")]) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["id", "piece"] and [int(row.split()[0]) for row in rows] == ids
    assert any("' World'" in row for row in rows) and any(row.endswith(r"b'\xf0'") for row in rows)
    assert last == f"{len(ids)} tokens, 17 characters, 24 bytes; {17 / len(ids):.2f} characters per token"
    made = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert (made["ids"], made["decoded"], made["tokens"]) == (ids, TEXT, len(ids))
    for words in ([*map(str, ids)], [str(ids)], [", ".join(map(str, ids))]):
        assert decode.main([*words, "--tokenizer", str(folder), "--json", str(folder / "back.json")]) == 0
        assert capsys.readouterr().out == TEXT + "\n"
    assert json.loads((folder / "back.json").read_text(encoding="utf-8")) == {"text": TEXT, "ids": ids}


def test_text_and_ids_come_from_a_file_or_a_pipe(folder, capsys, monkeypatch):
    ids = load_tokenizer(folder).encode(TEXT)
    (folder / "text.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    standard_input(monkeypatch, f"{TEXT}\n".encode())
    shown = []
    for words in ([TEXT], ["--file", str(folder / "text.txt")], []):
        assert encode.main([*words, "--tokenizer", str(folder / "tokenizer.json")]) == 0
        shown.append(capsys.readouterr().out)
    assert len({*shown}) == 1
    standard_input(monkeypatch, f"{ids[0]} {ids[1]}\n{ids[2]}".encode())
    assert decode.main(["--tokenizer", str(folder)]) == 0
    assert capsys.readouterr().out == load_tokenizer(folder).decode(ids[:3]) + "\n"


def test_other_kinds_of_tokenizers_show_their_own_pieces_and_what_is_lost(tmp_path, capsys):
    for name, make, pieces in (
        ("bert", bert, ["'hello'", "'是'", "'##i'"]),
        ("bytes", with_byte_fallback, [r"b'\xf0'"]),
    ):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
        assert encode.main(["Hello 是 ai 🙂", "--tokenizer", str(tmp_path / name)]) == 0
        out = capsys.readouterr().out
        assert all(piece in out for piece in pieces)
        assert ("decoded, it is another text: 'hello 是 ai [UNK]'" in out) == (name == "bert")


def test_every_place_that_has_a_tokenizer_can_be_named(trained, capsys):
    run = trained.run
    step = next((run / "checkpoints").glob("[0-9]*"))
    places = [run, f"{run}@best", step, run / "hf", run / "tokenizer", run / "tokenizer" / "tokenizer.json"]
    for place in places:
        assert decode.main(["0", "1", "--tokenizer", str(place)]) == 0
    assert len({*capsys.readouterr().out.splitlines()} - {""}) <= 2


@pytest.mark.parametrize(
    ("verb", "words", "told"),
    [
        (encode, [""], "the text has no tokens"),
        (encode, ["a", "--file", "no.txt", "--tokenizer", "nowhere"], "nowhere: it is not there"),
        (encode, ["--file", "no.txt"], "--file no.txt: No such file"),
        (encode, ["a\udcff"], "not valid Unicode (byte 0xff"),
        (encode, [], "standard input: not UTF-8 at byte 1"),
        (decode, ["x"], "'x' is no token id"),
        (decode, ["-1"], "'-1' is no token id"),
        (decode, ["²"], "'²' is no token id"),
        (decode, [""], "'nothing' is no token id"),
        (decode, ["400"], "400 is no token: the ids of this tokenizer are 0 to 339"),
        (decode, ["9" * 5000], "9' is no token id"),
        (decode, ["0", "--tokenizer", "configs"], "configs: it holds no tokenizer"),
    ],
)
def test_what_is_wrong_is_one_line(verb, words, told, folder, capsys, monkeypatch):
    standard_input(monkeypatch, b"\xff")
    assert verb.main(["--tokenizer", str(folder), *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.system
def test_neither_verb_imports_jax_or_transformers(folder):
    for verb, word in (("encode", TEXT), ("decode", "0")):
        script = f"import sys; from jaxgpt import {verb}; {verb}.main(sys.argv[1:])"
        script += "; sys.exit(bool({'jax', 'transformers', 'torch'} & {*sys.modules}))"
        command = [sys.executable, "-c", script, word, "--tokenizer", str(folder)]
        assert subprocess.run(command, capture_output=True).returncode == 0
