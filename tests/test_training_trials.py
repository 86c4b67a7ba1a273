"""Trials that share a compiled program are the trainings that they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxgpt.config import Config, flatten, load_config
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.settings import MeshConfig
from jaxgpt.training.optimizer import Arguments, arguments
from jaxgpt.training.step import build_program
from jaxgpt.training.trials import ARGUMENTS, build_trial_program, program_key, stack

STEPS = 6
MODEL = dataclasses.replace(tiny.MODEL, n_layer=1)


def config(dropout: float = 0.0, seed: int = 3, **optimizer) -> Config:
    return dataclasses.replace(
        tiny.CONFIG,
        model=dataclasses.replace(MODEL, dropout=dropout),
        optimizer=dataclasses.replace(tiny.CONFIG.optimizer, **optimizer),
        train=dataclasses.replace(tiny.CONFIG.train, seed=seed),
    )


def batches(step: int, seeds: list[int]):
    """(S, A, B, T): the same for all trials, or one for each seed."""
    each = [tiny.batch(100 * seed + step) for seed in seeds]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


def alone(config: Config, seeds: list[int], place: int):
    """(losses, loss of other data afterwards) of one training as `train` runs it."""
    program = build_program(config, tiny.VOCAB, build_mesh(MeshConfig(data=1), jax.devices()[:1]))
    state, losses = program.init(), []
    for step in range(STEPS):
        own = batches(step, seeds)
        state, metrics = program.train_step(state, jax.tree.map(lambda x: x[place % len(seeds)], own))
        losses.append(float(metrics["loss_sum"] / metrics["count"]))
    loss_sum, count = program.eval_step(state.params, jax.tree.map(lambda x: x[0], tiny.batch(999)))
    return losses, float(loss_sum / count)


def together(configs: list[Config], seeds: list[int], devices: int):
    mesh = build_mesh(MeshConfig(), jax.devices()[:devices])
    program = build_trial_program(program_key(configs[0]), tiny.VOCAB, mesh, len(configs))
    given, losses = stack(configs), []
    states = program.init(given)
    for step in range(STEPS):
        own = jax.device_put(batches(step, seeds), program.batch_sharding(len(seeds)))
        states, metrics = program.train_step(given, states, own)
        losses.append(np.asarray(metrics["loss_sum"] / metrics["count"]))
    other = jax.device_put(jax.tree.map(lambda x: x[0], tiny.batch(999)), program.eval_sharding)
    sums, counts = program.eval_step(states.params, other)
    assert program.train_step._cache_size() == 1
    return np.stack(losses, axis=1), np.asarray(sums / counts)


TRIED = {
    "rates": [dict(learning_rate=rate, warmup_steps=warmup) for rate, warmup in ((1e-3, 0), (1e-2, 2), (3e-2, 5))],
    "decay, moments and the schedule's end": [
        dict(weight_decay=0.5, lr_scheduler_type="warmup_stable_decay"),
        dict(adam_beta1=0.5, adam_beta2=0.8, lr_scheduler_type="warmup_stable_decay"),
        dict(adam_epsilon=1e-3, min_lr_rate=0.5, lr_scheduler_type="warmup_stable_decay"),
    ],
    "muon": [dict(name="muon", muon_learning_rate=rate) for rate in (1e-3, 2e-2)],
}


@pytest.mark.parametrize("tried", TRIED)
def test_a_trial_of_a_shared_program_trains_as_train_does(tried):
    configs = [config(**settings) for settings in TRIED[tried]]
    losses, evaluated = together(configs, [0], devices=1)
    for place, one in enumerate(configs):
        alone_losses, alone_evaluated = alone(one, [0], place)
        np.testing.assert_allclose(losses[place], alone_losses, rtol=2e-5)
        assert evaluated[place] == pytest.approx(alone_evaluated, rel=2e-5)
    assert np.ptp(losses[:, -1]) > 1e-3  # what is tried makes a difference


def test_trials_with_their_own_seeds_and_dropout_lie_on_many_devices_each_by_itself():
    configs = [config(dropout=0.1 + 0.05 * (seed % 2), seed=seed) for seed in range(4)]
    losses, evaluated = together(configs, [0, 1, 2, 3], devices=4)
    one_device, _ = together(configs, [0, 1, 2, 3], devices=1)
    np.testing.assert_allclose(losses, one_device, rtol=1e-5)
    for place in (1, 2):
        alone_losses, alone_evaluated = alone(configs[place], [0, 1, 2, 3], place)
        np.testing.assert_allclose(losses[place], alone_losses, rtol=2e-5)
        assert evaluated[place] == pytest.approx(alone_evaluated, rel=2e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(data=2), MeshConfig(data=2, fsdp=2)])
def test_a_trial_alone_takes_the_whole_mesh(mesh):
    one = dataclasses.replace(config(dropout=0.0, learning_rate=1e-2), mesh=mesh)
    devices = build_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp])
    program, given = build_trial_program(program_key(one), tiny.VOCAB, devices, 1), stack([one])
    states, losses = program.init(given), []
    for step in range(STEPS):
        own = jax.device_put(batches(step, [0]), program.batch_sharding(1))
        states, metrics = program.train_step(given, states, own)
        losses.append(float(metrics["loss_sum"][0] / metrics["count"][0]))
    np.testing.assert_allclose(losses, alone(one, [0], 0)[0], rtol=2e-5)
    other = jax.device_put(jax.tree.map(lambda x: x[0], tiny.batch(999)), program.eval_sharding)
    assert program.eval_step(states.params, other)[0].shape == (1,)


def test_settings_are_arguments_exactly_where_a_program_is_shared():
    base = config(dropout=0.1)
    assert set(ARGUMENTS) <= set(flatten(base)) and len(ARGUMENTS) == len(Arguments._fields)
    for name in ARGUMENTS:
        value = {"train.seed": 9, "model.dropout": 0.2, "optimizer.warmup_steps": 7}.get(name, 0.123)
        section, _, field = name.partition(".")
        part = dataclasses.replace(getattr(base, section), **{field: value})
        other = dataclasses.replace(base, **{section: part})
        assert program_key(other) == program_key(base), name
        assert arguments(other) != arguments(base), name
    assert program_key(config()) != program_key(base)  # without dropout there are no masks
    assert program_key(config(max_grad_norm=0.5)) != program_key(config())


def test_fresh_optimizers_around_given_weights_are_all_alike():
    program = build_trial_program(program_key(config()), tiny.VOCAB, build_mesh(MeshConfig(), jax.devices()[:2]), 4)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape[1:], 0.5), program.abstract_state.params)
    states = program.fresh_optimizer(params)
    assert jax.tree.map(jnp.shape, states) == jax.tree.map(jnp.shape, program.abstract_state)
    assert all(np.all(np.asarray(leaf) == 0.5) for leaf in jax.tree.leaves(states.params))


def test_a_learning_rate_of_the_command_line_is_the_one_of_the_program():
    given = stack([load_config(None, {"optimizer.learning_rate": "3e-4"})])
    assert given.learning_rate.dtype == np.float32 and given.learning_rate[0] == np.float32(3e-4)
