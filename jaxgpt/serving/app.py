"""The routes: OpenAI's /v1, `/generate`, tokens, health, metrics, and the page.

Each route reads its body (schemas.py), turns it into engine requests (requests.py), has the engine make the texts
(generated_texts.py) and answers (responses.py), at once or as server-sent events; every request passes middleware.py
first. An answer whose client has left is cancelled.
"""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxgpt import __version__
from jaxgpt.inference.engine import Engine
from jaxgpt.serving import requests, schemas
from jaxgpt.serving.generated_texts import Generation, retry_seconds
from jaxgpt.serving.middleware import Bodies, RequestMiddleware, ServerMetrics, answer_error
from jaxgpt.serving.responses import Chats, Completions, Generated
from jaxgpt.serving.schemas import ApiError, bad_request, too_busy
from jaxgpt.serving.served_model import ServedModel

T = TypeVar("T")
OPENABLE = {"page": "/", "metrics": "/metrics", "models": "/v1/models"}
LONG_BODY = 8192  # bytes; to read more, and tokenize it, takes milliseconds: too long for the event loop
PING_SECONDS = 15.0  # proxies cut a silent connection; most wait for 60 s
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx hands on each event at once
]


@dataclasses.dataclass(frozen=True)
class Options:
    """How the server treats its clients."""

    keys: Sequence[str] = ()
    """API keys; without any, anyone may ask."""
    opened: Sequence[str] = ()
    """Names in OPENABLE that need no key."""
    cors_origins: Sequence[str] = ()
    """Sites whose pages may ask from a browser."""
    request_seconds: float = 600.0
    """Time limit of an answer, its time in the queue included."""


class Routes:
    def __init__(self, model: ServedModel, options: Options, metrics: ServerMetrics):
        self._model, self._options, self._metrics = model, options, metrics
        self._page, self._page_headers = _read_page()
        self._bodies, self._one_long_body = Bodies(), asyncio.Semaphore()
        self.under_way = 0
        """Requests that the engine works on, or whose answers are still being sent."""

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, schemas.CompletionBody, requests.completion_request, Completions)

    async def chats(self, request: Request) -> Response:
        return await self._answer(request, schemas.ChatBody, requests.chat_request, Chats)

    async def generate(self, request: Request) -> Response:
        return await self._answer(request, schemas.GenerateBody, requests.generate_request, Generated)

    async def models(self) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [self._model.card()]})

    async def model(self, name: str) -> JSONResponse:
        self._model.check_name(name)
        return JSONResponse(self._model.card())

    async def tokenize(self, request: Request) -> Response:
        def answer(body: schemas.TokenizeBody) -> Response:
            if (body.prompt is None) == (body.messages is None):
                raise bad_request("give either prompt or messages", "prompt")
            chat = body.messages and requests.chat_tokens(body.messages, self._model)
            tokens = chat or requests.tokens_of(body.prompt or "", self._model, "prompt")
            return _json({"tokens": tokens, "count": len(tokens), "max_model_len": self._model.n_positions})

        return await self._of_body(request, schemas.TokenizeBody, answer)

    async def detokenize(self, request: Request) -> Response:
        def answer(body: schemas.DetokenizeBody) -> Response:
            tokens = requests.tokens_of(body.tokens, self._model, "tokens")
            return _json({"prompt": self._model.tokenizer.decode(tokens)})

        return await self._of_body(request, schemas.DetokenizeBody, answer)

    async def tokenizer_info(self) -> JSONResponse:
        """The facts that lm-evaluation-harness reads before it uses /tokenize."""
        tokenizer = self._model.tokenizer
        end = tokenizer.decode([tokenizer.end_of_text])
        info = {"eos_token": end, "bos_token": end, "eos_token_id": tokenizer.end_of_text}
        return JSONResponse(info | {"vocab_size": tokenizer.vocab_size, "tokenizer_digest": tokenizer.digest})

    async def health(self) -> JSONResponse:
        return JSONResponse({"status": self._model.state}, 200 if self._model.is_healthy else 503)

    async def ready(self) -> JSONResponse:
        state = self._model.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def figures(self) -> Response:
        content, kind = self._metrics.text()
        return Response(content, media_type=kind)

    async def page(self) -> HTMLResponse:
        return HTMLResponse(self._page, headers=self._page_headers)

    async def _of_body(self, request: Request, kind: type[schemas.Body], function: Callable[[schemas.Body], T]) -> T:
        """`function` of the request's body. Long bodies are read on a thread, one at a time, while the loop answers."""

        def read() -> T:
            body = schemas.read_body(content, kind)
            self._model.check_name(getattr(body, "model", None))
            return function(body)

        content = bytearray()
        try:
            await self._bodies.read(request, content)
            if len(content) < LONG_BODY:
                return read()
            async with self._one_long_body:
                return await asyncio.to_thread(read)
        finally:
            self._bodies.held -= len(content)

    async def _answer(
        self,
        request: Request,
        kind: type[schemas.Body],
        ask: Callable[[schemas.Body, ServedModel, Engine], requests.GenerationRequest],
        shape: Callable[[ServedModel, requests.GenerationRequest], Completions | Chats | Generated],
    ) -> Response:
        engine = self._model.ready_engine()
        if engine.waiting >= engine.queue_size:  # reading bodies would keep an overloaded server busy
            raise too_busy(engine.waiting, retry_seconds(engine))
        asked = await self._of_body(request, kind, lambda body: ask(body, self._model, engine))
        generation = Generation(asked, self._model, engine, self._metrics, self._options.request_seconds)
        response = shape(self._model, asked)
        counted = contextlib.ExitStack()
        counted.enter_context(self._counted(generation))
        if not isinstance(response, Generated) and asked.stream:
            return _EventStream(_events(generation, response), counted)
        with counted:
            parts = await _while_connected(request.receive, generation.collect())
            whole = lambda: _json(response.whole(parts, generation.usage))
            return await asyncio.to_thread(whole) if asked.wants_logprobs else whole()

    @contextlib.contextmanager
    def _counted(self, generation: Generation) -> Iterator[None]:
        """Count an answer as under way, and a client that leaves before its end; then free the slots."""
        self.under_way += 1
        try:
            yield
        except ClientDisconnect:
            self._metrics.disconnects.inc()
            raise
        finally:
            generation.cancel()
            self.under_way -= 1


def _json(content: object) -> Response:
    return Response(to_json(content), media_type="application/json")


def build_app(model: ServedModel, options: Options) -> tuple[FastAPI, Routes]:
    """The application, and its routes, which count the requests under way."""
    metrics = ServerMetrics(model)
    routes = Routes(model, options, metrics)
    # No /docs: that page loads its program from another site. /openapi.json is there.
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
    for kind in (ApiError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_exception)
    app.add_middleware(
        RequestMiddleware,
        keys=options.keys,
        opened=[OPENABLE[name] for name in options.opened],
        metrics=metrics,
        routes=[route.path for route in app.routes if isinstance(route, Route)],
        origins=options.cors_origins,
    )
    if options.cors_origins:  # outside of the keys' check, so that a page can read why it was refused
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client sends a dozen of its own
            expose_headers=["Retry-After", "x-should-retry"],
        )
    return app, routes


def _add_post(app: FastAPI, path: str, function: Callable, body: type[schemas.Body]) -> None:
    """Add a route that reads its own body: FastAPI's reader has no limits, and other errors."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, definitions)}}
    app.add_api_route(
        path, function, methods=["POST"], openapi_extra={"requestBody": {"required": True, "content": content}}
    )


def _inlined(schema: Any, definitions: dict[str, dict]) -> Any:
    """The JSON schema with every reference replaced by its definition; no definition refers to itself."""
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    return {name: _inlined(part, definitions) for name, part in schema.items()}


async def _answer_exception(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, HTTPException):  # no such route, or another method
        message = f"{request.method} {request.url.path[:100]}: {error.detail}"
        error = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    elif not isinstance(error, ApiError):
        error = ApiError(500, "the server made a mistake; its log says which")
    return answer_error(error)


# ---------------------------------------------------------------- server-sent events


async def _events(generation: Generation, shape: Completions | Chats) -> AsyncGenerator[bytes]:
    """The events of an answer (https://html.spec.whatwg.org/multipage/server-sent-events.html); an error is one."""
    event = lambda content: b"data: " + to_json(content) + b"\n\n"
    try:
        async for part in generation.parts(PING_SECONDS):
            yield b": ping\n\n" if part is None else b"".join(map(event, shape.chunks(part)))
    except ApiError as error:
        yield event(error.body)
    else:
        usage = event(shape.last_chunk(generation.usage)) if generation.asked.include_usage else b""
        yield usage + b"data: [DONE]\n\n"


class _EventStream(Response):
    """A response that sends events until they end or the client leaves; then `counted` is left, too."""

    background = None

    def __init__(self, source: AsyncGenerator[bytes], counted: contextlib.AbstractContextManager[object]):
        self._source, self._counted = source, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect), self._counted:
            await _while_connected(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [*_STREAM_HEADERS]})
        async with contextlib.aclosing(self._source):
            async for content in self._source:
                await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _while_connected(receive: Receive, answer: Coroutine[Any, Any, T]) -> T:
    """The result of `answer`; if the client leaves, that is cancelled, and ClientDisconnect raised."""
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_wait_until_gone(receive))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        raise ClientDisconnect
    finally:
        answering.cancel()
        leaving.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# ---------------------------------------------------------------- the page


def _read_page() -> tuple[str, dict[str, str]]:
    """(the page, its headers). The headers allow a browser to run the page's own program and nothing else."""
    text = resources.files("jaxgpt.serving").joinpath("page.html").read_text(encoding="utf-8")
    fetched = "default-src 'none'; connect-src 'self'; img-src 'self' data:"
    own = f"script-src {_hash_of('script', text)}; style-src {_hash_of('style', text)}"
    policy = f"{fetched}; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return text, headers


def _hash_of(tag: str, text: str) -> str:
    """The hash that allows the page's one <script> or <style> (Content Security Policy Level 3, 8.4)."""
    [content] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
