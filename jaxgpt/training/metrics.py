"""The metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases, a line for a person.

metrics.jsonl is the record and the other three are views of it. It holds one strict JSON object a logged step: on
resume the lines that the dead run wrote after its last checkpoint are cut off before the steps are run again.
"""

import json
import math
import os
import re
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.parallel.chips import peak_flops as peak_flops
from jaxgpt.settings import LogConfig
from jaxgpt.storage.files import naming, write_file
from jaxgpt.training.trackers import TensorBoard, WandB, indented

METRICS_FILE = "metrics.jsonl"


# ---------------------------------------------------------------- where the time goes


class _Span:
    """One activity's stopwatch, made once, so that using it allocates nothing."""

    __slots__ = ("_since", "_seconds")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None  # while it runs

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        assert self._since is not None
        self._seconds += time.perf_counter() - self._since
        self._since = None

    def take(self, now: float) -> float:
        """The seconds since the last call. A span that runs is cut at `now`, and its rest counts next time."""
        seconds, self._seconds = self._seconds, 0.0
        if self._since is not None:
            seconds, self._since = seconds + now - self._since, now
        return seconds


class TimeSplit:
    """Wall seconds by activity: `with split("data"): batch = next(batches)`. Not to be nested."""

    def __init__(self) -> None:
        self._spans = {name: _Span() for name in ("data", "step", "eval", "save")}
        self._since = time.perf_counter()

    def __call__(self, activity: str) -> _Span:
        return self._spans[activity]

    def take(self) -> dict[str, float]:
        """Each activity's seconds since the last call, to this moment, and "seconds_total", all that passed."""
        now = time.perf_counter()
        seconds = {f"seconds_{name}": span.take(now) for name, span in self._spans.items()}
        seconds["seconds_total"] = now - self._since
        self._since = now
        return seconds


# ---------------------------------------------------------------- the file


def read_metrics(workdir: Path) -> list[dict]:
    """The objects of `workdir`/metrics.jsonl in the order written; safe while the run goes on.

    A figure that was not finite reads as None and is named in the object's "nonfinite".

    Raises:
        UserError: there is no such file.
    """
    path = Path(workdir) / METRICS_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; has a run in {workdir} started?") from None
    return [record for _, record in _parse_lines(content)]


def _parse_lines(content: bytes) -> list[tuple[bytes, dict]]:
    """Each whole line with its object. A torn line (killed while writing) is left out.

    Bytes are split, not text: `str.splitlines` would also cut at U+2028 inside a sample.
    """
    lines = []
    for line in content.split(b"\n"):
        try:
            record = json.loads(line.decode())
        except ValueError:  # not JSON, or a character cut in two
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            lines.append((line, record))
    return lines


def _cut_after(path: Path, start_step: int) -> None:
    """Rewrite `path` without torn lines and without the steps that will be run again: all, if it starts at 0."""
    if not path.exists():
        return
    content = path.read_bytes()
    parsed = _parse_lines(content) if start_step else []
    kept = b"".join(line + b"\n" for line, record in parsed if record["step"] <= start_step)
    if kept != content:
        write_file(path, kept)


def _plain(value: str | float | None | np.generic | jax.Array) -> str | int | float | None:
    """A Python number, string or None from one, or from a numpy or jax scalar."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # no file can hold a lone surrogate
    return value.item() if isinstance(value, (np.generic, np.ndarray, jax.Array)) else value


def _to_line(record: dict) -> bytes:
    """Strict JSON: what is not finite becomes null, and "nonfinite" says what it was."""
    nonfinite = {k: str(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    if nonfinite:
        record = {**record, **dict.fromkeys(nonfinite), "nonfinite": nonfinite}
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


# ---------------------------------------------------------------- the log


class MetricLog:
    """Writes metrics to every place that wants them; does nothing on processes but the writer.

    `start_step` is how many of `total_steps` are done: more than 0 on resume. `quiet`: only messages are shown on the
    screen.
    """

    def __init__(
        self, workdir: Path, log: LogConfig, total_steps: int, start_step: int, is_writer: bool, quiet: bool = False
    ):
        self._is_writer = is_writer
        if not is_writer:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / METRICS_FILE
        _cut_after(self._path, start_step)
        self._file = self._path.open("ab")
        self._screen = (_Quiet if quiet else _Bar if sys.stderr.isatty() else _Lines)(total_steps, start_step)
        self._views: list = [self._screen]
        if log.tensorboard:
            self._views.append(TensorBoard(workdir, start_step))
        if log.wandb_project:
            self._views.append(WandB(workdir, log.wandb_project))

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self.close(failed=kind is not None)

    def write(self, step: int, values: dict) -> None:
        """Log one step: numbers (Python, numpy, 0-d arrays), strings, or None for not known."""
        if not self._is_writer:
            return
        values = {key: _plain(value) for key, value in values.items()}
        with naming(self._path):
            self._file.write(_to_line({"step": int(step), **values}))
            self._file.flush()
        for view in self._views:
            view.write(int(step), values)

    def advance(self, step: int) -> None:
        """Say that `step` steps are done: moves the bar. Cheap enough for every step."""
        if self._is_writer:
            self._screen.advance(step)

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`: they will be run again, with other data."""
        if self._is_writer:
            self._file.close()
            _cut_after(self._path, step)
            self._file = self._path.open("ab")

    def say(self, text: str) -> None:
        """Tell a person something that is no metric."""
        if self._is_writer:
            self._screen.say(text)

    def close(self, failed: bool = False) -> None:
        """Close every file; `failed` marks the run so in Weights & Biases."""
        if not self._is_writer or self._file.closed:
            return
        self._file.close()
        for view in self._views:
            view.close(failed)


# ---------------------------------------------------------------- views for people


def say(text: str) -> None:
    """Print to stdout; a character that its encoding lacks must not end a run of hours."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except OSError:  # nobody reads any more, as when Ctrl-C ends `| tee` as well: that must not cost a step
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


_FORMATS = (
    ("loss", "loss {:.4f}"),
    ("grad_norm", "grad_norm {:5.2f}"),
    ("learning_rate", "lr {:.1e}"),
    ("tokens_per_second", "{:>9,.0f} tok/s"),
    ("mfu", "mfu {:.1%}"),
    ("data_share", "data {:.1%}"),
    ("eval_loss", "eval_loss {:.4f}"),
    ("eval_perplexity", "perplexity {:,.2f}"),
    ("eval_bits_per_byte", "bits/byte {:.4f}"),
    ("eval_stop_rate", "answers that stop {:.0%}"),
)


def _fields(values: dict) -> list[str]:
    """The figures that a person follows, each with its name, in a fixed order."""
    if values.get("seconds_total") and "seconds_data" in values:
        values = {**values, "data_share": values["seconds_data"] / values["seconds_total"]}
    shown = []
    for key, form in _FORMATS:
        if values.get(key) is not None:
            shown.append(form.format(values[key]))
        elif key == "mfu" and key in values:
            shown.append("mfu –")  # the peak of this device is not known
    for key, value in values.items():
        if task := re.fullmatch("eval_(.+)_acc", key):
            shown.append(f"{task[1]} {value:.1%}")
    return shown


def _step_line(step: int, total_steps: int, values: dict, clock: str | None) -> str:
    head = f"step {step:>{len(str(total_steps))}}/{total_steps}"
    line = " | ".join([head, *_fields(values), *([clock] if clock else [])])
    return f"{line}\n{indented(values['sample'])}" if values.get("sample") else line


class _Lines:
    """One line a call on stdout: for log files, notebooks and CI."""

    def __init__(self, total_steps: int, start_step: int):
        self._total = total_steps
        self._began = time.monotonic()
        self._first: tuple[int, float] | None = None  # the pace counts from here, after compilation

    def advance(self, step: int) -> None:
        pass

    def say(self, text: str) -> None:
        say(text)

    def write(self, step: int, values: dict) -> None:
        now = time.monotonic()
        clock = _clock(now - self._began)
        if self._first is None:
            self._first = (step, now)
        elif step > self._first[0]:
            pace = (now - self._first[1]) / (step - self._first[0])
            clock += f"<{_clock(pace * (self._total - step))}"
        say(_step_line(step, self._total, values, clock))

    def close(self, failed: bool) -> None:
        pass


class _Quiet(_Lines):
    """Messages alone: for one of many trainings."""

    def write(self, step: int, values: dict) -> None:
        pass


class _Bar:
    """A progress bar on the terminal, the training figures behind it and evaluations above it."""

    def __init__(self, total_steps: int, start_step: int):
        from tqdm import tqdm

        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=0.5)

    def advance(self, step: int) -> None:
        self._bar.update(step - self._bar.n)  # draws at most every mininterval

    def say(self, text: str) -> None:
        with self._bar.external_write_mode():
            say(text)

    def write(self, step: int, values: dict) -> None:
        if values.get("eval_loss") is not None or values.get("sample"):
            self.say(_step_line(step, self._bar.total, values, clock=None))
        if "loss" in values:
            figures = [" ".join(f.split()) for f in _fields(values) if "norm" not in f]
            self._bar.set_postfix_str(", ".join(figures), refresh=False)

    def close(self, failed: bool) -> None:
        self._bar.close()
