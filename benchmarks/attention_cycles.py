"""Cycles of the attention kernels on each TPU generation: the table in jaxgpt/planning/cost.py.

    python benchmarks/attention_cycles.py [--only v5e] [--positions 1024] [--head-size 64] [--segments]

To be run again when jaxgpt/model/flash.py changes. All cells of the kernels' grid are alike, so the cycles of one are
the difference between two small grids. Needs libtpu and no TPU; takes a minute a chip on two quiet cores.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the chips are compiled for, not run on

import jax
import jax.numpy as jnp
from kernel_schedules import kernel_schedules

from jaxgpt.model.flash import flash_attention
from jaxgpt.planning.topology import FAMILIES, compile_only_devices, parse_slice

KERNELS = ("attention_forward", "attention_backward")
WIDTH = 768


def slice_of(chip: str) -> str:
    """The smallest slice of a chip that is a whole host."""
    axes = len(next(iter(FAMILIES[chip].shapes.values())))
    return f"{FAMILIES[chip].rented}:{'2x2' if axes == 2 else '2x2x1'}"


def compiled_text(chip: str, rows: int, positions: int, head_size: int, segments: bool) -> str:
    """A program with one forward and one backward call."""
    where = jax.sharding.SingleDeviceSharding(compile_only_devices(parse_slice(slice_of(chip)))[0])
    flat = jax.ShapeDtypeStruct((rows, positions, WIDTH), jnp.bfloat16, sharding=where)
    numbers = jax.ShapeDtypeStruct((rows, positions), jnp.int32, sharding=where)

    def attend(q_BTW, k_BTW, v_BTW, *segments_BT):
        heads = (x.reshape(rows, positions, -1, head_size) for x in (q_BTW, k_BTW, v_BTW))
        return flash_attention(*heads, *segments_BT).reshape(q_BTW.shape)

    def both(q_BTW, k_BTW, v_BTW, dout_BTW, *segments_BT):
        out_BTW, gradients = jax.vjp(lambda *qkv: attend(*qkv, *segments_BT), q_BTW, k_BTW, v_BTW)
        return out_BTW, gradients(dout_BTW)

    return jax.jit(both).lower(*[flat] * 4, *[numbers] * segments).compile().as_text()


def cell_cycles(chip: str, positions: int, head_size: int, segments: bool = False) -> list[float]:
    """Cycles of one cell of the grid, for each of the KERNELS."""
    found = []
    for rows in (2, 4):
        schedules = kernel_schedules(compiled_text(chip, rows, positions, head_size, segments), slice_of(chip))
        found.append([next(s.cycles for s in schedules if name in s.name) for name in KERNELS])
    return [(more - less) / (2 * WIDTH / 128) for less, more in zip(*found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAMILIES, action="append", help="only this chip; may be repeated")
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--segments", action="store_true", help="rows hold several conversations")
    arguments = parser.parse_args()
    for chip in arguments.only or FAMILIES:
        forward, backward = cell_cycles(chip, arguments.positions, arguments.head_size, arguments.segments)
        print(f'    "{chip}": ({forward:.0f}, {backward:.0f}),', flush=True)


if __name__ == "__main__":
    main()
