"""Samples of a model while it is trained: a text that it continues, or its answers to validation conversations.

Both are functions of the parameters that return metrics: "sample", a text to look at, and for a chat model "sample_2"
and so on, more of them, and "eval_stop_rate", the share of answers that end by themselves.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jaxgpt.config import Config
from jaxgpt.data.dataset import PackedRows, TokenDataset
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.inference.decoder import build_decoder, generate
from jaxgpt.inference.sampling import SamplingOptions

SAMPLES = ("sample", "sample_2", "sample_3", "sample_4")
Sampler = Callable[[dict], dict[str, str | float]]  # parameters -> metrics


def sampler(config: Config, dataset: TokenDataset) -> Sampler | None:
    """A sampler that fits the data: a continuation for text, answers for conversations; None where samples are off.

    Raises:
        UserError: eval.sample_prompt leaves no room for a new token.
    """
    if not config.eval.sample_tokens:
        return None
    if not isinstance(dataset.validation, PackedRows):
        return continuing(config, dataset.vocab_size, dataset.tokenizer)
    if not config.eval.chat_prompts:
        return None
    return answering(config, dataset.vocab_size, dataset.tokenizer, dataset.validation)


def continuing(config: Config, vocab_size: int, tokenizer: Tokenizer) -> Sampler:
    """A sampler that continues eval.sample_prompt."""
    prompt = tokenizer.encode(config.eval.sample_prompt)
    room = config.model.n_positions - max(len(prompt), 1)
    if room < 1:
        raise UserError(
            f"eval.sample_prompt has {len(prompt)} tokens, which leaves no room in model.n_positions = "
            f"{config.model.n_positions}; shorten it, or set eval.sample_tokens = 0"
        )
    options = SamplingOptions(
        max_new_tokens=min(config.eval.sample_tokens, room), temperature=0.8, top_k=50, seed=config.train.seed
    )

    def sample(params: dict) -> dict[str, str | float]:
        decoder = build_decoder(config.model, vocab_size, params, tokenizer.end_of_text, ends=tokenizer.ends)
        [[continuation]] = generate(decoder, [prompt], options)
        return {"sample": config.eval.sample_prompt + tokenizer.decode(continuation.tokens)}

    return sample


def answering(config: Config, vocab_size: int, tokenizer: Tokenizer, validation: PackedRows) -> Sampler | None:
    """A sampler that answers validation conversations by the likeliest tokens; None where none leaves room for it."""
    new = min(config.eval.sample_tokens, config.model.n_positions // 2)
    asked = asked_in(validation, config.eval.chat_prompts, config.model.n_positions - new)
    prompts = [tokens[:length] for tokens, length in asked]
    if not prompts:
        return None
    ends = () if tokenizer.end_of_turn is None else (tokenizer.end_of_turn,)
    options = SamplingOptions(max_new_tokens=new, temperature=0.0, stop_token_ids=ends)

    def sample(params: dict) -> dict[str, str | float]:
        # Without an end-of-text token, since that is not how an answer ends.
        decoder = build_decoder(config.model, vocab_size, params, None, rows=len(prompts))
        answers = [answer for [answer] in generate(decoder, prompts, options)]
        stopped = sum(answer.finish_reason == "stop" for answer in answers)
        shown = zip(SAMPLES, prompts, answers)  # the first few
        texts = {name: tokenizer.decode([*prompt, *answer.tokens]) for name, prompt, answer in shown}
        return {"eval_stop_rate": stopped / len(answers), **texts}

    return sample


def asked_in(rows: PackedRows, count: int, longest: int) -> list[tuple[list[int], int]]:
    """(tokens, how many of them are the prompt) of up to `count` conversations, taken evenly from the rows.

    The prompt is all that comes before an answer: the last one whose prompt has at most `longest` tokens. Texts among
    the conversations have none.
    """
    steps = max(min(count, rows.num_rows), 1)
    borders = [step * rows.num_rows // steps for step in range(steps + 1)]
    waiting = [_asked(rows, range(*stretch), longest) for stretch in itertools.pairwise(borders)]
    found: list[tuple[list[int], int]] = []
    while waiting and len(found) < count:  # one of each stretch, then another one of each
        for stretch in list(waiting):
            one = next(stretch, None)
            if one is None:
                waiting.remove(stretch)
            elif len(found) < count:
                found.append(one)
    return found


def _asked(rows: PackedRows, numbers: Iterable[int], longest: int) -> Iterator[tuple[list[int], int]]:
    """Each conversation of the rows that has a prompt. A text has none: no token comes before what is learned."""
    for number in numbers:
        for _, tokens, supervised in rows.row(number).conversations():
            starts = 1 + np.flatnonzero(supervised[1:] & ~supervised[:-1])
            starts = starts[starts <= longest]
            if len(starts):
                yield tokens.tolist(), int(starts[-1])
