"""Folders that version 0.1 wrote are found, checked and read by this one."""

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jaxgpt import compare, convert, evaluate, sample, train
from jaxgpt.config import load_config
from jaxgpt.data.dataset import open_dataset
from jaxgpt.data.pipeline import train_rows
from jaxgpt.preparation.make_dataset import given_tokenizer, prepare
from jaxgpt.training.metrics import read_metrics

ARCHIVE = Path(__file__).parent / "data" / "old_run.tar.gz"


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the folder in which version 0.1 prepared two datasets and trained; the working directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for manifest in tmp_path.glob("prepared/*/manifest.sha256"):  # the archive leaves out the pages, which are large
        lines = manifest.read_text().splitlines(keepends=True)
        manifest.write_text("".join(line for line in lines if not line.endswith("  report.html\n")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- prepared data


def name_by_version_1(config: Path, settings: dict) -> str:
    """The name that version 0.1 gave to a dataset made from a text file, which depends on the file's path and time."""
    file = Path(load_config(config).data.path).resolve()
    state = f"{file}\n{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
    facts = [2, settings, hashlib.sha256(state.encode()).hexdigest()]
    return f"{file.stem}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]}"


@pytest.mark.parametrize(
    ("config", "name", "fingerprint"),
    [("run.toml", "text-b5fa5fb93d95", "ee046959"), ("chat.toml", "support-a9e011c879f3", "1436a6c9")],
)
def test_prepared_data_is_found_verified_and_read(old, config, name, fingerprint, capsys):
    found = Path("prepared", name)
    if name.startswith("text"):  # it was made elsewhere
        settings = json.loads((found / "metadata.json").read_text())["settings"]
        found = found.rename(found.with_name(name_by_version_1(Path(config), settings)))
    before = sorted(os.listdir("prepared"))
    settings = load_config(config)
    assert prepare(settings, given_tokenizer(settings)) == found
    assert capsys.readouterr().out == f"prepared data: {found} (found, nothing to do)\n"
    assert sorted(os.listdir("prepared")) == before
    dataset = open_dataset(found)
    assert dataset.fingerprint.startswith(fingerprint)
    size = settings.block_size
    batch = train_rows(dataset.train, seed=0, step=0, global_batch_size=4, block_size=size, rows=range(4))
    assert batch.tokens_BT.shape == (4, size) and np.asarray(batch.tokens_BT).max() < dataset.vocab_size
    rows, source = [dataset.tokenizer.decode(tokens) for tokens in batch.tokens_BT], Path("text.txt").read_text()
    assert any(row in source or "<|im_start|>assistant" in row for row in rows)


# ---------------------------------------------------------------- a run


@pytest.fixture
def expected(old) -> dict:
    """The figures that version 0.1 printed: of the run's step 6, and of steps 7 to 9 when it went on."""
    return json.loads((old / "expected.json").read_text())


def test_a_run_goes_on_with_the_losses_that_version_1_had(old, expected, capsys):
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--train.per_device_train_batch_size", "1"]
    assert train.main(["--config", "run.toml", "--workdir", "run", "--train.max_steps", "9", *mesh]) == 0
    assert "resumed after step 6" in capsys.readouterr().out
    lines = read_metrics(Path("run"))
    losses = {str(line["step"]): line["loss"] for line in lines if "loss" in line and line["step"] > 6}
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    assert lines[-1]["eval_loss"] == pytest.approx(expected["eval_loss_9"], rel=1e-5)


def test_a_run_is_sampled_evaluated_converted_and_compared(old, expected, capsys):
    words = ["--prompt", "one and ", "--max-new-tokens", "12", "--temperature", "0"]
    assert sample.main(["--checkpoint", "run", *words]) == 0
    assert capsys.readouterr().out.splitlines()[0] == expected["sample"]
    assert evaluate.main(["--checkpoint", "run", "--text", "text.txt", "--json", "eval.json"]) == 0
    found = json.loads(Path("eval.json").read_text())
    assert found["texts"][0]["loss"] == pytest.approx(expected["evaluate_loss"], rel=1e-5)
    assert convert.main(["--from", "run/hf", "--to", "again"]) == 0
    assert convert.main(["--from", "run", "--to", "again-hf"]) == 0
    assert Path("again-hf/model.safetensors").read_bytes() == Path("run/hf/model.safetensors").read_bytes()
    capsys.readouterr()
    shutil.copytree("run", "other")
    assert compare.main(["run", "other"]) == 0
    assert capsys.readouterr().out.startswith("The settings are the same.")
