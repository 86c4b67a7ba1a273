"""Runners, which execute a stage for all chunks: in this process, in several on this machine, or with Apache Beam.

A stage is a function of a chunk's number that writes the chunk's file, so the result does not depend on the runner.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol

from jaxgpt.errors import RunFailed, UserError, how_to_install
from jaxgpt.preparation.chunks import WorkFolder
from jaxgpt.storage.files import write_file

_INLINE = 3  # so few chunks take no longer in this process, and tokenizing uses all cores by itself

Task = functools.partial[int]
"""A stage with its `work` folder: called with a chunk's number, returns the bytes of text that it read."""


class ChunkRunner(Protocol):
    def each(self, task: Task, numbers: Sequence[int], progress: Callable[[int], object]) -> None:
        """Run `task` for the chunks; `progress` gets the bytes of each chunk that is done."""


class Processes:
    """Runs tasks in worker processes on this machine, started only if there are enough chunks. A context manager."""

    def __init__(self, count: int | None = None):
        """`count` processes; None: one for each core that this process may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._count = count or cores or 1
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, task: Task, numbers: Sequence[int], progress: Callable[[int], object]) -> None:
        """See ChunkRunner; raises RunFailed when a worker process was killed."""
        if self._count == 1 or len(numbers) <= _INLINE:
            for number in numbers:
                progress(task(number))
            return
        if self._pool is None:
            # Not fork: a forked copy of a process with threads (JAX's, the tokenizer's) may hang.
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, spawn, initializer=_begin_worker)
        try:
            for size in self._pool.map(task, numbers):
                progress(size)
        except BrokenProcessPool:
            raise RunFailed(
                "a process that prepared data ended: killed, as the kernel does when memory runs out, or started by a "
                'script without `if __name__ == "__main__":`. What is done is kept: run it again, with '
                "data.num_proc = 1 for less memory and no further process"
            ) from None


def _begin_worker() -> None:
    """Set up a worker: one tokenizer thread, Ctrl-C is left to the parent, and the worker ends with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()  # a killed parent could not end its pool
        os._exit(1)

    threading.Thread(target=follow, name="parent", daemon=True).start()


class Beam:
    """Runs each stage as an Apache Beam pipeline, on the runner that Beam's own options name.

    Its workers must have jaxgpt installed and see the work folder, which lies in data.prepared_dir, under the same
    path: on a network file system, or a mounted bucket.
    """

    def __init__(self, options: Sequence[str]):
        """`options` are Beam's; a UserError says when apache-beam is not installed."""
        try:
            import apache_beam  # noqa: F401
        except ImportError:
            raise UserError(f"--runner beam needs Apache Beam: {how_to_install('beam')}") from None
        self._options = list(options)

    def each(self, task: Task, numbers: Sequence[int], progress: Callable[[int], object]) -> None:
        if not numbers:
            return
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        work: WorkFolder = task.keywords["work"]
        with beam.Pipeline(options=PipelineOptions(self._options)) as pipeline:
            chunks = pipeline | "Chunks" >> beam.Create(list(numbers)) | "Spread" >> beam.Reshuffle()
            _ = chunks | task.func.__name__ >> beam.Map(functools.partial(_or_refuse, task=task))
        for number in numbers:
            with contextlib.suppress(FileNotFoundError):
                raise UserError(work.refusal(number).read_text(encoding="utf-8"))


def _or_refuse(number: int, task: Task) -> None:
    """Run the task and write a UserError into a file: Beam would retry an exception and hide its message."""
    try:
        task(number)
    except UserError as error:
        write_file(task.keywords["work"].refusal(number), str(error))
