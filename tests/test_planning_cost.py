"""Reading a TPU program's cost: small programs written out here, in the form that XLA for TPU prints."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from jaxgpt.parallel.chips import CHIPS
from jaxgpt.planning import kernels
from jaxgpt.planning.cost import CALIBRATION, Calibration, estimate, mfu, read_program, wire_bandwidth

MATMUL = (
    "fusion(%x), kind=kOutput, calls=%inner, "
    'metadata={op_name="jit(step)/dot"}, backend_config={"estimated_cycles":"CYCLES"}'
)
V5E = CHIPS["v5e"]


def run(name: str, cycles: int) -> str:
    return f"  %{name} = f32[8]{{0}} {MATMUL.replace('CYCLES', str(cycles))}"


def computation(name: str, *lines: str, entry: bool = False) -> str:
    return "\n".join([f"{'ENTRY ' if entry else ''}%{name} (x: f32[8]) -> f32[8] {{", *lines, "}", ""])


def program(*lines: str, others: str = "") -> str:
    return "HloModule jit_step\n\n" + others + computation("main", *lines, entry=True)


def cost_of(*lines: str, others: str = ""):
    return read_program(program(*lines, others=others))


def test_cycles_are_summed_by_source_operation():
    cost = cost_of(run("a", 100), run("b", 20), '  %c = f32[8]{0} copy(%b), backend_config={"estimated_cycles":"3"}')
    assert cost.cycles == 123
    assert cost.by_operation == {"jit(step)/dot": 120, "c": 3}


def test_what_the_compiler_has_no_estimate_for_adds_nothing():
    assert cost_of(run("a", 100), run("b", 2**63 - 1)).cycles == 100


def test_a_loop_counts_as_often_as_it_runs_also_within_another_and_a_call_counts():
    others = (
        computation("cond5", "  %bound = s32[]{:T(128)} constant(5)", "  ROOT %lt = pred[] compare(%i, %bound)")
        + computation("cond3", "  %bound.1 = s32[] constant(3)", "  ROOT %lt.1 = pred[] compare(%i, %bound.1)")
        + computation("inner_body", run("a", 10))
        + computation("called", run("d", 7))
        + computation(
            "outer_body",
            "  %w = (f32[8]{0}) while(%t), condition=%cond5, body=%inner_body",
            "  %k = f32[8]{0} call(%t), to_apply=%called",
        )
    )
    cost = cost_of("  %w2 = (f32[8]{0}) while(%t), condition=%cond3, body=%outer_body", run("e", 1), others=others)
    assert cost.cycles == 3 * (5 * 10 + 7) + 1


def test_a_guard_against_something_rare_counts_its_cheap_branch_and_another_conditional_its_costly_one():
    others = computation("heavy", run("a", 1000)) + computation("light", run("b", 10))
    others += computation("middle", run("c", 600))
    guard = "  %g = (f32[8]{0}) conditional(%p, %x, %x), branch_computations={%heavy, %light}"
    choice = "  %h = (f32[8]{0}) conditional(%p, %x, %x), true_computation=%middle, false_computation=%heavy"
    cost = cost_of(guard, choice, others=others)
    assert cost.cycles == 10 + 1000
    assert cost.guarded_cycles == 1000


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=1] {'fsdp'}", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}", 8),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
    ],
)
def test_an_all_gather_sends_the_others_share_of_its_result(groups, size):
    line = f"  %g = bf16[1024,8]{{1,0}} all-gather(%x), channel_id=1, {groups}, dimensions={{0}}"
    (gather,) = cost_of(line).collectives
    assert (gather.kind, gather.group_size, gather.asynchronous) == ("all-gather", size, False)
    assert gather.bytes == pytest.approx(1024 * 8 * 2 * (size - 1) / size)


def test_collectives_of_each_kind_send_what_a_ring_needs():
    groups = "replica_groups=[1,8]<=[8], to_apply=%add"
    cost = cost_of(
        f"  %a = (f32[800]{{0}}, f32[800]{{0}}) all-reduce(%x, %y), {groups}",
        f"  %b = f32[100]{{0}} reduce-scatter(%x), {groups}, dimensions={{0}}",
    )
    all_reduce, scatter = cost.collectives
    assert all_reduce.bytes == pytest.approx(2 * 2 * 3200 * 7 / 8)
    assert scatter.bytes == pytest.approx(400 * 7)


def test_collectives_in_a_loop_count_each_time():
    others = computation("cond", "  %n = s32[] constant(12)") + computation(
        "body", "  %g = f32[80]{0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}", run("a", 5)
    )
    cost = cost_of("  %w = (f32[8]{0}) while(%t), condition=%cond, body=%body", others=others)
    assert cost.collectives[0].count == 12
    one = cost_of("  %g = f32[80]{0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}")
    exposed = estimate(cost, V5E, (2, 4)).collective_seconds_exposed
    assert exposed == pytest.approx(12 * estimate(one, V5E, (2, 4)).collective_seconds_exposed)


PERMUTE = (
    "%s = (f32[1000000]{0}, f32[1000000]{0}, u32[]{:S(2)}) "
    "collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}"
)


@pytest.mark.parametrize("cycles", [0, 40_000, 10_000_000])
def test_an_asynchronous_collective_is_hidden_by_what_lies_between_its_start_and_its_end(cycles):
    cost = cost_of("  " + PERMUTE, run("a", cycles), "  %d = f32[1000000]{0} collective-permute-done(%s)", run("b", 9))
    (permute,) = cost.collectives
    assert permute.asynchronous and permute.overlapped_cycles == cycles
    assert permute.bytes == pytest.approx(4e6, rel=1e-3)
    time = estimate(cost, V5E, (2, 4))
    assert time.collective_seconds_exposed == pytest.approx(
        max(time.collective_seconds - cycles / V5E.clock_hz, 0), abs=1e-9
    )
    assert time.seconds == pytest.approx(time.compute_seconds + time.collective_seconds_exposed)


def test_two_collectives_at_once_share_the_links():
    one = cost_of("  " + PERMUTE, "  %d = f32[1000000]{0} collective-permute-done(%s)")
    second = PERMUTE.replace("%s", "%s2")
    both = cost_of(
        "  " + PERMUTE,
        "  " + second,
        "  %d = f32[1000000]{0} collective-permute-done(%s)",
        "  %d2 = f32[1000000]{0} collective-permute-done(%s2)",
    )
    waits = [estimate(cost, V5E, (2, 4)).collective_seconds_exposed for cost in (one, both)]
    assert waits[1] == pytest.approx(2 * waits[0])


def test_the_parts_of_a_fused_asynchronous_collective_are_one():
    gather = "%g{} = bf16[2048,2048]{{1,0}} all-gather(%x), channel_id=7, replica_groups=[1,8]<=[8], dimensions={{0}}"
    mark = '  ROOT %m{} = (bf16[8]{{0}}) custom-call(%g{}), custom_call_target="AsyncCollective{}"'
    others = computation("begin", "  " + gather.format(1), mark.format(1, 1, "Start"))
    others += computation("middle", "  " + gather.format(2))
    others += computation("finish", "  " + gather.format(3), mark.format(3, 3, "Done"))
    cost = cost_of(
        "  %start = (bf16[8]{0}) fusion(%x), kind=kCustom, calls=%begin",
        '  %a = (bf16[8]{0}) fusion(%x), kind=kOutput, calls=%middle, backend_config={"estimated_cycles":"777"}',
        "  %done = bf16[2048,2048]{1,0} fusion(%a), kind=kCustom, calls=%finish",
        others=others,
    )
    (gathered,) = cost.collectives
    assert gathered.asynchronous and gathered.overlapped_cycles == 777
    assert gathered.bytes == pytest.approx(2048 * 2048 * 2 * 7 / 8)


def kernel_call(name: str, body: str) -> str:
    config = json.dumps({"custom_call_config": {"body": body}}, separators=(",", ":"))
    return (
        f'  %{name} = bf16[8]{{0}} custom-call(%x), custom_call_target="tpu_custom_call", '
        f'metadata={{op_name="jit(step)/flash/pallas_call"}}, backend_config={config}'
    )


def test_kernels_are_told_apart_by_their_code_and_their_cycles_count():
    cost = cost_of(kernel_call("k.1", "AAA="), kernel_call("k.2", "AAA="), kernel_call("k.3", "BBB="), run("a", 10))
    first, second = cost.kernels
    assert (first.name, first.calls, second.calls) == ("flash", 2, 1)
    assert first.identity != second.identity
    known = estimate(cost, V5E, (1, 1), {first.identity: 1_000_000.0})
    assert known.kernel_seconds == pytest.approx(2e6 / V5E.clock_hz)
    assert known.kernels_without_cycles == ("flash",)
    by_name = estimate(cost, V5E, (1, 1), {"flash": 1_000_000.0})
    assert by_name.kernel_seconds == pytest.approx(3e6 / V5E.clock_hz)
    assert by_name.kernels_without_cycles == ()


def test_a_text_without_a_program_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        read_program("nothing here")


@pytest.mark.parametrize("name, ghz", [("v4", 1.05), ("v5e", 1.5), ("v5p", 1.75), ("v6e", 1.75), ("v7x", 2.2)])
def test_clocks_implied_by_the_peaks(name, ghz):
    assert CHIPS[name].clock_hz / 1e9 == pytest.approx(ghz, rel=0.01)


@pytest.mark.parametrize(
    "chip, shape, group, gigabytes",
    [
        ("v5e", (2, 4), 8, 100),  # two open axes, one way each
        ("v5e", (2, 4), 4, 50),  # along the longer axis
        ("v5e", (16, 16), 256, 200),  # two rings
        ("v5e", (16, 16), 16, 100),  # one ring
        ("v6e", (2, 4), 8, 200),
        ("v5p", (2, 2, 2), 8, 300),
        ("v5p", (4, 4, 4), 64, 600),
        ("v5p", (4, 4, 4), 4, 200),
    ],
)
def test_bandwidth_of_a_group_follows_the_slice(chip, shape, group, gigabytes):
    assert wire_bandwidth(CHIPS[chip], shape, group) == pytest.approx(gigabytes * 1e9)


def test_an_all_reduce_takes_what_its_bytes_take_on_the_links():
    """measured.md's arithmetic: 312 MiB of gradients over the 100 GB/s of a v5e-8 are 5 to 7 ms."""
    array = f"bf16[{312 * 2**20 // 2}]{{0}}"
    cost = cost_of(f"  %r = {array} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add")
    assert 5e-3 < estimate(cost, V5E, (2, 4)).seconds < 7e-3


def test_mfu_at_the_peak_is_one():
    assert mfu(8 * 197e12 * 2.0, seconds=2.0, chip=V5E, devices=8) == pytest.approx(1.0)


def test_seconds_are_claimed_only_where_the_measured_runs_agree():
    assert Calibration(1.0, 0.9, 1.2, "2026-11-23", (), "").absolute
    assert not Calibration(1.0, 0.7, 1.2, "2026-11-23", (), "").absolute
    assert CALIBRATION.low <= CALIBRATION.factor <= CALIBRATION.high and CALIBRATION.sources and CALIBRATION.limits


# ---------------------------------------------------------------- schedules of kernels

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
    schedule = kernels.Schedule("k", "id", 15, busy, kernels.find_regions(bundles), None, {})
    assert schedule.scheduled() == 96 * (6 + 16 + 4) + 2
    assert schedule.cycles == schedule.scheduled()


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(RuntimeError, match="bundle 1"):
        kernels.find_regions(kernels.parse_bundles(SCHEDULE.replace("/* loop exit test */", "")))


DOUBLE = """
import sys, pathlib, jax, jax.numpy as jnp
from jax.experimental import pallas as pl, topologies

def body(x, out):
    out[...] = x[...] * 2.0

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
where = jax.sharding.SingleDeviceSharding(devices[0])
for steps in (64, 256):
    block = pl.BlockSpec((512, 1024), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((512 * steps, 1024), jnp.float32)
    double = pl.pallas_call(body, grid=(steps,), in_specs=[block], out_specs=block, out_shape=shape, name="double")
    argument = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
    text = jax.jit(double).lower(argument).compile().as_text()
    pathlib.Path(sys.argv[1], f"{steps}.hlo").write_text(text)
"""


def test_cycles_of_a_real_kernel_grow_with_its_grid(tmp_path):
    pytest.importorskip("libtpu")
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    environment = {**os.environ, **quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", DOUBLE, str(tmp_path)], env=environment, check=True, capture_output=True)
    found = {}
    for steps in (64, 256):
        text = (tmp_path / f"{steps}.hlo").read_text()
        (schedule,) = kernels.kernel_schedules(text, "v5e:2x2", cache=tmp_path / "cache")
        (kernel,) = read_program(text).kernels
        assert (schedule.name, schedule.identity) == (kernel.name, kernel.identity)
        assert kernels.kernel_cycles(text, "v5e:2x2", cache=tmp_path / "cache") == {kernel.identity: schedule.cycles}
        found[steps] = schedule
    assert found[256].scheduled() == pytest.approx(4 * found[64].scheduled(), rel=0.1)
    # The simulation knows what the schedule does not: 2 MiB a step come out of a memory of 819 GB/s (and as many go
    # back, which it lets happen at the same time).
    assert found[256].simulated / V5E.clock_hz >= 0.9 * 256 * 2**21 / V5E.hbm_bandwidth
    assert found[256].cycles == found[256].simulated > 2 * found[256].scheduled()
