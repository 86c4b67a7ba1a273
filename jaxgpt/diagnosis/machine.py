"""The host's memory, cores, shared memory and open files."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.diagnosis.finding import OK, WARNING, Case, Finding
from jaxgpt.parallel.accelerator import accelerators

_OPEN_FILES = 1024  # Orbax and ArrayRecord keep dozens of files open, and a compile cache hundreds
_SPARE_MEMORY = 1 << 30
_SHARED_MEMORY = 256 << 20  # NCCL hands data from GPU to GPU through it; Docker gives 64 MiB


def resources(case: Case) -> Iterator[Finding]:
    """Finds "memory" and "open files"."""
    root = Path(case.root)
    yield _memory(root)
    yield _open_files()


def _memory(root: Path) -> Finding:
    memory = _meminfo(root)
    limit = _container_limit(root)
    total, free = memory.get("MemTotal", 0), memory.get("MemAvailable", 0)
    if limit is not None and limit[0] < total:
        total, free = limit[0], min(free, limit[0] - limit[1])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"total_bytes": total, "free_bytes": free, "cores": cores}
    text = f"{in_words(free)} of {in_words(total)} free, {cores} cores" if total else f"size not known, {cores} cores"
    shared = root / "dev/shm"
    if shared.is_dir():
        facts["shared_bytes"] = shutil.disk_usage(shared).free
        text += f", {in_words(facts['shared_bytes'])} of shared memory"
    if total and free < _SPARE_MEMORY:
        return Finding("memory", WARNING, text, "end what else uses memory (ps aux --sort=-rss), or add some", facts)
    gpus = sum(len(found.device_files) for found in accelerators(root) if found.kind == "gpu")
    if gpus > 1 and facts.get("shared_bytes", _SHARED_MEMORY) < _SHARED_MEMORY:
        return Finding("memory", WARNING, text, "give the container more: docker run --shm-size=1g", facts)
    return Finding("memory", OK, text, facts=facts)


def _meminfo(root: Path) -> dict[str, int]:
    """{"MemTotal": bytes, ...}; empty where the system is no Linux."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def _container_limit(root: Path) -> tuple[int, int] | None:
    """(bytes that the container may use, bytes that it uses); None without a limit. Of cgroup 2, then of cgroup 1."""
    for folder, limit, used, cached in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now, statistics = [(root / folder / name).read_text() for name in (limit, used, "memory.stat")]
        except OSError:
            continue
        if most.strip() == "max":
            return None
        given_back = dict(line.split() for line in statistics.splitlines()).get(
            cached, 0
        )  # files that the kernel caches
        return int(most), int(now) - int(given_back)
    return None


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    facts = {"soft": soft, "hard": hard}
    if soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES:
        return Finding("open files", OK, f"at most {soft:,} at once" if soft >= 0 else "no limit", facts=facts)
    wanted = max(_OPEN_FILES, 4096) if hard < 0 else min(4096, hard)
    return Finding("open files", WARNING, f"at most {soft:,} at once", f"ulimit -n {wanted} before the start", facts)


def in_words(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
