"""Bad steps through the real step: the state keeps its bits, a spike is found where it is, and nothing else is."""

import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from tiny import CONFIG, ONE_DEVICE, VOCAB, batch, program

from jaxgpt.data.pipeline import Batch
from jaxgpt.settings import FaultsConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.training import bad_steps, step
from jaxgpt.training.bad_steps import BadStep, BadSteps

SMALL = dataclasses.replace(
    CONFIG,
    model=ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=16, dtype="float32"),
    train=TrainConfig(max_steps=400, seed=3),
)
MESHES = {"one": ONE_DEVICE, "zero1": MeshConfig(data=8), "fsdp": MeshConfig(data=2, fsdp=2)}

# What a fault multiplies the loss and the gradient with.
FAULTS = {
    "none": (1.0, 1.0),
    "NaN": (math.nan, math.nan),
    "infinite": (math.inf, math.inf),
    "NaN gradient": (1.0, math.nan),
    "100 x gradient": (1.0, 100.0),
    "100 x loss": (100.0, 1.0),
}
MARK = [VOCAB - 1] * 4  # rows that begin like this carry a fault; the token after it says which


@jax.custom_vjp
def multiply(value, with_value, with_gradient):
    return value * with_value


multiply.defvjp(
    lambda value, with_value, with_gradient: (value * with_value, with_gradient),
    lambda with_gradient, gradient: (gradient * with_gradient, None, None),
)


@pytest.fixture
def tampered(monkeypatch):
    """Programs that are built now suffer the faults that `faulty` writes into batches."""
    real = step.summed_loss

    def summed_loss(*arguments, **options):
        [tokens_BT] = [argument.tokens_BT for argument in arguments if isinstance(argument, Batch)]
        loss_sum, count = real(*arguments, **options)
        marked = jnp.all(tokens_BT[:, : len(MARK)] == jnp.asarray(MARK)[None])
        factors = jnp.asarray(list(FAULTS.values()))[jnp.where(marked, tokens_BT[0, len(MARK)], 0)]
        return multiply(loss_sum, factors[0], factors[1]), count

    monkeypatch.setattr(step, "summed_loss", summed_loss)


def faulty(number: int, fault: str) -> Batch:
    clean = batch(number)
    tokens = np.array(clean.tokens_BT)
    tokens[..., : len(MARK)] = MARK
    tokens[..., len(MARK)] = list(FAULTS).index(fault)
    return clean._replace(tokens_BT=jnp.asarray(tokens))


def guarded(config=SMALL, mesh=ONE_DEVICE, **faults):
    return program(dataclasses.replace(config, faults=FaultsConfig(**faults)), mesh)


def without_guard(monkeypatch) -> None:
    """Programs that are built from now on take every step for good, and select nothing."""
    monkeypatch.setattr(bad_steps, "judge", lambda loss, norm, recent, sigma: (jnp.zeros((), bool), recent, {}))
    monkeypatch.setattr(bad_steps, "unless", lambda bad, new, old: new)


def bits(tree) -> list[int]:
    """A checksum a leaf: of the bytes themselves, pytest would print the difference for minutes."""
    return [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def numbers(metrics: dict) -> dict:
    return {name: value.item() for name, value in metrics.items()}


def with_optimizer(name: str):
    return dataclasses.replace(SMALL, optimizer=OptimizerConfig(name=name, warmup_steps=2, learning_rate=1e-2))


# ---------------------------------------------------------------- the device's part


def compiled(built):
    return built.train_step.lower(built.abstract_state, batch(0)).compile()


@pytest.mark.parametrize(("optimizer", "mesh"), [("muon", "one"), ("adamw", "zero1"), ("muon", "fsdp")])
def test_a_bad_step_keeps_every_bit_and_a_good_one_gives_those_of_a_step_without_a_guard(
    optimizer, mesh, tampered, monkeypatch
):
    monkeypatch.setattr(bad_steps, "WINDOW", 4)
    config = with_optimizer(optimizer)
    ours = guarded(config, MESHES[mesh], spike_sigma=10.0)
    our_step = compiled(ours)
    without_guard(monkeypatch)
    free = guarded(config, MESHES[mesh])
    free_step = compiled(free)
    check_memory(our_step, free_step, ours.abstract_state)

    state, theirs = ours.init(), free.init()
    for number in range(5):
        state, metrics = our_step(state, batch(number))
        theirs, expected = free_step(theirs, batch(number))
        assert numbers(expected).items() <= numbers(metrics).items()
    assert bits((state.params, state.opt_state)) == bits((theirs.params, theirs.opt_state))

    for count, fault in enumerate([name for name in FAULTS if name != "none"], 1):
        before, taken = bits((state.params, state.opt_state, state.recent)), int(state.step)
        state, metrics = our_step(state, faulty(5, fault))
        assert bits((state.params, state.opt_state, state.recent)) == before, fault
        assert (int(state.step), metrics["bad_step"], metrics["skipped_steps"]) == (taken + 1, 1, count)

    state, metrics = our_step(state, batch(5))  # as if nothing had happened, apart from the step's number
    theirs, expected = free_step(theirs, batch(5))
    assert bits((state.params, state.opt_state)) == bits((theirs.params, theirs.opt_state))
    assert metrics["learning_rate"] == expected["learning_rate"]
    assert metrics["skipped_steps"] == len(FAULTS) - 1
    counts = [int(count) for _, count in optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")]
    assert len(counts) >= 2 and set(counts) == {6} == {int(step.updates_done(state.opt_state))}


def check_memory(ours, free, state) -> None:
    """The guard keeps the whole state donated. A CPU may copy the old moments for the select, and no more."""
    in_bytes = lambda tree: sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
    assert ours.memory_analysis().alias_size_in_bytes == in_bytes(state)
    more = ours.memory_analysis().temp_size_in_bytes - free.memory_analysis().temp_size_in_bytes
    assert more < in_bytes(state.opt_state) + 4096


def test_the_faults_of_these_tests_do_reach_the_state_of_a_step_without_a_guard(tampered, monkeypatch):
    without_guard(monkeypatch)
    free = guarded()
    for fault in ("NaN", "infinite", "NaN gradient"):
        state, _ = free.train_step(free.init(), faulty(0, fault))
        assert not bad_steps.all_finite(state.params), fault


def test_the_program_is_the_same_for_stop_skip_and_rollback():
    stop, skip, rollback = (guarded(on_bad_step=policy) for policy in ("stop", "skip", "rollback"))
    texts = {p.train_step.lower(p.abstract_state, batch(0)).as_text() for p in (stop, skip, rollback)}
    assert len(texts) == 1
    assert stop.abstract_state.recent == {}


def trained(config, sigma: float, steps: int, rows: int):
    """The metrics of `steps` clean steps of `rows` x 16 tokens that can be learned: each has four likely successors."""
    built = guarded(config, spike_sigma=sigma)
    rng = np.random.default_rng(config.train.seed)
    successors = rng.integers(0, VOCAB, (VOCAB, 4))
    state, metrics = built.init(), []
    for _ in range(steps):
        tokens = np.empty((rows, 17), np.int64)
        tokens[:, 0] = rng.integers(0, VOCAB, rows)
        for place in range(16):
            tokens[:, place + 1] = successors[tokens[:, place], rng.choice(4, rows, p=[0.7, 0.1, 0.1, 0.1])]
        tokens = tokens.astype(np.int32)[None]
        weights = np.ones((1, rows, 16), np.float32)
        state, values = built.train_step(state, Batch(tokens[..., :-1], tokens[..., 1:], weights))
        metrics.append(values)
    return [numbers(values) for values in jax.device_get(metrics)]


def clean(seed: int, learning_rate: float, steps: int, rows: int):
    """(steps taken for bad, how much the loss fell) of a run without faults at the usual 6 sigma."""
    optimizer = OptimizerConfig(warmup_steps=50, learning_rate=learning_rate)
    config = dataclasses.replace(SMALL, train=TrainConfig(max_steps=steps, seed=seed), optimizer=optimizer)
    metrics = trained(config, 6.0, steps, rows)
    losses = [values["loss_sum"] / values["count"] for values in metrics]
    return metrics[-1]["skipped_steps"], np.mean(losses[:10]) - np.mean(losses[-100:])


def test_a_thousand_clean_steps_of_training_raise_no_alarm():
    bad, fell = clean(seed=0, learning_rate=3e-3, steps=1000, rows=32)
    assert fell > 1.5
    assert bad == 0


# (rows of 16 tokens, learning rate): alarms allowed in 5,000 steps. The last is of a training that is unstable, with
# norms up to 27 sigma above the others'; counted for three seeds: 4 4 0. Its bound is for the record, no more.
ALARMS = {(64, 1e-3): 0, (64, 1e-2): 0, (8, 1e-3): 0, (8, 1e-2): 5}


@pytest.mark.chaos
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("rows", "learning_rate"), ALARMS)
def test_five_thousand_clean_steps_raise_no_alarm_or_few_where_training_is_unstable(rows, learning_rate, seed):
    bad, fell = clean(seed, learning_rate, 5000, rows)
    assert fell > 1.5
    assert bad <= ALARMS[rows, learning_rate]


def test_a_spike_is_found_at_its_step_and_only_once_the_window_is_full(tampered):
    built = guarded(spike_sigma=6.0, on_bad_step="skip")
    faults = {bad_steps.WINDOW - 1: "100 x gradient", 150: "100 x gradient", 160: "100 x loss", 161: "NaN"}
    state, metrics = built.init(), []
    for number in range(1, 171):
        state, values = built.train_step(state, faulty(number, faults[number]) if number in faults else batch(number))
        metrics.append(values)
    metrics = [numbers(values) for values in jax.device_get(metrics)]
    assert [number for number, values in enumerate(metrics, 1) if values["bad_step"]] == [150, 160, 161]
    assert metrics[-1]["skipped_steps"] == 3
    good = [values for values in metrics[:149]][-bad_steps.WINDOW :]
    losses = [values["loss_sum"] / values["count"] for values in good]
    norms = [values["grad_norm"] for values in good]
    spike = metrics[149]
    assert spike["loss_mean"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert spike["loss_std"] == pytest.approx(np.std(losses), rel=1e-3)
    assert spike["log_grad_norm_mean"] == pytest.approx(np.mean(np.log(norms)), rel=1e-4)
    assert np.log(spike["grad_norm"]) > spike["log_grad_norm_mean"] + 6 * spike["log_grad_norm_std"]
    assert "the gradient norm is" in bad_steps.describe(spike, 6.0) and "the loss is" not in bad_steps.describe(
        spike, 6.0
    )
    assert "the loss is" in bad_steps.describe(metrics[159], 6.0)
    assert bad_steps.describe(metrics[160], 6.0) == "loss = nan, gradient norm = nan: not finite"
    assert bad_steps.all_finite(state)


def window_of(values) -> dict:
    values = jnp.asarray(values, jnp.float32)
    return {"loss": values, "grad_norm": jnp.exp(values), "count": jnp.asarray(values.size, jnp.int32)}


@pytest.mark.parametrize(
    ("window", "value", "bad"),
    [
        (np.full(128, 1.0), 1 + 5.9e-3, False),  # equal values: the least deviation is 0.1 % of the value
        (np.full(128, 1.0), 1 + 6.1e-3, True),
        (np.arange(128) % 2, 0.5 + 5.9 * 0.5, False),  # mean 0.5, deviation 0.5
        (np.arange(128) % 2, 0.5 + 6.1 * 0.5, True),
        (np.arange(128) % 2, -100.0, False),  # downwards is no spike
        (np.zeros(128), 0.0, False),
    ],
)
def test_a_spike_is_sigma_deviations_above_the_mean_of_the_window(window, value, bad):
    """`value` and `window`: losses, or logarithms of gradient norms."""
    usual, value = jnp.asarray(np.mean(window), jnp.float32), jnp.asarray(value, jnp.float32)
    for loss, norm in ((value, usual), (usual, value)):
        found, after, _ = bad_steps.judge(loss, jnp.exp(norm), window_of(window), 6.0)
        assert found == bad
        assert int(after["count"]) == 128 + (not bad)
        assert (after["loss"][0] == loss) == (not bad or loss == window[0])
    short = window_of(window) | {"count": jnp.asarray(127)}
    assert not bad_steps.judge(value, jnp.exp(usual), short, 6.0)[0]


@pytest.mark.parametrize("sigma", [0.0, 10.0])
def test_the_window_survives_a_checkpoint_and_the_run_goes_on_bit_for_bit(sigma, tampered, tmp_path, monkeypatch):
    monkeypatch.setattr(bad_steps, "WINDOW", 6)
    built = guarded(spike_sigma=sigma, on_bad_step="skip")

    def steps(state, first, last):
        metrics = []
        for number in range(first, last):
            fault = {3: "NaN", 8: "100 x gradient"}.get(number, "none")
            state, values = built.train_step(state, faulty(number, fault))
            metrics.append(numbers(values))
        return state, metrics

    half, _ = steps(built.init(), 0, 7)
    items = lambda state: {"step": state.step, "opt_state": state.opt_state, "recent": state.recent}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "optimizer", items(half))
        checkpointer.save(tmp_path / "params", half.params)
        checkpointer.wait_until_finished()
        saved = bits(half)
        undisturbed, expected = steps(half, 7, 12)
        found = checkpointer.restore(tmp_path / "optimizer", items(built.abstract_state))
        params = checkpointer.restore(tmp_path / "params", built.abstract_state.params)
    restored = step.TrainState(params=params, **found)
    assert bits(restored) == saved
    resumed, metrics = steps(restored, 7, 12)
    assert bits(resumed) == bits(undisturbed)
    assert metrics == expected
    assert [values["bad_step"] for values in metrics] == [0, int(sigma > 0), 0, 0, 0]


def test_a_state_that_overflowed_is_told_from_a_finite_one():
    tree = {"a": jnp.ones(3), "b": {"c": jnp.zeros((), jnp.int32)}}
    assert bad_steps.all_finite(tree)
    for value in (math.nan, -math.inf):
        assert not bad_steps.all_finite(tree | {"a": jnp.ones(3).at[1].set(value)})


# ---------------------------------------------------------------- the host's part


def read(bad: bool = False, skipped: int = 0, loss: float = 3.0, norm: float = 1.0) -> dict:
    return {"loss_sum": 10 * loss, "count": 10.0, "grad_norm": norm, "learning_rate": 1e-3, "bad_step": int(bad),
            "skipped_steps": skipped, "loss_mean": 3.0, "loss_std": 0.1, "log_grad_norm_mean": 0.0,
            "log_grad_norm_std": 0.1}  # fmt: skip


not_a_number = functools.partial(read, True, loss=math.nan)


def test_stop_ends_the_run_with_all_there_is_to_know_in_one_line():
    steps = BadSteps(FaultsConfig(spike_sigma=6.0))
    assert steps.check(1, read(), None) is None
    with pytest.raises(
        BadStep, match=r"^step 2: loss = nan, gradient norm = 1: not finite; no checkpoint was"
    ) as error:
        steps.check(2, not_a_number(), None)
    assert "learning rate that is too high (now 1.0e-03)" in str(error.value)
    with pytest.raises(BadStep) as error:
        steps.check(20, read(True, norm=2.0), 10)
    line = str(error.value)
    assert line.startswith(
        "step 20: loss = 3, gradient norm = 2: the gradient norm is 6.9 sigma (of its logarithm) above 1, the mean of"
    )
    assert "faults.spike_sigma = 6" in line and "the last good checkpoint is step 10" in line and "\n" not in line


def test_skip_counts_and_ends_the_run_at_the_bound_in_a_row():
    steps = BadSteps(FaultsConfig(on_bad_step="skip", max_bad_steps=3))
    assert steps.check(1, not_a_number(1), None) == "skipped"
    skipped = "step 1: loss = nan, gradient norm = 1: not finite; the update was skipped (1 in a row, 1 in all)"
    assert steps.message == skipped
    assert steps.check(2, not_a_number(2), None) == "skipped"
    assert steps.check(3, read(skipped=2), None) is None
    assert (steps.in_a_row, steps.skipped) == (0, 2)
    assert [steps.check(number, not_a_number(number - 1), None) for number in (4, 5)] == ["skipped"] * 2
    again = BadSteps(FaultsConfig(on_bad_step="skip", max_bad_steps=3), in_a_row=steps.in_a_row)
    for each in (steps, again):  # a restart between them changes nothing
        with pytest.raises(BadStep, match=r"step 6: .*3 bad steps in a row \(faults.max_bad_steps = 3\)"):
            each.check(6, not_a_number(5), None)


def test_rollbacks_are_bounded_until_a_new_checkpoint_and_need_one_to_begin_with():
    steps = BadSteps(FaultsConfig(on_bad_step="rollback", max_bad_steps=2))
    with pytest.raises(BadStep, match="nothing to go back to; no checkpoint was written yet"):
        steps.check(3, not_a_number(), None)
    assert [steps.check(number, not_a_number(), 10) for number in (15, 16)] == ["rollback"] * 2
    assert "back to the checkpoint of step 10, and on with the data after step 16" in steps.message
    steps.saved(20)
    assert [steps.check(number, not_a_number(), 20) for number in (25, 26)] == ["rollback"] * 2
    with pytest.raises(
        BadStep, match=r"step 27: .*2 rollbacks and no new checkpoint .*last good checkpoint is step 20"
    ):
        steps.check(27, not_a_number(), 20)
