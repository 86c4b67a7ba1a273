"""From a prompt to its continuations: read the prompt once into a cache, then one token a step in a while_loop.

Shapes come in powers of two, and what varies within them (prompt length, new tokens, seed, sampling rules) is
traced: a process compiles `_prefill` and `_decode` a handful of times, whatever it is asked.

Axes in names: B rows (continuations), T prompt positions, S cache positions, V vocabulary, 1 a single row.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxgpt.config import ModelConfig, UserError
from jaxgpt.inference.sampling import SamplingOptions, row_keys, sample
from jaxgpt.model import gpt2
from jaxgpt.model.attention import KVCache, empty_cache
from jaxgpt.parallel.sharding import replicated

SMALLEST_BUCKET = 16
NO_TOKEN = -1


def generate(
    config: ModelConfig,
    vocab_size: int,
    params: dict,
    prompt_ids: Sequence[int],
    options: SamplingOptions,
    end_of_text: int | None,
) -> list[list[int]]:
    """The new tokens of each continuation, up to the end-of-text token and without it.

    An empty prompt starts from the end-of-text token. `params` may lie on one device or be sharded over a
    mesh; on several hosts, every process calls this with the same arguments and gets the same answer.

    Raises:
        UserError: prompt and new tokens do not fit `config.n_positions`, or the prompt cannot be read.
    """
    prompt = _checked_prompt(config, vocab_size, prompt_ids, options.max_new_tokens, end_of_text)
    bucket = _bucket(len(prompt), config.n_positions)
    # Twice the larger bucket holds any prompt and any number of new tokens of these buckets.
    positions = min(2 * max(bucket, _bucket(options.max_new_tokens, config.n_positions)), config.n_positions)
    prompt_1T = np.zeros((1, bucket), np.int32)
    prompt_1T[0, : len(prompt)] = prompt

    logits_1V, cache = _prefill(config, vocab_size, positions, params, prompt_1T, np.int32(len(prompt)))
    # NumPy scalars: every process holds them, and their types never change between calls.
    tokens_BS, steps = _decode(
        config,
        vocab_size,
        options.num_return_sequences,
        _mesh(params),
        params,
        logits_1V,
        cache,
        max_new_tokens=np.int32(options.max_new_tokens),
        end_of_text=np.int32(NO_TOKEN if end_of_text is None else end_of_text),
        seed=np.uint32(options.seed),
        rules=(
            np.float32(options.temperature),
            np.int32(min(options.top_k, vocab_size)),
            np.float32(options.top_p),
        ),
    )
    tokens_BS = np.asarray(tokens_BS)[:, : int(steps)]
    return [_cut(row.tolist(), end_of_text) for row in tokens_BS]


def _checked_prompt(config, vocab_size, prompt_ids, max_new_tokens, end_of_text) -> list[int]:
    prompt = list(prompt_ids)
    if not prompt:
        if end_of_text is None:
            raise UserError("the prompt is empty and the tokenizer has no end-of-text token; give a prompt")
        prompt = [end_of_text]
    # Indexing an array clamps silently: another tokenizer's ids would give nonsense and no error.
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        unknown = next(token for token in prompt if not 0 <= token < vocab_size)
        raise UserError(f"the prompt holds token {unknown}, but the model's vocabulary is {vocab_size}")
    length, room = len(prompt), config.n_positions - len(prompt)
    if room < 1:
        raise UserError(
            f"the prompt is {length} tokens and the model reads at most n_positions = {config.n_positions}, "
            f"the new ones included; shorten it by at least {1 - room}"
        )
    if max_new_tokens > room:
        raise UserError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones are {max_new_tokens - room} more than "
            f"the model's n_positions = {config.n_positions}; ask for at most {room} new tokens, "
            "or shorten the prompt"
        )
    return prompt


def _bucket(length: int, largest: int) -> int:
    """The power of two that holds `length`, at least 16 and at most `largest`."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), largest)


def _mesh(params: dict) -> Mesh | None:
    sharding = jax.tree.leaves(params)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _cut(tokens: list[int], end_of_text: int | None) -> list[int]:
    return tokens[: tokens.index(end_of_text)] if end_of_text in tokens else tokens


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "positions"))
def _prefill(config: ModelConfig, vocab_size: int, positions: int, params: dict, prompt_1T, length):
    """Logits (1, V) after the first `length` tokens of the padded prompt, and the cache that holds them."""
    heads, head_size = config.n_head, config.n_embd // config.n_head
    cache = empty_cache(config.n_layer, 1, positions, heads, head_size, config.dtype)
    model = gpt2.bind(config, vocab_size, params)
    hidden_1TD, cache = model.hidden(prompt_1T, cache=cache)
    # The padding's keys stay in the cache after `length`. Nobody reads them: a query sees no key after
    # itself, and each new token overwrites the key at its own position first.
    cache = dataclasses.replace(cache, length=length)
    last_11D = jax.lax.dynamic_slice_in_dim(hidden_1TD, length - 1, 1, axis=1)
    return model.logits(last_11D)[:, 0], cache


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "rows", "mesh"))
def _decode(
    config: ModelConfig,
    vocab_size: int,
    rows: int,
    mesh: Mesh | None,
    params: dict,
    logits_1V,
    cache: KVCache,
    *,
    max_new_tokens,
    end_of_text,
    seed,
    rules,
):
    """New tokens (B, S), and how many of the S were made: fewer than asked if every row ended before."""
    prompt_length, positions = cache.length, cache.keys[0].shape[1]
    model = gpt2.bind(config, vocab_size, params)

    def unfinished(state):
        step, done_B, _, _, _ = state
        return (step < max_new_tokens) & ~done_B.all()

    def add_token(state):
        step, done_B, tokens_BS, logits_BV, cache = state
        token_B = sample(logits_BV, row_keys(seed, rows, prompt_length + step), *rules)
        tokens_BS = jax.lax.dynamic_update_slice_in_dim(tokens_BS, token_B[:, None], step, axis=1)
        # The last token is read too, in vain: one step in N, for a loop that holds each part once.
        logits_B1V, cache = model(token_B[:, None], cache=cache)
        return step + 1, done_B | (token_B == end_of_text), tokens_BS, logits_B1V[:, 0], cache

    # The prompt was read once; its cache and its logits are copied for every row.
    keys, values, logits_BV = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), (cache.keys, cache.values, logits_1V))
    state = (
        jnp.int32(0),
        jnp.zeros(rows, bool),
        jnp.zeros((rows, positions), jnp.int32),
        logits_BV,
        KVCache(keys, values, cache.length),
    )
    steps, _, tokens_BS, _, _ = jax.lax.while_loop(unfinished, add_token, state)
    if mesh is not None:
        # The compiler may leave the answer split over the mesh; whole on each device, any process can read it.
        tokens_BS, steps = jax.lax.with_sharding_constraint((tokens_BS, steps), replicated(mesh))
    return tokens_BS, steps
