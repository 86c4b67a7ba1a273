"""Metrics for chart tools: TensorBoard files and Weights & Biases."""

import json
import sys
import uuid
from pathlib import Path

import jax

from jaxgpt.cli import for_terminal
from jaxgpt.storage.files import write_file

_NOT_CHARTED = ("batch_hash",)  # new at every logged step: a chart tool would keep thousands of them


def _chart_name(key: str) -> str:
    """The group/name that Hugging Face's Trainer gives a metric, so that dashboards line up."""
    for group in ("eval", "seconds"):
        if key.startswith(group + "_"):
            return f"{group}/{key.removeprefix(group + '_')}"
    return f"train/{key}"


def indented(sample: str) -> str:
    """Generated text under its line."""
    return "    " + for_terminal(sample).replace("\n", "\n    ")


def _summary_writer() -> type:
    """tensorboardX's writer, without the seconds that its import of torch takes where torch is installed.

    None in sys.modules makes an import fail as if the package were missing, which tensorboardX allows for.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python documents None here; its types do not
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


class TensorBoard:
    def __init__(self, workdir: Path, start_step: int):
        # purge_step hides what the run that died had written after its checkpoint.
        purge = start_step + 1 if start_step else 0
        self._writer = _summary_writer()(str(workdir / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: dict) -> None:
        for key, value in values.items():
            if key in _NOT_CHARTED or value is None:
                continue
            if isinstance(value, str):  # rendered as Markdown: an indented block keeps line breaks
                self._writer.add_text(_chart_name(key), indented(value), step)
            else:
                self._writer.add_scalar(_chart_name(key), value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    def __init__(self, workdir: Path, project: str):
        import wandb

        id_file, config_file = workdir / "wandb_run_id", workdir / "config.json"
        if not id_file.exists():
            write_file(id_file, uuid.uuid4().hex)
        config = json.loads(config_file.read_bytes()) if config_file.exists() else None
        self._run = wandb.init(
            project=project,
            name=workdir.resolve().name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(workdir),
            config=config,
        )
        # Its own step counter refuses steps that a resumed run repeats; ours is an ordinary metric.
        self._run.define_metric("*", step_metric="train/step")

    def write(self, step: int, values: dict) -> None:
        charted = {k: v for k, v in values.items() if k not in _NOT_CHARTED and v is not None}
        self._run.log({"train/step": step, **{_chart_name(k): v for k, v in charted.items()}})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


FOLDER = "profile"


class StepTrace:
    """Traces the steps first..last of `steps` ("10:13", "" for none) into `workdir`/profile. A context manager.

    The loop asks `starts(step)` before it dispatches a step and `ends(step)` after, and waits for the devices
    each time the answer is yes, so that the trace holds the work of these steps and of no other. A run that
    starts behind the first of them traces nothing.
    """

    def __init__(self, steps: str, workdir: Path, start_step: int):
        self._folder = workdir / FOLDER
        self._first, self._last = (int(step) for step in steps.split(":")) if steps else (0, 0)
        self._wanted = self._first > start_step
        self._running = False

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:  # the run was stopped, or failed, among the traced steps: the part so far is kept
            self.stop()

    def starts(self, step: int) -> bool:
        return self._wanted and step == self._first

    def ends(self, step: int) -> bool:
        return self._running and step == self._last

    def start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call: it slows the host down and swells the file
        jax.profiler.start_trace(str(self._folder), profiler_options=options)
        self._running = True

    def stop(self) -> str:
        """End the trace; says where it is."""
        self._running = False
        jax.profiler.stop_trace()
        return (
            f"trace of steps {self._first} to {self._last} in {self._folder}; to look at it: "
            f"pip install xprof; xprof --logdir {self._folder}"
        )
