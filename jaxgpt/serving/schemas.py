"""The bodies of requests (their fields and values, and the fields of OpenAI's that are refused) and of errors.

A field that is not supported and would change the answer is an error that names it. Fields that change nothing here
(`user`, `metadata`, ...) are ignored, and so is an unsupported field with its default value.
"""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import from_json

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_ALTERNATIVES = 20
MAX_SEED = 2**31 - 1

StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = list[Token]


# ---------------------------------------------------------------- errors


class ApiError(Exception):
    """A request that is refused or fails: an HTTP status, and a body in OpenAI's form.

    https://platform.openai.com/docs/guides/error-codes
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict:
        kind = _ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


def too_busy(waiting: int, seconds: int) -> ApiError:
    message = f"{waiting} requests are waiting, which is as many as may; try again in {seconds} s"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})


def not_ready(state: str) -> ApiError:
    """`state`: "loading", "stopping" or "failed"."""
    message = {
        "loading": "the model is being loaded; try again soon",
        "stopping": "the server is stopping; ask another one",
        "failed": "the server has failed and is about to end",
    }[state]
    return ApiError(503, message, code=state, headers={"Retry-After": "2"})


def too_slow(seconds: float) -> ApiError:
    # Without this header OpenAI's clients would try twice more, and wait as long each time.
    headers = {"x-should-retry": "false"}
    return ApiError(504, f"the answer was not ready after {seconds:g} s", code="deadline", headers=headers)


# ---------------------------------------------------------------- bodies of requests


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SamplingBody(_Body):
    """How tokens are chosen. `null` is the same as leaving a field out."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=7)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None


class StreamOptions(_Body):
    include_usage: bool | None = None


class StreamingBody(SamplingBody):
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionBody(StreamingBody):
    """https://platform.openai.com/docs/api-reference/completions/create"""

    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def plain(self) -> dict[str, str]:
        """The message for the chat template."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(StreamingBody):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None


class GenerateBody(SamplingBody):
    """A prompt to continue, in the words of Hugging Face's `generate`."""

    prompt: str
    max_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens of prompt and continuation together."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    num_return_sequences: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1


class TokenizeBody(_Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """GPT-2's tokenizer adds none, so it changes nothing."""


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: TokenIds


# OpenAI's fields that are not supported, with the values that change nothing. (`None` never does.)
_UNSUPPORTED: dict[str, tuple] = {
    "best_of": (1,),
    "suffix": ("",),
    **dict.fromkeys(["presence_penalty", "frequency_penalty"], (0,)),
    "logit_bias": ({},),
    **dict.fromkeys(["tools", "functions"], ([],)),
    **dict.fromkeys(["tool_choice", "function_call"], ("none", "auto")),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    **dict.fromkeys(["audio", "prediction", "reasoning_effort", "verbosity", "web_search_options", "do_sample"], ()),
    "use_beam_search": (False,),
}
# These change nothing about the answer.
_IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)

Body = TypeVar("Body", bound=_Body)


def read_body(content: bytes, kind: type[Body]) -> Body:
    """The body of a request as one of the classes above; ApiError 400 says what is wrong with it."""
    try:
        fields = from_json(content, allow_inf_nan=False, allow_partial=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
        raise bad_request(f"the body must be a JSON object, not {kinds.get(type(fields), 'a number')}")
    for name in set(_UNSUPPORTED) & set(fields):
        if not _changes_nothing(name, fields.pop(name)):
            raise bad_request(f"{name} is not supported by this server; leave it out", name, "unsupported")
    fields = {name: value for name, value in fields.items() if name not in _IGNORED}
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explained(error, kind) from None


def _changes_nothing(name: str, value: object) -> bool:
    same = lambda usual: value == usual and isinstance(value, bool) == isinstance(usual, bool)
    return value is None or any(map(same, _UNSUPPORTED[name]))


def _explained(error: ValidationError, kind: type[_Body]) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0])[:100] if first["loc"] else None
    if first["type"] == "extra_forbidden":
        where = ".".join(map(str, first["loc"]))
        known = ", ".join(kind.model_fields)
        return bad_request(f"there is no field {where}; known: {known}"[:600], name, "unknown_field")
    return bad_request(f"{name}: {first['msg']}"[:600], name, "invalid_value")
