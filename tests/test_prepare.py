"""`python -m jaxgpt.prepare`: exit codes, the report, and what it never imports."""

import subprocess
import sys

import pytest

from jaxgpt.prepare import main


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    file = tmp_path / "small.toml"
    file.write_text(
        "model.n_positions = 16\ntokenizer.vocab_size = 280\n"
        f'data = {{ source = "text", path = "{tmp_path}/text.txt", prepared_dir = "{tmp_path}/prepared" }}\n'
    )
    return file


def test_it_reports_documents_tokens_and_the_place_and_then_finds_it(config, tmp_path, capsys):
    assert main(["--config", str(config)]) == 0
    report = capsys.readouterr().out
    (place,) = (tmp_path / "prepared").iterdir()
    assert str(place) in report
    for word in ("train", "validation", "documents 1", "tokens", "bytes per token", "vocabulary"):
        assert word in report
    assert main(["--config", str(config)]) == 0
    assert capsys.readouterr().out == f"prepared data: {place} (found, nothing to do)\n"


def test_a_users_mistake_is_one_line_and_exit_code_2(config, tmp_path, capsys):
    assert main(["--config", str(config), "--data.path", str(tmp_path / "gone.txt")]) == 2
    assert capsys.readouterr().err == f"error: data.path = {tmp_path}/gone.txt: no such file or folder\n"
    assert not (tmp_path / "prepared").exists()


def test_preparing_and_reading_never_import_tensorflow_or_torch(config):
    code = (
        "import sys, jax\n"
        "from jaxgpt.prepare import main\n"
        "from jaxgpt.cli import load_config\n"
        "from jaxgpt.data import pipeline, preparation, rows\n"
        f"assert main(['--config', {str(config)!r}]) == 0\n"
        f"dataset = rows.open_dataset(preparation.prepare(load_config({str(config)!r})))\n"
        "place = jax.sharding.SingleDeviceSharding(jax.devices()[0])\n"
        "(batch,) = pipeline.train_batches(dataset.train, seed=0, start_step=0, stop_step=1, global_batch_size=4,\n"
        "                                  accumulation=2, block_size=16, sharding=place)\n"
        "assert batch.tokens_BT.shape == (2, 2, 16)\n"
        "heavy = {'tensorflow', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
