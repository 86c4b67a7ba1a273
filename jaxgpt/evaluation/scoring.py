"""How likely a model finds given texts: the log-probability of target tokens after a context.

Requests become rows of tokens. Requests with the same context share a row: the context is read once, and each target
is a branch after it that does not see the other branches (the four endings of a HellaSwag question take 2.5 times
fewer tokens). Rows come in batches of few shapes, the longest first, so a handful of programs serve any task. Logits
exist only for the targets. The score of a request does not depend on what is beside it.

Axes in names: B rows, T positions, K targets, D width, V vocabulary.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.model import attention, gpt2
from jaxgpt.parallel import sharding
from jaxgpt.parallel.mesh import batch_shards
from jaxgpt.training.step import lay_out

LOGITS_AT_ONCE = 512  # targets whose logits exist together on a device: 100 MB at GPT-2's vocabulary
SMALLEST = 16  # positions of the smallest shape
FEWEST = 4  # targets of the smallest shape
WORTH_SHARING = 0.25  # of the tokens: branches need attention with a mask, which is slower than the plain kind


class ScoringRequest(NamedTuple):
    context: Sequence[int] | np.ndarray
    """Not empty: at least the end-of-text token."""
    target: Sequence[int] | np.ndarray


class Score(NamedTuple):
    logprob: float
    """Sum over the targets, in nats."""
    is_greedy: bool
    """Each target is the model's likeliest token at its position."""
    cut: int
    """Tokens of the context that did not fit, at its beginning."""


def encode_pair(tokenizer: Tokenizer, context: str, target: str) -> ScoringRequest:
    """The tokens of two consecutive texts, split as EleutherAI's lm-evaluation-harness splits them.

    White space at the end of the context belongs to the target, where GPT-2's tokens have it; the target's tokens are
    those that come after the context's in the tokens of both. An empty context is the end-of-text token.
    """
    if not context:
        return ScoringRequest([tokenizer.end_of_text], tokenizer.encode(target))
    whole = tokenizer.encode(context + target)
    before = len(tokenizer.encode(context.rstrip()))
    return ScoringRequest(whole[:before] or [tokenizer.end_of_text], whole[before:])


class RequestScorer:
    """A model's shape on a mesh, compiled to score requests with any parameters of that shape."""

    param_shardings: dict
    """How the parameters must lie on the mesh, as those of a training on the same mesh do."""

    def __init__(self, config: Config, vocab_size: int, mesh: Mesh, rows_per_device: int = 8):
        """`config.block_size` tokens are what the model reads at once."""
        layout = lay_out(config, vocab_size, mesh)
        self.param_shardings = layout.param_shardings
        self._block_size = config.block_size
        self._rows = rows_per_device * batch_shards(mesh)
        self._rows_sharding = sharding.rows_sharding(mesh)
        attend = functools.partial(attention.attend, shared_segment=0)
        branching = dataclasses.replace(layout.backend, attend=sharding.over_heads(attend, mesh))

        def device_scores(params: dict, batch: RowBatch) -> tuple[jax.Array, jax.Array]:
            tokens_BT, positions_BT, branches_BT, targets_BK, outputs_BK = cast(tuple[jax.Array, ...], batch)
            outer = layout.gather({name: value for name, value in params.items() if name != "blocks"})
            network = gpt2.bind(config.model, vocab_size, {**outer, "blocks": params["blocks"]})
            hidden_BTD = network.hidden(
                tokens_BT,
                segments_BT=branches_BT,
                positions_BT=positions_BT,
                gather_block=lambda block: layout.gather({"blocks": block})["blocks"],
                backend=layout.backend if branches_BT is None else branching,
            )
            return _target_scores(network, hidden_BTD, targets_BK, outputs_BK)

        rows = self._rows_sharding.spec
        self._score = jax.jit(
            sharding.per_device(
                device_scores, mesh, in_specs=(sharding.specs(layout.param_shardings), rows), out_specs=(rows, rows)
            ),
            in_shardings=(layout.param_shardings, self._rows_sharding),
            out_shardings=sharding.replicated(mesh),  # whole on each device, any process can read it
        )

    def __call__(
        self, params: dict, requests: Sequence[ScoringRequest], progress: Callable[[int], object] = lambda count: None
    ) -> list[Score]:
        """The score of each request, in their order. `progress` gets the number of requests that each batch finished.

        `params` lie as `param_shardings`. On several hosts, every process calls this with the same requests and gets
        the same scores. A context that does not fit loses its beginning; a target that does not fit by itself keeps
        its end.
        """
        scores: dict[int, Score] = {}
        place_on = lambda x: jax.make_array_from_callback(x.shape, self._rows_sharding, lambda index: x[index])
        for batch, rows in row_batches(requests, self._rows, self._block_size):
            logprobs_BK, likeliest_BK = map(np.asarray, self._score(params, jax.tree.map(place_on, batch)))
            for row, logprobs_K, likeliest_K in zip(rows, logprobs_BK.astype(np.float64), likeliest_BK):
                for number, first, num_targets, cut in row.members:
                    own = slice(first, first + num_targets)
                    scores[number] = Score(math.fsum(logprobs_K[own].tolist()), bool(likeliest_K[own].all()), cut)
            progress(sum(len(row.members) for row in rows))
        return [scores[number] for number in range(len(requests))]


def _target_scores(
    network: gpt2.GPT2, hidden_BTD: jax.Array, targets_BK: jax.Array, outputs_BK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(log-probability of each target, whether it is the likeliest token), each (B, K)."""
    hidden_BKD = jnp.take_along_axis(hidden_BTD, outputs_BK[..., None], axis=1)

    def row(hidden_and_targets: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_KD, targets_K = hidden_and_targets
        logits_KV = network.logits(hidden_KD[None])[0]
        chosen_K = jnp.take_along_axis(logits_KV, targets_K[:, None], axis=1)[:, 0]
        return chosen_K - jax.nn.logsumexp(logits_KV, axis=1), jnp.argmax(logits_KV, axis=1) == targets_K

    together = max(LOGITS_AT_ONCE // targets_BK.shape[1], 1)
    return jax.lax.map(row, (hidden_BKD, targets_BK), batch_size=min(together, targets_BK.shape[0]))


# ---------------------------------------------------------------- requests as rows of tokens


class RowMember(NamedTuple):
    """A request in a row."""

    number: int
    """Its place among the requests."""
    first: int
    """The place of its first target among the row's."""
    num_targets: int
    cut: int
    """Tokens of the context that did not fit, at its beginning."""


class ScoringRow(NamedTuple):
    tokens: list[int]
    positions: list[int]
    branches: list[int]
    """0 for the context, then 1, 2, ...; all 0 in a row of one request, which is read from left to right."""
    targets: list[int]
    outputs: list[int]
    """The place in the row at which each target is predicted."""
    members: list[RowMember]

    @property
    def is_shared(self) -> bool:
        return len(self.members) > 1


class RowBatch(NamedTuple):
    """Rows as arrays of few shapes. Where no context is shared, positions and branches are None."""

    tokens_BT: np.ndarray | jax.Array
    positions_BT: np.ndarray | jax.Array | None
    branches_BT: np.ndarray | jax.Array | None
    targets_BK: np.ndarray | jax.Array
    outputs_BK: np.ndarray | jax.Array


def row_batches(
    requests: Sequence[ScoringRequest], rows: int, block_size: int
) -> Iterator[tuple[RowBatch, list[ScoringRow]]]:
    """The requests in batches of `rows` rows, the longest first: rows of similar length share a batch."""
    size = lambda row: (row.is_shared, len(row.tokens), len(row.targets))
    ordered = sorted(rows_of(requests, block_size), key=size, reverse=True)
    for _, group in itertools.groupby(ordered, lambda row: row.is_shared):
        alike = list(group)
        for start in range(0, len(alike), rows):  # all but the last batch are full
            part = alike[start : start + rows]
            yield _batch(part, rows, block_size), part


def rows_of(requests: Sequence[ScoringRequest], block_size: int) -> Iterator[ScoringRow]:
    """The rows of the requests; neighbours with one context may share one. A row has at most `block_size` tokens."""
    numbered = enumerate(requests)
    for context, family in itertools.groupby(numbered, lambda item: [int(token) for token in item[1].context]):
        targets = {number: [int(token) for token in request.target] for number, request in family}
        longest = len(context) - 1 + max(map(len, targets.values()))
        apart = sum(len(context) + len(target) - 1 for target in targets.values())
        saved = len(context) * (len(targets) - 1)
        if longest <= block_size and all(targets.values()) and saved >= WORTH_SHARING * apart:
            yield from _shared(context, targets, block_size)
        else:
            yield from (_alone(number, context, target, block_size) for number, target in targets.items())


def _shared(context: list[int], targets: dict[int, list[int]], block_size: int) -> Iterator[ScoringRow]:
    waiting = collections.deque(targets.items())
    while waiting:
        row = ScoringRow(list(context), list(range(len(context))), [0] * len(context), [], [], [])
        while waiting and len(row.tokens) + len(waiting[0][1]) - 1 <= block_size:
            number, target = waiting.popleft()
            begin, inputs = len(row.tokens), len(target) - 1
            row.members.append(RowMember(number, len(row.targets), len(target), 0))
            row.tokens.extend(target[:-1])
            row.positions.extend(range(len(context), len(context) + inputs))
            row.branches.extend([len(row.members)] * inputs)
            row.targets.extend(target)
            # The first target is predicted at the end of the context, each other one at the target before it.
            row.outputs.extend([len(context) - 1, *range(begin, begin + inputs)])
        if not row.is_shared:
            row.branches[:] = [0] * len(row.branches)
        yield row


def _alone(number: int, context: list[int], target: list[int], block_size: int) -> ScoringRow:
    """A row of one request. A context, or a target that is too long by itself, loses its beginning."""
    whole = context + target
    inputs = whole[:-1][-block_size:]
    length = len(inputs)
    kept = target[-length:]
    member, places = RowMember(number, 0, len(kept), len(whole) - 1 - length), list(range(length))
    return ScoringRow(inputs, places, [0] * length, kept, places[length - len(kept) :], [member])


def _batch(part: list[ScoringRow], rows: int, block_size: int) -> RowBatch:
    longest = max(len(row.tokens) for row in part)
    size = max(SMALLEST, 1 << (longest - 1).bit_length())
    # The next of 16, 24, 32, 48, 64, 96, ...: above 16, less than a third of a row is padding.
    num_positions = min(size * 3 // 4 if longest <= size * 3 // 4 and size > SMALLEST else size, block_size)
    num_targets = max(FEWEST, 1 << (max(len(row.targets) for row in part) - 1).bit_length())  # a power of two

    def filled(name: str, width: int) -> np.ndarray:
        array = np.zeros((rows, width), np.int32)
        for number, row in enumerate(part):
            values = getattr(row, name)
            array[number, : len(values)] = values
        return array

    shared = part[0].is_shared
    return RowBatch(
        filled("tokens", num_positions),
        filled("positions", num_positions) if shared else None,
        filled("branches", num_positions) if shared else None,
        filled("targets", num_targets),
        filled("outputs", num_targets),
    )
