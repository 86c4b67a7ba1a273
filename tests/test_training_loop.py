"""What the loop does while it trains: traces of the steps asked for, waits for data, questions, early stopping."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import RUN, WORDS, overrides

from jaxgpt import evaluate, train
from jaxgpt.config import Config
from jaxgpt.evaluation import in_training
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.settings import EvalConfig, MeshConfig, TrainConfig
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.models import load_model
from jaxgpt.training.run_state import EvaluationHistory, Position, position
from jaxgpt.training.step import lay_out

CONFIG = (
    RUN
    + """warmup_steps = 2
[train]
max_steps = 6
per_device_train_batch_size = 1
[eval]
eval_steps = 3
eval_batches = 1
sample_tokens = 0
[checkpoint]
save_steps = 3
[log]
logging_steps = 1
tensorboard = false
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    (folder / "text.txt").write_text(" ".join(np.random.default_rng(0).choice(WORDS, 2000)))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder


def command(folder: Path, workdir: Path, **settings) -> list[str]:
    return ["--config", str(folder / "config.toml"), "--workdir", str(workdir), *overrides(**settings)]


def error_of(arguments: list[str], capsys) -> str:
    """The one line with which `train` refuses its input."""
    assert train.main(arguments) == 2
    [error] = capsys.readouterr().err.splitlines()
    return error


def traced_steps(workdir: Path) -> list[int]:
    """The numbers of the steps whose dispatch a trace holds, in order."""
    [file] = (workdir / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    events = [event for plane in data.planes for line in plane.lines for event in line.events if event.name == "train"]
    return sorted(dict(event.stats)["step_num"] for event in events)


@pytest.fixture(scope="module")
def profiled(folder) -> tuple[Path, str]:
    """A run of 6 steps with steps 2 to 4 traced, an evaluation and a checkpoint among them; and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train.main(command(folder, folder / "profiled", log__profile="2:4")) == 0
    return folder / "profiled", out.getvalue()


def test_a_trace_holds_exactly_the_steps_asked_for_and_one_line_says_where_it_is(profiled):
    workdir, printed = profiled
    assert traced_steps(workdir) == [2, 3, 4]
    [line] = [line for line in printed.splitlines() if "trace" in line]
    assert str(workdir / "profile") in line and "xprof --logdir" in line and "steps 2 to 4" in line


def test_a_run_that_is_past_the_traced_steps_traces_nothing_and_computes_the_same(folder, profiled, capsys):
    workdir = folder / "resumed"
    shutil.copytree(profiled[0], workdir, ignore=shutil.ignore_patterns("profile", "6"))
    assert train.main(command(folder, workdir, log__profile="2:4")) == 0  # from step 3
    assert not (workdir / "profile").exists()
    assert "trace of" not in capsys.readouterr().out
    traced, plain = (
        {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line} for run in (profiled[0], workdir)
    )
    assert len(plain) == 6
    assert plain == traced  # step 4 was traced in one and not in the other


@pytest.mark.parametrize(
    ("steps", "words"),
    [("5:3", "ends before it begins"), ("5:7", "beyond the last step, train.max_steps = 6"), ("3", "log.profile")],
)
def test_steps_that_cannot_be_traced_are_refused_at_the_start(folder, steps, words, tmp_path, capsys):
    assert words in error_of(command(folder, tmp_path / "run", log__profile=steps), capsys)
    assert not (tmp_path / "run").exists()


def test_steps_beyond_an_end_that_epochs_decide_are_refused_before_anything_is_written(folder, tmp_path, capsys):
    epochs = {"train__max_steps": "none", "train__num_train_epochs": "0.1"}
    arguments = command(folder, tmp_path / "run", log__profile="1000:1001", **epochs)
    assert "beyond the last step" in error_of(arguments, capsys)
    assert not (tmp_path / "run").exists()


def test_each_line_says_what_share_of_the_time_data_took(profiled):
    workdir, printed = profiled
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    shown = re.findall(r"\| data (\d+\.\d)% \|", printed)
    expected = [f"{100 * line['seconds_data'] / line['seconds_total']:.1f}" for line in lines]
    assert shown == expected
    assert len(shown) == 6


# ---------------------------------------------------------------- early stopping, and questions scored in between

LETTERS = "abcdefgh"
FIRST, LAST = 4, 120  # the first evaluation, and max_steps
END = 80  # of a run that does not stop early


@pytest.fixture(scope="module")
def overfitting(tmp_path_factory) -> Path:
    """Letters by chance: after some steps the model learns by heart, and its validation loss can only rise."""
    folder = tmp_path_factory.mktemp("overfitting")
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text("".join(rng.choice([*LETTERS, " "], 1000)))
    words = lambda: "".join(rng.choice([*LETTERS], rng.integers(1, 6)))  # few enough tokens for one shape
    questions = [{"context": words(), "choices": [words(), words(), words()], "answer": n % 3} for n in range(40)]
    (folder / "own.jsonl").write_text("\n\n".join(map(json.dumps, questions)))
    sentences = [{"text": f"{words()} {words()}"} for _ in range(20)]
    (folder / "lambada.jsonl").write_text("\n".join(map(json.dumps, sentences)))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder


def settings(folder: Path, **more) -> dict:
    tasks = f"choices={folder}/own.jsonl,lambada={folder}/lambada.jsonl"
    return {
        "model__n_layer": 1, "data__validation_fraction": 0.5, "optimizer__learning_rate": 0.01,
        "optimizer__lr_scheduler_type": "constant",  # one program for any number of steps
        "train__max_steps": LAST, "eval__eval_steps": FIRST, "eval__eval_batches": "none", "eval__tasks": tasks,
        "eval__early_stopping_patience": 3, "checkpoint__save_steps": FIRST, "checkpoint__save_total_limit": 99,
    } | more  # fmt: skip


def evaluations(workdir: Path) -> dict[int, dict]:
    """{step: line} of metrics.jsonl."""
    return {line["step"]: line for line in read_metrics(workdir) if "eval_loss" in line}


def training(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}


def stops_at(losses: dict[int, float], patience: int, threshold: float = 0.0) -> int | None:
    """The rule in the words of Hugging Face's documentation."""
    seen, worse = [], 0
    for step, loss in losses.items():
        improved = not seen or min(seen) - loss > threshold
        worse = 0 if improved else worse + 1
        seen.append(loss)
        if worse == patience:
            return step
    return None


@pytest.fixture(scope="module")
def stopped(overfitting) -> tuple[Path, str]:
    """A run that ended early, undisturbed; and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train.main(command(overfitting, overfitting / "stopped", **settings(overfitting))) == 0
    return overfitting / "stopped", out.getvalue()


def test_a_run_ends_at_the_evaluation_that_the_rule_says_and_hands_out_its_best_weights(stopped):
    workdir, printed = stopped
    losses = {step: line["eval_loss"] for step, line in evaluations(workdir).items()}
    end, best = max(losses), min(losses, key=losses.get)
    assert stops_at(losses, 3) == end == max(training(workdir)) < LAST
    assert end - best == 3 * FIRST  # otherwise the weights that are compared below would be the same
    status = json.loads((workdir / "summary.json").read_text())["status"]
    assert status.startswith(f"finished (stopped early at step {end} of {LAST}: 3 evaluations in a row")
    assert f"{losses[best]:.4f} at step {best}" in status
    assert status[len("finished (") : -1] in printed
    assert f"weights of step {best}, the best checkpoint" in printed
    assert f"--checkpoint {workdir}@best" in printed
    exported, chosen, last = (
        load_model(path).params for path in (workdir / "hf", f"{workdir}@best", workdir / "checkpoints" / str(end))
    )
    assert load_model(f"{workdir}@best").step == best
    np.testing.assert_array_equal(exported["wpe"], chosen["wpe"])
    assert np.abs(np.asarray(exported["wpe"] - last["wpe"])).max() > 1e-3


def test_a_run_told_to_stop_while_it_scores_goes_on_and_stops_early_as_an_undisturbed_one(
    overfitting, stopped, monkeypatch, capsys
):
    whole, workdir = evaluations(stopped[0]), overfitting / "told"
    told_at = list(whole)[-2]  # two evaluations in a row were not better then
    real, asked = in_training.TaskScores.__call__, []

    def scores(self, params, go_on):
        asked.append(len(asked))
        if len(asked) == len(whole) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, params, go_on)

    monkeypatch.setattr(in_training.TaskScores, "__call__", scores)
    arguments = command(overfitting, workdir, **settings(overfitting))
    assert train.main(arguments) == 42
    assert f"at step {told_at} of" in capsys.readouterr().err
    assert list(evaluations(workdir)) == list(whole)[:-2]
    monkeypatch.undo()
    assert train.main(arguments) == 0
    assert evaluations(workdir) == whole
    assert training(workdir) == training(stopped[0])

    before = (workdir / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert train.main(arguments) == 0  # the same command does not train on
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert f"stopped early at step {max(whole)} of" in capsys.readouterr().out


def test_a_loss_that_is_lower_by_no_more_than_the_threshold_is_not_better_but_is_the_best():
    config = Config(
        train=TrainConfig(max_steps=100),
        eval=EvalConfig(eval_steps=1, early_stopping_patience=2, early_stopping_threshold=0.25),
    )
    early = EvaluationHistory(config, Position())
    told = []
    for step, loss in enumerate([3.0, 2.5, 2.25, 1.75, 1.5, math.nan, 0.0], 1):
        early.note(step, loss)
        told.append(bool(early.reason(step)))
    assert told == [False, False, False, False, False, True, False]
    assert (early.now.best_loss, early.now.best_step, early.now.not_better) == (0.0, 7, 0)


def test_a_run_that_has_stopped_early_goes_on_with_a_larger_patience_or_none():
    def reason(patience: int | None, step: int = 40) -> str:
        config = Config(train=TrainConfig(max_steps=100), eval=EvalConfig(early_stopping_patience=patience))
        return EvaluationHistory(config, Position(step, best_loss=2.0, best_step=10, not_better=3)).reason(step)

    assert reason(2) == reason(3) != ""
    assert reason(4) == reason(None) == ""
    assert reason(3, step=100) == ""  # it is at its end anyway


@pytest.mark.parametrize(
    ("training", "validation", "told_at"),
    [
        ([3.0, 2.0, 1.5, 1.0], [3.0, 2.0, 2.1, 2.2], [4]),
        ([3.0, 2.0, 1.5, 1.0], [3.0, 2.0, 2.005, 2.01], []),  # by no more than a hundredth
        ([3.0, 2.0, 1.5, 1.0], [3.0, 2.0, 2.0, math.nan], [4]),
        ([3.0, 2.0, 2.5, 2.6], [3.0, 2.0, 2.5, 2.6], []),  # it diverges, which no better checkpoint explains
        ([3.0, 2.0, 1.5, 1.0, 0.9], [math.nan, 2.0, 2.5, 2.6, 1.9], [4]),  # and no longer at 5
        ([3.0, 2.0, 1.5, 1.0, 0.9], [3.0, 2.0, 2.5, 2.4, 2.3], [4, 5]),
        ([3.0, 2.0], [3.0, 4.0], []),  # one evaluation is none yet
    ],
)
def test_a_validation_loss_that_rises_while_training_falls_is_noticed(training, validation, told_at):
    config = Config(train=TrainConfig(max_steps=100))
    whole, found = EvaluationHistory(config, Position()), []
    for step, (train_loss, eval_loss) in enumerate(zip(training, validation), 1):
        part = EvaluationHistory(config, whole.now)  # as after a restart
        for history in (whole, part):
            history.add(2 * train_loss, 2.0)
            history.note(step, eval_loss)
        assert repr(part.now) == repr(whole.now)
        found += [step] if whole.now.overfits else []
    assert found == told_at
    if told_at and math.isfinite(validation[-1]):
        assert whole.now.best_step == validation.index(min(validation[1:])) + 1


def test_a_run_that_overfits_says_so_and_hands_out_its_best_weights(overfitting, stopped, tmp_path, capsys, caplog):
    """It is that which has stopped early, and goes on without a patience."""
    workdir = tmp_path / "run"
    shutil.copytree(stopped[0], workdir)
    more = {"eval__early_stopping_patience": "none", "eval__tasks": "", "eval__eval_steps": 20}
    arguments = command(
        overfitting, workdir, **settings(overfitting, **more, checkpoint__save_steps=20, train__max_steps=END)
    )
    assert train.main(arguments) == 0
    losses = {step: line["eval_loss"] for step, line in evaluations(workdir).items()}
    best = min(losses, key=losses.get)
    assert best < END - 40 and losses[END] > 1.01 * losses[best]
    printed = capsys.readouterr().out
    [told] = [line for line in printed.splitlines() if line.startswith("overfit")]
    assert "validation loss rises while training loss falls" in told
    why = f"{losses[END]:.4f} at step {END}, lowest {losses[best]:.4f} at step {best}"
    assert why in printed and f"weights of step {best}, the best checkpoint" in printed
    page = (workdir / "report.html").read_text()
    assert why in page and f"Used where no step is named: step {best}" in page
    model, exported = load_model(workdir), load_model(workdir / "hf")
    assert model.step == best and f"takes step {best}, the best, and not {END}: validation loss rises" in caplog.text
    np.testing.assert_array_equal(exported.params["wpe"], model.params["wpe"])
    assert load_model(workdir / "checkpoints" / str(END)).step == END


def test_a_checkpoint_from_before_early_stopping_is_a_position_that_has_seen_no_evaluation():
    old = {"step": 8, "data_offset": 1, "bad_steps": 0, "evaluated": True, "loss_sum": 2.0, "count": 1.0, "x": 0}
    where = position(types.SimpleNamespace(metadata=lambda step: old), 8)
    assert where == Position(8, 1, 0, True, 2.0, 1.0)
    assert where.best_loss is None


def test_scores_in_a_training_are_those_that_evaluate_finds_for_its_checkpoint(overfitting, stopped, tmp_path, capsys):
    step = list(evaluations(stopped[0]))[1]
    command = ["--checkpoint", str(stopped[0] / "checkpoints" / str(step)), "--json", str(tmp_path / "found.json")]
    files = [f"choices={overfitting}/own.jsonl", f"lambada={overfitting}/lambada.jsonl"]
    assert evaluate.main([*command, "--task", *files]) == 0
    found = {task["task"]: task for task in json.loads((tmp_path / "found.json").read_text())["tasks"]}
    line = evaluations(stopped[0])[step]
    keys = [key for key in line if key.startswith(("eval_choices", "eval_lambada"))]
    assert {"eval_choices_acc", "eval_choices_acc_norm", "eval_choices_acc_stderr", "eval_lambada_perplexity"} < {*keys}
    assert line["eval_choices_acc"] not in (0.0, 1.0)
    for key in keys:
        task, _, metric = key.removeprefix("eval_").partition("_")
        assert line[key] == pytest.approx(found[task][metric], rel=1e-5), key
    printed = f"| choices {line['eval_choices_acc']:.1%} | lambada {line['eval_lambada_acc']:.1%} |"
    assert printed in stopped[1]


def test_scores_are_the_same_on_one_device_and_on_eight(overfitting, stopped):
    model = load_model(f"{stopped[0]}@best")
    files = [f"choices={overfitting}/own.jsonl", f"lambada={overfitting}/lambada.jsonl"]
    found = []
    for mesh in (MeshConfig(data=1), MeshConfig(fsdp=2)):
        devices = build_mesh(mesh, jax.devices()[: 1 if mesh.data == 1 else 8])
        score = in_training.task_scorer(files)(model.config, model.vocab_size, model.tokenizer, devices)
        shardings = lay_out(model.config, model.vocab_size, devices).param_shardings
        found.append(score(jax.device_put(model.params, shardings)))
    assert list(found[0]) == list(found[1])
    np.testing.assert_allclose(list(found[0].values()), list(found[1].values()), rtol=1e-6)


QUESTION = {"context": "ab", "choices": ["a", "b"], "answer": 0}
BAD_TASKS = [
    ("choices", [], "give a file: choices=FILE"),
    ("piqua={file}", [QUESTION], "piqua: no such format"),
    ("choices={file}x", [], "bad.jsonlx: No such file"),
    ("choices={file}", [QUESTION, QUESTION | {"answer": 2}], "bad.jsonl:3: the answer is choice 2"),
    (
        "choices={file}",
        [QUESTION, QUESTION | {"context": "ä"}],
        "bad.jsonl:3: the character-level tokenizer has no",
    ),
    ("choices={file}", [QUESTION, QUESTION | {"choices": ["a", "b" * 40]}], "bad.jsonl:3: an answer of 41 tokens"),
    ("choices={file},choices={file}", [QUESTION], "second task that would be called choices_bad"),
]


@pytest.mark.parametrize(("tasks", "questions", "words"), BAD_TASKS, ids=[words for *_, words in BAD_TASKS])
def test_bad_questions_are_one_line_and_nothing_is_written(overfitting, tasks, questions, words, tmp_path, capsys):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n\n".join(map(json.dumps, questions)), encoding="utf-8")
    more = settings(overfitting, eval__tasks=tasks.format(file=file))
    error = error_of(command(overfitting, tmp_path / "run", **more), capsys)
    assert error.startswith("error: eval.tasks: ") and words in error
    assert not (tmp_path / "run").exists()


def test_two_tasks_of_one_format_have_the_names_of_their_files(overfitting):
    again = overfitting / "again.jsonl"
    shutil.copy(overfitting / "own.jsonl", again)
    files = [f"choices={overfitting}/own.jsonl", f"lambada={overfitting}/lambada.jsonl", f"choices={again}"]
    assert [task.name for task in in_training.read_tasks(files)] == ["choices_own", "lambada", "choices_again"]


def test_early_stopping_without_its_best_checkpoint_is_refused(overfitting, tmp_path, capsys):
    arguments = command(overfitting, tmp_path, **settings(overfitting, checkpoint__keep_best="false"))
    assert "early_stopping_patience = 3 needs checkpoint.keep_best = true" in error_of(arguments, capsys)
