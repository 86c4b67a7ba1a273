"""Compiles the train step of a config for a TPU slice, without a TPU: what memory it needs, and its program.

A compiled program is kept on disk under a key of everything that determines it, so it is compiled once.
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
from jaxgpt.storage.files import write_file
from jaxgpt.training.memory import lower_step, out_of_memory_bytes, state_bytes, step_memory

logger = logging.getLogger(__name__)

_KEPT = 300  # compiled programs; the oldest are deleted. One takes up to a few megabytes.


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The TPU compiler's answer about one train step. Bytes are of one device."""

    fits: bool
    memory: dict[str, int]  # by kind, as `training.memory.step_memory` counts them
    total_bytes: int
    limit_bytes: int  # that a program may use
    donated_bytes: int  # of the state whose memory the new state reuses
    compile_seconds: float
    hlo: str = ""  # the compiled program's text; empty if it does not fit
    problem: str = ""  # the compiler's message, if it gave up for another reason than memory


def compile_step(config: Config, vocab_size: int, where: Slice, cache: Path | None = None) -> CompiledStep:
    """Compile the train step of `config`, whose batch is resolved, for a slice, or read it from the folder `cache`.

    Raises:
        UserError: the mesh does not divide the slice, or the model; names both numbers.
        NoTpuCompiler: there is no libtpu here.
    """
    mesh = build_mesh(config.mesh, compile_only_devices(where))
    program, lowered = lower_step(config, vocab_size, mesh)
    options = compiler_options(list(mesh.devices.flat))
    entry = cache and cache / f"{_key(lowered, options, where)}.json.gz"
    if entry and entry.exists():
        return CompiledStep(**json.loads(gzip.decompress(entry.read_bytes())))
    state = state_bytes(program)
    started = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options={name: str(value) for name, value in options.items()} or None)
    except jax.errors.JaxRuntimeError as error:
        step = _refused(str(error), state, where, time.perf_counter() - started)
    else:
        step = _accepted(compiled, state, where, time.perf_counter() - started)
    if entry:
        _write(entry, step)
    return step


def _accepted(compiled: jax.stages.Compiled, state: dict[str, int], where: Slice, seconds: float) -> CompiledStep:
    memory = step_memory(compiled, state)
    total = sum(memory.values())
    sizes, hlo = compiled.memory_analysis(), compiled.as_text()
    assert sizes and hlo
    return CompiledStep(True, memory, total, where.hbm_bytes, sizes.alias_size_in_bytes, seconds, hlo)


def _refused(message: str, state: dict[str, int], where: Slice, seconds: float) -> CompiledStep:
    needed, limit = out_of_memory_bytes(message)
    if not needed:
        problem = message.splitlines()[0]
        return CompiledStep(False, {**state}, 0, where.hbm_bytes, 0, seconds, problem=problem)
    gradients = state["parameters"]
    rest = max(needed - sum(state.values()) - gradients, 0)
    memory = {**state, "batch": 0, "gradients": gradients, "activations": rest, "program": 0}
    return CompiledStep(False, memory, needed, limit, 0, seconds)


def _key(lowered: jax.stages.Lowered, options: dict, where: Slice) -> str:
    parts = [lowered.as_text(), json.dumps(options, sort_keys=True), where.topology]
    parts += [jax.__version__, tpu_compiler_version()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _write(entry: Path, step: CompiledStep) -> None:
    content = gzip.compress(json.dumps(dataclasses.asdict(step)).encode(), compresslevel=3, mtime=0)
    try:
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(entry, content)
        for file in sorted(entry.parent.glob("*.json.gz"), key=lambda file: file.stat().st_mtime)[:-_KEPT]:
            file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: the compiled program is not kept (%s)", entry.parent, error)
