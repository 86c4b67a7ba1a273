"""Muon for the weight matrices of GPT-2 (Jordan et al. 2024): the updates are orthogonalised momentum.

One update of a matrix W with gradient G, momentum M and rate r:

    M <- mu M + (1 - mu) G
    N  = mu M + (1 - mu) G             Nesterov's step
    O  = U V^T, where N = U S V^T      the polar factor, by products of matrices (`polar_factors`)
    O <- O with neurons of equal size  each output's running mean square divided out (NorMuon, Li et al. 2025)
    W <- W - r sqrt(outputs / inputs) O

The factor makes the change of a layer's output as large as its rate says, whatever its width (Bernstein & Newhouse
2024, "Modular duality in deep learning"), so that a rate found with a small model may serve a large one.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt.parallel.sharding import key_path
from jaxgpt.training import bad_steps

# Which axes of a stacked kernel are the matrix: (inputs, outputs). The other axes (layers; query, key and value) count
# the matrices.
MATRICES: dict[tuple[str, ...], tuple[tuple[int, ...], tuple[int, ...]]] = {
    ("attn", "c_attn"): ((1,), (3, 4)),  # (L, D, 3, N, H): D -> N H
    ("attn", "c_proj"): ((1, 2), (3,)),  # (L, N, H, D): N H -> D
    ("mlp", "c_fc"): ((1,), (2,)),  # (L, D, F)
    ("mlp", "c_proj"): ((1,), (2,)),  # (L, F, D)
}

# Amsel et al. 2025, "The Polar Express", algorithm 1: the quintics a x + b x^3 + c x^5 that together bring all singular
# values in [0.001, 1] nearest to 1, each made safe against rounding by 1 % (section 4.4).
QUINTICS = tuple(
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
)
NEURON_DECAY = 0.95  # of the running mean square of each output (NorMuon)
LEAST_NORM = 1e-7  # keeps a gradient of zeros at zero

Share = Callable[[Callable[[jax.Array], jax.Array]], Callable[[jax.Array], jax.Array]]
"""Turns a function of a stack of matrices (M, I, O) into one whose work the devices share; sharding.share_out."""


class MuonState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # as in Optax's states; a tuple's own `count` is not used
    """int32 scalar: updates made."""
    mu: dict
    """The momentum, laid out as the parameters."""
    nu: tuple[jax.Array, ...]
    """Running mean squares (M, 1, O) of the outputs of each stack of matrices, in the order of the parameters."""


def scale_by_muon(
    momentum: float | jax.Array, mu_dtype: str, dtype: str, share: Share
) -> optax.GradientTransformationExtraArgs:
    """Updates of the kernels in `MATRICES`, of the size that the module's docstring says, for a rate of 1.

    `momentum` is mu; M is kept in `mu_dtype`, the products are computed in `dtype` and shared out by `share`. The state
    is selected where it is computed, as in `optimizer.adam_unless_bad`.
    """

    def init(params: dict) -> MuonState:
        stacks = [jax.eval_shape(lambda x, path=path: _stack(path, x), x) for path, x in _leaves(params)]
        nu = tuple(jnp.zeros((stack.shape[0], 1, stack.shape[2])) for stack in stacks)
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=mu_dtype), nu)

    def update(grads: dict, state: MuonState, params: dict | None = None, *, bad: jax.Array) -> tuple[dict, MuonState]:
        count = bad_steps.unless(bad, optax.safe_increment(state.count), state.count)
        mu = bad_steps.unless(bad, optax.tree.update_moment(grads, state.mu, momentum, 1), state.mu)
        ahead = optax.tree.update_moment(grads, mu, momentum, 1)
        leaves, tree = _leaves(ahead), jax.tree.structure(ahead)
        factors = polar_factors([_stack(path, x) for path, x in leaves], dtype, share)
        correction = 1 - NEURON_DECAY ** count.astype(jnp.float32)
        updates, nu = [], []
        for (path, x), factor, old in zip(leaves, factors, state.nu, strict=True):
            new = NEURON_DECAY * old + (1 - NEURON_DECAY) * jnp.mean(factor**2, axis=1, keepdims=True)
            new = bad_steps.unless(bad, new, old)
            nu.append(new)
            updates.append(_unstack(path, _evened(factor, new / correction), x.shape))
        return jax.tree.unflatten(tree, updates), MuonState(count, optax.tree.cast(mu, mu_dtype), tuple(nu))

    return optax.GradientTransformationExtraArgs(init, update)


def _evened(factor_MIO: jax.Array, mean_square_M1O: jax.Array) -> jax.Array:
    """The factors with outputs of equal size, as large in all as before, times sqrt(outputs / inputs)."""
    size = lambda x: jnp.sqrt(jnp.sum(x**2, axis=(1, 2), keepdims=True))
    evened = factor_MIO * jax.lax.rsqrt(mean_square_M1O + LEAST_NORM**2)
    inputs, outputs = factor_MIO.shape[1:]
    return evened * (size(factor_MIO) / (size(evened) + LEAST_NORM)) * math.sqrt(outputs / inputs)


def polar_factors(stacks: list[jax.Array], dtype: str, share: Share) -> list[jax.Array]:
    """U V^T of every matrix U S V^T in stacks (M, I, O), in float32. Matrices of one shape are computed together."""
    wide = [x.mT if x.shape[1] > x.shape[2] else x for x in stacks]
    found: list[jax.Array] = list(wide)
    for shape in dict.fromkeys(x.shape[1:] for x in wide):
        members = [i for i, x in enumerate(wide) if x.shape[1:] == shape]
        together = share(lambda x: _polar(x, dtype))(jnp.concatenate([wide[i] for i in members]))
        ends = list(itertools.accumulate(wide[i].shape[0] for i in members))
        for i, part in zip(members, jnp.split(together, ends[:-1]), strict=True):
            found[i] = part.mT if stacks[i].shape[1] > stacks[i].shape[2] else part
    return found


def _polar(x_MIO: jax.Array, dtype: str) -> jax.Array:
    """The polar factors of matrices with no more rows than columns."""
    norm = jnp.sqrt(jnp.sum(x_MIO.astype(jnp.float32) ** 2, axis=(1, 2), keepdims=True))
    x_MIO = (x_MIO / (1.02 * norm + LEAST_NORM)).astype(dtype)  # no singular value above 1, rounding included
    for a, b, c in QUINTICS:
        gram = jnp.einsum("mij,mkj->mik", x_MIO, x_MIO)
        x_MIO = a * x_MIO + jnp.einsum("mij,mjk->mik", b * gram + c * jnp.einsum("mij,mjk->mik", gram, gram), x_MIO)
    return x_MIO.astype(jnp.float32)


def rules(params: dict) -> dict:
    """Which rule updates each array: "muon" or "adam"."""
    rule = lambda names: "muon" if names[-1] == "kernel" and names[-3:-1] in MATRICES else "adam"
    return jax.tree_util.tree_map_with_path(lambda path, _: rule(key_path(path)), params)


def _leaves(tree: dict) -> list[tuple[jax.tree_util.KeyPath, jax.Array]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _order(path: jax.tree_util.KeyPath, ndim: int) -> tuple[tuple[int, ...], int, int]:
    inputs, outputs = MATRICES[key_path(path)[-3:-1]]
    batch = tuple(axis for axis in range(ndim) if axis not in inputs + outputs)
    return batch + inputs + outputs, len(batch), len(batch) + len(inputs)


def _stack(path: jax.tree_util.KeyPath, x: jax.Array) -> jax.Array:
    """A stacked kernel as matrices (M, I, O)."""
    order, first, second = _order(path, x.ndim)
    shape = [x.shape[axis] for axis in order]
    return x.transpose(order).reshape(math.prod(shape[:first]), math.prod(shape[first:second]), -1)


def _unstack(path: jax.tree_util.KeyPath, stack: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Matrices (M, I, O) as the stacked kernel of `shape` that they were."""
    order, _, _ = _order(path, len(shape))
    back = sorted(range(len(shape)), key=order.__getitem__)
    return stack.reshape([shape[axis] for axis in order]).transpose(back)
