"""TPU slices by the names they are rented under, and the devices that the TPU compiler compiles for.

libtpu holds the compiler. It runs on any x86-64 Linux, and needs no TPU to compile for one.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterable
from importlib.metadata import version

import jax
from jax.experimental import topologies

from jaxgpt.errors import UserError, how_to_install
from jaxgpt.parallel.chips import CHIPS

_Shapes = dict[int, tuple[int, ...]]
_FLAT: _Shapes = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBIC: _Shapes = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
    512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """The slices of a generation of chips, as Google names them (Cloud TPU docs, "TPU versions"; MaxText's table)."""

    rented: str  # the first part of a rented slice's name: v5p in v5p-16
    shapes: _Shapes  # chips of a slice -> chips along each axis
    hbm_gib: float  # that a program may use on one jax device, as libtpu 0.0.52 says when a program is too large
    counted: int = 1  # how much the number in a slice's name grows for each chip: 2 where it counts TensorCores
    chip_config: str | None = None  # libtpu's name of the chip's configuration, where it has several


# Keys are the names of parallel.chips.CHIPS; the rented name is also libtpu's.
FAMILIES = {
    "v4": Family("v4", _CUBIC, hbm_gib=30.75, counted=2, chip_config="megacore"),
    "v5e": Family("v5e", _FLAT, hbm_gib=15.75),
    "v5p": Family("v5p", _CUBIC | {4096: (16, 16, 16), 6144: (16, 16, 24)}, hbm_gib=95.73, counted=2),
    "v6e": Family("v6e", _FLAT, hbm_gib=31.24),
    "v7x": Family("tpu7x", _CUBIC, hbm_gib=94.74, counted=2),
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v6": "v6e", "v7x": "v7x", "v7": "v7x"}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are rented together."""

    name: str
    family: str
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:  # of jax
        return self.chips * CHIPS[self.family].devices_per_chip

    @property
    def hosts(self) -> int:
        """Machines that the chips are attached to, 4 chips each; flat families also have machines of 1 and 8."""
        flat = len(self.shape) == 2
        return 1 if self.chips <= (8 if flat else 4) else self.chips // 4

    @property
    def hbm_bytes(self) -> int:
        """Bytes that a program may use on one device."""
        return round(FAMILIES[self.family].hbm_gib * 2**30)

    @property
    def topology(self) -> str:
        """The name that libtpu knows the slice by: "v5e:2x4"."""
        return f"{FAMILIES[self.family].rented}:{'x'.join(map(str, self.shape))}"

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes are rings: those of 16 chips in flat families, all in slices of whole 4x4x4 cubes."""
        if len(self.shape) == 2:
            return tuple(size == 16 for size in self.shape) + (False,)
        return (all(size % 4 == 0 for size in self.shape),) * 3


def parse_slices(text: str) -> list[Slice]:
    """The slices that "v5e-1,v5e-8,v5p:2x2x2" names, in that order.

    Raises:
        UserError: a name is unknown; lists the known ones.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tpu names no slice; {_known(FAMILIES)}")
    return [parse_slice(name) for name in names]


def parse_slice(name: str) -> Slice:
    """The slice of one name, checked as by `parse_slices`."""
    match = re.fullmatch(r"([a-z0-9]+)([-:])(\d+(?:x\d+)*)", name.lower())
    by_name = _ALIASES | {family.rented: key for key, family in FAMILIES.items()}
    family = by_name.get(match[1]) if match else None
    if match is None or family is None:
        raise UserError(f"--tpu {name}: no such slice; {_known(FAMILIES)}")
    cut = FAMILIES[family]
    if match[2] == ":":
        shape = tuple(map(int, match[3].split("x")))
        axes = len(next(iter(cut.shapes.values())))
        if len(shape) != axes or 0 in shape:
            example = "x".join("2" * axes)
            raise UserError(f"--tpu {name}: {family} slices have {axes} axes, for example {family}:{example}")
        return Slice(name, family, shape)
    chips, rest = divmod(int(match[3]), cut.counted) if "x" not in match[3] else (0, 0)
    if rest or chips not in cut.shapes:
        raise UserError(f"--tpu {name}: no such slice; {_known([family])}")
    return Slice(name, family, cut.shapes[chips])


def known_slices(family: str) -> list[Slice]:
    """Every slice of a family that has a name, the smallest first."""
    cut = FAMILIES[family]
    return [Slice(f"{cut.rented}-{chips * cut.counted}", family, shape) for chips, shape in cut.shapes.items()]


def _known(families: Iterable[str]) -> str:
    listed = []
    for cut in (FAMILIES[family] for family in families):
        numbers = ",".join(str(chips * cut.counted) for chips in cut.shapes)
        listed.append(f"{cut.rented}-{{{numbers}}}")
    return (
        f"known: {' '.join(listed)}; or a shape in chips, as in v5p:2x2x4 "
        "(the numbers of v4, v5p and tpu7x count two cores a chip)"
    )


class NoTpuCompiler(Exception):
    """libtpu is not installed. The text says how to get it."""


def tpu_compiler_version() -> str:
    """libtpu's version; NoTpuCompiler where it is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise NoTpuCompiler(f"libtpu, the TPU compiler, is not installed: {how_to_install('plan')} (x86-64 Linux only)")
    return version("libtpu")


def compile_only_devices(where: Slice) -> list[jax.Device]:
    """jax devices of the slice that programs can be compiled for but not run on.

    Raises:
        NoTpuCompiler: there is no libtpu here.
        UserError: this libtpu does not know the slice.
    """
    tpu_compiler_version()
    # libtpu reads these when it is loaded. Without them it asks Google's metadata server what machine this is, and
    # refuses to be loaded twice, which protects a TPU that is not in use here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    cut = FAMILIES[where.family]
    bounds = tuple(min(size, limit) for size, limit in zip(where.shape + (1,), (2, 2, 1)))
    try:
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=where.topology,
            chips_per_host_bounds=bounds,
            wrap=list(where.wrap),
            **({"chip_config_name": cut.chip_config} if cut.chip_config else {}),
        )
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--tpu {where.name}: libtpu {version('libtpu')} does not know it ({reason})") from None
    return list(topology.devices)
