"""`prepare --runner beam` on Beam's own runner in this process."""

import hashlib
import json
from pathlib import Path

import pytest

pytest.importorskip("apache_beam", reason="the extra beam is not installed")

from jaxgpt.preparation import stages
from jaxgpt.prepare import main

TEXTS = [f"number {i}  the cat sat on the mat, https://x.org/{i * i} 中文\n" * 3 for i in range(60)]


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(stages, "CHUNK_BYTES", 2000)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    file = tmp_path / "small.toml"
    file.write_text(
        "model.n_positions = 16\ntokenizer.vocab_size = 280\n"
        'cleaning = { urls = "mask", whitespace = true, drop_duplicates = true }\n'
        f'data = {{ source = "jsonl", path = "{tmp_path}/texts.jsonl", num_proc = 1 }}\n'
    )
    return file


def shards(folder: Path) -> dict[str, str]:
    (place,) = folder.iterdir()
    files = [*place.glob("*.array_record-*"), place / "metadata.json", *place.glob("tokenizer/*")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_beam_writes_the_same_shards(config, tmp_path):
    words = ["--config", str(config), "--data.prepared_dir"]
    assert main([*words, str(tmp_path / "local")]) == 0
    assert main([*words, str(tmp_path / "beam"), "--runner", "beam", "--", "--runner", "DirectRunner"]) == 0
    assert len(shards(tmp_path / "local")) == 5
    assert shards(tmp_path / "beam") == shards(tmp_path / "local")


def test_a_users_mistake_found_by_a_worker_is_one_line(config, tmp_path, capsys):
    from jaxgpt.data.tokenizer import char_tokenizer

    char_tokenizer(["number 0123456789 the cat sat on mat,<url>\n"]).save(tmp_path / "tokenizer")
    words = ["--tokenizer.type", "folder", "--tokenizer.path", str(tmp_path / "tokenizer")]
    words += ["--data.prepared_dir", str(tmp_path / "beam"), "--runner", "beam"]
    assert main(["--config", str(config), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: the character-level tokenizer has no token for '中'")
    assert not (tmp_path / "beam").exists()
