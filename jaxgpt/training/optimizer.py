"""Learning-rate schedules and optimizers, put together from Optax."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config import Config
from jaxgpt.parallel.sharding import key_path
from jaxgpt.settings import OptimizerConfig
from jaxgpt.training import bad_steps, muon

# Matrices and embeddings are decayed, biases and LayerNorms are not (the mask of nanoGPT and of GPT-3).
DECAYED = ("kernel", "wte", "wpe")


class Arguments(NamedTuple):
    """The settings that a compiled step can take as arguments, so that trials share it: numbers, or traced scalars."""

    learning_rate: float | jax.Array
    weight_decay: float | jax.Array
    warmup_steps: int | jax.Array
    min_lr_rate: float | jax.Array
    adam_beta1: float | jax.Array
    adam_beta2: float | jax.Array
    adam_epsilon: float | jax.Array
    dropout: float | jax.Array
    seed: int | jax.Array


def arguments(config: Config) -> Arguments:
    """The `Arguments` that `config` sets."""
    optimizer = config.optimizer
    named = {name: getattr(optimizer, name) for name in Arguments._fields if hasattr(optimizer, name)}
    named |= {"learning_rate": optimizer.peak_learning_rate, "warmup_steps": config.warmup_steps}
    return Arguments(**named, dropout=config.model.dropout, seed=config.train.seed)


def schedule(
    config: OptimizerConfig, max_steps: int, peak: float | jax.Array, given: Arguments
) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of step n (from 0): a linear warm-up, then the chosen shape down to min_lr_rate x peak.

    Optax's shapes are taken over a length of 1 and asked at the part that is done, because Optax wants to know a length
    before the program runs, and the warm-up may be an argument of the program.
    """
    warmup = given.warmup_steps
    rest = jnp.maximum(max_steps - warmup, 1)
    floor = given.min_lr_rate * peak
    decay = max(round(config.decay_rate * max_steps), 1)
    line, cosine = optax.linear_schedule(peak, floor, 1), optax.cosine_decay_schedule(peak, 1, alpha=given.min_lr_rate)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": lambda n: line(n / rest),
        "cosine": lambda n: cosine(n / rest),
        # Vaswani et al. 2017, section 5.3, scaled so that the curve leaves the warm-up at its peak.
        "inverse_sqrt": lambda n: peak * jax.lax.rsqrt(1.0 + jnp.maximum(n, 0) / jnp.maximum(warmup, 1)),
        # Hu et al. 2024 (MiniCPM), section 4: hold the peak, decay over the last part.
        "warmup_stable_decay": lambda n: line((n - (rest - decay)) / decay),
    }[config.lr_scheduler_type]
    # Step 0 already moves: the warm-up counts 1 / (w + 1), 2 / (w + 1), ...
    rise = optax.linear_schedule(peak / (warmup + 1), peak, 1)
    return optax.join_schedules([lambda n: rise(n / jnp.maximum(warmup, 1)), after], [warmup])


def build_optimizer(
    config: Config, given: Arguments, share: muon.Share = lambda function: function
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019), or Muon for matrices and Adam for the rest.

    `update(grads, state, params, bad=...)`: where the bool scalar `bad` is true, the state keeps its bits. Muon's
    products are shared out by `share`.
    """
    options, rate = config.optimizer, schedule(config.optimizer, config.max_steps, given.learning_rate, given)
    clip = optax.clip_by_global_norm(options.max_grad_norm) if options.max_grad_norm else optax.identity()
    direction = adam_unless_bad(given.adam_beta1, given.adam_beta2, given.adam_epsilon, options.adam_mu_dtype)
    decay = optax.add_decayed_weights(given.weight_decay, decay_mask)  # with the two around it: optax.adamw
    if options.name == "muon":
        matrices = muon.scale_by_muon(given.adam_beta1, options.adam_mu_dtype, config.model.dtype, share)
        direction = optax.partition({"muon": matrices, "adam": direction}, muon.rules)
        decay = cautious_decay(given.weight_decay)
    return optax.chain(clip, optax.chain(direction, decay, unless_bad(optax.scale_by_learning_rate(rate))))


def cautious_decay(weight_decay: float | jax.Array) -> optax.GradientTransformation:
    """Weight decay of the entries that the update shrinks too (Chen et al. 2025, "Cautious weight decay")."""

    def decayed(updates: dict, params: dict) -> dict:
        add = lambda yes, u, p: u + jnp.where(u * p > 0, weight_decay * p, 0.0) if yes else u
        return jax.tree.map(add, decay_mask(params), updates, params)

    return optax.stateless(decayed)


def adam_unless_bad(
    b1: float | jax.Array, b2: float | jax.Array, eps: float | jax.Array, mu_dtype: str | None
) -> optax.GradientTransformationExtraArgs:
    """`unless_bad(optax.scale_by_adam(...))`, faster: the moments are selected where they are computed.

    The direction then follows from what is kept. Selected afterwards, new and selected moments are both needed: a CPU
    computes them twice and copies the old ones, 2 to 3 % of a step.
    """

    def update(
        grads: dict, state: optax.ScaleByAdamState, params: dict | None = None, *, bad: jax.Array
    ) -> tuple[dict, optax.ScaleByAdamState]:
        count = bad_steps.unless(bad, optax.safe_increment(state.count), state.count)
        mu = bad_steps.unless(bad, optax.tree.update_moment(grads, state.mu, b1, 1), state.mu)
        nu = bad_steps.unless(bad, optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2), state.nu)
        mu_hat, nu_hat = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        return direction, optax.ScaleByAdamState(count, optax.tree.cast(mu, mu_dtype), nu)

    init = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype).init
    return optax.GradientTransformationExtraArgs(init, update)


def unless_bad(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`rule` with an `update` that takes `bad`, a bool scalar: true keeps the bits of the state (bad_steps.py)."""

    def update(
        grads: dict, state: optax.OptState, params: dict | None = None, *, bad: jax.Array
    ) -> tuple[dict, optax.OptState]:
        updates, new = rule.update(grads, state, params)
        return updates, bad_steps.unless(bad, new, state)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def decay_mask(params: dict) -> dict:
    """True for the arrays that weight decay shrinks."""
    return jax.tree_util.tree_map_with_path(lambda path, _: key_path(path)[-1] in DECAYED, params)
