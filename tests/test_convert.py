"""The command `convert`: both directions give the same bits, and what goes wrong leaves nothing behind."""

import errno
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxgpt.storage.files
from jaxgpt import convert
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.model import gpt2
from jaxgpt.settings import ModelConfig
from jaxgpt.training import models
from jaxgpt.training.models import export_model, load_model

MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=24, dtype="float32")
VOCAB = 270


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    _, shapes, _ = gpt2.abstract_model(MODEL, VOCAB)
    params = jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape, np.float32), shapes)
    export_model(tmp_path / "hf", MODEL, VOCAB, params, train_bpe(["no merges"], 257))
    return tmp_path / "hf"


def run(source, to, *flags) -> int:
    return convert.main(["--from", str(source), "--to", str(to), *flags])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_there_and_back_gives_the_same_files(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "run") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'run'}: jaxgpt, 0.0M parameters, ") and out.endswith("s; logits agree\n")
    assert "reading" in err and "writing jaxgpt" in err
    assert load_model(tmp_path / "run").vocab_size == VOCAB  # not the tokenizer's 257

    assert run(tmp_path / "run", tmp_path / "back") == 0
    assert files(tmp_path / "back") == files(folder)
    assert run(tmp_path / "run" / "checkpoints" / "0", tmp_path / "step") == 0
    assert files(tmp_path / "step") == files(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "run", "step"]


def test_the_kind_of_folder_can_be_chosen(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "copy", "--format", "huggingface") == 0
    assert files(tmp_path / "copy") == files(folder)
    assert ": huggingface, " in capsys.readouterr().out


def test_an_existing_folder_is_refused_before_anything_is_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)
    assert run("hf:no/such/model", folder) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: {folder} exists already; choose another name, or remove it first\n"


@pytest.mark.parametrize("source", ["nothing", "hf:org/nothing"])
def test_a_source_that_is_not_there_is_refused_in_one_line(tmp_path, capsys, source):
    assert run(source, tmp_path / "new") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {source}")
    assert not list(tmp_path.iterdir())


def test_a_broken_source_leaves_nothing(folder, tmp_path, capsys):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for what in ("is damaged: model.safetensors: changed", "broken or cut off"):  # with our digests, and without
        assert run(folder, tmp_path / "new") == 2
        assert what in capsys.readouterr().err
        (folder / "manifest.sha256").unlink(missing_ok=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("to_format", ["huggingface", "jaxgpt"])
def test_what_gives_other_logits_is_not_kept(folder, tmp_path, capsys, monkeypatch, to_format):
    def write_wrongly(write):
        def write_another_bit(folder, *args, **kwargs):
            model = next((arg for arg in args if isinstance(arg, models.LoadedModel)), None)
            params = model.params if model else args[2]
            params["ln_f"]["bias"] = params["ln_f"]["bias"].at[0].add(1e-4)
            return write(folder, *args, **kwargs)

        return write_another_bit

    for name in ("write_huggingface", "write_run"):
        monkeypatch.setattr(models, name, write_wrongly(getattr(models, name)))
    assert run(folder, tmp_path / "new", "--format", to_format) == 1
    assert "gives other logits than" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jaxgpt.storage.files, "fsync", no_space)
    assert run(folder, tmp_path / "new") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"failed: {tmp_path / 'new'} could not be written") and "No space left" in line
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
