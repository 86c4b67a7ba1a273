"""Bad steps: a loss or gradient that is not finite, or a spike. The device keeps the state; the host decides.

On the device (`judge`, `unless`): a bad step changes neither parameters nor optimizer state, whatever
`faults.on_bad_step` says. So one program serves all three settings, a good step gives the same bits under each, and
the state in memory is the one after the last good step. The optimizer keeps its own state (`unless_bad` and
`adam_unless_bad` in optimizer.py), the step its parameters.

On the host (`BadSteps`, which reads the metrics of every step one step late):

- "stop" ends the run. Nothing after the bad step was saved, because all metrics are read before a save.
- "skip" goes on; the step is counted. `faults.max_bad_steps` in a row end the run.
- "rollback" goes on from the last verified checkpoint k < n, n being the bad step: restore k, train step k + 1 on
  the rows that would have come after n. The rows of step s are those at position s + offset; a rollback adds n - k
  to the offset (0 at first), which the metadata of later checkpoints keep. Everything follows from the checkpoint
  and the seed: a run killed after a rollback meets the same bad step again, and goes back again in the same way.
  This is PaLM's recipe (Chowdhery et al. 2022, section 5.1: restart about 100 steps before the spike, skip 200 to
  500 batches), with the distance to the checkpoint as both numbers.

The rule for spikes is that of OLMo 2 and Levanter: more than `faults.spike_sigma` standard deviations above the mean
of 128 steps. Gradient norms are compared by their logarithm, because they have a long tail upwards
(docs/reliability.md has the rate of false alarms). Only upward spikes count, only once the window is full, and bad
steps never enter the window: a loss that has moved for good ends the run by the bound on bad steps in a row.
"""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxgpt.errors import RunFailed
from jaxgpt.settings import FaultsConfig

WINDOW = 128  # good steps; the number of OLMo-core and Levanter
# The least standard deviation, as a share of the value: a window of equal values must not make rounding a spike.
STD_FLOOR = 1e-3
LEAST_NORM = 1e-30  # has a logarithm
WATCHED = ("loss", "grad_norm")
Tree = TypeVar("Tree")


# ---------------------------------------------------------------- inside the compiled step


def empty_window(spike_sigma: float) -> dict[str, jax.Array]:
    """The window of good steps: float32 [WINDOW] of each watched value, and an int32 count. {} without a spike rule."""
    if not spike_sigma:
        return {}
    return {name: jnp.zeros(WINDOW, jnp.float32) for name in WATCHED} | {"count": jnp.zeros((), jnp.int32)}


def judge(loss: jax.Array, grad_norm: jax.Array, recent: dict, spike_sigma: float) -> tuple[jax.Array, dict, dict]:
    """(bool scalar: is the step bad, the window after it, metrics that measure a spike).

    `loss` and `grad_norm` are float32 scalars. The metrics exist only with a window and are valid once it is full.
    """
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    if not recent:
        return bad, recent, {}
    metrics: dict[str, jax.Array] = {}
    size = recent["loss"].size
    full = recent["count"] >= size
    log = lambda norm: jnp.log(jnp.maximum(norm, LEAST_NORM))
    for name, value, window, floor in (
        ("loss", loss, recent["loss"], STD_FLOOR * jnp.abs(jnp.mean(recent["loss"]))),
        ("log_grad_norm", log(grad_norm), log(recent["grad_norm"]), STD_FLOOR),
    ):
        mean, std = jnp.mean(window), jnp.maximum(jnp.std(window), floor)
        bad |= full & (value > mean + spike_sigma * std)
        metrics |= {f"{name}_mean": mean, f"{name}_std": std}
    place, values = recent["count"] % size, zip(WATCHED, (loss, grad_norm), strict=True)
    with_value = {name: recent[name].at[place].set(value) for name, value in values}
    return bad, unless(bad, with_value | {"count": recent["count"] + 1}, recent), metrics


def unless(bad: jax.Array, new: Tree, old: Tree) -> Tree:
    """The tree `new`, or the bits of `old` if the step is bad. A select: a product with 0 would let a NaN through."""
    return jax.tree.map(lambda new, old: jnp.where(bad, old, new), new, old)


@jax.jit
def all_finite(tree: object) -> jax.Array:
    """A bool scalar on the device: is every number of a tree of arrays finite? For the state about to be saved.

    A finite loss and gradient can still make an update that overflows, which only the next step's loss would tell.
    """
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


# ---------------------------------------------------------------- on the host


class BadStep(RunFailed):
    """A step whose loss or gradient is no number, or a spike, and that the run may not go on from."""


class BadSteps:
    """Decides what follows a bad step. Every process of a run reads the same metrics, so all decide alike."""

    def __init__(self, faults: FaultsConfig, in_a_row: int = 0):
        """`in_a_row` is the count of the checkpoint that the run starts from, so a restart does not reset it."""
        self._faults = faults
        self.in_a_row = in_a_row  # bad steps up to the last one read; to be kept in a checkpoint's metadata
        self.skipped = 0  # steps of the whole run, restarts included, that left the state as it was
        self.rollbacks = 0  # times the run went back since the last new checkpoint
        self.message = ""  # the last bad step in one line

    def check(self, step: int, values: dict, last_good: int | None) -> str | None:
        """None for a good step; "skipped" if the run goes on; "rollback" if it goes back to `last_good`, a checkpoint.

        `values` are the metrics of `step` as Python numbers. `message` is then the line to print.

        Raises:
            BadStep: the run ends here, by the setting or by its bound.
        """
        self.skipped = values["skipped_steps"]
        if not values["bad_step"]:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        what = f"step {step}: {describe(values, self._faults.spike_sigma)}"
        limit, policy = self._faults.max_bad_steps, self._faults.on_bad_step
        if policy == "skip" and self.in_a_row < limit:
            self.message = f"{what}; the update was skipped ({self.in_a_row} in a row, {self.skipped} in all)"
            return "skipped"
        if policy == "rollback" and last_good is not None and self.rollbacks < limit:
            self.in_a_row = 0
            self.rollbacks += 1
            self.message = (
                f"{what}; back to the checkpoint of step {last_good}, and on with the data after step {step} "
                f"(rollback {self.rollbacks} since the last new checkpoint)"
            )
            return "rollback"
        ends = {
            "stop": "",
            "skip": f"; {self.in_a_row} bad steps in a row (faults.max_bad_steps = {limit})",
            "rollback": f"; {self.rollbacks} rollbacks and no new checkpoint (faults.max_bad_steps = {limit})"
            if self.rollbacks
            else "; nothing to go back to",
        }[policy]
        kept = "no checkpoint was written yet" if last_good is None else f"the last good checkpoint is step {last_good}"
        raise BadStep(
            f"{what}{ends}; {kept}. Likely causes: a learning rate that is too high (now "
            f"{values['learning_rate']:.1e}), too short a warm-up, clipping turned off (optimizer.max_grad_norm = 0), "
            "odd data at this step, or weights that were already damaged when training started."
        )

    def saved(self, step: int) -> None:
        """A new checkpoint was written: rollbacks are counted anew."""
        self.rollbacks = 0


def describe(values: dict, spike_sigma: float) -> str:
    """The loss and gradient norm of a bad step, and the rule they break."""
    found = {"loss": values["loss_sum"] / max(values["count"], 1.0), "grad_norm": values["grad_norm"]}
    numbers = f"loss = {found['loss']:.6g}, gradient norm = {found['grad_norm']:.6g}"
    if not all(math.isfinite(value) for value in found.values()):
        return f"{numbers}: not finite"
    spikes = []
    mean, std = values["loss_mean"], values["loss_std"]
    if found["loss"] > mean + spike_sigma * std:
        spikes.append(f"the loss is {(found['loss'] - mean) / std:.1f} sigma above {mean:.6g}")
    mean, std = values["log_grad_norm_mean"], values["log_grad_norm_std"]
    above = math.log(max(found["grad_norm"], LEAST_NORM)) - mean
    if above > spike_sigma * std:
        spikes.append(f"the gradient norm is {above / std:.1f} sigma (of its logarithm) above {math.exp(mean):.6g}")
    return f"{numbers}: {' and '.join(spikes)}, the mean of {WINDOW} good steps (faults.spike_sigma = {spike_sigma:g})"
