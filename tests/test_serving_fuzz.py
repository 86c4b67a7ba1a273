"""Whatever is sent, the server answers it or refuses it, in time, and answers the next one as before."""

import collections
import contextlib
import gzip
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import serving

from jaxgpt.serving import schemas

pytest_plugins = ["serving"]
pytestmark = pytest.mark.system

BODIES = {
    "/v1/completions": schemas.CompletionBody,
    "/v1/chat/completions": schemas.ChatBody,
    "/generate": schemas.GenerateBody,
    "/tokenize": schemas.TokenizeBody,
    "/detokenize": schemas.DetokenizeBody,
}
POSTS = tuple(BODIES)
SOUND = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 3, "seed": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "seed": 1},
    "/generate": {"prompt": "Hi", "max_new_tokens": 3, "seed": 1},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
NEARLY = 2**20 - 100  # bytes: with the rest, just under the largest body
OTHERS = ("best_of", "logit_bias", "suffix", "tools", "user", "metadata", "", "\0", "__proto__", "x" * 5000)
# JSON texts: some are none. Those of the first line are right for many fields.
VALUES = (
    *(("2", "3", "0.5", "0.9", "1.0", "false", "null", '"b"', '["c"]', "[3]", "[[3], [4]]") * 3),
    *("null", "true", "[]", "{}", '""', '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', '"' + "\\u0000" * 300 + '"'),
    *("0", "-1", "1", "-0.0", "1.5", "16", "2147483647", "2147483648", "-2147483649", "4294967296", "1" + "0" * 30),
    *("9" * 5000, "1e999", "-1e999", "1e-999", "1e308", "1e-45", "0.1e-9999999999", "NaN", "Infinity", "-Infinity"),
    *('"中😀\\n"', '["a", null]', '[["a"]]', "[[1], [2]]", "[1, 2147483648]", "[2147483647]", "[-1]", "[1.5]"),
    *('{"role": "user"}', '[{"role": "system", "content": "x"}]', '[{"role": "user", "content": []}]'),
    *('[{"role": "user", "content": "<|user|><|end|><|endoftext|>"}]', '{"include_usage": 1}'),
    *("[" * 300 + "]" * 300, '{"a":' * 300 + "1" + "}" * 300, "[" * 100_000, '"' + "a" * 300 + '"', "tru", "01", "'a'"),
    *('["' + '","'.join(["ab"] * 16) + '"]', '["' + '","'.join(["a" * 255 + "b"] * 16) + '"]'),
)
LONG = ("a", " ", "中", "\\u0301", "a line\\n")
# What a body of a mebibyte is made of: elements of a list, or text.
ELEMENTS = ("-1", "1", "1.5", "null", "{}", "[]", "[1]", '["a"]', '{"a": 1}', '"ab"', '{"type": "text", "text": "a"}')
HUGE = (*ELEMENTS, '{"role": "user", "content": "a"}', *LONG)


def body(number: int) -> bytes:
    """A body that is nearly right: one or two fields of it are not, or its bytes are damaged."""
    draw, path = random.Random(number), POSTS[number % len(POSTS)]
    fields = {name: json.dumps(value) for name, value in SOUND[path].items()}
    known = list(BODIES[path].model_fields)
    for _ in range(draw.choice([1, 1, 2])):
        fields[draw.choice(known if draw.random() < 0.8 else OTHERS)] = draw.choice(VALUES)
    parts = [f"{json.dumps(name)}: {value}" for name, value in fields.items()]
    if draw.random() < 0.1:
        parts += [draw.choice(parts)]  # one field twice
    whole = ("{" + ", ".join(parts) + "}").encode()
    damage = draw.randrange(20)
    if damage == 0:
        return whole[: draw.randrange(len(whole))]
    if damage == 1:
        return b"\xef\xbb\xbf" + whole
    if damage == 2:
        return gzip.compress(whole)
    if damage == 3:
        return whole.decode().encode("utf-16")
    if damage == 4:
        at = draw.randrange(len(whole))
        return whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :]
    if damage == 5:
        return draw.choice(VALUES).encode()
    return whole


def huge_body(number: int) -> bytes:
    """A body of nearly the largest size: one field is a list of far too many elements, or text without an end."""
    draw, path = random.Random(number), POSTS[number % len(POSTS)]
    fields = {name: json.dumps(value) for name, value in SOUND[path].items()}
    unit, known = HUGE[number % len(HUGE)], [*BODIES[path].model_fields, *OTHERS]
    count = draw.randrange(NEARLY // 2, NEARLY - 100) // (len(unit.encode()) + 2)
    value = f'"{unit * count}"' if unit in LONG else f"[{', '.join([unit] * count)}]"
    if draw.random() < 0.2:
        value = f'[{{"role": "user", "content": {value}}}]'
    fields[draw.choice(known) if draw.random() < 0.4 else next(iter(fields))] = value
    return ("{" + ", ".join(f"{json.dumps(name)}: {one}" for name, one in fields.items()) + "}").encode()


def post(server, path: str, content: bytes) -> serving.Answer:
    return server.ask("POST", path, content, {"Content-Type": "application/json"})


@pytest.fixture
def still_answers(chat_process):
    """The server gives the answers that it gave before."""

    def ask() -> list:
        answers = [post(chat_process, path, json.dumps(SOUND[path]).encode()) for path in POSTS]
        assert {answer.status for answer in answers} == {200}
        return [answer.json.get("choices", answer.json) for answer in answers]

    before = ask()
    yield
    assert ask() == before
    assert chat_process.get("/health").status == 200


def test_1000_bodies_that_are_not_right_are_answered_or_refused(chat_process, still_answers):
    answers = serving.at_once(1000, lambda number: post(chat_process, POSTS[number % len(POSTS)], body(number)))
    for number, answer in enumerate(answers):
        assert answer.status in (200, 400, 404), (body(number)[:500], answer.body)
        if answer.status != 200:
            assert answer.error["type"] and len(answer.body) < 2_000, body(number)[:500]
    refused = sum(answer.status != 200 for answer in answers)
    assert 300 < refused < 950  # neither all nor none


def memory(server) -> int:
    """The most memory that the process ever had, in bytes."""
    with open(f"/proc/{server.process.pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def test_huge_bodies_neither_hold_up_others_nor_fill_the_memory(chat_process, still_answers):
    """1,000 with two cores for the server: /health took 67 ms at most in 99 of 100 cases, and memory 58 MB."""
    bodies, before, times = [huge_body(number) for number in range(96)], memory(chat_process), []
    ask = lambda number: post(chat_process, POSTS[number % len(POSTS)], bodies[number])
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, number) for number in range(len(bodies))]
        while not all(answer.done() for answer in answers):
            began = time.perf_counter()
            assert chat_process.get("/health").status == 200
            times.append(time.perf_counter() - began)
            time.sleep(0.005)
    for number, answer in enumerate(answers):
        assert answer.result().status in (200, 400, 404), bodies[number][:100]
        assert answer.result().status == 200 or len(answer.result().body) < 2_000
    assert memory(chat_process) - before < 100 * 2**20
    assert len(times) > 50 and sorted(times)[int(0.99 * len(times))] < 0.5  # other tests run beside this one


@pytest.mark.parametrize("path", POSTS)
def test_the_longest_texts_are_answered_in_time_while_others_are(chat_process, still_answers, path):
    """Texts on which a tokenizer could take for ever."""
    field = next(iter(SOUND[path]))

    def ask(number: int) -> serving.Answer:
        text = LONG[number] * (NEARLY // len(LONG[number].encode()))
        value = f'[{{"role": "user", "content": "{text}"}}]' if field == "messages" else f'"{text}"'
        if field == "tokens":
            value = "[" + "9," * (NEARLY // 2) + "9]"
        return chat_process.ask("POST", path, f'{{"{field}": {value}}}'.encode(), seconds=20)

    statuses = [answer.status for answer in serving.at_once(len(LONG), ask)]
    if path == "/tokenize":
        assert statuses == [400] * (len(LONG) - 1) + [200]  # with line breaks it is read in parts
    else:
        assert set(statuses) == {400}


def statuses_of(cases) -> list[int]:
    """The statuses of a few requests, the same ones each time."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable

    statuses = []

    @settings(max_examples=8, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(case=cases)
    def ask(case) -> None:
        answer = case.call(timeout=30)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        statuses.append(answer.status_code)

    with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with GET /health
        ask()
    return statuses


def test_requests_made_from_the_servers_own_description_are_answered_or_refused(chat_process, still_answers):
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{chat_process.url}/openapi.json")
    statuses: dict[str, set[int]] = collections.defaultdict(set)
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            for status in statuses_of(operation.as_strategy(generation_mode=mode)):
                statuses[operation.path].add(status)
    assert set(POSTS) < set(statuses)
    assert all(200 in statuses[path] for path in ("/tokenize", "/health", "/v1/models", "/"))
    assert all(400 in statuses[path] for path in POSTS)


# ---------------------------------------------------------------- HTTP itself

ASKED = b'{"prompt": "Hi"}'
CHUNKED = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUESTS = {  # what is sent, and the statuses of what comes back
    "without HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", [400]),
    "1.0": (b"POST /tokenize HTTP/1.0\r\nContent-Length: 16\r\n\r\n" + ASKED, [200]),
    "0.9": (b"GET /\r\n\r\n", [400]),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", [400]),
    "strange host": (b"GET /nowhere HTTP/1.1\r\nHost: [a:\x80//@#?\r\n\r\n", [403]),
    "chunked": (CHUNKED + b"a\r\n" + ASKED[:10] + b"\r\n6\r\n" + ASKED[10:] + b"\r\n0\r\n\r\n", [200]),
    "bad chunk": (CHUNKED + b"zz\r\n" + ASKED + b"\r\n0\r\n\r\n", [400]),
    "endless chunks": (
        CHUNKED + b"10000\r\n" + b"[" * 65536 + b"\r\n" + (b"10000\r\n" + b"[" * 65536 + b"\r\n") * 16,
        [413],
    ),
    "bad length": (b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", [400]),
    "huge length": (b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 20 + b"\r\n\r\n", [413]),
    "endless length": (b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", [400]),
    "no length": (b"POST /tokenize HTTP/1.1\r\nHost: a\r\n\r\n", [400]),
    "two lengths": (b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", [400]),
    "long header": (b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 10**6 + b"\r\n\r\n", [400]),
    "many headers": (b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: x\r\n" * 200_000 + b"\r\n", [400]),
    "strange path": (b"GET /%00%ff%2e%2e/\xe4? HTTP/1.1\r\nHost: a\r\n\r\n", [400]),
    "wrong bytes in a path": (b"GET /v1/models/%ff%00%ed%a0%80..%2f HTTP/1.1\r\nHost: a\r\n\r\n", [404]),
    "strange method": (b"BREW /generate HTTP/1.1\r\nHost: a\r\n\r\n", [405]),
    "websocket": (b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", [200]),
    "pipelined": (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 50, [200] * 50),
    "pipelined after work": (
        (b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 16\r\n\r\n" + ASKED) * 2
        + b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n",
        [200, 200, 404],
    ),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_http_that_is_strange_is_answered_or_refused(chat_process, still_answers, kind):
    sent, statuses = REQUESTS[kind]
    with socket.create_connection(("127.0.0.1", chat_process.port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):  # it may refuse before it has read all
            connection.sendall(sent)
        answer = bytearray()
        with contextlib.suppress(ConnectionError):
            while answer.count(b"HTTP/1.1 ") < len(statuses) and (new := connection.recv(65536)):
                answer += new
    got = [int(part[:3]) for part in bytes(answer).split(b"HTTP/1.1 ")[1:]]
    assert got == statuses or (got == [] and len(sent) > 500_000)  # a reset may overtake the refusal


def test_a_client_that_waits_for_100_continue_is_told_to_go_on_or_refused_before_it_sends(chat_process):
    head = "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", chat_process.port), timeout=20) as connection:
        connection.sendall(head.format(16).encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        connection.sendall(ASKED)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    with socket.create_connection(("127.0.0.1", chat_process.port), timeout=20) as connection:
        connection.sendall(head.format(10**9).encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
