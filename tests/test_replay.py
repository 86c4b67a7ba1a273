"""Replay gives back what a run has read in a step, with the losses it had, and a skip list takes rows out of it."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import RUN

from jaxgpt import replay, train
from jaxgpt.config import load_config
from jaxgpt.data import pipeline
from jaxgpt.data.chat import with_chat_tokens
from jaxgpt.data.dataset import open_dataset
from jaxgpt.data.tokenizer import char_tokenizer, train_bpe
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.inference import answers
from jaxgpt.model import gpt2
from jaxgpt.preparation.writer import DatasetWriter, PackedWriter
from jaxgpt.training import replayed_step, start
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.recovery import read_faults

TRAIN = """lr_scheduler_type = "constant"
warmup_steps = 1
[train]
max_steps = 6
per_device_train_batch_size = 1
[eval]
eval_steps = 6
eval_batches = 1
sample_tokens = 4
[checkpoint]
save_steps = 1
save_total_limit = 9
keep_best = false
[log]
logging_steps = 1
tensorboard = false
"""


OF_KIND = {
    "text": {"eval.sample_tokens": 0},
    "chat": {"data.format": "chat", "eval.chat_prompts": 4, "train.max_steps": 3, "eval.eval_steps": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of 6 steps on text, and one of 3 on conversations, with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("replay")
    (folder / "config.toml").write_text(RUN.format(folder=folder).replace("n_layer = 2", "n_layer = 1") + TRAIN)
    for kind, write in (("text", write_text), ("chat", write_chat)):
        (folder / f"{kind}-data").mkdir()
        write(folder / f"{kind}-data")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            train_on(kind, folder, folder / kind)
        (folder / f"{kind}.out").write_text(out.getvalue())
    return folder


def load(folder: Path, settings: dict | None = None):
    return load_config(folder / "config.toml", {name: str(value) for name, value in (settings or {}).items()})


def write_text(data: Path) -> None:
    text = " ".join(np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], 2000))
    tokenizer = char_tokenizer([text])
    writer = DatasetWriter(data, tokenizer)
    for split, part in (("train", text), ("validation", text[:300])):
        writer.add(split, np.array(tokenizer.encode(part), np.int32), len(part), starts_document=True)
    writer.finish({"fingerprint": "x", "settings": {}})


def write_chat(data: Path) -> None:
    tokenizer = with_chat_tokens(train_bpe(["hello good day bye user assistant"], 262))
    writer, rng = PackedWriter(data, tokenizer, 32, packing=True), np.random.default_rng(0)
    for document in range(60):
        question, answer = ("".join(rng.choice([*"abcdef"], rng.integers(1, 6))) for _ in range(2))
        asked, told = tokenizer.encode(question), [*tokenizer.encode(answer), tokenizer.end_of_turn]
        supervised = np.array([False] * len(asked) + [True] * len(told))
        split = "validation" if document % 5 == 0 else "train"
        writer.add(split, np.array(asked + told, np.int32), supervised, len(answer), document)
        if document % 3 == 0:  # a text among them
            tokens = np.array([tokenizer.end_of_text, *asked], np.int32)
            writer.add("train", tokens, np.ones(len(tokens), bool), len(question), 100 + document)
    writer.finish({"fingerprint": "y", "settings": {}})


@contextlib.contextmanager
def prepared(folder: Path, kind: str):
    """`train` finds the data of this test instead of preparing any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "prepare", lambda config, tokenizer: folder / f"{kind}-data")
        yield


def train_on(kind: str, folder: Path, run: Path, settings: dict | None = None, force: bool = False) -> None:
    with prepared(folder, kind):
        train.train(load(folder, OF_KIND[kind] | (settings or {})), run, force)


def lines_of(run: Path) -> dict[int, dict]:
    return {line["step"]: line for line in read_metrics(run) if "batch_hash" in line}


def copy(run: Path, to: Path, *gone: int) -> Path:
    """The run, its checkpoints of the steps `gone` deleted."""
    return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns(*map(str, gone))))


def command(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = replay.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_batch_and_the_loss_are_those_of_the_step(kind, folder):
    lines, seen = lines_of(folder / kind), []
    for step in (2, 3, *([6] if kind == "text" else [])):
        found = replayed_step.replay(folder / kind, step, weights_step=step - 1)
        assert found.batch_hash == found.logged_hash == lines[step]["batch_hash"]
        assert found.loss == pytest.approx(lines[step]["loss"], rel=1e-4)
        assert sorted(row.row for row in found.rows) == list(range(8 * (step - 1), 8 * step))
        losses = [row.loss for row in found.rows]
        assert losses == sorted(losses, reverse=True) and len(set(losses)) > 1
        seen += [row.texts for row in found.rows]
    assert all(texts for texts in seen)


def test_a_row_of_text_is_a_part_of_it(folder):
    dataset = open_dataset(folder / "text-data")
    text = load_tokenizer(dataset.path / "tokenizer").decode(dataset.train.read(0, dataset.train.num_tokens))
    rows = replayed_step.replay(folder / "text", 1).rows
    shown = ["".join(piece for piece, _ in row.texts[0].pieces) for row in rows]
    assert sum(part in text for part in shown) >= len(rows) - 1  # one may go past the end of an epoch
    assert {len(part) for part in shown if part in text} == {33}


def test_a_row_of_conversations_tells_them_apart_and_marks_what_is_learned(folder, capsys):
    found = replayed_step.replay(folder / "chat", 1)
    assert found.weights_step == 1
    for row in found.rows:
        assert row.learned_tokens == sum(text.learned_tokens for text in row.texts)
        assert row.loss == pytest.approx(
            sum(text.loss * text.learned_tokens for text in row.texts) / row.learned_tokens
        )
        assert all(text.is_plain == (text.document >= 100) for text in row.texts)
        for text in row.texts:
            if text.is_plain:
                [(begin, is_learned), (_, all_else)] = text.pieces
                assert begin == "<|endoftext|>" and not is_learned and all_else
                continue
            assert text.document % 5  # those are held out
            [(question, asked), (answer, told)] = text.pieces
            assert not asked and told and "<|im_end|>" not in question and answer.endswith("<|im_end|>")
    assert max(len(row.texts) for row in found.rows) > 1
    code, out, _ = command(capsys, "--checkpoint", folder / "chat", "--step", 1, "--rows", 8)
    assert code == 0
    plain, talk = (next(t for row in found.rows for t in row.texts if t.is_plain == is_plain) for is_plain in (1, 0))
    assert f"--- text {plain.document + 1}, loss" in out
    first = found.rows[0]
    assert f"=== row {first.row}, loss {first.loss:.4f}, {first.learned_tokens} tokens learned" in out
    (question, _), (answer, _) = talk.pieces
    assert f"conversation {talk.document + 1}, loss" in out and f"{question}[[{answer}]]" in out
    assert f"batch hash {found.batch_hash}, the one in metrics.jsonl" in out and "more rows" not in out
    assert "(6 more rows" in replayed_step.report(found, 2)


def test_json_holds_every_row(folder, tmp_path, capsys):
    code, _, _ = command(capsys, "--checkpoint", folder / "text", "--step", 4, "--json", tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert code == 0 and len(found["rows"]) == 8
    assert found["position"] == 3 and found["weights_step"] == 4


def test_the_weights_are_those_of_the_nearest_checkpoint_up_to_the_step(folder, tmp_path, capsys):
    run = copy(folder / "text", tmp_path / "run", 3, 4)
    assert replayed_step.replay(run, 4).weights_step == 2
    late = copy(folder / "text", tmp_path / "late", 1, 2, 3, 4)
    assert replayed_step.replay(late, 4).weights_step == 5
    assert "these weights have learned from it" in command(capsys, "--checkpoint", late, "--step", 4)[1]


@pytest.mark.system
def test_after_a_rollback_a_step_is_replayed_with_the_rows_it_has_read(folder, tmp_path, monkeypatch):
    whole = pipeline.train_rows

    def train_rows(split, *, step, **how):
        batch = whole(split, step=step, **how)
        return batch._replace(weights_BT=batch.weights_BT * np.float32("nan")) if step == 3 else batch

    monkeypatch.setattr(pipeline, "train_rows", train_rows)
    settings = {"faults.on_bad_step": "rollback", "checkpoint.save_steps": 2}
    train_on("text", folder, tmp_path / "run", settings)  # step 4 is bad: back to 2, and on with the rows after it
    monkeypatch.undo()
    assert len(read_faults(tmp_path / "run")) == 1
    lines = lines_of(tmp_path / "run")
    without = copy(tmp_path / "run", tmp_path / "copy", 4)  # then that of 6 tells
    for run, step, position in ((tmp_path / "run", 2, 1), (tmp_path / "run", 3, 4), (without, 3, 4), (without, 5, 6)):
        found = replayed_step.replay(run, step)
        assert (found.position, found.batch_hash) == (position, lines[step]["batch_hash"])


def test_rows_of_high_loss_go_to_a_skip_list_and_the_run_goes_on_without_them(folder, tmp_path, capsys):
    run = copy(folder / "text", tmp_path / "run", 4, 5, 6)
    for name in ("hf", "report.html", "summary.json"):
        shutil.rmtree(run / name, ignore_errors=True) or (run / name).unlink(missing_ok=True)
    found = replayed_step.replay(run, 4)
    border = found.rows[1].loss  # one row is above it
    chosen = ["--skip-above", border, "--skip", found.rows[3].row]
    code, out, _ = command(capsys, "--checkpoint", run, "--step", 4, *chosen)
    assert code == 0
    assert f"--workdir {run} --data.skip_list {run / 'skip.txt'} --force" in out
    skipped = {found.rows[0].row, found.rows[3].row}
    assert {int(line) for line in (run / "skip.txt").read_text().splitlines() if "#" not in line} == skipped
    with open(run / "skip.txt", "a") as file:  # and all the rows of step 5
        file.writelines(f"{row}\n" for row in range(32, 40))
    with pytest.raises(UserError, match="data.skip_list was None"):
        train_on("text", folder, run, {"data.skip_list": run / "skip.txt"})
    train_on("text", folder, run, {"data.skip_list": run / "skip.txt"}, force=True)
    lines, before = lines_of(run), lines_of(folder / "text")
    again = replayed_step.replay(run, 4, weights_step=3)
    assert {row.row for row in again.rows if row.skipped} == skipped
    assert lines[4]["batch_hash"] == before[4]["batch_hash"] == again.batch_hash
    assert lines[4]["loss"] == pytest.approx(again.loss, rel=1e-4) != before[4]["loss"]
    assert lines[5]["loss"] is None and np.isfinite(lines[6]["loss"])  # nothing to learn is no bad step
    assert "skipped_steps" not in lines[6] and not read_faults(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "0"], "--step 0: the run in .* has the steps 1 to 6"),
        (["--step", "7"], "--step 7: the run in .* has the steps 1 to 6"),
        (["--step", "2", "--weights-step", "9"], r"--weights-step 9: .* steps \[1, 2, 3, 4, 5, 6\]"),
        (["--step", "2", "--data", "gone"], "gone: the data of the run is not there"),
        (["--step", "2", "--data", "{folder}/chat-data"], "is not the data that the run in .* has read"),
        (["--step", "2", "--skip", "3"], "--skip 3: step 2 has the rows 8 to 15"),
        (["--step", "2", "--skip", "x"], "'x' is not a list of rows"),
    ],
)
def test_a_mistake_is_told_in_a_line(arguments, message, folder, capsys):
    arguments = [argument.format(folder=folder) for argument in arguments]
    code, _, err = command(capsys, "--checkpoint", folder / "text", *arguments)
    assert code == 2
    [line] = err.splitlines()
    assert re.search(message, line), line


def test_data_that_was_changed_is_told_and_nothing_is_skipped(folder, tmp_path, capsys):
    run = copy(folder / "text", tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records[1]["batch_hash"] += 1
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, err = command(capsys, "--checkpoint", run, "--step", records[1]["step"], "--skip-above", 0)
    assert code == 2
    assert "warning: batch hash" in out and "nothing is added" in err
    assert not (run / "skip.txt").exists()


# ---------------------------------------------------------------- training on conversations


def test_a_chat_run_tells_which_answers_stop_and_shows_one_and_looks_at_the_data_first(folder):
    run, printed = folder / "chat", (folder / "chat.out").read_text()
    assert printed.count("learned tokens") == 1 and printed.index("learned tokens") < printed.index("step 1/3")
    [line] = [line for line in read_metrics(run) if "eval_loss" in line]
    assert 0 <= line["eval_stop_rate"] <= 1 and line["sample"]
    assert "answers that stop" in printed and "answers that stop" in (run / "report.html").read_text()
    assert json.loads((run / "summary.json").read_text())["data"]["learned_tokens"] > 0
    assert "learned tokens" not in (folder / "text.out").read_text()


@pytest.mark.system
def test_a_model_that_learned_to_stop_is_told_from_one_that_did_not(folder):
    dataset = open_dataset(folder / "chat-data")
    config = load(folder, {"data.format": "chat"})
    sample = answers.sampler(config, dataset)
    params = gpt2.init_params(config.model, dataset.vocab_size, jax.random.key(0))
    end = load_tokenizer(dataset.path / "tokenizer").end_of_turn
    # With all weights of the head's input gone, the last LayerNorm's bias alone decides what comes next.
    always = jax.tree.map(np.array, params)
    always["ln_f"]["scale"][:] = 0
    for token, rate in ((end, 1.0), (end - 1, 0.0)):
        always["ln_f"]["bias"] = 100 * always["wte"][token]
        found = sample(jax.device_put(always, jax.devices()[0]))
        assert found["eval_stop_rate"] == rate
    assert answers.sampler(load(folder, {"data.format": "chat", "eval.chat_prompts": 0}), dataset) is None
