"""The bodies of requests (their fields and values, and the fields of OpenAI's that are refused) and of errors.

One rule for the body and every object in it: null is the same as no field; what changes nothing about the answer is
ignored (`user`, a message's `name`, an unsupported field with its usual value); anything else is an error that names
the field by its path. Every list has a longest length, and reading one ends at its first error.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, Field, Tag
from pydantic_core import from_json

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_ALTERNATIVES = 20
MAX_SEED = 2**31 - 1
MAX_TOKENS = 65_536  # of one list of token ids
MAX_MESSAGES = 4096  # and parts of a message


def _one_of(expected: str, lists: tuple[str, str] = ("<list>", "<list>")) -> pydantic.Discriminator:
    """Makes errors be about the kind that was sent; `lists`: the tags of a list of numbers (or empty) and of others."""

    def kind(value: object) -> str | None:
        if isinstance(value, list):
            return lists[bool(value) and not isinstance(value[0], int)]
        return "<text>" if isinstance(value, str) else None

    return pydantic.Discriminator(kind, "wrong_kind", custom_error_message=f"Input should be {expected}")


Text = Annotated[str, Tag("<text>")]
StopText = Annotated[str, Field(min_length=1, max_length=256), Tag("<text>")]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<list>")]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[Token], Field(max_length=MAX_TOKENS, fail_fast=True), Tag("<ids>")]
OnePrompt = Annotated[Text | TokenIds, _one_of("a text or token ids", ("<ids>", "<ids>"))]
Prompts = Annotated[list[OnePrompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<list>")]
Prompt = Annotated[Text | TokenIds | Prompts, _one_of("a text, token ids, or a list of these", ("<ids>", "<list>"))]
# JSON has one kind of number: 16.0 is 16.
Whole = Annotated[int, pydantic.BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)]
NewTokens = Annotated[Whole, Field(ge=1, le=MAX_SEED)]


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


# Fields that others have and this server does not, with the values that change nothing. (`None` never does.)
_UNSUPPORTED: dict[str, tuple] = {
    **dict.fromkeys(["audio", "moderation", "prediction", "tool_call_id", "verbosity", "web_search_options"], ()),
    **dict.fromkeys(["best_of", "num_beams", "length_penalty", "typical_p"], (1,)),
    **dict.fromkeys(["presence_penalty", "frequency_penalty", "min_tokens", "no_repeat_ngram_size"], (0,)),
    **dict.fromkeys(["do_sample", "skip_special_tokens", "add_generation_prompt"], (True,)),
    **dict.fromkeys(["use_beam_search", "ignore_eos", "early_stopping", "continue_final_message"], (False,)),
    **dict.fromkeys(["tools", "functions", "tool_calls", "bad_words"], ([],)),
    **dict.fromkeys(["suffix", "refusal", "reasoning", "reasoning_content"], ("",)),
    **dict.fromkeys(["tool_choice", "function_call"], ("none", "auto")),
    **{"reasoning_effort": ("none",), "continuous_usage_stats": (False,), "logit_bias": ({},)},
    **{"response_format": ({"type": "text"},), "modalities": (["text"],)},
}
# These change nothing about the answer: labels of a request, and of a message or a part of one.
_IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls", "include_obfuscation"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prompt_cache_breakpoint", "cache_control"),
    *("name", "id", "annotations", "parsed", "provider_specific_fields"),
)


class _Body(BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def read(cls, fields: Any) -> Any:
        """The fields that count. Of those that are not known only the first is kept, to be refused."""
        if not isinstance(fields, dict):
            return fields
        kept = {name: value for name, value in fields.items() if not _changes_nothing(name, value)}
        for name in [name for name in kept if name not in cls.model_fields][1:]:
            del kept[name]
        if kept.get("role") == "assistant":  # a model may have said nothing
            kept.setdefault("content", "")
        return kept


class SamplingBody(_Body):
    """How tokens are chosen."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0: all tokens
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    stop: Annotated[StopText | StopTexts, _one_of("a text or a list of texts")] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=7)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**64)] | None = None  # its lowest 31 bits count


class StreamOptions(_Body):
    include_usage: bool | None = None


class StreamingBody(SamplingBody):
    model: str | None = None
    n: Annotated[Whole, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionBody(StreamingBody):
    """https://platform.openai.com/docs/api-reference/completions/create"""

    prompt: Prompt = Field(description="Text is only text; a token such as <|im_end|> has its id, from POST /tokenize.")
    max_tokens: Annotated[Whole, Field(ge=0, le=MAX_SEED)] | None = None
    echo: bool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True), Tag("<list>")]


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text | Parts, _one_of("a text or a list of parts")]

    @property
    def plain(self) -> dict[str, str]:
        """The message for the chat template."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatBody(StreamingBody):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    messages: Messages
    max_tokens: NewTokens | None = None
    max_completion_tokens: NewTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None


class GenerateBody(SamplingBody):
    """A prompt to continue, in the words of Hugging Face's `generate`."""

    prompt: str
    max_length: NewTokens | None = None
    """Tokens of prompt and continuation together."""
    max_new_tokens: NewTokens | None = None
    num_return_sequences: Annotated[Whole, Field(ge=1, le=MAX_CHOICES)] = 1
    do_sample: bool | None = None  # false: the likeliest token each time, whatever the temperature
    return_full_text: bool | None = None  # false: without the prompt


class TokenizeBody(_Body):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """GPT-2's tokenizer adds none, so it changes nothing."""


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: TokenIds


Body = TypeVar("Body", bound=_Body)


def read_body(content: bytes | bytearray, kind: type[Body]) -> Body:
    """The body of a request as one of the classes above; ApiError 400 says what is wrong with it."""
    try:
        fields = from_json(content, allow_inf_nan=False, allow_partial=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
        raise bad_request(f"the body must be a JSON object, not {kinds.get(type(fields), 'a number')}")
    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _explained(error, kind) from None


def _changes_nothing(name: str, value: object) -> bool:
    same = lambda usual: value == usual and isinstance(value, bool) == isinstance(usual, bool)
    return value is None or name in _IGNORED or any(map(same, _UNSUPPORTED.get(name, ())))


def _explained(error: pydantic.ValidationError, kind: type[_Body]) -> ApiError:
    # An unknown name may be why another one is missing.
    rank = {"extra_forbidden": 1, "missing": 2}
    found = error.errors(include_url=False, include_input=False, include_context=False)
    first = min(found, key=lambda one: rank.get(one["type"], 0))
    where = [part for part in first["loc"] if part not in ("<text>", "<ids>", "<list>")]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:100]}" for part in where).removeprefix(".")
    if first["type"] != "extra_forbidden":
        message = re.sub(" after validation| or instance of Message", "", first["msg"]).replace("dictionary", "object")
        return bad_request(f"{path}: {message}"[:600], path or None, "invalid_value")
    if where[-1] in _UNSUPPORTED:
        return bad_request(f"{path} is not supported by this server; leave it out", path, "unsupported")
    known = f"; known: {', '.join(kind.model_fields)}" if len(where) == 1 else ""
    return bad_request(f"there is no field {path}{known}"[:600], path, "unknown_field")
