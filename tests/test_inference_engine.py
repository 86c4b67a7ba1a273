"""Requests that share the engine's batch get what they would get alone, and leave nothing behind."""

import queue
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.inference import slots
from jaxgpt.inference.decoder import build_decoder, generate
from jaxgpt.inference.engine import Engine, Piece, QueueFull, Request
from jaxgpt.inference.sampling import SamplingOptions, rules_of, sample
from jaxgpt.model import gpt2
from jaxgpt.settings import ModelConfig

VOCAB = 300  # more than the sampler's small vocabulary: all of its ways are used
CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=64, dtype="float32")
SLOTS = 4


def model_params() -> dict:
    params = jax.jit(gpt2.init_params, static_argnums=(0, 1))(CONFIG, VOCAB, jax.random.key(0))
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params)  # it looks at its context


@pytest.fixture(scope="module")
def decoder():
    return build_decoder(CONFIG, VOCAB, model_params(), end_of_text=0, rows=SLOTS)


@pytest.fixture(scope="module", autouse=True)
def the_cache_of_this_small_network_has_several_sizes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "SMALLEST_CACHE", 16)
        yield


@pytest.fixture(scope="module")
def engine(decoder):
    with Engine(decoder, slots=SLOTS, chunk=3, queue=100) as engine:
        yield engine


class Reader:
    """Collects the pieces of a request."""

    def __init__(self):
        self.pieces: list[Piece] = []
        self.ended = threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finish_reason:
            self.ended.set()

    def wait(self) -> "Reader":
        assert self.ended.wait(60)
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def logprobs(self) -> list[float]:
        return [logprob for piece in self.pieces for logprob in piece.logprobs]

    @property
    def finish_reason(self) -> str | None:
        return self.pieces[-1].finish_reason


def ask(engine: Engine, prompt, options: SamplingOptions, **more) -> Reader:
    reader = Reader()
    engine.submit([(engine.check(Request(prompt, options, **more)), reader)])
    return reader


def requests(count: int) -> list[tuple[list[int], SamplingOptions]]:
    draw, made = np.random.default_rng(0), []
    rules = [
        dict(temperature=0.0),
        dict(temperature=1.0, top_k=0, top_p=1.0),
        dict(temperature=0.7, top_k=5),
        dict(temperature=1.0, top_k=0, top_p=0.9, min_p=0.01, repetition_penalty=1.5),
    ]
    for number in range(count):
        prompt = draw.integers(1, VOCAB, draw.integers(1, 31)).tolist()
        new = int(draw.integers(1, 17))  # two buckets of prompts and one of new tokens: `generate` compiles little
        made.append((prompt, SamplingOptions(max_new_tokens=new, seed=number, **rules[number % len(rules)])))
    return made


def test_a_request_gets_what_it_gets_alone_and_what_generate_gives(engine, decoder):
    asked = requests(16)
    together = [ask(engine, *request) for request in asked]
    for request, reader in zip(asked, together, strict=True):
        [[expected]] = generate(decoder, [request[0]], request[1])
        reader.wait()
        assert reader.tokens == expected.tokens
        assert reader.finish_reason == expected.finish_reason
        np.testing.assert_allclose(reader.logprobs, expected.logprobs, atol=1e-4)
    for request, reader in list(zip(asked, together, strict=True))[:6]:
        alone = ask(engine, *request).wait()
        assert (alone.tokens, alone.logprobs) == (reader.tokens, reader.logprobs)  # to the bit
    assert engine.running == engine.waiting == 0


def test_nothing_compiles_once_it_stands(engine):
    programs = ("admit", "score", "decode_chunk", "release", "prefill", "_with_positions")
    compiled = lambda: [getattr(slots, name)._cache_size() for name in programs]
    before = compiled()
    for number, request in enumerate(requests(8)):
        ask(engine, *request, alternatives=3 * (number % 2), scores_prompt=number > 3).wait()
    assert compiled() == before


def test_the_cache_is_as_long_as_the_longest_text_under_way_needs(engine):
    for prompt, length in ((5, 16), (40, 64), (20, 32), (5, 16)):
        ask(engine, [1] * prompt, SamplingOptions(max_new_tokens=2)).wait()
        assert engine._slots.cache.keys[0].shape[1] == length


def test_the_rows_of_one_prompt_differ_and_a_stop_token_ends_without_being_told(engine):
    options = SamplingOptions(max_new_tokens=20, temperature=1.0, top_k=0, top_p=1.0)
    first, second, again = (ask(engine, [5, 6, 7], options, row=row).wait().tokens for row in (0, 1, 0))
    assert first == again != second
    place = next(place for place in range(5, 20) if first[place] not in first[:place])
    stop = SamplingOptions(max_new_tokens=20, temperature=1.0, top_k=0, top_p=1.0, stop_token_ids=(first[place],))
    stopped = ask(engine, [5, 6, 7], stop).wait()
    assert (stopped.tokens, stopped.finish_reason) == (first[:place], "stop")


def test_alternatives_are_the_likeliest_tokens_of_the_model_itself(engine, decoder):
    options = SamplingOptions(max_new_tokens=6, temperature=1.0, top_k=0, top_p=1.0, seed=3)
    reader = ask(engine, [9, 8, 7], options, alternatives=4).wait()
    told = [others for piece in reader.pieces for others in piece.alternatives]
    assert [len(others) for others in told] == [4] * len(reader.tokens)
    for place, others in enumerate(told):
        greedy = SamplingOptions(max_new_tokens=1, temperature=0.0)
        [[best]] = generate(decoder, [[9, 8, 7, *reader.tokens[:place]]], greedy)
        assert others[0][0] == (best.tokens or [0])[0]  # no token: it was the end-of-text token
        assert [logprob for _, logprob in others] == sorted((logprob for _, logprob in others), reverse=True)


def test_a_prompt_is_scored_as_the_model_scores_it(engine):
    params = model_params()
    all_logits = jax.jit(lambda tokens_1T: gpt2.bind(CONFIG, VOCAB, params)(tokens_1T))
    for length, continues in ((1, True), (2, False), (30, True), (63, True), (64, False)):
        prompt = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
        free = SamplingOptions(max_new_tokens=1, temperature=0.0)
        reader = ask(engine, prompt, free, scores_prompt=True, continues=continues, alternatives=5).wait()
        told = reader.pieces[0].prompt
        padded = np.array([prompt + [0] * (CONFIG.n_positions - length)], np.int32)
        logprobs_TV = np.asarray(jax.nn.log_softmax(all_logits(padded)[0]))
        assert told.tokens == prompt and told.logprobs[0] is None and told.alternatives[0] == []
        np.testing.assert_allclose(
            told.logprobs[1:], logprobs_TV[np.arange(length - 1), prompt[1:]].astype(float), atol=1e-4
        )
        for place in range(1, length):
            assert [token for token, _ in told.alternatives[place]] == np.argsort(-logprobs_TV[place - 1])[:5].tolist()
            assert dict(told.alternatives[place]).get(prompt[place], told.logprobs[place]) == told.logprobs[place]
        assert len(reader.tokens) <= continues
    assert engine.running == engine.waiting == 0
    with pytest.raises(UserError, match="n_positions = 64"):
        ask(engine, prompt, free, scores_prompt=True)


def test_requests_that_belong_together_come_in_together_or_not_at_all(decoder):
    with Engine(decoder, slots=SLOTS, chunk=3, queue=4) as engine:
        request = engine.check(Request([1], SamplingOptions(max_new_tokens=5)))
        with pytest.raises(QueueFull):
            engine.submit([(request, Reader())] * 5)
        assert engine.waiting == engine.running == 0
        readers = [Reader() for _ in range(4)]
        engine.submit([(request, reader) for reader in readers])
        assert {tuple(reader.wait().tokens) for reader in readers} == {tuple(readers[0].tokens)}


def test_a_cancelled_request_frees_its_slot_and_waiting_ones_come_in(engine):
    long = SamplingOptions(max_new_tokens=60, temperature=1.0, top_k=0, top_p=1.0)
    readers, tickets = [Reader() for _ in range(3 * SLOTS)], []
    for seed, reader in enumerate(readers):
        request = engine.check(Request([seed + 1], SamplingOptions(max_new_tokens=60, seed=seed)))
        tickets += engine.submit([(request, reader)])
    for ticket in tickets[::2]:
        engine.cancel(ticket)
    for number, reader in enumerate(readers):
        reader.wait()
        assert reader.finish_reason in (("cancelled", "stop", "length") if number % 2 == 0 else ("stop", "length"))
    assert any(reader.finish_reason == "cancelled" for reader in readers)
    assert engine.running == engine.waiting == 0
    assert ask(engine, [1, 2], long).wait().finish_reason in ("stop", "length")


def test_a_full_queue_says_so_and_closing_ends_everything(decoder):
    engine = Engine(decoder, slots=SLOTS, chunk=3, queue=2)
    asked, accepted = requests(40), []
    with pytest.raises(QueueFull):
        for request in asked:
            accepted.append(ask(engine, *request))
    assert len(accepted) >= 2
    assert engine.close(seconds=60)
    assert all(reader.wait().finish_reason in ("stop", "length", "cancelled") for reader in accepted)
    with pytest.raises(RuntimeError, match="closed"):
        ask(engine, *asked[0])


def test_draining_finishes_what_was_accepted(decoder):
    engine = Engine(decoder, slots=SLOTS, chunk=3, queue=10)
    readers = [ask(engine, *request) for request in requests(6)]
    assert engine.close(drain=True, seconds=60)
    assert all(reader.finish_reason in ("stop", "length") for reader in readers)


def test_a_failure_ends_the_engine_and_every_request_hears_of_it(decoder, monkeypatch):
    engine = Engine(decoder, slots=SLOTS, chunk=3, queue=10)
    printed, asked = queue.Queue(), threading.Event()
    monkeypatch.setattr(threading, "excepthook", printed.put)

    def broken(*_):
        assert asked.wait(10)
        raise MemoryError("the device is full")

    monkeypatch.setattr(slots, "decode_chunk", broken)
    readers = [ask(engine, *request) for request in requests(SLOTS + 3)]  # more than there are slots
    asked.set()
    assert all(reader.wait().finish_reason == "error" for reader in readers)
    engine._thread.join(10)
    assert isinstance(engine.failure, MemoryError) and "full" in str(printed.get(timeout=10).exc_value)
    with pytest.raises(RuntimeError, match="closed"):
        ask(engine, [1], SamplingOptions(max_new_tokens=5))


def test_what_does_not_fit_is_refused_before_it_waits(engine):
    with pytest.raises(UserError, match="n_positions = 64"):
        ask(engine, [1] * 60, SamplingOptions(max_new_tokens=5))
    with pytest.raises(UserError, match="token 300"):
        ask(engine, [VOCAB], SamplingOptions(max_new_tokens=5))
    with pytest.raises(UserError, match="at most 16"):
        ask(engine, [1], SamplingOptions(max_new_tokens=5, stop_token_ids=tuple(range(1, 18))))
    with pytest.raises(UserError, match="logprobs = 21"):
        ask(engine, [1], SamplingOptions(max_new_tokens=5), alternatives=21)
    time.sleep(0.01)
    assert engine.running == engine.waiting == 0


def test_a_row_is_drawn_alike_whatever_rules_its_neighbours_have():
    logits_BV = jnp.asarray(np.random.default_rng(1).normal(0, 3, (64, 1000)), jnp.float32)
    uniform_B = jnp.asarray(np.random.default_rng(2).random(64), jnp.float32)
    few, every = SamplingOptions(top_k=20, top_p=0.9), SamplingOptions(top_k=0, top_p=0.99)
    drawn = jax.jit(sample)
    for mine, other in ((few, every), (SamplingOptions(temperature=0.0), few), (every, few)):
        same = drawn(logits_BV, uniform_B, rules_of([mine] * 64, 1000))[0]
        mixed = drawn(logits_BV, uniform_B, rules_of([mine, other] * 32, 1000))[0]
        np.testing.assert_array_equal(same[::2], mixed[::2])
