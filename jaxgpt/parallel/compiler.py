"""What XLA is told: where it keeps compiled programs between runs, and the flags of each kind of device."""

import hashlib
import logging
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)

# A start compiles dozens of programs of a few milliseconds each; reading one of them back is no faster.
_MIN_COMPILE_SECONDS = 0.1
_MAX_BYTES = 4 << 30  # jax itself never removes an entry


def use_compilation_cache(directory: str) -> Path | None:
    """Keep compiled programs below `directory` and take them from there; "" turns it off. Call it before any compiles.

    jax's key of an entry holds the program, the compiler's version and options and the device, but of a CPU neither
    its instructions nor its cores, and a program for another CPU crashes: so each kind of CPU has a folder of its own.
    Returns that folder, or None where nothing is kept: a folder that cannot be written costs a warning and no more.
    Where jax's own variable JAX_COMPILATION_CACHE_DIR names a folder (or bucket), jax uses that and no other.
    """
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(given)
    folder = _writable_folder(directory) if directory else None
    compilation_cache.reset_cache()  # jax asks once a process for the folder, and some process has asked before
    jax.config.update("jax_compilation_cache_dir", str(folder) if folder else None)
    if folder:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        _drop_oldest(folder)
    return folder


def _writable_folder(directory: str) -> Path | None:
    folder = Path(directory).expanduser().absolute() / _host_fingerprint()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever can write here runs code in our name
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.warning(
            "train.compilation_cache_dir = %s cannot be written (%s): every start compiles anew", directory, error
        )
        return None


def _host_fingerprint() -> str:
    """A word that differs where XLA:CPU would compile another program: instructions and number of cores."""
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
    """Delete the entries that were written first until half of the allowed size is free."""
    entries = sorted((entry.stat().st_mtime, entry.stat().st_size, entry) for entry in folder.iterdir())
    excess = sum(size for _, size, _ in entries) - _MAX_BYTES
    if excess <= 0:
        return
    excess += _MAX_BYTES // 2
    for _, size, entry in entries:
        if excess > 0 and entry.is_file():
            entry.unlink(missing_ok=True)  # another process may be at it too
            excess -= size


def compiler_options(devices: Sequence[jax.Device]) -> dict[str, bool | int]:
    """XLA's options for a training step on these devices, for `jax.jit(compiler_options=...)`.

    TPU: none. Asked of libtpu 0.0.52 about a step of two layers, data parallel: on v5e the options that overlap
    collectives (async_collective_fusion and its all-gather and all-reduce, overlap_compute_collective_tc,
    enable_async_all_gather, data_parallel_all_reduce_opt, latency_hiding_scheduler) give the same program, because
    what helps there is the default; v5p and v6e refuse the fusion of all-gathers. A scoped_vmem_limit of 64 or 96 MiB
    costs v5e 3 and 12 % of its cycles; 64 MiB saved v6e 3 % of a narrow model's, which no wider one has confirmed.
    """
    if devices[0].platform == "gpu" and len(devices) > 1:
        # Sums of gradients move behind the matmuls of the backward pass. NVIDIA's own JAX images set it
        # (docs.nvidia.com/jax-toolbox, "Environment Variables"); one GPU has no collectives to hide.
        return {"xla_gpu_enable_latency_hiding_scheduler": True}
    return {}


def initial_values_options(devices: Sequence[jax.Device]) -> dict[str, bool | int]:
    """XLA's options for the one program that draws the initial weights.

    A CPU compiles it at optimization level 1 three to four times as fast, and it runs as fast (the quickstart: 3.0
    to 4.7 s against 1.0; 124M runs 2.4 s either way, at level 0 12 s). What XLA_FLAGS says goes before.
    """
    if devices[0].platform == "cpu" and "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
        return {"xla_backend_optimization_level": 1}
    return {}
