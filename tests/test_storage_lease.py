"""One writer a run folder, also where the other one is on another machine or died."""

import contextlib
import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxgpt.errors import FolderLost, UserError
from jaxgpt.storage import lease
from jaxgpt.storage.lease import FILE, Lease

ELSEWHERE = {"host": "tpu-7", "pid": 12, "boot_id": "another machine's", "beat": 0.0}


def test_a_second_owner_is_refused_by_name_and_let_in_when_the_first_has_left(tmp_path):
    with (
        Lease(tmp_path),
        pytest.raises(UserError, match=f"is being written by process {os.getpid()} on .*--workdir"),
        Lease(tmp_path),
    ):
        pass
    with Lease(tmp_path):
        pass


@pytest.mark.system
def test_the_lease_of_a_killed_process_is_taken_over(tmp_path, capsys):
    code = f"import os, sys; from pathlib import Path; from jaxgpt.storage.lease import Lease; Lease(Path({str(tmp_path)!r})).__enter__(); print(1, flush=True); os.kill(os.getpid(), 9)"  # noqa: E501
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.stdout == "1\n" and killed.returncode == -9
    with Lease(tmp_path):
        assert "taken over" in capsys.readouterr().out


def test_an_owner_on_another_machine_is_believed_while_its_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    file = tmp_path / FILE
    file.write_text(json.dumps(ELSEWHERE))

    def beat():
        for count in range(1, 40):
            time.sleep(0.02)
            file.write_text(json.dumps(ELSEWHERE | {"beat": count}))

    heart = threading.Thread(target=beat)
    heart.start()
    with pytest.raises(UserError, match="is being written by process 12 on tpu-7"), Lease(tmp_path):
        pass
    heart.join()
    began = time.monotonic()
    with Lease(tmp_path):  # it has stopped
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 5


def test_a_file_torn_by_a_kill_is_nobodys(tmp_path):
    (tmp_path / FILE).write_text('{"host": "tp')
    with Lease(tmp_path):
        pass


@pytest.fixture(params=["flock", "no flock"])
def fast_beats(request, monkeypatch):
    """Beats of 0.3 s, with the kernel's locks and without, as on a mounted bucket."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.3)
    if request.param == "no flock":

        def flock(file, operation):
            raise OSError(errno.ENOSYS, "no locks here")

        monkeypatch.setattr(lease.fcntl, "flock", flock)


def test_of_two_that_start_at_random_moments_one_at_most_holds_the_folder(tmp_path, fast_beats):
    draw = random.Random(0)

    def start(folder, delay, holders):
        time.sleep(delay)
        with contextlib.suppress(UserError), Lease(folder) as held:
            holders.append(True)
            together = len(holders)
            time.sleep(0.3)
            held.check(look=True)
            holders.pop()
            return together
        return 0

    with ThreadPoolExecutor(50) as pool:
        pairs = []
        for number in range(25):
            folder, holders = tmp_path / str(number), []
            folder.mkdir()
            pairs.append([pool.submit(start, folder, draw.choice([0, draw.random() * 0.2]), holders) for _ in "ab"])
        for pair in pairs:
            first, second = sorted(start.result() for start in pair)
            assert (first, second) in {(0, 1), (1, 1)}  # (1, 1): one after the other


@pytest.mark.parametrize("takeover", ["removed", "replaced", "written by another"])
def test_an_owner_whose_lock_is_taken_or_removed_stops(tmp_path, fast_beats, takeover):
    other = json.dumps(ELSEWHERE | {"id": "another's"})
    with Lease(tmp_path) as held:
        held.check(look=True)
        path = tmp_path / FILE
        if takeover != "written by another":
            path.unlink()
        if takeover != "removed":
            path.write_text(other)
        with pytest.raises(FolderLost, match="was removed" if takeover == "removed" else "by process 12 on tpu-7"):
            held.check(look=True)
        with pytest.raises(FolderLost):
            held.check()
    assert takeover == "removed" or path.read_text() == other  # left to the new owner


def test_a_lock_that_is_no_file_is_refused_and_left_alone(tmp_path):
    for number, (make, left) in enumerate(
        [(Path.mkdir, Path.is_dir), (lambda path: path.symlink_to(tmp_path / "note"), Path.is_symlink)]
    ):
        (tmp_path / "note").write_text("precious")
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / FILE)
        with pytest.raises(UserError, match="the lock of the run folder cannot be opened"), Lease(folder):
            pass
        assert left(folder / FILE)
    assert (tmp_path / "note").read_text() == "precious"


def test_the_heart_beats_while_the_lease_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    with Lease(tmp_path):
        first = json.loads((tmp_path / FILE).read_text())["beat"]
        time.sleep(0.3)
        assert json.loads((tmp_path / FILE).read_text())["beat"] > first
    assert (tmp_path / FILE).read_bytes() == b""
