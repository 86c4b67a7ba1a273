"""The device mesh: `data` copies the model, `fsdp` splits parameters and batch, `tensor` splits heads and MLP."""

from collections.abc import Callable, Sequence
from itertools import groupby

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxgpt.errors import UserError
from jaxgpt.settings import MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # a batch is split over both, so each of their devices sees other rows


def slice_of(device: jax.Device) -> int:
    """The number of a device's TPU slice. Chips of one slice have their own network; slices are joined by Ethernet."""
    return getattr(device, "slice_index", None) or 0 if device.platform == "tpu" else 0


def mesh_shape(mesh: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Devices along (data, fsdp, tensor), with the config's data = -1 filled in.

    Raises:
        UserError: the axes do not multiply to the number of devices; names both numbers.
    """
    fixed = mesh.fsdp * mesh.tensor
    if mesh.data == -1 and devices % fixed:
        raise UserError(
            f"mesh.fsdp x mesh.tensor = {mesh.fsdp} x {mesh.tensor} = {fixed} does not divide the {devices} devices"
        )
    data = devices // fixed if mesh.data == -1 else mesh.data
    if data * fixed != devices:
        raise UserError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {data} x {mesh.fsdp} x {mesh.tensor} = {data * fixed}, "
            f"but there are {devices} devices; mesh.data = -1 takes all that are left"
        )
    return data, mesh.fsdp, mesh.tensor


def check_slices(shape: tuple[int, int, int], slices: int) -> None:
    """Raise `UserError` if another axis than `data` would cross from one slice to another."""
    data, fsdp, tensor = shape
    if data % slices:
        raise UserError(
            f"mesh.data = {data} cannot be split over {slices} slices of {data * fsdp * tensor // slices} devices; "
            f"mesh.fsdp x mesh.tensor = {fsdp * tensor} must divide a slice, because only data may cross the network "
            "between slices"
        )


def build_mesh(
    mesh: MeshConfig, devices: Sequence[jax.Device] | None = None, slice_of: Callable[[jax.Device], int] = slice_of
) -> Mesh:
    """The mesh of all devices (or the given ones) in the shape that `mesh` asks for.

    Devices of several slices are arranged so that only the `data` axis crosses from one slice to another.

    Raises:
        UserError: the axes do not multiply to the number of devices, or do not fit into a slice; names the numbers.
    """
    devices = jax.devices() if devices is None else list(devices)
    data, fsdp, tensor = mesh_shape(mesh, len(devices))
    by_slice = {number: list(found) for number, found in groupby(sorted(devices, key=slice_of), key=slice_of)}
    sizes = {number: len(members) for number, members in by_slice.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"the slices have different numbers of devices: {sizes}; take slices of one size")
    slices = list(by_slice.values())
    check_slices((data, fsdp, tensor), len(slices))
    # Auto axes: the compiler propagates shardings from the arguments. (Newer jax defaults to Explicit.)
    auto, shape = (AxisType.Auto,) * 3, (data // len(slices), fsdp, tensor)
    meshes = [jax.make_mesh(shape, AXES, axis_types=auto, devices=members) for members in slices]
    return meshes[0] if len(meshes) == 1 else Mesh(np.concatenate([m.devices for m in meshes]), AXES, axis_types=auto)


def batch_shards(mesh: Mesh) -> int:
    """The number of devices that see different rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
