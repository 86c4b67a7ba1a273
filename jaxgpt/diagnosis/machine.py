"""This host: its packages, memory, cores and open files, who holds a file, and whether the run's other hosts answer."""

import contextlib
import dataclasses
import importlib.util
import os
import platform
import resource
import shutil
import socket
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import jaxgpt
from jaxgpt import __version__
from jaxgpt.diagnosis.finding import NOT_APPLICABLE, OK, PROBLEM, WARNING, Case, Finding
from jaxgpt.parallel.accelerator import accelerators
from jaxgpt.parallel.cluster_env import OWN, ProcessPlace, Unclear, find_place

_OPEN_FILES = 1024  # Orbax and ArrayRecord keep dozens of files open, and a compile cache hundreds
_SPARE_MEMORY = 1 << 30
_CONNECT_SECONDS = 5.0
_SHARED_MEMORY = 256 << 20  # NCCL hands data from GPU to GPU through it; Docker gives 64 MiB
# Packages that plug devices into jax, and the extra of jax whose requirements say which version of them it takes.
_PLUGINS = {"libtpu": ("tpu", "tpu"), "jax-cuda12-plugin": ("gpu", "cuda12"), "jax-cuda13-plugin": ("gpu", "cuda13")}


# ---------------------------------------------------------------- packages, by their metadata, without imports


def versions(case: Case) -> Iterator[Finding]:
    """Finds "python": this Python, and jaxgpt's own requirements; "jax": whether jax and its plugins fit together."""
    if importlib.util.find_spec("packaging") is None:
        text = f"Python {platform.python_version()}; versions are not compared, for packaging is not installed"
        yield Finding("python", WARNING, text, "pip install packaging")
        return
    yield own_packages()
    yield jax_versions(case)


def own_packages() -> Finding:
    try:
        wanted, requires = own_requirements()
    except metadata.PackageNotFoundError:
        text = "jaxgpt is neither installed nor beside its pyproject.toml, so what it requires is not known"
        return Finding("python", WARNING, text, "pip install -e . in the clone")
    unmet = list(unmet_requirements(requires))
    facts = {"python": platform.python_version(), "executable": sys.executable, "unmet": unmet}
    if not fits(platform.python_version(), wanted):
        text = f"Python {platform.python_version()}, but jaxgpt {__version__} requires {wanted}"
        return Finding("python", PROBLEM, text, "make a virtual environment with a newer Python", facts)
    if unmet:
        packages = " ".join(f'"{line.split(" (")[0]}"' for line in unmet)
        text = f"jaxgpt {__version__} lacks {', '.join(unmet)}"
        return Finding("python", PROBLEM, text, f"{sys.executable} -m pip install {packages}", facts)
    count = sum("extra ==" not in line for line in requires)
    text = f"Python {platform.python_version()}; jaxgpt {__version__} and the {count} packages it requires"
    return Finding("python", OK, text, facts=facts)


def own_requirements() -> tuple[str, list[str]]:
    """(Python's versions, requirements); from pyproject.toml in a source tree, where metadata may be old or absent."""
    project = Path(jaxgpt.__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        content = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        if content["name"] == "jaxgpt":
            return content["requires-python"], content["dependencies"]
    about = metadata.distribution("jaxgpt")
    return about.metadata["Requires-Python"], about.requires or []


def fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def unmet_requirements(lines: list[str], extra: str = "") -> Iterator[str]:
    """'jax>=0.10 (0.9.1 is installed)' for each requirement that this environment does not meet.

    `packaging` is what pip itself decides with.
    """
    from packaging.requirements import Requirement

    for line in lines:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        installed = version(requirement.name)
        if installed is None:
            yield f"{requirement.name}{requirement.specifier} (not installed)"
        elif not fits(installed, str(requirement.specifier)):
            yield f"{requirement.name}{requirement.specifier} ({installed} is installed)"


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def jax_versions(case: Case) -> Finding:
    """Whether jax, jaxlib and the device's plugin were released for each other, by jax's metadata."""
    jax = version("jax")
    if jax is None:
        return Finding("jax", PROBLEM, "jax is not installed", 'pip install "jax[tpu]", "jax[cuda13]" or jax')
    requires = metadata.requires("jax") or []
    installed = {name: found for name in ("jax", "jaxlib", *_PLUGINS) if (found := version(name))}
    text = ", ".join(f"{name} {found}" for name, found in installed.items())
    kinds = {found.kind for found in accelerators(Path(case.root))} | {case.expect}
    broken = [line for line in unmet_requirements(requires) if line.startswith("jaxlib")]
    if broken:
        fix = f'pip install -U "jax=={jax}" "{broken[0].split(" (")[0]}"'
        return Finding("jax", PROBLEM, f"jax {jax} needs {broken[0]}", fix, installed)
    for name, (kind, extra) in _PLUGINS.items():
        lines = unmet_requirements(requires, extra) if name in installed and kind in kinds else ()
        apart = next((line for line in lines if line.startswith(name)), None)
        if apart is None:
            continue
        fix = f'pip install -U "jax[{extra}]=={jax}"'
        if kind == "gpu":  # jax ignores a CUDA plugin of another version without a word
            text = f"jax {jax} does not use its CUDA plugin: it wants {apart}"
            return Finding("jax", PROBLEM, text, fix, installed)
        # Another libtpu may work, but was not tested.
        return Finding("jax", WARNING, f"{text}: jax {jax} was released with {apart}", fix, installed)
    idle = [name for name, (kind, _) in _PLUGINS.items() if name in installed and kind not in kinds]
    if idle:
        text += f" ({', '.join(idle)}: no such device here)"
    return Finding("jax", OK, text, facts=installed)


# ---------------------------------------------------------------- memory and open files


def resources(case: Case) -> Iterator[Finding]:
    """Finds "memory" and "open files"."""
    yield _memory(Path(case.root))
    yield _open_files()


def _memory(root: Path) -> Finding:
    memory: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):  # not Linux
        lines = (root / "proc/meminfo").read_text().splitlines()
        memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    limit = _container_limit(root)
    total, free = memory.get("MemTotal", 0), memory.get("MemAvailable", 0)
    if limit is not None and limit[0] < total:
        total, free = limit[0], min(free, limit[0] - limit[1])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, int | None] = {"total_bytes": total, "free_bytes": free, "cores": cores}
    text = f"{in_words(free)} of {in_words(total)} free, {cores} cores" if total else f"size not known, {cores} cores"
    shared = shutil.disk_usage(root / "dev/shm").free if (root / "dev/shm").is_dir() else None
    if shared is not None:
        facts["shared_bytes"] = shared
        text += f", {in_words(shared)} of shared memory"
    if total and free < _SPARE_MEMORY:
        return Finding("memory", WARNING, text, "end what else uses memory (ps aux --sort=-rss), or add some", facts)
    gpus = sum(len(found.device_files) for found in accelerators(root) if found.kind == "gpu")
    if gpus > 1 and shared is not None and shared < _SHARED_MEMORY:
        return Finding("memory", WARNING, text, "give the container more: docker run --shm-size=1g", facts)
    return Finding("memory", OK, text, facts=facts)


def _container_limit(root: Path) -> tuple[int, int] | None:
    """(bytes that the container may use, bytes that it uses), by cgroup 2 or 1; None without a limit."""
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
        file_cache = dict(line.split() for line in statistics.splitlines()).get(cached, 0)  # the kernel gives it back
        return int(most), int(now) - int(file_cache)
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


# ---------------------------------------------------------------- who holds a file


def lock_owners(lock: Path, root: Path) -> list[int]:
    """The processes that lock a file, other users' too, by the kernel's list."""
    status = lock.stat()
    wanted = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    pids = []
    try:
        lines = (root / "proc/locks").read_text().splitlines()
    except OSError:
        return []
    for line in lines:  # 1: POSIX  ADVISORY  WRITE 4711 fe:00:2146491 0 EOF; with an arrow: it waits for the lock
        fields = line.split()
        if "->" not in fields and len(fields) >= 6:
            major, minor, inode = fields[5].split(":")
            if (int(major, 16), int(minor, 16), int(inode)) == wanted and fields[4].isdigit():
                pids.append(int(fields[4]))
    return pids


def file_users(files: tuple[str, ...], root: Path) -> list[int]:
    """The processes that have one of the files open, as far as this user may see."""
    pids = []
    for folder in root.glob("proc/[0-9]*"):
        with contextlib.suppress(OSError):  # ended by now, or another user's
            if any(os.readlink(link) in files for link in (folder / "fd").iterdir()):
                pids.append(int(folder.name))
    return pids


def describe(pid: int, root: Path) -> str:
    """ "process 4711 (python -m jaxgpt.train --config ...)": the beginning of its command line, without secrets."""
    try:
        words = (root / f"proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return f"process {pid}"
    hidden = ("key", "token", "secret", "password")
    words = [word for word in words[:6] if word and not any(name in word.lower() for name in hidden)]
    return f"process {pid} ({' '.join(words)[:120]})" if words else f"process {pid}"


# ---------------------------------------------------------------- the other hosts


def joined(case: Case) -> Iterator[Finding]:
    """Finds "hosts": the coordinator, whether it has an address and answers, and proxies that may be in the way."""
    setting = case.config.mesh.distributed
    if setting == "off":
        yield Finding("hosts", NOT_APPLICABLE, "mesh.distributed = off: this process trains alone")
        return
    try:
        group = find_place(os.environ, Path(case.root))
    except Unclear as unclear:
        yield Finding("hosts", PROBLEM, unclear.text, unclear.fix)
        return
    if group is None and setting == "on":
        text = "mesh.distributed = on, but the environment names no other processes"
        yield Finding("hosts", PROBLEM, text, f"set {', '.join(OWN)} on every host, or use jaxgpt launch")
        return
    if group is None:
        yield Finding("hosts", NOT_APPLICABLE, "one host: the environment names no others")
        return
    facts = dataclasses.asdict(group)
    text = f"process {group.process_id} of {group.num_processes}, says {group.said_by}; coordinator {group.coordinator}"
    status, more, fix = _reach(group)
    proxies = proxies_in_the_way(os.environ, group.address()[0])
    if status == OK and proxies:
        status, more = WARNING, f"{more}; {', '.join(proxies)} can make jax.distributed hang"
        fix = f"unset {' '.join(proxies)}, or export no_proxy={group.address()[0]}"
    yield Finding("hosts", status, f"{text} {more}", fix, facts)


def _reach(group: ProcessPlace) -> tuple[str, str, str]:
    """Connect to the coordinator: (status, outcome, fix). Nobody listens there before a run has begun."""
    host, port = group.address()
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return PROBLEM, f"has no address: {error}", "correct the name, or put it into /etc/hosts on every host"
    try:
        with socket.socket(*address[:3]) as connection:
            connection.settimeout(_CONNECT_SECONDS)
            connection.connect(address[4])
    except ConnectionRefusedError:
        return OK, "answers, and no run listens there yet", ""
    except OSError as error:
        fix = f"start that host, and open port {port} between the hosts (firewall, network tag)"
        return PROBLEM, f"cannot be reached: {error}", fix
    if group.process_id == 0:
        fix = "end the run that is under way, or choose another port"
        return WARNING, "is this host, and something listens there already", fix
    return OK, "listens", ""


def proxies_in_the_way(environment: Mapping[str, str], host: str) -> list[str]:
    """Names of the proxy variables that gRPC would follow to `host`. Their values may hold a password."""
    spared = environment.get("no_proxy", "") + "," + environment.get("NO_PROXY", "")
    if any(end.strip() and host.endswith(end.strip().lstrip("*")) for end in spared.split(",")):
        return []
    wanted = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    return sorted(name for name, value in environment.items() if name.lower() in wanted and value)
