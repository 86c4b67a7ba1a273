"""Training that starts from other weights: the same numbers from either kind of folder, and new tokens for old ones."""

import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import TRAINED, save_as_run

from jaxgpt import train
from jaxgpt.config import load_config
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.model import gpt2
from jaxgpt.preparation.make_dataset import given_tokenizer
from jaxgpt.settings import ModelConfig
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.models import export_model, load_model

SHARDED = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
ROLES = '["<|user|>", "<|assistant|>"]'
MANY = json.dumps([f"<|{number}|>" for number in range(120)])  # with 17 characters: more than 128 rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained) -> Path:
    """The text and the config of the session's trained run, without its samples."""
    folder = tmp_path_factory.mktemp("finetune")
    shutil.copy(trained.text, folder / "text.txt")
    config = TRAINED.format(folder=folder).replace("sample_tokens = 8", "sample_tokens = 0")
    (folder / "config.toml").write_text(config)
    return folder


def command(folder: Path, workdir: Path, settings: dict) -> list[str]:
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["--config", str(folder / "config.toml"), "--workdir", str(workdir), *options]


def run(folder: Path, workdir: Path, settings: dict) -> Path:
    assert train.main(command(folder, workdir, settings)) == 0
    return workdir


@pytest.fixture(scope="module")
def source(trained) -> Path:
    """A finished run with checkpoints of steps 3 and 6; its hf/ is the other kind of source."""
    return trained.run


def starts(source: Path) -> dict[str, dict]:
    """The settings that start from the same weights in both ways."""
    tokenizer = {"tokenizer.type": "folder", "tokenizer.path": source / "tokenizer"}
    return {
        "checkpoint": tokenizer | {"init.from_checkpoint": source},
        "hugging face": tokenizer | {"init.from_huggingface": source / "hf"},
    }


# One step that changes no weight: what the rate adds to any that is not 0 is lost in rounding.
FROZEN = {
    "train.max_steps": 1, "eval.eval_steps": 1, "checkpoint.save_steps": 1,
    "optimizer.learning_rate": 1e-30, "optimizer.warmup_steps": 0,
}  # fmt: skip
Begun = Callable[..., Path]


@pytest.fixture(scope="module")
def begun(folder) -> Begun:
    """A function that gives a run which began with these settings, and has still the weights that it began with."""
    made: dict[str, Path] = {}

    def begun(settings: dict) -> Path:
        key = str(settings)
        if key not in made:
            made[key] = run(folder, folder / f"begun-{len(made)}", settings | FROZEN)
        return made[key]

    return begun


def losses(workdir: Path) -> list:
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(workdir) if "loss" in line]


def assert_same(ours: dict, theirs: dict) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))


def logits(model: ModelConfig, vocab_size: int, params: dict) -> np.ndarray:
    tokens_1T = np.arange(16)[None] % 15
    return np.asarray(gpt2.bind(model, vocab_size, params)(tokens_1T))[0]


def evaluation(workdir: Path) -> float:
    """The last evaluation of a run."""
    return [line["eval_loss"] for line in read_metrics(workdir) if "eval_loss" in line][-1]


# ---------------------------------------------------------------- the same numbers


def test_a_hugging_face_folder_trains_as_its_checkpoint_bit_for_bit(folder, source):
    """So the moments of the source, which its hf/ does not hold, are not taken over."""
    for name, settings in starts(source).items():
        run(folder, folder / name, settings | {"train.seed": 5})
    assert losses(folder / "checkpoint") == losses(folder / "hugging face")
    assert losses(folder / "checkpoint")[0][0] < losses(source)[0][0] - 0.1
    assert_same(*(load_model(folder / name).params for name in ("checkpoint", "hugging face")))


@pytest.mark.parametrize("name", ["checkpoint", "hugging face"])
def test_a_fine_tune_begins_with_the_loss_that_its_source_ended_with(source, begun, name):
    assert evaluation(begun(starts(source)[name])) == evaluation(source)


@pytest.mark.parametrize(
    ("name", "tokens"), [("checkpoint", ROLES), ("hugging face", MANY)], ids=["in the padding", "beyond the padding"]
)
def test_a_start_is_the_same_on_every_mesh(source, begun, name, tokens):
    settings = starts(source)[name] | {"tokenizer.special_tokens": tokens}
    assert_same(*(load_model(begun(settings | mesh)).params for mesh in ({}, SHARDED)))


def test_starting_from_one_step_of_a_run_takes_that_step(source, begun):
    step = source / "checkpoints" / "3"
    early = begun({"init.from_checkpoint": step})
    assert_same(load_model(early).params, load_model(step).params)
    assert np.any(np.asarray(load_model(early).params["wpe"]) != np.asarray(load_model(source).params["wpe"]))


# ---------------------------------------------------------------- new tokens


@pytest.mark.parametrize(
    ("name", "tokens"), [("checkpoint", ROLES), ("hugging face", MANY)], ids=["in the padding", "beyond the padding"]
)
def test_new_tokens_start_as_the_mean_and_leave_the_odds_among_the_old_ones(source, begun, name, tokens):
    old, new = load_model(source), len(json.loads(tokens))
    model = load_model(begun(starts(source)[name] | {"tokenizer.special_tokens": tokens}))
    assert model.vocab_size == old.vocab_size + new
    wte_VD = np.asarray(model.params["wte"])
    mean_D = np.asarray(old.params["wte"])[: old.vocab_size].astype(np.float64).mean(0).astype(np.float32)
    np.testing.assert_array_equal(wte_VD[old.vocab_size : model.vocab_size], np.tile(mean_D, (new, 1)))
    assert not np.any(wte_VD[model.vocab_size :])
    before = logits(old.config.model, old.vocab_size, old.params)
    after = logits(model.config.model, model.vocab_size, model.params)
    np.testing.assert_allclose(after[:, : old.vocab_size], before, atol=1e-6)
    np.testing.assert_allclose(after[:, old.vocab_size :].mean(1), before.mean(1), atol=1e-6)


def test_a_grown_run_is_read_by_everyone(source, begun):
    size = load_model(source).vocab_size
    grown = begun(starts(source)["checkpoint"] | {"tokenizer.special_tokens": ROLES})
    run, exported = load_model(grown), load_model(grown / "hf")
    assert run.vocab_size == exported.vocab_size == run.tokenizer.vocab_size == size + 2
    assert run.tokenizer.decode([size, size + 1]) == "<|user|><|assistant|>"
    assert exported.tokenizer.digest == run.tokenizer.digest
    assert_same(run.params, exported.params)


def test_rows_that_no_token_uses_are_kept(source, begun, tmp_path):
    """A vocabulary of 50304 for GPT-2's 50257 tokens, as many programs write it."""
    model = load_model(source)
    rows = model.vocab_size + 20
    params = {**model.params, "wte": model.params["wte"].at[:rows].add(0.01)}
    export_model(tmp_path / "wide", model.config.model, rows, params, model.tokenizer)
    workdir = begun({"init.from_huggingface": tmp_path / "wide", "tokenizer.special_tokens": ROLES})
    again = load_model(workdir)
    assert (again.vocab_size, again.tokenizer.vocab_size) == (rows, model.vocab_size + 2)
    np.testing.assert_array_equal(again.params["wte"], params["wte"])  # the new tokens take free rows
    assert load_model(workdir / "hf").vocab_size == rows


# ---------------------------------------------------------------- where it starts from


def test_a_hub_name_gives_weights_and_tokenizer(source, begun, tmp_path, monkeypatch):
    from huggingface_hub import constants

    model = tmp_path / "hub" / "models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("a" * 40)
    shutil.copytree(source / "hf", model / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    settings = {
        "init.from_huggingface": "someone/tiny",
        "tokenizer.type": "folder",
        "tokenizer.path": "hf:someone/tiny",
    }
    workdir = begun(settings | {"tokenizer.special_tokens": ROLES})
    assert json.loads((workdir / "config.json").read_text())["tokenizer"]["path"] == "hf:someone/tiny"


def test_a_run_that_goes_on_needs_its_source_no_more(folder, source, tmp_path, capsys):
    shutil.copytree(source / "hf", tmp_path / "gone")
    settings = {"init.from_huggingface": tmp_path / "gone", "tokenizer.special_tokens": ROLES}
    run(folder, tmp_path / "run", settings)
    assert "2 new tokens start as the mean of its 18 embeddings" in capsys.readouterr().out
    whole = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "gone")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    shutil.rmtree(tmp_path / "run" / "hf")
    run(folder, tmp_path / "run", settings)
    assert losses(tmp_path / "run") == whole
    assert_same(load_model(tmp_path / "run").params, load_model(tmp_path / "run" / "hf").params)


def test_a_folder_without_a_tokenizer_is_told_apart_by_size_alone(source, begun, tmp_path, caplog):
    bare = tmp_path / "bare"
    shutil.copytree(source / "hf", bare, ignore=shutil.ignore_patterns("tokenizer*", "manifest*"))
    with caplog.at_level(logging.WARNING):
        workdir = begun({"init.from_huggingface": bare})
    assert "holds no tokenizer: only the size of its vocabulary, 18, is compared" in caplog.text
    assert_same(load_model(workdir).params, load_model(source).params)


# ---------------------------------------------------------------- refusals


@functools.cache
def refusals(folder: Path, source: Path) -> dict[str, tuple[list[str], list[str]]]:
    """{what: (arguments, words of the error)}"""
    hf = ["--init.from_huggingface", f"{source}/hf"]
    bare = folder / "bare"
    if not bare.exists():
        shutil.copytree(source / "hf", bare, ignore=shutil.ignore_patterns("tokenizer*", "manifest*"))
        train_bpe(["other text"], 257).save(folder / "other")
    other = ["--tokenizer.type", "folder", "--tokenizer.path", f"{folder}/other"]
    values = "set in [model] n_layer = 2, n_head = 2, n_embd = 32, n_positions = 32"
    return {
        "layers": ([*hf, "--model.n_layer", "3"], ["model.n_layer = 2", "has 3", values]),
        "width": ([*hf, "--model.n_embd", "64"], ["model.n_embd = 32", "has 64", values]),
        "positions": ([*hf, "--model.n_positions", "64"], ["model.n_positions = 32", "has 64", values]),
        "checkpoint's heads": (
            ["--init.from_checkpoint", str(source), "--model.n_head", "4"],
            ["model.n_head = 2", "has 4", values],
        ),
        "two sources": ([*hf, "--init.from_checkpoint", str(source)], ["both set"]),
        "no such folder": (["--init.from_huggingface", f"{folder}/nothing"], ["nothing", "no such folder"]),
        "tokenizer": ([*hf, *other], ["another tokenizer (18 tokens)", "(257)", f'tokenizer.path = "{source}/hf"']),
        "checkpoint's tokenizer": (
            ["--init.from_checkpoint", str(source), *other],
            ["another tokenizer", f'tokenizer.path = "{source}/tokenizer"'],
        ),
        "size": (["--init.from_huggingface", str(bare), *other], ["vocabulary of 18", "has 257 tokens"]),
        "ordinary token": ([*hf, "--tokenizer.special_tokens", "a"], ["'a' is an ordinary token"]),
    }


CASES = ["layers", "width", "positions", "checkpoint's heads", "two sources", "no such folder", "tokenizer"]
CASES += ["checkpoint's tokenizer", "size", "ordinary token"]


@pytest.mark.parametrize("what", CASES)
def test_weights_that_do_not_fit_are_one_line_and_nothing_is_written(folder, source, what, capsys, tmp_path):
    arguments, words = refusals(folder, source)[what]
    places = ["--workdir", str(tmp_path / "run"), "--data.prepared_dir", str(tmp_path / "prepared")]
    assert train.main(["--config", str(folder / "config.toml"), *places, *arguments]) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in error
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_made_from_other_text_is_refused_once_it_is_known(folder, source, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("quite different letters: ÄÖÜ " * 100)
    arguments = ["--config", str(folder / "config.toml"), "--workdir", str(tmp_path / "run")]
    arguments += ["--init.from_huggingface", f"{source}/hf", "--data.path", str(tmp_path / "other.txt")]
    assert train.main(arguments) == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_converted_weights_are_no_run_to_resume_but_one_to_start_from(folder, source, begun, capsys, tmp_path):
    converted = tmp_path / "converted"
    save_as_run(converted, load_model(source / "hf"))
    before = sorted((path, path.stat().st_mtime_ns) for path in converted.rglob("*"))
    assert train.main(command(folder, converted, {})) == 2
    error = capsys.readouterr().err
    assert "without an optimizer state" in error
    assert f'init.from_checkpoint = "{converted}"' in error
    assert sorted((path, path.stat().st_mtime_ns) for path in converted.rglob("*")) == before
    assert_same(load_model(begun({"init.from_checkpoint": converted})).params, load_model(source).params)


def test_special_tokens_already_there_are_not_added_again(folder, source, begun):
    grown = begun(starts(source)["checkpoint"] | {"tokenizer.special_tokens": ROLES})
    settings = {"tokenizer.type": "folder", "tokenizer.path": grown / "hf", "tokenizer.special_tokens": ROLES}
    config = load_config(folder / "config.toml", {name: str(value) for name, value in settings.items()})
    assert given_tokenizer(config).digest == load_tokenizer(grown / "tokenizer").digest
    assert_same(load_model(begun(settings | {"init.from_checkpoint": grown})).params, load_model(grown).params)
