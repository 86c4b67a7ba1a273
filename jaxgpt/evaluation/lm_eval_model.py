"""A checkpoint as a model of EleutherAI's lm-evaluation-harness, in this process; `harness.py` makes one.

Texts become tokens as the harness's own Hugging Face model reads them (a special token's name in a text is that token),
and from there on everything is ours: `Scorer` for log-likelihoods, `complete` for generated texts.
"""

import collections
import json
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from jaxgpt.config import Config
from jaxgpt.data.tokenizer import TEMPLATE, Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation.scoring import Request, Score, Scorer
from jaxgpt.inference.decode import Decoder, build_decoder
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.inference.text import complete, fit_prompt
from jaxgpt.parallel.mesh import batch_shards
from jaxgpt.training.models import LoadedModel

NEW_TOKENS = 256  # where a task does not say, as in the harness; half the context of a model that has less than 512
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
IGNORED = ("until", "max_gen_toks", "do_sample", "use_cache")  # the first three are read by name, the last is a hint


class CheckpointLM(TemplateLM):
    """A loaded model laid on a mesh.

    On several hosts every process asks the same of it and gets the same answers, so for the harness it is one process.
    """

    cut: collections.Counter
    """Task name -> requests whose context lost its beginning because the model reads no more."""

    def __init__(self, loaded: LoadedModel, config: Config, mesh: Mesh, rows_per_device: int = 8):
        super().__init__()
        self.max_length = config.block_size
        self.cut = collections.Counter()
        self._tokenizer, self._config, self._vocab_size = loaded.tokenizer, config, loaded.vocab_size
        self._special = _SpecialTokens(loaded.tokenizer)
        self._scorer = Scorer(config, loaded.vocab_size, mesh, rows_per_device)
        self._params = jax.device_put(loaded.params, self._scorer.param_shardings)
        self._rows = rows_per_device * batch_shards(mesh)
        self._decoder: Decoder | None = None

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        return f"jaxgpt-{self._tokenizer.digest}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return TEMPLATE if chat_template and self._tokenizer.end_of_turn is not None else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """
        Raises:
            UserError: the model is no chat model.
        """
        if self._tokenizer.end_of_turn is None:
            raise UserError("the chat template: the model's tokenizer has no tokens of a chat; leave the template out")
        turns = [f"<|im_start|>{turn['role']}\n{turn['content'].strip()}<|im_end|>\n" for turn in chat_history]
        if add_generation_prompt:
            return "".join([*turns, "<|im_start|>assistant\n"])
        return "".join(turns).removesuffix("<|im_end|>\n")  # the answer that has begun goes on

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self._special.encode(string)

    # ------------------------------------------------------------ log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self._pair(*request.args) for request in requests]
        scores = self._score(pairs, disable_tqdm)
        self.cut.update(request.task_name for request, score in zip(requests, scores, strict=True) if score.cut)
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        scores = self._score([Request(context, target) for _, context, target in requests], disable_tqdm)
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each text in windows that do not overlap, but for the last, which is a whole one."""
        windows, owners = [], []
        for place, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(Request(*make_disjoint_window(pair)))
                owners.append(place)
        sums = [0.0] * len(requests)
        for place, score in zip(owners, self._score(windows, disable_tqdm), strict=True):
            sums[place] += score.logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _pair(self, context: str, target: str) -> Request:
        if context.strip():
            return Request(*self._encode_pair(context, target))
        tokens = self.tok_encode(context + target)
        begins = tokens[:1] == [self.prefix_token_id]  # the text brings its own end-of-text token
        return Request(tokens[:1], tokens[1:]) if begins else Request([self.prefix_token_id], tokens)

    def _score(self, requests: Sequence[Request], disable_tqdm: bool) -> list[Score]:
        hidden = True if disable_tqdm else None
        with tqdm(total=len(requests), desc="log-likelihoods", unit="request", disable=hidden, leave=False) as bar:
            return self._scorer(self._params, requests, bar.update)

    # ------------------------------------------------------------ generated texts

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """
        Raises:
            UserError: a task asks for a rule of drawing that there is not, or for more tokens than the model reads.
        """
        if self._decoder is None:
            end = self._tokenizer.end_of_text
            self._decoder = build_decoder(self._config.model, self._vocab_size, self._params, end, rows=self._rows)
        texts = [""] * len(requests)
        hidden = True if disable_tqdm else None
        with tqdm(total=len(requests), desc="texts", unit="text", disable=hidden, leave=False) as bar:
            for options, places in self._groups(requests):
                self._generate(requests, options, places, texts, bar)
        return texts

    def _generate(self, requests: Sequence[Instance], options: SamplingOptions, places: list[int], texts, bar) -> None:
        whole = {place: self.tok_encode(requests[place].args[0]) for place in places}
        prompts = {
            place: fit_prompt(ids, options, self._config.model.n_positions, truncate=True)
            for place, ids in whole.items()
        }
        self.cut.update(requests[place].task_name for place in places if len(prompts[place]) < len(whole[place]))
        places = sorted(places, key=lambda place: len(prompts[place]), reverse=True)  # neighbours pad each other
        for start in range(0, len(places), self._rows):
            part = places[start : start + self._rows]
            made = complete(self._decoder, self._tokenizer, [prompts[place] for place in part], options)
            for place, [completion] in zip(part, made, strict=True):
                texts[place] = completion.text
                self.cache_hook.add_partial("generate_until", requests[place].args, completion.text)
            bar.update(len(part))

    def _groups(self, requests: Sequence[Instance]) -> Iterator[tuple[SamplingOptions, list[int]]]:
        """(options, places of the requests) of all that can share a batch. A repeated request draws anew."""
        repeats: collections.Counter = collections.Counter()
        groups: dict[SamplingOptions, list[int]] = {}
        for place, request in enumerate(requests):
            context, rules = request.args
            key = (context, json.dumps(rules, sort_keys=True))
            groups.setdefault(self._options(rules, repeats[key], request.task_name), []).append(place)
            repeats[key] += 1
        return iter(groups.items())

    def _options(self, rules: Mapping, seed: int, task: str) -> SamplingOptions:
        default = min(NEW_TOKENS, self._config.model.n_positions // 2)
        asked = normalize_gen_kwargs(dict(rules), default)
        unknown = sorted(set(asked) - {*SAMPLING, *IGNORED})
        if unknown:
            raise UserError(
                f"task {task}: generation_kwargs has {', '.join(unknown)}, which is not supported; there are "
                f"{', '.join(('until', 'max_gen_toks', 'do_sample', *SAMPLING))}"
            )
        # What a task does not say: the likeliest token, or if it asks to draw, one of all.
        plain = {"temperature": 1.0 if asked["do_sample"] else 0.0, "top_k": 0, "top_p": 1.0}
        end = self._tokenizer.end_of_turn
        return SamplingOptions(
            max_new_tokens=asked["max_gen_toks"],
            stop=tuple(stop for stop in asked["until"] if stop),
            stop_token_ids=() if end is None else (end,),
            seed=seed,
            **plain | {name: asked[name] for name in SAMPLING if name in asked},
        )


class _SpecialTokens:
    """Texts to tokens; the name of a special token in a text is the token, which a chat template relies on."""

    def __init__(self, tokenizer: Tokenizer):
        added = tokenizer.backend.get_added_tokens_decoder()
        self._ids = {token.content: number for number, token in added.items() if token.special}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._names = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        if self._names is None:
            return self._tokenizer.encode(text)
        pieces = self._names.split(text)  # texts at the even places, names at the odd ones
        found: list[int] = []
        for place, piece in enumerate(pieces):
            found += [self._ids[piece]] if place % 2 else self._tokenizer.encode(piece) if piece else []
        return found
