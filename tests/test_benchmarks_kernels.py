"""Reading the schedules of kernels that libtpu writes down (benchmarks/), and the table made of them."""

import sys
import textwrap
from pathlib import Path

import pytest

from jaxgpt.planning import cost

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import attention_cycles
import kernel_schedules as kernels

SCHEDULE = textwrap.dedent("""\
    LB: loop body
         0   :  { %s1 = smov.u32 0 }
       0x1 LB: > { %p2 = scmp.ne.s32.totalorder %s9, 0 }
       0x2   : > { %4 = sbr.rel (%p2) target = $region12 }
       0x3   :  {}
       0x4   :  {}
       0x5   :  {}
       0x6   :  {} /* End region 10 */
       0x7   : > { %v1 = vmatmul.bf16.gmra.mxu0 %v0  ;;  %v2 = vmatmul.bf16.gmra.mxu1 %v0 } /* base: (1,
    2)
    more: 3 */ }
       0x8   : > { %v3 = vadd.f32 %v1, %v2 }
       0x9   : > { %v4 = vmul.f32 %v1, %v2 }
       0xa PF: > { %s5 = sadd.s32 1, %s1 } /* Start/End empty region 12 :: Start region 13 */
       0xb   : > { %p6 = scmp.ge.s32.totalorder %s5, 96 /* loop exit test */ }
       0xc   : > { %7 = sbr.rel (!%p6) target = $region4 }
       0xd   :  {}
       0xe   :  { %8 = vsyncadd }
    """)


def test_a_schedule_runs_its_loop_as_often_as_the_grid_has_steps():
    bundles = kernels.parse_bundles(SCHEDULE)
    loop, when = kernels.find_regions(bundles)
    assert len(bundles) == 15
    assert (loop.kind, loop.start, loop.stop, loop.times) == ("loop", 1, 14, 96)
    assert (when.kind, when.start, when.stop) == ("when", 7, 10)
    assert sum(kernels.bundle_weights(15, [loop, when])) == 96 * 13 + 2
    assert sum(kernels.bundle_weights(15, [loop, when], {1: 0.5})) == 96 * 10 + 96 * 3 * 0.5 + 2


def test_matrix_units_that_are_busy_longer_than_their_bundles_set_the_time():
    bundles = kernels.parse_bundles(SCHEDULE)
    busy = [kernels._matrix_unit_cycles(bundle) for bundle in bundles]
    assert busy[7] == 16 and sum(busy) == 16
    schedule = kernels.Schedule("k", 15, busy, kernels.find_regions(bundles), None)
    assert schedule.scheduled() == 96 * (6 + 16 + 4) + 2
    assert schedule.cycles == schedule.scheduled()


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(RuntimeError, match="bundle 1"):
        kernels.find_regions(kernels.parse_bundles(SCHEDULE.replace("/* loop exit test */", "")))


@pytest.mark.system
def test_the_plans_cycles_of_attention_are_what_the_compiler_says_of_the_kernels_today():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra: plan)")
    measured = attention_cycles.cell_cycles("v5e", 1024, 64)
    assert measured == pytest.approx(cost._CELL_CYCLES["v5e"], rel=0.05), "run benchmarks/attention_cycles.py again"
