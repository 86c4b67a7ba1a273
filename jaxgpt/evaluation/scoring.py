"""How likely a model finds given texts: the log-probability of target tokens after a context, and whether it would
have written them itself.

Requests come in batches of few shapes, the longest first, so a handful of programs serve any task (rows.py).
Logits exist only for the targets. The number of a request does not depend on what is beside it.

Axes in names: B rows, T positions, K targets, D width, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.evaluation.scoring_rows import Request, RowBatch, batches
from jaxgpt.model import attention, gpt2
from jaxgpt.parallel import sharding
from jaxgpt.parallel.mesh import batch_shards
from jaxgpt.training.step import lay_out

LOGITS_AT_ONCE = 512  # targets whose logits exist together on a device: 100 MB at GPT-2's vocabulary


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
        self._laid_as = sharding.rows_sharding(mesh)
        branching = functools.partial(attention.attend, shared_segment=0)
        branching = dataclasses.replace(laid.backend, attend=sharding.over_heads(branching, mesh))

        def device_scores(params, batch: RowBatch):
            outer = laid.gather({name: value for name, value in params.items() if name != "blocks"})
            network = gpt2.bind(config.model, vocab_size, {**outer, "blocks": params["blocks"]})
            hidden_BTD = network.hidden(
                batch.tokens_BT,
                segments_BT=batch.branches_BT,
                positions_BT=batch.positions_BT,
                gather_block=lambda block: laid.gather({"blocks": block})["blocks"],
                backend=laid.backend if batch.branches_BT is None else branching,
            )
            return _target_scores(network, hidden_BTD, batch.targets_BK, batch.outputs_BK)

        rows = self._laid_as.spec
        self._score = jax.jit(
            sharding.per_device(
                device_scores,
                mesh,
                in_specs=(sharding.specs(laid.param_shardings), rows),
                out_specs=(rows, rows),
            ),
            in_shardings=(laid.param_shardings, self._laid_as),
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
        place_on = lambda x: jax.make_array_from_callback(x.shape, self._laid_as, lambda index: x[index])
        for batch, rows in batches(requests, self._rows, self._block_size):
            logprobs_BK, likeliest_BK = self._score(params, jax.tree.map(place_on, batch))
            logprobs_BK, likeliest_BK = np.asarray(logprobs_BK, np.float64), np.asarray(likeliest_BK)
            members = [(number, member) for number, row in enumerate(rows) for member in row.members]
            for number, (place, first, count, cut) in members:
                own = slice(first, first + count)
                summed = math.fsum(logprobs_BK[number, own].tolist())
                scores[place] = Score(summed, bool(likeliest_BK[number, own].all()), cut)
            progress(len(members))
        return scores


def _target_scores(network: gpt2.GPT2, hidden_BTD, targets_BK, outputs_BK):
    """(log-probability of each target, whether it is the likeliest token), each (B, K)."""
    hidden_BKD = jnp.take_along_axis(hidden_BTD, outputs_BK[..., None], axis=1)

    def row(hidden_and_targets):
        hidden_KD, targets_K = hidden_and_targets
        logits_KV = network.logits(hidden_KD[None])[0]
        chosen_K = jnp.take_along_axis(logits_KV, targets_K[:, None], axis=1)[:, 0]
        return chosen_K - jax.nn.logsumexp(logits_KV, axis=1), jnp.argmax(logits_KV, axis=1) == targets_K

    together = max(LOGITS_AT_ONCE // targets_BK.shape[1], 1)
    return jax.lax.map(row, (hidden_BKD, targets_BK), batch_size=min(together, targets_BK.shape[0]))
