"""`python -m jaxgpt.prepare`: exit codes, the report, and what it never imports."""

import json
import subprocess
import sys

import pytest

from jaxgpt.errors import how_to_install
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


def test_the_report_is_written_as_json_with_what_the_machine_can_feed(config, tmp_path, capsys):
    words = ["--config", str(config), "--tpu", "v5e-1", "--train.global_batch_size", "8", "--train.max_steps", "10"]
    words += ["--optimizer.warmup_steps", "1"]
    assert main([*words, "--json", str(tmp_path / "first.json")]) == 0
    out = capsys.readouterr().out
    assert "v5e-1 is estimated to train" in out
    assert "epochs" in out
    report = json.loads((tmp_path / "first.json").read_text())
    (place,) = (tmp_path / "prepared").iterdir()
    assert report == json.loads((place / "report.json").read_text())
    (need,) = report["host"]["slices"]
    assert need["slice"] == "v5e-1"
    assert report["host"]["tokens_per_second"] > 1000
    assert report["epochs"]["epochs"] == round(10 * 8 / report["epochs"]["rows"], 3)
    assert main([*words, "--json", str(tmp_path / "second.json")]) == 0
    again = json.loads((tmp_path / "second.json").read_text())
    assert again["splits"] == report["splits"]
    assert "found, nothing to do" in capsys.readouterr().out


def test_options_for_beam_without_it_are_refused(config, capsys):
    assert main(["--config", str(config), "--", "--runner", "FlinkRunner"]) == 2
    assert "add --runner beam" in capsys.readouterr().err


def test_beam_that_is_not_installed_is_a_users_mistake(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert main(["--config", str(config), "--runner", "beam"]) == 2
    assert capsys.readouterr().err == f"error: --runner beam needs Apache Beam: {how_to_install('beam')}\n"
    assert not (tmp_path / "prepared").exists()


@pytest.mark.system
def test_preparing_and_reading_never_import_tensorflow_or_torch(config):
    code = (
        "import sys, jax\n"
        "from jaxgpt.prepare import main\n"
        "from jaxgpt.config import load_config\n"
        "from jaxgpt.data import dataset as on_disk, pipeline\nfrom jaxgpt.preparation import make_dataset\n"
        f"assert main(['--config', {str(config)!r}]) == 0\n"
        f"dataset = on_disk.open_dataset(make_dataset.prepare(load_config({str(config)!r})))\n"
        "place = jax.sharding.SingleDeviceSharding(jax.devices()[0])\n"
        "(batch,) = pipeline.train_batches(dataset.train, seed=0, start_step=0, stop_step=1, global_batch_size=4,\n"
        "                                  accumulation=2, block_size=16, sharding=place)\n"
        "assert batch.tokens_BT.shape == (2, 2, 16)\n"
        "heavy = {'tensorflow', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
