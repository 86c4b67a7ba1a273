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
from jaxgpt.errors import how_to_install
from jaxgpt.inference.engine import Engine
from jaxgpt.serving import middleware, schemas
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


def check(server, path: str, fields: dict, status: int, param: str | None = None, told: str = "") -> None:
    answer = server.post_json(path, BASIC[path] | fields)
    assert answer.status == status, (fields, answer.body)
    if status != 200:
        assert answer.error["param"] == param and told in answer.error["message"], (fields, answer.error)


# ---------------------------------------------------------------- numbers and lengths


@pytest.mark.parametrize(
    "path, field, good, bad",
    [
        (COMPLETIONS, "prompt", [1] * (LONGEST - 1), None),
        (COMPLETIONS, "prompt", ["a"] * schemas.MAX_PROMPTS, ["a"] * (schemas.MAX_PROMPTS + 1)),
        (COMPLETIONS, "prompt", "", 5),
        (COMPLETIONS, "prompt", [], None),
        (COMPLETIONS, "prompt", [[1], [2]], None),
        (COMPLETIONS, "prompt", [301], None),
        (COMPLETIONS, "n", schemas.MAX_CHOICES, schemas.MAX_CHOICES + 1),
        (COMPLETIONS, "n", 1, 0),
        (COMPLETIONS, "stop", ["a"] * schemas.MAX_STOPS, ["a"] * (schemas.MAX_STOPS + 1)),
        (COMPLETIONS, "stop", "中" * 256, "中" * 257),
        (COMPLETIONS, "stop", ["b" * 256], 5),
        (COMPLETIONS, "stop", [], ""),
        (COMPLETIONS, "stop_token_ids", [1] * 7, [1] * 8),
        (COMPLETIONS, "logprobs", schemas.MAX_ALTERNATIVES, schemas.MAX_ALTERNATIVES + 1),
        (COMPLETIONS, "logprobs", 0, -1),
        (COMPLETIONS, "logprobs", None, True),
        (COMPLETIONS, "seed", 2**64 - 1, 2**64),
        (COMPLETIONS, "seed", -(2**63), -(2**63) - 1),
        (COMPLETIONS, "seed", 1e18, 0.5),
        (COMPLETIONS, "temperature", 0, -0.001),
        (COMPLETIONS, "temperature", 1e300, "1"),
        (COMPLETIONS, "top_p", 1, 1.001),
        (COMPLETIONS, "top_p", 1e-9, 0),
        (COMPLETIONS, "min_p", 1, 1.001),
        (COMPLETIONS, "top_k", 2**31 - 1, 2**31),
        (COMPLETIONS, "top_k", -1, -2),
        (COMPLETIONS, "repetition_penalty", 0.1, 0),
        (COMPLETIONS, "stream_options", {}, []),
        (COMPLETIONS, "max_tokens", 16.0, 16.5),
        (COMPLETIONS, "max_tokens", 1, 0),
        (CHATS, "messages", [USER], []),
        (CHATS, "n", schemas.MAX_CHOICES, schemas.MAX_CHOICES + 1),
        (CHATS, "max_tokens", 1, 0),
        (CHATS, "max_tokens", 2, -1),
        (CHATS, "top_logprobs", 0, 1),
        (CHATS, "logprobs", True, 5),
        ("/generate", "num_return_sequences", schemas.MAX_CHOICES, schemas.MAX_CHOICES + 1),
        ("/generate", "max_new_tokens", 1, 0),
        ("/generate", "max_length", None, 5),
        ("/generate", "do_sample", True, 1),
        ("/generate", "return_full_text", False, "no"),
        ("/tokenize", "prompt", "", None),
        ("/detokenize", "tokens", [301], None),
        ("/detokenize", "tokens", [], None),
    ],
)
def test_a_field_is_taken_at_its_limit_and_refused_by_name_beyond(chat_server, path, field, good, bad):
    check(chat_server, path, {field: good}, 200)
    if bad is not None or path not in (COMPLETIONS, CHATS):
        check(chat_server, path, {field: bad}, 400, field)


WRONG = [  # each with the path of what is wrong, and the reason
    (COMPLETIONS, {"prompt": ["a"] * (schemas.MAX_PROMPTS + 1)}, "prompt", "at most 64 items"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
    (COMPLETIONS, {"prompt": [1, 5000]}, "prompt[1]", "token 5000, but the vocabulary is 302"),
    (COMPLETIONS, {"prompt": [[1], [2, 5000]]}, "prompt[1][1]", "token 5000"),
    (COMPLETIONS, {"prompt": [[1], "a", [True]]}, "prompt[2][0]", "valid integer"),
    (COMPLETIONS, {"prompt": ["a", {}]}, "prompt[1]", "a text or token ids"),
    (COMPLETIONS, {"prompt": ["a"], "stop": ["a", "b" * 257]}, "stop[1]", "at most 256 characters"),
    (COMPLETIONS, {"stop": ["a"] * (schemas.MAX_STOPS + 1)}, "stop", "at most 16 items"),
    (COMPLETIONS, {"stop": [1]}, "stop[0]", "valid string"),
    (COMPLETIONS, {"prompt": ["a", [1] * LONGEST]}, "prompt[1]", "n_positions"),
    (COMPLETIONS, {"prompt": [0] * (schemas.MAX_TOKENS + 1)}, "prompt", "at most 65536 items"),
    (COMPLETIONS, {"best_of": 2, "max_tokens": 0.5}, "max_tokens", "valid integer"),
    (CHATS, {"messages": []}, "messages", "at least 1 item"),
    (CHATS, {"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    (CHATS, {"messages": [{"content": "a"}]}, "messages[0].role", "required"),
    (CHATS, {"messages": [USER, 3]}, "messages[1]", "valid object"),
    (CHATS, {"messages": [USER, {"role": "tool", "content": "a"}]}, "messages[1].role", "'assistant'"),
    (CHATS, {"messages": [USER, {"role": "assistant", "content": "a"}]}, "messages[1].role", "the last message"),
    (CHATS, {"messages": [USER | {"content": [{"type": "text"}]}]}, "messages[0].content[0].text", "required"),
    (CHATS, {"messages": [USER | {"content": 5}]}, "messages[0].content", "a text or a list of parts"),
    (CHATS, {"messages": [USER | {"contents": "a"}]}, "messages[0].contents", "no field"),
    (CHATS, {"messages": [USER] * (schemas.MAX_MESSAGES + 1)}, "messages", "at most 4096 items"),
    (CHATS, {"messages": [USER] * 200}, "messages", "n_positions"),
    (CHATS, {"max_completion_tokens": 1000, "max_tokens": None}, "max_completion_tokens", "n_positions"),
    (CHATS, {"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "valid boolean"),
    ("/generate", {"max_length": 1000, "max_new_tokens": None}, "max_length", "n_positions"),
    (
        "/generate",
        {"inputs": "a", "parameters": {"max_new_tokens": 5}},
        "inputs",
        "no field inputs; known: temperature",
    ),
    ("/tokenize", {"prompt": "a" * 200_000}, "prompt", "131,072 bytes in one piece"),
    ("/tokenize", {"prompt": None, "messages": [USER | {"content": "a" * 200_000}]}, "messages", "131,072"),
    ("/detokenize", {"tokens": [1, 302]}, "tokens[1]", "the vocabulary is 302"),
]


@pytest.mark.parametrize("path, fields, param, told", WRONG, ids=[f"{one[0]} {one[2]}" for one in WRONG])
def test_an_error_names_the_field_by_its_path_and_the_reason(chat_server, path, fields, param, told):
    check(chat_server, path, fields, 400, param, told)


def test_of_an_unknown_field_and_a_missing_one_the_unknown_is_named(chat_server):
    """`prompt` is missing because it was called something else."""
    for path, fields in (("/generate", {"inputs": "a"}), (CHATS, {"message": [USER]}), ("/detokenize", {"ids": [1]})):
        answer = chat_server.post_json(path, fields)
        assert answer.status == 400 and answer.error["param"] == next(iter(fields))


def test_prompt_and_new_tokens_fill_the_context_and_not_one_more(chat_server):
    for length, new in ((1, LONGEST - 1), (LONGEST - 1, 1), (LONGEST - 30, 30)):
        tokens = [1] * length
        check(chat_server, COMPLETIONS, {"prompt": tokens, "max_tokens": new}, 200)
        check(chat_server, COMPLETIONS, {"prompt": tokens, "max_tokens": new + 1}, 400, "max_tokens")
    scored = {"max_tokens": 0, "echo": True}
    check(chat_server, COMPLETIONS, {"prompt": [1] * LONGEST} | scored, 200)
    check(chat_server, COMPLETIONS, {"prompt": [1] * (LONGEST + 1)} | scored, 400, "prompt")
    check(chat_server, COMPLETIONS, {"prompt": [1] * LONGEST}, 400, "prompt")
    # Where no number is asked for, as many as there is room for.
    left = chat_server.post(COMPLETIONS, prompt=[1] * (LONGEST - 3)).json["usage"]["completion_tokens"]
    assert 1 <= left <= 3
    used = chat_server.post("/tokenize", messages=[USER]).json["count"]
    check(chat_server, CHATS, {"max_tokens": LONGEST - used}, 200)
    check(chat_server, CHATS, {"max_tokens": LONGEST - used + 1}, 400, "max_tokens")
    check(chat_server, "/generate", {"max_new_tokens": None, "max_length": LONGEST}, 200)
    check(chat_server, "/generate", {"max_new_tokens": None, "max_length": LONGEST + 1}, 400, "max_length")


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


CHANGES = {  # for each field that we do not have, a value with which another server's answer would be another
    **{"best_of": 2, "num_beams": 2, "length_penalty": 2.0, "typical_p": 0.9, "suffix": "the end"},
    **{"presence_penalty": 0.5, "frequency_penalty": -0.5, "min_tokens": 2, "no_repeat_ngram_size": 3},
    **dict.fromkeys(["do_sample", "skip_special_tokens", "add_generation_prompt"], False),
    **dict.fromkeys(["use_beam_search", "ignore_eos", "early_stopping", "continue_final_message"], True),
    **{"logit_bias": {"50": 5}, "bad_words": ["a"], "reasoning_effort": "low", "verbosity": "low"},
    **{"tools": [{"type": "function", "function": {"name": "f"}}], "functions": [{"name": "f"}]},
    **{"tool_choice": "required", "function_call": {"name": "f"}, "response_format": {"type": "json_object"}},
    **{"modalities": ["text", "audio"], "audio": {"voice": "alloy"}, "web_search_options": {}},
    **{"prediction": {"type": "content", "content": "a"}, "moderation": {"model": "m"}, "continuous_usage_stats": True},
    **{"tool_calls": [{"id": "a"}], "tool_call_id": "a", "refusal": "no", "reasoning": "a", "reasoning_content": "a"},
}


@pytest.mark.parametrize("field", sorted(schemas._UNSUPPORTED))
def test_a_field_that_would_change_the_answer_is_refused_by_name_and_with_its_default_taken(chat_server, field):
    for path in (COMPLETIONS, CHATS):
        answer = chat_server.post_json(path, BASIC[path] | {field: CHANGES[field]})
        assert answer.status == 400 and answer.error["param"] == field and answer.error["code"] == "unsupported"
        assert field in answer.error["message"]
    for usual in (None, *schemas._UNSUPPORTED[field]):
        check(chat_server, COMPLETIONS, {field: usual}, 200)


def test_in_every_object_null_is_absent_labels_are_ignored_and_what_changes_the_answer_is_named(chat_server):
    part, answer = {"type": "text", "text": "Hi"}, {"role": "assistant", "content": "Hello"}
    ask = lambda *messages, **more: chat_server.post(CHATS, messages=messages, max_tokens=4, seed=1, **more)
    told = lambda *messages, **more: ask(*messages, **more).json["choices"][0]["message"]["content"]
    plain = told(USER, answer, USER)
    # What clients send back of an answer, and the labels that they add.
    empty = dict.fromkeys(["refusal", "audio", "function_call", "tool_calls", "annotations", "parsed", "anything"])
    labels = {"name": "bob", "id": "msg_1", "annotations": [{}], "tool_calls": [], "cache_control": {}}
    cached = part | {"prompt_cache_breakpoint": {"mode": "explicit"}, "annotations": []}
    assert told(USER | {"name": "ann"}, answer | empty, USER) == plain
    assert told(USER | {"content": [cached]}, answer | labels, USER | {"refusal": ""}) == plain
    assert told(USER, answer, USER, foo=None, stream_options={"include_obfuscation": False, "foo": None}) == plain
    assert told(USER, answer | {"content": [part | {"text": "Hello"}]}, USER | {"content": [part, part | {"text": ""}]})
    nothing = told(USER, answer | {"content": ""}, USER)
    for content in ({"content": None}, {"content": []}, {}):
        assert told(USER, {"role": "assistant", "refusal": None} | content, USER) == nothing
    for wrong in ({"tool_calls": [{"id": "1"}]}, {"refusal": "no"}, {"audio": {"id": "1"}}, {"function_call": {}}):
        (field,) = wrong
        error = ask(USER, answer | wrong, USER).error
        assert (error["param"], error["code"]) == (f"messages[1].{field}", "unsupported")
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    assert ask(USER | {"content": [part, image]}).error["param"] == "messages[0].content[1].type"
    usage = {"stream_options": {"continuous_usage_stats": True}, "stream": True}
    assert ask(USER, **usage).error["code"] == "unsupported"


def test_fields_that_change_nothing_are_taken_and_unknown_ones_refused(chat_server):
    for path in (COMPLETIONS, CHATS):
        check(chat_server, path, dict.fromkeys(schemas._IGNORED, "a"), 200)
        check(chat_server, path, {"temprature": 1}, 400, "temprature", "no field temprature; known: temperature")
    check(chat_server, COMPLETIONS, {"messages": [USER]}, 400, "messages")
    check(chat_server, CHATS, {"max_tokens": 2, "max_completion_tokens": 3}, 400, "max_tokens")
    check(chat_server, COMPLETIONS, {"stream": True, "stream_options": {"other": 1}}, 400, "stream_options.other")


def test_numbers_and_words_mean_what_they_mean_to_openai_and_hugging_face(chat_server):
    complete = lambda **fields: chat_server.post(COMPLETIONS, **{"prompt": "Hi", "max_tokens": 8} | fields).json[
        "choices"
    ]
    assert complete(seed=7, top_k=-1, max_tokens=8.0) == complete(seed=7 + 2**31, top_k=0) == complete(seed=7 - 2**40)
    assert complete(seed=-1) == complete(seed=2**31 - 1) != complete(seed=1)
    go_on = lambda **fields: chat_server.post("/generate", prompt="Hi", max_new_tokens=8, seed=1, **fields).json
    full, sampled = go_on(temperature=0), go_on()
    assert go_on(do_sample=False) == full != sampled == go_on(do_sample=True, num_return_sequences=None)
    short = go_on(return_full_text=False, temperature=0)["generated_text"]
    assert full["generated_text"] == "Hi" + short and go_on(return_full_text=True) == sampled


def test_a_chat_model_ends_with_its_turn_on_every_route():
    """Its likeliest token is always the one that ends a turn."""
    model = serving.make_model(chat=True)
    end = model.tokenizer.end_of_turn
    model.params["wte"][end] = 9 * model.params["ln_f"]["bias"]
    with serving.served(model, "ends") as server:
        tokens = server.post("/tokenize", messages=[USER]).json["tokens"]
        for fields in ({"prompt": tokens}, {"prompt": "Hi"}, {"prompt": tokens, "stop_token_ids": [1] * 7}):
            [choice] = server.post(COMPLETIONS, temperature=0, **fields).json["choices"]
            assert (choice["text"], choice["finish_reason"]) == ("", "stop")
        told = server.post("/generate", prompt="Hi", do_sample=False).json["sequences"]
        assert told == [{"generated_text": "Hi", "finish_reason": "stop"}]


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
    own = "authorization, content-type, x-stainless-os, x-stainless-retry-count, idempotency-key, openai-organization"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": own}
    nobody = serving.Server(base_server.port)
    allowed = nobody.ask("OPTIONS", COMPLETIONS, headers={"Origin": serving.ORIGIN} | asked)
    assert allowed.status == 200 and allowed.headers["Access-Control-Allow-Origin"] == serving.ORIGIN
    assert "POST" in allowed.headers["Access-Control-Allow-Methods"]
    assert set(own.split(", ")) <= set(allowed.headers["Access-Control-Allow-Headers"].lower().split(", "))
    refused = nobody.ask("GET", "/v1/models", headers={"Origin": serving.ORIGIN})
    assert refused.status == 401 and refused.headers["Access-Control-Allow-Origin"] == serving.ORIGIN
    assert "Retry-After" in refused.headers["Access-Control-Expose-Headers"]
    for server, origin in ((base_server, "https://evil.example.com"), (chat_server, serving.ORIGIN)):
        preflight = server.ask("OPTIONS", COMPLETIONS, headers={"Origin": origin} | asked)
        assert preflight.status in (400, 403) and "Access-Control-Allow-Origin" not in preflight.headers
        assert "Access-Control-Allow-Origin" not in server.get("/v1/models", Origin=origin).headers


def test_without_keys_no_other_site_is_answered_unless_it_is_opened(small):
    site = serving.ORIGIN
    with serving.threaded(small.app()) as closed, serving.threaded(small.app(cors_origins=[site])) as opened:
        body, port = b'{"prompt": "Hi", "max_tokens": 1}', closed.port
        ask = lambda server, **headers: server.ask("POST", COMPLETIONS, body, {"Content-Type": "text/plain"} | headers)
        own = [
            {},
            {"Host": f"localhost:{port}"},
            {"Host": "[::1]:80"},
            {"Host": "10.1.2.3"},
            {"Host": "my-server:8000"},
        ]
        own += [{"Host": f"a.localhost:{port}", "Origin": f"http://a.localhost:{port}"}, {"Host": "LOCALHOST"}]
        own += [{"Origin": f"http://127.0.0.1:{port}"}, {"Host": "box:1", "Origin": "https://BOX:1"}]
        for headers in own:
            assert ask(closed, **headers).status == 200, headers
        others = [
            {"Origin": site},
            {"Origin": "null"},
            {"Origin": f"http://localhost:{port}"},
            {"Host": "evil.example"},
        ]
        others += [{"Host": "evil.example:80", "Origin": "http://evil.example:80"}, {"Host": "127.0.0.1.nip.io"}]
        others += [
            {"Host": "[x", "Origin": "http://[x"},
            {"Host": "", "Origin": "null"},
            {"Origin": "http://127.0.0.1"},
        ]
        for headers in others:
            told = ask(closed, **headers)
            assert told.status == 403 and told.error["code"] == "other_site", headers
            assert closed.get("/health", **headers).status == closed.get("/ready", **headers).status == 200
        assert f"--cors-origin {site} lets" in ask(closed, Origin=site).error["message"]
        assert "--cors-origin http://evil.example lets" in ask(closed, Host="evil.example").error["message"]
        for headers in ({"Origin": site}, {"Host": "chat.example.com"}, {"Host": "chat.example.com", "Origin": site}):
            assert ask(opened, **headers).status == 200
        assert ask(opened, Origin="https://other.example.com").status == 403


def test_headers_and_all_bodies_together_have_a_limit(small, monkeypatch):
    with serving.threaded(small.app()) as server:
        told = server.get("/v1/models", **{"X-Long": "x" * 31_000})
        assert told.status == 200
        for path, headers in (("/v1/models", {"X-Long": "x" * 40_000}), ("/v1/" + "a" * 40_000, {})):
            told = server.get(path, **headers)
            assert told.status == 431 and told.error["code"] == "large_headers"
        monkeypatch.setattr(middleware, "MAX_ALL_BODIES", 100_000)
        body = json.dumps({"prompt": "a\n" * 40_000}).encode()
        head = f"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        assert server.ask("POST", "/tokenize", body).status == 429  # larger than all may be
        body = body[:60_000] + b'"}'
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(head.encode() + body[:60_000])
            wait_for(lambda: server.ask("POST", "/tokenize", body).status == 429)
            assert server.post("/tokenize", prompt="Hi").status == 200
        wait_for(lambda: server.ask("POST", "/tokenize", body).status == 200)  # what has left is not counted


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
        f"error: the server needs packages that are not installed: {how_to_install('serve')}\n"
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
