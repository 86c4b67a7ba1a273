"""One step of training as a pure function, and the single place where it is jitted.

Loss and gradients are each device's own program over its own rows, with the collectives written out
(parallel/sharding.py); the optimizer works on arrays of the whole mesh.

`Program` holds the compiled functions of an experiment on a mesh: init, train_step, eval_step. State and
batch come in and go out with explicit shardings, and the state is donated, so it lives in memory once.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxgpt.config import Config, with_settings
from jaxgpt.data.dataset import Batch
from jaxgpt.errors import UserError
from jaxgpt.model import gpt2
from jaxgpt.model.backend import PLAIN, Backend
from jaxgpt.model.backend_choice import choose_backend
from jaxgpt.model.loss import cross_entropy
from jaxgpt.parallel import sharding
from jaxgpt.parallel.compiler import compiler_options, initial_values_options
from jaxgpt.training import bad_steps
from jaxgpt.training.muon import Share
from jaxgpt.training.optimizer import Arguments, arguments, build_optimizer, schedule

Params = dict  # a tree of arrays, as model/gpt2.py lays it out: {"wte": (V, D), "blocks": {...: (L, ...)}, ...}
Dropout = tuple[float | jax.Array, jax.Array | None]  # (rate, key); no key, no dropout
Loss = tuple[jax.Array, jax.Array]  # (summed loss in nats, summed weights): float32 scalars
DeviceLosses = Callable[..., Loss]  # (params, batch of (B, T), dropout) -> the `Loss` of a device's own rows
Gradients = Callable[[Params, Batch, Dropout], tuple[jax.Array, jax.Array, Params]]
"""(params, batch of (A, B, T), dropout) -> (loss sum, weight sum, gradients of the loss sum) over all devices."""
Step = Callable[[Arguments, "TrainState", Batch], tuple["TrainState", dict[str, jax.Array]]]
"""(arguments, state, batch of (A, B, T)) -> (state, metrics)."""
Constrain = Callable[[Params, Params], Params]  # (arrays, shardings) -> the arrays, laid out so


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes. Its values after step n are a function of the seed and n alone."""

    step: jax.Array
    """int32 scalar: steps done, bad ones included. It names the position in the data and the dropout masks."""
    params: Params
    opt_state: optax.OptState
    recent: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    """Loss and gradient norm of the last good steps (bad_steps.py); {} without a rule for spikes."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted functions of one experiment on one mesh."""

    init: Callable[[], TrainState]  # a fresh state, each device computing only its own shards
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    """(state, batch of (A, B, T)) -> (state, metrics); the given state's memory is reused."""
    eval_step: Callable[[Params, Batch], Loss]  # (params, batch of (B, T)) -> (summed loss in nats, summed weights)
    abstract_state: TrainState  # shapes, types and shardings of the state: what a checkpoint is restored into
    fresh_optimizer: Callable[[Params], TrainState]  # a state at step 0 around given parameters
    attention: str  # how attention is computed on these devices, for the log


def build_program(config: Config, vocab_size: int, mesh: Mesh) -> Program:
    """Lay the model of `config` on `mesh`. `config.train.max_steps` must be resolved. Compiles nothing yet.

    Raises:
        UserError: the mesh does not divide the model, or the attention asked for cannot run on its devices.
    """
    parts = build_functions(config, vocab_size, mesh)
    given, devices = arguments(config), list(mesh.devices.flat)
    states, everywhere = parts.state_shardings, sharding.replicated(mesh)
    return Program(
        init=jax.jit(
            functools.partial(parts.init, given), out_shardings=states, compiler_options=initial_values_options(devices)
        ),
        train_step=jax.jit(
            functools.partial(parts.train_step, given),
            in_shardings=(states, sharding.micro_batches_sharding(mesh)),
            out_shardings=(states, everywhere),
            donate_argnums=0,
            compiler_options=compiler_options(devices),
        ),
        eval_step=_jitted_losses(parts.losses, mesh, states.params),
        abstract_state=parts.abstract_state,
        # The state takes over the given parameters' memory.
        fresh_optimizer=jax.jit(parts.fresh, in_shardings=(states.params,), out_shardings=states, donate_argnums=0),
        attention=parts.attention,
    )


@dataclasses.dataclass(frozen=True)
class Functions:
    """The functions of a program before they are compiled."""

    init: Callable[[Arguments], TrainState]
    train_step: Step
    fresh: Callable[[Params], TrainState]  # a state at step 0 around given parameters
    losses: DeviceLosses
    abstract_state: TrainState
    state_shardings: TrainState
    attention: str


def build_functions(config: Config, vocab_size: int, mesh: Mesh) -> Functions:
    """The functions of the experiment `config` on `mesh`. Raises as `build_program` does."""
    sigma = config.faults.spike_sigma
    laid = lay_out(config, vocab_size, mesh)
    shapes, param_shardings = laid.shapes, laid.param_shardings
    moment_shardings = sharding.zero1_shardings(param_shardings, shapes, mesh) if config.mesh.zero1 else param_shardings
    everywhere = sharding.replicated(mesh)
    share = sharding.share_out(mesh)
    optimizer = build_optimizer(config, arguments(config), share)

    def fresh(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), bad_steps.empty_window(sigma))

    def init(given: Arguments) -> TrainState:
        return fresh(gpt2.init_params(config.model, vocab_size, jax.random.key(given.seed)))

    abstract = jax.eval_shape(functools.partial(init, arguments(config)))
    state_shardings: TrainState = dataclasses.replace(  # a state of shardings in place of arrays
        abstract,
        step=everywhere,
        params=param_shardings,
        opt_state=sharding.like_params(abstract.opt_state, moment_shardings, otherwise=everywhere),
        recent=jax.tree.map(lambda _: everywhere, abstract.recent),
    )
    with_sharding = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    losses = functools.partial(summed_loss, config, vocab_size, laid.gather, backend=laid.backend)
    gradients = mesh_gradients(losses, mesh, param_shardings, moment_shardings)
    # One device has nothing to share out.
    constrain = jax.lax.with_sharding_constraint if mesh.size > 1 else lambda tree, shardings: tree
    return Functions(
        init,
        make_train_step(config, gradients, share, constrain, param_shardings, moment_shardings),
        fresh,
        losses,
        jax.tree.map(with_sharding, abstract, state_shardings),
        state_shardings,
        laid.attention,
    )


def build_eval_step(config: Config, vocab_size: int, mesh: Mesh) -> tuple[Callable[[Params, Batch], Loss], Params]:
    """(`Program.eval_step`, the shardings of the parameters): for a model that is not trained here.

    Raises as `build_program` does.
    """
    laid = lay_out(config, vocab_size, mesh)
    losses = functools.partial(summed_loss, config, vocab_size, laid.gather, backend=laid.backend)
    return _jitted_losses(losses, mesh, laid.param_shardings), laid.param_shardings


@dataclasses.dataclass(frozen=True)
class ModelLayout:
    """A model on a mesh: shapes, shardings, and the operations that its devices compute with."""

    shapes: Params
    param_shardings: Params
    backend: Backend
    gather: Callable[[Params], Params]
    """Turns parameters that are split over fsdp into whole ones, inside a device's own program."""
    attention: str


def lay_out(config: Config, vocab_size: int, mesh: Mesh) -> ModelLayout:
    """Lay the model of `config` on `mesh`. Raises as `build_program` does."""
    _, shapes, axes = gpt2.abstract_model(config.model, vocab_size)
    param_shardings = sharding.param_shardings(axes, shapes, mesh)
    backend, attention = choose_backend(config.model, mesh.devices.flat[0].platform, config.block_size)
    backend = dataclasses.replace(backend, attend=sharding.over_heads(backend.attend, mesh))
    gather = sharding.gather_over_fsdp(param_shardings, mesh, config.model.dtype)
    return ModelLayout(shapes, param_shardings, backend, gather, attention)


def _jitted_losses(losses: DeviceLosses, mesh: Mesh, param_shardings: Params) -> Callable[[Params, Batch], Loss]:
    return jax.jit(
        mesh_losses(losses, mesh, param_shardings),
        in_shardings=(param_shardings, sharding.rows_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )


def summed_loss(
    config: Config,
    vocab_size: int,
    gather: Callable[[Params], Params],
    params: Params,
    batch: Batch,
    dropout: Dropout = gpt2.NO_DROPOUT,
    backend: Backend = PLAIN,
) -> Loss:
    """The `Loss` of a batch of (B, T). `gather` makes parameters whole that are split over devices."""
    outer = gather({name: value for name, value in params.items() if name != "blocks"})
    model = gpt2.bind(config.model, vocab_size, {**outer, "blocks": params["blocks"]})
    hidden_BTD = model.hidden(
        batch.tokens_BT,
        segments_BT=batch.segments_BT,
        dropout=dropout,
        gather_block=lambda block: gather({"blocks": block})["blocks"],
        backend=backend,
    )
    with jax.named_scope("loss"):
        return cross_entropy(
            hidden_BTD, outer["wte"], batch.targets_BT, batch.weights_BT, vocab_size, backend.loss_rows,
            backend.loss_gradients,
        )  # fmt: skip


def mesh_losses(losses: DeviceLosses, mesh: Mesh, param_shardings: Params) -> Callable[[Params, Batch], Loss]:
    """(params, batch of (B, T)) -> the `Loss` of the rows of all devices."""

    def device_losses(params: Params, batch: Batch) -> Loss:
        return jax.lax.psum(losses(params, batch), sharding.summed_axes(mesh))

    rows = sharding.rows_sharding(mesh).spec
    return sharding.per_device(
        device_losses, mesh, in_specs=(sharding.specs(param_shardings), rows), out_specs=PartitionSpec()
    )


def mesh_gradients(losses: DeviceLosses, mesh: Mesh, param_shardings: Params, result_shardings: Params) -> Gradients:
    """The `Gradients` of `losses`: each device sums over its micro-batches, then all devices are summed once."""
    axes = sharding.summed_axes(mesh)

    def device_gradients(params: Params, batch: Batch, dropout: Dropout) -> tuple[jax.Array, jax.Array, Params]:
        rate, key = dropout
        if key is not None and axes:  # other rows, other masks
            key = jax.random.fold_in(key, jax.lax.axis_index(axes))

        def micro_loss(params: Params, micro: Batch, index: int | jax.Array) -> Loss:
            return losses(params, micro, (rate, None if key is None else jax.random.fold_in(key, index)))

        loss_sum, count, grads = _accumulate(micro_loss, params, batch)
        with jax.named_scope("sum_gradients"):
            grads = sharding.sum_gradients(grads, param_shardings, result_shardings, mesh)
        return *jax.lax.psum((loss_sum, count), axes), grads

    everywhere, rows = PartitionSpec(), sharding.micro_batches_sharding(mesh).spec
    return sharding.per_device(
        device_gradients,
        mesh,
        in_specs=(sharding.specs(param_shardings), rows, everywhere),
        out_specs=(everywhere, everywhere, sharding.specs(result_shardings)),
    )


def make_train_step(
    config: Config,
    gradients: Gradients,
    share: Share,
    constrain: Constrain,
    param_shardings: Params,
    moment_shardings: Params,
) -> Step:
    """The pure function (arguments, state, batch) -> (state, metrics).

    A bad step (bad_steps.py) keeps the bits of parameters and optimizer state, its counters among them. So the schedule
    counts updates, not steps: after k skipped steps the learning rate is the one of k steps before, and a run that
    skipped k steps ends k updates short of its schedule's end. `learning_rate` in the metrics is that of the
    update, made or skipped.
    """

    def train_step(given: Arguments, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        optimizer = build_optimizer(config, given, share)
        learning_rate = schedule(config.optimizer, config.max_steps, given.learning_rate, given)
        dropout: Dropout = gpt2.NO_DROPOUT
        if config.model.dropout:
            # A function of seed and step alone, so a resumed run draws the same masks.
            dropout = (given.dropout, jax.random.fold_in(jax.random.key(given.seed), state.step))
        loss_sum, count, grads = gradients(state.params, batch, dropout)
        with jax.named_scope("optimizer"):
            # Sums first, one division: exact for micro-batches with different numbers of weighted tokens.
            grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1.0), grads)
            grad_norm = optax.tree_utils.tree_norm(grads)
            loss = loss_sum / jnp.maximum(count, 1.0)
            bad, recent, window = bad_steps.judge(loss, grad_norm, state.recent, config.faults.spike_sigma)
            if recent:  # a step whose rows all weigh nothing is nothing to compare others with
                recent = bad_steps.unless(count == 0.0, recent, state.recent)
            # Under ZeRO-1 each device updates its part of the parameters, and then all get the whole.
            old = constrain(state.params, moment_shardings)
            updates, opt_state = optimizer.update(grads, state.opt_state, old, bad=bad)
            params = bad_steps.unless(bad, optax.apply_updates(old, updates), old)
            params = constrain(constrain(params, moment_shardings), param_shardings)  # select first, then gather
        updates_before = updates_done(state.opt_state)
        metrics = {
            "loss_sum": loss_sum,
            "count": count,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(learning_rate(updates_before), jnp.float32),
            "batch_hash": batch_hash(batch),
            "bad_step": bad.astype(jnp.int32),
            "skipped_steps": state.step - updates_before + bad,  # of the whole run: the state knows, restarts or not
            **window,
        }
        return TrainState(state.step + 1, params, opt_state, recent), metrics

    return train_step


def updates_done(opt_state: optax.OptState) -> jax.Array:
    """int32 scalar: updates that the optimizer has made. Its parts count each by itself, and all alike."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]


def _accumulate(
    micro_loss: Callable[[Params, Batch, int | jax.Array], Loss], params: Params, batch: Batch
) -> tuple[jax.Array, jax.Array, Params]:
    """(loss sum, weight sum, gradient of the loss sum) over the A micro-batches of a batch of (A, B, T)."""
    gradient = jax.value_and_grad(micro_loss, has_aux=True)
    micro_batches = batch.tokens_BT.shape[0]
    if micro_batches == 1:
        (loss_sum, count), grads = gradient(params, jax.tree.map(lambda x: x[0], batch), 0)
        return loss_sum, count, grads

    def add(total: tuple, xs: tuple[Batch, jax.Array]) -> tuple[tuple, None]:
        (loss_sum, count), grads = gradient(params, *xs)
        return jax.tree.map(jnp.add, total, (loss_sum, count, grads)), None

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, start, (batch, jnp.arange(micro_batches)))
    return total


def batch_hash(batch: Batch) -> jax.Array:
    """uint32 that names the batch's tokens and targets in their order, the same on every mesh and for every split.

    Weights and segments are no part of it: they follow from the same rows, which the data's fingerprint vouches for,
    and a run that goes on with a skip list can be seen to read the same rows as before.
    """
    tokens, targets = (x.reshape(-1).astype(jnp.uint32) for x in (batch.tokens_BT, batch.targets_BT))
    place = 2 * jnp.arange(tokens.size, dtype=jnp.uint32) + 1  # odd: invertible modulo 2^32
    mixed = (tokens * jnp.uint32(0x9E3779B1)) ^ (targets * jnp.uint32(0x85EBCA77))
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE3D)
    return jnp.sum(mixed * place, dtype=jnp.uint32)  # modulo 2^32: exact in any order


def resolve_batch(config: Config, batch_shards: int) -> Config:
    """`config` with gradient_accumulation_steps and global_batch_size filled in for this many batch shards.

    Raises:
        UserError: the given numbers do not fit together; names them.
    """
    per_device = config.per_device_train_batch_size
    rows = per_device * batch_shards
    total, accumulation = config.train.global_batch_size, config.train.gradient_accumulation_steps
    if total is None:
        total = rows * (accumulation or 1)
    elif total % rows:
        raise UserError(
            f"train.global_batch_size = {total} is not a multiple of train.per_device_train_batch_size x "
            f"devices = {per_device} x {batch_shards} = {rows}"
        )
    elif accumulation not in (None, total // rows):
        raise UserError(
            f"train.gradient_accumulation_steps = {accumulation}, but train.global_batch_size = {total} is "
            f"{total // rows} times the {rows} sequences that the devices take at once; leave one of them out"
        )
    return with_settings(config, train_gradient_accumulation_steps=total // rows, train_global_batch_size=total)


def resolve_steps(config: Config, windows: int) -> Config:
    """`config` with the settings that depend on the number of steps: num_train_epochs passes over `windows` windows.

    Raises:
        UserError: the steps are fewer than another setting needs.
    """
    epochs, steps = config.train.num_train_epochs, config.train.max_steps
    try:
        found = steps or max(round(epochs * windows / config.global_batch_size), 1)
        config = with_settings(config, data_block_size=config.block_size, train_max_steps=found)
    except UserError as error:
        raise UserError(f"{error}" if steps else f"{error}, which train.num_train_epochs = {epochs:g} gives") from None
    return with_settings(
        config,
        tokenizer_vocab_size=config.tokenizer.entries,
        optimizer_learning_rate=config.optimizer.peak_learning_rate,
        optimizer_warmup_steps=config.warmup_steps,
        eval_eval_steps=config.eval_steps,
        checkpoint_save_steps=config.save_steps,
    )
