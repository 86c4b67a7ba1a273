"""The train step in the TPU compiler's hands. It runs here without a TPU; nothing is executed."""

import dataclasses

import pytest

pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra: plan)")

from jaxgpt.config import Config
from jaxgpt.errors import UserError
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.planning.compile import compile_step
from jaxgpt.planning.program import read_program
from jaxgpt.planning.topology import compile_only_devices, known_slices, parse_slice
from jaxgpt.settings import DataConfig, MeshConfig, ModelConfig, TrainConfig
from jaxgpt.training.auto_batch import largest_batch
from jaxgpt.training.step import resolve_batch

pytestmark = pytest.mark.system
MODEL = ModelConfig(n_layer=2, n_head=4, n_embd=256, n_positions=256)
VOCAB = 257
DATA_PARALLEL = MeshConfig()


def compiled(slice_name: str, cache, mesh: MeshConfig = DATA_PARALLEL):
    """(what the compiler said, the program's cost) of a step of two layers."""
    where = parse_slice(slice_name)
    config = Config(model=MODEL, mesh=mesh, train=TrainConfig(per_device_train_batch_size=2))
    step = compile_step(resolve_batch(config, where.devices), VOCAB, where, cache)
    return step, read_program(step.hlo)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.mark.parametrize("slice_name", ["v5e-8", "v5p:2x2x2"])
def test_the_data_parallel_step_fits_is_donated_and_gathers_new_parameters_only(slice_name, cache):
    step, cost = compiled(slice_name, cache)
    assert step.fits
    assert 0 < step.total_bytes < step.limit_bytes
    assert step.donated_bytes >= step.memory["parameters"] + step.memory["optimizer"]
    gathered = [c for c in cost.collectives if c.kind == "all-gather"]
    assert gathered
    assert all("shard_map" not in c.operation for c in gathered)  # in there: activations, or weights that were whole
    assert sum(c.count * c.bytes for c in gathered) <= step.memory["parameters"]
    assert {kernel.name: kernel.calls for kernel in cost.kernels} == {
        "attention_forward": MODEL.n_layer,
        "attention_backward": MODEL.n_layer,
    }
    # the same again is read, not compiled: to the last byte the same record
    assert compiled(slice_name, cache)[0] == step


def test_a_step_on_packed_conversations_has_the_attention_kernels_and_segments_beside_the_tokens():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    where = parse_slice("v5e:2x4")
    config = resolve_batch(Config(model=MODEL, mesh=mesh, train=TrainConfig(per_device_train_batch_size=2)), 4)
    step = compile_step(dataclasses.replace(config, data=DataConfig(format="chat")), VOCAB, where)
    assert step.fits
    assert step.memory["batch"] >= 4 * 4 * 2 * MODEL.n_positions  # tokens, targets, weights, segments of two rows
    assert {kernel.name: kernel.calls for kernel in read_program(step.hlo).kernels} == {
        "attention_forward": MODEL.n_layer,
        "attention_backward": MODEL.n_layer,
    }


def test_the_fsdp_step_gathers_the_weights_in_bfloat16_and_nothing_else(cache):
    step, cost = compiled("v5e-8", cache, MeshConfig(data=1, fsdp=8))
    whole, _ = compiled("v5e-8", cache)
    assert step.donated_bytes >= step.memory["parameters"] + step.memory["optimizer"]
    assert step.memory["parameters"] < whole.memory["parameters"] / 7
    gathered = [c for c in cost.collectives if c.kind == "all-gather"]
    assert gathered
    assert all("all_gather" in c.operation for c in gathered)  # the ones the step asks for, none of the compiler's own
    # forward and perhaps again backward, at 2 bytes of a parameter's 4
    assert sum(c.count * c.bytes for c in gathered) <= whole.memory["parameters"]


def test_a_step_that_does_not_fit_says_how_much_it_needs(cache):
    where = parse_slice("v5e-8")
    config = Config(model=MODEL, train=TrainConfig(per_device_train_batch_size=8192))
    step = compile_step(resolve_batch(config, 8), VOCAB, where, cache)
    assert not step.fits
    assert step.total_bytes > step.limit_bytes == where.hbm_bytes
    assert not step.hlo


def test_an_automatic_batch_that_cannot_fit_is_the_users_mistake_and_says_what_would():
    mesh = build_mesh(MeshConfig(), compile_only_devices(parse_slice("v5e-1")))
    train = TrainConfig(global_batch_size=8192, gradient_accumulation_steps=1, per_device_train_batch_size="auto")
    with pytest.raises(UserError, match="needs more than the 15.75 GiB of a device; try --train.per_device") as error:
        largest_batch(Config(model=MODEL, train=train), VOCAB, mesh, parse_slice("v5e-1").hbm_bytes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["v4", "v5e", "v5p", "v6e", "v7x"])
def test_libtpu_has_the_slices_that_we_name(family):
    for where in known_slices(family)[:6]:
        assert len(compile_only_devices(where)) == where.devices


def test_a_shape_that_libtpu_does_not_know_is_the_users_mistake():
    with pytest.raises(UserError, match=r"--tpu v5e:3x3: libtpu .* does not know it"):
        compile_only_devices(parse_slice("v5e:3x3"))


def test_a_mesh_that_does_not_divide_the_slice_is_the_users_mistake(cache):
    where = parse_slice("v5e-8")
    config = resolve_batch(Config(model=MODEL), 8)
    broken = dataclasses.replace(config, mesh=MeshConfig(fsdp=3))
    with pytest.raises(UserError, match="3 x 1 = 3 does not divide the 8 devices"):
        compile_step(broken, VOCAB, where, cache)
