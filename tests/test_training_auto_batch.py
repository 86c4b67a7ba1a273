"""The batch that fits the devices at hand, and why a step did not."""

import dataclasses

import jax
import pytest
import tiny

from jaxgpt.config import Config, with_settings
from jaxgpt.errors import RunFailed, UserError
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.settings import MeshConfig, TrainConfig
from jaxgpt.training import auto_batch
from jaxgpt.training.step import resolve_batch


def mesh_of(devices: int):
    return build_mesh(MeshConfig(), jax.devices()[:devices])


def search(sizes, needs, guessed, limit):
    """(the size found, sizes that were compiled)"""
    asked = []

    def needed(size):
        asked.append(size)
        return needs(size)

    return auto_batch.largest_that_fits(sizes, needed, guessed, limit), asked


SIZES = [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("limit", [109, 110, 150, 189, 190, 420, 739, 740, 10_000])
@pytest.mark.parametrize(
    "guessed",
    [lambda size: 100 + 10 * size, lambda size: 20 * size, lambda size: 5 * size + 300, lambda size: 2000 + 12 * size],
    ids=["right", "twice the slope", "half the slope", "far too much"],
)
def test_the_largest_size_that_fits_is_found_whatever_was_guessed(limit, guessed):
    needs = lambda size: 100 + 10 * size
    found, asked = search(SIZES, needs, guessed, limit)
    assert found == max((size for size in SIZES if needs(size) <= limit), default=None)
    assert len(asked) == len(set(asked)) <= len(SIZES)


def test_a_right_guess_costs_one_program():
    needs = lambda size: 100 + 10 * size
    assert search(SIZES, needs, needs, 500) == (32, [32])


def test_a_compiler_that_only_says_too_much_is_asked_smaller_sizes():
    needs = lambda size: 10 * size if size < 8 else float("inf")
    assert search(SIZES, needs, lambda size: size, 1000)[0] == 4


@pytest.fixture(scope="module")
def needs():
    """Bytes of the tiny step by batch size, as its compiler says."""
    mesh = mesh_of(1)
    return {size: auto_batch.compiled_bytes(_sized(size), tiny.VOCAB, mesh) for size in (4, 8)}


AUTO = dataclasses.replace(
    tiny.CONFIG,
    model=dataclasses.replace(tiny.MODEL, n_layer=1),
    train=TrainConfig(max_steps=20, global_batch_size=16, per_device_train_batch_size="auto"),
)


def _sized(size: int) -> Config:
    return resolve_batch(with_settings(AUTO, train_per_device_train_batch_size=size), 1)


def test_the_automatic_batch_is_the_largest_whose_program_fits(needs):
    limit = (needs[4] + needs[8]) / 2
    assert auto_batch.largest_batch(AUTO, tiny.VOCAB, mesh_of(1), limit / 0.95) == 4


def test_the_automatic_batch_divides_the_global_batch_over_the_devices(monkeypatch):
    monkeypatch.setattr(auto_batch, "compiled_bytes", lambda *_: 0)
    assert auto_batch.largest_batch(AUTO, tiny.VOCAB, mesh_of(8), 2**40) == 2
    uneven = with_settings(AUTO, train_global_batch_size=12)
    with pytest.raises(UserError, match="12 is not a multiple of the 8 devices"):
        auto_batch.largest_batch(uneven, tiny.VOCAB, mesh_of(8), 2**40)


def test_an_automatic_batch_that_fits_nowhere_is_one_line(monkeypatch):
    monkeypatch.setattr(auto_batch, "compiled_bytes", lambda *_: 2000)
    with pytest.raises(UserError, match='"auto", but a step of 1 needs more than') as error:
        auto_batch.largest_batch(AUTO, tiny.VOCAB, mesh_of(1), 1000)
    assert "\n" not in str(error.value)


def test_half_of_the_free_memory_is_a_cpus():
    one, eight = auto_batch.device_memory(mesh_of(1)), auto_batch.device_memory(mesh_of(8))
    assert 2**20 < eight < one < 2**50


LARGE = resolve_batch(Config(train=TrainConfig(global_batch_size=512, per_device_train_batch_size=64)), 8)
MESSAGE = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (21.50G) exceeds available HBM (15.75G). HLO module: jit_train_step."
)


def test_the_explanation_adds_up_and_offers_three_settings_of_the_same_batch():
    text = auto_batch.explain_out_of_memory(LARGE, 50257, mesh_of(8), RuntimeError(MESSAGE))
    first, kinds, offer, *settings = text.splitlines()
    assert first == "out of memory: a device needs 21.50 GiB and may use 15.75 GiB"
    sizes = [float(part.split()[-2]) for part in kinds.split(": ")[1].split(", ")]
    assert sum(sizes) == pytest.approx(21.5, abs=0.05)
    assert "512 sequences" in offer
    assert len(settings) == 3
    for line in settings:
        flags = line.split("  (")[0].split()
        values = dict(zip(flags[::2], flags[1::2]))
        rows = int(values["--train.per_device_train_batch_size"])
        assert 512 % (8 * rows) == 0
        assert rows < 64 or len(values) > 1
        assert float(line.split("(")[1].split()[0]) < 15.75


def test_an_explanation_without_a_way_out_says_so():
    text = auto_batch.explain_out_of_memory(LARGE, 50257, mesh_of(8), RuntimeError("RESOURCE_EXHAUSTED"), 2**20)
    assert "more devices or larger ones" in text


def test_only_an_out_of_memory_error_is_explained():
    place = (LARGE, 50257, mesh_of(8))
    with pytest.raises(RunFailed, match="a device needs 21.50 GiB"), auto_batch.out_of_memory_explained(*place):
        raise jax.errors.JaxRuntimeError(MESSAGE)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), auto_batch.out_of_memory_explained(*place):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
