"""The train step of a config, compiled for a TPU slice without one: what memory it needs, and its program.

A compiled program is kept on disk under a key of everything that went into it, so it is compiled once.
"""

import dataclasses
import gzip
import hashlib
import json
import logging
import time
from pathlib import Path

import jax

from jaxgpt.config import Config
from jaxgpt.parallel.compiler import compiler_options
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.planning.topology import Slice, compile_only_devices, tpu_compiler_version
from jaxgpt.training.memory import lower_step, out_of_memory_bytes, state_bytes, step_memory

logger = logging.getLogger(__name__)

_KEPT = 300  # compiled programs; the oldest go first. One takes up to a few megabytes.
KINDS = ("parameters", "optimizer", "batch", "gradients", "activations", "program")


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the TPU compiler said of one train step. Bytes are of one device."""

    fits: bool
    memory: dict[str, int]
    """Bytes by kind (KINDS). Gradients are arithmetic, taken out of the compiler's sum of all temporary values;
    activations are the rest of it."""
    total_bytes: int
    limit_bytes: int
    """What a program may use."""
    donated_bytes: int
    """Of the state: what the new one takes over in place."""
    compile_seconds: float
    hlo: str = ""
    """The compiled program's text; empty if it does not fit."""
    problem: str = ""
    """The compiler's words, where it gave up for another reason than memory."""


def compile_step(config: Config, vocab_size: int, where: Slice, cache: Path | None = None) -> CompiledStep:
    """Compile the train step of `config`, whose batch is resolved, for a slice, or find it in the folder `cache`.

    Raises:
        UserError: the mesh does not divide the slice, or the model; names both numbers.
        NoTpuCompiler: there is no libtpu here.
    """
    mesh = build_mesh(config.mesh, compile_only_devices(where))
    program, lowered = lower_step(config, vocab_size, mesh)
    options = compiler_options(mesh.devices.flatten())
    entry = cache and cache / f"{_key(lowered, options, where)}.json.gz"
    if entry and entry.exists():
        return _read(entry)
    state = state_bytes(program)
    started = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        step = _refused(str(error), state, where, time.perf_counter() - started)
    else:
        step = _accepted(compiled, state, where, time.perf_counter() - started)
    if entry:
        _write(entry, step)
    return step


# ---------------------------------------------------------------- the compiler's answer


def _accepted(compiled: jax.stages.Compiled, state: dict[str, int], where: Slice, seconds: float) -> CompiledStep:
    memory = step_memory(compiled, state)
    total = sum(memory.values())
    donated = compiled.memory_analysis().alias_size_in_bytes
    return CompiledStep(True, memory, total, where.hbm_bytes, donated, seconds, compiled.as_text())


def _refused(told: str, state: dict[str, int], where: Slice, seconds: float) -> CompiledStep:
    needed, limit = out_of_memory_bytes(told)
    if not needed:
        problem = told.splitlines()[0]
        return CompiledStep(False, {**state}, 0, where.hbm_bytes, 0, seconds, problem=problem)
    gradients = state["parameters"]
    rest = max(needed - sum(state.values()) - gradients, 0)
    memory = {**state, "batch": 0, "gradients": gradients, "activations": rest, "program": 0}
    return CompiledStep(False, memory, needed, limit, 0, seconds)


# ---------------------------------------------------------------- the cache


def _key(lowered: jax.stages.Lowered, options: dict, where: Slice) -> str:
    parts = [lowered.as_text(), json.dumps(options, sort_keys=True), where.topology]
    parts += [jax.__version__, tpu_compiler_version()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _read(entry: Path) -> CompiledStep:
    return CompiledStep(**json.loads(gzip.decompress(entry.read_bytes())))


def _write(entry: Path, step: CompiledStep) -> None:
    content = gzip.compress(json.dumps(dataclasses.asdict(step)).encode(), compresslevel=3, mtime=0)
    try:
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = entry.with_name(entry.name + ".tmp")
        temporary.write_bytes(content)
        temporary.replace(entry)
        old = sorted(entry.parent.glob("*.json.gz"), key=lambda file: file.stat().st_mtime)[:-_KEPT]
        for file in old:
            file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: the compiled program is not kept (%s)", entry.parent, error)
