"""Verdicts as text for people and as JSON for programs."""

import dataclasses
import json
import operator
import textwrap
from collections import Counter
from collections.abc import Sequence

from jaxgpt.parallel.chips import CHIPS
from jaxgpt.planning.cost import CALIBRATION, Estimate
from jaxgpt.planning.plan_search import Candidate
from jaxgpt.planning.program import ProgramCost
from jaxgpt.planning.topology import Slice
from jaxgpt.planning.verdict import Price, Verdict, best

_GIB, _MIB = 2**30, 2**20
_SHORT = {"parameters": "params", "optimizer": "optim", "gradients": "grads", "activations": "activ"}
ARITHMETIC = "What follows is ARITHMETIC, not the compiler: memory to about 30 %, times to a factor of 2."


def table(rows: Sequence[Verdict], absolute: bool, with_slice: bool = False) -> str:
    """A line for each verdict, the fastest first. Without `absolute`, times and prices are ratios to the first."""
    ordered = sorted(rows, key=lambda row: (not row.fits, row.seconds or 0, row.total_bytes))
    first = best(ordered)
    kinds = [_SHORT.get(kind, kind) for kind in ordered[0].memory]
    times = ["s/step", "MFU %", "Mtok/day", "$/Btok"] if absolute else ["time", "price"]
    cells = [["settings", "fits", "GiB", *kinds, "Mcycles", *times, "collectives"]]
    for row in ordered:
        label = f"{row.where.name}: {row.candidate.label}" if with_slice else row.candidate.label
        fits = "yes" if row.fits else "?" if row.problem else "no"
        gib = [f"{size / _GIB:.2f}" for size in (row.total_bytes, *row.memory.values())]
        cycles = f"{row.cycles / 1e6:.1f}" if row.cycles else "-"
        cells.append([label, fits, *gib, cycles, *_time_cells(row, first, absolute)])
    widths = [max(map(len, column)) for column in zip(*cells)]
    sides = ["<", *">" * (len(widths) - 2), "<"]  # the first and the last column are words
    pad = lambda line: "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths))
    return "\n".join(pad(line).rstrip() for line in cells)


def _time_cells(row: Verdict, first: Verdict | None, absolute: bool) -> list[str]:
    if not (row.tokens_per_day and row.seconds and first and first.tokens_per_day):
        return ["-"] * (5 if absolute else 3)
    collectives, price = _collectives(row), row.usd_per_billion_tokens
    if not absolute:
        base = first.usd_per_billion_tokens
        time = first.tokens_per_day / row.tokens_per_day  # per token: slices may differ in their batch
        return [f"{time:.2f}x", f"{price / base:.2f}x" if price and base else "-", collectives]
    times, mfu = f"{row.seconds:.3g}", f"{100 * row.mfu(row.seconds):.0f}"
    if row.low and row.high:
        times += f" ({row.low:.3g}-{row.high:.3g})"
        mfu += f" ({100 * row.mfu(row.high):.0f}-{100 * row.mfu(row.low):.0f})"
    else:
        times, mfu = f"~{times}", f"~{mfu}"
    return [times, mfu, f"{row.tokens_per_day / 1e6:,.0f}", f"{price:.2f}" if price else "-", collectives]


def _collectives(row: Verdict) -> str:
    """ "all-reduce 2 (312 MiB), all-gather 148 (236 MiB); 5.4 ms exposed" """
    if row.cost is None or row.parts is None:
        return "-"
    calls: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    for collective in row.cost.collectives:
        calls[collective.kind] += collective.count
        sent[collective.kind] += round(collective.bytes * collective.count)
    listed = [f"{kind} {count} ({sent[kind] / _MIB:,.0f} MiB)" for kind, count in calls.items()]
    exposed = f"; {1e3 * row.parts.collective_seconds_exposed:.1f} ms exposed" if listed else ""
    return ", ".join(listed) + exposed or "none"


def slice_line(where: Slice, compiler: str) -> str:
    """The slice in a line, and the source of what follows: `compiler`, or arithmetic if that is empty."""
    count = lambda number, noun: f"{number} {noun}{'s' if number > 1 else ''}"
    devices = f" ({where.devices} devices)" if where.devices != where.chips else ""
    return (
        f"{where.name} ({where.topology}): {count(where.chips, 'chip')}{devices}, {count(where.hosts, 'host')}, "
        f"{where.hbm_bytes / _GIB:.2f} GiB a device usable; {compiler or 'arithmetic'}"
    )


def slice_report(rows: Sequence[Verdict], untried: Sequence[Candidate], refused: str, absolute: bool, top: int) -> str:
    """The table of a slice, its fastest settings as TOML and their costliest operations."""
    parts = [f"The config's own settings cannot run here: {refused}"] if refused else []
    parts += [table(rows, absolute)] if rows else ["By arithmetic everything is far too large: nothing was compiled."]
    parts += [f"{row.candidate.label}: {row.problem}" for row in rows if row.problem]
    if untried:
        names = "; ".join(candidate.label for candidate in untried[:3])
        parts.append(f"{len(untried)} more settings were left untried (--budget), the next ones: {names}")
    fastest = best(rows)
    if fastest:
        parts.append(f"\nThe fastest that fits:\n\n{textwrap.indent(settings_toml(fastest), '    ')}")
    if fastest and fastest.cost and fastest.parts and top > 0:
        parts.append(f"\nIts costliest operations, of {fastest.cost.cycles / 1e6:.1f} M cycles without kernels:\n")
        for operation, cycles in fastest.cost.by_operation.most_common(top):
            parts.append(f"{cycles / 1e6:9.2f} M  {100 * cycles / fastest.cost.cycles:4.1f} %  {operation[:120]}")
        parts += _kernel_lines(fastest.cost, fastest.parts, CHIPS[fastest.where.family].clock_hz)
    return "\n".join(parts) + "\n"


def closing(rows: Sequence[Verdict], prices: dict[str, Price], absolute: bool) -> str:
    """How far times can be trusted, where the prices come from, and several slices side by side."""
    lines = calibration_lines() if any(row.parts for row in rows) else []
    for family in dict.fromkeys(row.where.family for row in rows):
        price, said = prices.get(family), "not known; give one with --prices FILE"
        if price:
            said = f"${price.usd_per_chip_hour:.2f} a chip-hour on demand, {price.date} ({price.source})"
        lines.append(f"Price {family}: {said}")
    slices = dict.fromkeys(row.where for row in rows)
    winners = [fastest for where in slices if (fastest := best([row for row in rows if row.where == where]))]
    if len(winners) > 1:
        lines = ["The fastest that fits, of each slice:", table(winners, absolute, with_slice=True), "", *lines]
    return "\n".join(lines)


def calibration_lines() -> list[str]:
    band = f"{CALIBRATION.low:.2f} to {CALIBRATION.high:.2f}"
    basis = (
        f"Times are the compiler's cycles, the kernels' schedules and the exposed collectives, times "
        f"{CALIBRATION.factor:.2f} ({band} on published measured runs, {CALIBRATION.date}). "
        f"Those runs: {CALIBRATION.limits}."
    )
    if CALIBRATION.absolute:
        return [basis, "~ marks slices outside of those runs: how far such a time is off has not been measured."]
    return [basis, "That spread is too wide to claim times: the table has their ratios to its first row, per token."]


def settings_toml(row: Verdict) -> str:
    """The settings of a verdict as a config file takes them."""
    config = row.candidate.config
    model, train, mesh = config.model, config.train, config.mesh
    return (
        f'[model]\nscan_layers = {str(model.scan_layers).lower()}\nremat = "{model.remat}"\n\n'
        f"[train]\nglobal_batch_size = {train.global_batch_size}\n"
        f"per_device_train_batch_size = {train.per_device_train_batch_size}\n\n"
        f"[mesh]\ndata = {mesh.data}\nfsdp = {mesh.fsdp}\ntensor = {mesh.tensor}"
    )


def _kernel_lines(cost: ProgramCost, parts: Estimate, clock_hz: float) -> list[str]:
    """The cycles that the kernels add, which the compiler leaves out of its sum."""
    calls = sum(kernel.calls for kernel in cost.kernels)
    if not calls:
        return []
    line = f"{parts.kernel_seconds * clock_hz / 1e6:9.2f} M          {calls} calls of kernels, by their schedules"
    unknown = ", ".join(sorted(set(parts.kernels_without_cycles)))
    return [line] + ([f"{'':9}            not counted: {unknown}"] if unknown else [])


def as_json(rows: Sequence[Verdict]) -> str:
    return json.dumps([_record(row) for row in rows], indent=2)


_SETTINGS = (
    "mesh.data", "mesh.fsdp", "mesh.tensor", "model.remat", "model.scan_layers", "train.global_batch_size",
    "train.per_device_train_batch_size", "train.gradient_accumulation_steps",
)  # fmt: skip


def _record(row: Verdict) -> dict[str, object]:
    return {
        "slice": row.where.name,
        "topology": row.where.topology,
        "chips": row.where.chips,
        "settings": {name: operator.attrgetter(name)(row.candidate.config) for name in _SETTINGS},
        "compiled": row.compile_seconds is not None,
        "fits": row.fits,
        "problem": row.problem or None,
        "memory_bytes": row.memory,
        "total_bytes": row.total_bytes,
        "limit_bytes": row.limit_bytes,
        "compile_seconds": row.compile_seconds,
        "cycles": row.cycles,
        "estimate": dataclasses.asdict(row.parts) if row.parts else None,
        "seconds_per_step": {"calibrated": row.seconds, "low": row.low, "high": row.high},
        "mfu": row.mfu(row.seconds) if row.seconds else None,
        "tokens_per_step": row.tokens,
        "tokens_per_day": row.tokens_per_day,
        "usd_per_billion_tokens": row.usd_per_billion_tokens,
        "collectives": [dataclasses.asdict(c) for c in row.cost.collectives] if row.cost else None,
    }
