"""Log-probabilities of given tokens: those of the plain network, whatever is beside a request and on any mesh."""

import functools

import jax
import numpy as np
import pytest
from tiny import CONFIG, MODEL, ONE_DEVICE, VOCAB

from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.evaluation.scoring import RequestScorer, Score, ScoringRequest, encode_pair, rows_of
from jaxgpt.model import gpt2
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.settings import MeshConfig

BLOCK = MODEL.n_positions
SIZES = [(1, 1), (1, 31), (5, 2), (20, 12), (31, 1), (9, 9), (2, 17), (40, 5), (3, 60), (7, 1)]


@pytest.fixture(scope="module")
def params() -> dict:
    params = gpt2.init_params(MODEL, VOCAB, jax.random.key(0))
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)  # predictions that are worth comparing


@pytest.fixture(scope="module")
def requests() -> list[ScoringRequest]:
    draw = np.random.default_rng(0)
    return [ScoringRequest(*(draw.integers(0, VOCAB, size).tolist() for size in sizes)) for sizes in SIZES]


@functools.cache
def scorer_on(mesh: MeshConfig, rows: int) -> RequestScorer:
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    return RequestScorer(CONFIG, VOCAB, build_mesh(mesh, devices), rows)


def scores(params, requests, mesh: MeshConfig = ONE_DEVICE, rows: int = 4) -> list[Score]:
    scorer = scorer_on(mesh, rows)
    return scorer(jax.device_put(params, scorer.param_shardings), requests)


@jax.jit
def network(params, tokens_1T):
    return gpt2.bind(MODEL, VOCAB, params)(tokens_1T)


def logits_of(params, tokens: list[int]) -> np.ndarray:
    """Logits after each token, by the plain network."""
    padded = np.zeros((1, BLOCK), np.int32)  # one shape; what comes after is not seen
    padded[0, : len(tokens)] = tokens
    return np.asarray(network(params, padded)[0, : len(tokens)], np.float64)


def plain(params, request: ScoringRequest) -> tuple[float, bool]:
    """The score by the whole network's logits, one request at a time."""
    tokens = [*request.context, *request.target][-BLOCK - 1 :]
    logits = logits_of(params, tokens[:-1])
    count = min(len(request.target), len(tokens) - 1)
    rows, target = logits[-count:], tokens[-count:]
    chosen = rows[np.arange(count), target] - np.log(np.exp(rows).sum(axis=1))
    return chosen.sum(), bool((rows.argmax(axis=1) == target).all())


def test_a_score_is_that_of_the_plain_network_and_says_what_was_cut(params, requests):
    for request, (context, target), score in zip(requests, SIZES, scores(params, requests), strict=True):
        logprob, is_greedy = plain(params, request)
        assert score.logprob == pytest.approx(logprob, rel=1e-5)
        assert score.is_greedy == is_greedy
        assert score.cut == max(context + target - 1 - BLOCK, 0)


def test_what_the_model_would_write_is_greedy_and_another_token_is_not(params):
    tokens = [3, 1, 4]
    for _ in range(4):
        tokens.append(int(logits_of(params, tokens)[-1].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % VOCAB]
    found = scores(params, [ScoringRequest(tokens[:3], tokens[3:]), ScoringRequest(other[:3], other[3:])])
    assert [score.is_greedy for score in found] == [True, False]


def test_mesh_batch_and_neighbours_change_nothing(params, requests):
    expected = [score.logprob for score in scores(params, requests)]
    for mesh, rows in ((MeshConfig(data=8), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 1)):
        found = scores(params, requests, mesh, rows)
        assert [score.logprob for score in found] == pytest.approx(expected, rel=1e-6)
    alone = [scores(params, [request])[0].logprob for request in requests[:3]]
    assert alone == pytest.approx(expected[:3], rel=1e-6)


def test_requests_with_one_context_share_it_and_have_the_scores_they_have_alone(params):
    draw = np.random.default_rng(1)
    tokens = lambda count: draw.integers(0, VOCAB, count).tolist()
    long, short, whole = tokens(12), tokens(2), tokens(28)
    families = [(long, (1, 4, 6, 2)), (short, (9, 8)), (whole, (2, 3, 1)), (long, (25, 3)), (tokens(8), (3, 3, 3))]
    requests = [ScoringRequest(context, tokens(count)) for context, counts in families for count in counts]
    shared = [[member.number for member in row.members] for row in rows_of(requests, BLOCK) if row.is_shared]
    # Twelve tokens once and not four times; two are not worth it; 28 + 1 + 2 tokens fill a block of 32, 25 do not fit.
    assert shared == [[0, 1, 2, 3], [6, 7, 8], [11, 12, 13]]
    found = scores(params, requests)
    for request, score in zip(requests, found, strict=True):
        logprob, is_greedy = plain(params, request)
        assert score.logprob == pytest.approx(logprob, rel=1e-5)
        assert score.is_greedy == is_greedy
    on_a_mesh = scores(params, requests, MeshConfig(data=2, fsdp=2, tensor=2), rows=1)
    assert [score.logprob for score in on_a_mesh] == pytest.approx([score.logprob for score in found], rel=1e-6)


def test_white_space_between_context_and_target_belongs_to_the_target():
    tokenizer = train_bpe(["the cat sat on the mat " * 20], 300)
    assert encode_pair(tokenizer, "the cat ", "sat") == encode_pair(tokenizer, "the cat", " sat")
    context, target = encode_pair(tokenizer, "the cat", " sat")
    assert tokenizer.decode(target) == " sat"
    assert [*context, *target] == tokenizer.encode("the cat sat")
    assert encode_pair(tokenizer, "", "the") == ([tokenizer.end_of_text], tokenizer.encode("the"))
