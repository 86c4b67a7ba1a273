"""Every limit at the limit and one beyond it, with its status and the field it names; who may ask; wrong commands."""

import asyncio
import dataclasses
import gc
import json
import os
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import serving
from processes import wait_for

from jaxgpt import serve
from jaxgpt.inference.engine import Engine
from jaxgpt.inference.slots import STOPS
from jaxgpt.serving import schemas
from jaxgpt.serving import server as life
from jaxgpt.serving.app import OPENABLE, Options
from jaxgpt.serving.middleware import ALWAYS_OPEN, KEYS, MAX_BODY_BYTES, read_keys

pytest_plugins = ["serving"]

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
BASIC = {
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 1},
    CHATS: {"messages": [USER], "max_tokens": 1},
    "/generate": {"prompt": "Hi", "max_new_tokens": 1},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}
LONGEST = serving.MODEL.n_positions


def check(server, path: str, fields: dict, status: int, param: str | None = None) -> None:
    answer = server.post_json(path, BASIC[path] | fields)
    assert answer.status == status, (fields, answer.body)
    if status != 200:
        assert answer.error["param"] == param, (fields, answer.error)


# ---------------------------------------------------------------- numbers and lengths


@pytest.mark.parametrize(
    "path, field, good, bad",
    [
        (COMPLETIONS, "prompt", [1] * (LONGEST - 1), None),
        (COMPLETIONS, "prompt", ["a"] * schemas.MAX_PROMPTS, ["a"] * (schemas.MAX_PROMPTS + 1)),
        (COMPLETIONS, "prompt", "", [[], {}]),
        (COMPLETIONS, "prompt", [], None),
        (COMPLETIONS, "prompt", [[1], [2]], [[1], "a", [True]]),
        (COMPLETIONS, "prompt", [301], [-1]),
        (COMPLETIONS, "n", schemas.MAX_CHOICES, schemas.MAX_CHOICES + 1),
        (COMPLETIONS, "n", 1, 0),
        (COMPLETIONS, "stop", ["a"] * schemas.MAX_STOPS, ["a"] * (schemas.MAX_STOPS + 1)),
        (COMPLETIONS, "stop", "中" * 256, "中" * 257),
        (COMPLETIONS, "stop", ["b" * 256], ["b" * 257]),
        (COMPLETIONS, "stop", [], ""),
        (COMPLETIONS, "stop_token_ids", [1] * (STOPS - 1), [1] * STOPS),
        (COMPLETIONS, "logprobs", schemas.MAX_ALTERNATIVES, schemas.MAX_ALTERNATIVES + 1),
        (COMPLETIONS, "logprobs", 0, -1),
        (COMPLETIONS, "logprobs", None, True),
        (COMPLETIONS, "seed", schemas.MAX_SEED, schemas.MAX_SEED + 1),
        (COMPLETIONS, "seed", 0, -1),
        (COMPLETIONS, "temperature", 0, -0.001),
        (COMPLETIONS, "temperature", 1e300, "1"),
        (COMPLETIONS, "top_p", 1, 1.001),
        (COMPLETIONS, "top_p", 1e-9, 0),
        (COMPLETIONS, "min_p", 1, 1.001),
        (COMPLETIONS, "top_k", 2**31 - 1, 2**31),
        (COMPLETIONS, "repetition_penalty", 0.1, 0),
        (COMPLETIONS, "stream_options", None, {}),
        (COMPLETIONS, "max_tokens", 1, 0),
        (CHATS, "messages", [USER], []),
        (CHATS, "messages", [USER, {"role": "assistant", "content": ""}, USER], [{"role": "tool", "content": "a"}]),
        (CHATS, "messages", [{"role": "system", "content": "a"}, USER], [USER, {"role": "assistant", "content": "a"}]),
        (CHATS, "messages", [{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": "user"}]),
        (CHATS, "n", schemas.MAX_CHOICES, schemas.MAX_CHOICES + 1),
        (CHATS, "max_tokens", 1, 0),
        (CHATS, "max_tokens", 2, -1),
        (CHATS, "top_logprobs", 0, 1),
        (CHATS, "logprobs", True, 5),
        ("/generate", "num_return_sequences", schemas.MAX_CHOICES, schemas.MAX_CHOICES + 1),
        ("/generate", "max_new_tokens", 1, 0),
        ("/generate", "max_length", None, 5),
        ("/tokenize", "prompt", "", None),
        ("/detokenize", "tokens", [301], [302]),
        ("/detokenize", "tokens", [], None),
    ],
)
def test_a_field_is_taken_at_its_limit_and_refused_by_name_beyond(chat_server, path, field, good, bad):
    check(chat_server, path, {field: good}, 200)
    if bad is not None or path not in (COMPLETIONS, CHATS):
        check(chat_server, path, {field: bad}, 400, field)


def test_prompt_and_new_tokens_fill_the_context_and_not_one_more(chat_server):
    for length, new in ((1, LONGEST - 1), (LONGEST - 1, 1), (LONGEST - 30, 30)):
        tokens = [1] * length
        check(chat_server, COMPLETIONS, {"prompt": tokens, "max_tokens": new}, 200)
        check(chat_server, COMPLETIONS, {"prompt": tokens, "max_tokens": new + 1}, 400, "max_tokens")
    scored = {"max_tokens": 0, "echo": True}
    check(chat_server, COMPLETIONS, {"prompt": [1] * LONGEST} | scored, 200)
    check(chat_server, COMPLETIONS, {"prompt": [1] * (LONGEST + 1)} | scored, 400, "max_tokens")
    check(chat_server, COMPLETIONS, {"prompt": [1] * LONGEST}, 400, "max_tokens")
    # Where no number is asked for, as many as there is room for.
    left = chat_server.post(COMPLETIONS, prompt=[1] * (LONGEST - 3)).json["usage"]["completion_tokens"]
    assert 1 <= left <= 3
    used = chat_server.post("/tokenize", messages=[USER]).json["count"]
    check(chat_server, CHATS, {"max_tokens": LONGEST - used}, 200)
    check(chat_server, CHATS, {"max_tokens": LONGEST - used + 1}, 400, "messages")
    check(chat_server, "/generate", {"max_new_tokens": None, "max_length": LONGEST}, 200)
    check(chat_server, "/generate", {"max_new_tokens": None, "max_length": LONGEST + 1}, 400, "max_new_tokens")


def test_a_body_is_taken_up_to_its_size_and_refused_beyond(chat_server):
    start = b'{"prompt": "'
    body = start + b"a" * (MAX_BODY_BYTES - len(start) - 2) + b'"}'
    assert len(body) == MAX_BODY_BYTES
    assert chat_server.ask("POST", COMPLETIONS, body).status == 400  # read, and too long for the context
    for path in BASIC:
        told = chat_server.ask("POST", path, body + b" ")
        assert told.status == 413 and told.error["code"] == "body_too_large"
    unknown_length = {"Transfer-Encoding": "chunked"}
    parts = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body, b" ")]
    content = b"".join(parts) + b"0\r\n\r\n"
    assert chat_server.ask("POST", COMPLETIONS, content, unknown_length).status == 413


def test_more_texts_than_the_queue_holds_could_never_come_in(small):
    with serving.threaded(small.app()) as server:
        check(server, COMPLETIONS, {"n": 2}, 200)
        check(server, COMPLETIONS, {"n": 3}, 400, "n")
        check(server, COMPLETIONS, {"prompt": ["a"] * 3}, 400, "prompt")
        check(server, CHATS, {"n": 3}, 400, "n")
        check(server, "/generate", {"num_return_sequences": 3}, 400, "num_return_sequences")


def test_a_full_queue_is_429_with_a_time_to_come_back(small):
    with serving.threaded(small.app()) as server, small.full(server):
        for path in (COMPLETIONS, CHATS, "/generate"):
            answer = server.post_json(path, BASIC[path])
            assert answer.status == 429 and answer.error["code"] == "queue_full"
            assert int(answer.headers["Retry-After"]) >= 1
        assert server.get("/health").status == server.get("/ready").status == 200
        assert "jaxgpt_requests_waiting 2.0" in server.get("/metrics").text


def test_an_answer_that_takes_too_long_is_504_and_gives_its_slot_back(small):
    with serving.threaded(small.app(request_seconds=0.05)) as server:
        for path in (COMPLETIONS, CHATS, "/generate"):
            with small.held():
                answer = server.post_json(path, BASIC[path])
            assert answer.status == 504 and answer.error["code"] == "deadline"
        with small.held():
            stream = server.post(COMPLETIONS, prompt="Hi", stream=True)
    assert stream.status == 200 and "[DONE]" not in stream.text
    assert json.loads(stream.text.removeprefix("data: "))["error"]["code"] == "deadline"


# ---------------------------------------------------------------- fields, names, methods


CHANGES = {  # for each field that we do not have, a value with which OpenAI's answer would be another
    "best_of": 2,
    "suffix": "the end",
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"50": 5},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "prediction": {"type": "content", "content": "a"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
    "use_beam_search": True,
    "do_sample": False,
}


@pytest.mark.parametrize("field", sorted(schemas._UNSUPPORTED))
def test_a_field_that_would_change_the_answer_is_refused_by_name_and_with_its_default_taken(chat_server, field):
    for path in (COMPLETIONS, CHATS):
        answer = chat_server.post_json(path, BASIC[path] | {field: CHANGES[field]})
        assert answer.status == 400 and answer.error["param"] == field and answer.error["code"] == "unsupported"
        assert field in answer.error["message"]
        for usual in (None, *schemas._UNSUPPORTED[field]):
            check(chat_server, path, {field: usual}, 200)


def test_fields_that_change_nothing_are_taken_and_unknown_ones_refused(chat_server):
    for path in (COMPLETIONS, CHATS):
        check(chat_server, path, dict.fromkeys(schemas._IGNORED, "a"), 200)
        check(chat_server, path, {"temprature": 1}, 400, "temprature")
    check(chat_server, COMPLETIONS, {"messages": [USER]}, 400, "messages")
    check(chat_server, CHATS, {"messages": [USER | {"tool_calls": []}]}, 400, "messages")
    check(chat_server, CHATS, {"max_tokens": 2, "max_completion_tokens": 3}, 400, "max_tokens")
    check(chat_server, COMPLETIONS, {"stream": True, "stream_options": {"other": 1}}, 400, "stream_options")


def test_another_models_name_a_wrong_path_and_a_wrong_method_have_their_statuses(chat_server):
    for path in (COMPLETIONS, CHATS, "/tokenize", "/detokenize"):
        check(chat_server, path, {"model": serving.CHAT_NAME}, 200)
        check(chat_server, path, {"model": "gpt-4"}, 404, "model")
        answer = chat_server.get(path)
        assert answer.status == 405 and answer.error["message"] and answer.headers["Allow"] == "POST"
    assert chat_server.get("/v1/nothing").error["type"] == "not_found_error"
    assert chat_server.ask("DELETE", "/v1/models").status == 405
    for body in (b"", b"[]", b"{", b"null", b'{"prompt": NaN}', b"\xff"):
        answer = chat_server.ask("POST", COMPLETIONS, body)
        assert answer.status == 400 and answer.error["type"] == "invalid_request_error"


# ---------------------------------------------------------------- who may ask


def routes_of(server) -> list[tuple[str, str]]:
    """(method, path) of all that there is, and of some that there is not."""
    paths = server.get("/openapi.json").json["paths"]
    listed = [(method.upper(), path.replace("{name}", "a")) for path, methods in paths.items() for method in methods]
    assert len(listed) >= 11 and ("GET", "/metrics") in listed
    return [*listed, ("GET", "/"), ("GET", "/openapi.json"), ("GET", "/nothing"), ("POST", "/v1/other")]


def test_every_route_but_health_wants_a_key(base_server):
    some = ("", "Bearer", "Bearer wrong", serving.KEYS[0], f"Basic {serving.KEYS[0]}", f"Bearer {serving.KEYS[0]}x")
    wrong = [None, *some, "Bearer \xff".encode("latin-1")]
    for method, path in routes_of(base_server):
        for given in wrong:
            headers = {} if given is None else {"Authorization": given}
            answer = serving.Server(base_server.port).ask(method, path, b"{}" if method == "POST" else None, headers)
            if path in ALWAYS_OPEN:
                assert answer.status == 200
            else:
                assert answer.status == 401 and answer.error["code"] == "invalid_api_key", (method, path, given)
        for key in serving.KEYS:
            for scheme in ("Bearer", "bearer"):
                answer = base_server.ask(method, path, b"{}", {"Authorization": f"{scheme} {key}"})
                assert answer.status != 401, (method, path)


def test_what_is_opened_needs_no_key_and_the_rest_does(small):
    for name, path in OPENABLE.items():
        with serving.threaded(small.app(keys=["a-key"], opened=[name])) as server:
            assert server.get(path).status == 200
            others = {*OPENABLE.values(), "/openapi.json", "/tokenizer_info", "/v1/models/small"} - {path}
            assert {server.get(other).status for other in others} == {401}
            assert server.post(COMPLETIONS, prompt="Hi").status == 401
    with serving.threaded(small.app()) as server:
        assert server.get("/openapi.json").status == server.get("/").status == 200


def test_only_pages_of_listed_sites_may_ask_from_a_browser(base_server, chat_server):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    nobody = serving.Server(base_server.port)
    allowed = nobody.ask("OPTIONS", COMPLETIONS, headers={"Origin": serving.ORIGIN} | asked)
    assert allowed.status == 200 and allowed.headers["Access-Control-Allow-Origin"] == serving.ORIGIN
    assert "POST" in allowed.headers["Access-Control-Allow-Methods"]
    assert "authorization" in allowed.headers["Access-Control-Allow-Headers"].lower()
    refused = nobody.ask("GET", "/v1/models", headers={"Origin": serving.ORIGIN})
    assert refused.status == 401 and refused.headers["Access-Control-Allow-Origin"] == serving.ORIGIN
    for server, origin in ((base_server, "https://evil.example.com"), (chat_server, serving.ORIGIN)):
        preflight = server.ask("OPTIONS", COMPLETIONS, headers={"Origin": origin} | asked)
        assert preflight.status in (400, 405) and "Access-Control-Allow-Origin" not in preflight.headers
        assert "Access-Control-Allow-Origin" not in server.get("/v1/models", Origin=origin).headers


def test_neither_keys_nor_texts_are_in_the_log_the_figures_or_an_error(base_server, caplog):
    caplog.set_level("INFO")
    word = "canary4711"
    told = [
        base_server.post(COMPLETIONS, prompt=word, max_tokens=2),
        base_server.post(COMPLETIONS, prompt=word, max_tokens=2, stream=True),
        base_server.post(COMPLETIONS, prompt=word * 100),
        base_server.post(COMPLETIONS, prompt=[word, 3]),
        base_server.post(COMPLETIONS, prompt=word, n=99),
        base_server.post(CHATS, messages=[{"role": word, "content": word}]),
        base_server.post("/tokenize", prompt=word),
        base_server.ask("POST", COMPLETIONS, f'{{"prompt": "{word}"'.encode()),
        base_server.ask("GET", f"/v1/models?key={word}", headers={"Authorization": f"Bearer {word}"}),
        base_server.get(f"/{word}"),
    ]
    for answer in told[2:6] + told[7:9]:
        assert answer.status >= 400 and word not in answer.text
    wait_for(lambda: "GET other 404" in caplog.text)  # a line is written after its answer
    seen = caplog.text + base_server.get("/metrics").text
    assert "POST /v1/completions 200" in seen and "GET other 404" in seen
    assert not re.search("|".join([word, *serving.KEYS]), seen)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--port", "65536"], "--port 65536: it must be between 0 and 65535"),
        (["--port", "-1"], "--port -1"),
        (["--slots", "0"], "--slots 0: it must be more than 0"),
        (["--queue", "0"], "--queue 0"),
        (["--chunk", "-3"], "--chunk -3"),
        (["--request-seconds", "0"], "--request-seconds 0.0"),
        (["--drain-seconds", "-1"], "--drain-seconds -1: it must be 0 or more"),
        (["--cors-origin", "example.com"], "--cors-origin example.com: it must be like https://example.com"),
        (["--cors-origin", "https://example.com/"], "--cors-origin https://example.com/"),
        (["--api-key-file", "no/such/file"], "--api-key-file no/such/file: No such file or directory"),
        (["--host", "203.0.113.7"], "--host 203.0.113.7 --port 0: "),
        ([], "no/such/run"),
    ],
)
def test_wrong_flags_are_refused_in_one_line_before_anything_is_loaded(flags, told, capsys):
    assert serve.main(["--checkpoint", "no/such/run", "--port", "0", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {told}") and error.count("\n") == 1


def test_a_port_in_use_a_key_file_without_keys_and_missing_packages_are_one_line(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main(["--checkpoint", "no/such/run", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"error: --host 127.0.0.1 --port {port}: Address already in use; choose another one\n"
    )
    (tmp_path / "empty").write_text("# none\n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, told in (("empty", "no key in it; write one a line"), ("binary", "not UTF-8")):
        assert serve.main(["--checkpoint", "no/such/run", "--api-key-file", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err == f"error: --api-key-file {tmp_path / name}: {told}\n"
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert serve.main(["--checkpoint", "no/such/run"]) == 2
    assert capsys.readouterr().err == (
        "error: the server needs packages that are not installed: pip install 'jaxgpt[serve]'\n"
    )


def test_keys_come_from_the_environment_too(monkeypatch):
    monkeypatch.setenv(KEYS, " one, two,,")
    assert read_keys(None) == ["one", "two"]
    monkeypatch.delenv(KEYS)
    assert read_keys(None) == []


@pytest.mark.system
def test_the_flags_of_the_command_reach_the_server(base_checkpoint, tmp_path):
    (tmp_path / "keys.txt").write_text(f"# who may ask\n{serving.KEYS[0]}\n\n{serving.KEYS[1]}\n", encoding="utf-8")
    flags = ["--api-key-file", str(tmp_path / "keys.txt"), "--open", "metrics", "--cors-origin", serving.ORIGIN]
    flags += ["--name", "x", "--slots", "3", "--request-seconds", "0.01"]
    with serving.started(base_checkpoint, *flags) as server:
        assert "jaxgpt_slots 3.0" in server.get("/metrics").text
        assert server.get("/v1/models").status == 401
        for key in serving.KEYS:
            answer = server.get("/v1/models", Authorization=f"Bearer {key}", Origin=serving.ORIGIN)
            assert answer.headers["Access-Control-Allow-Origin"] == serving.ORIGIN
            assert [card["id"] for card in answer.json["data"]] == ["x"]
        server.key = serving.KEYS[0]
        assert server.post(COMPLETIONS, prompt="canary4711", max_tokens=100).status == 504
        wait_for(lambda: "POST /v1/completions 504" in server.output())  # a line is written after its answer
        assert not re.search("|".join(["canary4711", *serving.KEYS]), server.output())


def test_a_server_listens_while_it_compiles_and_ends_with_what_is_under_way(small, monkeypatch):
    """The whole life of a server in this process; test_serving_faults.py has those of real ones."""
    monkeypatch.setattr(life, "_prefer_main_thread", lambda: None)
    listener, go = life.listen("127.0.0.1", 0), threading.Event()
    server = serving.Server(listener.getsockname()[1])
    model = dataclasses.replace(small.served, engine=None)
    own = serving.Small(model, None)

    def build() -> Engine:
        go.wait(30)
        own.engine = Engine(small.engine._decoder, serving.SLOTS, queue=2)
        return own.engine

    def client() -> list[serving.Answer]:
        try:
            assert server.get("/ready").json == {"status": "loading"} and server.get("/health").status == 200
            go.set()
            wait_for(lambda: server.get("/ready").status == 200)
            with ThreadPoolExecutor(2) as pool, own.held():
                answers = [
                    pool.submit(server.post, COMPLETIONS, prompt="Hi", stream=stream) for stream in (True, False)
                ]
                # Both are there; how many have a slot depends on when the held engine took its last look.
                wait_for(lambda: own.engine.running + own.engine.waiting == 2)
                os.kill(os.getpid(), signal.SIGTERM)
                wait_for(lambda: server.get("/ready").json == {"status": "stopping"})
                assert server.post(COMPLETIONS, prompt="Hi").error["code"] == "stopping"
            return [answer.result() for answer in answers]
        finally:
            go.set()
            lifetime._on_signal()

    lifetime = life._Lifetime(listener, model, Options(), build, drain_seconds=20)
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(client)
        asyncio.run(lifetime.run())
        stream, whole = answers.result()
    gc.unfreeze()
    assert stream.events[-1]["choices"][0]["finish_reason"] == "length" and whole.status == 200
    assert not own.engine._thread.is_alive()
