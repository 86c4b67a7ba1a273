"""One table says where each axis of a parameter lies on the mesh; everything else here reads it.

The model names the axes of its parameters ("embed", "heads", ...); this file maps the names to mesh axes.
"""

import logging
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import UserError
from jaxgpt.parallel.mesh import BATCH_AXES

logger = logging.getLogger(__name__)

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


def param_shardings(axes, shapes, mesh: Mesh):
    """The tree of NamedShardings of the parameters.

    `axes` and `shapes` are trees like the parameters: tuples of logical names, and ShapeDtypeStructs.

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


def zero1_shardings(shardings, shapes, mesh: Mesh):
    """Where the optimizer keeps its copy of each parameter: the parameter's sharding, split over `data` too.

    ZeRO stage 1 (Rajbhandari et al. 2020, section 5.1). The largest axis that divides is taken; an array
    without one stays as it is, and is named in the log when it is large enough to matter.
    """
    paths_and_shardings, tree = jax.tree_util.tree_flatten_with_path(shardings)
    leaves = []
    for (path, sharding), shape in zip(paths_and_shardings, jax.tree.leaves(shapes), strict=True):
        split = _split_over_data(sharding.spec, shape.shape, mesh)
        if split is None:
            if math.prod(shape.shape) >= 1 << 20:
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
            parts[dim] = ("data", *taken) if taken else "data"
            return PartitionSpec(*parts)
    return None


def like_params(tree, shardings, otherwise: NamedSharding):
    """Shardings of a tree that holds copies of the parameters somewhere inside, as an optimizer's state does.

    A leaf whose dictionary keys end in the path of a parameter lies where `shardings` says for that
    parameter; every other leaf (step counts) lies as `otherwise` says.
    """
    by_path = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)}

    def where(path, _):
        keys = _keys(path)
        return next((by_path[keys[i:]] for i in range(len(keys)) if keys[i:] in by_path), otherwise)

    return jax.tree_util.tree_map_with_path(where, tree)


def _keys(path) -> tuple[str, ...]:
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def gather_over_fsdp(shardings, mesh: Mesh, dtype: str):
    """A function that turns parameters (any part of the tree, a layer's slice included) into whole ones to use.

    Matrices are cast to the compute type first, so that half the bytes travel. Left to itself, the compiler
    breaks each matmul into windows over the pieces instead (measured for TPU v5p, 1.5B: 1546 against 649
    million cycles a step). Without an fsdp axis it returns what it is given.
    """
    if mesh.shape["fsdp"] == 1:
        return lambda params: params
    specs = {_keys(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)}

    def whole(path, array):
        spec = specs[_keys(path)][-array.ndim :]  # a layer's slice has lost the leading layer axis
        if "fsdp" not in spec:
            return array
        array = array.astype(dtype) if array.ndim > 1 else array
        spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    return lambda params: jax.tree_util.tree_map_with_path(whole, params)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of an evaluation batch (B, T): rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, None))


def micro_batches_sharding(mesh: Mesh) -> NamedSharding:
    """Of a training batch (A, B, T), A micro-batches one after the other."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None))
