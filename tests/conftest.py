"""Settings and fixtures of all tests.

Every test sees 8 virtual CPU devices and may not broadcast arrays of different ranks by accident. Compiled programs
are kept in .pytest_cache/xla and shared with child processes.

With several workers, an idle one takes tests from the end of another's list (`--dist worksteal`). A run of several
files uses two workers; a run that names only files or single tests uses none (`-n 2` and `-n 0` override that).

Fixtures:
    trained: one finished run of a tiny character-level model, trained once per session over all workers. Tests only
        read it. See `tiny.Trained` for what its folder holds.
    trained_copy: a copy of it below the test's `tmp_path`, which the test may damage, resume or retrain.
"""

import collections
import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# A process that a shell starts in the background ignores Ctrl-C, and so do its children; the tests send it to some.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_number, signal.SIG_DFL)

os.environ["JAX_PLATFORMS"] = "cpu"
# Level 0 compiles twice as fast (a tiny step: 2.4 s to 1.2 s; its initial values: 3.6 s to 0.5 s) and the tests
# compile far more than they run.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)
os.environ["HF_HUB_OFFLINE"] = "1"
# No test depends on, or leaves anything in, the user's own cache of compiled programs.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

import jax  # noqa: E402 - reads the environment
from tiny import Trained  # noqa: E402

from jaxgpt import failpoints, train  # noqa: E402
from jaxgpt.training import signals  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    names = [argument.split("::")[0] for argument in config.args]
    return 0 if all(name.endswith(".py") for name in names) else min(2, os.cpu_count() or 1)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers' folders lie in that of the session
        shared = shared.parent
    found, finished = Trained(shared / "trained"), shared / "trained.finished"
    with locked(shared / "trained.lock"):
        if not finished.exists():
            shutil.rmtree(found.folder, ignore_errors=True)  # an attempt that failed in another worker
            found.write_text_and_config()
            assert train.main(found.arguments) == 0
            finished.touch()
    return found


@pytest.fixture
def trained_copy(trained, tmp_path) -> Trained:
    return trained.copy(tmp_path / "trained")


@pytest.fixture
def failpoint(monkeypatch):
    """A function that has this process pass the named points of JAXGPT_FAILPOINT, counted from now on."""

    def set_points(points: str) -> None:
        monkeypatch.setattr(failpoints, "_passes", collections.Counter())
        monkeypatch.setenv("JAXGPT_FAILPOINT", points)

    # A loaded machine may compile an evaluation for longer than a run that is told to stop usually has.
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 600.0)
    return set_points
