"""From the body of a request to engine requests: token ids, sampling options, and the number of texts of each.

Every limit is checked here, before anything waits in the queue: nothing is cut silently. What is over a limit is an
ApiError 400 that names the field.
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

MAX_UNBROKEN = 1 << 17  # bytes of text that are encoded at once, as 300 MB are needed for 1 MiB: more only in lines
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
    text_before: str = ""  # what /generate puts before each text


def completion_request(body: schemas.CompletionBody, model: ServedModel, engine: Engine) -> GenerationRequest:
    """The engine requests of a body of /v1/completions."""
    prompts = _prompts(body.prompt, model)
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens = 0 makes no text; it is for scoring a prompt, with echo", "max_tokens")
    n, has_logprobs = body.n or 1, body.logprobs is not None
    _check_count(len(prompts) * n, engine, "n" if n > 1 else "prompt")
    requests = []
    for path, prompt in prompts.items():
        new = min(DEFAULT_NEW_TOKENS, _room(model, prompt)) if body.max_tokens is None else body.max_tokens
        request = Request(
            prompt,
            _options(body, OPENAI_RULES, max(new, 1), model),
            alternatives=body.logprobs or 0,
            scores_prompt=bool(body.echo) and (has_logprobs or new == 0),
            continues=new > 0,
        )
        requests += _checked(request, n, engine, model, path, "max_tokens")
    count = sum(map(len, prompts.values()))
    return GenerationRequest(requests, count, _stop(body), has_logprobs, bool(body.echo), **_streaming(body))


def chat_request(body: schemas.ChatBody, model: ServedModel, engine: Engine) -> GenerationRequest:
    """The engine requests of a body of /v1/chat/completions."""
    prompt = chat_tokens(body.messages, model)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs = true", "top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise bad_request("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    limit = "max_completion_tokens" if body.max_tokens is None else "max_tokens"
    new = getattr(body, limit)
    n = body.n or 1
    _check_count(n, engine, "n")
    options = _options(body, OPENAI_RULES, _room(model, prompt) if new is None else new, model)
    request = Request(prompt, options, alternatives=body.top_logprobs or 0)
    requests = _checked(request, n, engine, model, "messages", limit)
    return GenerationRequest(requests, len(prompt), _stop(body), bool(body.logprobs), **_streaming(body))


def chat_tokens(messages: Sequence[schemas.Message], model: ServedModel) -> list[int]:
    """The prompt of a conversation, with the server's system message if it has none."""
    prompts = model.chat_prompts()
    if messages[-1].role != "user":
        message = "the last message must be the user's: the model writes what comes after it"
        raise bad_request(message, f"messages[{len(messages) - 1}].role")
    plain = [message.plain for message in messages]
    if sum(len(turn["content"].encode()) for turn in plain) > MAX_UNBROKEN:
        raise _too_long("messages")
    try:
        return prompts.encode(with_system(plain, model.system))
    except UserError as error:  # the model's own chat template refuses them
        raise bad_request(str(error), "messages") from None


def generate_request(body: schemas.GenerateBody, model: ServedModel, engine: Engine) -> GenerationRequest:
    """The engine requests of a body of /generate."""
    prompt = tokens_of(body.prompt, model, "prompt")
    if body.max_length is not None and body.max_new_tokens is not None:
        raise bad_request("max_length counts the prompt's tokens, max_new_tokens does not; give one", "max_length")
    new = min(100, _room(model, prompt)) if body.max_new_tokens is None else body.max_new_tokens
    if body.max_length is not None:
        new = body.max_length - max(len(prompt), 1)
        if new < 1:
            message = f"max_length = {body.max_length}, but the prompt is {len(prompt)} tokens already"
            raise bad_request(message, "max_length")
    options = _options(body, GENERATE_RULES, new, model)
    if body.do_sample is False:
        options = dataclasses.replace(options, temperature=0.0)
    n = body.num_return_sequences
    _check_count(n, engine, "num_return_sequences")
    limit = "max_new_tokens" if body.max_length is None else "max_length"
    requests = _checked(Request(prompt, options), n, engine, model, "prompt", limit)
    text_before = "" if body.return_full_text is False else body.prompt
    return GenerationRequest(requests, len(prompt), _stop(body), text_before=text_before)


def tokens_of(given: str | list[int], model: ServedModel, path: str) -> list[int]:
    """The ids of a text, encoded in parts where it has line breaks, as memory grows with a part; or the given ids."""
    if isinstance(given, list):
        size = model.tokenizer.vocab_size
        for place, token in enumerate(given):
            if token >= size:
                raise bad_request(f"{path}[{place}]: token {token}, but the vocabulary is {size}", f"{path}[{place}]")
        return given
    tokens: list[int] = []
    for part in model.tokenizer.pieces(given, MAX_UNBROKEN // 2):
        if len(part.encode()) > MAX_UNBROKEN:
            raise _too_long(path)
        try:
            tokens += model.tokenizer.encode(part)
        except UserError as error:
            raise bad_request(f"{path}: {error}", path) from None
    return tokens


def _too_long(path: str) -> ApiError:
    message = f"{path}: more than {MAX_UNBROKEN:,} bytes in one piece (a conversation, or text without line breaks)"
    return bad_request(message, path, "too_long")


def _prompts(prompt: str | list, model: ServedModel) -> dict[str, list[int]]:
    """{where it stands in the body: token ids}"""
    is_one = isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)  # [] is a prompt, too
    several = {"prompt": prompt} if is_one else {f"prompt[{number}]": one for number, one in enumerate(prompt)}
    return {path: tokens_of(one, model, path) for path, one in several.items()}


def _room(model: ServedModel, prompt: list[int]) -> int:
    """The new tokens that fit after a prompt; at least one, for the engine to refuse a prompt that is too long."""
    return max(model.n_positions - max(len(prompt), 1), 1)


def _options(body: schemas.SamplingBody, defaults: dict[str, Any], new: int, model: ServedModel) -> SamplingOptions:
    """A chat model ends with its turn wherever it is asked."""
    rules = defaults | body.model_dump(include={*defaults}, exclude_none=True)
    rules["top_k"] = max(rules["top_k"], 0)
    seed = secrets.randbits(31) if body.seed is None else body.seed & schemas.MAX_SEED
    end_of_turn = model.tokenizer.end_of_turn
    stop_token_ids = (*(body.stop_token_ids or ()), *(() if end_of_turn is None else (end_of_turn,)))
    return SamplingOptions(max_new_tokens=new, stop_token_ids=stop_token_ids, seed=seed, **rules)


def _stop(body: schemas.SamplingBody) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _streaming(body: schemas.StreamingBody) -> dict[str, Any]:
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return {"stream": bool(body.stream), "include_usage": include_usage}


def _check_count(texts: int, engine: Engine, field: str) -> None:
    if texts > engine.queue_size:  # it could never come in
        message = f"{texts} texts in one request, but the queue holds {engine.queue_size}; ask for fewer at once"
        raise bad_request(message, field)


def _checked(request: Request, n: int, engine: Engine, model: ServedModel, path: str, limit: str) -> list[Request]:
    """`n` continuations; the prompt of `path` is to blame if it does not fit alone, else the field `limit`."""
    try:
        checked = engine.check(request)
    except UserError as error:
        fits_alone = len(request.prompt) + request.continues <= model.n_positions
        code = "context_length_exceeded" if "n_positions" in str(error) else "invalid_value"
        raise bad_request(str(error), limit if fits_alone else path, code) from None
    return [dataclasses.replace(checked, row=row) for row in range(n)]
