"""A manifest finds whatever happens to a file of its folder, and `sha256sum` agrees with it."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jaxgpt.storage import manifest

FILES = {"a": b"first", "b/c/deep": b"x" * 300_000, "b/empty": b"", "z": b"last"}


def fill(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest.write(folder)
    return folder


def sha256sum(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["sha256sum", "--check", "--strict", manifest.NAME], cwd=folder, capture_output=True)


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def test_an_untouched_folder_has_no_problems_and_sha256sum_agrees(tmp_path):
    fill(tmp_path)
    (tmp_path / "empty folder").mkdir()
    seen = []
    assert manifest.problems(tmp_path, seen.append) == []
    assert sum(seen) == sum(map(len, FILES.values()))
    assert [line[66:] for line in (tmp_path / manifest.NAME).read_text().splitlines()] == sorted(FILES)
    assert sha256sum(tmp_path).returncode == 0
    manifest.write(tmp_path)  # a second time, the manifest of the first is no part of it
    assert manifest.problems(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["a b", "a\nb", "back\\slash", "\\", "car\rriage", "*", " ", "é中", os.fsdecode(b"\xff")]
)
def test_odd_names_are_written_as_sha256sum_writes_them(name, tmp_path):
    fill(tmp_path, {name: b"content", "plain": b""})
    assert manifest.problems(tmp_path) == []
    assert sha256sum(tmp_path).returncode == 0
    (tmp_path / name).write_bytes(b"c0ntent")
    (problem,) = manifest.problems(tmp_path)
    assert "changed" in problem
    assert "\n" not in problem
    assert "\r" not in problem
    problem.encode()  # can be printed
    assert sha256sum(tmp_path).returncode == 1


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_damage_to_every_file_is_named(name, tmp_path):
    content, path = FILES[name], fill(tmp_path) / name

    def found() -> list[str]:
        return [problem.split(" (")[0] for problem in manifest.problems(tmp_path)]

    for position in {0, len(content) // 2, len(content) - 1} if content else ():
        path.write_bytes(flipped(content, position, position % 8))
        assert found() == [f"{name}: changed"]
    if content:
        path.write_bytes(content[:-1])
        assert found() == [f"{name}: changed"]
    path.write_bytes(content + b"\0")
    assert found() == [f"{name}: changed"]
    path.rename(tmp_path / "elsewhere")
    assert found() == [f"{name}: missing", "elsewhere: not listed"]
    (tmp_path / "elsewhere").unlink()
    assert found() == [f"{name}: missing"]
    path.mkdir()
    assert found() == [f"{name}: cannot be read"]


def test_two_files_swapped_are_both_named(tmp_path):
    fill(tmp_path)
    (tmp_path / "a").rename(tmp_path / "x")
    (tmp_path / "z").rename(tmp_path / "a")
    (tmp_path / "x").rename(tmp_path / "z")
    assert [problem.split(" ")[0] for problem in manifest.problems(tmp_path)] == ["a:", "z:"]


def test_no_bit_of_the_manifest_can_flip_unnoticed(tmp_path):
    path = fill(tmp_path, {"a\nb": b"one", "c/d": b"two"}) / manifest.NAME
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in {5, position % 8}:  # 5 is the one between a and A
            path.write_bytes(flipped(whole, position, bit))
            assert manifest.problems(tmp_path), (position, bit)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert manifest.problems(tmp_path), size
    path.write_bytes(whole + whole)
    assert manifest.problems(tmp_path) == [f"{manifest.NAME}: line {number} is damaged" for number in (3, 4)]
    path.unlink()
    assert manifest.problems(tmp_path) == [f"{manifest.NAME}: missing"]
    path.mkdir()
    assert manifest.problems(tmp_path) == [f"{manifest.NAME}: cannot be read (Is a directory)"]


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path):
    fill(tmp_path)
    make = {
        "pipe": os.mkfifo,
        "loop": lambda path: path.symlink_to(tmp_path),
        "dangling": lambda path: path.symlink_to("nowhere"),
    }
    for name, create in make.items():
        create(tmp_path / name)
        assert manifest.problems(tmp_path) == [f"{name}: not listed (extra)"]
        with pytest.raises(OSError, match=name):
            manifest.write(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "a")
    assert manifest.problems(tmp_path) == ["a: cannot be read (not a file)"]


def test_a_file_moved_to_another_disk_may_be_a_link(tmp_path):
    folder = fill(tmp_path / "data")
    shutil.move(folder / "z", tmp_path / "z")
    (folder / "z").symlink_to(tmp_path / "z")
    assert manifest.problems(folder) == []
    (tmp_path / "z").write_bytes(b"lust")
    assert manifest.problems(folder)[0].startswith("z: changed")


def test_what_cannot_be_read_is_a_problem_and_no_exception(tmp_path, monkeypatch):
    def failing(file, algorithm: str):
        raise OSError(5, "Input/output error", file.name)

    fill(tmp_path)
    monkeypatch.setattr(hashlib, "file_digest", failing)
    assert manifest.problems(tmp_path) == [f"{name}: cannot be read (Input/output error)" for name in sorted(FILES)]
    with pytest.raises(OSError, match="Input/output error"):
        manifest.write(tmp_path)


def test_a_write_that_fails_leaves_no_manifest(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    fill(tmp_path)
    (tmp_path / manifest.NAME).unlink()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        manifest.write(tmp_path)
    assert manifest.problems(tmp_path) == [f"{manifest.NAME}: missing"]
