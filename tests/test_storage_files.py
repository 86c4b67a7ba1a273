"""Files and folders are whole or absent, whatever happens while they are written."""

import errno
import json
import os
import socket

import pytest

from jaxgpt.errors import UserError
from jaxgpt.storage import files


def test_a_file_is_the_old_one_until_the_new_one_is_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_file(path, "old")
    with pytest.raises(ZeroDivisionError), files.new_file(path) as file:
        file.write(b"half of the n")
        assert path.read_text() == "old"
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]

    order = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name, call in real.items():
        monkeypatch.setattr(os, name, lambda *a, name=name, call=call: (order.append(name), call(*a))[1])
    files.write_file(path, "你好")
    assert path.read_bytes() == "你好".encode()
    assert order == ["fsync", "replace", "fsync"]  # its bytes, its name, the folder that holds the name


@pytest.mark.parametrize("write", [files.write_file, lambda path, text: files.append_json(path, {"text": text})])
def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch, write):
    full = OSError(errno.ENOSPC, "No space left on device")  # as write and fsync raise it: without a name
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "a.json", "text")
    assert error.value.filename == str(tmp_path / "a.json")


def test_an_error_in_a_new_folder_names_it_and_other_peoples_folders_stay(tmp_path):
    theirs = tmp_path / f".new.{socket.gethostname()}.my.notes.partial"
    theirs.mkdir()
    with pytest.raises(OSError, match="full") as error, files.new_folder(tmp_path / "new"):
        raise OSError(errno.ENOSPC, "full")
    assert error.value.filename == str(tmp_path / "new") and os.listdir(tmp_path) == [theirs.name]


def test_lines_are_appended_whole(tmp_path):
    for number in range(3):
        files.append_json(tmp_path / "lines.jsonl", {"n": number, "text": "a\nb"})
    assert [json.loads(line)["n"] for line in (tmp_path / "lines.jsonl").read_text().splitlines()] == [0, 1, 2]


def fill(folder, existing, text="new"):
    with files.new_folder(folder, existing) as partial:
        (partial / "x").write_text(text)
        assert not folder.exists() or (folder / "x").read_text() == "old"


@pytest.mark.parametrize(("existing", "kept"), [("replace", "new"), ("keep", "old")])
def test_a_folder_that_exists_is_replaced_or_kept(tmp_path, existing, kept):
    folder = tmp_path / "folder"
    fill(folder, existing, "old")
    fill(folder, existing)
    assert (folder / "x").read_text() == kept
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_that_exists_is_refused_before_anything_is_made(tmp_path):
    folder = tmp_path / "folder"
    fill(folder, "refuse", "old")
    with pytest.raises(UserError, match="exists already"), files.new_folder(folder):
        pytest.fail("the block ran")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists already"), files.new_folder(tmp_path / "file"):
        pytest.fail("the block ran")
    with pytest.raises(UserError, match="cannot be made"), files.new_folder(tmp_path / "file" / "below"):
        pytest.fail("the block ran")


def test_a_block_that_fails_leaves_nothing_and_a_dead_process_is_cleaned_up_after(tmp_path, monkeypatch):
    folder = tmp_path / "a[b]"
    with pytest.raises(KeyboardInterrupt), files.new_folder(folder):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    dead = tmp_path / f".{folder.name}.{files.socket.gethostname()}.{2**22 + 1}.12345678.partial"
    other = tmp_path / f".{folder.name}.elsewhere.{2**22 + 1}.12345678.partial"
    dead.mkdir()
    other.mkdir()
    fill(folder, "refuse")
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, folder.name])


def test_a_replacement_that_was_killed_between_its_two_renames_is_mended(tmp_path):
    folder = tmp_path / "folder"
    fill(folder, "replace", "old")
    os.rename(folder, tmp_path / ".folder.old")
    with pytest.raises(ZeroDivisionError), files.new_folder(folder, "replace"):
        1 / 0  # noqa: B018
    assert (folder / "x").read_text() == "old"
