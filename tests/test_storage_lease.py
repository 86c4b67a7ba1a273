"""One writer a run folder, also where the other one is on another machine or died."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from jaxgpt.errors import UserError
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


def test_the_heart_beats_while_the_lease_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    with Lease(tmp_path):
        first = json.loads((tmp_path / FILE).read_text())["beat"]
        time.sleep(0.3)
        assert json.loads((tmp_path / FILE).read_text())["beat"] > first
    assert (tmp_path / FILE).read_bytes() == b""
