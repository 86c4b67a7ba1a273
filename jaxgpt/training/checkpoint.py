"""Checkpoints: written by Orbax in the background, sharded; read back onto any mesh; each file's digest on record.

    checkpoints/STEP/  params/  optimizer/  metadata.json  manifest.sha256

Weights lie apart, so a sampler never reads the moments. metadata.json says what the data and the tokenizer were, and
the validation loss. A step is filled under another name (.saving-STEP) and gets its own once its manifest is on disk,
so a folder with a number for a name is complete; older steps are deleted only after that.
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxgpt.config import Config, read_json
from jaxgpt.errors import STORAGE_ERRNOS, StorageFailed, UserError
from jaxgpt.failpoints import failpoint
from jaxgpt.settings import CheckpointConfig
from jaxgpt.storage import manifest
from jaxgpt.storage.files import fsync, write_file
from jaxgpt.training.metrics import METRICS_FILE
from jaxgpt.training.step import TrainState

FOLDER = "checkpoints"
METADATA = "metadata.json"
CONFIG = "config.json"
SUMMARY = "summary.json"  # until the end of a start it says no more than that there is a checkpoint, or none yet
EVALUATIONS = "evaluations.jsonl"  # a line for each `evaluate`, which reporting/ writes
BEST = "@best"  # after a run's folder: its checkpoint with the lowest validation loss
SAVING, DELETING = ".saving-", ".deleting-"  # begin the names of folders that are not checkpoints yet, or any more
UNFINISHED = re.compile(r"\.(saving|deleting)-[0-9]+(\.orbax.*)?")  # Orbax adds to the name while it writes
RETRY_AFTER = (1.0, 5.0, 15.0)  # seconds before a save that failed is tried again; then the run stops
# What Orbax and TensorStore raise when storage fails: ENOSPC, for one, comes as a ValueError or a runtime error.
STORAGE_ERRORS = (OSError, ValueError, RuntimeError, TimeoutError)


logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Saving returns at once; the writing goes on behind the next steps."""

    def __init__(self, workdir: Path, config: CheckpointConfig, is_writer: bool = True):
        """`is_writer`: this process puts the folders in their places; exactly one of a run's processes does."""
        quiet_orbax()
        self._run = workdir
        self._folder = (workdir / FOLDER).absolute()
        self._config = config
        self._is_writer = is_writer
        handlers = {item: ocp.StandardCheckpointHandler() for item in ("params", "optimizer", "recent")}
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None
        self.on_disk = self.latest_step()  # the newest checkpoint of this start, or the one it began with
        self._failures = 0  # in a row
        self._retry_at = math.inf

    def steps(self) -> list[int]:
        return finished_steps(self._run)

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        return best_step(self._run)

    def metadata(self, step: int) -> dict:
        return read_metadata(self._run, step)

    # ------------------------------------------------------------ saving

    def save(self, step: int, state: TrainState, metadata: dict, eval_loss: float | None, surely: bool = False) -> None:
        """Start writing `state`; blocks only until the arrays are copied and the write before it is done.

        A failure is reported in a line and `poll` says when to try again. With `surely` this returns only when the
        checkpoint is on disk.

        Raises:
            StorageFailed: the last of the attempts in a row failed; earlier checkpoints are as they were.
        """
        while True:
            self._settle()
            try:
                self._start(step, state, {**metadata, "step": step, "eval_loss": eval_loss})
            except STORAGE_ERRORS as error:
                self._note_failure(step, error)
            if not surely:
                return
            self._settle()
            if self._retry_at == math.inf:
                return
            time.sleep(max(self._retry_at - time.monotonic(), 0.0))

    def poll(self) -> bool:
        """True if a save has failed and it is time to try again; does not wait. Raises as `save` does."""
        if self._saving and self._saving.done():
            self._settle()
        return time.monotonic() >= self._retry_at

    def wait(self) -> None:
        """Wait until everything started is on disk. Raises as `save` does."""
        self._settle()
        if self._retry_at < math.inf:
            raise self._storage_failed()

    def close(self) -> None:
        """Wait for what is being written and end the threads. What failed by now is reported, not raised."""
        if self._saving and self._saving.exception():
            self._remove_partial()
        self._background.shutdown()
        try:
            self._orbax.close()
        except STORAGE_ERRORS as error:
            logging.getLogger(__name__).warning("closing the checkpoints: %s", _reason(error))

    def _start(self, step: int, state: TrainState, metadata: dict) -> None:
        failpoint("save.begin")
        self._retry_at = math.inf
        self._folder.mkdir(parents=True, exist_ok=True)
        self._record_first()
        staging = self._folder / f"{SAVING}{step}"
        items = {item: ocp.args.StandardSave(value) for item, value in _items(state).items()}
        self._orbax.save(staging, args=ocp.args.Composite(**items), force=True)
        failpoint("save.started")
        self._saving = self._background.submit(self._finish, step, staging, metadata)

    def _finish(self, step: int, staging: Path, metadata: dict) -> int:
        """Write metadata and manifest, rename, delete old steps; in the background thread."""
        self._orbax.wait_until_finished()
        failpoint("save.arrays")
        if not self._is_writer:
            return step
        for path in (self._run / METRICS_FILE, self._run):  # the record up to this step; the names in the folder
            if path.exists():
                fsync(path)
        (staging / METADATA).write_text(json.dumps(metadata, indent=2), encoding="utf-8")
        fsync(staging / METADATA)
        failpoint("save.metadata")
        manifest.write(staging)
        failpoint("save.manifest")
        if (self._folder / str(step)).exists():  # saved before, and evaluated or trained again since
            self._delete(step)
        os.rename(staging, self._folder / str(step))
        fsync(self._folder)
        self.on_disk = step
        failpoint("save.renamed")
        self._record_first()
        self.delete_old()
        return step

    def delete_old(self) -> None:
        """Delete the checkpoints that are no longer to be kept. A killed process may have left one too many."""
        best = self.best_step() if self._config.keep_best else None
        for old in self.steps()[: -self._config.save_total_limit]:
            if old != best:
                self._delete(old)

    def _delete(self, step: int) -> None:
        """The name goes first, so that no reader finds half a checkpoint."""
        doomed = self._folder / f"{DELETING}{step}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(self._folder / str(step), doomed)
        failpoint("delete.renamed")
        shutil.rmtree(doomed, ignore_errors=True)
        failpoint("delete.done")

    # ------------------------------------------------------------ when storage fails

    def _settle(self) -> None:
        """Wait for the unfinished save and record its result."""
        if not self._saving:
            return
        saving, self._saving = self._saving, None
        error = saving.exception()
        if error is None:
            self._failures = 0
        elif isinstance(error, STORAGE_ERRORS):
            self._note_failure(None, error)
        else:
            raise error

    def _note_failure(self, step: int | None, error: Exception) -> None:
        self._last_error = _reason(error)
        self._failures += 1
        self._remove_partial()
        # Several processes would have to agree on another attempt; their supervisor starts them again.
        if self._failures > len(RETRY_AFTER) or jax.process_count() > 1:
            raise self._storage_failed()
        delay = RETRY_AFTER[self._failures - 1]
        self._retry_at = time.monotonic() + delay
        print(
            f"save     {'step ' + str(step) if step else 'a checkpoint'} could not be written to {self._folder} "
            f"({self._last_error}); trying again in {delay:.0f} s",
            flush=True,
        )

    def _remove_partial(self) -> None:
        """What a full disk holds of a save that failed is room for the next attempt, or for others."""
        for partial in self._folder.glob(f"{SAVING}*") if self._is_writer else ():
            if UNFINISHED.fullmatch(partial.name):
                shutil.rmtree(partial, ignore_errors=True)

    def _record_first(self) -> None:
        """Keep on record that the run has a checkpoint, or none yet, for a start that finds none."""
        if self._is_writer and not has_saved(self._run):
            with contextlib.suppress(OSError):
                write_file(self._run / SUMMARY, json.dumps({"first_checkpoint": min(self.steps(), default=None)}))

    def _storage_failed(self) -> StorageFailed:
        steps = self.steps()
        kept = f"steps {steps} are as they were" if steps else "no checkpoint was written yet"
        return StorageFailed(
            f"{self._folder}: cannot be written ({self._last_error}), tried {self._failures} times; {kept}. "
            "Make room or mend the storage, and run the same command again"
        )

    # ------------------------------------------------------------ restoring

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state of `step`, laid out as `abstract_state` says, whatever mesh wrote it."""
        failpoint("restore.begin")
        folder = self._folder / str(step)
        wanted = {item: value for item, value in _items(abstract_state).items() if (folder / item).is_dir()}
        items = {item: ocp.args.StandardRestore(value) for item, value in wanted.items()}
        restored = self._orbax.restore(folder, args=ocp.args.Composite(**items))
        failpoint("restore.done")
        # Without a rule for spikes so far there is no window yet.
        zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        recent = restored["recent"] if "recent" in wanted else jax.tree.map(zeros, abstract_state.recent)
        return TrainState(params=restored["params"], recent=recent, **restored["optimizer"])


def _items(state: TrainState) -> dict[str, dict]:
    """The items of a checkpoint, {folder: arrays}. `state` may be abstract."""
    items = {"params": state.params, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
    return items | {"recent": state.recent} if state.recent else items


def _reason(error: Exception) -> str:
    """The first line of an error, without the paths and stacks that TensorStore adds where the cause is a known one."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = (os.strerror(number) for number in STORAGE_ERRNOS if os.strerror(number) in str(error))
    return next(known, "") or str(error).split("\n")[0].split(" [")[0][:200] or type(error).__name__


def quiet_orbax() -> None:
    """Orbax logs a dozen lines a save at INFO through absl's logger; keep its warnings and errors."""
    logging.getLogger("absl").setLevel(logging.WARNING)


# ---------------------------------------------------------------- reading a run folder


def read_config(run: Path) -> Config:
    """The resolved config of a run folder."""
    return read_json(run / CONFIG)


def has_saved(run: Path) -> bool | None:
    """Whether the run has had a checkpoint, by its summary; None where that does not say."""
    try:
        summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
        first = summary.get("checkpoint", summary.get("first_checkpoint"))
        return first is not None or summary.get("status", "").startswith("finished")
    except (OSError, ValueError, AttributeError):
        return None


def read_metadata(run: Path, step: int) -> dict:
    """The metadata of a finished step: data, tokenizer, validation loss, position. `UserError` if it is damaged."""
    path = run / FOLDER / str(step) / METADATA
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def finished_steps(run: Path) -> list[int]:
    """The steps of a run folder that were written to their end, in order; none where it is no run yet."""
    return [step for step in named_steps(run) if (run / FOLDER / str(step) / manifest.NAME).is_file()]


def named_steps(run: Path) -> list[int]:
    """The steps that have a folder under their name, damaged or not, in order."""
    folders = (run / FOLDER).iterdir() if (run / FOLDER).is_dir() else ()
    return sorted(int(folder.name) for folder in folders if is_step_name(folder.name) and folder.is_dir())


def is_step_name(name: str) -> bool:
    """Whether it is a step's as we write it: not "²", which is a digit to Python, nor "007"."""
    return name.isascii() and name.isdigit() and name == str(int(name))


def best_step(run: Path) -> int | None:
    """The kept step with the lowest validation loss; None where none was evaluated to a number."""
    scored = {}
    for step in finished_steps(run):
        # A file that was damaged meanwhile is for the next start to deal with.
        with contextlib.suppress(UserError):
            loss = read_metadata(run, step).get("eval_loss")
            if loss is not None and math.isfinite(loss):
                scored[step] = loss
    return min(scored, key=lambda step: scored[step]) if scored else None


def step_to_use(run: Path) -> tuple[int, str]:
    """(latest step, ""); where the run overfitted or stopped early, (best step, why). A resume takes the latest."""
    latest = finished_steps(run)[-1]
    with contextlib.suppress(UserError):
        why, best = read_metadata(run, latest).get("why_best", ""), best_step(run)
        return (best, why) if why and best is not None else (latest, why)
    return latest, ""


def find_step(path: Path, tell: bool = False) -> tuple[Path, int]:
    """(run folder, step) of a run folder (`step_to_use`; `tell` warns if it is not the latest), a step, or RUN@best."""
    if path.name.endswith(BEST) and not path.exists():
        run, _ = find_step(path.with_name(path.name.removesuffix(BEST)))
        if (step := best_step(run)) is None:
            raise UserError(f"{path}: no checkpoint of {run} was evaluated, so none is the best; leave {BEST} out")
        return run, step
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a run folder such as runs/quickstart")
    run = path.parent.parent if path.parent.name == FOLDER else path
    if not (run / "config.json").is_file() or not (run / FOLDER).is_dir():
        raise UserError(f"{path} is not a jaxgpt run or one of its steps: {run} holds no config.json and {FOLDER}/")
    steps = finished_steps(run)
    if not steps:
        raise UserError(f"{run / FOLDER} holds no finished checkpoint yet")
    if run == path:
        step, why = step_to_use(run)
        if tell and step != steps[-1]:
            logger.warning("%s: takes step %d, the best, and not %d: %s", run, step, steps[-1], why)
        return run, step
    if not is_step_name(path.name) or int(path.name) not in steps:
        raise UserError(f"{path} is not a finished checkpoint; {run / FOLDER} holds steps {steps}")
    return run, int(path.name)


def restore_params(run: Path, step: int, shapes: dict, sharding: jax.sharding.Sharding | dict) -> dict:
    """The weights alone, in the shapes of the tree `shapes`, laid out by `sharding`: one for all arrays, or a tree."""
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
        assert isinstance(array.sharding, jax.sharding.NamedSharding)
        everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
        array = jax.jit(lambda x: x, out_shardings=everywhere)(array).addressable_data(0)
    return np.asarray(array)
