"""The routes: OpenAI's /v1, `/generate`, tokens, health, metrics, and the page.

Each route reads its body (bodies.py), says what the engine is to do (work.py), has it done (generation.py) and
answers in its shape (formats.py); what stands before all of them is in gate.py.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from jaxgpt import __version__
from jaxgpt.errors import UserError
from jaxgpt.serving import schemas
from jaxgpt.serving.generated_texts import Generation, retry_seconds
from jaxgpt.serving.http_errors import ApiError, bad_request, too_busy
from jaxgpt.serving.middleware import Gate, answer_error, body_of
from jaxgpt.serving.prometheus import Metrics
from jaxgpt.serving.requests import Work, chat_messages, chat_work, completion_work, generate_work
from jaxgpt.serving.responses import Chats, Completions, Generated
from jaxgpt.serving.served_model import Served
from jaxgpt.serving.sse import EventStream, events, while_connected
from jaxgpt.serving.web_page import read_page

OPENABLE = {"page": "/", "metrics": "/metrics", "models": "/v1/models"}
LONG_BODY = 8192  # bytes; tokenizing more takes milliseconds, in which the event loop would answer nobody


@dataclasses.dataclass(frozen=True)
class Options:
    """How the server treats its clients."""

    keys: Sequence[str] = ()
    """API keys; none: anyone may ask."""
    opened: Sequence[str] = ()
    """Of OPENABLE, what needs no key."""
    cors_origins: Sequence[str] = ()
    """Sites whose pages may ask from a browser."""
    request_seconds: float = 600.0
    """What an answer may take, its time in the queue included."""


class Routes:
    """The functions behind the paths."""

    def __init__(self, served: Served, options: Options, metrics: Metrics):
        self._served, self._options, self._metrics = served, options, metrics
        self._page, self._page_headers = read_page()
        self.under_way = 0
        """Requests that the engine works for, or that are still being sent."""

    async def completions(self, request: Request) -> Response:
        self._refuse_if_full()
        body = await self._read(request, schemas.CompletionBody)
        return await self._answer(request, completion_work, body, Completions)

    async def chats(self, request: Request) -> Response:
        self._refuse_if_full()
        body = await self._read(request, schemas.ChatBody)
        return await self._answer(request, chat_work, body, Chats)

    async def generate(self, request: Request) -> Response:
        self._refuse_if_full()
        body = await self._read(request, schemas.GenerateBody)
        shape = lambda served, work: Generated(served, work, body.prompt)
        return await self._answer(request, generate_work, body, shape)

    async def models(self) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [self._served.card()]})

    async def model(self, name: str) -> JSONResponse:
        self._served.check_name(name)
        return JSONResponse(self._served.card())

    async def tokenize(self, request: Request) -> JSONResponse:
        body = await self._read(request, schemas.TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give either prompt or messages", "prompt")

        def encode() -> list[int]:
            if body.messages is None:
                return self._served.tokenizer.encode(body.prompt)
            messages = chat_messages([message.plain for message in body.messages], self._served)
            return self._served.chat.encode(messages)

        tokens = await _off_the_loop(encode, request)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self._served.n_positions})

    async def detokenize(self, request: Request) -> JSONResponse:
        body = await self._read(request, schemas.DetokenizeBody)
        tokenizer = self._served.tokenizer
        unknown = next((token for token in body.tokens if token >= tokenizer.vocab_size), None)
        if unknown is not None:
            raise bad_request(f"token {unknown}, but the vocabulary is {tokenizer.vocab_size}", "tokens")
        return JSONResponse({"prompt": await _off_the_loop(lambda: tokenizer.decode(body.tokens), request)})

    async def tokenizer_info(self) -> JSONResponse:
        """What lm-evaluation-harness asks before it trusts /tokenize."""
        tokenizer = self._served.tokenizer
        end = tokenizer.decode([tokenizer.end_of_text])
        info = {"eos_token": end, "bos_token": end, "eos_token_id": tokenizer.end_of_text}
        return JSONResponse(info | {"vocab_size": tokenizer.vocab_size, "tokenizer_digest": tokenizer.digest})

    async def health(self) -> JSONResponse:
        return JSONResponse({"status": self._served.state}, 200 if self._served.is_healthy else 503)

    async def ready(self) -> JSONResponse:
        state = self._served.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def figures(self) -> Response:
        content, kind = self._metrics.text()
        return Response(content, media_type=kind)

    async def page(self) -> HTMLResponse:
        return HTMLResponse(self._page, headers=self._page_headers)

    def _refuse_if_full(self) -> None:
        """Before the body is read: under ten times the load that it can take, a server is busy with refusing."""
        engine = self._served.engine
        if engine is not None and engine.waiting >= engine.queue_size:
            raise too_busy(engine.waiting, retry_seconds(engine))

    async def _read(self, request: Request, kind: type):
        body = schemas.read_body(await body_of(request), kind)
        self._served.check_name(getattr(body, "model", None))
        return body

    async def _answer(self, request: Request, work_of: Callable, body, shape: Callable) -> Response:
        engine = self._served.ready_engine()
        work: Work = await _off_the_loop(lambda: work_of(body, self._served, engine), request)
        generation = Generation(work, self._served, engine, self._metrics, self._options.request_seconds)
        form = shape(self._served, work)
        self.under_way += 1
        if work.stream:
            return EventStream(events(generation, form), generation, self._left, self._ended)
        try:
            parts = await while_connected(request, generation.collect())
            return JSONResponse(form.whole(parts, generation.usage))
        except ClientDisconnect:
            self._left()
            raise
        finally:
            generation.cancel()
            self._ended()

    def _left(self) -> None:
        self._metrics.disconnects.inc()

    def _ended(self) -> None:
        self.under_way -= 1


async def _off_the_loop(function: Callable, request: Request):
    """What `function` gives; of a long body on a thread, for the loop has others to answer.

    Raises:
        ApiError: 400; the tokenizer cannot read the text.
    """
    try:
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) < LONG_BODY:
            return function()
        return await asyncio.to_thread(function)
    except UserError as error:
        raise bad_request(str(error), "prompt") from None


def build_app(served: Served, options: Options) -> tuple[FastAPI, Routes]:
    """The application, and its routes, which know how much is under way."""
    metrics = Metrics(served)
    routes = Routes(served, options, metrics)
    # No /docs: that page takes its program from another site. /openapi.json is there.
    app = FastAPI(title="jaxgpt", version=__version__, docs_url=None, redoc_url=None)
    _add_post(app, "/v1/completions", routes.completions, schemas.CompletionBody)
    _add_post(app, "/v1/chat/completions", routes.chats, schemas.ChatBody)
    _add_post(app, "/generate", routes.generate, schemas.GenerateBody)
    _add_post(app, "/tokenize", routes.tokenize, schemas.TokenizeBody)
    _add_post(app, "/detokenize", routes.detokenize, schemas.DetokenizeBody)
    app.add_api_route("/v1/models", routes.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", routes.model, methods=["GET"])
    app.add_api_route("/tokenizer_info", routes.tokenizer_info, methods=["GET"])
    app.add_api_route("/health", routes.health, methods=["GET"])
    app.add_api_route("/ready", routes.ready, methods=["GET"])
    app.add_api_route("/metrics", routes.figures, methods=["GET"], response_class=Response)
    app.add_api_route("/", routes.page, methods=["GET"], response_class=HTMLResponse)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(ClientDisconnect, _nobody_there)
    app.add_exception_handler(Exception, _our_mistake)
    opened = [OPENABLE[name] for name in options.opened]
    app.add_middleware(Gate, keys=options.keys, opened=opened, metrics=metrics, routes=[r.path for r in app.routes])
    if options.cors_origins:  # outside of the gate, so that a page can read why it was refused
        allowed = dict(allow_methods=["GET", "POST"], allow_headers=["Authorization", "Content-Type"])
        app.add_middleware(CORSMiddleware, allow_origins=list(options.cors_origins), **allowed)
    return app, routes


def _add_post(app: FastAPI, path: str, function: Callable, body: type) -> None:
    """A route that reads its own body: FastAPI's reader has no limits, and other errors."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, definitions)}}
    app.add_api_route(
        path, function, methods=["POST"], openapi_extra={"requestBody": {"required": True, "content": content}}
    )


def _inlined(schema, definitions: dict):
    """The schema with what it refers to in its place; nothing here refers to itself."""
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    return {name: _inlined(part, definitions) for name, part in schema.items()}


async def _refused(request: Request, error: ApiError) -> JSONResponse:
    return answer_error(error)


async def _not_found(request: Request, error: HTTPException) -> JSONResponse:
    there_is = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return answer_error(ApiError(error.status_code, there_is, headers=dict(error.headers or {})))


async def _nobody_there(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)


async def _our_mistake(request: Request, error: Exception) -> JSONResponse:
    return answer_error(ApiError(500, "the server made a mistake; its log says which"))
