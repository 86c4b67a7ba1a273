"""The `openai` package against a server, its strict validation of answers on: every route, whole and streamed.

Where OpenAI's own server sends null for what its package declares a number or a word (`finish_reason` in a chunk of
a completion that goes on, the log-probability of an echoed prompt's first token), so do we: other clients rely on it.
Those answers are checked against the package's types with just these nulls filled in.
"""

import dataclasses
import re
import time
from threading import Timer

import openai
import pytest
import serving
from openai._models import validate_type
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

pytest_plugins = ["serving"]

MESSAGES = [{"role": "user", "content": "你好 😀"}]
SHORT = [{"role": "user", "content": "Hi"}]


def client_of(server: serving.Server, strict: bool = True, retries: int = 0) -> openai.OpenAI:
    key = server.key or "none"
    url = f"{server.url}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=retries, _strict_response_validation=strict)


@pytest.fixture(scope="module")
def base(base_server) -> openai.OpenAI:
    return client_of(base_server)


@pytest.fixture(scope="module")
def chat(chat_server) -> openai.OpenAI:
    return client_of(chat_server)


def ask(client: openai.OpenAI, prompt, **options) -> Completion:
    return client.completions.create(model=serving.BASE_NAME, prompt=prompt, **{"max_tokens": 12, "seed": 3} | options)


def talk(client: openai.OpenAI, messages=MESSAGES, **options) -> ChatCompletion:
    options = {"max_completion_tokens": 12, "seed": 3} | options
    return client.chat.completions.create(model=serving.CHAT_NAME, messages=messages, **options)


def texts(answer: Completion) -> list[str]:
    return [choice.text for choice in answer.choices]


# ---------------------------------------------------------------- completions


def test_a_prompt_is_text_or_token_ids_alone_or_in_a_list(base, base_server):
    prompts = ["你好", "the end 😀"]
    ids = [base_server.post("/tokenize", prompt=prompt).json["tokens"] for prompt in prompts]
    alone = [texts(ask(base, prompt))[0] for prompt in prompts]
    assert len(set(alone)) == 2 and all(alone)
    assert texts(ask(base, ids[0])) == alone[:1]
    for several in (prompts, ids):
        answer = ask(base, several)
        assert texts(answer) == alone and [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage.prompt_tokens == sum(map(len, ids)) and answer.usage.completion_tokens == 24
    assert answer.model == serving.BASE_NAME and abs(answer.created - time.time()) < 60


def test_n_gives_that_many_different_texts_and_the_first_is_the_one_alone(base):
    three = ask(base, ["Hi", "中"], n=3)
    assert [choice.index for choice in three.choices] == list(range(6)) and len(set(texts(three))) == 6
    assert [texts(three)[0], texts(three)[3]] == texts(ask(base, ["Hi", "中"]))


def test_a_seed_repeats_and_without_one_texts_differ(base):
    assert texts(ask(base, "Hi")) == texts(ask(base, "Hi")) != texts(ask(base, "Hi", seed=4))
    free = {text for _ in range(3) for text in texts(base.completions.create(model=serving.BASE_NAME, prompt="Hi"))}
    assert len(free) == 3


def test_temperature_0_is_greedy_and_sampling_rules_count(base):
    greedy = texts(ask(base, "Hi", temperature=0))
    assert greedy == texts(ask(base, "Hi", temperature=0, seed=9)) != texts(ask(base, "Hi"))
    assert texts(ask(base, "Hi", extra_body={"top_k": 1})) == greedy
    assert texts(ask(base, "Hi", top_p=1e-6)) == greedy
    assert texts(ask(base, "Hi", extra_body={"min_p": 1.0})) == greedy


def test_logprobs_name_the_tokens_of_the_text_and_the_likeliest_beside_each(base):
    answer = ask(base, "你好", logprobs=5, temperature=0)
    [choice] = answer.choices
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 12
    for name, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs):
        assert len(top) == 5 and top[name] == logprob == max(top.values()) < 0  # greedy: the likeliest
    assert told.text_offset[0] == 0 and told.text_offset == sorted(told.text_offset)
    assert told.text_offset[-1] <= len(choice.text)
    drawn = ask(base, "你好", logprobs=2).choices[0].logprobs
    assert all(len(top) in (2, 3) and name in top for name, top in zip(drawn.tokens, drawn.top_logprobs))
    only_own = ask(base, "你好", logprobs=0).choices[0].logprobs
    assert only_own.tokens == drawn.tokens
    assert only_own.top_logprobs == [{name: own} for name, own in zip(drawn.tokens, drawn.token_logprobs)]


def test_echo_puts_the_prompt_before_the_text(base):
    [alone] = texts(ask(base, "the end 😀"))
    assert texts(ask(base, "the end 😀", echo=True)) == [f"the end 😀{alone}"]


def test_a_prompt_is_scored_with_echo_as_its_text_would_be(base_server):
    fields = dict(prompt="the 中文 😀", max_tokens=9, seed=3, logprobs=3)
    plain, echoed, scored = (
        base_server.post("/v1/completions", **fields | more).json
        for more in ({}, {"echo": True}, {"echo": True, "max_tokens": 0})
    )
    told, with_prompt, only_prompt = (answer["choices"][0]["logprobs"] for answer in (plain, echoed, scored))
    length = len(only_prompt["tokens"])
    assert length == plain["usage"]["prompt_tokens"] and scored["usage"]["completion_tokens"] == 0
    assert scored["choices"][0]["text"] == "the 中文 😀" and scored["choices"][0]["finish_reason"] == "length"
    assert with_prompt["tokens"] == only_prompt["tokens"] + told["tokens"]
    assert with_prompt["token_logprobs"] == only_prompt["token_logprobs"] + told["token_logprobs"]
    shifted = [len("the 中文 😀") + offset for offset in told["text_offset"]]
    assert with_prompt["text_offset"] == only_prompt["text_offset"] + shifted
    assert only_prompt["token_logprobs"][0] is None and only_prompt["top_logprobs"][0] is None
    for answer in (echoed, scored):
        first = answer["choices"][0]["logprobs"]
        first["token_logprobs"][0], first["top_logprobs"][0] = 0.0, {}
        validate_type(type_=Completion, value=answer)
    # What was made counts the same when it is scored as a prompt.
    ids = base_server.post("/tokenize", prompt="中文中文").json["tokens"]
    greedy = base_server.post("/v1/completions", prompt=ids, max_tokens=1, temperature=0, logprobs=1).json
    made = greedy["choices"][0]["logprobs"]
    best = base_server.post("/v1/completions", prompt=[ids, ids], max_tokens=0, echo=True, logprobs=1).json
    assert best["choices"][0]["logprobs"] == best["choices"][1]["logprobs"]
    more = base_server.post("/v1/completions", prompt=[*ids, 5], max_tokens=0, echo=True, logprobs=1).json
    last = more["choices"][0]["logprobs"]["top_logprobs"][-1]
    assert last[made["tokens"][0]] == pytest.approx(made["token_logprobs"][0], abs=1e-4)


def test_stop_texts_end_the_text_before_them(base):
    [whole] = texts(ask(base, "Hi", max_tokens=60))
    stop = whole[20:22]
    for asked in (stop, [stop], ["never to come", stop]):
        answer = ask(base, "Hi", max_tokens=60, stop=asked)
        assert texts(answer) == [whole[: whole.index(stop)]] and answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 60
    assert ask(base, "Hi", max_tokens=60).choices[0].finish_reason == "length"


def test_a_streamed_completion_is_the_whole_one_in_parts(base, base_server):
    fields = dict(prompt=["你好", "Hi"], n=2, max_tokens=40, seed=5, logprobs=2, echo=True)
    whole = base_server.post("/v1/completions", **fields).json
    free = client_of(base_server, strict=False)
    options = {"include_usage": True}
    chunks = list(free.completions.create(model=serving.BASE_NAME, stream=True, stream_options=options, **fields))
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 8
    assert chunks[-1].choices == [] and chunks[-1].usage.to_dict() == whole["usage"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole["choices"]:
        own = [one for chunk in chunks for one in chunk.choices if one.index == choice["index"]]
        assert "".join(one.text for one in own) == choice["text"]
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [value for one in own for value in getattr(one.logprobs, name)] == values
    fields |= dict(stream=True, echo=False)
    for event in base_server.post("/v1/completions", **fields).events:
        assert "usage" not in event
        for choice in event["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "length"
        validate_type(type_=Completion, value=event)


def test_generate_answers_with_the_prompt_and_what_follows(base_server):
    fields = dict(prompt="the end", seed=2, temperature=1.0, top_k=0, top_p=1.0)
    two = base_server.post("/generate", max_new_tokens=10, num_return_sequences=2, **fields).json
    plain = base_server.post("/v1/completions", prompt="the end", seed=2, max_tokens=10, n=2).json
    assert [one["generated_text"] for one in two["sequences"]] == [f"the end{one['text']}" for one in plain["choices"]]
    assert two["generated_text"] == two["sequences"][0]["generated_text"] and two["usage"] == plain["usage"]
    length = two["usage"]["prompt_tokens"] + 10
    assert base_server.post("/generate", max_length=length, **fields).json["generated_text"] == two["generated_text"]


# ---------------------------------------------------------------- chats


def test_a_chat_is_answered_after_all_that_was_said(chat):
    first = talk(chat)
    assert first.choices[0].message.role == "assistant" and first.choices[0].message.content
    assert first.choices[0].finish_reason == "length" and first.usage.completion_tokens == 12
    other_system = talk(chat, [{"role": "system", "content": "Be brief."}, *MESSAGES])
    several = talk(chat, [*MESSAGES, {"role": "assistant", "content": "Hm"}, *MESSAGES])
    assert len({answer.choices[0].message.content for answer in (first, other_system, several)}) == 3
    assert several.usage.prompt_tokens > first.usage.prompt_tokens


def test_the_servers_system_message_stands_where_a_chat_has_none_and_parts_are_one_text(chat):
    answer = talk(chat).choices[0].message.content
    same = [
        [{"role": "system", "content": serving.SYSTEM}, *MESSAGES],
        [{"role": "developer", "content": serving.SYSTEM}, *MESSAGES],
        [{"role": "user", "content": [{"type": "text", "text": "你好 "}, {"type": "text", "text": "😀"}]}],
    ]
    assert [talk(chat, messages).choices[0].message.content for messages in same] == [answer] * 3


def test_chat_logprobs_have_each_tokens_bytes_and_the_likeliest_ones(chat):
    answer = talk(chat, logprobs=True, top_logprobs=4, n=2)
    assert answer.choices[0].message.content != answer.choices[1].message.content
    for choice in answer.choices:
        written = b"".join(bytes(place.bytes) for place in choice.logprobs.content)
        assert written.decode(errors="replace") == choice.message.content
        for place in choice.logprobs.content:
            values = [other.logprob for other in place.top_logprobs]
            assert len(values) == 4 and values == sorted(values, reverse=True) and place.logprob <= values[0]
    assert all(place.top_logprobs == [] for place in talk(chat, logprobs=True).choices[0].logprobs.content)
    assert talk(chat).choices[0].logprobs is None


def test_a_streamed_chat_is_the_whole_one_in_parts(chat):
    fields = dict(n=2, logprobs=True, top_logprobs=2, max_completion_tokens=40)
    whole = talk(chat, **fields)
    chunks: list[ChatCompletionChunk] = list(talk(chat, stream=True, stream_options={"include_usage": True}, **fields))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        own = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert own[0].delta.role == "assistant" and all(one.delta.role is None for one in own[1:])
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert [place for one in own if one.logprobs for place in one.logprobs.content] == choice.logprobs.content
    assert all(chunk.usage is None for chunk in talk(chat, stream=True))


def test_without_a_limit_an_answer_ends_with_its_turn_or_the_context(chat, chat_server):
    count = chat_server.post("/tokenize", messages=MESSAGES).json["count"]
    answer = chat.chat.completions.create(model=serving.CHAT_NAME, messages=MESSAGES, seed=1)
    assert answer.usage.prompt_tokens == count
    ended = answer.choices[0].finish_reason
    assert ended == "stop" or answer.usage.total_tokens == serving.MODEL.n_positions


@pytest.mark.system
def test_nothing_is_compiled_once_the_server_is_ready(chat_process):
    for length in (1, 20, 40, 100, 127):
        for more in ({}, {"logprobs": 3}, {"echo": True, "logprobs": 1}, {"temperature": 0, "n": 2}):
            answer = chat_process.post("/v1/completions", prompt=[1] * length, max_tokens=1, **more)
            assert answer.status == 200
    before, after = re.split(r"ready after [\d.]+ s\n", chat_process.output())
    assert "Compiling jit(admit)" in before and "Compiling" not in after


# ---------------------------------------------------------------- models and tokens


def test_models_are_listed_and_retrieved(base, chat):
    [model] = base.models.list().data
    assert model.id == serving.BASE_NAME and not model.has_chat_template
    assert base.models.retrieve(serving.BASE_NAME) == model
    [model] = chat.models.list().data
    assert model.has_chat_template and model.system == serving.SYSTEM
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        chat.models.retrieve("gpt-4")


def test_text_becomes_tokens_and_tokens_text(base_server):
    text = "你好 😀 <|endoftext|> ñ"
    told = base_server.post("/tokenize", prompt=text).json
    assert told["count"] == len(told["tokens"]) and told["max_model_len"] == serving.MODEL.n_positions
    assert told["tokens"] == serving.make_tokenizer().encode(text)
    assert base_server.post("/detokenize", tokens=told["tokens"]).json == {"prompt": text}


# ---------------------------------------------------------------- errors


def test_a_wrong_field_is_a_bad_request_that_names_it(base):
    with pytest.raises(openai.BadRequestError, match="best_of is not supported") as raised:
        ask(base, "Hi", best_of=2)
    assert (raised.value.param, raised.value.code, raised.value.type) == (
        "best_of",
        "unsupported",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError, match="n_positions = 128") as raised:
        ask(base, "Hi " * 100)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no chat model") as raised:
        base.chat.completions.create(model=serving.BASE_NAME, messages=MESSAGES)
    assert raised.value.code == "no_chat_template"


def test_a_wrong_key_and_a_wrong_model_have_their_own_errors(base, base_server):
    with pytest.raises(openai.AuthenticationError):
        ask(base.with_options(api_key="wrong"), "Hi")
    assert texts(ask(base.with_options(api_key=serving.KEYS[1]), "Hi")) == texts(ask(base, "Hi"))
    with pytest.raises(openai.NotFoundError, match="gpt-4") as raised:
        base.completions.create(model="gpt-4", prompt="Hi")
    assert raised.value.code == "model_not_found"


def test_a_full_queue_is_a_rate_limit_and_the_client_comes_back_when_it_is_told_to(small):
    with serving.threaded(small.app()) as server, small.full(server) as go:
        with pytest.raises(openai.RateLimitError) as raised:
            client_of(server).completions.create(model="small", prompt="Hi", max_tokens=3)
        assert raised.value.code == "queue_full" and raised.value.type == "rate_limit_error"
        wait, began = int(raised.value.response.headers["Retry-After"]), time.monotonic()
        Timer(0.2, go.set).start()
        answer = client_of(server, retries=1).completions.create(model="small", prompt="Hi", max_tokens=3)
        assert answer.choices[0].text and time.monotonic() - began >= wait >= 1


def test_a_server_that_loads_and_an_answer_that_takes_too_long_are_server_errors(small):
    loading = serving.Small(dataclasses.replace(small.served, engine=None), small.engine)
    with serving.threaded(loading.app()) as server, pytest.raises(openai.InternalServerError) as raised:
        client_of(server).completions.create(model="small", prompt="Hi")
    assert raised.value.status_code == 503 and raised.value.code == "loading"
    with serving.threaded(small.app(request_seconds=0.2)) as server, small.held():
        with pytest.raises(openai.InternalServerError) as raised:
            client_of(server, retries=2).completions.create(model="small", prompt="Hi")
        assert raised.value.status_code == 504 and raised.value.code == "deadline"
        assert 'status="504"} 1.0' in server.get("/metrics").text  # to ask again would take as long again


def test_what_goes_wrong_in_a_stream_raises_there(small):
    with serving.threaded(small.app(request_seconds=0.2)) as server, small.held():
        chunks = client_of(server).chat.completions.create(model="small", messages=SHORT, stream=True)
        with pytest.raises(openai.APIError, match="not ready after 0.2 s") as raised:
            list(chunks)
    assert raised.value.code == "deadline" and raised.value.type == "server_error"
