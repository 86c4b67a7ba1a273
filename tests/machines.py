"""Cases for the doctor, and the folders /dev, /proc and /sys of machines that a test does not run on."""

import dataclasses
from pathlib import Path

from jaxgpt.config import Config
from jaxgpt.diagnosis.finding import Case
from jaxgpt.settings import DataConfig

SECRET = "canary-7391"  # must never be printed


def case(folder: Path, **changes) -> Case:
    """The defaults, with the folders of data and run below `folder`."""
    config = Config(data=DataConfig(prepared_dir=str(folder / "prepared")))
    return dataclasses.replace(Case(config, str(folder / "run")), **changes)


def with_tpu(root: Path, chips: int = 1, files: bool = True) -> Path:
    """A TPU v5e VM; without `files`, a container on it that was not given the chips."""
    for number in range(chips):
        device = root / f"sys/bus/pci/devices/0000:00:0{number + 4}.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x1ae0\n")
        (device / "device").write_text("0x0063\n")
        if files:
            (root / "dev/vfio").mkdir(parents=True, exist_ok=True)
            (root / f"dev/vfio/{number}").touch()
    return root


def with_gpu(root: Path) -> Path:
    """A machine with an NVIDIA GPU and a driver of 2025."""
    (root / "dev").mkdir(parents=True)
    (root / "dev/nvidia0").touch()
    (root / "proc/driver/nvidia").mkdir(parents=True)
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 24 21:14:33 UTC 2025\n"
    (root / "proc/driver/nvidia/version").write_text(version)
    return root


def with_process(root: Path, pid: int, command: list[str], opened: str) -> Path:
    """A process that has a file open."""
    (root / f"proc/{pid}/fd").mkdir(parents=True)
    (root / f"proc/{pid}/fd/3").symlink_to(opened)
    (root / f"proc/{pid}/cmdline").write_bytes("\0".join(command).encode() + b"\0")
    return root
