"""The arithmetic of memory, and the settings that spread it."""

import dataclasses

import pytest
import tiny

from jaxgpt.config import Config, with_settings
from jaxgpt.errors import UserError
from jaxgpt.model.sizes import checkpoint_bytes
from jaxgpt.parallel.mesh import mesh_shape
from jaxgpt.settings import MeshConfig, ModelConfig, TrainConfig
from jaxgpt.training.auto_batch import batch_sizes, ways_to_save
from jaxgpt.training.memory import StepShape, arithmetic_memory, state_bytes, step_shape
from jaxgpt.training.step import resolve_batch

VOCAB = 50257
CONFIG = resolve_batch(Config(train=TrainConfig(global_batch_size=480, per_device_train_batch_size=12)), 8)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=4), MeshConfig(data=8, zero1=False)])
def test_parameters_and_optimizer_are_what_the_program_holds(mesh, name):
    optimizer = dataclasses.replace(tiny.CONFIG.optimizer, name=name)
    model = ModelConfig(n_layer=3, n_head=4, n_embd=256, n_positions=64)
    config = dataclasses.replace(tiny.CONFIG, mesh=mesh, optimizer=optimizer, model=model)
    held = state_bytes(tiny.program(config, mesh))
    reckoned = arithmetic_memory(config, tiny.VOCAB, StepShape(*mesh_shape(mesh, 8), rows=1, accumulation=1))
    assert reckoned["parameters"] == pytest.approx(held["parameters"], rel=0.02)
    assert reckoned["optimizer"] == pytest.approx(held["optimizer"], rel=0.08)
    if mesh.fsdp == 1 and not mesh.zero1:  # every device holds the whole state, as a checkpoint does
        assert checkpoint_bytes(config, tiny.VOCAB) == pytest.approx(sum(held.values()), rel=0.08)


def test_more_rows_less_recomputation_and_fewer_devices_take_more():
    shape = StepShape(8, 1, 1, rows=12, accumulation=5)
    total = lambda config, shape: sum(arithmetic_memory(config, VOCAB, shape).values())
    assert total(CONFIG, shape) < total(CONFIG, dataclasses.replace(shape, rows=20))
    assert total(CONFIG, shape) > total(CONFIG, dataclasses.replace(shape, data=1, fsdp=8))
    sizes = [total(with_settings(CONFIG, model_remat=remat), shape) for remat in ("none", "dots", "block")]
    assert sizes == sorted(sizes, reverse=True)
    assert total(CONFIG, shape) < total(with_settings(CONFIG, model_scan_layers=True), shape)


def test_batch_sizes_keep_the_tokens_of_a_step():
    assert batch_sizes(CONFIG, 8) == [12]  # its gradient_accumulation_steps are fixed by now
    free = with_settings(CONFIG, train_gradient_accumulation_steps=None)
    sizes = batch_sizes(free, 8)
    assert sizes == [1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60]
    for size in sizes:
        resolved = resolve_batch(with_settings(free, train_per_device_train_batch_size=size), 8)
        assert resolved.train.global_batch_size == 480


def test_a_batch_that_does_not_divide_names_one_that_does():
    with pytest.raises(UserError, match=r"480 is not a multiple of the 256 devices that share it; 512 is"):
        batch_sizes(with_settings(CONFIG, train_gradient_accumulation_steps=None), 256)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(fsdp=3), "1 = 3 does not divide the 8 devices"),
        (MeshConfig(data=2, fsdp=2), "= 4, but there are 8 devices"),
    ],
)
def test_a_mesh_that_does_not_divide_names_both_numbers(mesh, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(mesh, 8)


def test_ways_to_save_keep_the_tokens_of_a_step_and_take_no_more_memory_each():
    shape = step_shape(CONFIG, 8)
    now = sum(arithmetic_memory(CONFIG, VOCAB, shape).values())
    ways = list(ways_to_save(CONFIG, 8))
    assert ["--model.remat block"] in [flags for flags, _ in ways]
    assert any("--mesh.fsdp 8" in flag for flags, _ in ways for flag in flags)
    for _, configs in ways:
        rows = [step_shape(config, 8).rows for config in configs]
        assert rows == sorted(rows, reverse=True)
        for config in configs:
            assert config.train.global_batch_size == 480
            assert step_shape(config, 8).rows == config.train.per_device_train_batch_size
            assert sum(arithmetic_memory(config, VOCAB, step_shape(config, 8)).values()) <= 1.1 * now
