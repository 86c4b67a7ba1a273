"""Matrices as decoding reads them: float32, bfloat16, or int8 with one scale an output.

A decoding step of one row multiplies every weight once, so it takes as long as reading the weights takes. On CPU
XLA turns an int8 or bfloat16 matrix to float32 in memory before it multiplies, and nothing is gained. A loop whose
one iteration touches at most 256 bytes it compiles as a whole instead: the weights of 64 outputs then pass through
registers. Measured on one core with int8: 20 to 23 billion weights a second against 5 for an ordinary float32
matmul (docs/benchmarks.md). That is why a matrix lies in tiles of 64 outputs.

Axes in names: G tiles, K inputs, J outputs of a tile, R rows, O outputs (G x J).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

TILE = 64
# Inputs that an iteration of the loop takes: with more, or with wider tiles, XLA no longer compiles it as a whole
# (jax 0.10.2; from 15 down to 1 billion weights a second).
SMALLEST_TILED = 1 << 17  # weights: a smaller matrix is multiplied in less time than going from tile to tile takes
INPUTS_AT_ONCE = {"int8": 4, "uint16": 1, "float32": 1}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("tiles_GKJ", "scale_O"), meta_fields=("inputs", "outputs")
)
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix (inputs..., outputs...) that can be multiplied from the left and indexed by output, and no more.

    Always two axes in memory: a matmul over two input axes has XLA:CPU copy the matrix at every step.
    """

    tiles_GKJ: jax.Array
    """float32, bfloat16 or int8 in one tile; in tiles of 64 outputs float32, int8, or uint16 (a bfloat16's bits)."""
    scale_O: jax.Array | None
    """float32, what an int8 one is worth in each output."""
    inputs: int
    """How many axes of x are summed over."""
    outputs: tuple[int, ...]
    """Sizes of the axes that take their place."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., inputs...) -> (..., outputs...) in float32."""
        tiles, inputs, width = self.tiles_GKJ.shape
        rest = x.shape[: x.ndim - self.inputs]
        x_RK = x.reshape(math.prod(rest), inputs)
        if tiles == 1:
            w_KO = self.tiles_GKJ[0].astype(x.dtype)  # an accelerator reads int8 and multiplies in the type of x
            y_RO = jnp.einsum("RK,KO->RO", x_RK, w_KO, preferred_element_type=jnp.float32)
        else:
            product = _one_row if x_RK.shape[0] == 1 else _rows
            x_RK = x_RK.astype(jnp.float32)

            def tile(g, y_RO):
                return jax.lax.dynamic_update_slice_in_dim(y_RO, product(x_RK, self.tiles_GKJ, g), g * width, axis=1)

            y_RO = jax.lax.fori_loop(0, tiles, tile, jnp.zeros((x_RK.shape[0], tiles * width), jnp.float32))
        if self.scale_O is not None:
            y_RO = y_RO * self.scale_O[None]
        return y_RO.reshape(*rest, *self.outputs)

    def column(self, index: jax.Array) -> jax.Array:
        """The weights (..., inputs) of the outputs `index` (...), in float32."""
        width = self.tiles_GKJ.shape[2]
        values = _values(self.tiles_GKJ[index // width, :, index % width])
        return values if self.scale_O is None else values * self.scale_O[index][..., None]


def _one_row(x_1K: jax.Array, tiles_GKJ: jax.Array, g) -> jax.Array:
    """One tile's part of the product, its sums held in registers while the weights stream by."""
    _, inputs, width = tiles_GKJ.shape
    at_once = INPUTS_AT_ONCE[tiles_GKJ.dtype.name]

    def add(i, sum_1J):
        w_KJ = _values(jax.lax.dynamic_slice(tiles_GKJ, (g, i * at_once, 0), (1, at_once, width))[0])
        part_1K = jax.lax.dynamic_slice_in_dim(x_1K, i * at_once, at_once, axis=1)
        for k in range(at_once):
            sum_1J = sum_1J + part_1K[:, k : k + 1] * w_KJ[k][None]
        return sum_1J

    return jax.lax.fori_loop(0, inputs // at_once, add, jnp.zeros((1, width), jnp.float32))


def _rows(x_RK: jax.Array, tiles_GKJ: jax.Array, g) -> jax.Array:
    """The same for several rows: the tile becomes float32 in the cache, and an ordinary matmul reads it there."""
    return x_RK @ _values(jax.lax.dynamic_index_in_dim(tiles_GKJ, g, keepdims=False))


def _values(stored: jax.Array) -> jax.Array:
    if stored.dtype != jnp.uint16:
        return stored.astype(jnp.float32)
    # A bfloat16 is the upper half of a float32. As an integer it takes a shift; as a bfloat16, jax 0.10.2 takes
    # ten times as long.
    return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)


def pack(kernel: jax.Array, inputs: int, kind: str, tiled: bool) -> PackedMatrix:
    """`kernel` (inputs..., outputs...) as "float32", "bfloat16" or "int8", in tiles where `tiled` and 64 divides.

    int8 is symmetric, one scale an output: the largest weight becomes 127. Use `jax.vmap` for stacked kernels.
    """
    outputs = kernel.shape[inputs:]
    w_KO = kernel.reshape(-1, math.prod(outputs)).astype(jnp.float32)
    (rows, columns), scale_O = w_KO.shape, None
    fits = columns % TILE == 0 and rows % max(INPUTS_AT_ONCE.values()) == 0 and rows * columns >= SMALLEST_TILED
    width = TILE if tiled and fits else columns
    if kind == "int8":
        scale_O = jnp.abs(w_KO).max(axis=0) / 127
        # A column of zeros (the padding of the vocabulary) stays zeros.
        w_KO = jnp.round(w_KO / jnp.where(scale_O > 0, scale_O, 1.0)[None]).astype(jnp.int8)
    elif kind == "bfloat16":
        w_KO = w_KO.astype(jnp.bfloat16)
        if width < columns:
            w_KO = jax.lax.bitcast_convert_type(w_KO, jnp.uint16)
    tiles_GKJ = w_KO.reshape(-1, columns // width, width).transpose(1, 0, 2)
    return PackedMatrix(tiles_GKJ, scale_O, inputs, outputs)
