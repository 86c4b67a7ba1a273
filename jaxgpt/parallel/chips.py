"""The one table of chips, with their peaks, for MFU and for the plan."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation. Figures are of one jax device, except where they say chip. Decimal units."""

    name: str
    peak_flops: float  # bf16 FLOP/s
    flops_per_cycle: int  # bf16, all matrix units of the device together
    hbm_bytes: float
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second of a chip, all links, both ways
    ici_axes: int  # of the network between chips: each chip has two links per axis
    devices_per_chip: int = 1

    @property
    def clock_hz(self) -> float:
        """The clock that the peak implies, and that the compiler's cycles refer to: its own simulation of a matmul of
        8192^3 runs at 96 (v5e), 95 (v5p), 90 (v6e), 94 % (v7x) of `flops_per_cycle` (libtpu 0.0.52)."""
        return self.peak_flops / self.flops_per_cycle


def _chip(
    name: str, tflops: float, units: int, rows: int, hbm: float, hbm_gbs: float, ici: float, axes: int, devices: int = 1
) -> Chip:
    """`units` matrix units of `rows` x `rows` a chip. From the 256-wide generation on they take two rows a cycle."""
    return Chip(
        name=name,
        peak_flops=tflops * 1e12 / devices,
        flops_per_cycle=units * rows * rows * 2 * (2 if rows == 256 else 1) // devices,
        hbm_bytes=hbm * 1e9 / devices,
        hbm_bandwidth=hbm_gbs * 1e9 / devices,
        ici_bandwidth=ici * 1e9,
        ici_axes=axes,
        devices_per_chip=devices,
    )


# Peaks, memory and links: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read 2026-11; matrix units:
# jax/_src/tpu_info.py of jax 0.12 (those of a core, times cores). v4 is compiled with both cores as one device
# ("megacore").
CHIPS = {
    chip.name: chip
    for chip in (
        # name, TFLOP/s, matrix units and their size, HBM GB and GB/s, ICI GB/s and axes, devices
        _chip("v4", 275, 8, 128, 34.4, 1_228, 540, 3),
        _chip("v5e", 197, 4, 128, 17.2, 819, 400, 2),
        _chip("v5p", 459, 8, 128, 103.0, 2_765, 1_200, 3),
        _chip("v6e", 918, 2, 256, 34.4, 1_638, 800, 2),
        _chip("v7x", 2_307, 4, 256, 206.0, 7_380, 1_200, 3, devices=2),
    )
}

# Dense bf16 TFLOP/s of one jax device by the whole of `device.device_kind`. A device is a chip, except on TPU v2, v3
# and v7, where it is one of the chip's two cores (as libtpu 0.0.52 reports). Where NVIDIA prints only the figure "with
# sparsity", the dense one is half of it. V100 and T4 have no bf16 units: float16 is their only matmul peak.
_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"TPU v2", 46 / 2),  # jax/_src/tpu_info.py, 46 a chip
    (r"TPU v3", 123 / 2),  # Cloud TPU docs "TPU v3", 123 a chip
    (r"TPU v4", CHIPS["v4"].peak_flops / 1e12),
    (r"TPU v5( lite|e)", CHIPS["v5e"].peak_flops / 1e12),
    (r"TPU v5p?", CHIPS["v5p"].peak_flops / 1e12),
    (r"TPU v6( lite|e)", CHIPS["v6e"].peak_flops / 1e12),
    (r"TPU7x", CHIPS["v7x"].peak_flops / 1e12),
    (r"(Tesla|NVIDIA) V100-SXM2-\d+GB", 125),  # V100 datasheet (float16)
    (r"(Tesla|NVIDIA) V100-PCIE-\d+GB", 112),  # V100 datasheet (float16)
    (r"(Tesla|NVIDIA) T4", 65),  # T4 datasheet (float16)
    (r"NVIDIA A10", 125),  # A10 datasheet
    (r"(NVIDIA )?A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe", 312),  # A100 datasheet
    (r"NVIDIA L4", 121),  # Ada architecture whitepaper v2.1
    (r"NVIDIA L40", 181),  # Ada architecture whitepaper v2.1
    (r"NVIDIA L40S", 362),  # L40S datasheet, 733 with sparsity
    (r"NVIDIA H100 80GB HBM3", 989.4),  # H100 datasheet (SXM), 1979 with sparsity
    (r"NVIDIA H100 PCIe", 756),  # H100 datasheet (PCIe), 1513 with sparsity
    (r"NVIDIA H100 NVL", 835.5),  # H100 datasheet (NVL), 1671 with sparsity
    (r"NVIDIA H200", 989.4),  # H200 datasheet (SXM), 1979 with sparsity
    (r"NVIDIA B200", 2250),  # HGX B200 datasheet, per GPU
    (r"NVIDIA GeForce RTX 3090", 71),  # GA102 whitepaper, bf16 with float32 accumulate
    (r"NVIDIA GeForce RTX 4090", 165.2),  # Ada whitepaper, bf16 with float32 accumulate
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak FLOP/s of one jax device by `device.device_kind`; None if not known (CPU)."""
    return next((tflops * 1e12 for pattern, tflops in _PEAK_TFLOPS if re.fullmatch(pattern, device_kind)), None)
