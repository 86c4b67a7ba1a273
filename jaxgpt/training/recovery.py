"""Before a run goes on: what a dead process left is removed, and the newest checkpoint that is whole is found.

A checkpoint whose files differ from its manifest is moved to quarantine/, never deleted and never read. A run that
crashes again and again at one step goes one checkpoint back, once, and then stops.
"""

import os
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from jaxgpt.errors import RunFailed, UserError
from jaxgpt.failpoints import failpoint
from jaxgpt.storage import manifest
from jaxgpt.storage.files import append_json, read_json_lines
from jaxgpt.training.checkpoint import (
    CONFIG,
    FOLDER,
    SAVING,
    UNFINISHED,
    finished_steps,
    is_step_name,
    named_steps,
    read_metadata,
)
from jaxgpt.training.metrics import METRICS_FILE

QUARANTINE = "quarantine"
FAULTS_FILE = "faults.jsonl"
PROCESSES = "processes.jsonl"  # one line for each process that trained
# The files of a run that are replaced whole, each by one called FILE.tmp.
WRITTEN = (CONFIG, METRICS_FILE, "summary.json", "report.html", "card.json", "wandb_run_id")
CRASHES = 3  # at one step, after which the run goes one checkpoint back, and the next time stops


def clean_leftovers(run: Path) -> None:
    """Remove what a killed process was writing or deleting. Only for the one who holds the run's lease.

    A checkpoint that lacked nothing but its name gets it.
    """
    failpoint("clean.begin")
    for folder in (run / FOLDER).glob(".*"):
        if not UNFINISHED.fullmatch(folder.name):
            continue  # somebody else's
        named = run / FOLDER / folder.name.removeprefix(SAVING)
        if is_step_name(named.name) and not named.exists() and not manifest.problems(folder):
            os.rename(folder, named)
        shutil.rmtree(folder, ignore_errors=True)
    for file in run.glob("*.tmp"):
        if file.stem in WRITTEN and file.is_file():
            file.unlink()
    failpoint("clean.done")


def newest_whole_step(run: Path) -> int | None:
    """The latest step whose every file is as it was written; damaged ones are moved away on the way to it.

    None where the run has no checkpoint yet.

    Raises:
        RunFailed: it had some, and none is whole.
    """
    failpoint("verify.begin")
    for step in reversed(named_steps(run)):
        found = damage(run, step)
        if not found:
            return step
        moved = quarantine(run, step)
        failpoint("verify.damaged")
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        print(f"damaged  checkpoint {step}: {found[0]}{more}; moved to {moved}", flush=True)
        record_fault(run, step=step, what="damaged checkpoint", problems=found[:20], moved_to=str(moved))
    if (run / QUARANTINE).is_dir() and any((run / QUARANTINE).iterdir()):
        raise RunFailed(
            f"{run} has no whole checkpoint left, only damaged ones in {run / QUARANTINE}; mend one and move it back "
            f"to {run / FOLDER}, or begin anew in another --workdir"
        )
    return None


def damage(run: Path, step: int, unread: str | None = None) -> list[str]:
    """The problems of a checkpoint's files, a short text each; empty if it is whole (see `manifest.problems`)."""
    folder = run / FOLDER / str(step)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    # A bar only where one would wait for it.
    with tqdm(total=size, desc=f"verifying step {step}", unit="B", unit_scale=True, leave=False,
              disable=None if size > 1 << 30 else True) as bar:  # fmt: skip
        found = manifest.problems(folder, bar.update, unread=unread)
    if found:
        return found
    try:
        named = read_metadata(run, step).get("step", step)
    except UserError as error:
        return [str(error)]
    return [] if named == step else [f"holds step {named}, not {step}"]


def check_weights(run: Path, step: int) -> None:
    """Raise `UserError` where weights are not as they were written; it names a damaged file."""
    if found := damage(run, step, unread="optimizer/*"):
        raise UserError(f"checkpoint {run / FOLDER / str(step)} is damaged: {found[0]}; use another step")


def quarantine(run: Path, step: int) -> Path:
    """Move a checkpoint out of the way; returns where it lies now."""
    (run / QUARANTINE).mkdir(exist_ok=True)
    number = sum(1 for folder in (run / QUARANTINE).iterdir() if folder.name.split(".")[0] == str(step))
    place = run / QUARANTINE / (f"{step}.{number}" if number else str(step))
    os.rename(run / FOLDER / str(step), place)
    return place


def record_fault(run: Path, **facts: object) -> None:
    """Append one line to faults.jsonl. Where that fails a warning is printed, so the first fault stays visible."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        append_json(run / FAULTS_FILE, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts})
    except OSError as error:
        print(f"warning: {run / FAULTS_FILE} cannot be written ({error.strerror})", flush=True)


def read_faults(run: Path) -> list[dict]:
    """The lines of faults.jsonl; one that was cut off, or that `record_fault` cannot have written, is left out."""
    faults = read_json_lines(run / FAULTS_FILE)
    return [fault for fault in faults if isinstance(fault.get("what"), str) and type(fault.get("step")) is int]


def record_process(run: Path, owner: dict, until: object, **facts: object) -> None:
    """Append to processes.jsonl how many seconds the owner of a lease held the run folder, once for each owner.

    Of an older version's owner nothing is recorded, since it does not say when it began.
    """
    began, known = owner.get("began"), {line.get("id") for line in read_json_lines(run / PROCESSES)}
    if isinstance(began, float) and isinstance(until, float) and owner.get("id") not in known:
        seconds = round(max(until - began, 0.0), 1)
        append_json(run / PROCESSES, {"id": owner.get("id"), "began": round(began), "seconds": seconds, **facts})


def break_crash_loop(run: Path, step: int | None, identity: str) -> int | None:
    """The step to go on from: `step`, or the checkpoint before it after CRASHES crashes at one place.

    `identity` names the settings and the program: under other ones an old crash proves nothing.

    Raises:
        RunFailed: it crashed as often again, or there is nothing to go back to.
    """
    crashes = [fault for fault in read_faults(run) if fault.get("identity") == identity]
    since = [index for index, fault in enumerate(crashes) if fault["what"] == "went one checkpoint back"]
    crashes_since = crashes[since[-1] + 1 :] if since else crashes
    last = [fault["step"] for fault in crashes_since[-CRASHES:] if fault["what"] == "crash"]
    if len(last) < CRASHES or len(set(last)) > 1:
        return step
    earlier = [other for other in finished_steps(run) if step is not None and other < step]
    message = f"{run} crashed {CRASHES} times in a row at step {last[0]} ({crashes_since[-1].get('error', '?')})"
    if since or not earlier or step is None:
        raise RunFailed(
            f"{message}{', also from one checkpoint earlier' if since else ''}; not tried again. Change what is wrong "
            f"there, or delete {run / FAULTS_FILE} to try all the same"
        )
    moved = quarantine(run, step)
    print(f"crashes  {message}; going one checkpoint back, to step {earlier[-1]} ({moved} is kept)", flush=True)
    record_fault(run, step=step, what="went one checkpoint back", identity=identity, moved_to=str(moved))
    return earlier[-1]
