"""A prepared dataset is whole or not there, and reading it gives back the documents."""

import concurrent.futures
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.config import Config
from jaxgpt.data import dataset as dataset_module
from jaxgpt.data.dataset import RECORD_TOKENS, SPLITS, TokenStream, open_dataset
from jaxgpt.data.tokenizer import END_OF_TEXT, train_bpe
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation import make_dataset, writer
from jaxgpt.preparation.make_dataset import prepare
from jaxgpt.preparation.stages import PIECE
from jaxgpt.preparation.writer import DatasetWriter
from jaxgpt.settings import DataConfig, ModelConfig, TokenizerConfig
from jaxgpt.storage import manifest
from jaxgpt.storage.files import new_folder

LINES = [f"line {i}: the cat sat on the mat, 中文 {i * i}\n" for i in range(900)]


def settings(folder: Path, source_path: Path, tokenizer: TokenizerConfig | None = None, **data) -> Config:
    return Config(
        model=ModelConfig(n_layer=1, n_head=1, n_embd=8, n_positions=8),
        tokenizer=tokenizer or TokenizerConfig(vocab_size=300),
        data=DataConfig(
            **{"source": "text", "path": str(source_path), "prepared_dir": str(folder / "prepared"), **data}
        ),
    )


@pytest.fixture
def one_file(tmp_path) -> Config:
    (tmp_path / "one.txt").write_text("".join(LINES))
    return settings(tmp_path, tmp_path / "one.txt")


@pytest.fixture
def many_documents(tmp_path) -> Config:
    text = "".join(json.dumps({"text": line}) + "\n" for line in LINES)
    (tmp_path / "many.jsonl").write_text(text)
    return settings(tmp_path, tmp_path / "many.jsonl", source="jsonl", validation_fraction=0.2)


def whole(stream: TokenStream) -> np.ndarray:
    return stream.read(0, stream.num_tokens)


def split_documents(config: Config) -> dict[str, list[str]]:
    """The documents of each split, in order, as the dataset gives them back."""
    path = prepare(config)
    dataset = open_dataset(path)
    found = {}
    for split in SPLITS:
        tokens = whole(getattr(dataset, split))
        assert tokens[0] == dataset.end_of_text
        parts = np.split(tokens, np.flatnonzero(tokens == dataset.end_of_text))[1:]
        found[split] = [dataset.tokenizer.decode(part[1:]) for part in parts]
    return found


# ---------------------------------------------------------------- what is in it


def test_of_one_document_the_last_characters_are_held_out(tmp_path):
    text = "".join(LINES)
    (tmp_path / "one.txt").write_text(text)
    config = settings(tmp_path, tmp_path / "one.txt", TokenizerConfig(type="char"), validation_fraction=0.1)
    border = int(len(text) * 0.9)
    assert split_documents(config) == {"train": [text[:border]], "validation": [text[border:]]}


def test_of_many_documents_each_goes_whole_to_one_side(many_documents):
    found = split_documents(many_documents)
    assert sorted(found["train"] + found["validation"]) == sorted(LINES)
    assert [line for line in LINES if line in set(found["train"])] == found["train"]
    assert 0.15 < len(found["validation"]) / len(LINES) < 0.25


@pytest.mark.parametrize("fraction", [1e-9, 0.8])
def test_either_side_gets_text_whatever_the_fraction(fraction, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(LINES[i])
    found = split_documents(settings(tmp_path, tmp_path, validation_fraction=fraction))
    held = len("".join(found["validation"])) / len("".join(LINES[:4]))
    assert found["train"] and abs(held - max(fraction, 1 / 160)) < 0.02


def test_the_splits_of_the_source_are_kept(tmp_path):
    from test_preparation_sources import write_tfds

    write_tfds(tmp_path, {"train": LINES[:5], "validation": LINES[5:7]})
    config = settings(tmp_path, tmp_path, source="tfds:small")
    assert split_documents(config) == {"train": LINES[:5], "validation": LINES[5:7]}


def test_end_of_text_written_out_in_a_document_is_text(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}{END_OF_TEXT}{END_OF_TEXT}" * 5)
    found = split_documents(settings(tmp_path, tmp_path, validation_fraction=0.5))
    assert sorted(found["train"] + found["validation"]) == [f"{name}{END_OF_TEXT}{END_OF_TEXT}" * 5 for name in "ab"]


def test_the_tokens_are_those_of_the_whole_text_although_it_is_tokenized_in_pieces(one_file):
    path = prepare(one_file)
    dataset = open_dataset(path)
    text = "".join(LINES)
    border = int(len(text) * 0.95)
    expected = [dataset.end_of_text, *dataset.tokenizer.encode(text[:border])]
    assert border > PIECE
    assert whole(dataset.train).tolist() == expected


def test_the_metadata_counts_what_is_there(many_documents):
    dataset = open_dataset(prepare(many_documents))
    documents = split_documents(many_documents)
    for split in SPLITS:
        stream = getattr(dataset, split)
        assert stream.num_documents == len(documents[split])
        assert stream.num_bytes == sum(len(text.encode()) for text in documents[split])
        assert stream.num_tokens == len(whole(stream))
    assert dataset.vocab_size == load_tokenizer(dataset.path / "tokenizer").vocab_size
    assert dataset.tokenizer_digest == load_tokenizer(dataset.path / "tokenizer").digest


def test_the_fingerprint_is_that_of_the_documents(tmp_path):
    prints = []
    for number, text in enumerate(["a b c d e f\n" * 9, "a b c d e f\n" * 9, "a b c d e g\n" * 9]):
        file = tmp_path / f"{number}.txt"
        file.write_text(text)
        prints.append(open_dataset(prepare(settings(tmp_path, file))).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_plain_tfds_reads_it(one_file):
    import tensorflow_datasets as tfds

    path = prepare(one_file)
    sources = tfds.builder_from_directory(path).as_data_source()
    tokens = np.concatenate([record["tokens"] for record in sources["train"]])
    assert tokens.dtype == np.uint16
    assert np.array_equal(tokens, whole(open_dataset(path).train))


def test_tokens_past_65535_are_stored_in_32_bits(tmp_path):
    tokenizer = train_bpe(LINES, 300)
    tokenizer.vocab_size = 65_536  # 65_535 is the largest id of 16 bits
    stream = DatasetWriter(tmp_path, tokenizer)
    for split in SPLITS:
        stream.add(split, np.array([65_535, 70_000], np.int32), 2, starts_document=True)
    stream.finish({"fingerprint": "x", "settings": {}})
    assert whole(open_dataset(tmp_path).train).tolist() == [tokenizer.end_of_text, 65_535, 70_000]


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("size", [1, 7, RECORD_TOKENS, RECORD_TOKENS + 1, 3 * RECORD_TOKENS + 5])
def test_read_is_numpy_take_with_wrap(size, cached, monkeypatch):
    monkeypatch.setattr(dataset_module, "_CACHE_BYTES", 1 << 30 if cached else 0)
    tokens = np.random.default_rng(0).integers(0, 65_536, size).astype(np.uint16)
    records = [{"tokens": tokens[i : i + RECORD_TOKENS]} for i in range(0, size, RECORD_TOKENS)]
    stream = TokenStream(records, size, 0, 1, "uint16")
    for start in {0, 1, size - 1, size // 2, RECORD_TOKENS - 1, 10 * size + 3}:
        for length in (1, 2, 65, RECORD_TOKENS + 3, 2 * size + 1):
            got = stream.read(start, length)
            assert got.dtype == np.int32
            assert np.array_equal(got, tokens.take(range(start, start + length), mode="wrap"))


def test_threads_read_the_same_tokens(one_file):
    stream = open_dataset(prepare(one_file)).train
    expected = whole(open_dataset(prepare(one_file)).train)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        spans = list(pool.map(lambda start: stream.read(start * 97, 3000), range(200)))
    for start, span in enumerate(spans):
        assert np.array_equal(span, expected.take(range(start * 97, start * 97 + 3000), mode="wrap"))


# ---------------------------------------------------------------- whole or not there


@pytest.mark.parametrize("special_tokens", [(), ("<|user|>",)])
def test_a_second_run_does_nothing(special_tokens, one_file, capsys):
    tokenizer = dataclasses.replace(one_file.tokenizer, special_tokens=special_tokens)
    one_file = dataclasses.replace(one_file, tokenizer=tokenizer)
    path = prepare(one_file)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    capsys.readouterr()
    assert prepare(one_file) == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    assert capsys.readouterr().out.count("\n") == 1


def test_other_settings_or_another_source_make_another_dataset(one_file):
    path = Path(one_file.data.path)
    place = lambda config: make_dataset.place_of(config, None).path
    paths = [place(one_file)]
    for change in ({"max_bytes": 9000}, {"validation_fraction": 0.3}):
        paths.append(place(dataclasses.replace(one_file, data=dataclasses.replace(one_file.data, **change))))
    for tokenizer in (TokenizerConfig(vocab_size=290), TokenizerConfig(type="char")):
        paths.append(place(dataclasses.replace(one_file, tokenizer=tokenizer)))
    path.write_text("other " * 50)
    paths.append(place(one_file))
    assert len(set(paths)) == len(paths)


@pytest.mark.system
@pytest.mark.parametrize("point", ["DatasetWriter.add", "DatasetWriter.finish", "manifest.write"])
def test_a_killed_prepare_leaves_nothing_finished_and_the_next_one_succeeds(point, one_file):
    from jaxgpt.config import to_json

    code = (
        "import os, signal, sys\n"
        "from jaxgpt.config import from_json\n"
        "from jaxgpt.preparation import make_dataset, writer\n"
        f"writer.{point} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "make_dataset.prepare(from_json(sys.stdin.read()))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], input=to_json(one_file), text=True, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = Path(one_file.data.prepared_dir)
    [leftover] = [place for place in folder.iterdir() if place.name.endswith(".partial")]
    with pytest.raises(UserError, match="no finished prepared dataset|holds no manifest"):
        open_dataset(leftover)
    path = prepare(one_file)
    assert open_dataset(path).train.num_tokens > 0
    assert list(folder.iterdir()) == [path]


def test_what_a_live_process_is_making_is_left_alone(tmp_path, monkeypatch):
    final = tmp_path / "data-1"
    with new_folder(final, existing="keep") as other:
        (other / "x").write_text("from another process")
        mine = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: mine + 1)
        with new_folder(final, existing="keep") as folder:
            (folder / "x").write_text("first")
        assert other.exists()
    assert (final / "x").read_text() == "first"
    assert list(tmp_path.iterdir()) == [final]


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "data-1", existing="keep"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the user's mistakes


def refused(config: Config, message: str) -> None:
    """`prepare` refuses `config` with `message` and writes nothing."""
    with pytest.raises(UserError, match=message):
        prepare(config)
    folder = Path(config.data.prepared_dir)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize(
    ("content", "data", "message"),
    [
        (None, {}, "no such file or folder"),
        (b"", {}, "the corpus is empty"),
        (b"caf\xe9", {}, "not UTF-8 at byte 3"),
        (b'{"text": "x"', {"source": "jsonl"}, "file:1: not JSON"),
        (b'{"body": "x"}', {"source": "jsonl"}, "set data.text_field"),
        (b"ab", {"block_size": 8}, "has 2 tokens, fewer than the 9 of one window"),
        (b"x", {"block_size": 8}, "has 0 tokens, fewer than the 9"),
        (b"x", {}, "has 0 tokens"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(content, data, message, tmp_path):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    refused(settings(tmp_path, tmp_path / "file", **data), message)


def test_a_character_the_given_tokenizer_lacks_is_refused_and_nothing_written(tmp_path, one_file):
    from jaxgpt.data.tokenizer import char_tokenizer

    char_tokenizer(["line :,0123456789\nthecasonm"]).save(tmp_path / "tok")
    tokenizer = TokenizerConfig(type="folder", path=str(tmp_path / "tok"))
    refused(dataclasses.replace(one_file, tokenizer=tokenizer), r"'中' \(U\+4E2D\)")


def test_a_found_dataset_shorter_than_a_window_is_refused_with_both_numbers_and_fits_where_none_is_set(one_file):
    dataset = open_dataset(prepare(one_file))
    num_tokens = dataset.train.num_tokens
    longer = dataclasses.replace(one_file, model=dataclasses.replace(one_file.model, n_positions=num_tokens))
    assert prepare(longer) == dataset.path and dataset.fit(longer).block_size == num_tokens - 1
    assert dataset.fit(one_file) == one_file
    longer = dataclasses.replace(longer, data=dataclasses.replace(longer.data, block_size=num_tokens))
    with pytest.raises(UserError, match=f"has {num_tokens} tokens, fewer than the {num_tokens + 1} of one window"):
        prepare(longer)


def test_a_tokenizer_that_is_not_the_datas_own_is_refused(one_file):
    path = prepare(one_file)
    train_bpe(["other text entirely"] * 9, 270).save(path / "tokenizer")
    for use in (lambda: open_dataset(path), lambda: prepare(one_file)):
        with pytest.raises(UserError, match=r"tokenizer/tokenizer.json: changed .*; delete .* and prepare again"):
            use()
    manifest.write(path)  # as if it had been prepared so
    for use in (lambda: open_dataset(path), lambda: prepare(one_file)):
        with pytest.raises(UserError, match="does not match the prepared data beside it"):
            use()


@pytest.fixture
def shards(one_file, monkeypatch) -> tuple[Path, list[str]]:
    """A dataset in several shards, and the names of those of the training split."""
    monkeypatch.setattr(writer, "SHARD_RECORDS", 1)
    path = prepare(one_file)
    names = sorted(file.name for file in path.glob("*train*"))
    assert len(names) > 3
    return path, names


def damaged(path: Path, message: str, verify: str = "digests") -> None:
    """`open_dataset` refuses the folder in one line that says what and how to fix it."""
    with pytest.raises(UserError, match=message) as error:
        open_dataset(path, verify)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert "prepare again" in str(error.value) or "remove it" in str(error.value)


@pytest.mark.parametrize("verify", ["digests", "sizes"])
def test_a_missing_truncated_renamed_or_extra_shard_is_refused_by_name(verify, shards):
    path, names = shards
    with pytest.raises(UserError, match="no finished prepared dataset here"):
        open_dataset(path / "gone")
    assert open_dataset(path, verify).train.num_tokens
    first, second = path / names[0], path / names[1]
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    damaged(path, rf"{names[0]}: \d+ bytes instead of {len(content)}; delete", verify)
    first.unlink()
    damaged(path, f"{names[0]}: missing; delete", verify)
    second.rename(first)
    damaged(path, f"{names[1]}: missing; delete", verify)
    first.rename(second)
    first.write_bytes(content)
    extra = path / f"jaxgpt_tokens-train.array_record-{len(names):05}"
    extra.write_bytes(content)
    damaged(path, rf"{extra.name}: not listed \(extra\); remove it", verify)
    extra.unlink()
    assert open_dataset(path, verify).train.num_tokens


def test_two_shards_swapped_are_refused(shards):
    path, (first, second, *_) = shards
    assert (path / first).read_bytes() != (path / second).read_bytes()
    (path / first).rename(path / "x")
    (path / second).rename(path / first)
    (path / "x").rename(path / second)
    damaged(path, rf"{first}: changed .*\(and 1 more\)")


def test_a_flipped_bit_anywhere_in_any_file_is_refused(one_file):
    path = prepare(one_file)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) == 10
    for file in files:
        content = file.read_bytes()
        name = str(file.relative_to(path))
        for number, position in enumerate(np.linspace(0, len(content) - 1, 9, dtype=int)):
            flipped = bytearray(content)
            flipped[position] ^= 1 << number % 8
            file.write_bytes(flipped)
            damaged(path, "delete" if name == manifest.NAME else f"{name}: changed")
            if "array_record" not in name and name != manifest.NAME:  # small files are read whatever `verify` is
                damaged(path, "delete", "sizes")
        file.write_bytes(content[: len(content) // 2])
        damaged(path, "delete", "sizes")
        file.write_bytes(content)
    assert open_dataset(path).train.num_tokens


def test_data_of_an_older_version_is_refused_and_made_anew_under_another_name(one_file, monkeypatch):
    path = prepare(one_file)
    (path / manifest.NAME).unlink()  # as version 1 left it
    damaged(path, "before format 2 prepared it, or it was deleted; delete .* and prepare again")
    monkeypatch.setattr(make_dataset, "FORMAT_VERSION", 3)
    assert prepare(one_file) != path


def test_the_data_of_other_settings_copied_into_the_folder_is_refused(one_file):
    path = prepare(one_file)
    other = prepare(dataclasses.replace(one_file, tokenizer=TokenizerConfig(type="char")))
    shutil.rmtree(path)
    shutil.copytree(other, path)
    assert open_dataset(path).train.num_tokens  # nothing is wrong with it by itself
    with pytest.raises(UserError, match="prepared with tokenizer = char, not bpe; delete"):
        prepare(one_file)


def test_long_verification_shows_its_progress_on_a_terminal(one_file, monkeypatch, capsys):
    path = prepare(one_file)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    capsys.readouterr()
    open_dataset(path)
    assert "verifying" not in capsys.readouterr().err
    monkeypatch.setattr(dataset_module, "_LONG", 1000)
    open_dataset(path, "sizes")
    assert "verifying" not in capsys.readouterr().err
    open_dataset(path)
    assert "verifying data" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_a_user_error(one_file, tmp_path):
    (tmp_path / "file").write_text("")
    data = dataclasses.replace(one_file.data, prepared_dir=str(tmp_path / "file" / "prepared"))
    with pytest.raises(UserError, match="cannot be made"):
        prepare(dataclasses.replace(one_file, data=data))
