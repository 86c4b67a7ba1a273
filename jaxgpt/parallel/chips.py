"""TPU chips: what they can do at best."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one jax device, except where they say chip. Decimal units."""

    name: str
    peak_flops: float
    """bf16 FLOP/s."""
    flops_per_cycle: int
    """bf16, all matrix units of the device together."""
    hbm_bytes: float
    hbm_bandwidth: float
    """Bytes per second."""
    ici_bandwidth: float
    """Of a chip: bytes per second, all links, both ways."""
    ici_axes: int
    """Axes of the network between chips: each chip has two links an axis."""
    devices_per_chip: int = 1

    @property
    def clock_hz(self) -> float:
        """Implied by the peak. The compiler's cycles are of this clock: its own simulation of a matmul of 8192^3 runs
        at 96 (v5e), 95 (v5p), 90 (v6e), 94 % (v7x) of `flops_per_cycle` (libtpu 0.0.52)."""
        return self.peak_flops / self.flops_per_cycle


def _chip(name, teraflops, matrix_units, rows, hbm_gb, hbm_gb_s, ici_gb_s, axes, devices=1) -> Chip:
    """`matrix_units` of `rows` x `rows` a chip. From the 256-wide generation on they take two rows a cycle."""
    per_cycle = matrix_units * rows * rows * 2 * (2 if rows == 256 else 1) // devices
    return Chip(
        name=name,
        peak_flops=teraflops * 1e12 / devices,
        flops_per_cycle=per_cycle,
        hbm_bytes=hbm_gb * 1e9 / devices,
        hbm_bandwidth=hbm_gb_s * 1e9 / devices,
        ici_bandwidth=ici_gb_s * 1e9,
        ici_axes=axes,
        devices_per_chip=devices,
    )


# Peaks, memory and links: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read 2026-11; matrix units:
# jax/_src/tpu_info.py of jax 0.12 (a core's, times cores). v4 is compiled with both cores as one device ("megacore").
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
