"""From the body of a request to what the engine is asked: token ids, sampling rules, and how many texts of each.

Every limit is checked here, before anything waits in the queue: nothing is cut silently.
"""

import dataclasses
import secrets
from collections.abc import Sequence

from jaxgpt.errors import UserError
from jaxgpt.inference.engine import Engine, Request
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.serving.http_errors import ApiError, bad_request
from jaxgpt.serving.schemas import MAX_SEED, ChatBody, CompletionBody, GenerateBody, Sampling
from jaxgpt.serving.served_model import Served

DEFAULT_NEW_TOKENS = 16  # of /v1/completions, as OpenAI's
# What the two kinds of client expect where they say nothing: OpenAI's, and `jaxgpt sample`'s.
OPENAI_RULES = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
GENERATE_RULES = dict(temperature=0.8, top_k=50, top_p=0.95, min_p=0.0, repetition_penalty=1.0)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one HTTP request wants of the engine."""

    requests: list[Request]
    """Prompt by prompt, the continuations of one side by side."""
    prompt_tokens: int
    """Over all prompts, each counted once."""
    stop: tuple[str, ...]
    tells_logprobs: bool = False
    echo: bool = False
    stream: bool = False
    include_usage: bool = False


def completion_work(body: CompletionBody, served: Served, engine: Engine) -> Work:
    """
    Raises:
        ApiError: 400; the prompt does not fit the context, or too many texts are asked for.
    """
    prompts = _prompts(body.prompt, served)
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens = 0 makes no text; it is for scoring a prompt, with echo", "max_tokens")
    n = body.n or 1
    _check_count(len(prompts) * n, engine, "n" if n > 1 else "prompt")
    asked = DEFAULT_NEW_TOKENS if body.max_tokens is None else body.max_tokens
    requests = []
    for prompt in prompts:
        room = served.n_positions - max(len(prompt), 1)
        new = min(asked, max(room, 1)) if body.max_tokens is None else asked
        requests += [
            Request(
                prompt,
                _options(body, OPENAI_RULES, max(new, 1)),
                row,
                alternatives=body.logprobs or 0,
                scores_prompt=bool(body.echo) and (body.logprobs is not None or new == 0),
                continues=new > 0,
            )
            for row in range(n)
        ]
    return Work(
        _checked(requests, engine, "max_tokens"),
        sum(map(len, prompts)),
        _stop(body),
        tells_logprobs=body.logprobs is not None,
        echo=bool(body.echo),
        **_streaming(body),
    )


def chat_work(body: ChatBody, served: Served, engine: Engine) -> Work:
    """
    Raises:
        ApiError: 400; there is no chat template, the conversation does not fit, or it does not end in a user's turn.
    """
    messages = chat_messages([message.plain for message in body.messages], served)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs = true", "top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise bad_request("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    prompt = served.chat.encode(messages)
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    new = max(served.n_positions - len(prompt), 1) if asked is None else asked
    n = body.n or 1
    _check_count(n, engine, "n")
    options = _options(body, OPENAI_RULES, new)
    options = dataclasses.replace(options, stop_token_ids=(*options.stop_token_ids, served.chat.end_of_turn))
    requests = [Request(prompt, options, row, alternatives=body.top_logprobs or 0) for row in range(n)]
    return Work(
        _checked(requests, engine, "messages"),
        len(prompt),
        _stop(body),
        tells_logprobs=bool(body.logprobs),
        **_streaming(body),
    )


def chat_messages(messages: Sequence[dict[str, str]], served: Served) -> list[dict[str, str]]:
    """The messages with the server's system message where they have none.

    Raises:
        ApiError: 400; the model has no chat template, or the last message is not the user's.
    """
    if served.chat is None:
        raise bad_request(served.no_chat, "messages", "no_chat_template")
    if messages[-1]["role"] != "user":
        raise bad_request("the last message must be the user's: the model writes what comes after it", "messages")
    has_system = any(message["role"] == "system" for message in messages)
    head = [{"role": "system", "content": served.system}] if served.system.strip() and not has_system else []
    return [*head, *messages]


def generate_work(body: GenerateBody, served: Served, engine: Engine) -> Work:
    """
    Raises:
        ApiError: 400; both limits are given, or the text does not fit.
    """
    prompt = served.tokenizer.encode(body.prompt)
    if body.max_length is not None and body.max_new_tokens is not None:
        raise bad_request("max_length counts the prompt's tokens, max_new_tokens does not; give one", "max_length")
    new = 100 if body.max_new_tokens is None else body.max_new_tokens
    if body.max_length is not None:
        new = body.max_length - max(len(prompt), 1)
        if new < 1:
            message = f"max_length = {body.max_length}, but the prompt is {len(prompt)} tokens already"
            raise bad_request(message, "max_length")
    elif body.max_new_tokens is None:
        new = max(min(new, served.n_positions - max(len(prompt), 1)), 1)
    n = body.num_return_sequences
    _check_count(n, engine, "num_return_sequences")
    requests = [Request(prompt, _options(body, GENERATE_RULES, new), row) for row in range(n)]
    return Work(_checked(requests, engine, "max_new_tokens"), len(prompt), _stop(body))


def _prompts(prompt: str | list, served: Served) -> list[list[int]]:
    if isinstance(prompt, str):
        return [served.tokenizer.encode(prompt)]
    if not prompt or isinstance(prompt[0], int):  # [] is one prompt without tokens
        return [prompt]
    return [served.tokenizer.encode(one) if isinstance(one, str) else one for one in prompt]


def _options(body: Sampling, defaults: dict, new_tokens: int) -> SamplingOptions:
    rules = {name: value if (value := getattr(body, name)) is not None else usual for name, usual in defaults.items()}
    seed = secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed
    return SamplingOptions(
        max_new_tokens=new_tokens, stop_token_ids=tuple(body.stop_token_ids or ()), seed=seed, **rules
    )


def _stop(body: Sampling) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _streaming(body: CompletionBody | ChatBody) -> dict[str, bool]:
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream = true", "stream_options")
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return {"stream": bool(body.stream), "include_usage": wants_usage}


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
