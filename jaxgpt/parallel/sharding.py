"""The table that says over which mesh axis each parameter axis is split, and the functions that follow it.

The model names the axes of its parameters ("embed", "heads", ...); this file maps the names to mesh axes.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.errors import UserError
from jaxgpt.parallel.mesh import BATCH_AXES

logger = logging.getLogger(__name__)

# Nested dicts like the parameters', with these leaves:
Arrays = dict[str, Any]  # jax.Array, or jax.ShapeDtypeStruct
Shardings = dict[str, Any]  # NamedSharding
Specs = Any  # a PartitionSpec, or any tree of them

# logical axis of a parameter -> mesh axis that splits it (None: every device holds it whole)
RULES = {
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "layers": None,  # the layer loop takes one slice at a time: splitting it would send every slice around
    "head_size": None,
    "positions": None,
    "norm": None,  # LayerNorm gains: a few kilobytes
}


def param_shardings(axes: dict[str, Any], shapes: Arrays, mesh: Mesh) -> Shardings:
    """The shardings of the parameters, from the logical names of their axes (tuples, one a parameter) and shapes.

    Raises:
        UserError: a mesh axis does not divide the array axis that the table gives it; names both numbers.
    """
    is_axes = lambda leaf: isinstance(leaf, tuple)
    return jax.tree.map(lambda a, s: _param_sharding(a, s.shape, mesh), axes, shapes, is_leaf=is_axes)


def _param_sharding(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    spec = [RULES[axis] if axis else None for axis in axes]
    for axis, mesh_axis, size in zip(axes, spec, shape, strict=True):
        if mesh_axis and size % mesh.shape[mesh_axis]:
            raise UserError(
                f"mesh.{mesh_axis} = {mesh.shape[mesh_axis]} does not divide the {size} entries of the "
                f'"{axis}" axis of the model'
            )
    return NamedSharding(mesh, PartitionSpec(*spec))


def zero1_shardings(shardings: Shardings, shapes: Arrays, mesh: Mesh) -> Shardings:
    """The shardings of the optimizer's copies of the parameters: as the parameters, and split over `data` too.

    ZeRO stage 1 (Rajbhandari et al. 2020, section 5.1). The largest axis that `data` divides is split. An array
    without such an axis stays as it is, and the log names it when it is large. Biases and norms, smaller than a
    hundredth of the largest array, stay too: a collective would cost its latency and save nothing.
    """
    small = max(math.prod(shape.shape) for shape in jax.tree.leaves(shapes)) / 100
    paths_and_shardings, tree = jax.tree_util.tree_flatten_with_path(shardings)
    leaves = []
    for (path, sharding), shape in zip(paths_and_shardings, jax.tree.leaves(shapes), strict=True):
        size = math.prod(shape.shape)
        split = _split_over_data(sharding.spec, shape.shape, mesh) if size >= small else sharding.spec
        if split is None:
            if size >= 1 << 20:
                logger.warning("optimizer state of %s is not split over data: no axis divides", path)
            split = sharding.spec
        leaves.append(NamedSharding(mesh, split))
    return jax.tree.unflatten(tree, leaves)


def _split_over_data(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec | None:
    for dim in sorted(range(len(shape)), key=lambda dim: -shape[dim]):
        taken = (spec[dim],) if spec[dim] else ()
        ways = math.prod(mesh.shape[axis] for axis in ("data", *taken))
        if shape[dim] % ways == 0:
            parts = list(spec)
            parts[dim] = (*taken, "data") if taken else "data"  # each parameter shard is split further
            return PartitionSpec(*parts)
    return None


def like_params(tree: Any, shardings: Shardings, otherwise: NamedSharding) -> Any:
    """Shardings of a tree that contains copies of the parameters, such as an optimizer's state.

    A leaf whose dictionary keys end in the path of a parameter gets the sharding of that parameter, every other leaf
    (step counts) gets `otherwise`.
    """
    by_path = {key_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)}

    def where(path: jax.tree_util.KeyPath, _: Any) -> NamedSharding:
        keys = key_path(path)
        return next((by_path[keys[i:]] for i in range(len(keys)) if keys[i:] in by_path), otherwise)

    return jax.tree_util.tree_map_with_path(where, tree)


def key_path(path: jax.tree_util.KeyPath) -> tuple[str, ...]:
    """The dictionary keys along a path of a tree: ("blocks", "mlp", "c_fc", "kernel")."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def share_out(mesh: Mesh) -> Callable[[Callable[[jax.Array], jax.Array]], Callable[[jax.Array], jax.Array]]:
    """What turns a function of a stack (M, ...), one entry at a time, into one whose entries all devices share."""
    where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def shared(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        def call(stack: jax.Array) -> jax.Array:
            missing = -len(stack) % mesh.size  # entries of zeros make it a multiple of the devices
            padded = jax.numpy.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1))
            return function(jax.lax.with_sharding_constraint(padded, where))[: len(stack)]

        return call if mesh.size > 1 else function

    return shared


# ---------------------------------------------------------------- in each device's own program


def per_device(function: Callable[..., Any], mesh: Mesh, in_specs: Specs, out_specs: Specs) -> Callable[..., Any]:
    """`function` run on each device's own shards. Only the collectives that it calls itself happen.

    By default the compiler turns matmuls of sharded weights into windows over the pieces, and reduces gradients in
    every micro-batch (measured for TPU: v5p 1.5B, 1546 against 649 million cycles; v5e 124M, 13 % and 3.5 x the
    bytes). The tensor axis, if it is used, is left to the compiler, which splits matmuls well.
    """
    manual = _manual_axes(mesh)
    if mesh.size == 1 or not manual:
        return function
    keep = lambda tree: jax.tree.map(
        lambda spec: _restrict(spec, manual), tree, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=keep(in_specs),
        out_specs=keep(out_specs),
        axis_names=set(manual),
        check_vma=False,  # Pallas kernels do not say over which axes their results vary
    )


def summed_axes(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes of more than one device over which the devices see different rows."""
    return tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)


def _manual_axes(mesh: Mesh) -> tuple[str, ...]:
    # With a tensor axis left to the compiler, shard_map does not accept axes of one device as manual.
    return summed_axes(mesh) if mesh.shape["tensor"] > 1 else mesh.axis_names


def _restrict(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """`spec` without the mesh axes that are not in `axes`."""
    return PartitionSpec(*(tuple(axis for axis in _axes_of(entry) if axis in axes) or None for entry in spec))


def _axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def over_heads(attend: Callable[..., jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """`attend` of (B, T, N, H) arrays for use inside `per_device`, with the heads split over `tensor`.

    The compiler cannot split a kernel, so each device calls it for its own heads.
    """
    if mesh.shape["tensor"] == 1:
        return attend
    heads = PartitionSpec(None, None, "tensor", None)

    def split(
        q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, *, segments_BT: jax.Array | None = None, **options: Any
    ) -> jax.Array:
        call = lambda q, k, v, segments: attend(q, k, v, segments_BT=segments, **options)
        mapped = jax.shard_map(
            call,
            mesh=None if _manual_axes(mesh) else mesh,  # inside `per_device` it is the surrounding one
            in_specs=(heads, heads, heads, PartitionSpec()),
            out_specs=heads,
            axis_names={"tensor"},
            check_vma=False,
        )
        return mapped(q_BTNH, k_BSNH, v_BSNH, segments_BT)

    return split


def gather_over_fsdp(shardings: Shardings, mesh: Mesh, dtype: str) -> Callable[[Arrays], Arrays]:
    """A function that gathers sharded parameters: any part of their tree, also a layer's slice.

    For use inside `per_device`. Matrices are cast to the compute type `dtype` first, so that half the bytes travel; the
    gradient returns as a reduce-scatter. Without an fsdp axis it returns its argument.
    """
    if mesh.shape["fsdp"] == 1:
        return lambda params: params
    specs = {key_path(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)}

    def whole(path: jax.tree_util.KeyPath, array: jax.Array) -> jax.Array:
        spec = specs[key_path(path)][-array.ndim :]  # a layer's slice has lost the leading layer axis
        if "fsdp" not in spec:
            return array
        array = array.astype(dtype) if array.ndim > 1 else array
        return jax.lax.all_gather(array, "fsdp", axis=spec.index("fsdp"), tiled=True)

    return lambda params: jax.tree_util.tree_map_with_path(whole, params)


def sum_gradients(grads: Arrays, param_shardings: Shardings, result_shardings: Shardings, mesh: Mesh) -> Arrays:
    """The sum of the gradients of all devices' rows, laid out as `result_shardings`.

    For use inside `per_device`. Gradients of what `gather_over_fsdp` gathered are already summed over fsdp. Gradients
    that end up split over `data` (ZeRO-1) are scattered while they are summed: half the bytes of a full sum.
    """

    def total(grad: jax.Array, param: NamedSharding, result: NamedSharding) -> jax.Array:
        held = {axis for entry in param.spec for axis in _axes_of(entry)}
        for dim, entry in enumerate(result.spec):
            if "data" in _axes_of(entry) and "data" not in held and mesh.shape["data"] > 1:
                grad = jax.lax.psum_scatter(grad, "data", scatter_dimension=dim, tiled=True)
                held.add("data")
        return jax.lax.psum(grad, tuple(axis for axis in summed_axes(mesh) if axis not in held))

    return jax.tree.map(total, grads, param_shardings, result_shardings)


def specs(shardings: Shardings) -> Specs:
    """The PartitionSpecs of a tree of NamedShardings."""
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an evaluation batch (B, T): rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, None))


def micro_batches_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a training batch (A, B, T) of A micro-batches, one after the other."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None))
