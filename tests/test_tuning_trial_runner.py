"""Each trial of a sweep is the training that it stands for, however it is stopped or goes on."""

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from jaxgpt.config import Config, load_config, with_settings
from jaxgpt.data.dataset import TokenDataset, open_dataset
from jaxgpt.errors import Interrupted
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.preparation.make_dataset import prepare
from jaxgpt.settings import MeshConfig
from jaxgpt.training import loop
from jaxgpt.training.checkpoint import read_config
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.optimizer import Arguments, arguments
from jaxgpt.training.resume import dataset_read_by
from jaxgpt.training.step import Program, build_program
from jaxgpt.tuning import learning_rate
from jaxgpt.tuning.sweep_folder import TrialRecord
from jaxgpt.tuning.trial_runner import Bench, SharedProgram, Trial, TrialRunner, program_key

STEPS = 8
RATES = (1e-3, 3e-3, 1e-2, 1e-1)
SETTINGS = {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "model.n_positions": 16,
    "model.dtype": "float32",
    "tokenizer.type": "char",
    "data.source": "text",
    "optimizer.warmup_steps": 2,
    "train.max_steps": STEPS,
    "train.per_device_train_batch_size": 4,
    "checkpoint.save_steps": 4,
    "eval.eval_steps": 2,
    "eval.sample_tokens": 0,
    "log.logging_steps": 2,
    "log.tensorboard": "false",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trials")
    words = np.random.default_rng(0).choice(["one", "two", "three", "four", "five", "six"], (40, 50))
    (folder / "text.txt").write_text("\n".join(" ".join(line) for line in words))
    return folder


def config(folder: Path, **changed) -> Config:
    paths = {"data.path": folder / "text.txt", "data.prepared_dir": folder / "prepared"}
    settings = SETTINGS | paths | {name.replace("__", "."): value for name, value in changed.items()}
    return load_config(None, {name: str(value) for name, value in settings.items()})


@pytest.fixture(scope="module")
def dataset(folder) -> TokenDataset:
    return open_dataset(prepare(config(folder)))


def trial(folder: Path, bench: Bench, number: int, **changed) -> Trial:
    return Trial(number, {"number": str(number)}, bench.resolved(config(folder, **changed)))


def by_rate(folder: Path, bench: Bench, **changed) -> list[Trial]:
    return [trial(folder, bench, number, optimizer__learning_rate=rate) for number, rate in enumerate(RATES)]


@pytest.fixture(scope="module")
def bench(dataset) -> Bench:
    return Bench(build_mesh(MeshConfig(), jax.devices()[:1]), dataset, None)


@pytest.fixture(scope="module")
def runner(bench):
    """A runner in a new folder; all of them share their programs, as the trials of one sweep do."""
    programs: dict[Config, SharedProgram] = {}

    def make(workdir: Path) -> TrialRunner:
        made = TrialRunner(workdir, bench)
        made._programs = programs
        return made

    return make


@pytest.fixture(scope="module")
def undisturbed(folder, bench, runner, tmp_path_factory) -> list[TrialRecord]:
    workdir = tmp_path_factory.mktemp("undisturbed")
    own = runner(workdir)
    records = list(own.run(by_rate(folder, bench)))
    (program,) = own._programs.values()
    assert program.train_step._cache_size() == 1
    assert not list((workdir / "trials").iterdir())  # finished: nothing is left to go on from
    return records


def close(one: TrialRecord, other: TrialRecord) -> None:
    assert (one.number, one.step, one.status) == (other.number, other.step, other.status)
    np.testing.assert_allclose(one.losses, other.losses, rtol=2e-5)
    np.testing.assert_allclose(one.eval_losses, other.eval_losses, rtol=2e-5)


# ---------------------------------------------------------------- trials


def test_a_trial_has_the_losses_of_the_run_that_train_makes(trained, tmp_path):
    config = read_config(trained.run)
    bench = Bench(build_mesh(MeshConfig()), dataset_read_by(trained.run, config.max_steps), None)
    (record,) = TrialRunner(tmp_path, bench).run([Trial(2, {}, config)])
    lines = read_metrics(trained.run)
    logged = [[line["step"], line["loss"]] for line in lines if "loss" in line]
    evaluated = [[line["step"], line["eval_loss"]] for line in lines if "eval_loss" in line]
    np.testing.assert_allclose(record.losses, logged, rtol=2e-5)
    np.testing.assert_allclose(record.eval_losses, evaluated, rtol=2e-5)
    assert record.eval_loss == record.eval_losses[-1][1]
    assert record.tokens == config.max_steps * config.global_batch_size * config.block_size


def test_survivors_of_a_round_go_on_where_they_were(folder, bench, runner, undisturbed, tmp_path):
    assert len({record.eval_loss for record in undisturbed}) == len(RATES)
    trials = by_rate(folder, bench)
    paused = list(runner(tmp_path).run(trials, until=4))
    assert {(record.status, record.step) for record in paused} == {("paused", 4)}
    (repeated,) = runner(tmp_path).run(trials[:1], until=4)  # killed before it was recorded
    assert repeated.losses == paused[0].losses
    own = runner(tmp_path)  # another process
    own.forget(0)
    for record in own.run([trials[3], trials[1]]):
        close(record, undisturbed[record.number])
    assert [folder.name for folder in (tmp_path / "trials").iterdir()] == ["2"]


def test_a_stop_signal_saves_and_the_same_trials_go_on(folder, bench, runner, undisturbed, tmp_path, monkeypatch):
    calls, evaluate = [], loop.evaluate

    def interrupted(*given):
        calls.append(None)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*given)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    trials, done = by_rate(folder, bench)[:2], []
    with pytest.raises(Interrupted, match="SIGTERM at step 6"):
        done.extend(runner(tmp_path).run(trials))
    assert [record.number for record in done] == [] or [record.number for record in done] == [0]
    assert [path.name for path in (tmp_path / "trials" / "1" / "checkpoints").iterdir()] == ["6"]
    (record,) = runner(tmp_path).run(trials[1:])
    close(record, undisturbed[1])
    assert len(calls) == 9  # the evaluation that was cut off and the last one: no step was run again


def test_a_trial_that_diverges_ends_by_itself_and_harms_no_other(folder, bench, runner, undisturbed, tmp_path):
    trials = [trial(folder, bench, 9, optimizer__learning_rate=1e38), by_rate(folder, bench)[1]]
    diverged, other = runner(tmp_path).run(trials)
    assert (diverged.status, diverged.eval_loss) == ("diverged", None) and diverged.step < STEPS
    close(other, undisturbed[1])


def test_other_shapes_get_their_own_program(folder, bench, tmp_path):
    own = TrialRunner(tmp_path, bench)
    for changed in ({}, {"model__n_embd": 32}, {"optimizer__weight_decay": 0.5}):
        own._program(trial(folder, bench, 0, **changed).config)
    assert len(own._programs) == 2


# ---------------------------------------------------------------- the program that they share

BASE = with_settings(tiny.CONFIG, model_n_layer=1)
TRIED = {
    "every argument": [
        {"model_dropout": 0.3},
        {
            "optimizer_learning_rate": 3e-2,
            "optimizer_warmup_steps": 5,
            "optimizer_weight_decay": 0.5,
            "optimizer_adam_beta1": 0.5,
            "optimizer_adam_beta2": 0.8,
            "optimizer_adam_epsilon": 1e-3,
            "optimizer_min_lr_rate": 0.5,
            "model_dropout": 0.1,
            "train_seed": 5,
        },
    ],
    "muon on a mesh": [{"optimizer_name": "muon", "optimizer_learning_rate": rate} for rate in (1e-3, 2e-2)],
}


def trained(program: Program) -> list[float]:
    """The losses of 4 steps, and the one of other data afterwards."""
    state, losses = program.init(), []
    for step in range(4):
        state, metrics = program.train_step(state, tiny.batch(step))
        losses.append(float(metrics["loss_sum"] / metrics["count"]))
    loss_sum, count = program.eval_step(state.params, jax.tree.map(lambda x: x[0], tiny.batch(999)))
    return [*losses, float(loss_sum / count)]


@pytest.mark.parametrize("tried", TRIED)
def test_a_shared_program_trains_as_the_one_of_train_does(tried):
    mesh = MeshConfig(data=2, fsdp=2) if "mesh" in tried else MeshConfig(data=1)
    devices = build_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp])
    configs = [with_settings(BASE, **settings) for settings in TRIED[tried]]
    shared = SharedProgram(configs[0], tiny.VOCAB, devices)
    losses = [trained(shared.bind(arguments(config))) for config in configs]
    assert shared.train_step._cache_size() == 1
    np.testing.assert_allclose(losses[1], trained(build_program(configs[1], tiny.VOCAB, devices)), rtol=2e-5)
    assert abs(losses[0][-1] - losses[1][-1]) > 1e-3  # what is tried makes a difference


def test_settings_are_arguments_exactly_where_a_program_is_shared():
    base = with_settings(BASE, model_dropout=0.1)
    for field in Arguments._fields:
        value = {"seed": 9, "dropout": 0.2, "warmup_steps": 7}.get(field, 0.123)
        name = {"seed": "train_seed", "dropout": "model_dropout"}.get(field, f"optimizer_{field}")
        other = with_settings(base, **{name: value})
        assert program_key(other) == program_key(base), name
        assert arguments(other) != arguments(base), name
    assert program_key(BASE) != program_key(base)  # without dropout there are no masks
    assert program_key(with_settings(BASE, optimizer_max_grad_norm=0.5)) != program_key(BASE)


# ---------------------------------------------------------------- the range test


def test_the_range_test_finds_where_the_loss_falls_and_stops_where_it_blows_up(folder, bench):
    found = learning_rate.find(trial(folder, bench, 0).config, bench.dataset, bench.mesh, 1e-5, 1e3, 60)
    assert len(found.rates) == len(found.losses) < 60  # it blew up before the last rate
    assert found.rates[0] < found.steepest < found.rates[int(np.argmin(found.losses))]
    assert min(found.losses) < found.losses[0] - 0.1


def test_the_range_test_reads_a_known_curve():
    rates = np.geomspace(1e-6, 1.0, 200)
    # Falls fastest where the sigmoid's argument is 0, at 1e-3, and rises from 1e-1 on.
    losses = 4.0 - 2.0 / (1 + np.exp(-3 * np.log(rates / 1e-3))) + np.maximum(np.log(rates / 1e-1), 0.0)
    found = learning_rate.judged(rates, losses.tolist())
    assert 1e-3 < found.steepest < 4e-3  # the moving average comes a little late
    assert 5e-3 < found.highest_safe < 3e-2
