"""Cycles of Pallas kernels, which the compiler's sum leaves out, from the compiler's own schedules.

    python benchmarks/kernel_schedules.py PROGRAM.hlo --topology v5e:2x2

prints what each kernel of a compiled program (`compiled.as_text()`) takes. Every kernel is compiled once more, alone,
in a process whose libtpu writes down the VLIW schedule and its own simulation of it. The simulation knows how long the
matrix units are busy and how long copies from memory take. Where it cannot follow a kernel (TPU v4; scalar operands,
whose values it does not know, so that it takes wrong branches), cycles are the instruction bundles of each region of
the schedule, or the time the matrix units need if that is longer, times how often it runs.

The form of the dump is not documented: tests/test_benchmarks_kernels.py fails where a new libtpu changes it.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxgpt.planning.topology import compile_only_devices, parse_slice

_PASSES = ".*final.*"  # of the compiler, whose results are written down: all of them would be gigabytes
_TIMEOUT_SECONDS = 600
_DELAY_SLOTS = 5  # bundles of a branch: itself and those that run before it takes effect


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a schedule: a loop's body, or bundles that a branch can skip."""

    kind: str
    """"loop" or "when"."""
    start: int
    stop: int
    """Bundles [start, stop)."""
    times: float
    """Runs each time the code around it runs: trips of a loop; of a "when", 1, as if it were never skipped."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the compiler made of a kernel."""

    name: str
    bundles: int
    busy: list[int]
    """Cycles that the bundle keeps the busiest matrix unit."""
    regions: list[Region]
    simulated: float | None
    """Cycles of one call by the compiler's simulation; None if it does not know this kind of kernel."""

    def scheduled(self, shares: dict[int, float] | None = None) -> float:
        """Cycles of one call, counted from the schedule. `shares` maps the number of a region in `regions` to the
        share of times that it is not skipped."""
        weights = bundle_weights(self.bundles, self.regions, shares)
        edges = sorted({0, self.bundles, *(r.start for r in self.regions), *(r.stop for r in self.regions)})
        parts = ((a, b) for a, b in zip(edges, edges[1:]) if b > a)
        return sum(weights[a] * max(b - a, sum(self.busy[a:b])) for a, b in parts)

    @property
    def cycles(self) -> float:
        return self.simulated if self.simulated is not None else self.scheduled()


def kernel_schedules(hlo_text: str, topology: str) -> list[Schedule]:
    """The schedule of each distinct Pallas kernel in a compiled program, for a chip of `topology` ("v5e:2x2").

    The simulation takes memory and time in proportion to the kernel's grid: 7 GB for 96 cells of attention.

    Raises:
        RuntimeError: the compiler stopped; holds the end of what it wrote.
    """
    return [_compile_and_read(call, topology) for call in _kernel_calls(hlo_text)]


# ---------------------------------------------------------------- a kernel, taken out of a program


_CALL = re.compile(r"%?([\w.\-]+) = (.*?) custom-call\(.*?custom_call_target=\"tpu_custom_call\"")
_TYPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*))?")


def _kernel_calls(hlo_text: str) -> list[dict]:
    """Each distinct kernel: name, configuration, and types and layouts of operands and results."""
    calls = {}
    for match in _CALL.finditer(hlo_text):
        name, results = match.groups()
        begin = hlo_text.index("backend_config=", match.end()) + len("backend_config=")
        backend, _ = json.JSONDecoder().raw_decode(hlo_text, begin)
        layouts = re.search(r"operand_layout_constraints=\{(.*?\})\}", hlo_text[match.end() : begin])
        identity = hashlib.sha256(backend["custom_call_config"]["body"].encode()).hexdigest()[:16]
        calls[identity] = {
            "name": name.split(".")[0],
            "operands": _TYPE.findall(layouts[1]),
            "results": _TYPE.findall(results),
            "tuple": results.startswith("("),
            "backend": {key: backend[key] for key in ("custom_call_config", "scoped_memory_configs") if key in backend},
        }
    return list(calls.values())


def _compile_and_read(call: dict, topology: str) -> Schedule:
    with tempfile.TemporaryDirectory(prefix="kernel-schedule-") as folder:
        dump = Path(folder)
        (dump / "kernel.json").write_text(json.dumps(call))
        simulated = None
        if _compile(dump, topology, simulate=True).returncode == 0:
            simulated = _simulated_cycles(dump)
        else:  # a kernel that the simulation does not know ends the process
            done = _compile(dump, topology, simulate=False)
            if done.returncode:
                raise RuntimeError(f"the kernel {call['name']} did not compile for {topology}: {done.stderr[-2000:]}")
        return read_schedule(dump, call["name"], simulated)


def _compile(dump: Path, topology: str, simulate: bool) -> subprocess.CompletedProcess:
    for old in dump.glob("*.txt"):
        old.unlink()
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={_PASSES}"
    if simulate:
        (dump / "profile").mkdir(exist_ok=True)
        flags += f" --xla_jf_dump_static_llo_profile_to={dump / 'profile'}"
    # libtpu reads its flags when it is loaded, which is why this takes a process of its own.
    own = {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(dump / "kernel.json"), "--alone", "--topology", topology]
    return subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)


def _compile_alone(file: Path, topology: str) -> None:
    """In the child: compile a program that only calls the kernel."""
    call = json.loads(file.read_text())
    operands, results = ([_abstract(*part) for part in call[key]] for key in ("operands", "results"))
    # XLA writes a layout from its fastest axis on, JAX from its slowest.
    layouts = lambda parts: [tuple(int(axis) for axis in layout.split(",") if axis)[::-1] for _, _, layout in parts]
    outputs = layouts(call["results"])
    kernel = jax.ffi.ffi_call(
        "tpu_custom_call",
        results if call["tuple"] else results[0],
        input_layouts=layouts(call["operands"]),
        output_layouts=outputs if call["tuple"] else outputs[0],
        custom_call_api_version=1,
        legacy_backend_config=json.dumps(call["backend"]),
    )
    where = jax.sharding.SingleDeviceSharding(compile_only_devices(parse_slice(topology))[0])
    operands = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in operands]
    compiled = jax.jit(kernel).lower(*operands).compile()
    (file.parent / "instruction").write_text(_CALL.search(compiled.as_text())[1])


def _abstract(kind: str, dimensions: str, _layout: str):
    names = {"bf16": "bfloat16", "f32": "float32", "pred": "bool", "s32": "int32", "u32": "uint32", "f16": "float16"}
    names |= {"s8": "int8", "u8": "uint8", "s16": "int16", "u16": "uint16"}
    return jax.ShapeDtypeStruct([int(size) for size in dimensions.split(",") if size], jnp.dtype(names[kind]))


# ---------------------------------------------------------------- what libtpu wrote down


_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:((?:\s*>)*)\s*(\{.*)$")
_LOOP_EXIT = re.compile(r"scmp\.\w+\.[su]32(?:\.totalorder)? %\w+, (\d+) /\* loop exit test")
_BRANCH = re.compile(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)")
_SCALAR_OPERAND = re.compile(r"\bdma\.\w+_to_smem")
_MATMUL = re.compile(r"vmatmul[\w.]*?\.(mxu\d)")


@dataclasses.dataclass(frozen=True)
class _Bundle:
    mark: str | None
    depth: int
    """Loops around it."""
    text: str


def read_schedule(dump: Path, name: str, simulated: float | None) -> Schedule:
    """The schedule of the kernel in a folder that libtpu wrote."""
    instruction = (dump / "instruction").read_text()
    file = next(f for f in dump.glob(f"*-{instruction}-*final_bundles.txt") if "schedule-analysis" not in f.name)
    bundles = parse_bundles(file.read_text())
    if any(_SCALAR_OPERAND.search(bundle.text) for bundle in bundles):
        simulated = None
    busy = [_matrix_unit_cycles(bundle) for bundle in bundles]
    return Schedule(name, len(bundles), busy, find_regions(bundles), simulated)


def parse_bundles(text: str) -> list[_Bundle]:
    """The bundles of a "final_bundles" file, in their order."""
    bundles = []
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            depth = match[3].count(">")
            if not depth and bundles and match[4].startswith("{}"):
                depth = bundles[-1].depth  # an empty bundle does not show how deep it lies
            bundles.append(_Bundle(match[2], depth, match[4]))
        elif bundles:  # a comment with line breaks goes on
            bundles[-1] = dataclasses.replace(bundles[-1], text=bundles[-1].text + line)
    return bundles


def find_regions(bundles: list[_Bundle]) -> list[Region]:
    """Loops and skippable parts, in the order of their starts.

    Raises:
        RuntimeError: a loop whose number of trips the text does not show.
    """
    regions = []
    for start, bundle in enumerate(bundles):
        after = range(start + 1, len(bundles))
        if bundle.mark == "LB":
            stop = next((i for i in after if bundles[i].depth < bundle.depth), len(bundles))
            inside = (b.text for b in bundles[start:stop] if b.depth == bundle.depth)
            trips = [int(trip) for text in inside for trip in _LOOP_EXIT.findall(text)]
            if not trips:
                raise RuntimeError(f"the loop at bundle {start} runs as often as its data say")
            regions.append(Region("loop", start, stop, trips[-1]))
        for number in _BRANCH.findall(bundle.text):
            target = re.compile(rf"Start(?:/End empty)? region {number}\b")
            stop = next((i for i in after if target.search(bundles[i].text)), None)
            if stop is not None and stop > start + _DELAY_SLOTS:
                regions.append(Region("when", start + _DELAY_SLOTS, stop, 1.0))
    return regions


def bundle_weights(bundles: int, regions: list[Region], shares: dict[int, float] | None = None) -> list[float]:
    """How often each bundle runs in one call."""
    weights = [1.0] * bundles
    for number, region in enumerate(regions):
        times = region.times * (shares or {}).get(number, 1.0)
        for i in range(region.start, region.stop):
            weights[i] *= times
    return weights


def _matrix_unit_cycles(bundle: _Bundle) -> int:
    """Cycles of one matrix unit, all units being alike: 16 rows of bf16 or 8 of f32 an instruction, a row a cycle, from
    the 256-wide units on (instructions through the register "mubr") two."""
    found = [match[0] for match in _MATMUL.finditer(bundle.text) if match[1] == "mxu0"]
    return sum((16 if "bf16" in name else 8) // (2 if "mubr" in name else 1) for name in found)


def _simulated_cycles(dump: Path) -> float | None:
    instruction = (dump / "instruction").read_text()
    for file in (dump / "profile").glob("*.textproto"):
        text = file.read_text()
        if f'hlo_op_name: "{instruction}"' in text:
            return float(re.search(r"estimated_cycles: (\d+)", text)[1])
    return None


# ---------------------------------------------------------------- for the terminal


def describe(schedule: Schedule) -> str:
    """A kernel's schedule in a few lines."""
    simulated = "not simulated" if schedule.simulated is None else f"{schedule.simulated / 1e6:.4f} M simulated"
    lines = [f"{schedule.name}: {schedule.scheduled() / 1e6:.4f} M cycles scheduled, {simulated}"]
    for region in schedule.regions:
        size = region.stop - region.start
        busy = sum(schedule.busy[region.start : region.stop])
        lines.append(f"  {region.kind:4} {size:6} bundles x {region.times:g}, matrix units busy {busy}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path, help="text of a compiled program: compiled.as_text()")
    parser.add_argument("--topology", default="v5e:2x2", help="a slice of the chips that it was compiled for")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        _compile_alone(args.program, args.topology)
        return
    for schedule in kernel_schedules(args.program.read_text(), args.topology):
        print(describe(schedule))


if __name__ == "__main__":
    main()
