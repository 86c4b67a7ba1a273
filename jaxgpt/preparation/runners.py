"""Who works on the chunks: this process, several on this machine, or an Apache Beam pipeline.

The idea: a stage is a function of a chunk's number that writes the chunk's file, so where it runs changes nothing.
"""

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from jaxgpt.errors import RunFailed, UserError

_INLINE = 3  # so few chunks are done here about as soon, and tokenizing uses all cores by itself

Task = Callable[[int], int]
"""Does its work for a chunk, and returns the bytes of text that it read."""


class Runner(Protocol):
    def each(self, task: Task, numbers: Sequence[int], progress: Callable[[int], object]) -> None:
        """`task` for each of the chunks; `progress` is told the bytes of those that are done.

        Raises:
            UserError: what a task found wrong.
        """


class Processes:
    """This machine's cores: a process for each, started when there is enough to do. Use it in a `with` block."""

    def __init__(self, count: int | None = None):
        """`count` processes; None: one a core that this process may use."""
        self._count = count or _cores()
        self._pool = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exception) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, task: Task, numbers: Sequence[int], progress: Callable[[int], object]) -> None:
        if self._count == 1 or len(numbers) <= _INLINE:
            for number in numbers:
                progress(task(number))
            return
        from concurrent.futures.process import BrokenProcessPool

        try:
            for size in self._started().map(task, numbers):
                progress(size)
        except BrokenProcessPool:
            raise RunFailed(
                "a process that prepared data ended: killed, as the kernel does when memory runs out, or started by a "
                'script without `if __name__ == "__main__":`. What is done is kept: run it again, with '
                "data.num_proc = 1 for less memory and no further process"
            ) from None

    def _started(self):
        if self._pool is None:
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor

            # Not forked: a copy of a process with threads (JAX's, the tokenizer's) may hang.
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, spawn, initializer=_begin_worker)
        return self._pool


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin_worker() -> None:
    """One thread a process, because there is a process a core; Ctrl-C is the parent's; none outlives the parent."""
    import multiprocessing

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()  # a parent that was killed could not tell its pool to end
        os._exit(1)

    threading.Thread(target=follow, name="parent", daemon=True).start()


class Beam:
    """An Apache Beam pipeline for each stage, on the runner that Beam's own options name.

    Its workers must have jaxgpt installed and see the work folder, which lies in data.prepared_dir, under the same
    path: on a network file system, or a mounted bucket.
    """

    def __init__(self, options: Sequence[str]):
        """
        Raises:
            UserError: apache-beam is not installed.
        """
        try:
            import apache_beam  # noqa: F401
        except ImportError:
            raise UserError("--runner beam needs Apache Beam: pip install 'jaxgpt[beam]'") from None
        self._options = list(options)

    def each(self, task: Task, numbers: Sequence[int], progress: Callable[[int], object]) -> None:
        if not numbers:
            return
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        refusals = task.keywords["work"].refusal
        with beam.Pipeline(options=PipelineOptions(self._options)) as pipeline:
            chunks = pipeline | "Chunks" >> beam.Create(list(numbers)) | "Spread" >> beam.Reshuffle()
            _ = chunks | task.func.__name__ >> beam.Map(functools.partial(_or_refuse, task=task))
        for number in numbers:
            with contextlib.suppress(FileNotFoundError):
                raise UserError(Path(refusals(number)).read_text(encoding="utf-8"))


def _or_refuse(number: int, task: Task) -> None:
    """Do the task, and leave a user's mistake in a file: as an exception Beam would try it again and bury it."""
    try:
        task(number)
    except UserError as error:
        task.keywords["work"].refusal(number).write_text(str(error), encoding="utf-8")
