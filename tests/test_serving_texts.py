"""Texts over token borders: what a stream sends is the whole answer, with stop texts, Chinese, emoji and broken bytes.

The model writes parts of characters most of the time (see serving.py), so that characters, and stop texts, begin
in one token and end in another.
"""

import dataclasses
import json

import numpy as np
import pytest
import serving

from jaxgpt.inference.prompts import token_bytes
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.inference.text import complete

pytest_plugins = ["serving"]

PROMPTS, NEW = 80, 32
WORDS = ["你好", "世界", "😀", "👍🏽", "中文", "the end", "ñandú", "。", "\n", "café", "👩‍🚀", "a"]
STOPS = [["中"], ["😀", "e"], "\n", ["é", "你e"], [" ", "中\n", "h"], None, None, None]


@dataclasses.dataclass(frozen=True)
class Case:
    prompt: str
    fields: dict
    """Of the request, without the stop texts."""
    stop: list[str] | str | None
    free: dict
    """The whole answer without stop texts."""
    whole: dict
    streamed: list[dict]
    """Events."""


def prompt_of(number: int) -> str:
    draw = np.random.default_rng(number)
    return "".join(WORDS[draw.integers(len(WORDS))] for _ in range(1 + number % 5))


def both(server: serving.Server, path: str, fields: dict, stop) -> tuple[dict, dict, list[dict]]:
    """The answer without stop texts, the one with them, and the latter's events."""
    ended = fields | ({"stop": stop} if stop else {})
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    answers = [server.post(path, **one) for one in (fields, ended | stream, *([ended] if stop else []))]
    assert all(answer.status == 200 for answer in answers), answers
    return answers[0].json, answers[-1 if stop else 0].json, answers[1].events


@pytest.fixture(scope="module")
def completions(base_server) -> list[Case]:
    def case(number: int) -> Case:
        stop = STOPS[number % len(STOPS)]
        fields = dict(prompt=prompt_of(number), seed=number % 7, max_tokens=NEW, logprobs=1)
        return Case(fields["prompt"], fields, stop, *both(base_server, "/v1/completions", fields, stop))

    return serving.at_once(PROMPTS, case)


def name_bytes(name: str) -> bytes:
    r"""What the token of a name writes: `bytes:\xe4\xbd` stands for a part of a character."""
    return bytes.fromhex(name[6:].replace("\\x", "")) if name.startswith("bytes:") else name.encode()


def test_a_streamed_completion_is_the_whole_answer(completions):
    for case in completions:
        *events, last = case.streamed
        [choice] = case.whole["choices"]
        parts = [part for event in events for part in event["choices"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert last["usage"] == case.whole["usage"] and last["choices"] == []
        for name, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values
    assert sum(len(case.streamed) > 3 for case in completions) > PROMPTS / 2  # they did come in parts


def test_stop_texts_cut_where_the_first_begins_and_never_show(completions):
    stopped = 0
    for case in completions:
        [free], [choice] = case.free["choices"], case.whole["choices"]
        stop = [case.stop] if isinstance(case.stop, str) else case.stop or []
        cut = min((at for at in map(free["text"].find, stop) if at >= 0), default=None)
        assert choice["text"] == free["text"][:cut]
        if cut is not None:
            stopped += 1
            assert choice["finish_reason"] == "stop"
            tokens = choice["logprobs"]["tokens"]
            # The fewest tokens that hold the text: one less would not, and the stop text is not in them.
            assert tokens == free["logprobs"]["tokens"][: len(tokens)]
            assert case.whole["usage"]["completion_tokens"] == len(tokens) < NEW
            written = b"".join(map(name_bytes, tokens)).decode(errors="replace")
            assert written.startswith(choice["text"])
            fewer = b"".join(map(name_bytes, tokens[:-1])).decode(errors="ignore")
            assert not tokens or len(fewer) < max(len(choice["text"]), 1)
    assert PROMPTS / 4 < stopped < 3 * PROMPTS / 4


def test_whole_characters_come_of_parts_and_what_is_no_character_is_replaced_once(completions):
    split = 0
    for case in completions:
        [choice] = case.free["choices"]
        tokens = choice["logprobs"]["tokens"]
        assert b"".join(map(name_bytes, tokens)).decode(errors="replace") == choice["text"]
        assert case.free["usage"]["completion_tokens"] == len(tokens)
        alone = "".join(name for name in tokens if not name.startswith("bytes:"))
        split += sum(ord(character) > 0x7F and character not in alone for character in choice["text"].replace("�", ""))
        # Each token's text begins where it is said to.
        for name, at in zip(tokens, choice["logprobs"]["text_offset"]):
            assert name.startswith("bytes:") or "�" in choice["text"] or choice["text"].startswith(name, at)
    assert split > PROMPTS / 4  # characters that no single token held


def test_the_server_gives_the_text_that_the_library_gives_for_the_same_seed(completions):
    model = serving.make_model()
    decoder = serving.decoder_of(model)
    options = SamplingOptions(max_new_tokens=NEW, temperature=1.0, top_k=0, top_p=1.0)
    same = 0
    for stop, cases in ((None, completions[::7]), (STOPS[0], completions[::56] * 6)):  # all of seed 0; 12 each
        rules = dataclasses.replace(options, stop=tuple(stop or ()))
        made = complete(decoder, model.tokenizer, [case.prompt for case in cases], rules)
        for case, [one] in zip(cases, made, strict=True):
            [choice] = (case.whole if stop else case.free)["choices"]
            if (one.text, one.finish_reason) == (choice["text"], choice["finish_reason"]):
                same += 1
                continue
            # Rounding may change which of two tokens goes first that are as likely as each other, and nothing else.
            told = choice["logprobs"]
            own = [name_bytes(name) for name in told["tokens"]]
            places = zip(own, told["token_logprobs"], one.tokens, one.logprobs)
            first = next((a, b) for text, a, token, b in places if text != token_bytes(model.tokenizer, token))
            assert first[0] == pytest.approx(first[1], abs=1e-5)
    assert same >= 21


def test_a_streamed_chat_is_the_whole_answer_too(chat_server):
    def check(number: int) -> int:
        fields = dict(messages=[{"role": "user", "content": prompt_of(number)}], seed=number, max_tokens=NEW)
        stop = STOPS[number % len(STOPS)]
        _, whole, events = both(chat_server, "/v1/chat/completions", fields | {"logprobs": True}, stop)
        [choice] = whole["choices"]
        parts = [part for event in events for part in event["choices"]]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"] and events[-1]["usage"] == whole["usage"]
        told = [place for part in parts if part["logprobs"] for place in part["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"] and len(told) == whole["usage"]["completion_tokens"]
        for place in told:
            assert bytes(place["bytes"]) == name_bytes(place["token"])
        return len(parts)

    assert max(serving.at_once(24, check)) > 5


def test_texts_are_sent_as_utf_8_and_read_from_json_escapes(base_server):
    raw = json.dumps({"prompt": "你好 😀", "seed": 1}, ensure_ascii=True).encode()
    plain = json.dumps({"prompt": "你好 😀", "seed": 1}, ensure_ascii=False).encode()
    assert raw != plain
    first, second = (base_server.ask("POST", "/v1/completions", content).json for content in (raw, plain))
    assert first["choices"] == second["choices"]
    echoed = base_server.post("/v1/completions", prompt="你好 😀", max_tokens=1, echo=True)
    assert "你好 😀".encode() in echoed.body
