"""`train` from a text file to a report: resume, stop, and every wrong input, with real data and Orbax."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import overrides

from jaxgpt import train
from jaxgpt.config import Config
from jaxgpt.data.dataset import open_dataset
from jaxgpt.errors import UserError
from jaxgpt.model import huggingface
from jaxgpt.training import loop
from jaxgpt.training.checkpoint import Checkpoints, finished_steps
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.models import check_logits, load_model


def error_of(arguments: list[str], capsys) -> str:
    """The one line with which `train` refuses its input."""
    assert train.main(arguments) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return error


def steps(workdir: Path) -> dict[int, dict]:
    """The training lines of metrics.jsonl by step, without what the clock decides."""
    timed = ("tokens_per_second", "mfu")
    return {
        line["step"]: {k: v for k, v in line.items() if k not in timed and not k.startswith("seconds_")}
        for line in read_metrics(workdir)
        if "loss" in line
    }


def test_a_run_leaves_everything_a_user_expects(trained):
    lines = steps(trained.run)
    assert list(lines) == [1, 2, 3, 4, 5, 6]
    assert lines[6]["loss"] < lines[1]["loss"]
    evaluations = [line for line in read_metrics(trained.run) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    last = evaluations[-1]
    assert last["eval_perplexity"] == pytest.approx(np.exp(last["eval_loss"]))
    assert last["eval_bits_per_byte"] == pytest.approx(last["eval_loss"] / np.log(2), rel=0.01)  # a char is a byte here
    assert isinstance(last["sample"], str)
    assert sorted(int(p.name) for p in (trained.run / "checkpoints").iterdir() if p.name.isdigit()) == [3, 6]
    assert "<html" in (trained.run / "report.html").read_text()
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (trained.run / "hf").iterdir()
    }
    assert (trained.run / "tokenizer" / "tokenizer.json").exists()
    summary = json.loads((trained.run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["devices"] == 8


def test_a_run_stopped_anywhere_ends_as_the_undisturbed_one_bit_for_bit(trained, tmp_path, failpoint, capsys):
    """SIGTERM while step 2 or 3 waits for data, and in the second evaluation."""
    workdir = tmp_path / "run"
    command = ["--config", str(trained.config), "--workdir", str(workdir)]
    for point in ("data.read:term@3", "evaluate:term@4"):
        failpoint(point)
        assert train.main(command) == 42
        assert "run the same command again" in capsys.readouterr().err
        assert not (workdir / "hf").exists()
        assert json.loads((workdir / "summary.json").read_text())["status"] == "interrupted"
    assert max(steps(workdir)) <= 6
    failpoint("")
    assert train.main(command) == 0
    assert steps(workdir) == steps(trained.run)  # losses, norms and batch hashes to the last bit
    ours, theirs = (load_model(run).params for run in (workdir, trained.run))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    for file in (trained.run / "hf").iterdir():
        assert (workdir / "hf" / file.name).read_bytes() == file.read_bytes()


def test_the_weights_for_everyone_are_those_of_the_last_checkpoint(trained):
    run, exported = load_model(trained.run), load_model(trained.run / "hf")
    assert exported.vocab_size == run.vocab_size == exported.tokenizer.vocab_size
    np.testing.assert_array_equal(
        *(check_logits(run.config.model, model.vocab_size, model.params) for model in (run, exported))
    )


SPLIT = overrides(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, train__per_device_train_batch_size=2)
SPLIT += overrides(train__global_batch_size=8, eval__sample_tokens=0)


def test_a_run_goes_on_on_another_mesh_and_hf_is_the_same_from_a_mesh_that_splits_the_weights(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained.run, workdir)
    command = ["--config", str(trained.config), "--workdir", str(workdir), *SPLIT]
    shutil.rmtree(workdir / "hf")
    assert train.main(command) == 0  # nothing left to do but this
    for name in ("model.safetensors", "config.json"):
        assert (workdir / "hf" / name).read_bytes() == (trained.run / "hf" / name).read_bytes()
    shutil.rmtree(workdir / "checkpoints" / "6")  # forget the last three steps, then repeat them
    assert train.main(command) == 0
    ours, theirs = steps(workdir), steps(trained.run)
    assert [ours[s]["batch_hash"] for s in ours] == [theirs[s]["batch_hash"] for s in theirs]
    np.testing.assert_allclose([ours[s]["loss"] for s in ours], [theirs[s]["loss"] for s in theirs], atol=1e-5)


def test_hf_that_cannot_be_written_fails_in_one_line_and_the_same_command_writes_it(
    trained, trained_copy, capsys, monkeypatch
):
    workdir = trained_copy.run
    shutil.rmtree(workdir / "hf")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface, "write_tensors", full)
    assert train.main(trained_copy.arguments) == 1
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert "the run is finished and saved" in error and "No space left" in error
    assert json.loads((workdir / "summary.json").read_text())["status"] == "finished"
    assert not [path for path in workdir.iterdir() if "hf" in path.name]
    monkeypatch.undo()
    assert train.main(trained_copy.arguments) == 0
    theirs = trained.run / "hf" / "model.safetensors"
    assert (workdir / "hf" / "model.safetensors").read_bytes() == theirs.read_bytes()


def test_a_finished_run_does_nothing_more(trained_copy):
    before = (trained_copy.run / "metrics.jsonl").read_bytes()
    assert train.main(trained_copy.arguments) == 0
    assert (trained_copy.run / "metrics.jsonl").read_bytes() == before


def test_the_state_that_was_saved_is_the_state_that_is_restored(trained):
    model = load_model(trained.run)
    assert model.step == 6
    assert load_model(trained.run / "checkpoints" / "3").step == 3
    assert model.tokenizer.vocab_size == model.vocab_size


def test_training_starts_from_another_runs_weights(trained, tmp_path):
    options = overrides(init__from_checkpoint=trained.run, optimizer__learning_rate=1e-9, train__seed=1)
    options += overrides(eval__sample_tokens=0)
    assert train.main(["--config", str(trained.config), "--workdir", str(tmp_path / "run"), *options]) == 0
    assert steps(tmp_path / "run")[1]["loss"] < steps(trained.run)[1]["loss"] - 0.1
    weights, start = load_model(tmp_path / "run").params["wpe"], load_model(trained.run).params["wpe"]
    np.testing.assert_allclose(weights, start, atol=1e-6)


def test_the_best_checkpoint_is_kept_besides_the_latest(tmp_path):
    from tiny import program

    state = program().init()
    checkpoints = Checkpoints(tmp_path, dataclasses.replace(Config().checkpoint, save_total_limit=1))
    for step, loss in [(10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5)]:
        checkpoints.save(step, state, {}, loss)
    checkpoints.save(50, state, {}, None)  # told to stop: no evaluation
    checkpoints.wait()
    assert checkpoints.steps() == [20, 50]
    assert checkpoints.best_step() == 20
    checkpoints.close()
    reopened = Checkpoints(tmp_path, Config().checkpoint)
    assert (reopened.best_step(), reopened.latest_step()) == (20, 50)
    reopened.close()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    options = overrides(optimizer__learning_rate=1e30, optimizer__max_grad_norm=0, optimizer__warmup_steps=0)
    options += overrides(checkpoint__save_steps=1, eval__eval_steps=1, eval__sample_tokens=0)
    assert train.main(["--config", str(trained.config), "--workdir", str(workdir), *options]) == 1
    error = capsys.readouterr().err
    assert re.search(r"step \d: loss = .*last good checkpoint is step 1.*learning rate", error), error
    assert json.loads((workdir / "summary.json").read_text())["status"] == "failed"
    saved = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert max(saved) <= max(line["step"] for line in lines)


def test_a_run_whose_folder_another_process_took_stops_and_writes_nothing_more(trained, tmp_path, monkeypatch, capsys):
    workdir, other = tmp_path / "run", json.dumps({"id": "another's", "pid": 12, "host": "tpu-7"})
    monkeypatch.setattr(loop, "failpoint", lambda name: (workdir / "lease.json").write_text(other))
    assert train.main(["--config", str(trained.config), "--workdir", str(workdir)]) == 1
    assert "taken over by process 12 on tpu-7; this process stops and writes nothing more" in capsys.readouterr().err
    assert [*steps(workdir)] == [1, 2, 3]  # it was taken in the evaluation after step 3
    assert (workdir / "lease.json").read_text() == other
    assert {"checkpoints", "report.html", "hf", "faults.jsonl"}.isdisjoint(path.name for path in workdir.iterdir())


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_42_and_the_same_command_goes_on(trained, tmp_path, number):
    workdir = tmp_path / "run"
    never = ["--train.max_steps", "100000", "--eval.eval_steps", "100000", "--checkpoint.save_steps", "100000"]
    arguments = ["--config", str(trained.config), "--workdir", str(workdir), *never]
    command = [sys.executable, "-m", "jaxgpt.train", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.time() + 120
    while not (workdir / "metrics.jsonl").exists() or len(read_metrics(workdir)) < 5:
        assert time.time() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 42, errors
    assert "run the same command again" in errors
    last = read_metrics(workdir)[-1]["step"]
    [saved] = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == last


BAD_INPUT = [
    (["--config", "{tmp}/nothing.toml"], "no such config file"),
    (["--config", "{config}", "--train.max_step", "3"], "did you mean train.max_steps?"),
    (["--config", "{config}", "--data.path", "{tmp}/nothing.txt"], "nothing.txt"),
    (["--config", "{config}", "--data.path", "{tmp}/empty.txt"], "empty"),
    (["--config", "{config}", "--data.path", "{tmp}/short.txt", "--data.block_size", "32"], "32"),
    (["--config", "{config}", "--mesh.fsdp", "3"], "does not divide the 8 devices"),
    (["--config", "{config}", "--train.global_batch_size", "12"], "global_batch_size = 12"),
    (["--config", "{config}", "--init.from_checkpoint", "{tmp}"], "is not a jaxgpt run"),
    (["--config", "{config}", "--eval.sample_prompt", "the cat sat on the mat and the hill"], "no room"),
    (["--config", "{config}", "--eval.sample_prompt", "ÄÖ"], "no token for 'Ä'"),
    (["--config", "{config}", "--workdir", "{text}"], "is a file, not a folder"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT, ids=[words for _, words in BAD_INPUT])
def test_bad_input_is_one_line_and_exit_2_and_nothing_is_written(trained, arguments, words, capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    workdir = tmp_path / "run"
    arguments = [argument.format(config=trained.config, text=trained.text, tmp=tmp_path) for argument in arguments]
    if "--workdir" not in arguments:
        arguments += ["--workdir", str(workdir)]
    error = error_of([*arguments, "--data.prepared_dir", str(tmp_path / "prepared")], capsys)
    assert words in error
    assert not workdir.exists()


def test_a_run_folder_of_another_config_names_what_differs(trained, capsys):
    before = sorted((p, p.stat().st_mtime_ns) for p in trained.run.rglob("*"))
    error = error_of([*trained.arguments, "--optimizer.learning_rate", "0.5"], capsys)
    assert "optimizer.learning_rate was 0.01, now 0.5" in error
    assert sorted((p, p.stat().st_mtime_ns) for p in trained.run.rglob("*")) == before


def test_a_run_folder_whose_data_changed_is_refused_and_left_alone(trained, tmp_path, capsys):
    text, moved = tmp_path / "text.txt", tmp_path / "moved.txt"
    shutil.copy(trained.text, text)
    shutil.copy(trained.text, moved)
    shutil.copytree(trained.run, tmp_path / "run")
    arguments = ["--config", str(trained.config), "--workdir", str(tmp_path / "run")]
    arguments += ["--data.prepared_dir", str(tmp_path / "prepared")]
    text.write_text(text.read_text().replace("hill", "hall", 1))
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert "is not what the run in" in error_of([*arguments, "--data.path", str(text)], capsys)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    assert train.main([*arguments, "--data.path", str(moved)]) == 0  # the same text elsewhere is the same data


def test_weights_of_another_shape_or_vocabulary_are_refused(trained, tmp_path, capsys):
    arguments = ["--config", str(trained.config), "--workdir", str(tmp_path / "run")]
    arguments += ["--init.from_checkpoint", str(trained.run), "--data.prepared_dir", str(tmp_path / "prepared")]
    assert "model.n_layer = 2, but this config has 3" in error_of([*arguments, "--model.n_layer", "3"], capsys)
    (tmp_path / "other.txt").write_text("completely different letters: ÄÖÜ" * 100)
    other = ["--data.path", str(tmp_path / "other.txt")]
    assert "another tokenizer" in error_of([*arguments, *other], capsys)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_checkpoint_says_so(trained, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="is not a jaxgpt run"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no finished checkpoint yet"):
        load_model(tmp_path)
    shutil.copytree(trained.run, tmp_path / "run")
    unfinished = tmp_path / "run" / "checkpoints" / "5"
    unfinished.mkdir()
    with pytest.raises(UserError, match="finished checkpoint"):
        load_model(unfinished)


# ---------------------------------------------------------------- little data and few settings

SMALL_MODEL = '[model]\nn_layer = 1\nn_head = 2\nn_embd = 16\ndtype = "float32"\n'
SUBJECTS = ("今天的天气", "这家图书馆", "深度学习", "人工智能", "我的老师", "北京的秋天", "这本小说")
REMARKS = ("真让人高兴", "需要大量的数据", "改变了我们的生活", "值得慢慢地看", "离这里不远", "说起来话很长")


def web_lines(count: int) -> list[str]:
    """Sentences as they are copied from web pages: with tags, entities, emoji and spaces."""
    pick = np.random.default_rng(5)
    sentence = lambda: f"{pick.choice(SUBJECTS)}{pick.choice(REMARKS)}"
    return [f"<p class='a'>{sentence()}，<b>{sentence()}</b>！😀🎉&nbsp;  第{n}篇。<br/></p>" for n in range(count)]


def in_a_process(verb: str, *options: str, code: int = 0) -> str:
    """What a command prints that has the working directory, and one device, to itself."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", f"jaxgpt.{verb}", *options]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | flags)
    assert found.returncode == code, found.stdout
    assert "Traceback" not in found.stdout
    return found.stdout


@pytest.mark.system
def test_a_beginner_cleans_sixty_lines_and_fine_tunes_on_forty_dialogues_with_four_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    Path("corpus.txt").write_text("\n".join(web_lines(60)), encoding="utf-8")
    few = "[train]\nnum_train_epochs = 3\nper_device_train_batch_size = 4\n[checkpoint]\nsave_total_limit = 2\n"
    data = '[data]\nsource = "text"\npath = "corpus.txt"\n[cleaning]\nhtml = true\nemoji = "strip"\nwhitespace = true\n'
    Path("text.toml").write_text(SMALL_MODEL + data + few + "save_steps = 500\n")
    assert "prepared data: prepared/corpus-" in in_a_process("prepare", "--config", "text.toml")
    [folder] = Path("prepared").glob("corpus-*")
    dataset = open_dataset(folder)
    text = dataset.tokenizer.decode(dataset.train.read(0, dataset.train.num_tokens))
    assert "今天的天气" in text and not re.search("[<>😀🎉]|&nbsp;|class", text.replace("<|endoftext|>", ""))
    printed = in_a_process("train", "--config", "text.toml")
    assert f"data.block_size = {dataset.train.num_tokens - 1}, as the text has no more" in printed
    assert dataset.train.num_tokens < 1024 < dataset.train.num_tokens + 600  # less than the model could read

    turns = lambda n: [("user", f"第{n}个问题：{SUBJECTS[n % 7]}怎么样？"), ("assistant", f"{REMARKS[n % 6]}。")]
    dialogues = [{"messages": [{"role": role, "content": words} for role, words in turns(n)]} for n in range(40)]
    lines = [json.dumps(dialogue, ensure_ascii=False) for dialogue in dialogues]
    Path("dialogues.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = '[data]\nsource = "jsonl"\npath = "dialogues.jsonl"\nformat = "chat"\n'
    start = '[tokenizer]\ntype = "folder"\npath = "runs/text/hf"\n[init]\nfrom_huggingface = "runs/text/hf"\n'
    Path("chat.toml").write_text(SMALL_MODEL + data + start + few + "save_steps = 10_000\n")
    in_a_process("train", "--config", "chat.toml")
    assert len(finished_steps(Path("runs/chat"))) == 1  # the last one, of the few that three packed epochs are
    rows = ("--config", "chat.toml", "--chat.packing", "false", "--checkpoint.save_steps", "7")
    in_a_process("train", *rows, "--workdir", "runs/rows")
    *_, before, last = finished_steps(Path("runs/rows"))
    assert before == (last - 1) // 7 * 7 and 20 < last < 40
    evaluated = [line["step"] for line in read_metrics(Path("runs/rows")) if "eval_loss" in line]
    assert len(evaluated) >= 4 and {before, last} < {*evaluated}
    error = in_a_process("train", *rows, "--optimizer.warmup_steps", "100", "--workdir", "runs/none", code=2)
    assert f"warmup_steps = 100 is more than train.max_steps = {last}, which train.num_train_epochs = 3 gives" in error
    assert not Path("runs/none").exists()
    assert in_a_process("sample", "--checkpoint", "runs/rows", "--prompt", "你好", "--max-new-tokens", "5")
