"""The bodies of requests: which fields there are, which values they take, and which fields of OpenAI's we refuse.

A field that would change the answer and that we do not have is an error that names it. Fields that change nothing
here (`user`, `metadata`, ...) are left out, and so is a field we do not have with the value that it has by default.
"""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import from_json

from jaxgpt.serving.http_errors import ApiError, bad_request

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_ALTERNATIVES = 20
MAX_SEED = 2**31 - 1

StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = list[Token]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Sampling(_Body):
    """How tokens are chosen. `null` is the same as to leave a field out."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[Tokens, Field(max_length=7)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None


class StreamOptions(_Body):
    include_usage: bool | None = None


class Streaming(Sampling):
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionBody(Streaming):
    """https://platform.openai.com/docs/api-reference/completions/create"""

    prompt: str | Tokens | Annotated[list[str | Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
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
        """The message as the template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(Streaming):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None


class GenerateBody(Sampling):
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
    tokens: Tokens


# What OpenAI has and we do not, with the values that change nothing. (`None` never does.)
_UNSUPPORTED: dict[str, tuple] = {
    "best_of": (1,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "do_sample": (),
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
    """The body of a request as one of the classes above.

    Raises:
        ApiError: 400; it is not JSON, or a field is unknown, unsupported or has a wrong value.
    """
    try:
        fields = from_json(content, allow_inf_nan=False, allow_partial=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise bad_request(f"the body must be a JSON object, not {_json_type(fields)}")
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


def _json_type(value: object) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
