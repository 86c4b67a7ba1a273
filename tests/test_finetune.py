"""Training that starts from other weights: the same numbers from either kind of folder, and new tokens for old ones."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import RUN

from jaxgpt import train
from jaxgpt.config import Config, load_config
from jaxgpt.data.dataset import open_dataset
from jaxgpt.data.tokenizer import load_tokenizer, train_bpe
from jaxgpt.model import gpt2
from jaxgpt.parallel.mesh import batch_shards, build_mesh
from jaxgpt.preparation.make_dataset import given_tokenizer, prepare
from jaxgpt.training import loop, resume
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.models import export_model, load_model, save_as_run
from jaxgpt.training.step import build_program, resolve_batch

CONFIG = (
    RUN
    + """warmup_steps = 1
[train]
max_steps = 4
per_device_train_batch_size = 1
[eval]
eval_steps = 2
sample_tokens = 0
[checkpoint]
save_steps = 2
[log]
logging_steps = 1
tensorboard = false
"""
)
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "the",
    "dog",
    "ran",
    "after",
    "it",
    "over",
    "one",
    "hill",
]
SHARDED = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
ROLES = '["<|user|>", "<|assistant|>"]'
MANY = json.dumps([f"<|{number}|>" for number in range(120)])  # with 17 characters: more than 128 rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "text.txt").write_text(" ".join(np.random.default_rng(0).choice(WORDS, 1500)))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder


def load(folder: Path, settings: dict) -> Config:
    return load_config(folder / "config.toml", {name: str(value) for name, value in settings.items()})


@pytest.fixture(scope="module")
def source(folder) -> Path:
    """A finished run with checkpoints of steps 2 and 4; its hf/ is the other kind of source."""
    train.train(load(folder, {}), folder / "source")
    return folder / "source"


@pytest.fixture(scope="module")
def grown(folder, source) -> Path:
    """A finished run that added two tokens to the vocabulary of `source`."""
    settings = starts(source)["checkpoint"] | {"tokenizer.special_tokens": "<|user|>, <|assistant|>"}
    train.train(load(folder, settings), folder / "grown")
    return folder / "grown"


def starts(source: Path) -> dict[str, dict]:
    """The settings that start from the same weights in both ways."""
    tokenizer = {"tokenizer.type": "folder", "tokenizer.path": source / "tokenizer"}
    return {
        "checkpoint": tokenizer | {"init.from_checkpoint": source},
        "hugging face": tokenizer | {"init.from_huggingface": source / "hf"},
    }


@dataclasses.dataclass(frozen=True)
class Start:
    """What `train` has at hand before its first step."""

    run: loop.Run
    state: resume.TrainState
    weights: resume.Weights
    vocab_size: int


def start(config: Config, workdir: Path) -> Start:
    mesh = build_mesh(config.mesh)
    config = resolve_batch(config, batch_shards(mesh))
    weights = resume.weights_to_start_from(config, None)
    dataset = resume.check_data(workdir, None, weights, open_dataset(prepare(config)))
    program = build_program(config, dataset.vocab_size, mesh)
    checkpoints = resume.Checkpoints(workdir, config.checkpoint)
    state = resume.initial_state(program, checkpoints, None, weights, dataset.vocab_size)
    checkpoints.close()
    run = loop.Run(config, workdir, mesh, dataset, program, checkpoints, None, None, None, None)
    return Start(run, state, weights, dataset.vocab_size)


def losses(workdir: Path) -> list:
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(workdir) if "loss" in line]


def assert_same(ours: dict, theirs: dict) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))


def logits(config: Config, vocab_size: int, params: dict) -> np.ndarray:
    tokens_1T = np.arange(16)[None] % 15
    return np.asarray(gpt2.bind(config.model, vocab_size, params)(tokens_1T))[0]


# ---------------------------------------------------------------- the same numbers


def test_a_hugging_face_folder_trains_as_its_checkpoint_bit_for_bit(folder, source):
    for name, settings in starts(source).items():
        train.train(load(folder, settings | {"train.seed": 5}), folder / name)
    assert losses(folder / "checkpoint") == losses(folder / "hugging face")
    assert losses(folder / "checkpoint")[0][0] < losses(source)[0][0] - 0.1
    assert_same(*(load_model(folder / name).params for name in ("checkpoint", "hugging face")))


@pytest.mark.parametrize("name", ["checkpoint", "hugging face"])
def test_a_fine_tune_begins_with_the_loss_that_its_source_ended_with(folder, source, name, tmp_path):
    begun = start(load(folder, starts(source)[name]), tmp_path)
    ended = [line["eval_loss"] for line in read_metrics(source) if "eval_loss" in line][-1]
    assert loop.evaluate(begun.run, begun.state.params)["eval_loss"] == ended
    assert begun.state.step == 0
    moments = [leaf for leaf in jax.tree.leaves(begun.state.opt_state) if leaf.ndim]
    assert moments and not any(np.any(leaf) for leaf in moments)


@pytest.mark.parametrize("name", ["checkpoint", "hugging face"])
@pytest.mark.parametrize("tokens", ["[]", MANY], ids=["same vocabulary", "grown"])
def test_a_start_is_the_same_on_every_mesh_and_lies_as_the_program_says(folder, source, name, tokens, tmp_path):
    settings = starts(source)[name] | {"tokenizer.special_tokens": tokens}
    copied, sharded = (start(load(folder, settings | mesh), tmp_path) for mesh in ({}, SHARDED))
    assert_same(copied.state.params, sharded.state.params)
    wanted = jax.tree.map(lambda leaf: leaf.sharding, sharded.run.program.abstract_state.params)
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded.state.params) == wanted
    assert sharded.state.params["wte"].sharding.spec == PartitionSpec("tensor", "fsdp")


def test_starting_from_one_step_of_a_run_takes_that_step(folder, source, tmp_path):
    early, late = (
        start(load(folder, {"init.from_checkpoint": path}), tmp_path).state.params["wpe"]
        for path in (source / "checkpoints" / "2", source)
    )
    np.testing.assert_array_equal(early, load_model(source / "checkpoints" / "2").params["wpe"])
    assert np.any(np.asarray(early) != np.asarray(late))


# ---------------------------------------------------------------- new tokens


@pytest.mark.parametrize("name", ["checkpoint", "hugging face"])
@pytest.mark.parametrize("tokens", [ROLES, MANY], ids=["in the padding", "beyond the padding"])
def test_new_tokens_start_as_the_mean_and_leave_the_odds_among_the_old_ones(folder, source, name, tokens, tmp_path):
    old, new = load_model(source), len(json.loads(tokens))
    begun = start(load(folder, starts(source)[name] | {"tokenizer.special_tokens": tokens}), tmp_path)
    assert begun.vocab_size == old.vocab_size + new
    wte_VD = np.asarray(begun.state.params["wte"])
    mean_D = np.asarray(old.params["wte"])[: old.vocab_size].astype(np.float64).mean(0).astype(np.float32)
    np.testing.assert_array_equal(wte_VD[old.vocab_size : begun.vocab_size], np.tile(mean_D, (new, 1)))
    assert not np.any(wte_VD[begun.vocab_size :])
    before = logits(begun.run.config, old.vocab_size, old.params)
    after = logits(begun.run.config, begun.vocab_size, jax.device_get(begun.state.params))
    np.testing.assert_allclose(after[:, : old.vocab_size], before, atol=1e-6)
    np.testing.assert_allclose(after[:, old.vocab_size :].mean(1), before.mean(1), atol=1e-6)


def test_a_grown_run_trains_and_is_read_by_everyone(source, grown):
    size = load_model(source).vocab_size
    run, exported = load_model(grown), load_model(grown / "hf")
    assert run.vocab_size == exported.vocab_size == run.tokenizer.vocab_size == size + 2
    assert run.tokenizer.decode([size, size + 1]) == "<|user|><|assistant|>"
    assert exported.tokenizer.digest == run.tokenizer.digest
    assert_same(run.params, exported.params)


def test_rows_that_no_token_uses_are_kept(folder, source, tmp_path):
    """A vocabulary of 50304 for GPT-2's 50257 tokens, as many programs write it."""
    model = load_model(source)
    rows = model.vocab_size + 20
    params = {**model.params, "wte": model.params["wte"].at[:rows].add(0.01)}
    export_model(tmp_path / "wide", model.config.model, rows, params, model.tokenizer)
    settings = {"init.from_huggingface": tmp_path / "wide", "tokenizer.special_tokens": ROLES}
    begun = start(load(folder, settings), tmp_path)
    assert begun.vocab_size == rows
    np.testing.assert_array_equal(begun.state.params["wte"], params["wte"])  # the new tokens take free rows
    train.train(load(folder, settings), tmp_path / "run")
    again = load_model(tmp_path / "run")
    assert (again.vocab_size, again.tokenizer.vocab_size) == (rows, model.vocab_size + 2)
    assert load_model(tmp_path / "run" / "hf").vocab_size == rows


# ---------------------------------------------------------------- where it starts from


def test_a_hub_name_gives_weights_and_tokenizer(folder, source, tmp_path, monkeypatch):
    from huggingface_hub import constants

    model = tmp_path / "hub" / "models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("a" * 40)
    shutil.copytree(source / "hf", model / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    settings = {"init.from_huggingface": "someone/tiny", "tokenizer.type": "folder"}
    arguments = [
        "--config",
        str(folder / "config.toml"),
        "--workdir",
        str(tmp_path / "run"),
        "--tokenizer.special_tokens",
        "<|user|>",
    ]
    settings["tokenizer.path"] = "hf:someone/tiny"
    assert train.main(arguments + [part for name, value in settings.items() for part in (f"--{name}", value)]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tokenizer"]["path"] == "hf:someone/tiny"


def test_a_run_that_goes_on_needs_its_source_no_more(folder, source, tmp_path, capsys):
    shutil.copytree(source / "hf", tmp_path / "gone")
    settings = {"init.from_huggingface": tmp_path / "gone", "tokenizer.special_tokens": ROLES}
    config = load(folder, settings)
    train.train(config, tmp_path / "run")
    assert "2 new tokens start as the mean of its 18 embeddings" in capsys.readouterr().out
    whole = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "gone")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "run" / "hf")
    train.train(config, tmp_path / "run")
    assert losses(tmp_path / "run") == whole
    assert_same(load_model(tmp_path / "run").params, load_model(tmp_path / "run" / "hf").params)


def test_a_folder_without_a_tokenizer_is_told_apart_by_size_alone(folder, source, tmp_path, caplog):
    bare = tmp_path / "bare"
    shutil.copytree(source / "hf", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with caplog.at_level(logging.WARNING):
        begun = start(load(folder, {"init.from_huggingface": bare}), tmp_path)
    assert "holds no tokenizer: only the size of its vocabulary, 18, is compared" in caplog.text
    assert_same(begun.state.params, start(load(folder, starts(source)["checkpoint"]), tmp_path).state.params)


# ---------------------------------------------------------------- refusals


def refusals(folder: Path, source: Path) -> dict[str, tuple[list[str], list[str]]]:
    """{what: (arguments, words of the error)}"""
    hf = ["--init.from_huggingface", f"{source}/hf"]
    bare = folder / "bare"
    if not bare.exists():
        shutil.copytree(source / "hf", bare, ignore=shutil.ignore_patterns("tokenizer*"))
        train_bpe(["other text"], 257).save(folder / "other")
        save_as_run(folder / "converted", load_model(source / "hf"))
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


def test_converted_weights_are_no_run_to_resume_but_one_to_start_from(folder, source, capsys, tmp_path):
    run = tmp_path / "converted"
    save_as_run(run, load_model(source / "hf"))
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    arguments = ["--config", str(folder / "config.toml"), "--workdir", str(run)]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert "without an optimizer state" in error
    assert f'init.from_checkpoint = "{run}"' in error
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
    begun = start(load(folder, {"init.from_checkpoint": run}), tmp_path / "new")
    assert_same(begun.state.params, load_model(source).params)


def test_special_tokens_already_there_are_not_added_again(folder, grown, tmp_path):
    settings = {"tokenizer.type": "folder", "tokenizer.path": grown / "hf", "tokenizer.special_tokens": ROLES}
    config = load(folder, settings | {"init.from_checkpoint": grown})
    assert given_tokenizer(config).digest == load_tokenizer(grown / "tokenizer").digest
    assert_same(start(config, tmp_path).state.params, load_model(grown).params)
