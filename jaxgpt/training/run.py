"""One run, from its config to hf/: join the hosts, start, train, report, export. `train` does it all."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxgpt.config import Config, to_json
from jaxgpt.errors import STORAGE_ERRNOS, HostLost, Interrupted, RunFailed, StorageFailed, UserError
from jaxgpt.parallel import distributed
from jaxgpt.parallel.accelerator import keep_freed_memory
from jaxgpt.parallel.host_watch import PeerWatch
from jaxgpt.storage.files import write_file
from jaxgpt.training import resume, summary
from jaxgpt.training.auto_batch import out_of_memory_explained
from jaxgpt.training.checkpoint import Checkpoints, best_step, restore_params, whole
from jaxgpt.training.loop import fit
from jaxgpt.training.metrics import MetricLog
from jaxgpt.training.models import export_model
from jaxgpt.training.recovery import check_weights, record_fault
from jaxgpt.training.run_state import Run, position
from jaxgpt.training.signals import Activity, StopSignal, Watchdog, record_lost_host
from jaxgpt.training.start import BuildScorer, Start, start

WriteReport = Callable[[Run, str, float], None]
"""(run, how it ended, seconds) -> summary.json and report.html in its folder."""


def train(
    config: Config, workdir: Path, force: bool = False, *, build_scorer: BuildScorer, write_report: WriteReport
) -> None:
    """Start or resume the run of `config` in `workdir`, alone or as one process of several.

    What is wrong with the input is found before anything is written. `force` accepts settings that change what
    follows in a run and not what was.
    """
    keep_freed_memory()  # before jax starts its threads
    activity = Activity()
    lost = functools.partial(record_lost_host, workdir)
    with contextlib.ExitStack() as held:
        distributed.join(config.mesh.distributed, config.faults.host_timeout_seconds)
        stop = held.enter_context(StopSignal(activity, distributed.is_alone()))
        ended_well = False
        try:
            with PeerWatch(config.faults.host_timeout_seconds, lambda: activity.now[1], lost):
                begun = held.enter_context(start(config, workdir, force, build_scorer))
                with crashes_recorded(config, workdir, activity):
                    run(begun, stop, activity, write_report)
            ended_well = True
        except Interrupted:
            ended_well = True
            raise
        finally:
            distributed.leave(ended_well)


def run(begun: Start, stop: StopSignal, activity: Activity, write_report: WriteReport) -> None:
    """From checked input to a finished run: the state, the loop, the report, and the weights for everyone."""
    config, workdir, is_writer = begun.config, begun.workdir, distributed.is_writer()
    if is_writer:
        resume.record_changes(workdir, begun.step or 0, begun.changes)
        write_file(workdir / "config.json", to_json(config))
        begun.dataset.tokenizer.save(workdir / "tokenizer", config.model.n_positions)
    checkpoints = Checkpoints(workdir, config.checkpoint, is_writer)
    if is_writer:
        checkpoints.delete_old()
    place = position(checkpoints, begun.step)
    watchdog = Watchdog(workdir, activity, config.faults.hang_seconds)
    with watchdog, out_of_memory_explained(config, begun.dataset.vocab_size, begun.mesh):
        state = resume.initial_state(begun.program, checkpoints, begun.step, begun.weights, begun.dataset.vocab_size)
        if is_writer:
            summary.print_header(begun)
        started, status = time.time(), "failed"
        with MetricLog(workdir, config.log, config.max_steps, place.step, is_writer) as log:
            whole_run = Run(
                config, workdir, begun.mesh, begun.dataset, begun.program, checkpoints, log, begun.sample, stop,
                activity, begun.skip, begun.score,
            )  # fmt: skip
            try:
                state, early = fit(whole_run, state, place)
                status = f"finished ({early})" if early else "finished"
            except Interrupted:
                status = "interrupted"
                raise
            finally:
                stop.is_heard()
                checkpoints.close()
                if is_writer:
                    _report(write_report, whole_run, status, time.time() - started)
        params = _best_weights(workdir, state.params) if early else state.params
        del state
        _export(whole_run, params, is_writer)
    if is_writer:
        summary.print_footer(workdir, checkpoints.best_step(), early)


def _report(write_report: WriteReport, whole_run: Run, status: str, seconds: float) -> None:
    """A disk without room for the report is no reason to hide how the run ended."""
    try:
        write_report(whole_run, status, seconds)
    except OSError as error:
        print(f"warning  no report: {error.filename or whole_run.workdir}: {error.strerror}", flush=True)


@contextlib.contextmanager
def crashes_recorded(config: Config, workdir: Path, activity: Activity) -> Iterator[None]:
    """Record an exception that nobody raised on purpose: after three at one step the run goes one checkpoint back."""
    try:
        yield
    except (UserError, StorageFailed, HostLost):
        raise
    except Exception as error:
        if not (isinstance(error, OSError) and error.errno in STORAGE_ERRNOS):
            text = f"{type(error).__name__}: {error}"[:500]
            record_fault(workdir, what="crash", step=activity.now[1], identity=resume.identity(config), error=text)
        raise


def _best_weights(workdir: Path, last: dict) -> dict:
    """The parameters of the best checkpoint, laid out as the `last` ones are."""
    step = distributed.broadcast_from_writer(best_step(workdir) or 0)
    check_weights(workdir, step)
    return restore_params(workdir, step, last, jax.tree.map(lambda leaf: leaf.sharding, last))


def _export(whole_run: Run, params: dict, is_writer: bool) -> None:
    """Write hf/: the weights and the tokenizer as Hugging Face has them.

    Raises:
        RunFailed: it cannot be written; the run itself is on disk by now.
    """
    folder, dataset = whole_run.workdir / "hf", whole_run.dataset
    model = (whole_run.config.model, dataset.vocab_size, params, dataset.tokenizer)
    try:
        export_model(folder, *model, replace=True, whole=whole, is_writer=is_writer)
    except OSError as error:
        raise RunFailed(
            f"the run is finished and saved, but {folder} cannot be written ({error}); make room and run the same "
            "command again, which writes it"
        ) from None
