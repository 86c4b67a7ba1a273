"""This machine before jax starts: signs of a TPU or GPU, the package that jax lacks for it, the memory allocator.

The signs are read from /dev, /sys and /proc without jax. The functions take the `root` of these folders, so that a test
can give them another machine's.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import re
from pathlib import Path

from jaxgpt.errors import UserError

# Google's chips on the PCI bus, as jax knows them (jax/_src/hardware_utils.py). The vendor alone is no sign: the
# network card and disks of a virtual machine have it too.
_GOOGLE = "0x1ae0"
_TPU_CHIPS = {
    "0x0027": "TPU v2 or v3",
    "0x0056": "TPU",
    "0x005e": "TPU v4",
    "0x0062": "TPU v5p",
    "0x0063": "TPU v5e",
    "0x006f": "TPU v6e",
    "0x0076": "TPU v7x",
    "0x0083": "TPU 8i",
    "0x007c": "TPU 8t",
}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A kind of accelerator that this machine has, whether or not jax can use it."""

    kind: str  # tpu or gpu: the names of jax's backends
    what: str  # number and name, such as "4 x TPU v5e"
    device_files: tuple[str, ...]  # those a program opens to use it; none in a container that was not given it


def cache_folder() -> Path | None:
    """The folder where this machine keeps compiled programs; None where it is off, or a bucket of JAX's own.

    It belongs to the machine, never to an experiment: what lies in it is run, so no config that came with a run may
    name it. JAX's own variables say otherwise: JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/jaxgpt/xla"
    is_off = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("0", "false", "no", "off")
    return None if is_off or "://" in given else Path(given).expanduser().absolute()


def accelerators(root: Path = Path("/")) -> list[Accelerator]:
    """The TPUs and GPUs that this machine shows signs of: at most one entry a kind."""
    return [found for found in (_tpu(root), _gpu(root)) if found]


def _tpu(root: Path) -> Accelerator | None:
    chips = []
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        with contextlib.suppress(OSError):  # a device that is being taken away
            if vendor.read_text().strip() == _GOOGLE:
                chips.append(_TPU_CHIPS.get(vendor.with_name("device").read_text().strip()))
    chips = [chip for chip in chips if chip]
    files = _names(root, "dev/accel[0-9]*")
    if chips:
        files += _names(root, "dev/vfio/[0-9]*")  # other devices may be handed out through vfio too
        return Accelerator("tpu", f"{len(chips)} x {chips[0]}", files)
    return Accelerator("tpu", f"{len(files)} x TPU", files) if files else None


def _gpu(root: Path) -> Accelerator | None:
    """The NVIDIA GPUs, if their driver runs; without it they are display adapters."""
    files = _names(root, "dev/nvidia[0-9]*")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # hidden on purpose
        return None
    count = len(files) or len(list(root.glob("proc/driver/nvidia/gpus/*")))
    return Accelerator("gpu", f"{count} x NVIDIA GPU", files) if count else None


def _names(root: Path, pattern: str) -> tuple[str, ...]:
    return tuple(f"/{path.relative_to(root)}" for path in sorted(root.glob(pattern)))


def nvidia_driver(root: Path = Path("/")) -> str | None:
    """The version of the running NVIDIA driver, such as "580.65.06"."""
    try:
        found = re.search(r"Module\S*\s.*?(\d+\.\d+(?:\.\d+)?)", (root / "proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None


def plugin_to_install(kind: str, root: Path = Path("/")) -> str | None:
    """The package that jax lacks for this kind of accelerator, as pip names it; None where one is installed."""
    if kind == "tpu":
        return None if importlib.util.find_spec("libtpu") else "jax[tpu]"
    if any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        return None
    # CUDA 13 needs the driver 580 or newer, CUDA 12 the driver 525 (docs.jax.dev, "Installation").
    driver = nvidia_driver(root)
    return "jax[cuda12]" if driver and int(driver.split(".")[0]) < 580 else "jax[cuda13]"


def refuse_silent_cpu(root: Path = Path("/")) -> None:
    """Refuse to train on the CPU of a machine with an accelerator. Call it once jax has its devices.

    Raises:
        UserError: the machine has a TPU or GPU, but jax runs on the CPU, and JAX_PLATFORMS does not ask for it.
    """
    import jax

    if jax.default_backend() != "cpu" or asks_for_cpu(jax_platforms()):
        return
    for found in accelerators(root):
        if not found.device_files:
            continue
        package = plugin_to_install(found.kind, root)
        fix = f'pip install -U "{package}"' if package else f"jaxgpt doctor --expect {found.kind} says why"
        raise UserError(
            f"this machine has {found.what} ({found.device_files[0]}), but jax sees only the CPU; {fix}; or set "
            "JAX_PLATFORMS=cpu to train on the CPU all the same"
        )


def jax_platforms() -> str:
    """The platforms that jax was asked to use, by JAX_PLATFORMS or in code, separated by commas; "" for any."""
    import jax

    return jax.config.jax_platforms or ""  # type: ignore[attr-defined]  # jax's stubs lack it


def asks_for_cpu(platforms: str | None) -> bool:
    """Whether JAX_PLATFORMS, a list separated by commas, names the CPU."""
    return "cpu" in (platforms or "").lower().split(",")


# glibc's mallopt parameters (malloc.h) and their values
_MALLOC_SETTINGS = (
    (-4, 0),  # M_MMAP_MAX: large blocks come from the heap, not from fresh pages that the kernel has to zero
    (-1, -1),  # M_TRIM_THRESHOLD: freed memory stays with the process
    (-2, 64 << 20),  # M_TOP_PAD: the heap grows 64 MB at a time
    (-8, 1),  # M_ARENA_MAX: one heap, so that what one thread frees another one finds
)


def keep_freed_memory() -> bool:
    """Have the allocator keep freed memory instead of returning it to the kernel after every step.

    XLA's CPU backend allocates a step's temporaries anew each time; by default their pages are unmapped and faulted in
    again (2 cores, float32: 124M 3.17 against 2.80 s a step, the quickstart 5,400 against 7,300 tokens a second). The
    process keeps more memory. Call it before jax is imported: after that it changes nothing, because jax's threads
    have their own heaps. True if the C library has the setting (glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc: another allocator, with its own habits
        return False
    return all(mallopt(parameter, value) for parameter, value in _MALLOC_SETTINGS)
