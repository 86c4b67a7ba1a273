"""`per_device_train_batch_size = "auto"` and out-of-memory errors in whole runs."""

import importlib.util
import json

import jax
import pytest
import tiny

from jaxgpt import train

TEXT = "".join(f"line {number} of a text that is long enough for a few windows\n" for number in range(400))
TRAIN = """
warmup_steps = 1
[train]
max_steps = 2
global_batch_size = 32
per_device_train_batch_size = "auto"
compilation_cache_dir = ""
[eval]
eval_batches = 1
sample_tokens = 0
[log]
tensorboard = false
"""


@pytest.fixture
def run(tmp_path, capsys):
    """A function that trains in tmp_path/run: (exit code, stdout, stderr)."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "c.toml").write_text(tiny.RUN.format(folder=tmp_path) + TRAIN)

    def run(*arguments: str):
        code = train.main(["--config", str(tmp_path / "c.toml"), "--workdir", str(tmp_path / "run"), *arguments])
        return code, *capsys.readouterr()

    return run


def saved(tmp_path) -> dict:
    return json.loads((tmp_path / "run" / "config.json").read_text())["train"]


def test_an_automatic_batch_is_resolved_and_kept_when_the_run_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "jaxgpt.training.start.largest_batch", lambda config, *_: 2 if config.train.global_batch_size == 32 else 0
    )
    code, out, _ = run()
    assert code == 0
    assert "per_device_train_batch_size = auto: 2, of 1 to 4" in out
    assert saved(tmp_path)["per_device_train_batch_size"] == 2
    assert saved(tmp_path)["gradient_accumulation_steps"] == 2
    # goes on, with another size and the same sequences a step: nobody named them this time
    monkeypatch.setattr(
        "jaxgpt.training.start.largest_batch", lambda config, *_: 4 if config.train.global_batch_size == 32 else 0
    )
    code, _, err = run("--train.max_steps", "2", "--train.global_batch_size", "none")
    assert code == 0, err
    assert saved(tmp_path)["per_device_train_batch_size"] == 4
    assert saved(tmp_path)["global_batch_size"] == 32


def test_an_automatic_batch_that_cannot_divide_is_told_before_anything_is_prepared(run, tmp_path):
    code, _, err = run("--train.global_batch_size", "12")
    assert code == 2
    assert "12 is not a multiple of the 8 devices that share it; 16 is" in err
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.attention", "flash"], "model.attention"),
        (["--mesh.tensor", "2", "--mesh.fsdp", "4", "--model.n_embd", "30"], "30"),
        (["--log.wandb_project", "x"], "pip install wandb"),
        (
            ["--train.global_batch_size", "none", "--train.per_device_train_batch_size", "1", "--mesh.data", "3"],
            "devices",
        ),
        (["--eval.tasks", "choices=nothing.jsonl"], "eval.tasks"),
        (["--init.from_checkpoint", "nothing"], "nothing: no such checkpoint"),
        (["--data.skip_list", "nothing"], "data.skip_list = nothing"),
        (["--optimizer.warmup_steps", "3"], "warmup_steps = 3 is more than train.max_steps = 2"),
        (["--eval.eval_steps", "2", "--checkpoint.save_steps", "3"], "save_steps = 3"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_the_settings_alone_show_to_be_wrong_is_told_before_anything_is_prepared(
    run, tmp_path, monkeypatch, options, words
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = run(*options)
    assert code == 2
    assert words in err and err.count("\n") == 1
    assert not (tmp_path / "prepared").exists() and not (tmp_path / "run").exists()


def test_a_run_that_is_out_of_memory_says_what_took_it_and_what_would_fit(run, tmp_path, monkeypatch):
    message = "RESOURCE_EXHAUSTED: the total memory required (21.50G) exceeds available HBM (15.75G). HLO module: x."

    def fit(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr("jaxgpt.training.run.fit", fit)
    code, _, err = run("--train.per_device_train_batch_size", "4")
    assert code == 1
    assert "failed: out of memory: a device needs 21.50 GiB and may use 15.75 GiB" in err
    assert "activations" in err and "optimizer" in err
    assert "Traceback" not in err
