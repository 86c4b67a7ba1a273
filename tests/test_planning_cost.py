"""Reading a TPU program's cost: small programs written out here, in the form that XLA for TPU prints."""

import pytest

from jaxgpt.parallel.chips import CHIPS
from jaxgpt.planning.cost import CALIBRATION, Calibration, attention_cycles, estimate, wire_bandwidth
from jaxgpt.planning.program import Kernel, read_program

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


def kernel_call(name: str, rows: int) -> str:
    return (
        f"  %{name} = (bf16[{rows},1024,768]{{2,1,0}}, f32[{rows},6,2,1024]{{3,2,1,0}}) custom-call(%x), "
        'custom_call_target="tpu_custom_call", operand_layout_constraints={s32[8,1,1024]{2,1,0}}, '
        'metadata={op_name="jit(step)/flash/pallas_call"}'
    )


def test_kernels_are_told_apart_by_their_shapes_and_their_cycles_count():
    cost = cost_of(kernel_call("k.1", 8), kernel_call("k.2", 8), kernel_call("k.3", 4), run("a", 10))
    first, second = cost.kernels
    assert (first.name, first.calls, second.calls) == ("flash", 2, 1)
    assert first.arrays == (("bf16", (8, 1024, 768)), ("f32", (8, 6, 2, 1024)), ("s32", (8, 1, 1024)))
    one = estimate(cost, V5E, (1, 1), lambda kernel, chip: 1_000_000.0 if kernel == first else None)
    assert one.kernel_seconds == pytest.approx(2e6 / V5E.clock_hz)
    assert one.kernels_without_cycles == ("flash",)
    both = estimate(cost, V5E, (1, 1), lambda kernel, chip: 1_000_000.0)
    assert both.kernel_seconds == pytest.approx(3e6 / V5E.clock_hz)
    assert both.kernels_without_cycles == ()


def attention(rows=16, heads=12, head_size=64, positions=1024, name="attention_forward"):
    """The attention kernel of a step, as `read_program` finds it."""
    each = 128 // head_size
    statistics = ("f32", (rows, -(-heads // each), each, positions))
    return Kernel(name, (("bf16", (rows, positions, heads * head_size)), statistics), 1)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", ["attention_forward", "attention_backward"])
def test_attention_takes_what_its_products_and_its_softmax_take_on_each_chip(chip, name):
    cycles = lambda **shape: attention_cycles(attention(name=name, **shape), chip)
    products = 2 if name == "attention_forward" else 5
    least = products * 2 * 16 * 12 * 64 * 1024**2 / 2 / CHIPS[chip].flops_per_cycle
    assert 1.5 * least < cycles() < 25 * least  # heads of 64 leave half of the matrix unit idle, more on v6e and v7x
    assert cycles(rows=32) == pytest.approx(2 * cycles())
    assert cycles(heads=13) == cycles(heads=14)  # a group that is half full takes as long as a full one
    assert cycles(head_size=128, heads=6) < cycles() < cycles(head_size=32, heads=24)
    assert 2.5 * cycles() < cycles(positions=2048) < 5 * cycles()
    assert 0 < cycles(positions=256) < cycles(positions=512) < cycles()


def test_every_chip_has_cycles_and_another_kernel_has_none():
    assert all(attention_cycles(attention(), chip) for chip in CHIPS)
    assert attention_cycles(attention(name="splash"), "v5e") is None


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


def test_seconds_are_claimed_only_where_the_measured_runs_agree():
    assert Calibration(1.0, 0.9, 1.2, "2026-11-23", (), "").absolute
    assert not Calibration(1.0, 0.7, 1.2, "2026-11-23", (), "").absolute
    assert CALIBRATION.low <= CALIBRATION.factor <= CALIBRATION.high and CALIBRATION.sources and CALIBRATION.limits
