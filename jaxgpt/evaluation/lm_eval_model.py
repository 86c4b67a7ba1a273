"""A checkpoint as a model of EleutherAI's lm-evaluation-harness, in this process; `harness.py` makes one.

Texts become tokens as the harness's own Hugging Face model reads them: a special token's name in a text is that token.
Then `RequestScorer` gives the log-likelihoods and `complete` the generated texts.
"""

import collections
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from jaxgpt.config import Config
from jaxgpt.data.tokenizer import TEMPLATE
from jaxgpt.errors import UserError
from jaxgpt.evaluation.scoring import RequestScorer, Score, ScoringRequest
from jaxgpt.evaluation.wikitext import rolling
from jaxgpt.inference.decoder import Decoder, build_decoder
from jaxgpt.inference.prompts import ChatPrompts
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.inference.text import complete, fit_prompt
from jaxgpt.parallel.mesh import batch_shards
from jaxgpt.training.models import LoadedModel

NEW_TOKENS = 256  # the harness's default; a model with a context of less than 512 tokens writes half its context
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
OTHER_RULES = ("until", "max_gen_toks", "do_sample", "use_cache")  # the last is only a hint


class CheckpointLM(TemplateLM):
    """A loaded model on a mesh.

    On several hosts every process asks it the same and gets the same answers, so the harness sees one process.
    """

    cut: collections.Counter[str]
    """Task name -> requests whose context lost its beginning because it was longer than the model reads."""

    def __init__(self, loaded: LoadedModel, config: Config, mesh: Mesh, rows_per_device: int = 8):
        super().__init__()
        os.environ["DISABLE_MULTIPROC"] = "1"  # the harness's bootstrap would fork, which jax's threads do not survive
        self.max_length = config.block_size
        self.cut = collections.Counter()
        self._tokenizer, self._config, self._vocab_size = loaded.tokenizer, config, loaded.vocab_size
        added = loaded.tokenizer.backend.get_added_tokens_decoder().items()
        self._special_ids = {token.content: number for number, token in added if token.special}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_names = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._scorer = RequestScorer(config, loaded.vocab_size, mesh, rows_per_device)
        self._params = jax.device_put(loaded.params, self._scorer.param_shardings)
        self._rows = rows_per_device * batch_shards(mesh)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        return f"jaxgpt-{self._tokenizer.digest}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if not chat_template or self._tokenizer.end_of_turn is None:
            return None
        return self._tokenizer.own_template or TEMPLATE

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, with the beginning of an answer; else the last message is one that goes on."""
        encode = ChatPrompts(self._tokenizer, self.max_length, "the chat template").encode
        if add_generation_prompt:
            return self._tokenizer.decode(encode(chat_history))
        *before, begun = chat_history
        return self._tokenizer.decode(encode(before)) + begun["content"].strip()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        pieces = enumerate(self._special_names.split(string))  # names of special tokens are at the odd places
        encode = self._tokenizer.encode
        encoded = ([self._special_ids[piece]] if place % 2 else encode(piece) for place, piece in pieces if piece)
        return [token for tokens in encoded for token in tokens]

    # ------------------------------------------------------------ log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self._pair(*request.args) for request in requests]
        scores = self._score(pairs, disable_tqdm)
        self.cut.update(request.task_name for request, score in zip(requests, scores, strict=True) if score.cut)
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Iterable[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        scores = self._score([ScoringRequest(context, target) for _, context, target in requests], disable_tqdm)
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, scored as `rolling` cuts it into windows."""
        texts = (self.tok_encode(request.args[0]) for request in requests)
        windows = [list(rolling(tokens, self.prefix_token_id, self.max_length)) for tokens in texts]
        scores = iter(self._score([window for own in windows for window in own], disable_tqdm))
        sums = [sum(next(scores).logprob for _ in own) for own in windows]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _pair(self, context: str, target: str) -> ScoringRequest:
        if context.strip():
            return ScoringRequest(*self._encode_pair(context, target))
        tokens = self.tok_encode(context + target)
        if tokens[:1] != [self.prefix_token_id]:  # else the text brings its own end-of-text token
            tokens.insert(0, self.prefix_token_id)
        return ScoringRequest(tokens[:1], tokens[1:])

    def _score(self, requests: Sequence[ScoringRequest], disable_tqdm: bool) -> list[Score]:
        hidden = disable_tqdm or None
        with tqdm(total=len(requests), desc="log-likelihoods", unit="request", disable=hidden, leave=False) as bar:
            return self._scorer(self._params, requests, bar.update)

    # ------------------------------------------------------------ generated texts

    @functools.cached_property
    def _decoder(self) -> Decoder:
        end = self._tokenizer.end_of_text
        return build_decoder(
            self._config.model, self._vocab_size, self._params, end, rows=self._rows, ends=self._tokenizer.ends
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that the model writes after each context."""
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm or None, unit="text", leave=False) as bar:
            for options, places in self._groups(requests).items():
                prompts = {place: self._prompt(requests[place], options) for place in places}
                places = sorted(places, key=lambda place: len(prompts[place]), reverse=True)  # less padding in a batch
                for start in range(0, len(places), self._rows):
                    part = places[start : start + self._rows]
                    made = complete(self._decoder, self._tokenizer, [prompts[place] for place in part], options)
                    for place, [completion] in zip(part, made, strict=True):
                        texts[place] = completion.text
                        self.cache_hook.add_partial("generate_until", requests[place].args, completion.text)
                    bar.update(len(part))
        return [texts[place] for place in range(len(requests))]

    def _prompt(self, request: Instance, options: SamplingOptions) -> list[int]:
        whole = self.tok_encode(request.args[0])
        kept = fit_prompt(whole, options, self._config.model.n_positions, truncate=True)
        self.cut[request.task_name] += len(kept) < len(whole)
        return kept

    def _groups(self, requests: Sequence[Instance]) -> dict[SamplingOptions, list[int]]:
        """The places of the requests that can share a batch, by their options. A repeated request draws anew."""
        repeats: collections.Counter[tuple[str, str]] = collections.Counter()
        groups: dict[SamplingOptions, list[int]] = {}
        for place, request in enumerate(requests):
            context, rules = request.args
            key = (context, json.dumps(rules, sort_keys=True))
            groups.setdefault(self._options(rules, repeats[key], request.task_name), []).append(place)
            repeats[key] += 1
        return groups

    def _options(self, rules: Mapping[str, object], seed: int, task: str) -> SamplingOptions:
        default = min(NEW_TOKENS, self._config.model.n_positions // 2)
        asked = normalize_gen_kwargs(dict(rules), default)
        unknown = sorted(set(asked) - {*SAMPLING, *OTHER_RULES})
        if unknown:
            raise UserError(
                f"task {task}: generation_kwargs has {', '.join(unknown)}, which is not supported; there are "
                f"{', '.join((*OTHER_RULES[:3], *SAMPLING))}"
            )
        # The defaults: the likeliest token, or for a task that asks to draw, any token by its probability.
        plain = {"temperature": 1.0 if asked["do_sample"] else 0.0, "top_k": 0, "top_p": 1.0}
        end = self._tokenizer.end_of_turn
        return SamplingOptions(
            max_new_tokens=asked["max_gen_toks"],
            stop=tuple(stop for stop in asked["until"] if stop),
            stop_token_ids=() if end is None else (end,),
            seed=seed,
            **plain | {name: asked[name] for name in SAMPLING if name in asked},
        )
