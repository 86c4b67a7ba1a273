"""Each setting changes something: flip it alone, and what a user would look at differs."""

import contextlib
import functools
import importlib.util
import json
import math
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import VOCAB, batch

from jaxgpt import train
from jaxgpt.config import Config, config_fields, flatten, load_config, with_settings
from jaxgpt.data import chat
from jaxgpt.data.dataset import open_dataset
from jaxgpt.data.pipeline import train_batches
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.errors import UserError
from jaxgpt.parallel.mesh import batch_shards, build_mesh
from jaxgpt.parallel.sharding import micro_batches_sharding
from jaxgpt.preparation.augmentation import Augmenter
from jaxgpt.preparation.cleaning import Cleaner
from jaxgpt.preparation.dialogues import conversation
from jaxgpt.preparation.duplicates import find_repeats, signature
from jaxgpt.preparation.make_dataset import prepare
from jaxgpt.preparation.sources import documents
from jaxgpt.training.bad_steps import BadStep, BadSteps
from jaxgpt.training.checkpoint import Checkpoints
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.optimizer import arguments, build_optimizer
from jaxgpt.training.run_state import EvaluationHistory, Position
from jaxgpt.training.step import build_program, resolve_batch, resolve_steps

BASE = {
    "model.n_layer": 1,
    "model.n_head": 1,
    "model.n_embd": 16,
    "model.n_positions": 16,
    "model.dtype": "float32",
    "tokenizer.type": "char",
    "data.source": "text",
    "optimizer.warmup_steps": 1,
    "train.max_steps": 4,
    "train.per_device_train_batch_size": 1,
    "checkpoint.save_steps": 2,
    "eval.eval_steps": 2,
    "eval.eval_batches": 2,
    "eval.sample_tokens": 4,
    "log.logging_steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    words = np.random.default_rng(0).choice(["one", "two", "three", "four", "five", "six"], (40, 50))
    texts = [" ".join(line) for line in words]
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number}.txt").write_text(text)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t, "title": t[:20]}) + "\n" for t in texts))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (folder / "mixed.jsonl").write_text(json.dumps({"text": "x", "messages": turns}) + '\n{"text": 1}\n')
    (folder / "words.csv").write_text("one, first\ntwo, second\n")
    (folder / "others.csv").write_text("one, single\ntwo, both\n")
    (folder / "other.txt").write_text("seven eight nine ten " * 50)
    return folder


def load(folder: Path, settings: dict) -> Config:
    settings = {"data.path": folder / "texts", "data.prepared_dir": folder / "prepared"} | BASE | settings
    return load_config(None, {name: str(value) for name, value in settings.items()})


# ---------------------------------------------------------------- what a user would look at
# Remembered, because the same base is compared with several settings.


@functools.cache
def program(config: Config) -> str:
    """The step as it would be compiled, and where its state lies."""
    config = resolve_batch(config, batch_shards(build_mesh(config.mesh)))
    built = build_program(config, VOCAB, build_mesh(config.mesh))
    layout = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.sharding.spec)), built.abstract_state)
    jaxpr = str(jax.make_jaxpr(built.train_step)(built.abstract_state, batch(0, rows=8)))
    return re.sub("0x[0-9a-f]+", "", jaxpr) + str(layout)  # addresses of functions differ each time


@functools.cache
def optimized(config: Config) -> list:
    """A matrix, a bias and the embedding after three updates with fixed gradients."""
    params = {
        "wte": jnp.ones((4, 3)),
        "blocks": {"mlp": {"c_fc": {"kernel": jnp.ones((1, 3, 5)), "bias": jnp.ones((1, 5))}}},
    }
    config = with_settings(config, train_max_steps=10)
    optimizer = build_optimizer(config, arguments(config))
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def update(params, state, step):
        grads = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size) + step).reshape(x.shape), params)
        updates, state = optimizer.update(grads, state, params, bad=jnp.zeros((), bool))
        return jax.tree.map(jnp.add, params, updates), state

    for step in range(3):
        params, state = update(params, state, step)
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(params)]


def prepared(config: Config) -> tuple:
    data = open_dataset(prepare(config))
    return data.path, data.vocab_size, data.fingerprint, data.tokenizer_digest, data.train.num_tokens


def resolved(config: Config) -> Config:
    return resolve_steps(resolve_batch(config, 8), 100)


def first_batch(config: Config) -> tuple:
    data = open_dataset(prepare(config))
    batches = train_batches(
        data.train,
        seed=config.train.seed,
        start_step=0,
        stop_step=1,
        global_batch_size=8,
        accumulation=1,
        block_size=config.block_size,
        sharding=micro_batches_sharding(build_mesh(config.mesh)),
    )
    positions = build_program(config, VOCAB, build_mesh(config.mesh)).init().params["wpe"]
    return np.asarray(next(batches).tokens_BT).tolist(), np.asarray(positions).tolist()


@functools.cache
def any_state():
    return tiny.program().init()


@functools.cache
def kept_checkpoints(config: Config) -> list:
    state = any_state()
    with tempfile.TemporaryDirectory() as workdir:
        checkpoints = Checkpoints(Path(workdir), config.checkpoint)
        for step, loss in [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]:
            checkpoints.save(step, state, {}, loss)
        checkpoints.wait()
        steps = checkpoints.steps()
        checkpoints.close()
        return steps


def bad_steps(config: Config) -> list:
    """What becomes of one bad step after the other, until the run ends."""
    steps, outcomes = BadSteps(config.faults), []
    values = {"loss_sum": math.nan, "count": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "bad_step": 1}
    with contextlib.suppress(BadStep):
        while True:
            outcomes.append(steps.check(len(outcomes), values | {"skipped_steps": len(outcomes)}, None))
    return outcomes


def early_ends(config: Config) -> list[bool]:
    """Whether a run would end after each of some evaluations."""
    early, ends = EvaluationHistory(config, Position()), []
    for step, loss in enumerate((3.0, 2.0, 2.5), 1):
        early.note(step, loss)
        ends.append(early.reason(step) != "")
    return ends


@functools.cache
def run(config: Config) -> dict:
    """A whole run: what it logged and when, which files it left."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        (Path(folder) / "config.toml").write_text("")
        options = [word for name, value in flatten(config).items() for word in (f"--{name}", as_option(value))]
        assert train.main(["--config", f"{folder}/config.toml", "--workdir", str(workdir), *options]) == 0
        lines = [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(workdir)]
        saved = sorted(path.name for path in (workdir / "checkpoints").iterdir())
        files, card = sorted(path.name for path in workdir.iterdir()), json.loads((workdir / "card.json").read_text())
        return {"lines": lines, "saved": saved, "files": files, "has_cost": "cost" in card}


def as_option(value) -> str:
    if isinstance(value, tuple | bool):
        return json.dumps(value)
    return "none" if value is None else str(value)


def saved_steps(config: Config) -> list[str]:
    return run(config)["saved"]


def logged_steps(config: Config) -> list[int]:
    return [line["step"] for line in run(config)["lines"] if "loss" in line]


def evaluations(config: Config) -> dict[int, dict]:
    return {line["step"]: line for line in run(config)["lines"] if "eval_loss" in line}


def evaluated_steps(config: Config) -> list[int]:
    return list(evaluations(config))


def eval_loss(config: Config) -> float:
    return evaluations(config)[4]["eval_loss"]


def sample(config: Config) -> str | None:
    return evaluations(config)[4].get("sample")


def has_tensorboard(config: Config) -> bool:
    return "tensorboard" in run(config)["files"]


def has_cost(config: Config) -> bool:
    return run(config)["has_cost"]


def has_profile(config: Config) -> bool:
    return "profile" in run(config)["files"]


def read(config: Config) -> list | str:
    """The documents of the source, or why there are none."""
    try:
        return list(documents(config.data))
    except UserError as error:
        return str(error)


def cleaned(config: Config) -> list:
    """What becomes of dirty texts."""
    clean = [Cleaner(config.cleaning)(text) for text in DIRTY]
    signatures = np.array([np.frombuffer(signature(text, config.cleaning), np.uint8) for text in DIRTY])
    return [clean, find_repeats(signatures, np.zeros(len(DIRTY), bool), config.cleaning).of.tolist()]


def encoded(config: Config) -> list[int]:
    tokenizer = chat.with_chat_tokens(train_bpe([CONVERSATION], 257))
    return [part.tokens.tolist() for part in chat.ChatEncoder(tokenizer, config.chat, 1000).encode(CONVERSATION)]


def copies(config: Config) -> list[str]:
    return Augmenter(config.augmentation).copies(CONVERSATION, 7)


CONVERSATION = conversation(
    {"messages": [{"role": role, "content": "One two. Three four."} for role in ("user", "assistant") * 2]}, "here"
)
MIXED = {"data.source": "jsonl", "data.path": "{folder}/mixed.jsonl", "data.on_bad_record": "skip"}
LONG = "A text of some length, which is there twice but for its end, where one of the two goes on a little"
DIRTY = ["<p>one</p>", "caf\u00c3\u00a9 e\u0301", "a\x00b  c", "\U0001f642", "https://a.b c@d.ef", "!", "!"]
DIRTY += ["Bonjour, mon ami !", LONG, LONG + " more"]
CHANGED = {
    "data.format": "chat",
    "augmentation.copies": 2,
    "augmentation.typo_rate": 0.2,
    "augmentation.synonyms": "{folder}/words.csv",
}
# setting: (another value, what differs, settings that both sides need besides BASE)
OPTIONS = {
    "model.n_layer": (2, program, {}),
    "model.n_head": (2, program, {}),
    "model.n_embd": (32, program, {}),
    "model.n_positions": (32, program, {}),
    "model.dropout": (0.1, program, {}),
    "model.dtype": ("bfloat16", program, {}),
    "model.scan_layers": (True, program, {}),
    "model.remat": ("block", program, {}),
    "model.attention": ("flash", None, {}),
    "tokenizer.type": ("bpe", prepared, {"tokenizer.vocab_size": 270}),
    "tokenizer.path": (
        "{folder}/tokenizer-b",
        prepared,
        {"tokenizer.type": "folder", "tokenizer.path": "{folder}/tokenizer-a"},
    ),
    "tokenizer.vocab_size": (280, prepared, {"tokenizer.type": "bpe", "tokenizer.vocab_size": 270}),
    "tokenizer.train_bytes": (600, prepared, {"tokenizer.type": "bpe", "tokenizer.vocab_size": 300}),
    "tokenizer.special_tokens": ("<|user|>", prepared, {}),
    "data.source": ("jsonl", prepared, {"data.path": "{folder}/texts.jsonl"}),
    "data.path": ("{folder}/other.txt", prepared, {}),
    "data.text_field": ("title", prepared, {"data.source": "jsonl", "data.path": "{folder}/texts.jsonl"}),
    "data.encoding": ("utf-16", read, {}),
    "data.format": ("chat", read, MIXED),
    "data.on_bad_record": ("refuse", read, MIXED),
    "data.max_record_bytes": (10, read, MIXED),
    "data.skills": (
        "addition=9,chinese=0",
        read,
        {"data.source": "skills", "data.format": "chat", "data.max_bytes": 4000},
    ),
    "data.max_bytes": (4000, prepared, {}),
    "data.validation_fraction": (0.5, prepared, {}),
    "data.prepared_dir": ("{folder}/elsewhere", prepared, {}),
    "data.block_size": (8, first_batch, {}),
    "data.verify": ("sizes", None, {}),
    "data.num_proc": (2, None, {}),
    "data.skip_list": ("{folder}/skip.txt", None, {}),
    "cleaning.html": (True, cleaned, {}),
    "cleaning.fix_encoding": (True, cleaned, {}),
    "cleaning.unicode": ("NFC", cleaned, {}),
    "cleaning.control_characters": (True, cleaned, {}),
    "cleaning.emoji": ("strip", cleaned, {}),
    "cleaning.urls": ("mask", cleaned, {}),
    "cleaning.emails": ("mask", cleaned, {}),
    "cleaning.whitespace": (True, cleaned, {}),
    "cleaning.min_chars": (2, cleaned, {}),
    "cleaning.max_chars": (9, cleaned, {}),
    "cleaning.max_symbol_ratio": (0.5, cleaned, {}),
    "cleaning.language": ("en", cleaned, {}),
    "cleaning.drop_duplicates": (True, cleaned, {}),
    "cleaning.near_duplicates": (0.8, cleaned, {}),
    "chat.system": ("Be kind.", encoded, {}),
    "chat.packing": (False, None, {}),
    "augmentation.copies": (3, copies, CHANGED),
    "augmentation.seed": (1, copies, CHANGED),
    "augmentation.shuffle_sentences": (0.9, copies, CHANGED),
    "augmentation.synonyms": ("{folder}/others.csv", copies, CHANGED | {"augmentation.synonym_rate": 0.9}),
    "augmentation.synonym_rate": (0.9, copies, CHANGED),
    "augmentation.typo_rate": (0.5, copies, CHANGED),
    "augmentation.drop_turns": (0.9, copies, CHANGED),
    "optimizer.name": ("muon", optimized, {}),
    "optimizer.learning_rate": (1e-3, optimized, {}),
    "optimizer.lr_scheduler_type": ("constant", optimized, {}),
    "optimizer.warmup_steps": (3, optimized, {}),
    "optimizer.min_lr_rate": (0.5, optimized, {}),
    "optimizer.decay_rate": (
        0.9,
        optimized,
        {"optimizer.lr_scheduler_type": "warmup_stable_decay", "train.max_steps": "none"},
    ),
    "optimizer.weight_decay": (0.5, optimized, {}),
    "optimizer.adam_beta1": (0.5, optimized, {}),
    "optimizer.adam_beta2": (0.5, optimized, {}),
    "optimizer.adam_mu_dtype": ("bfloat16", optimized, {}),
    "optimizer.adam_epsilon": (0.1, optimized, {}),
    "optimizer.max_grad_norm": (1e-9, optimized, {}),
    "train.max_steps": (5, resolved, {}),
    "train.num_train_epochs": (3.0, resolved, {"train.max_steps": "none"}),
    "train.per_device_train_batch_size": (2, resolved, {}),
    "train.gradient_accumulation_steps": (2, resolved, {}),
    "train.global_batch_size": (16, resolved, {}),
    "train.seed": (1, first_batch, {}),
    "mesh.data": (4, program, {"mesh.fsdp": 2, "mesh.tensor": 1}),
    "mesh.fsdp": (2, program, {}),
    "mesh.tensor": (2, program, {"model.n_head": 2}),
    "mesh.zero1": (False, program, {}),
    "mesh.distributed": ("off", None, {}),
    "checkpoint.save_steps": (4, saved_steps, {}),
    "checkpoint.save_total_limit": (3, kept_checkpoints, {}),
    "checkpoint.keep_best": (False, kept_checkpoints, {}),
    "faults.on_bad_step": ("skip", bad_steps, {}),
    "faults.spike_sigma": (6.0, program, {}),
    "faults.max_bad_steps": (3, bad_steps, {"faults.on_bad_step": "skip"}),
    "faults.hang_seconds": (2.0, None, {}),
    "faults.host_timeout_seconds": (3.0, None, {}),
    "eval.eval_steps": (1, evaluated_steps, {}),
    "eval.eval_batches": (1, eval_loss, {}),
    "eval.per_device_eval_batch_size": (2, eval_loss, {}),
    "eval.sample_prompt": ("one", sample, {}),
    "eval.sample_tokens": (0, sample, {}),
    "eval.chat_prompts": (0, None, {}),
    "eval.tasks": ("choices=questions.jsonl", None, {}),
    "eval.early_stopping_patience": (1, early_ends, {}),
    "eval.early_stopping_threshold": (2.0, early_ends, {"eval.early_stopping_patience": 1}),
    "log.logging_steps": (1, logged_steps, {}),
    "log.tensorboard": (False, has_tensorboard, {}),
    "log.wandb_project": ("x", None, {}),
    "log.price_per_hour": (2.5, has_cost, {}),
    "log.profile": ("1:2", has_profile, {}),
    "init.from_checkpoint": ("", None, {}),
    "init.from_huggingface": ("", None, {}),
}
# A run costs seconds, so these are flipped together; each is looked at where the others change nothing.
TOGETHER = [
    ("checkpoint.save_steps", "log.logging_steps", "eval.sample_prompt", "log.tensorboard"),
    ("eval.eval_steps", "eval.eval_batches", "eval.sample_tokens", "log.profile", "log.price_per_hour"),
]
ELSEWHERE = {
    "model.attention": "test_model_backend.test_a_kernel_asked_for_on_the_wrong_device_is_an_error",
    "chat.packing": "test_preparation_packing."
    "test_every_conversation_is_there_once_whole_with_its_mask_and_its_document",
    "data.num_proc": "test_preparation_preparation.test_the_setting_says_how_many_processes_work",
    "data.skip_list": "test_replay.test_rows_of_high_loss_go_to_a_skip_list_and_the_run_goes_on_without_them",
    "data.verify": "test_training_resume.test_a_flipped_bit_in_the_data_stops_a_start_before_anything_is_compiled",
    "mesh.data": "test_mesh_data_is_checked_against_the_devices",
    "mesh.distributed": "test_parallel_distributed.test_the_setting_decides_whether_a_pod_is_joined",
    "eval.tasks": "test_training_loop.test_scores_in_a_training_are_those_that_evaluate_finds_for_its_checkpoint",
    "eval.chat_prompts": "test_replay.test_a_model_that_learned_to_stop_is_told_from_one_that_did_not",
    "faults.hang_seconds": "test_training_signals.test_a_data_reader_that_hangs_ends_the_run_with_75",
    "faults.host_timeout_seconds": "test_parallel_distributed.test_a_lost_process_ends_the_others_and_is_named",
    "log.wandb_project": "test_wandb_is_asked_for",
    "init.from_checkpoint": "test_train.test_training_starts_from_another_runs_weights",
    "init.from_huggingface": "test_finetune.test_a_hugging_face_folder_trains_as_its_checkpoint_bit_for_bit",
}


def test_the_table_holds_every_setting():
    assert list(OPTIONS) == list(config_fields())


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ELSEWHERE])
def test_the_setting_changes_something(name, folder):
    _, look, besides = OPTIONS[name]
    besides = {key: str(setting).format(folder=folder) for key, setting in besides.items()}
    if name == "tokenizer.path":
        for letter, text in (("a", "one two"), ("b", "three four")):
            train_bpe([text * 50], 260).save(folder / f"tokenizer-{letter}")
    flipped = next((names for names in TOGETHER if name in names), [name])
    after = {each: str(OPTIONS[each][0]).format(folder=folder) for each in flipped}
    before, after = (load(folder, besides | extra) for extra in ({}, after))
    assert look(before) != look(after)


@pytest.mark.parametrize("look", [program, optimized, prepared, first_batch, kept_checkpoints, run])
def test_what_is_looked_at_does_not_change_by_itself(look, folder):
    look = getattr(look, "__wrapped__", look)
    assert look(load(folder, {})) == look(load(folder, {}))


def test_mesh_data_is_checked_against_the_devices(folder):
    assert build_mesh(load(folder, {"mesh.data": 8}).mesh).shape["data"] == 8
    with pytest.raises(UserError, match="= 4, but there are 8 devices"):
        build_mesh(load(folder, {"mesh.data": 4}).mesh)


def test_wandb_is_asked_for(folder, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssertionError, match="assert 2 == 0"):
        run(load(folder, {"log.wandb_project": "x"}))
    assert "pip install wandb" in capsys.readouterr().err
