"""Reads the text of a compiled TPU program: its cycles, its collectives, its kernels, and the order in which they run.

XLA for TPU writes `"estimated_cycles"` beside most instructions it emits; loop bodies are multiplied by their trip
counts here. Pallas kernels and collectives carry no estimate and are listed.
"""

import dataclasses
import math
import re
from collections import Counter
from typing import Literal

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**63 - 1  # what the compiler writes where it has no estimate (SparseCore gathers on v6e)
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_ARRAY = re.compile(r"\b(pred|[a-z]\w*?\d+\w*)\[([\d,]*)\]")
_OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?\})\}")
_KERNEL_NAME = re.compile(r"/([\w.\-]+)/pallas_call")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_GUARD_SHARE = 0.05  # of the costlier branch: a cheaper one below it does next to nothing


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program."""

    kind: str  # one of `_KINDS`
    bytes: float  # that each device of the group sends in one call
    group_size: int
    count: int  # calls in one run of the program
    asynchronous: bool  # the program goes on while it runs
    overlapped_cycles: float  # between its start and the wait for its end, kernels not counted; 0 if not asynchronous
    operation: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel that the program calls."""

    name: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    """(type, shape) of its results and operands: ("bf16", (16, 1024, 768))."""
    calls: int  # in one run of the program


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happens in a run."""

    kind: Literal["run", "kernel", "collective", "start", "done", "loop"]
    amount: float = 0.0  # cycles of a run, trips of a loop
    index: int = 0  # which kernel or collective of the program
    body: tuple["Event", ...] = ()  # the events of each trip of a loop


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Cost of one run of a program on each device."""

    cycles: float  # the compiler's estimates summed; kernels and collectives not counted
    by_operation: Counter[str]  # cycles by source operation
    collectives: list[Collective]
    kernels: list[Kernel]
    guarded_cycles: float  # of the branches that are not counted in `cycles`
    timeline: tuple[Event, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operation(self) -> str:
        match = _OP_NAME.search(self.rest)
        return match[1] if match else self.name

    def attribute(self, name: str) -> str:
        """The computation that an attribute names; empty if there is none."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return match[1] if match else ""


def read_program(hlo_text: str) -> ProgramCost:
    """The cost of the optimized program `compiled.as_text()`.

    A loop's body counts as often as its trip count, a call as its computation. A conditional counts as its costlier
    branch, unless the cheaper one does next to nothing: then it guards against something rare (the loss computes
    itself again, exactly, after a huge value), counts as the cheaper one, and the other goes into `guarded_cycles`.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations, entry = _parse(hlo_text)
    if not entry:
        raise ValueError("the text of the program has no ENTRY computation")
    reader = _Reader(computations)
    timeline, cycles = reader.walk(entry, 1)
    return ProgramCost(
        cycles, reader.by_operation, reader.collectives, reader.kernels, reader.guarded_cycles, tuple(timeline)
    )


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions by computation, in their order (the text is scheduled), and the entry's name."""
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            current.append(_Instruction(*match.groups()))
        elif current and line.strip() != "}":  # attributes with line breaks in them go on
            current[-1] = dataclasses.replace(current[-1], rest=current[-1].rest + line)
    return computations, entry


_Started = dict[str, tuple[int, float]]
"""Asynchronous collectives that run: name of the operation that ends one -> (index, cycle of its start)."""


class _Reader:
    """Walks a program from its entry and adds up its cost."""

    def __init__(self, computations: dict[str, list[_Instruction]]):
        self._computations = computations
        self.by_operation: Counter[str] = Counter()
        self.collectives: list[Collective] = []
        self.kernels: list[Kernel] = []
        self.guarded_cycles = 0.0

    def walk(self, name: str, times: int) -> tuple[list[Event], float]:
        """(timeline of one run of a computation, its cycles). It runs `times` times in the program."""
        timeline: list[Event] = []
        total = 0.0
        started: _Started = {}
        for instruction in self._computations[name]:
            events, cycles = self._instruction(instruction, times, started, total)
            timeline += events
            total += cycles
        for key in list(started):  # no instruction waits for these
            self._finish(started, key, total)
        return timeline, total

    def _finish(self, started: _Started, key: str, now: float) -> Event:
        """End the asynchronous collective that `key` names, after `now` cycles of the computation."""
        index, start = started.pop(key)
        self.collectives[index] = dataclasses.replace(self.collectives[index], overlapped_cycles=now - start)
        return Event("done", index=index)

    def _instruction(
        self, instruction: _Instruction, times: int, started: _Started, now: float
    ) -> tuple[list[Event], float]:
        opcode = instruction.opcode
        if opcode == "while":
            trips = self._trip_count(instruction)
            body, cycles = self.walk(instruction.attribute("body"), times * trips)
            return [Event("loop", trips, body=tuple(body))], trips * cycles
        if opcode == "call":
            return self.walk(instruction.attribute("to_apply"), times)
        if opcode == "conditional":
            return self._conditional(instruction, times)
        if opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.rest:
            return [Event("kernel", index=self._kernel(instruction, times))], 0.0
        match = _CYCLES.search(instruction.rest)
        cycles = int(match[1]) if match and int(match[1]) != _UNKNOWN else 0
        run = [Event("run", cycles)] if cycles else []
        if cycles:
            self.by_operation[instruction.operation] += times * cycles
        event = self._collective(instruction, times, started, now, now + cycles)
        if event is None:
            return run, cycles
        # A fusion that also carries a collective has cycles of its own, and starts it before it computes.
        return ([event, *run] if event.kind == "start" else [*run, event]), cycles

    def _conditional(self, instruction: _Instruction, times: int) -> tuple[list[Event], float]:
        if named := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
            branches = named[1].replace("%", "").split(", ")
        else:
            branches = [instruction.attribute("true_computation"), instruction.attribute("false_computation")]
        costs = {branch: _Reader(self._computations).walk(branch, 1)[1] for branch in branches}
        cheapest, costliest = min(branches, key=costs.__getitem__), max(branches, key=costs.__getitem__)
        if costs[cheapest] >= _GUARD_SHARE * costs[costliest]:
            return self.walk(costliest, times)
        self.guarded_cycles += times * costs[costliest]
        return self.walk(cheapest, times)

    def _trip_count(self, loop: _Instruction) -> int:
        """The trips of a counted loop: the bound that its condition compares with."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(match[1])
        condition = self._computations[loop.attribute("condition")]
        bounds = [int(i.rest.split(")")[0]) for i in condition if i.opcode == "constant" and i.rest[0].isdigit()]
        return max(bounds, default=1)

    def _kernel(self, instruction: _Instruction, times: int) -> int:
        named, operands = _KERNEL_NAME.search(instruction.operation), _OPERANDS.search(instruction.rest)
        found = _ARRAY.findall(instruction.type + (operands[1] if operands else ""))
        arrays = tuple((kind, tuple(int(size) for size in sizes.split(",") if size)) for kind, sizes in found)
        name = named[1] if named else instruction.name.split(".")[0]
        for index, kernel in enumerate(self.kernels):
            if (kernel.name, kernel.arrays) == (name, arrays):
                self.kernels[index] = dataclasses.replace(kernel, calls=kernel.calls + times)
                return index
        self.kernels.append(Kernel(name, arrays, times))
        return len(self.kernels) - 1

    def _collective(
        self, instruction: _Instruction, times: int, started: _Started, before: float, after: float
    ) -> Event | None:
        """The event of an instruction that is a collective, or begins or ends one."""
        opcode, key = instruction.opcode, instruction.name
        called = self._computations.get(instruction.attribute("calls"), [])
        inside = next((i for i in called if i.opcode in _KINDS), None)
        if opcode.endswith("-done"):
            operands = re.findall(r"%([\w.\-]+)", instruction.rest.split("), ")[0])
            ended = next((name for name in operands if name in started), None)
            return self._finish(started, ended, after) if ended else None
        if opcode == "fusion":
            # XLA's "async collective fusion": the parts of one collective lie in the computations of several fusions,
            # and two custom calls mark the first and the last.
            marks = {m[1] for i in called if (m := re.search(r'target="AsyncCollective(\w+)"', i.rest))}
            if inside is None or not marks:
                return None
            channel = re.search(r"channel_id=(\d+)", inside.rest)
            key = f"channel {channel[1]}" if channel else key
            if "Done" in marks:
                return self._finish(started, key, after) if key in started else None
        elif opcode.removesuffix("-start") in _KINDS:
            inside = instruction
        elif opcode != "async-start" or inside is None:
            return None
        asynchronous = opcode not in _KINDS
        self.collectives.append(_collective(inside, times, asynchronous))
        index = len(self.collectives) - 1
        if asynchronous:
            started[key] = index, before
        return Event("start" if asynchronous else "collective", index=index)


def _collective(instruction: _Instruction, times: int, asynchronous: bool) -> Collective:
    kind, group = instruction.opcode.removesuffix("-start"), _group_size(instruction.rest)
    result, others = float(sum(_bytes(*array) for array in _ARRAY.findall(instruction.type))), (group - 1) / group
    if instruction.opcode != kind:  # most of those that only start list their operands with the results
        share = {"all-gather": group / (group + 1), "reduce-scatter": 1 / (group + 1), "all-reduce": 1.0}
        result *= share.get(kind, 0.5)
    sent = {
        "all-gather": result * others,
        "reduce-scatter": result * (group - 1),
        "all-reduce": 2 * result * others,
        "all-to-all": result * others / 2,  # on a ring used both ways a piece travels a quarter of it, not half
        "collective-permute": result,
        "collective-broadcast": result,
    }[kind]
    return Collective(kind, sent, group, times, asynchronous, 0.0, instruction.operation)


def _bytes(kind: str, dimensions: str) -> int:
    bits = re.search(r"\d+", kind)  # none in "pred"
    return math.prod(int(d) for d in dimensions.split(",") if d) * (int(bits[0]) if bits else 8) // 8


def _group_size(attributes: str) -> int:
    """Devices that take part in one collective together."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return match[1].count("{")
    return 1
