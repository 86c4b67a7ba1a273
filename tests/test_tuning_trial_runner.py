"""Trials side by side: each is the training it stands for, however it is grouped, stopped or taken up again."""

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.config import Config, load_config
from jaxgpt.data.dataset import TokenDataset, open_dataset
from jaxgpt.errors import Interrupted
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.preparation.make_dataset import prepare
from jaxgpt.settings import MeshConfig
from jaxgpt.train import train
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.step import build_program, resolve_batch, resolve_steps
from jaxgpt.tuning import learning_rate, trial_runner
from jaxgpt.tuning.trial_runner import Result, Runner, Trial

STEPS = 8
RATES = tuple(float(rate) for rate in np.geomspace(1e-3, 0.2, 12))
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
    "train.compilation_cache_dir": "",
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


def trial(folder: Path, dataset: TokenDataset, number: int, devices: int = 1, **changed) -> Trial:
    one = resolve_batch(config(folder, **changed), devices)
    return Trial(number, resolve_steps(one, dataset.train.rows_per_epoch(one.block_size)))


def by_rate(folder, dataset, devices: int = 1, **changed) -> list[Trial]:
    return [
        trial(folder, dataset, number, devices, optimizer__learning_rate=rate, **changed)
        for number, rate in enumerate(RATES)
    ]


def runner(workdir: Path, dataset: TokenDataset, side_by_side: int, devices: int = 1) -> Runner:
    return Runner(workdir, dataset, build_mesh(MeshConfig(), jax.devices()[:devices]), side_by_side)


def close(one: Result, other: Result) -> None:
    assert (one.number, one.step, one.status) == (other.number, other.step, other.status)
    np.testing.assert_allclose(one.losses, other.losses, rtol=2e-5)
    np.testing.assert_allclose(one.eval_losses, other.eval_losses, rtol=2e-5)


@pytest.fixture(scope="module")
def undisturbed(folder, dataset, tmp_path_factory) -> list[Result]:
    own = runner(tmp_path_factory.mktemp("undisturbed"), dataset, side_by_side=12)
    results = list(own.run(by_rate(folder, dataset)))
    assert own.programs == 1 and next(iter(own._programs.values())).train_step._cache_size() == 1
    return results


def test_a_trial_has_the_losses_of_the_run_that_train_makes(folder, dataset, undisturbed, tmp_path):
    for number in (1, 4):  # train takes all 8 devices here, half a row each would not do
        rows = {"train__per_device_train_batch_size": 1, "train__global_batch_size": 8}
        one = trial(folder, dataset, number, 8, optimizer__learning_rate=RATES[number], **rows)
        [result] = runner(tmp_path / f"sweep{number}", dataset, 1, devices=8).run([one])
        train(one.config, tmp_path / f"run{number}")
        lines = read_metrics(tmp_path / f"run{number}")
        logged = [[line["step"], line["loss"]] for line in lines if "loss" in line]
        evaluated = [[line["step"], line["eval_loss"]] for line in lines if "eval_loss" in line]
        np.testing.assert_allclose(result.losses, logged, rtol=2e-5)
        np.testing.assert_allclose(result.eval_losses, evaluated, rtol=2e-5)


def test_how_trials_are_grouped_and_where_they_lie_changes_nothing(folder, dataset, undisturbed, tmp_path):
    assert len({result.eval_loss for result in undisturbed}) == len(RATES)
    for side_by_side, devices in ((4, 1), (2, 2)):
        own = runner(tmp_path / f"{side_by_side}", dataset, side_by_side, devices)
        for one, other in zip(own.run(by_rate(folder, dataset)), undisturbed, strict=True):
            close(one, other)
        assert own.programs == 1
        assert not list((tmp_path / f"{side_by_side}").rglob("checkpoints"))  # finished: nothing is left to go on from


def test_survivors_of_a_round_go_on_where_they_were(folder, dataset, undisturbed, tmp_path):
    trials = by_rate(folder, dataset)
    paused = list(runner(tmp_path, dataset, 3).run(trials, until=4))
    assert {(result.status, result.step) for result in paused} == {("paused", 4)}
    own = runner(tmp_path, dataset, 3)  # another process
    for number in (0, 1, 3):
        own.forget(number)
    for result in own.run([trials[5], trials[2], trials[4]]):
        close(result, undisturbed[result.number])


def test_a_stop_signal_saves_and_the_same_trials_go_on(folder, dataset, undisturbed, tmp_path, monkeypatch):
    calls, evaluate = [], trial_runner.evaluate

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(trial_runner, "evaluate", interrupted)
    with pytest.raises(Interrupted, match="SIGTERM"):
        list(runner(tmp_path, dataset, 12).run(by_rate(folder, dataset)))
    assert set(runner(tmp_path, dataset, 12)._states.steps().values()) == {6}
    for one, other in zip(runner(tmp_path, dataset, 12).run(by_rate(folder, dataset)), undisturbed, strict=True):
        close(one, other)
    assert len(calls) == 4  # the steps before the signal were not run again


def test_a_trial_that_diverges_ends_by_itself_and_harms_no_other(folder, dataset, undisturbed, tmp_path):
    trials = [*by_rate(folder, dataset)[:3], trial(folder, dataset, 9, optimizer__learning_rate=1e38)]
    *others, last = runner(tmp_path, dataset, 4).run(trials)
    assert (last.status, last.eval_loss) == ("diverged", None)
    for one, other in zip(others, undisturbed[:3], strict=True):
        close(one, other)


def test_trials_around_given_weights_start_from_them(folder, dataset, undisturbed, tmp_path):
    one, mesh = (
        trial(folder, dataset, 2, optimizer__learning_rate=RATES[2]),
        build_mesh(MeshConfig(), jax.devices()[:1]),
    )
    weights = jax.device_get(build_program(one.config, dataset.vocab_size, mesh).init().params)
    [result] = Runner(tmp_path, dataset, mesh, 1, weights).run([one])
    close(result, undisturbed[2])  # they are those that its seed gives


def test_other_shapes_get_their_own_program(folder, dataset, tmp_path):
    wide = trial(folder, dataset, 1, model__n_embd=32)
    own = runner(tmp_path, dataset, 4)
    first, second = own.run([trial(folder, dataset, 0), wide])
    assert own.programs == 2 and first.parameters < second.parameters
    assert first.tokens == STEPS * 4 * 16


def test_small_trials_go_side_by_side_and_large_ones_alone(folder):
    one, two = (build_mesh(MeshConfig(), jax.devices()[:devices]) for devices in (1, 2))
    small, large = config(folder), config(folder, model__n_embd=512)
    assert [trial_runner.side_by_side(small, 65, mesh, 100) for mesh in (one, two)] == [16, 32]
    assert trial_runner.side_by_side(small, 65, one, 5) == 5
    assert trial_runner.side_by_side(large, 65, two, 5) == 1
    assert trial_runner.side_by_side(config(folder, mesh__fsdp=2), 65, two, 5) == 1


def test_the_range_test_finds_where_the_loss_falls_and_stops_where_it_blows_up(folder, dataset):
    one = trial(folder, dataset, 0).config
    found = learning_rate.find(one, dataset, build_mesh(MeshConfig(), jax.devices()[:1]), 1e-5, 1e3, 60)
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
