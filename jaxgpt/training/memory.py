"""How much memory a train step needs, by arithmetic, and the settings that spread it differently.

The arithmetic orders what is worth compiling; the compiler has the last word.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxgpt.config import Config, with_settings
from jaxgpt.data.dataset import Batch
from jaxgpt.errors import UserError
from jaxgpt.model.gpt2 import padded_vocab
from jaxgpt.parallel import sharding
from jaxgpt.settings import MeshConfig
from jaxgpt.training.step import Program, build_program

# Values of width D that the backward pass reads of each token and layer, and that are not computed again. 16 are
# written (inputs and outputs of both norms, query, key, value, attention's output, 4 + 4 of the MLP), of which the TPU
# compiler keeps about 13 (measured at widths 512 and 768); "dots" are the outputs of matmuls; "block" its input.
KEPT_VALUES = {"none": 13, "dots": 10, "block": 1}
_LOOP_FACTOR = {"none": 2.0, "dots": 1.5, "block": 1.0}  # lax.scan stacks what it keeps, in layouts that need copies
ACTIVATIONS = ("activations", "logits")  # the kinds that arithmetic only estimates; the others are exact
_LOGITS_PARTS = 8  # the loss works through the tokens in parts on accelerators


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a step is spread: the axes of the mesh, rows of a micro-batch on one device, micro-batches."""

    data: int
    fsdp: int
    tensor: int
    rows: int
    accumulation: int

    @property
    def shards(self) -> int:
        """Devices that see different rows."""
        return self.data * self.fsdp


def layout_of(config: Config, devices: int) -> Layout:
    """Of a config whose batch is resolved."""
    data, fsdp, tensor = mesh_sizes(config.mesh, devices)
    accumulation = config.train.gradient_accumulation_steps
    return Layout(data, fsdp, tensor, config.train.global_batch_size // (accumulation * data * fsdp), accumulation)


def mesh_sizes(mesh: MeshConfig, devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) on so many devices.

    Raises:
        UserError: they do not multiply to the number of devices; names both numbers.
    """
    fixed = mesh.fsdp * mesh.tensor
    if mesh.data == -1 and devices % fixed:
        raise UserError(
            f"mesh.fsdp x mesh.tensor = {mesh.fsdp} x {mesh.tensor} = {fixed} does not divide the {devices} devices"
        )
    data = devices // fixed if mesh.data == -1 else mesh.data
    if data * fixed != devices:
        raise UserError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {data} x {mesh.fsdp} x {mesh.tensor} = {data * fixed}, but there "
            f"are {devices} devices; mesh.data = -1 takes all that are left"
        )
    return data, mesh.fsdp, mesh.tensor


def arithmetic_memory(config: Config, vocab_size: int, layout: Layout, *, kernel: bool = True) -> dict[str, int]:
    """Estimated bytes of one device by kind: parameters, optimizer, gradients, activations, logits.

    `kernel`: attention keeps no (T, T) weights, as on TPU and GPU.
    """
    model, optimizer = config.model, config.optimizer
    width, layers, rows = model.n_embd, model.n_layer, layout.rows
    value = 2 if model.dtype == "bfloat16" else 4
    vocabulary = padded_vocab(vocab_size)
    matrices = 12 * layers * width**2
    embeddings = (vocabulary + model.n_positions) * width
    held = (matrices + embeddings + 13 * layers * width) / (layout.fsdp * layout.tensor)
    first = 2 if optimizer.adam_mu_dtype == "bfloat16" else 4
    second = 4 * (embeddings / (matrices + embeddings) if optimizer.name == "muon" else 1.0)
    split = layout.data if config.mesh.zero1 else 1

    tokens = rows * config.block_size
    scores = 0 if kernel else 2 * model.n_head * config.block_size  # weights before and after the softmax
    kept = KEPT_VALUES[model.remat] * width + (scores if model.remat == "none" else 0)
    loop = _LOOP_FACTOR[model.remat] if model.scan_layers else 1.0
    recomputed = 2 * (16 * width + scores) if model.remat != "none" else 0  # of the block in hand, with its gradients
    activations = tokens * value * (layers * kept * loop + recomputed) / layout.tensor
    if layout.fsdp > 1:  # whole matrices in the compute type, of a layer or of all that the backward pass reads again
        activations += value * (2 * matrices / layers if model.remat == "block" else matrices) / layout.tensor
        activations += value * vocabulary * width / layout.tensor
    parts = _LOGITS_PARTS if kernel else 1
    return {
        "parameters": round(4 * held),
        "optimizer": round((first + second) * held / split),
        "gradients": round(4 * held * (2 if layout.accumulation > 1 else 1)),
        "activations": round(activations),
        "logits": round(2 * value * tokens * vocabulary / parts / layout.tensor),
    }


# ---------------------------------------------------------------- what the compiler says


def lower_step(config: Config, vocab_size: int, mesh: Mesh) -> tuple[Program, jax.stages.Lowered]:
    """The train step that `train` would run on `mesh`, traced for it and not compiled."""
    if config.train.max_steps is None:  # the length of the schedule, a constant in the program that changes no cost
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=10_000))
    program = build_program(config, vocab_size, mesh)
    accumulation = config.train.gradient_accumulation_steps
    shape = (accumulation, config.train.global_batch_size // accumulation, config.block_size)
    array = functools.partial(jax.ShapeDtypeStruct, shape, sharding=sharding.micro_batches_sharding(mesh))
    segments = array(dtype=jnp.int32) if config.data.format == "chat" else None
    batch = Batch(array(dtype=jnp.int32), array(dtype=jnp.int32), array(dtype=jnp.float32), segments)
    return program, program.train_step.lower(program.abstract_state, batch)


def state_bytes(program: Program) -> dict[str, int]:
    """Bytes of parameters and optimizer on one device."""
    state = program.abstract_state
    return {"parameters": _device_bytes(state.params), "optimizer": _device_bytes(state.opt_state)}


def _device_bytes(tree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def step_memory(compiled: jax.stages.Compiled, state: dict[str, int]) -> dict[str, int]:
    """Bytes by kind on one device."""
    sizes = compiled.memory_analysis()
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


def out_of_memory_bytes(told: str) -> tuple[int, int]:
    """(needed, available) of libtpu's complaint that a program is too large; (0, 0) where it says something else."""
    match = re.search(r"\(([\d.]+)([KMGT]?)B?\) exceeds available HBM \(([\d.]+)([KMGT]?)B?\)", told)
    if match is None:  # before libtpu 0.0.30
        match = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", told)
    if match is None:
        return 0, 0
    return round(float(match[1]) * _UNITS[match[2]]), round(float(match[3]) * _UNITS[match[4]])


# ---------------------------------------------------------------- other settings, same tokens a step

MAX_ROWS = 64  # where no global batch is given, "auto" stops here: more rows a step is another experiment


def batch_sizes(config: Config, shards: int) -> list[int]:
    """Values of per_device_train_batch_size with the same tokens a step, ascending.

    Raises:
        UserError: train.global_batch_size is not a multiple of the devices that share it.
    """
    total, accumulation = config.train.global_batch_size, config.train.gradient_accumulation_steps
    if total is None:
        return [2**power for power in range(MAX_ROWS.bit_length())]
    if total % (shards * (accumulation or 1)):
        unit = shards * (accumulation or 1)
        times = f" x train.gradient_accumulation_steps = {accumulation}" if accumulation else ""
        raise UserError(
            f"train.global_batch_size = {total} is not a multiple of the {shards} devices that share it{times}; "
            f"{-(-total // unit) * unit} is"
        )
    rows = total // shards
    if accumulation:
        return [rows // accumulation]
    return [size for size in range(1, rows + 1) if rows % size == 0]


def ways_to_save(config: Config, devices: int) -> Iterator[tuple[list[str], list[Config]]]:
    """(flags, configs from the largest batch down): settings that take less memory than `config`, which is resolved,
    with the same tokens a step. Those that cost the least time come first."""
    free = with_settings(config, train_gradient_accumulation_steps=None)
    order = ["none", "dots", "block"]
    remats = order[order.index(config.model.remat) :]
    everywhere = devices // config.mesh.tensor
    splits = [config.mesh.fsdp]
    if everywhere > config.mesh.fsdp and config.model.n_embd % everywhere == 0:
        splits.append(everywhere)
    for fsdp in splits:
        for remat in remats:
            changed = with_settings(free, model_remat=remat, mesh_fsdp=fsdp, mesh_data=everywhere // fsdp)
            sizes = [size for size in batch_sizes(changed, everywhere) if size <= layout_of(config, devices).rows]
            flags = [f"--model.remat {remat}"] if remat != config.model.remat else []
            flags += [f"--mesh.fsdp {fsdp} --mesh.data 1"] if fsdp != config.mesh.fsdp else []
            yield flags, [_sized(changed, size, everywhere) for size in reversed(sizes)]


def _sized(config: Config, size: int, shards: int) -> Config:
    accumulation = config.train.global_batch_size // (size * shards)
    return with_settings(config, train_per_device_train_batch_size=size, train_gradient_accumulation_steps=accumulation)


def in_gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
