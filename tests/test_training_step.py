"""The step computes the same thing on every mesh, for every accumulation, remat and loop over layers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny import CONFIG, ONE_DEVICE, VOCAB, batch, losses, program, run_steps, train

from jaxgpt.config import Config
from jaxgpt.errors import UserError
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.settings import MeshConfig, OptimizerConfig, TrainConfig
from jaxgpt.training import muon
from jaxgpt.training.optimizer import arguments, decay_mask, schedule
from jaxgpt.training.step import build_program, resolve_batch

MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=8, zero1=False),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=1, tensor=4),
    MeshConfig(data=2, fsdp=2, tensor=2),
]


trained_on = functools.cache(lambda mesh: train(mesh=mesh))


@pytest.fixture(scope="module")
def one_device():
    return trained_on(ONE_DEVICE)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"data{m.data}-fsdp{m.fsdp}-tensor{m.tensor}-zero{m.zero1:d}")
def test_every_mesh_trains_like_one_device(one_device, mesh):
    state, metrics = trained_on(mesh)
    np.testing.assert_allclose(losses(metrics), losses(one_device[1]), atol=1e-5)
    assert [m["batch_hash"] for m in metrics] == [m["batch_hash"] for m in one_device[1]]
    # Adam turns gradients near 0 into steps of the size of the learning rate, whatever their rounding, so
    # single weights may differ by more than 1e-5; as a whole the parameters agree.
    ours, theirs = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.params)]) for s in (state, one_device[0]))
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


def test_accumulation_equals_the_large_batch_with_uneven_weights(one_device):
    counts = batch(0, accumulation=4).weights_BT.sum((1, 2))
    assert len(set(np.asarray(counts).tolist())) > 1, "the micro-batches must weigh differently for this to be a test"
    _, metrics = train(accumulation=4, mesh=MeshConfig(data=2))
    np.testing.assert_allclose(losses(metrics), losses(one_device[1]), atol=1e-5)
    assert [m["batch_hash"] for m in metrics] == [m["batch_hash"] for m in one_device[1]]


@pytest.mark.parametrize(("remat", "scan"), [("none", True), ("dots", False), ("block", True)])
def test_remat_and_scan_change_no_result(one_device, remat, scan):
    model = dataclasses.replace(CONFIG.model, remat=remat, scan_layers=scan)
    built = program(dataclasses.replace(CONFIG, model=model))
    jaxpr = str(jax.make_jaxpr(built.train_step)(built.abstract_state, batch(0)))
    assert ("checkpoint" in jaxpr or "remat" in jaxpr) == (remat != "none")
    assert (" scan[" in jaxpr) == scan
    np.testing.assert_allclose(losses(run_steps(built)[1]), losses(one_device[1]), atol=1e-5)


def test_optimizer_state_is_really_split_over_data():
    state, _ = trained_on(MESHES[0])
    mu = state.opt_state[1][0].mu["blocks"]["mlp"]["c_fc"]["kernel"]
    weight = state.params["blocks"]["mlp"]["c_fc"]["kernel"]
    assert {shard.data.size for shard in mu.addressable_shards} == {mu.size // 8}
    assert len({str(shard.index) for shard in mu.addressable_shards}) == 8
    assert {shard.data.size for shard in weight.addressable_shards} == {weight.size}


def test_parameters_are_split_over_fsdp_and_tensor():
    state, _ = trained_on(MeshConfig(data=2, fsdp=2, tensor=2))
    weight = state.params["blocks"]["mlp"]["c_fc"]["kernel"]
    assert {shard.data.size for shard in weight.addressable_shards} == {weight.size // 4}


def test_the_state_is_donated():
    compiled = program()
    before = compiled.init()
    compiled.train_step(before, batch(0))
    assert before.params["wte"].is_deleted()


MUON = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(name="muon", warmup_steps=2, learning_rate=3e-3))


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_the_loss_falls(config):
    compiled = program(config)
    state, same = compiled.init(), batch(0)
    values = []
    for _ in range(15):
        state, metrics = compiled.train_step(state, same)
        values.append(float(metrics["loss_sum"] / metrics["count"]))
    assert values[-1] < 0.8 * values[0], values


def test_muon_changes_the_matrices_and_shards_like_one_device():
    one, eight = train(MUON), train(MUON, MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(losses(eight[1]), losses(one[1]), atol=1e-5)
    rules = muon.rules(one[0].params)
    assert rules["blocks"]["attn"]["c_attn"]["kernel"] == "muon" and rules["wte"] == rules["ln_f"]["scale"] == "adam"


def test_the_first_moment_can_be_kept_in_bfloat16(one_device):
    optimizer = dataclasses.replace(CONFIG.optimizer, adam_mu_dtype="bfloat16")
    state, metrics = train(dataclasses.replace(CONFIG, optimizer=optimizer))
    moments = state.opt_state[1][0]
    assert {x.dtype.name for x in jax.tree.leaves(moments.mu)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(moments.nu)} == {"float32"}
    np.testing.assert_allclose(losses(metrics)[:, 0], losses(one_device[1])[:, 0], atol=2e-2)


def test_decay_spares_biases_and_norms():
    mask = decay_mask(program().abstract_state.params)
    decayed = {"/".join(k.key for k in path) for path, yes in jax.tree_util.tree_leaves_with_path(mask) if yes}
    assert decayed == {
        "wte",
        "wpe",
        *(f"blocks/{name}/kernel" for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")),
    }


def test_clipping_limits_the_update_and_reports_the_norm_before_it():
    # Under plain clipping to a tiny norm, Adam's first moment is tiny too: read it off the state.
    clipped = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, max_grad_norm=1e-3))
    state, metrics = train(clipped, steps=1)
    moments = np.concatenate([np.ravel(m) for m in jax.tree.leaves(state.opt_state[1][0].mu)])
    assert np.linalg.norm(moments) == pytest.approx((1 - 0.9) * 1e-3, rel=1e-3)
    assert metrics[0]["grad_norm"] > 0.1
    free = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, max_grad_norm=0.0))
    state, metrics = train(free, steps=1)
    moments = np.concatenate([np.ravel(m) for m in jax.tree.leaves(state.opt_state[1][0].mu)])
    assert np.linalg.norm(moments) == pytest.approx((1 - 0.9) * metrics[0]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "middle", "last"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 0.55, 0.1),
        ("cosine", 0.55, 0.1),
        ("inverse_sqrt", (10 / 60) ** 0.5, (10 / 110) ** 0.5),
        ("warmup_stable_decay", 1.0, 0.1),
    ],
)
def test_schedules_warm_up_and_end_where_they_should(shape, middle, last):
    config = OptimizerConfig(lr_scheduler_type=shape, warmup_steps=10, min_lr_rate=0.1, decay_rate=0.2)
    rate = schedule(config, 110, 1.0, arguments(Config(optimizer=config)))
    assert float(rate(0)) == pytest.approx(1 / 11)
    assert float(rate(4)) == pytest.approx(5 / 11)
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(60)) == pytest.approx(middle)
    assert float(rate(110)) == pytest.approx(last)


def test_a_mesh_that_does_not_fit_names_both_numbers():
    with pytest.raises(UserError, match=r"3 x 1 = 3 does not divide the 8 devices"):
        build_mesh(MeshConfig(fsdp=3))
    with pytest.raises(UserError, match=r"= 4, but there are 8 devices"):
        build_mesh(MeshConfig(data=2, fsdp=2))
    model = dataclasses.replace(CONFIG.model, n_head=1, n_embd=12)
    with pytest.raises(UserError, match=r'mesh.fsdp = 8 does not divide the 12 entries of the "embed" axis'):
        mesh = MeshConfig(data=1, fsdp=8)
        build_program(dataclasses.replace(CONFIG, model=model, mesh=mesh), VOCAB, build_mesh(mesh))


def test_the_batch_is_resolved_or_refused_with_its_numbers():
    def resolve(shards=8, **train):
        return resolve_batch(dataclasses.replace(CONFIG, train=TrainConfig(max_steps=20, **train)), shards).train

    assert resolve(per_device_train_batch_size=4).global_batch_size == 32
    assert resolve(per_device_train_batch_size=4, gradient_accumulation_steps=3).global_batch_size == 96
    assert resolve(per_device_train_batch_size=4, global_batch_size=64).gradient_accumulation_steps == 2
    with pytest.raises(UserError, match=r"global_batch_size = 60 .* 4 x 8 = 32"):
        resolve(per_device_train_batch_size=4, global_batch_size=60)
    with pytest.raises(UserError, match=r"accumulation_steps = 3.* is 2 times"):
        resolve(per_device_train_batch_size=4, global_batch_size=64, gradient_accumulation_steps=3)
