"""Cycles of the attention kernels on each TPU generation, for the plan: jaxgpt/planning/attention_cycles.toml.

    python benchmarks/attention_cycles.py [--only v5e] > jaxgpt/planning/attention_cycles.toml

To be run again when jaxgpt/model/flash.py changes. All cells of the kernels' grid are alike, so the cycles of one are
the difference between two small grids. Needs libtpu and no TPU; takes half a minute for each of 14 programs a chip.
"""

import argparse
import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the chips are compiled for, not run on

import jax
import jax.numpy as jnp
from kernel_schedules import kernel_schedules

from jaxgpt.model.flash import LANES, flash_attention
from jaxgpt.planning.topology import FAMILIES, compile_only_devices, parse_slice

POSITIONS = (256, 1024, 2048)
KERNELS = ("attention_forward", "attention_backward")


def slice_of(chip: str) -> str:
    """The smallest slice of a chip that is a whole host."""
    axes = len(next(iter(FAMILIES[chip].shapes.values())))
    return f"{FAMILIES[chip].rented}:{'2x2' if axes == 2 else '2x2x1'}"


def compiled_text(chip: str, rows: int, positions: int, heads: int, segments: bool) -> str:
    """A program of one forward and one backward call, for `heads` that fill the lanes of one group."""
    where = jax.sharding.SingleDeviceSharding(compile_only_devices(parse_slice(slice_of(chip)))[0])
    flat = jax.ShapeDtypeStruct((rows, positions, LANES), jnp.bfloat16, sharding=where)
    numbers = jax.ShapeDtypeStruct((rows, positions), jnp.int32, sharding=where)

    def attend(q_BTW, k_BTW, v_BTW, *segments_BT):
        q_BTNH, k_BTNH, v_BTNH = (x.reshape(rows, positions, heads, -1) for x in (q_BTW, k_BTW, v_BTW))
        return flash_attention(q_BTNH, k_BTNH, v_BTNH, *segments_BT).reshape(q_BTW.shape)

    def both(q_BTW, k_BTW, v_BTW, dout_BTW, *segments_BT):
        out_BTW, gradients = jax.vjp(lambda *qkv: attend(*qkv, *segments_BT), q_BTW, k_BTW, v_BTW)
        return out_BTW, gradients(dout_BTW)

    return jax.jit(both).lower(*[flat] * 4, *[numbers] * segments).compile().as_text()


def cell_cycles(chip: str, positions: int, heads: int, segments: bool = False) -> list[float]:
    """Cycles of one cell of the grid, of each of the KERNELS."""
    found = []
    for rows in (2, 4):
        schedules = kernel_schedules(compiled_text(chip, rows, positions, heads, segments), slice_of(chip))
        found.append([next(s.cycles for s in schedules if name in s.name) for name in KERNELS])
    return [(more - less) / 2 for less, more in zip(*found)]


def table_of(chip: str) -> str:
    """The chip's part of the TOML file."""
    one, two = ([cell_cycles(chip, positions, heads) for positions in POSITIONS] for heads in (1, 2))
    segments = cell_cycles(chip, 1024, 2, segments=True)
    lines = []
    for number, name in enumerate(KERNELS):
        lines += [f"[{chip}.{name}]"]
        for key, cells in (("one_head", one), ("two_heads", two)):
            lines.append(f"{key} = [{', '.join(f'{cycles[number]:.0f}' for cycles in cells)}]")
        lines.append(f"segments = {segments[number] / two[POSITIONS.index(1024)][number]:.3f}\n")
    return "\n".join(lines)


HEADER = """\
# Cycles of the attention kernels (jaxgpt/model/flash.py) by the TPU compiler's own schedules, for one cell of the grid:
# a row, and one head of 128 or two of 64, at each number of positions. `segments` is the factor where rows hold several
# conversations (two heads, 1024 positions). Made by benchmarks/attention_cycles.py, jax {jax}, libtpu {libtpu}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAMILIES, help="only the part of this chip")
    arguments = parser.parse_args()
    if not arguments.only:
        print(HEADER.format(jax=jax.__version__, libtpu=version("libtpu")))
        print(f"positions = {list(POSITIONS)}\n")
    for chip in [arguments.only] if arguments.only else FAMILIES:
        print(table_of(chip), flush=True)


if __name__ == "__main__":
    main()
