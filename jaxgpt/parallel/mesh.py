"""The device mesh: `data` copies the model, `fsdp` splits parameters and batch, `tensor` splits heads and MLP."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from jaxgpt.config import MeshConfig, UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # a batch is split over both, so each of their devices sees other rows


def build_mesh(mesh: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices (or the given ones) in the shape that `mesh` asks for.

    Raises:
        UserError: the axes do not multiply to the number of devices; names both numbers.
    """
    devices = jax.devices() if devices is None else list(devices)
    fixed = mesh.fsdp * mesh.tensor
    if mesh.data == -1 and len(devices) % fixed:
        raise UserError(
            f"mesh.fsdp x mesh.tensor = {mesh.fsdp} x {mesh.tensor} = {fixed} "
            f"does not divide the {len(devices)} devices"
        )
    data = len(devices) // fixed if mesh.data == -1 else mesh.data
    if data * fixed != len(devices):
        raise UserError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {data} x {mesh.fsdp} x {mesh.tensor} = {data * fixed}, "
            f"but there are {len(devices)} devices; mesh.data = -1 takes all that are left"
        )
    # Auto axes: the compiler propagates shardings from the arguments. (Newer jax defaults to Explicit.)
    return jax.make_mesh((data, mesh.fsdp, mesh.tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Devices that see different rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
