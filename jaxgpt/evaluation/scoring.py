"""How likely a model finds given texts: the log-probability of target tokens after a context, and whether it would
have written them itself.

Requests come in batches of few shapes, the longest first, so a handful of programs serve any task.
Logits exist only for the targets. The number of a request does not depend on what is beside it.

Axes in names: B requests, T positions, K targets, D width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import Config
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.model import gpt2
from jaxgpt.parallel import sharding
from jaxgpt.parallel.mesh import batch_shards
from jaxgpt.training.step import lay_out

SMALLEST = 16  # positions of the smallest shape
FEWEST = 4  # targets of the smallest shape
LOGITS_AT_ONCE = 512  # targets whose logits exist together on a device: 100 MB at GPT-2's vocabulary


class Request(NamedTuple):
    context: Sequence[int]
    """Not empty: at least the end-of-text token."""
    target: Sequence[int]


class Score(NamedTuple):
    logprob: float
    """Sum over the targets, in nats."""
    is_greedy: bool
    """Each target is the likeliest token where it stands."""
    cut: int
    """Tokens of the context that did not fit, at its beginning."""


def encode_pair(tokenizer: Tokenizer, context: str, target: str) -> Request:
    """The tokens of two texts one after another, as EleutherAI's lm-evaluation-harness splits them.

    The white space at the end of the context goes to the target, where GPT-2's tokens have it; the target's tokens are
    those that come after the context's in the tokens of both. An empty context is the end-of-text token.
    """
    if not context:
        return Request([tokenizer.end_of_text], tokenizer.encode(target))
    stripped = context.rstrip()
    whole = tokenizer.encode(context + target)
    before = len(tokenizer.encode(stripped))
    return Request(whole[:before] or [tokenizer.end_of_text], whole[before:])


class Scorer:
    """A model's shape laid on a mesh to score requests with any parameters of that shape."""

    param_shardings: dict
    """How the parameters must lie on the mesh: those of a training on the same mesh do."""

    def __init__(self, config: Config, vocab_size: int, mesh: Mesh, rows_per_device: int = 8):
        """`config.block_size` tokens are what the model reads at once."""
        laid = lay_out(config, vocab_size, mesh)
        self.param_shardings = laid.param_shardings
        self._block_size = config.block_size
        self._rows = rows_per_device * batch_shards(mesh)
        rows = sharding.rows_sharding(mesh)
        one = PartitionSpec(*rows.spec[:1])
        self._laid_as = (rows, rows, NamedSharding(mesh, one))

        def device_scores(params, tokens_BT, targets_BK, first_B):
            outer = laid.gather({name: value for name, value in params.items() if name != "blocks"})
            network = gpt2.bind(config.model, vocab_size, {**outer, "blocks": params["blocks"]})
            hidden_BTD = network.hidden(
                tokens_BT, gather_block=lambda block: laid.gather({"blocks": block})["blocks"], backend=laid.backend
            )
            return _target_scores(network, hidden_BTD, targets_BK, first_B)

        self._score = jax.jit(
            sharding.per_device(
                device_scores,
                mesh,
                in_specs=(sharding.specs(laid.param_shardings), rows.spec, rows.spec, one),
                out_specs=(rows.spec, rows.spec),
            ),
            in_shardings=(laid.param_shardings, *self._laid_as),
            out_shardings=sharding.replicated(mesh),  # whole on each device, any process can read it
        )

    def __call__(
        self, params: dict, requests: Sequence[Request], progress: Callable[[int], object] = lambda count: None
    ) -> list[Score]:
        """The `Score` of each request, in their order; `progress` is told how many more are done.

        `params` lie as `param_shardings`. On several hosts, every process calls this with the same requests and gets
        the same scores. A context that does not fit loses its beginning; a target that does not fit by itself keeps
        its end.
        """
        scores: list[Score | None] = [None] * len(requests)
        for batch in self._batches(requests):
            rows = zip((batch.tokens_BT, batch.targets_BK, batch.first_B), self._laid_as)
            placed = [jax.make_array_from_callback(x.shape, where, lambda index, x=x: x[index]) for x, where in rows]
            logprobs_BK, likeliest_BK = self._score(params, *placed)
            logprobs_BK, likeliest_BK = np.asarray(logprobs_BK, np.float64), np.asarray(likeliest_BK)
            for row, (place, count, cut) in enumerate(batch.whose):
                summed = math.fsum(logprobs_BK[row, :count].tolist())
                scores[place] = Score(summed, bool(likeliest_BK[row, :count].all()), cut)
            progress(len(batch.whose))
        return scores

    def _batches(self, requests: Sequence[Request]) -> Iterator["_Batch"]:
        fitted = [_fit(request, self._block_size) for request in requests]
        size = lambda place: (len(fitted[place][0]), len(fitted[place][1]))
        places = sorted(range(len(requests)), key=size, reverse=True)
        for start in range(0, len(places), self._rows):  # neighbours in length share a batch: all but the last are full
            part = [(place, *fitted[place]) for place in places[start : start + self._rows]]
            longest, most = (max(len(row[column]) for row in part) for column in (1, 2))
            yield self._batch(part, self._positions(longest), self._targets(most))

    def _batch(self, part: list, positions: int, targets: int) -> "_Batch":
        tokens_BT, targets_BK = np.zeros((self._rows, positions), np.int32), np.zeros((self._rows, targets), np.int32)
        first_B, whose = np.zeros(self._rows, np.int32), []
        for row, (place, tokens, target, cut) in enumerate(part):
            tokens_BT[row, : len(tokens)], targets_BK[row, : len(target)] = tokens, target
            first_B[row] = len(tokens) - len(target)
            whose.append((place, len(target), cut))
        return _Batch(tokens_BT, targets_BK, first_B, whose)

    def _positions(self, length: int) -> int:
        """The next of 16, 24, 32, 48, 64, 96, ...: above 16, less than a third of a row is padding."""
        size = SMALLEST
        while size < length:
            size *= 2
        return min(size * 3 // 4 if length <= size * 3 // 4 and size > SMALLEST else size, self._block_size)

    def _targets(self, count: int) -> int:
        """The next power of two."""
        size = FEWEST
        while size < count:
            size *= 2
        return min(size, self._block_size)


@dataclasses.dataclass(frozen=True)
class _Batch:
    tokens_BT: np.ndarray
    targets_BK: np.ndarray
    first_B: np.ndarray
    """Position whose output is compared with the first target."""
    whose: list[tuple[int, int, int]]
    """(place among the requests, number of targets, tokens cut) of each row in use."""


def _fit(request: Request, block_size: int) -> tuple[Sequence[int], Sequence[int], int]:
    """(inputs, targets, tokens cut off): the last block_size inputs before the last target."""
    whole = [*request.context, *request.target]
    inputs = whole[:-1][-block_size:]
    cut = len(whole) - 1 - len(inputs)
    return inputs, request.target[-len(inputs) :] if len(request.target) > len(inputs) else request.target, cut


def _target_scores(network: gpt2.GPT2, hidden_BTD, targets_BK, first_B):
    """(log-probability of each target, whether it is the likeliest token), each (B, K)."""
    count = targets_BK.shape[1]
    positions_BK = jnp.minimum(first_B[:, None] + jnp.arange(count)[None], hidden_BTD.shape[1] - 1)
    hidden_BKD = jnp.take_along_axis(hidden_BTD, positions_BK[..., None], axis=1)

    def row(hidden_and_targets):
        hidden_KD, targets_K = hidden_and_targets
        logits_KV = network.logits(hidden_KD[None])[0]
        chosen_K = jnp.take_along_axis(logits_KV, targets_K[:, None], axis=1)[:, 0]
        return chosen_K - jax.nn.logsumexp(logits_KV, axis=1), jnp.argmax(logits_KV, axis=1) == targets_K

    together = max(LOGITS_AT_ONCE // count, 1)
    return jax.lax.map(row, (hidden_BKD, targets_BK), batch_size=min(together, targets_BK.shape[0]))
