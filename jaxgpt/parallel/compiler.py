"""XLA's settings: where it keeps compiled programs between runs, and the options for each kind of device."""

import hashlib
import logging
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxgpt.parallel.accelerator import cache_folder

logger = logging.getLogger(__name__)

# A start compiles dozens of programs of a few milliseconds each; reading one of them back is no faster.
_MIN_COMPILE_SECONDS = 0.1
_MAX_BYTES = 4 << 30  # jax itself never removes an entry


def use_compilation_cache() -> Path | None:
    """Keep compiled programs in `cache_folder`. Call it before anything compiles.

    jax's key of an entry holds the program, the compiler's version and options and the device, but not a CPU's
    instructions and cores, and a program for another CPU crashes: so each kind of CPU has its own folder. Returns that
    folder, or None where nothing is kept: a folder that cannot be written is only a warning.
    """
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(given)
    folder = _writable_folder(kept) if (kept := cache_folder()) else None
    compilation_cache.reset_cache()  # jax reads the folder's name once a process, and may have done so already
    jax.config.update("jax_compilation_cache_dir", str(folder) if folder else None)
    if folder:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        _drop_oldest(folder)
    return folder


def _writable_folder(directory: Path) -> Path | None:
    folder = directory / _host_fingerprint()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write here can run code as this user
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.warning(
            "compiled programs cannot be kept in %s (%s): every start compiles anew; JAX_COMPILATION_CACHE_DIR names "
            "another folder",
            directory,
            error,
        )
        return None


def _host_fingerprint() -> str:
    """A name for the CPU's instructions and number of cores, which decide the program that XLA compiles for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        instructions = sorted({line for line in lines if line.startswith(names)})
    except OSError:  # not Linux
        instructions = [platform.processor(), platform.version()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    digest = hashlib.sha256("\n".join([*instructions, str(cores)]).encode()).hexdigest()
    return f"{platform.machine()}-{cores}-{digest[:8]}"


def _drop_oldest(folder: Path) -> None:
    """If the folder is too large, delete its oldest entries until half of the allowed size is free."""
    entries = sorted((entry.stat().st_mtime, entry.stat().st_size, entry) for entry in folder.iterdir())
    excess = sum(size for _, size, _ in entries) - _MAX_BYTES
    if excess <= 0:
        return
    excess += _MAX_BYTES // 2
    for _, size, entry in entries:
        if excess > 0 and entry.is_file():
            entry.unlink(missing_ok=True)  # another process may delete it too
            excess -= size


def compiler_options(devices: Sequence[jax.Device]) -> dict[str, bool | int]:
    """XLA's options for a training step on these devices, for `jax.jit(compiler_options=...)`.

    TPU: none. Tried with libtpu 0.0.52 and a data parallel step of two layers: on v5e the options that overlap
    collectives (async_collective_fusion and its all-gather and all-reduce, overlap_compute_collective_tc,
    enable_async_all_gather, data_parallel_all_reduce_opt, latency_hiding_scheduler) give the same program, because
    the useful ones are the default; v5p and v6e refuse the fusion of all-gathers. A scoped_vmem_limit of 64 or 96 MiB
    costs v5e 3 and 12 % of its cycles; 64 MiB saved v6e 3 % with a narrow model, not confirmed with wider ones.
    """
    if devices[0].platform == "gpu" and len(devices) > 1:
        # Sums of gradients move behind the matmuls of the backward pass. NVIDIA's own JAX images set it
        # (docs.nvidia.com/jax-toolbox, "Environment Variables"); one GPU has no collectives to hide.
        return {"xla_gpu_enable_latency_hiding_scheduler": True}
    return {}


def initial_values_options(devices: Sequence[jax.Device]) -> dict[str, bool | int]:
    """XLA's options for the one program that draws the initial weights.

    For a CPU, optimization level 1 compiles three to four times as fast, and the program runs as fast (the quickstart:
    3.0 to 4.7 s against 1.0; 124M runs 2.4 s either way, at level 0 12 s). A level in XLA_FLAGS goes first.
    """
    if devices[0].platform == "cpu" and "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
        return {"xla_backend_optimization_level": 1}
    return {}
