"""Decoding with a cache gives what the whole network gives, compiles little, and stops where it should."""

import dataclasses
import functools
import logging

import jax
import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.inference import decode
from jaxgpt.inference.decoder import WEIGHTS, build_decoder, generate, start_rows, stream
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.inference.slots import NO_TOKEN
from jaxgpt.model import gpt2, quantized
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.parallel.sharding import param_shardings
from jaxgpt.settings import MeshConfig, ModelConfig

VOCAB = 65  # 128 rows with the padding
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=64, n_positions=40, dtype="float32")
SMALL = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=32, dtype="bfloat16")
TEXT = np.random.default_rng(1).integers(0, VOCAB, 40).tolist()


def random_params(config):
    """Matrices of twenty times the usual size, or the network would hardly look at its context."""
    rng = np.random.default_rng(0)
    std = dict(wte=0.2, wpe=0.2, kernel=0.4, bias=0.02, scale=0.0)
    _, shapes, _ = gpt2.abstract_model(config, VOCAB)

    def leaf(path, shape):
        name = path[-1].key
        return (name == "scale") + std[name] * rng.standard_normal(shape.shape, np.float32)

    params = jax.tree_util.tree_map_with_path(leaf, shapes)
    # A padding row that reached the sampler would win every draw.
    params["wte"][VOCAB:] = 1000.0
    return jax.device_put(params)


@pytest.fixture(scope="module", autouse=True)
def the_matrices_of_these_small_networks_lie_in_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "SMALLEST_STREAMED", 0)
        yield


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def decoder_of(params, end_of_text=None, config=CONFIG, weights="float32"):
    return build_decoder(config, VOCAB, params, end_of_text, weights)


def continued(params, prompt, new=10, end_of_text=None, config=CONFIG, **options):
    """The tokens of each continuation of one prompt."""
    options = SamplingOptions(max_new_tokens=new, **options)
    [continuations] = generate(decoder_of(params, end_of_text, config), [prompt], options)
    return [continuation.tokens for continuation in continuations]


@functools.partial(jax.jit, static_argnames="config")
def all_logits(config, params, tokens_1T):
    return gpt2.bind(config, VOCAB, params)(tokens_1T)


def greedy_by_full_forward(params, prompt, new):
    """Without a cache: read everything again for each token. (A token sees none of the zeros after it.)"""
    tokens_1T = np.zeros((1, CONFIG.n_positions), np.int32)
    tokens_1T[0, : len(prompt)] = prompt
    for position in range(len(prompt), len(prompt) + new):
        logits_1TV = all_logits(CONFIG, params, tokens_1T)
        tokens_1T[0, position] = logits_1TV[0, position - 1].argmax()
    return tokens_1T[0, len(prompt) : len(prompt) + new].tolist()


# Lengths below, at and above a bucket's border; three fill the context to its last position.
@pytest.mark.parametrize("length, new", [(1, 16), (3, 10), (16, 7), (17, 12), (5, 35), (32, 8), (39, 1)])
def test_greedy_is_the_argmax_of_the_whole_network_at_each_position(params, length, new):
    for prompt in (TEXT[:length], TEXT[-length:]):
        (tokens,) = continued(params, prompt, new, temperature=0)
        assert tokens == greedy_by_full_forward(params, prompt, new)
        assert len(tokens) == new


def test_the_network_of_these_tests_reads_what_lies_before_the_last_token(params):
    """Otherwise the test above would pass with a cache that is never read."""
    texts = [continued(params, [first, *TEXT[:9]], temperature=0)[0] for first in range(8)]
    assert len({tuple(text) for text in texts}) == 8
    assert np.mean([len(set(text)) for text in texts]) > 5


def test_activations_and_cache_are_float32_on_cpu_whatever_the_weights_are():
    params = random_params(SMALL)
    for weights in (*WEIGHTS, None):
        decoder = decoder_of(params, config=SMALL, weights=weights)
        assert decoder.config.dtype == "float32"
        rows = start_rows(decoder, [[1, 2, 3]], SamplingOptions(), n=1, positions=32, penalties=False)
        assert {array.dtype.name for array in rows.cache.keys + rows.cache.values} == {"float32"}
    assert jax.tree.leaves(decoder.weights["blocks"][0]["mlp"]["c_fc"]["kernel"])[0].dtype == "uint16"  # None: bfloat16


@pytest.mark.parametrize("weights, temperature", [("float32", 0), ("bfloat16", 1.0), ("int8", 1.0)])
def test_a_batch_of_different_prompt_lengths_is_each_alone(params, weights, temperature):
    decoder = decoder_of(params, weights=weights)
    prompts = [TEXT[:1], TEXT[3:20], TEXT[5:9]]
    options = SamplingOptions(
        max_new_tokens=12, num_return_sequences=2, temperature=temperature, top_k=0, repetition_penalty=1.3, seed=3
    )
    together = generate(decoder, prompts, options)
    for prompt, continuations in zip(prompts, together, strict=True):
        [alone] = generate(decoder, [prompt], options)
        assert [c.tokens for c in continuations] == [c.tokens for c in alone]
        for ours, theirs in zip(continuations, alone):
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_how_many_rows_are_expected_changes_the_layout_and_no_token(params, weights):
    one, many = (build_decoder(CONFIG, VOCAB, params, None, weights, rows) for rows in (1, 2))
    kernels = [decoder.weights["blocks"][0]["mlp"]["c_fc"]["kernel"].layout for decoder in (one, many)]
    assert kernels == ["streamed", "turned"]
    options = SamplingOptions(max_new_tokens=10, seed=1)
    texts = [[row.tokens for [row] in generate(decoder, [TEXT[:4], TEXT[:9]], options)] for decoder in (one, many)]
    assert texts[0] == texts[1]


def test_logprobs_are_those_of_the_whole_network_before_every_rule(params):
    options = SamplingOptions(max_new_tokens=12, temperature=1.7, top_k=5, repetition_penalty=1.2, seed=1)
    [[continuation]] = generate(decoder_of(params), [TEXT[:9]], options)
    text = np.array([TEXT[:9] + continuation.tokens + [0] * (CONFIG.n_positions - 21)])
    logprobs_TV = jax.nn.log_softmax(all_logits(CONFIG, params, text)[0])
    np.testing.assert_allclose(continuation.logprobs, logprobs_TV[np.arange(8, 20), continuation.tokens], atol=1e-4)


def test_a_repetition_penalty_counts_prompt_and_text(params):
    strong = dict(temperature=0, repetition_penalty=1e6)
    prompt = TEXT[:9]
    (tokens,) = continued(params, prompt, 20, **strong)
    assert len({*prompt, *tokens}) == len({*prompt}) + 20
    (free,) = continued(params, prompt, 20, temperature=0)
    assert len({*prompt, *free}) < len({*prompt}) + 20


def test_a_continuation_does_not_depend_on_how_many_are_made_beside_it(params):
    (alone,) = continued(params, TEXT[:4], seed=3)
    four = continued(params, TEXT[:4], seed=3, num_return_sequences=4)
    assert four[0] == alone
    assert len({tuple(tokens) for tokens in four}) == 4


def test_a_seed_gives_its_text_and_another_seed_another(params):
    first, again, other = (continued(params, TEXT[:4], seed=seed, temperature=2.0) for seed in (0, 0, 1))
    assert first == again != other


def test_a_draw_depends_on_the_text_so_far_and_not_on_where_the_prompt_ended(params):
    (tokens,) = continued(params, TEXT[:4], seed=6)
    (rest,) = continued(params, TEXT[:4] + tokens[:3], new=7, seed=6)
    assert rest == tokens[3:]


def test_padding_of_the_vocabulary_is_never_drawn(params):
    sequences = continued(params, TEXT[:4], temperature=50.0, top_k=0, top_p=1.0, num_return_sequences=4)
    drawn = {token for tokens in sequences for token in tokens}
    assert max(drawn) < VOCAB and len(drawn) > 20


# ---------------------------------------------------------------- where it stops


@pytest.fixture
def steps_made(monkeypatch):
    """How many tokens each call of the decoding loop made."""
    made, decode_chunk = [], decode.decode_chunk

    def recorded(*args):
        slots, out = decode_chunk(*args)
        made.append(int((out[0] != NO_TOKEN).any(axis=0).sum()))
        return slots, out

    monkeypatch.setattr(decode, "decode_chunk", recorded)
    return made


def test_end_of_text_cuts_each_continuation_and_the_loop_ends_with_the_last(params, steps_made):
    options = dict(seed=5, num_return_sequences=4, top_k=4)
    free = continued(params, TEXT[:4], 16, **options)
    # A token that every continuation has, or the best that comes near it.
    end = max(range(VOCAB), key=lambda token: sum(token in tokens for tokens in free))
    where = [tokens.index(end) if end in tokens else None for tokens in free]
    ended = continued(params, TEXT[:4], 16, end_of_text=end, **options)
    assert ended == [tokens[:index] for tokens, index in zip(free, where, strict=True)]
    assert sum(index is not None for index in where) >= 2
    expected = 16 if None in where else max(where) + 1
    assert steps_made == [16, expected]


def test_the_loop_ends_when_its_only_row_ends(params, steps_made):
    (free,) = continued(params, TEXT[:4], temperature=0)
    for end in dict.fromkeys(free):
        (tokens,) = continued(params, TEXT[:4], temperature=0, end_of_text=end)
        assert tokens == free[: free.index(end)]
        assert steps_made[-1] == len(tokens) + 1


def test_stop_tokens_end_a_text_as_end_of_text_does(params):
    (free,) = continued(params, TEXT[:4], 16, temperature=0)
    decoder = decoder_of(params, end_of_text=free[9])
    for ids, length in (((), 9), ((free[5],), 5), ((free[11], free[2], 64), 2)):
        length = min(length, free.index(free[length]))
        options = SamplingOptions(max_new_tokens=16, temperature=0, stop_token_ids=ids)
        [[continuation]] = generate(decoder, [TEXT[:4]], options)
        expected = min(free.index(token) for token in (free[9], *ids) if token in free)
        assert continuation.tokens == free[:expected] and len(continuation.logprobs) == expected
        assert continuation.finish_reason == "stop"
    [[continuation]] = generate(decoder_of(params), [TEXT[:4]], SamplingOptions(max_new_tokens=3))
    assert continuation.finish_reason == "length" and len(continuation.tokens) == 3


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_streamed_parts_are_the_continuations_in_pieces(params, chunk):
    prompts, options = [TEXT[:4], TEXT[:11], TEXT[7:9]], SamplingOptions(max_new_tokens=10, num_return_sequences=2)
    free = generate(decoder_of(params), prompts, options)
    decoder = decoder_of(params, end_of_text=free[0][0].tokens[4])  # so that rows end at different steps
    whole = [row for rows in generate(decoder, prompts, options) for row in rows]
    steps = list(stream(decoder, prompts, options, chunk))
    assert all(len(part.tokens) <= chunk for parts in steps for part in parts)
    for row, continuation in enumerate(whole):
        parts = [parts[row] for parts in steps]
        assert [token for part in parts for token in part.tokens] == continuation.tokens
        assert [value for part in parts for value in part.logprobs] == continuation.logprobs
        assert [part.finish_reason for part in parts if part.finish_reason] == [continuation.finish_reason]


def test_a_row_that_is_told_to_end_makes_no_more_tokens(params, steps_made):
    prompts, options = [TEXT[:4], TEXT[:11]], SamplingOptions(max_new_tokens=12)
    parts = stream(decoder_of(params), prompts, options, chunk=2)
    first = next(parts)
    second = parts.send({0})
    assert [len(part.tokens) for part in first] == [2, 2] and [len(part.tokens) for part in second] == [0, 2]
    with pytest.raises(StopIteration):
        parts.send({1})
    assert steps_made == [2, 2]


def test_an_empty_prompt_starts_from_end_of_text(params):
    from_token = continued(params, [7], temperature=0)
    (tokens,) = continued(params, [], temperature=0, end_of_text=7)
    assert tokens == from_token[0][: len(tokens)]
    with pytest.raises(UserError, match="prompt is empty"):
        continued(params, [])


def test_what_does_not_fit_is_refused_with_the_numbers(params):
    with pytest.raises(UserError, match=r"prompt is 42 tokens.*n_positions = 40.*at least 3"):
        continued(params, [1] * 42, 1)
    with pytest.raises(UserError, match=r"32 tokens and 10 new ones are 2 more than .* = 40; .*at most 8 new"):
        continued(params, [1] * 32, 10)
    with pytest.raises(UserError, match=r"token 65, but the model's vocabulary is 65"):
        continued(params, [1, 65], 1)


# ---------------------------------------------------------------- compiling, and meshes


def compilations(caplog, function) -> int:
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        function()
    return sum("Compiling" in record.getMessage() for record in caplog.records)


def test_what_varies_within_the_buckets_compiles_nothing(caplog):
    config = dataclasses.replace(SMALL, n_embd=16)  # a shape that no other test compiles
    params = random_params(config)

    def compiled_for(prompt_length=3, new=10, temperature=0.8, **options):
        options |= dict(config=config, temperature=temperature)
        return compilations(caplog, lambda: continued(params, TEXT[:prompt_length], new, **options))

    assert compiled_for() == 3  # laying out the weights, reading the prompt, and the loop
    again = {
        "prompt length": compiled_for(prompt_length=16),
        "new tokens": compiled_for(new=16),
        "greedy": compiled_for(temperature=0),
        "rules": compiled_for(temperature=1.3, top_k=7, top_p=0.5),
        "rules off": compiled_for(temperature=1, top_k=0, top_p=1),
        "seed": compiled_for(seed=9),
        "end of text": compiled_for(end_of_text=1),
        "stop tokens": compiled_for(stop_token_ids=(1, 2, 3)),
    }
    assert again == dict.fromkeys(again, 0)


def test_parameters_on_a_mesh_give_the_tokens_of_one_device(params):
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    _, shapes, axes = gpt2.abstract_model(CONFIG, VOCAB)
    sharded = jax.device_put(params, param_shardings(axes, shapes, mesh))
    assert sharded["blocks"]["mlp"]["c_fc"]["kernel"].addressable_shards[0].data.size == 64 * 256 * 2 // 4
    for options in (dict(temperature=0), dict(seed=2)):
        assert continued(sharded, TEXT[:5], **options) == continued(params, TEXT[:5], **options)
