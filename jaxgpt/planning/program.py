"""A compiled TPU program's text, read: its cycles, its collectives, its kernels, and the order in which they come.

XLA for TPU writes `"estimated_cycles"` beside most instructions it emits; loop bodies are multiplied by their trip
counts here. Pallas kernels and collectives carry no estimate and are listed.
"""

import dataclasses
import hashlib
import math
import re
from collections import Counter

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**63 - 1  # what the compiler writes where it has no estimate (SparseCore gathers on v6e)
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_ARRAY = re.compile(r"\b(pred|[a-z]\w*?\d+\w*)\[([\d,]*)\]")
_KERNEL_BODY = re.compile(r'"custom_call_config":\{"body":"([^"]*)"')
_KERNEL_NAME = re.compile(r"/([\w.\-]+)/pallas_call")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_GUARD_SHARE = 0.05  # of the costlier branch: a cheaper one below it does nothing much


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program."""

    kind: str
    """all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute."""
    bytes: float
    """That each device of the group sends in one call."""
    group_size: int
    count: int
    """Calls in one run of the program."""
    asynchronous: bool
    """The program goes on while it runs."""
    overlapped_cycles: float
    """Cycles between its start and the wait for its end, kernels not counted; 0 if it is not asynchronous."""
    operation: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel that the program calls."""

    name: str
    identity: str
    """Of its code: equal for equal kernels, in whatever program."""
    calls: int
    """In one run of the program."""


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Cost of one run of a program on each device."""

    cycles: float
    """The compiler's estimates summed; kernels and collectives not counted."""
    by_operation: Counter
    """Cycles by source operation."""
    collectives: list[Collective]
    kernels: list[Kernel]
    guarded_cycles: float
    """Of the branches that are not counted in `cycles`."""
    timeline: list
    """What happens in order: ("run", cycles), ("kernel", index), ("collective", index), ("start", index),
    ("done", index) and ("loop", trips, timeline), with indices into `kernels` and `collectives`."""


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str
    """Operands and attributes."""

    @property
    def operation(self) -> str:
        match = _OP_NAME.search(self.rest)
        return match[1] if match else self.name

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute names."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return match[1] if match else None


def read_program(hlo_text: str) -> ProgramCost:
    """What the optimized program `compiled.as_text()` costs.

    A loop's body counts as often as its trip count, a call as its computation. A conditional counts as its costlier
    branch, unless the cheaper one does next to nothing: then it guards against something rare (the loss computes
    itself anew, exactly, after a huge value), counts as the cheaper one, and the other goes into `guarded_cycles`.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations, entry = _parse(hlo_text)
    if entry is None:
        raise ValueError("the text of the program has no ENTRY computation")
    reader = _Reader(computations)
    timeline, _ = reader.walk(entry, 1)
    return ProgramCost(
        cycles=float(sum(reader.by_operation.values())),
        by_operation=reader.by_operation,
        collectives=[_overlap(c, index, timeline) for index, c in enumerate(reader.collectives)],
        kernels=reader.kernels,
        guarded_cycles=float(reader.guarded),
        timeline=timeline,
    )


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    """Instructions by computation, in their order (the text is scheduled), and the entry's name."""
    computations, current, entry = {}, [], None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            current.append(_Instruction(*match.groups()))
        elif current and line.strip() != "}":  # attributes with line breaks in them go on
            last = current[-1]
            current[-1] = dataclasses.replace(last, rest=last.rest + line)
    return computations, entry


class _Reader:
    """Walks a program from its entry and gathers what it costs."""

    def __init__(self, computations: dict[str, list[_Instruction]]):
        self._computations = computations
        self.by_operation: Counter = Counter()
        self.collectives: list[Collective] = []
        self.kernels: list[Kernel] = []
        self.guarded = 0.0

    def walk(self, name: str, times: int) -> tuple[list, float]:
        """(timeline of one run of a computation, its cycles). It runs `times` times in the program."""
        timeline, total, started = [], 0.0, {}
        for instruction in self._computations[name]:
            events, cycles = self._instruction(instruction, times, started)
            timeline += events
            total += cycles
        return timeline, total

    def _instruction(self, instruction: _Instruction, times: int, started: dict) -> tuple[list, float]:
        opcode = instruction.opcode
        if opcode == "while":
            trips = self._trip_count(instruction)
            body, cycles = self.walk(instruction.attribute("body"), times * trips)
            return [("loop", trips, body)], trips * cycles
        if opcode == "call":
            return self.walk(instruction.attribute("to_apply"), times)
        if opcode == "conditional":
            return self._conditional(instruction, times)
        if opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.rest:
            return [("kernel", self._kernel(instruction, times))], 0.0
        if event := self._collective(instruction, times, started):
            # A fusion that also carries a collective has cycles of its own, and starts it before it computes.
            after = event[0] == "start"
            run, cycles = self._run(instruction, times)
            return ([event, *run] if after else [*run, event]), cycles
        return self._run(instruction, times)

    def _run(self, instruction: _Instruction, times: int) -> tuple[list, float]:
        match = _CYCLES.search(instruction.rest)
        cycles = float(match[1]) if match else 0.0
        if not cycles or int(match[1]) == _UNKNOWN:
            return [], 0.0
        self.by_operation[instruction.operation] += times * cycles
        return [("run", cycles)], cycles

    def _conditional(self, instruction: _Instruction, times: int) -> tuple[list, float]:
        named = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
        branches = (
            named[1].replace("%", "").split(", ")
            if named
            else [
                instruction.attribute("true_computation"),
                instruction.attribute("false_computation"),
            ]
        )
        costs = []
        for branch in branches:
            trial = _Reader(self._computations)
            _, cycles = trial.walk(branch, 1)
            costs.append(cycles)
        most, least = max(costs), min(costs)
        guard = least < _GUARD_SHARE * most
        if guard:
            self.guarded += times * most
        return self.walk(branches[costs.index(least if guard else most)], times)

    def _trip_count(self, loop: _Instruction) -> int:
        """Of a counted loop: the bound that its condition compares with."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(match[1])
        condition = self._computations[loop.attribute("condition")]
        bounds = [int(i.rest.split(")")[0]) for i in condition if i.opcode == "constant" and i.rest[0].isdigit()]
        return max(bounds, default=1)

    def _kernel(self, instruction: _Instruction, times: int) -> int:
        body = _KERNEL_BODY.search(instruction.rest)
        identity = hashlib.sha256((body[1] if body else instruction.rest).encode()).hexdigest()[:16]
        for index, kernel in enumerate(self.kernels):
            if kernel.identity == identity:
                self.kernels[index] = dataclasses.replace(kernel, calls=kernel.calls + times)
                return index
        named = _KERNEL_NAME.search(instruction.operation)
        self.kernels.append(Kernel(named[1] if named else instruction.name.split(".")[0], identity, times))
        return len(self.kernels) - 1

    def _collective(self, instruction: _Instruction, times: int, started: dict) -> tuple | None:
        """The event of an instruction that is a collective, or begins or ends one."""
        kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
        key = instruction.name
        if kind in _KINDS:
            if instruction.opcode.endswith("-done"):
                return self._done(started, instruction.rest)
            asynchronous = instruction.opcode.endswith("-start")
        elif instruction.opcode == "async-done":
            return self._done(started, instruction.rest)
        elif instruction.opcode == "async-start":
            inner = self._computations.get(instruction.attribute("calls"), [])
            instruction = next((i for i in inner if i.opcode in _KINDS), None)
            if instruction is None:
                return None
            kind, asynchronous = instruction.opcode, True
        elif instruction.opcode == "fusion":
            # XLA's "async collective fusion": the parts of one collective lie in the computations of several fusions,
            # and two custom calls mark the first and the last.
            inner = self._computations.get(instruction.attribute("calls"), [])
            marks = {m[1] for i in inner for m in [re.search(r'target="AsyncCollective(\w+)"', i.rest)] if m}
            inside = next((i for i in inner if i.opcode in _KINDS), None)
            if inside is None or not marks:
                return None
            channel = re.search(r"channel_id=(\d+)", inside.rest)
            key = f"channel {channel[1]}" if channel else instruction.name
            if "Done" in marks:
                return ("done", started.pop(key)) if key in started else None
            instruction, kind, asynchronous = inside, inside.opcode, True
        else:
            return None
        self.collectives.append(_collective(instruction, kind, times, asynchronous))
        index = len(self.collectives) - 1
        if asynchronous:
            started[key] = index
        return ("start" if asynchronous else "collective", index)

    @staticmethod
    def _done(started: dict, operands: str) -> tuple | None:
        """The end of the collective that an operand names."""
        for name in re.findall(r"%([\w.\-]+)", operands.split("), ")[0]):
            if name in started:
                return ("done", started.pop(name))
        return None


def _collective(instruction: _Instruction, kind: str, times: int, asynchronous: bool) -> Collective:
    group = _group_size(instruction.rest)
    sizes = [_bytes(*array) for array in _ARRAY.findall(instruction.type)]
    result, others = float(sum(sizes)), (group - 1) / group
    if instruction.opcode.endswith("-start"):  # most list their operands with the results
        result *= {"all-gather": group / (group + 1), "reduce-scatter": 1 / (group + 1), "all-reduce": 1.0}.get(
            kind, 0.5
        )
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
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
    return math.prod(int(d) for d in dimensions.split(",") if d) * bits // 8


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


def _overlap(collective: Collective, index: int, timeline: list) -> Collective:
    """`collective` with the cycles between its start and its end, in whatever loop it lies."""
    cycles = _cycles_between(timeline, index)
    return dataclasses.replace(collective, overlapped_cycles=cycles or 0.0) if collective.asynchronous else collective


def _cycles_between(timeline: list, index: int) -> float | None:
    if ("start", index) in timeline:
        begin = timeline.index(("start", index))
        end = timeline.index(("done", index)) if ("done", index) in timeline else len(timeline)
        return _total(timeline[begin:end])
    inner = (_cycles_between(event[2], index) for event in timeline if event[0] == "loop")
    return next((cycles for cycles in inner if cycles is not None), None)


def _total(timeline: list) -> float:
    runs = sum(event[1] for event in timeline if event[0] == "run")
    return runs + sum(event[1] * _total(event[2]) for event in timeline if event[0] == "loop")
