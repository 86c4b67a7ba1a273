"""Causal attention as a TPU kernel for GPT-2's shapes: small heads, whole rows in the chip's vector memory.

A program of the grid takes one row and as many heads as fill the 128 lanes of a vector register (two of GPT-2's
64-wide ones). Queries, keys and values come as the projections leave them, (B, T, N H), so nothing is transposed or
padded around the kernel. All T positions fit in vector memory, so the softmax of a block of queries is over all its
keys at once: no running maximum, and a backward pass in one kernel with each product computed once.

Scores lie transposed, keys by queries. Then the statistics of a query are a row vector, and the products that end
in head-size columns can run with those 64 as the streamed side of the matrix unit: half its time.

TPU v5e, 16 rows of 1024, 12 heads of 64, millions of cycles of the compiler's schedule in a layer: 0.50 forward and
0.85 backward (0.57 and 0.92 with stalls, as the compiler simulates them), against 1.04 and 2.38 of the splash kernel
that JAX brings, which besides needs 2.75 around it to lay out (B, N, T, 64). See docs/benchmarks.md.

Axes in names: B batch, T query position, S key position, N heads, H head size, W = N x H, P groups of heads.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Ref = Any  # a block in vector memory: Pallas has no public type for it
LANES = 128  # of a vector register on every TPU
LONGEST = 2048  # positions: the kernel is unrolled over blocks, so its code grows with the square
HEAD_SIZES = (16, 32, 64, 128)
# Queries in a block. Larger blocks compute more scores that the mask throws away, smaller ones keep the matrix unit
# waiting. Cycles of a grid step, v5e, T = 1024, blocks of 128, 256, 512: forward 6538, 5232, 6068; backward 8530, 8914,
# 10344.
FORWARD_BLOCK, BACKWARD_BLOCK = 256, 128
MASKED = -1e30  # a score that gets no weight; finite, so that no difference of two is NaN

# Contracted axes of a product of matrices: both last ones, or inner and outer as usual.
_LAST_LAST, _USUAL = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))
_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The static sizes of a kernel."""

    positions: int
    width: int
    head_size: int
    segments: bool
    interpret: bool

    @property
    def heads(self) -> int:
        """Heads of a grid step."""
        return LANES // self.head_size

    @property
    def groups(self) -> int:
        return -(-self.width // LANES)

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    def blocks(self, size: int) -> list[slice]:
        """The positions in blocks of `size` queries."""
        size = min(size, self.positions)
        return [slice(start, min(start + size, self.positions)) for start in range(0, self.positions, size)]


def flash_attention(
    q_BTNH: Array, k_BTNH: Array, v_BTNH: Array, segments_BT: Array | None = None, *, interpret: bool = False
) -> Array:
    """Causal softmax attention, (B, T, N, H) in q's type. With `segments_BT`, within a segment only.

    For one device's rows and heads: under a mesh, call it inside `jax.shard_map`. `interpret` runs the same kernel
    without a TPU, slowly.

    Raises:
        ValueError: the head size or the number of positions is not one the kernel is made for.
    """
    rows, positions, heads, head_size = q_BTNH.shape
    if head_size not in HEAD_SIZES or positions > LONGEST:
        raise ValueError(f"no kernel for heads of {head_size} over {positions} positions")
    padded = -(-positions // LANES) * LANES  # causal: no query sees what is added after it
    flat = lambda x: jnp.pad(x.reshape(rows, positions, -1), ((0, 0), (0, padded - positions), (0, 0)))
    shape = _Shape(padded, heads * head_size, head_size, segments_BT is not None, interpret)
    segments: Segments = ()
    if segments_BT is not None:
        segments = (jnp.pad(segments_BT.astype(jnp.int32), ((0, 0), (0, padded - positions)))[:, None],)
    out_BTW = _attention(shape, flat(q_BTNH), flat(k_BTNH), flat(v_BTNH), segments)
    return out_BTW[:, :positions].reshape(q_BTNH.shape)


Segments = tuple[Array, ...]  # (segments (B, 1, T),), or nothing where there are none


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(shape: _Shape, q_BTW: Array, k_BTW: Array, v_BTW: Array, segments: Segments) -> Array:
    return _forward(shape, q_BTW, k_BTW, v_BTW, segments)[0]


def _attention_forward(
    shape: _Shape, q_BTW: Array, k_BTW: Array, v_BTW: Array, segments: Segments
) -> tuple[Array, tuple]:
    out_BTW, logsumexp = _forward(shape, q_BTW, k_BTW, v_BTW, segments)
    # Under remat, a policy may keep these two, and with them the kernel need not run again.
    out_BTW = checkpoint_name(out_BTW, "attention")
    logsumexp = checkpoint_name(logsumexp, "attention")
    return out_BTW, (q_BTW, k_BTW, v_BTW, segments, out_BTW, logsumexp)


def _attention_backward(shape: _Shape, saved: tuple, dout_BTW: Array) -> tuple:
    return *_backward(shape, saved, dout_BTW), jax.tree.map(lambda _: None, saved[3])


_attention.defvjp(_attention_forward, _attention_backward)


# ---------------------------------------------------------------- the calls


def _specs(shape: _Shape) -> tuple[pl.BlockSpec, pl.BlockSpec, list[pl.BlockSpec]]:
    """Blocks of one grid step (row, group): of (B, T, W), of statistics (B, P, heads, T), of segments (B, 1, T)."""
    tokens = pl.BlockSpec((1, shape.positions, LANES), lambda row, group: (row, 0, group))
    statistics = pl.BlockSpec((1, 1, shape.heads, shape.positions), lambda row, group: (row, group, 0, 0))
    segments = pl.BlockSpec((1, 1, shape.positions), lambda row, group: (row, 0, 0))
    return tokens, statistics, [segments] * shape.segments


def _call(
    shape: _Shape, kernel: Callable[..., None], name: str, rows: int, products: int, **arguments: Any
) -> Callable[..., list[Array]]:
    """`pallas_call` with what both kernels share. `products` counts matmuls of scores' size."""
    scores = rows * shape.groups * shape.heads * shape.positions**2 / 2
    return pl.pallas_call(
        functools.partial(kernel, shape),
        grid=(rows, shape.groups),
        name=name,
        interpret=shape.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            # v5e, v5p, v6e have 64 MB and more; the default leaves 16, which the scores at T = 2048 exceed.
            vmem_limit_bytes=48 << 20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(2 * products * scores * shape.head_size),
            transcendentals=int(scores),
            bytes_accessed=2 * (products + 2) * rows * shape.positions * shape.width,
        ),
        **arguments,
    )


def _forward(shape: _Shape, q_BTW: Array, k_BTW: Array, v_BTW: Array, segments: Segments) -> list[Array]:
    """[output (B, T, W), logsumexp of each query's scaled scores (B, P, heads, T)]."""
    tokens, statistics, segment_specs = _specs(shape)
    rows = q_BTW.shape[0]
    return _call(
        shape,
        _forward_kernel,
        "attention_forward",
        rows,
        products=2,
        in_specs=[tokens] * 3 + segment_specs,
        out_specs=[tokens, statistics],
        out_shape=[
            jax.ShapeDtypeStruct(q_BTW.shape, q_BTW.dtype),
            jax.ShapeDtypeStruct((rows, shape.groups, shape.heads, shape.positions), jnp.float32),
        ],
    )(q_BTW, k_BTW, v_BTW, *segments)


def _backward(shape: _Shape, saved: tuple, dout_BTW: Array) -> list[Array]:
    """Gradients of the queries, keys and values."""
    q_BTW, k_BTW, v_BTW, segments, out_BTW, logsumexp = saved
    tokens, statistics, segment_specs = _specs(shape)
    like_q = jax.ShapeDtypeStruct(q_BTW.shape, q_BTW.dtype)
    return _call(
        shape,
        _backward_kernel,
        "attention_backward",
        q_BTW.shape[0],
        products=5,
        in_specs=[tokens] * 5 + [statistics] + segment_specs,
        out_specs=[tokens] * 3,
        out_shape=[like_q] * 3,
        scratch_shapes=[pltpu.VMEM((LANES, shape.positions), jnp.float32)] * 2,
    )(q_BTW, k_BTW, v_BTW, out_BTW, dout_BTW, logsumexp, *segments)


# ---------------------------------------------------------------- the kernels


def _lanes_of(shape: _Shape) -> list[Array]:
    """Which lanes are its own, (1, LANES), for each head of a grid step."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    starts = range(0, LANES, shape.head_size)
    return [(lane >= start) & (lane < start + shape.head_size) for start in starts]


def _existing(shape: _Shape, x_TL: Array) -> Array:
    """`x_TL` with zeros in the lanes after the last head: what lies there is not defined."""
    if shape.width % LANES == 0:
        return x_TL
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return jnp.where(lane < shape.width - pl.program_id(1) * LANES, x_TL, 0)


def _segment_columns(segments: Sequence[Ref]) -> Array | None:
    """The segments of the keys as a column, (S, 1), for a comparison with the queries' row."""
    if not segments:
        return None
    [row_ref] = segments
    return jnp.broadcast_to(row_ref[0], (LANES, row_ref.shape[2])).T[:, :1]


def _visible(
    shape: _Shape, scores_ST: Array, queries: slice, segments: Sequence[Ref], segments_S1: Array | None, hidden: float
) -> Array:
    """`scores_ST` of keys up to the end of the block of queries, with `hidden` where a query may not look."""
    size = queries.stop - queries.start
    key, query = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    diagonal = jnp.where(key <= query, scores_ST[queries.start :], hidden)
    scores_ST = jnp.concatenate([scores_ST[: queries.start], diagonal], 0) if queries.start else diagonal
    if segments_S1 is not None:
        scores_ST = jnp.where(segments_S1[: queries.stop] == segments[0][0, :, queries], scores_ST, hidden)
    return scores_ST


def _one_ahead(first: Callable[..., Any], work: list[tuple[slice, int]]) -> Iterator[tuple[tuple[slice, int], Any]]:
    """Pairs (item, first(item)), each `first` issued before the item ahead of it is handed out.

    The order in which a kernel's operations are written is the order in which they are scheduled: this one lets the
    matrix unit compute the next scores while the vector unit works on the softmax of these (5232 against 6570 cycles).
    """
    started = first(*work[0])
    for item, following in zip(work, [*work[1:], None]):
        ready, started = started, following and first(*following)
        yield item, ready


def _forward_kernel(shape: _Shape, q_ref: Ref, k_ref: Ref, v_ref: Ref, *refs: Ref) -> None:
    *segments, out_ref, logsumexp_ref = refs
    lanes_of, segments_S1 = _lanes_of(shape), _segment_columns(segments)
    k_SL, v_LS = _existing(shape, k_ref[0]), _existing(shape, v_ref[0]).T
    work = [(queries, head) for queries in shape.blocks(FORWARD_BLOCK) for head in range(shape.heads)]

    def scores(queries: slice, head: int) -> Array:
        # With the other heads' lanes at 0, the sum over all lanes is this head's; half the matrix unit's depth
        # is idle with 64 lanes anyway, and cutting the lanes out would move every register.
        q_TL = jnp.where(lanes_of[head], q_ref[0, queries], 0)
        return _dot(k_SL[: queries.stop], q_TL, _LAST_LAST)

    outputs = []
    for (queries, head), scores_ST in _one_ahead(scores, work):
        scores_ST = _visible(shape, scores_ST, queries, segments, segments_S1, MASKED)
        maximum_1T = scores_ST.max(0, keepdims=True)
        weights_ST = jnp.exp((scores_ST - maximum_1T) * shape.scale)
        total_1T = weights_ST.sum(0, keepdims=True)
        own = slice(head * shape.head_size, (head + 1) * shape.head_size)
        out_HT = _dot(v_LS[own, : queries.stop], weights_ST.astype(v_LS.dtype), _USUAL)
        outputs.append(out_HT / total_1T)
        logsumexp_ref[0, 0, head : head + 1, queries] = maximum_1T * shape.scale + jnp.log(total_1T)
        if head == shape.heads - 1:
            out_ref[0, queries] = jnp.concatenate(outputs, 0).T.astype(out_ref.dtype)
            outputs = []


def _backward_kernel(
    shape: _Shape, q_ref: Ref, k_ref: Ref, v_ref: Ref, out_ref: Ref, dout_ref: Ref, logsumexp_ref: Ref, *refs: Ref
) -> None:
    *segments, dq_ref, dk_ref, dv_ref, dk_LS, dv_LS = refs
    lanes_of, segments_S1 = _lanes_of(shape), _segment_columns(segments)
    dtype = q_ref.dtype
    k_SL, v_SL = _existing(shape, k_ref[0]), _existing(shape, v_ref[0])
    k_LS = k_SL.T
    work = [(queries, head) for queries in shape.blocks(BACKWARD_BLOCK) for head in range(shape.heads)]

    def products(queries: slice, head: int) -> tuple[Array, Array]:
        q_TL = jnp.where(lanes_of[head], q_ref[0, queries], 0)
        dout_TL = jnp.where(lanes_of[head], dout_ref[0, queries], 0)
        return (_dot(k_SL[: queries.stop], q_TL, _LAST_LAST), _dot(v_SL[: queries.stop], dout_TL, _LAST_LAST))

    for (queries, head), (scores_ST, dweights_ST) in _one_ahead(products, work):
        if head == 0:
            q_LT, dout_LT = q_ref[0, queries].T, dout_ref[0, queries].T
            product_LT = (_existing(shape, dout_ref[0, queries]).astype(jnp.float32) * out_ref[0, queries]).T
            dq_LT = []
        own = slice(head * shape.head_size, (head + 1) * shape.head_size)
        weights_ST = jnp.exp(scores_ST * shape.scale - logsumexp_ref[0, 0, head : head + 1, queries])
        weights_ST = _visible(shape, weights_ST, queries, segments, segments_S1, 0.0)
        # The softmax's gradient (Dao et al. 2022, appendix B.2); its row sum is that of output x its gradient.
        dscores_ST = weights_ST * (dweights_ST - product_LT[own].sum(0, keepdims=True)) * shape.scale
        dscores_ST, weights_ST = dscores_ST.astype(dtype), weights_ST.astype(dtype)
        dq_LT.append(_dot(k_LS[own, : queries.stop], dscores_ST, _USUAL))
        for sum_LS, factor_LT, matrix_ST in ((dk_LS, q_LT, dscores_ST), (dv_LS, dout_LT, weights_ST)):
            added_HS = _dot(factor_LT[own], matrix_ST, _LAST_LAST)
            if queries.start:
                sum_LS[own, : queries.start] += added_HS[:, : queries.start]
            sum_LS[own, queries] = added_HS[:, queries]  # the first block of queries to see these keys
        if head == shape.heads - 1:
            dq_ref[0, queries] = jnp.concatenate(dq_LT, 0).T.astype(dtype)
    dk_ref[0], dv_ref[0] = dk_LS[:].T.astype(dtype), dv_LS[:].T.astype(dtype)
