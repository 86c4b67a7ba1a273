"""Several trainings in one compiled program: what a trial tries is an argument of the step, not a constant of it.

Trials that differ only in ARGUMENTS share a program. Small ones run side by side, along a leading axis K of the state:
each device takes its share of them and runs these as one (vmap), without a word with the others. A trial that wants
the whole mesh for itself is a K of one, laid out as `train` would. Either way a trial computes what `train` computes
with the same settings: tests/test_training_trials.py compares them.

Axes in names: K trials, A micro-batches, B rows, T positions.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import Config
from jaxgpt.data.dataset import Batch
from jaxgpt.parallel import sharding
from jaxgpt.parallel.compiler import compiler_options
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.training.optimizer import Arguments, arguments
from jaxgpt.training.step import Functions, TrainState, build_functions, mesh_losses

ARGUMENTS = (
    *(f"optimizer.{name}" for name in Arguments._fields if name not in ("dropout", "seed")),
    "model.dropout",  # where there is any: without, no masks are drawn
    "train.seed",
)
"""The settings that are arguments of a program, in the order of `Arguments`."""


def program_key(config: Config) -> Config:
    """Trials with equal keys share a program."""
    default = Config()
    names = {name.partition(".")[2] for name in ARGUMENTS if name.startswith("optimizer.")}
    optimizer = {name: getattr(default.optimizer, name) for name in names}
    dropout = 0.5 if config.model.dropout else 0.0
    return dataclasses.replace(
        config,
        # No warm-up: whatever else is set, a config without one is valid.
        optimizer=dataclasses.replace(config.optimizer, **optimizer | {"warmup_steps": 0}),
        model=dataclasses.replace(config.model, dropout=dropout),
        train=dataclasses.replace(config.train, seed=0),
    )


def stack(configs: Sequence[Config]) -> Arguments:
    """What the trials of one program try, as arrays [K]."""
    rows = [arguments(config) for config in configs]
    kinds = {"warmup_steps": np.int32, "seed": np.int32}
    columns = zip(Arguments._fields, zip(*rows))
    return Arguments(**{name: np.array(values, kinds.get(name, np.float32)) for name, values in columns})


@dataclasses.dataclass(frozen=True)
class TrialProgram:
    """The jitted functions of K trials. Everything but a batch has a leading axis K, on the host as on the devices."""

    init: Callable[[Arguments], TrainState]
    """Fresh states."""
    fresh_optimizer: Callable[[dict], TrainState]
    """K states at step 0 around the same given parameters, which have no axis K."""
    train_step: Callable[[Arguments, TrainState, Batch], tuple[TrainState, dict]]
    """(arguments, states, batches of (S, A, B, T)) -> (states, metrics); S = 1 for all to read the same, else K.
    The given states' memory is reused."""
    eval_step: Callable[[dict, Batch], tuple[jax.Array, jax.Array]]
    """(params, one batch of (B, T) for all) -> (summed loss in nats, summed weights), each (K,)."""
    state_shardings: TrainState
    """Of states with their axis K: what `jax.device_put` takes."""
    batch_sharding: Callable[[int], NamedSharding]
    """Of the batches of a step, given S."""
    eval_sharding: NamedSharding
    """Of an evaluation batch."""
    abstract_state: TrainState
    """Shapes, types and shardings of K states."""


def build_trial_program(config: Config, vocab_size: int, mesh: Mesh, count: int) -> TrialProgram:
    """`count` trials with the program of `config`, on the devices of `mesh`. Compiles nothing yet.

    One trial takes the whole mesh; several are shared out among its devices, each on one device: `count` must be a
    multiple of their number.

    Raises:
        UserError: as `training.step.build_program`.
    """
    if count == 1:
        return _whole_mesh(config, vocab_size, mesh)
    devices = list(mesh.devices.flat)
    assert count % len(devices) == 0, (count, len(devices))
    alone = build_mesh(dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1), devices[:1])
    functions = build_functions(config, vocab_size, alone)
    trials = jax.make_mesh((len(devices),), ("trial",), axis_types=(AxisType.Auto,), devices=devices)
    spread, same = PartitionSpec("trial"), PartitionSpec()
    share_out = functools.partial(jax.shard_map, mesh=trials, check_vma=False)
    at = lambda spec: NamedSharding(trials, spec)

    def train_step(given_K: Arguments, states: TrainState, batches: Batch):
        everyone = batches.tokens_BT.shape[0] == 1
        step = jax.vmap(functions.train_step, in_axes=(0, 0, None if everyone else 0))
        own = jax.tree.map(lambda x: x[0], batches) if everyone else batches
        specs = (spread, spread, same if everyone else spread)
        return share_out(step, in_specs=specs, out_specs=spread)(given_K, states, own)

    eval_step = share_out(jax.vmap(functions.losses, in_axes=(0, None)), in_specs=(spread, same), out_specs=spread)
    copies = lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape))
    init = share_out(jax.vmap(functions.init), in_specs=(spread,), out_specs=spread)
    fresh = lambda params: jax.tree.map(copies, functions.fresh(params))
    options = compiler_options(devices)
    return TrialProgram(
        init=jax.jit(init, out_shardings=at(spread)),
        fresh_optimizer=jax.jit(fresh, out_shardings=at(spread)),
        train_step=jax.jit(
            train_step,
            in_shardings=(at(spread), at(spread), None),
            out_shardings=at(spread),
            donate_argnums=1,
            compiler_options=options,
        ),
        eval_step=jax.jit(eval_step),
        state_shardings=jax.tree.map(lambda _: at(spread), functions.abstract_state),
        batch_sharding=lambda size: at(same if size == 1 else spread),
        eval_sharding=at(same),
        abstract_state=_abstract(functions, count, lambda leaf: at(spread)),
    )


def _whole_mesh(config: Config, vocab_size: int, mesh: Mesh) -> TrialProgram:
    """One trial, as `train` lays it out; its axis K is there for the caller alone."""
    functions = build_functions(config, vocab_size, mesh)
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    one = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[None], tree)
    longer = lambda where: NamedSharding(mesh, PartitionSpec(None, *where.spec))
    states = jax.tree.map(longer, functions.state_shardings)
    micro_batches, everywhere = longer(sharding.micro_batches_sharding(mesh)), sharding.replicated(mesh)
    losses = mesh_losses(functions.losses, mesh, functions.state_shardings.params)

    def train_step(given_K: Arguments, states: TrainState, batches: Batch):
        state, metrics = functions.train_step(first(given_K), first(states), first(batches))
        return one(state), one(metrics)

    return TrialProgram(
        init=jax.jit(lambda given_K: one(functions.init(first(given_K))), out_shardings=states),
        fresh_optimizer=jax.jit(lambda params: one(functions.fresh(params)), out_shardings=states),
        train_step=jax.jit(
            train_step,
            in_shardings=(everywhere, states, micro_batches),
            out_shardings=(states, everywhere),
            donate_argnums=1,
            compiler_options=compiler_options(list(mesh.devices.flat)),
        ),
        eval_step=jax.jit(lambda params, batch: one(losses(first(params), batch))),
        state_shardings=states,
        batch_sharding=lambda size: micro_batches,
        eval_sharding=sharding.rows_sharding(mesh),
        abstract_state=_abstract(functions, 1, lambda leaf: longer(leaf.sharding)),
    )


def _abstract(functions: Functions, count: int, where: Callable) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=where(leaf)),
        functions.abstract_state,
    )
