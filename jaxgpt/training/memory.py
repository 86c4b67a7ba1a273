"""How much memory a train step takes on a device: by arithmetic, and as its compiler says.

The arithmetic orders what is worth compiling; the compiler has the last word.
"""

import dataclasses
import functools
import math
import re
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxgpt.config import Config, with_settings
from jaxgpt.data.dataset import Batch
from jaxgpt.model.sizes import moment_bytes, padded_vocab, parameter_count
from jaxgpt.parallel import sharding
from jaxgpt.parallel.mesh import mesh_shape
from jaxgpt.training.step import Program, build_program

# Values of width D that the backward pass reads per token and layer, and that are not computed again. 16 are written
# (inputs and outputs of both norms, query, key, value, attention's output, 4 + 4 of the MLP), of which the TPU
# compiler keeps about 13 (measured at widths 512 and 768); "dots" are the outputs of matmuls; "block" its input.
KEPT_VALUES = {"none": 13, "dots": 10, "block": 1}
_LOOP_FACTOR = {"none": 2.0, "dots": 1.5, "block": 1.0}  # lax.scan stacks what it keeps, in layouts that need copies
ACTIVATIONS = ("activations", "logits")  # the kinds that arithmetic only estimates; the others are exact
_LOGITS_PARTS = 8  # the loss works through the tokens in parts on accelerators


@dataclasses.dataclass(frozen=True)
class StepShape:
    """How a step is spread: devices along each mesh axis, rows of a micro-batch on one device, micro-batches."""

    data: int
    fsdp: int
    tensor: int
    rows: int
    accumulation: int


def step_shape(config: Config, devices: int) -> StepShape:
    """The shape of a step of `config`, whose batch is resolved.

    Raises:
        UserError: the mesh does not divide the devices.
    """
    data, fsdp, tensor = mesh_shape(config.mesh, devices)
    accumulation = config.gradient_accumulation_steps
    return StepShape(data, fsdp, tensor, config.global_batch_size // (accumulation * data * fsdp), accumulation)


def arithmetic_memory(config: Config, vocab_size: int, shape: StepShape, *, kernel: bool = True) -> dict[str, int]:
    """Estimated bytes on one device by kind: parameters, optimizer, gradients, activations, logits.

    `kernel`: attention keeps no (T, T) weights, as on TPU and GPU.
    """
    model = config.model
    width, layers = model.n_embd, model.n_layer
    value = 2 if model.dtype == "bfloat16" else 4
    vocabulary = padded_vocab(vocab_size)
    matrices = 12 * layers * width**2
    held = parameter_count(model, vocabulary) / (shape.fsdp * shape.tensor)
    split = shape.data if config.mesh.zero1 else 1

    tokens = shape.rows * config.block_size
    scores = 0 if kernel else 2 * model.n_head * config.block_size  # weights before and after the softmax
    kept = KEPT_VALUES[model.remat] * width + (scores if model.remat == "none" else 0)
    loop = _LOOP_FACTOR[model.remat] if model.scan_layers else 1.0
    recomputed = 2 * (16 * width + scores) if model.remat != "none" else 0  # one block, with its gradients
    activations = tokens * value * (layers * kept * loop + recomputed) / shape.tensor
    if shape.fsdp > 1:  # whole matrices in the compute type, of a layer or of all that the backward pass reads again
        activations += value * (2 * matrices / layers if model.remat == "block" else matrices) / shape.tensor
        activations += value * vocabulary * width / shape.tensor
    parts = _LOGITS_PARTS if kernel else 1
    return {
        "parameters": round(4 * held),
        "optimizer": round(moment_bytes(model, config.optimizer, vocab_size) * held / split),
        "gradients": round(4 * held * (2 if shape.accumulation > 1 else 1)),
        "activations": round(activations),
        "logits": round(2 * value * tokens * vocabulary / parts / shape.tensor),
    }


def lower_step(config: Config, vocab_size: int, mesh: Mesh) -> tuple[Program, jax.stages.Lowered]:
    """The train step that `train` would run on `mesh`, traced and not compiled. The batch of `config` is resolved."""
    if config.train.max_steps is None:  # the length of the schedule, a constant in the program that changes no cost
        config = with_settings(config, train_max_steps=10_000 + 2 * (config.optimizer.warmup_steps or 0))
    program = build_program(config, vocab_size, mesh)
    accumulation = config.gradient_accumulation_steps
    shape = (accumulation, config.global_batch_size // accumulation, config.block_size)
    array = functools.partial(jax.ShapeDtypeStruct, shape, sharding=sharding.micro_batches_sharding(mesh))
    segments = array(dtype=jnp.int32) if config.data.format == "chat" else None
    batch = Batch._make((array(dtype=jnp.int32), array(dtype=jnp.int32), array(dtype=jnp.float32), segments))
    return program, cast(jax.stages.Wrapped, program.train_step).lower(program.abstract_state, batch)


def state_bytes(program: Program) -> dict[str, int]:
    """Bytes of parameters and optimizer on one device."""

    def device_bytes(tree: dict | optax.OptState) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    state = program.abstract_state
    return {"parameters": device_bytes(state.params), "optimizer": device_bytes(state.opt_state)}


def step_memory(compiled: jax.stages.Compiled, state: dict[str, int]) -> dict[str, int]:
    """Bytes by kind on one device. `state` is what `state_bytes` returned.

    Gradients are arithmetic, taken out of the compiler's sum of all temporary values; activations are the rest of it.
    """
    sizes = compiled.memory_analysis()
    assert sizes, "this compiler does not say what memory a program takes"
    fresh = max(sizes.output_size_in_bytes - sizes.alias_size_in_bytes, 0)  # results that reuse no argument's place
    temporary = sizes.temp_size_in_bytes + fresh
    gradients = min(state["parameters"], temporary)  # float32, one for each parameter that the device holds
    return {
        **state,
        "batch": max(sizes.argument_size_in_bytes - sum(state.values()), 0),
        "gradients": gradients,
        "activations": temporary - gradients,
        "program": sizes.generated_code_size_in_bytes,
    }


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


def out_of_memory_bytes(message: str) -> tuple[int, int]:
    """(needed, available) bytes in libtpu's message that a program is too large; (0, 0) in any other message."""
    match = re.search(r"\(([\d.]+)([KMGT]?)B?\) exceeds available HBM \(([\d.]+)([KMGT]?)B?\)", message)
    match = match or re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)  # before libtpu 0.0.30
    if match is None:
        return 0, 0
    return round(float(match[1]) * _UNITS[match[2]]), round(float(match[3]) * _UNITS[match[4]])
