"""One run, from its config to hf/: join the hosts, start, train, report, export. `train` does it all."""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxgpt.config import Config
from jaxgpt.errors import STORAGE_ERRNOS, FolderLost, HostLost, Interrupted, RunFailed, StorageFailed, UserError
from jaxgpt.model.sizes import checkpoint_bytes, checkpoints_at_once, parameter_count
from jaxgpt.parallel import distributed
from jaxgpt.parallel.host_watch import PeerWatch
from jaxgpt.training import resume
from jaxgpt.training.auto_batch import out_of_memory_explained
from jaxgpt.training.checkpoint import Checkpoints, restore_params, step_to_use, whole
from jaxgpt.training.loop import fit
from jaxgpt.training.metrics import MetricLog, read_metrics
from jaxgpt.training.models import export_model, write_settings
from jaxgpt.training.recovery import check_weights, record_fault
from jaxgpt.training.run_state import Run, position
from jaxgpt.training.signals import END, Activity, StopSignal, Watchdog, record_lost_host
from jaxgpt.training.start import BuildScorer, Start, start

WriteReport = Callable[[Run, str, float], None]
"""(run, how it ended, seconds) -> summary.json and report.html in its folder."""


def train(
    config: Config, workdir: Path, force: bool = False, *, build_scorer: BuildScorer, write_report: WriteReport
) -> None:
    """Start or resume the run of `config` in `workdir`, alone or as one process of several.

    Call `keep_freed_memory` before this module is imported. What is wrong with the input is found before anything is
    written. `force` accepts settings that change what follows in a run and not what was.
    """
    activity = Activity()
    lost = functools.partial(record_lost_host, workdir)
    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopSignal(activity, distributed.is_alone))
        distributed.join(config.mesh.distributed, config.faults.host_timeout_seconds)
        ended_well = False
        try:
            with PeerWatch(config.faults.host_timeout_seconds, lambda: activity.now[1], lost) as peers:
                stop.tell_others = peers.leave
                begun = held.enter_context(start(config, workdir, force, build_scorer))
                with crashes_recorded(config, workdir, activity):
                    run(begun, stop, activity, write_report)
            if stop.requested:  # it was too late to cut anything off; what calls this must still hear of it
                raise stop.interrupted()
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
        write_settings(workdir, config, begun.dataset.tokenizer)
    checkpoints = Checkpoints(workdir, config.checkpoint, is_writer)
    if is_writer:
        checkpoints.delete_old()
    place = position(checkpoints, begun.step)
    watchdog = Watchdog(workdir, activity, config.faults.hang_seconds)
    with watchdog, out_of_memory_explained(config, begun.dataset.vocab_size, begun.mesh):
        state = resume.initial_state(begun.program, checkpoints, begun.step, begun.weights, begun.dataset.vocab_size)
        if is_writer:
            print_header(begun)
        started, status = time.time(), "failed"
        with MetricLog(workdir, config.log, config.max_steps, place.step, is_writer) as log:
            whole_run = Run(
                config, workdir, begun.mesh, begun.dataset, begun.program, checkpoints, log, begun.sample, stop,
                activity, begun.skip, begun.score, begun.lease,
            )  # fmt: skip
            try:
                state, early = fit(whole_run, state, place)
                activity.is_at(END, config.max_steps)
                if stop.requested and distributed.is_alone():
                    raise stop.interrupted()
                status = f"finished ({early})" if early else "finished"
            except Interrupted:
                status = "interrupted"
                raise
            except FolderLost:
                status = "lost"
                raise
            finally:
                stop.is_heard()
                checkpoints.close()
                if is_writer and status != "lost":
                    _report(write_report, whole_run, status, time.time() - started)
        params = state.params
        del state
        stop.is_saved()
        steps = (step_to_use(workdir)[0], checkpoints.latest_step() or 0) if is_writer else (0, 0)
        step, latest = map(distributed.broadcast_from_writer, steps)
        if step != latest:  # the parameters of the best one, laid out as the last ones are
            check_weights(workdir, step)
            params = restore_params(workdir, step, params, jax.tree.map(lambda leaf: leaf.sharding, params))
        _export(whole_run, params, is_writer)
    if is_writer:
        print_footer(workdir, checkpoints.best_step())


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
    except (UserError, StorageFailed, HostLost, FolderLost):
        raise
    except Exception as error:
        if not (isinstance(error, OSError) and error.errno in STORAGE_ERRNOS):
            text = f"{type(error).__name__}: {error}"[:500]
            record_fault(workdir, what="crash", step=activity.now[1], identity=resume.identity(config), error=text)
        raise


def _export(whole_run: Run, params: dict, is_writer: bool) -> None:
    """Write hf/: the weights and the tokenizer as Hugging Face has them. The run itself is on disk by now."""
    folder, dataset = whole_run.workdir / "hf", whole_run.dataset
    if whole_run.lease:
        whole_run.lease.check(look=True)
    model = (whole_run.config.model, dataset.vocab_size, params, dataset.tokenizer)
    try:
        export_model(folder, *model, replace=True, whole=whole, is_writer=is_writer)
    except OSError as error:
        raise RunFailed(
            f"the run is finished and saved, but {folder} cannot be written ({error}); make room and run the same "
            "command again, which writes it"
        ) from None


# ---------------------------------------------------------------- lines for a person


def _warn_of_little_room(config: Config, vocab_size: int, workdir: Path) -> None:
    """Warn when the checkpoints to come will not fit on the disk."""
    needed, free = checkpoints_at_once(config) * checkpoint_bytes(config, vocab_size), shutil.disk_usage(workdir).free
    if needed > free:
        print(
            f"warning  {workdir}: {free / 1e9:.1f} GB free, but the checkpoints to be kept need {needed / 1e9:.1f} GB; "
            "make room or set a smaller checkpoint.save_total_limit",
            flush=True,
        )


def print_header(start: Start) -> None:
    """Print what is about to run, on what, and from where; then what the lint and the tasks have to say."""
    config, dataset, program = start.config, start.dataset, start.program
    model, parameters = config.model, parameter_count(config.model, dataset.vocab_size)
    facts = dataset.train.facts()
    learned = f" ({facts['learned_tokens']:,} learned, in {facts['rows']:,} rows)" if "rows" in facts else ""
    shape = " x ".join(f"{axis} {size}" for axis, size in start.mesh.shape.items())
    devices = start.mesh.devices.flatten()
    print(
        f"model    {parameters / 1e6:.1f}M parameters: {model.n_layer} layers, {model.n_head} heads, width "
        f"{model.n_embd}, {model.dtype}\n"
        f"data     {dataset.train.num_tokens:,} training and {dataset.validation.num_tokens:,} validation tokens"
        f"{learned}, vocabulary {dataset.vocab_size:,} ({dataset.path})\n"
        f"devices  {devices.size} x {devices[0].device_kind} ({shape}), attention by {program.attention}\n"
        f"batch    {config.global_batch_size} sequences of {config.block_size} tokens, "
        f"{config.gradient_accumulation_steps} micro-batches; {config.max_steps:,} steps\n"
        f"run      {start.workdir}, " + (f"resumed after step {start.step}" if start.step else "from step 0"),
        flush=True,
    )
    if weights := start.weights:
        new = dataset.vocab_size - weights.vocab_size
        rows = f"; {new} new tokens start as the mean of its {weights.vocab_size:,} embeddings" if new else ""
        print(f"weights  {weights.setting}{rows}", flush=True)
    if config.block_size == dataset.train.num_tokens - 1:
        print(f"window   data.block_size = {config.block_size}, as the text has no more tokens for one", flush=True)
    _warn_of_little_room(config, dataset.vocab_size, start.workdir)
    for note in start.notes:
        print(note, flush=True)


def print_footer(workdir: Path, best_step: int | None) -> None:
    """Print the last figures, where everything is, and which checkpoint to use if it is not the last."""
    last = [line for line in read_metrics(workdir) if "eval_loss" in line][-1]
    stopping, how = "", '--prompt "..."'
    if "eval_stop_rate" in last:
        how = "--chat"
        stopping = f"answers that end by themselves: {last['eval_stop_rate']:.0%} of those to validation prompts\n"
    step, why = step_to_use(workdir)
    kept = "" if step != last["step"] else "; no better checkpoint was kept"
    note = f"{why}{kept}\n" if why else ""
    whose = "" if step == last["step"] else f"the weights of step {step}, the best checkpoint, "
    best = f"{best_step}, {workdir}@best" if best_step != last["step"] else best_step
    where = workdir if step == last["step"] else f"{workdir}@best"
    print(
        f"\n{note}"
        f"validation loss {last['eval_loss']:.4f}, perplexity {last['eval_perplexity']:.2f}, "
        f"{last['eval_bits_per_byte']:.4f} bits per byte after {last['step']:,} steps (best: step {best})\n"
        f"{stopping}"
        f"checkpoints {workdir / 'checkpoints'}\nhf          {workdir / 'hf'} ({whose}for transformers)\n"
        f"report      {workdir / 'report.html'}\n"
        f"sample      python -m jaxgpt.sample --checkpoint {where} {how}"
    )
