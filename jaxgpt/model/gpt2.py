"""GPT-2 (Radford et al. 2019) in Flax NNX: learned positions, pre-norm blocks, biases, tanh-GELU, tied head.

The parameters of all layers are stacked on a leading layer axis, under GPT-2's own names. `nnx.split` takes
the model apart once; training and decoding are plain functions of the parameter tree (`Apply` below).

Axes in names: B batch, T position, D width, N heads, H head size, F = 4 D, V vocabulary (padded), L layers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxgpt.model.attention import KVCache, attend_cached
from jaxgpt.model.attention import dropout as drop_out
from jaxgpt.model.backend import PLAIN, Backend, LinearOperation
from jaxgpt.model.quantized import PackedMatrix, pack
from jaxgpt.model.sizes import padded_vocab
from jaxgpt.settings import ModelConfig

# Initial values, as in the paper (section 2.3) and OpenAI's code: the one place where they are decided.
#   matrices, token and position embeddings   normal, standard deviation 0.02
#   matrices that write to the residual       the same over sqrt(2 L), L blocks with two writes each
#   biases                                    0
#   LayerNorm gains                           1
INIT_STD = 0.02

Tokens = np.ndarray | Array
"""int32 ids, positions or segments: NumPy arrays of the host, or the arrays of a jitted function."""
Dropout = tuple[float | Array, Array | None]  # (rate, key); no key, no dropout
NO_DROPOUT: Dropout = (0.0, None)
KeysAndValues = tuple[Array, Array]
LayerCache = tuple[Array, Array, Array]  # (keys_ASH, values_ASH, length_B) of one layer; see `KVCache`


class LayerNorm(nnx.Module):
    """Normalises the last axis; `shape` has a leading layer axis inside the blocks."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...]):
        self.scale = nnx.Param(jnp.ones(shape), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape), axes=axes)

    def __call__(self, x_BTD: Array, backend: Backend = PLAIN) -> Array:
        return backend.layer_norm(x_BTD, self.scale[...], self.bias[...])


class Linear(nnx.Module):
    """Kernel and bias of every layer, stacked; called inside the layer loop with one layer's slice.

    `equation` is the einsum of one layer, e.g. "BTD,DF->BTF"; the bias has the axes that only the output has.
    """

    def __init__(self, equation: str, layers: int, sizes: dict, axes: dict, std: float, rngs: nnx.Rngs):
        inputs, kernel, out = equation.replace("->", ",").split(",")
        bias = [axis for axis in kernel if axis in out]
        shape = (layers, *(sizes[axis] for axis in kernel))
        self.equation = equation
        self.kernel = nnx.Param(
            std * jax.random.normal(rngs.params(), shape), axes=("layers", *(axes[axis] for axis in kernel))
        )
        self.bias = nnx.Param(
            jnp.zeros((layers, *(sizes[axis] for axis in bias))), axes=("layers", *(axes[axis] for axis in bias))
        )

    def __call__(self, x: Array, backend: Backend = PLAIN) -> Array:
        # Parameters are float32; the matmul runs in the activations' type (bfloat16 on an accelerator).
        kernel, bias = self.kernel.get_value(), self.bias[...]
        if isinstance(kernel, PackedMatrix):
            return kernel(x).astype(x.dtype) + bias.astype(x.dtype)[None, None]
        return _linear(x, kernel, bias, backend.linear)

    def parts(self, x: Array, backend: Backend) -> tuple[Array, ...]:
        """The slices of the output along its first axis, each by a matmul of its own if the backend wants that."""
        kernel, bias = self.kernel.get_value(), self.bias[...]
        if isinstance(kernel, PackedMatrix) or not backend.linear_apart:
            out = self(x, backend)
            return tuple(out[:, :, i] for i in range(bias.shape[0]))
        return tuple(_linear(x, kernel[:, i], bias[i], backend.linear_apart) for i in range(bias.shape[0]))


def _linear(x: Array, kernel: Array, bias: Array, linear: LinearOperation) -> Array:
    # Two axes each: the compiler need not choose layouts for heads inside a matmul.
    inputs = math.prod(x.shape[2:])
    out = linear(x.reshape(*x.shape[:2], inputs), kernel.reshape(inputs, -1), bias.reshape(-1))
    return out.reshape(*x.shape[:2], *bias.shape)


# The logical axis of each letter of an einsum; parallel/sharding.py lays these on the mesh.
AXES = {"D": "embed", "C": None, "N": "heads", "H": "head_size", "F": "mlp"}


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        sizes = dict(D=config.n_embd, C=3, N=config.n_head, H=config.n_embd // config.n_head)
        layers, residual_std = config.n_layer, INIT_STD * (2 * config.n_layer) ** -0.5
        self.c_attn = Linear("BTD,DCNH->BTCNH", layers, sizes, AXES, INIT_STD, rngs)  # C: query, key, value
        self.c_proj = Linear("BTNH,NHD->BTD", layers, sizes, AXES, residual_std, rngs)

    def __call__(
        self, x_BTD: Array, segments_BT: Array | None, cached: LayerCache | None, dropout: Dropout, backend: Backend
    ) -> tuple[Array, KeysAndValues]:
        """The output, and the keys and values: of these tokens (B, T, N, H), or the updated ones of `cached`, to which
        one token a row is added."""
        q_BTNH, k_BTNH, v_BTNH = self.c_attn.parts(x_BTD, backend)
        if cached is not None:
            out_BTNH, keys_ASH, values_ASH = attend_cached(q_BTNH, k_BTNH, v_BTNH, *cached)
            return self.c_proj(out_BTNH), (keys_ASH, values_ASH)
        out_BTNH = backend.attend(
            q_BTNH, k_BTNH, v_BTNH, segments_BT=segments_BT, dropout_rate=dropout[0], dropout_key=dropout[1]
        )
        return self.c_proj(out_BTNH, backend), (k_BTNH, v_BTNH)


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        sizes = dict(D=config.n_embd, F=4 * config.n_embd)
        layers, residual_std = config.n_layer, INIT_STD * (2 * config.n_layer) ** -0.5
        self.c_fc = Linear("BTD,DF->BTF", layers, sizes, AXES, INIT_STD, rngs)
        self.c_proj = Linear("BTF,FD->BTD", layers, sizes, AXES, residual_std, rngs)

    def __call__(self, x_BTD: Array, backend: Backend) -> Array:
        return self.c_proj(backend.gelu(self.c_fc(x_BTD, backend)), backend)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape, axes = (config.n_layer, config.n_embd), ("layers", "norm")
        self.ln_1 = LayerNorm(shape, axes)
        self.attn = Attention(config, rngs)
        self.ln_2 = LayerNorm(shape, axes)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x_BTD: Array,
        segments_BT: Array | None = None,
        cached: LayerCache | None = None,
        dropout: Dropout = NO_DROPOUT,
        backend: Backend = PLAIN,
    ) -> tuple[Array, KeysAndValues]:
        rate, key = dropout
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        with jax.named_scope("attention"):
            attention_BTD, kept = self.attn(self.ln_1(x_BTD, backend), segments_BT, cached, (rate, keys[0]), backend)
        x_BTD = backend.residual(x_BTD + drop_out(attention_BTD, rate, keys[1]))
        with jax.named_scope("mlp"):
            mlp_BTD = self.mlp(self.ln_2(x_BTD, backend), backend)
        return backend.residual(x_BTD + drop_out(mlp_BTD, rate, keys[2])), kept


class GPT2(nnx.Module):
    """The whole network. `__call__` gives logits; training uses `hidden` and the tied embedding (see loss.py)."""

    def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
        self.config = config
        self.vocab_size = vocab_size
        rows = padded_vocab(vocab_size)
        wte_VD = INIT_STD * jax.random.normal(rngs.params(), (rows, config.n_embd))
        wte_VD = jnp.where(jnp.arange(rows)[:, None] < vocab_size, wte_VD, 0.0)
        wpe_TD = INIT_STD * jax.random.normal(rngs.params(), (config.n_positions, config.n_embd))
        self.wte = nnx.Param(wte_VD, axes=("vocab", "embed"))
        self.wpe = nnx.Param(wpe_TD, axes=("positions", "embed"))
        self.blocks = Block(config, rngs)
        self.ln_f = LayerNorm((config.n_embd,), ("norm",))

    def __call__(self, tokens_BT: Tokens, *, segments_BT: Tokens | None = None) -> Array:
        """Logits (B, T, vocab_size) in float32."""
        return self.logits(self.hidden(tokens_BT, segments_BT=segments_BT))

    def hidden(
        self,
        tokens_BT: Tokens,
        *,
        segments_BT: Tokens | None = None,
        positions_BT: Tokens | None = None,
        dropout: Dropout = NO_DROPOUT,
        gather_block: Callable[[dict], dict] = lambda block: block,
        backend: Backend = PLAIN,
    ) -> Array:
        """The last LayerNorm's output (B, T, D).

        With `segments_BT` each segment is read as if it were alone: positions count anew, unless `positions_BT` says
        them, and nothing sees another.
        `gather_block` is called inside each layer with that layer's parameters, and returns those to use:
        where they are split over devices, this is the place to bring them together (and again in the
        backward pass, under remat).
        """
        segments = None if segments_BT is None else jnp.asarray(segments_BT)
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1])[None] if segments is None else _positions(segments)
        x_BTD = self.embed(tokens_BT, positions_BT)
        (rate, key), layers = dropout, self.config.n_layer
        if key is not None:
            x_BTD = drop_out(x_BTD, rate, jax.random.fold_in(key, layers))
        graph, state = nnx.split(self.blocks)
        stacked = nnx.to_pure_dict(state)

        def layer(x_BTD: Array, block: dict, index: int | Array) -> Array:
            here = None if key is None else jax.random.fold_in(key, index)
            return nnx.merge(graph, gather_block(block))(x_BTD, segments, dropout=(rate, here), backend=backend)[0]

        layer = _remat(layer, self.config)
        if self.config.scan_layers:
            x_BTD, _ = jax.lax.scan(lambda x, xs: (layer(x, *xs), None), x_BTD, (stacked, jnp.arange(layers)))
        else:
            for index, block in enumerate(_unstack(stacked, layers)):
                x_BTD = layer(x_BTD, block, index)
        return self.ln_f(x_BTD, backend)

    def embed(self, tokens_BT: Tokens, positions_BT: Tokens) -> Array:
        """The sum of the embeddings, rounded once, to the compute type."""
        wte = self.wte.get_value()
        tokens_BTD = wte.column(jnp.asarray(tokens_BT)) if isinstance(wte, PackedMatrix) else wte[tokens_BT]
        return (tokens_BTD + self.wpe[...][positions_BT]).astype(self.config.dtype)

    def logits(self, hidden_BTD: Array) -> Array:
        """Tied head, the padding cut off; float32 because sampling and losses compare logits closely."""
        wte = self.wte.get_value()
        if isinstance(wte, PackedMatrix):
            logits = wte(hidden_BTD)
        else:
            wte_VD = wte.astype(hidden_BTD.dtype)
            logits = jnp.einsum("BTD,VD->BTV", hidden_BTD, wte_VD, preferred_element_type=jnp.float32)
        return logits[..., : self.vocab_size]


def _positions(segments_BT: Array) -> Array:
    """Positions that start from 0 in each run of equal segments, (B, T)."""
    position_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1])[None], segments_BT.shape)
    starts_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
    return position_BT - jax.lax.cummax(jnp.where(starts_BT, position_BT, 0), axis=1)


def _unstack(stacked: dict, layers: int) -> list[dict]:
    """The parameters of each layer.

    The gradient of `lax.split` is one concatenation; that of `param[index]` is a sum of L arrays that are zero
    but for one layer, L times the memory traffic (measured on CPU, 124M: 3.2 against 5.2 s a step).
    """
    leaves, tree = jax.tree.flatten(stacked)
    split = [jax.lax.split(leaf, (1,) * layers) for leaf in leaves]
    return [jax.tree.unflatten(tree, [part[0] for part in parts]) for parts in zip(*split)]


def _remat(layer: Callable[..., Array], config: ModelConfig) -> Callable[..., Array]:
    """Wrap one layer so that the backward pass recomputes what `config.remat` says."""
    if config.remat == "none":
        return layer
    # "dots" keeps the outputs of the projections and the attention kernel (XLA's attention, whose scores are large, is
    # computed again). Under "block" keeping the kernel's too gained nothing: for TPU v5e, 1.5B, scanned, 1030 M cycles
    # against 974 M, more than the 26 M of running it twice.
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable
    if config.remat == "dots":
        kernel = policies.save_only_these_names("attention")
        policy = policies.save_from_both_policies(kernel, policies.dots_with_no_batch_dims_saveable)
    # Inside scan the loop already keeps XLA from merging the recomputation with the first computation.
    return jax.checkpoint(layer, policy=policy, prevent_cse=not config.scan_layers)


@functools.lru_cache(maxsize=8)
def abstract_model(config: ModelConfig, vocab_size: int) -> tuple[nnx.GraphDef, dict, dict]:
    """(graph, shapes, logical axes): the model taken apart without computing anything.

    `shapes` and `axes` are trees like the parameters, of ShapeDtypeStruct and of tuples of axis names.
    """
    model = nnx.eval_shape(lambda: GPT2(config, vocab_size, nnx.Rngs(0)))
    graph, state = nnx.split(model)
    is_param = lambda leaf: isinstance(leaf, nnx.Variable)
    axes = jax.tree.map(lambda param: param.get_metadata()["axes"], state, is_leaf=is_param)
    return graph, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def init_params(config: ModelConfig, vocab_size: int, key: Array) -> dict:
    """Fresh parameters: nested dicts of float32 arrays, e.g. params["blocks"]["attn"]["c_attn"]["kernel"]."""
    return nnx.to_pure_dict(nnx.state(GPT2(config, vocab_size, nnx.Rngs(key))))


def bind(config: ModelConfig, vocab_size: int, params: dict) -> GPT2:
    """The network with these parameters: cheap, made anew inside each traced function."""
    graph, _, _ = abstract_model(config, vocab_size)
    return nnx.merge(graph, params)


# ---------------------------------------------------------------- decoding


def decoding_weights(config: ModelConfig, params: dict, kind: str, layout: str) -> dict:
    """The parameters as `read_prompt` and `read_token` take them: the layers taken apart, the matrices as `kind`.

    Taken apart once: slicing the stacked parameters anew for each token would read and write all of them.
    `kind` is "float32", "bfloat16" or "int8"; `layout` says how they lie (quantized.py).
    """
    # The number of input axes of each projection.
    inputs = {("attn", "c_attn"): 1, ("attn", "c_proj"): 2, ("mlp", "c_fc"): 1, ("mlp", "c_proj"): 1}
    blocks = {part: dict(content) for part, content in params["blocks"].items()}
    for (part, name), axes in inputs.items():
        packed = jax.vmap(lambda layer, axes=axes: pack(layer, axes, kind, layout))(blocks[part][name]["kernel"])
        blocks[part][name] = {**blocks[part][name], "kernel": packed}
    wte = pack(params["wte"].T, 1, kind, layout)
    return {**params, "wte": wte, "blocks": tuple(_unstack(blocks, config.n_layer))}


def read_prompt(
    config: ModelConfig, vocab_size: int, weights: dict, tokens_BT: Array, length_B: Array, positions: int
) -> KVCache:
    """A cache of `positions` that holds the first `length_B` tokens of each row; no logits are computed.

    What lies after a row's length is padding. Its keys are in the cache, but nobody reads them: a token sees none
    after itself, and each new token overwrites the key at its own position first.
    """
    room = ((0, 0), (0, positions - tokens_BT.shape[1]), (0, 0))
    heads_ASH = lambda x_BTNH: jnp.pad(jax.lax.collapse(x_BTNH.swapaxes(1, 2), 0, 2), room)
    _, _, cached = _read(config, vocab_size, weights, tokens_BT, lambda layer: [heads_ASH(x) for x in layer])
    keys, values = zip(*cached)
    return KVCache(keys, values, length_B)


def prompt_hidden(config: ModelConfig, vocab_size: int, weights: dict, tokens_BT: Array) -> tuple[GPT2, Array]:
    """(the network, for its `logits`; hidden states (B, T, D) at every place of a prompt)."""
    model, x_BTD, _ = _read(config, vocab_size, weights, tokens_BT, lambda layer: None)
    return model, model.ln_f(x_BTD)


def _read(
    config: ModelConfig, vocab_size: int, weights: dict, tokens_BT: Array, keep: Callable[[KeysAndValues], Any]
) -> tuple[GPT2, Array, list]:
    """(the network, its last layer's output, what `keep` makes of each layer's keys and values (B, T, N, H))."""
    model, layer, layers = _bind_layers(config, vocab_size, weights)
    x_BTD = model.embed(tokens_BT, jnp.arange(tokens_BT.shape[1])[None])
    kept = []
    for block in layers:
        x_BTD, keys_and_values = nnx.merge(layer, block)(x_BTD)
        kept.append(keep(keys_and_values))
    return model, x_BTD, kept


def read_token(
    config: ModelConfig, vocab_size: int, weights: dict, token_B: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    """(logits (B, vocab_size) after one more token a row, the cache with it)."""
    model, layer, layers = _bind_layers(config, vocab_size, weights)
    x_B1D = model.embed(token_B[:, None], cache.length_B[:, None])
    cached = []
    # Always unrolled: under scan the cache would be copied at every layer (twice as slow on CPU).
    for block, keys_ASH, values_ASH in zip(layers, cache.keys, cache.values):
        x_B1D, layer_cache = nnx.merge(layer, block)(x_B1D, cached=(keys_ASH, values_ASH, cache.length_B))
        cached.append(layer_cache)
    keys, values = zip(*cached)
    return model.logits(model.ln_f(x_B1D))[:, 0], KVCache(keys, values, cache.length_B + 1)


def _bind_layers(config: ModelConfig, vocab_size: int, weights: dict) -> tuple[GPT2, nnx.GraphDef, tuple[dict, ...]]:
    """(the network, the graph of a block, the parameters of each); the network holds only the first block."""
    model = bind(config, vocab_size, {**weights, "blocks": weights["blocks"][0]})
    return model, nnx.graphdef(model.blocks), weights["blocks"]
