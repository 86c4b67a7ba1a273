"""Checkpoints: written by Orbax in the background, sharded; read back onto any mesh.

One step's folder holds three items: `params` and `optimizer` (arrays) and `metadata` (JSON: what the data and
the tokenizer were, and the validation loss). Weights lie apart, so a sampler never reads the moments.
"""

import logging
import math
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxgpt.config import CheckpointConfig, Config, UserError, from_json
from jaxgpt.training.step import TrainState

FOLDER = "checkpoints"
ITEMS = ("params", "optimizer", "metadata")


class Checkpoints:
    """The checkpoints of one run. Saving returns at once; the writing goes on behind the next steps."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        keep = [preservation_policy.LatestN(config.save_total_limit)]
        if config.keep_best:
            keep.append(preservation_policy.BestN(get_metric_fn=_negative_loss, n=1))
        quiet_orbax()
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
                best_fn=_negative_loss,  # Orbax stores the metrics of a step only where it is set
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
            item_names=ITEMS,
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The kept step with the lowest validation loss."""
        scored = {
            step: metrics["eval_loss"]
            for step in self.steps()
            if (metrics := self._manager.metrics(step)) and "eval_loss" in metrics
        }
        return min(scored, key=scored.get) if scored else None

    def save(self, step: int, state: TrainState, metadata: dict, eval_loss: float | None) -> None:
        """Start writing `state`; blocks only until the arrays are copied and the write before it is done."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
                metadata=ocp.args.JsonSave(metadata),
            ),
            metrics={} if eval_loss is None else {"eval_loss": eval_loss},
            force=True,
        )

    def metadata(self, step: int) -> dict:
        return self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state of `step`, laid out as `abstract_state` says, whatever mesh wrote it."""
        optimizer = {"step": abstract_state.step, "opt_state": abstract_state.opt_state}
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract_state.params),
                optimizer=ocp.args.StandardRestore(optimizer),
            ),
        )
        return TrainState(items["optimizer"]["step"], items["params"], items["optimizer"]["opt_state"])

    def wait(self) -> None:
        """Until everything started is on disk; raises what went wrong there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _negative_loss(metrics: dict) -> float:
    """Orbax keeps the highest. A checkpoint without a loss (saved when told to stop) ranks below all others."""
    return -metrics.get("eval_loss", math.inf)


def quiet_orbax() -> None:
    """Orbax logs a dozen lines a save at INFO through absl's logger; keep its warnings and errors."""
    logging.getLogger("absl").setLevel(logging.WARNING)


# ---------------------------------------------------------------- reading a run folder


def read_config(run: Path) -> Config:
    """The resolved config of a run folder."""
    path = run / "config.json"
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def finished_steps(run: Path) -> list[int]:
    """The steps whose weights lie in a run folder, in order; none where it is no run yet."""
    folders = (run / FOLDER).iterdir() if (run / FOLDER).is_dir() else ()
    return sorted(int(folder.name) for folder in folders if folder.name.isdigit() and (folder / "params").is_dir())


def find_step(path: Path) -> tuple[Path, int]:
    """(run folder, step) of a run folder or a step folder."""
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a run folder such as runs/quickstart")
    run = path.parent.parent if path.parent.name == FOLDER else path
    if not (run / "config.json").is_file() or not (run / FOLDER).is_dir():
        raise UserError(f"{path} is not a jaxgpt run or one of its steps: {run} holds no config.json and {FOLDER}/")
    steps = finished_steps(run)
    if not steps:
        raise UserError(f"{run / FOLDER} holds no finished checkpoint yet")
    if run == path:
        return run, steps[-1]
    if not path.name.isdigit() or int(path.name) not in steps:
        raise UserError(f"{path} is not a finished checkpoint; {run / FOLDER} holds steps {steps}")
    return run, int(path.name)


def restore_params(run: Path, step: int, shapes: dict, sharding) -> dict:
    """The weights alone, laid out by `sharding`: one for all arrays, or a tree of them."""
    quiet_orbax()
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, shapes)
    target = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, sharding)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((run / FOLDER / str(step) / "params").absolute(), target)


def whole(array: jax.Array) -> np.ndarray:
    """All of an array on this host, however it is spread; every process has to call this.

    Only where other hosts hold parts of it do the devices exchange them, so a single host needs no device memory.
    """
    if not array.is_fully_addressable:
        everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
        array = jax.jit(lambda x: x, out_shardings=everywhere)(array).addressable_data(0)
    return np.asarray(array)
