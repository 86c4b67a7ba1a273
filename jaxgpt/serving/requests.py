"""From the body of a request to engine requests: token ids, sampling options, and the number of texts of each.

Every limit is checked here, before anything waits in the queue: nothing is cut silently. What is over a limit is an
ApiError 400.
"""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

from jaxgpt.data.chat import with_system
from jaxgpt.errors import UserError
from jaxgpt.inference.engine import Engine, Request
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.serving import schemas
from jaxgpt.serving.schemas import ApiError, bad_request
from jaxgpt.serving.served_model import ServedModel

DEFAULT_NEW_TOKENS = 16  # as OpenAI's /v1/completions
# The defaults that the two kinds of client expect: OpenAI's, and those of `jaxgpt sample`.
OPENAI_RULES = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
GENERATE_RULES = dict(temperature=0.8, top_k=50, top_p=0.95, min_p=0.0, repetition_penalty=1.0)


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One HTTP request, as requests to the engine."""

    requests: list[Request]
    """Prompt by prompt, the continuations of one side by side."""
    prompt_tokens: int
    """Over all prompts, each counted once."""
    stop: tuple[str, ...]
    wants_logprobs: bool = False
    echo: bool = False
    stream: bool = False
    include_usage: bool = False


def completion_request(body: schemas.CompletionBody, model: ServedModel, engine: Engine) -> GenerationRequest:
    """The engine requests of a body of /v1/completions."""
    prompts = _prompts(body.prompt, model)
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens = 0 makes no text; it is for scoring a prompt, with echo", "max_tokens")
    n, has_logprobs = body.n or 1, body.logprobs is not None
    _check_count(len(prompts) * n, engine, "n" if n > 1 else "prompt")
    requests = []
    for prompt in prompts:
        new = min(DEFAULT_NEW_TOKENS, _room(model, prompt)) if body.max_tokens is None else body.max_tokens
        requests += [
            Request(
                prompt,
                _options(body, OPENAI_RULES, max(new, 1)),
                row,
                alternatives=body.logprobs or 0,
                scores_prompt=bool(body.echo) and (has_logprobs or new == 0),
                continues=new > 0,
            )
            for row in range(n)
        ]
    checked, count = _checked(requests, engine, "max_tokens"), sum(map(len, prompts))
    return GenerationRequest(checked, count, _stop(body), has_logprobs, bool(body.echo), **_streaming(body))


def chat_request(body: schemas.ChatBody, model: ServedModel, engine: Engine) -> GenerationRequest:
    """The engine requests of a body of /v1/chat/completions."""
    prompt = chat_tokens(body.messages, model)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs = true", "top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise bad_request("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    new = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    n = body.n or 1
    _check_count(n, engine, "n")
    options = _options(body, OPENAI_RULES, _room(model, prompt) if new is None else new)
    end_of_turn = model.chat_prompts().end_of_turn
    options = dataclasses.replace(options, stop_token_ids=(*options.stop_token_ids, end_of_turn))
    requests = [Request(prompt, options, row, alternatives=body.top_logprobs or 0) for row in range(n)]
    checked = _checked(requests, engine, "messages")
    return GenerationRequest(checked, len(prompt), _stop(body), bool(body.logprobs), **_streaming(body))


def chat_tokens(messages: Sequence[schemas.Message], model: ServedModel) -> list[int]:
    """The prompt of a conversation, with the server's system message if it has none."""
    prompts = model.chat_prompts()
    if messages[-1].role != "user":
        raise bad_request("the last message must be the user's: the model writes what comes after it", "messages")
    try:
        return prompts.encode(with_system([message.plain for message in messages], model.system))
    except UserError as error:  # the model's own chat template refuses them
        raise bad_request(str(error), "messages") from None


def generate_request(body: schemas.GenerateBody, model: ServedModel, engine: Engine) -> GenerationRequest:
    """The engine requests of a body of /generate."""
    prompt = model.tokenizer.encode(body.prompt)
    if body.max_length is not None and body.max_new_tokens is not None:
        raise bad_request("max_length counts the prompt's tokens, max_new_tokens does not; give one", "max_length")
    new = min(100, _room(model, prompt)) if body.max_new_tokens is None else body.max_new_tokens
    if body.max_length is not None:
        new = body.max_length - max(len(prompt), 1)
        if new < 1:
            message = f"max_length = {body.max_length}, but the prompt is {len(prompt)} tokens already"
            raise bad_request(message, "max_length")
    n = body.num_return_sequences
    _check_count(n, engine, "num_return_sequences")
    requests = [Request(prompt, _options(body, GENERATE_RULES, new), row) for row in range(n)]
    return GenerationRequest(_checked(requests, engine, "max_new_tokens"), len(prompt), _stop(body))


def _prompts(prompt: str | list, model: ServedModel) -> list[list[int]]:
    several = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    return [model.tokenizer.encode(one) if isinstance(one, str) else one for one in several]  # [] is a prompt, too


def _room(model: ServedModel, prompt: list[int]) -> int:
    """The new tokens that fit after a prompt; at least one, for the engine to refuse a prompt that is too long."""
    return max(model.n_positions - max(len(prompt), 1), 1)


def _options(body: schemas.SamplingBody, defaults: dict[str, Any], new_tokens: int) -> SamplingOptions:
    rules = defaults | body.model_dump(include={*defaults}, exclude_none=True)
    seed = secrets.randbelow(schemas.MAX_SEED + 1) if body.seed is None else body.seed
    stop_token_ids = tuple(body.stop_token_ids or ())
    return SamplingOptions(max_new_tokens=new_tokens, stop_token_ids=stop_token_ids, seed=seed, **rules)


def _stop(body: schemas.SamplingBody) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _streaming(body: schemas.StreamingBody) -> dict[str, bool]:
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream = true", "stream_options")
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return {"stream": bool(body.stream), "include_usage": include_usage}


def _check_count(texts: int, engine: Engine, field: str) -> None:
    if texts > engine.queue_size:  # it could never come in
        message = f"{texts} texts in one request, but the queue holds {engine.queue_size}; ask for fewer at once"
        raise bad_request(message, field)


def _checked(requests: Sequence[Request], engine: Engine, field: str) -> list[Request]:
    try:
        return [engine.check(request) for request in requests]
    except UserError as error:
        too_long = "n_positions" in str(error)
        raise ApiError(400, str(error), field, "context_length_exceeded" if too_long else "invalid_value") from None
