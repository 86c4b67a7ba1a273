"""`--log.profile 10:13`: a trace of exactly these steps, for XProf."""

from pathlib import Path

import jax

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
