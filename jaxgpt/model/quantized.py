"""Matrices as decoding reads them: float32, bfloat16, or int8 with one scale an output.

A decoding step of one row multiplies every weight once, so it takes as long as reading the weights takes. On CPU
XLA turns an int8 or bfloat16 matrix to float32 in memory before it multiplies, and nothing is gained. A loop whose
one iteration touches at most 256 bytes it compiles as a whole instead: the weights of 64 outputs then pass through
registers. Measured on one core with int8: 20 to 23 billion weights a second against 5 for an ordinary float32
matmul (docs/benchmarks.md). That is why a matrix is "streamed": it lies in tiles of 64 outputs.

For several rows on CPU it is "turned": outputs first, and the product is W x^T instead of x W. XLA's matmul is made
for a tall left side, and 2 to 32 rows are none: all matrices of 124M times 8 rows take 30 ms as x W and 17 ms as
W x^T, times 16 rows 41 and 26 ms (2 cores, jax 0.10.2; the same under 0.12.0). bfloat16 and int8 then lie in tiles of
256 outputs, which become float32 in the cache: 30 to 33 ms times 16 rows, where tiles of 64 take 52 to 58 ms.

Axes in names: G tiles, K inputs, J outputs of a tile, R rows, O outputs (G x J).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

LAYOUTS = ("plain", "streamed", "turned")
STREAMED_TILE = 64
TURNED_TILES = (256, 128, 64)  # the first that divides; GPT-2's padded vocabulary takes 128
# Weights: a smaller matrix is multiplied in less time than going from tile to tile takes.
SMALLEST_STREAMED = 1 << 17
# Inputs that an iteration of the loop takes: with more, or with wider tiles, XLA no longer compiles it as a whole
# (jax 0.10.2; from 15 down to 1 billion weights a second).
INPUTS_AT_ONCE = {"int8": 4, "uint16": 1, "float32": 1}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("tiles", "scale_O"), meta_fields=("layout", "inputs", "outputs")
)
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix (inputs..., outputs...) that can be multiplied from the left and indexed by output, and no more.

    Its inputs are one axis in memory: a matmul over two input axes has XLA:CPU copy the matrix at every step.
    """

    tiles: Array
    """(G, K, J), or (G, J, K) where it is turned: float32, int8, bfloat16, or a bfloat16's bits as uint16."""
    scale_O: Array | None  # float32, what an int8 one is worth in each output
    layout: str  # one of LAYOUTS
    inputs: int  # how many axes of x are summed over
    outputs: tuple[int, ...]  # sizes of the axes that take their place

    def __call__(self, x: Array) -> Array:
        """x (..., inputs...) -> (..., outputs...) in float32."""
        rest = x.shape[: x.ndim - self.inputs]
        x_RK = x.reshape(math.prod(rest), -1)
        if self.layout == "plain":
            w_KO = self.tiles[0].astype(x.dtype)  # an accelerator reads int8 and multiplies in the type of x
            y_RO = jnp.einsum("RK,KO->RO", x_RK, w_KO, preferred_element_type=jnp.float32)
        else:
            product = _turned if self.layout == "turned" else _streamed
            y_RO = product(x_RK.astype(jnp.float32), self.tiles)
        if self.scale_O is not None:
            y_RO = y_RO * self.scale_O[None]
        return y_RO.reshape(*rest, *self.outputs)

    def column(self, index: Array) -> Array:
        """The weights (..., inputs) of the outputs `index` (...), in float32."""
        width = self.tiles.shape[1 if self.layout == "turned" else 2]
        tile, place = index // width, index % width
        values = _values(self.tiles[tile, place] if self.layout == "turned" else self.tiles[tile, :, place])
        return values if self.scale_O is None else values * self.scale_O[index][..., None]


def _turned(x_RK: Array, tiles_GJK: Array) -> Array:
    tiles, width, _ = tiles_GJK.shape
    # The barriers keep XLA from turning the product back into the form that it is slow at.
    x_KR = jax.lax.optimization_barrier(x_RK.T)

    def tile(g: Array, y_OR: Array) -> Array:
        # A tile becomes float32 in the cache, and an ordinary matmul reads it there.
        w_JK = _values(jax.lax.dynamic_index_in_dim(tiles_GJK, g, keepdims=False))
        return jax.lax.dynamic_update_slice_in_dim(y_OR, w_JK @ x_KR, g * width, axis=0)

    if tiles == 1:
        y_OR = _values(tiles_GJK[0]) @ x_KR
    else:
        y_OR = jax.lax.fori_loop(0, tiles, tile, jnp.zeros((tiles * width, x_RK.shape[0]), jnp.float32))
    return jax.lax.optimization_barrier(y_OR).T


def _streamed(x_RK: Array, tiles_GKJ: Array) -> Array:
    tiles, _, width = tiles_GKJ.shape
    product = _one_row if x_RK.shape[0] == 1 else _rows

    def tile(g: Array, y_RO: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(y_RO, product(x_RK, tiles_GKJ, g), g * width, axis=1)

    return jax.lax.fori_loop(0, tiles, tile, jnp.zeros((x_RK.shape[0], tiles * width), jnp.float32))


def _one_row(x_1K: Array, tiles_GKJ: Array, g: Array) -> Array:
    """One tile's part of the product, its sums held in registers while the weights stream by."""
    _, inputs, width = tiles_GKJ.shape
    at_once = INPUTS_AT_ONCE[tiles_GKJ.dtype.name]

    def add(i: Array, sum_1J: Array) -> Array:
        w_KJ = _values(jax.lax.dynamic_slice(tiles_GKJ, (g, i * at_once, 0), (1, at_once, width))[0])
        part_1K = jax.lax.dynamic_slice_in_dim(x_1K, i * at_once, at_once, axis=1)
        for k in range(at_once):
            sum_1J = sum_1J + part_1K[:, k : k + 1] * w_KJ[k][None]
        return sum_1J

    return jax.lax.fori_loop(0, inputs // at_once, add, jnp.zeros((1, width), jnp.float32))


def _rows(x_RK: Array, tiles_GKJ: Array, g: Array) -> Array:
    """As `_one_row` for several rows: the tile becomes float32 in the cache, and an ordinary matmul reads it there."""
    return x_RK @ _values(jax.lax.dynamic_index_in_dim(tiles_GKJ, g, keepdims=False))


def _values(stored: Array) -> Array:
    if stored.dtype != jnp.uint16:
        return stored.astype(jnp.float32)
    # A bfloat16 is the upper half of a float32. As an integer it takes a shift; as a bfloat16, jax 0.10.2 takes
    # ten times as long.
    return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)


def pack(kernel: Array, inputs: int, kind: str, layout: str) -> PackedMatrix:
    """`kernel` (inputs..., outputs...) as "float32", "bfloat16" or "int8".

    `layout` is one of LAYOUTS; a small matrix, or one whose outputs no tile divides, is plain instead of streamed.
    int8 is symmetric, one scale an output: the largest weight becomes 127. Use `jax.vmap` for stacked kernels.
    """
    outputs = kernel.shape[inputs:]
    w_KO = kernel.reshape(-1, math.prod(outputs)).astype(jnp.float32)
    (rows, columns), scale_O = w_KO.shape, None
    divides = columns % STREAMED_TILE == 0 and rows % max(INPUTS_AT_ONCE.values()) == 0
    if layout == "streamed" and not (divides and rows * columns >= SMALLEST_STREAMED):
        layout = "plain"
    if kind == "int8":
        scale_O = jnp.abs(w_KO).max(axis=0) / 127
        # A column of zeros (the padding of the vocabulary) stays zeros.
        w_KO = jnp.round(w_KO / jnp.where(scale_O > 0, scale_O, 1.0)[None]).astype(jnp.int8)
    elif kind == "bfloat16":
        w_KO = w_KO.astype(jnp.bfloat16)
        if layout != "plain":
            w_KO = jax.lax.bitcast_convert_type(w_KO, jnp.uint16)
    width = _tile_width(columns, kind, layout)
    tiles_GKJ = w_KO.reshape(-1, columns // width, width).transpose(1, 0, 2)
    tiles = tiles_GKJ.swapaxes(1, 2) if layout == "turned" else tiles_GKJ
    return PackedMatrix(tiles, scale_O, layout, inputs, outputs)


def _tile_width(columns: int, kind: str, layout: str) -> int:
    if layout == "streamed":
        return STREAMED_TILE
    if layout == "plain" or kind == "float32":
        return columns
    return next((width for width in TURNED_TILES if columns % width == 0), columns)
