"""The page at /, driven in headless Chromium against a real server of a tiny model."""

import dataclasses
import json
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import serving
from browser import chromium, opened

pytestmark = pytest.mark.system

KEY = "the-key-of-these-tests"
PROMPT = "# it's 中文 and 😀\n"
ANSWERS = "/v1/completions"
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script><svg onload=alert(3)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A chat model with room for texts that take a second or more, and the key."""
    path = tmp_path_factory.mktemp("page") / serving.CHAT_NAME
    config = dataclasses.replace(serving.MODEL, n_positions=2048)
    serving.save_as_run(path, serving.make_model(chat=True, config=config))
    path.with_name("keys.txt").write_text(KEY, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def server(folder):
    """Has one slot and one place in the queue."""
    flags = ("--api-key-file", str(folder.with_name("keys.txt")), "--open", "page", "metrics")
    with serving.started(folder, *flags, "--slots", "1", "--queue", "1", "--chunk", "1", key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with chromium() as made:
        yield made


@pytest.fixture
def page(browser, server):
    with opened(browser, server.url, KEY) as shown:
        choose_completion(shown)
        yield shown


def choose_completion(page):
    page.wait_for_selector("#facts:not(:empty)")
    page.click("#tab-completion")


def set_fields(page, **values):
    for name, value in values.items():
        page.fill(f"#set-{name}", str(value))


def finish(page):
    page.wait_for_selector("#go:not([hidden])")


def generate(page, prompt=None, **values) -> str:
    """The text after one press of the button."""
    set_fields(page, **values)
    if prompt is not None:
        page.fill("#text", prompt)
    page.click("#go")
    finish(page)
    return page.input_value("#text")


def requests(server, where: str) -> float:
    """How many are "running", or "waiting"."""
    return float(re.search(rf"^jaxgpt_requests_{where} (\S+)$", server.get("/metrics").text, re.M)[1])


def wait_for(page, is_true, seconds=10):
    for _ in range(seconds * 20):
        if is_true():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it did not come to be")


def faked(*chunks: dict):
    """Answers with these chunks of a stream."""
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    return lambda route: route.fulfill(status=200, headers={"content-type": "text/event-stream"}, body=body)


def failing(status: int, message: str):
    error = {"error": {"message": message, "type": "x", "param": None, "code": None}}
    return lambda route: route.fulfill(status=status, json=error)


# ---------------------------------------------------------------- completions


def test_the_model_goes_on_with_the_text_and_each_token_tells_how_likely_it_was(page, server):
    text = generate(page, PROMPT, max_tokens=60, temperature=1.5, seed=7)
    asked = dict(
        max_tokens=60, temperature=1.5, top_p=0.95, top_k=50, min_p=0, repetition_penalty=1, seed=7, logprobs=5
    )
    [choice] = server.post(ANSWERS, prompt=PROMPT, **asked).json["choices"]
    assert text == PROMPT + choice["text"] and not choice["text"].isascii()
    assert page.text_content("#mirror") == text  # the colours lie under the same characters
    assert "60 tokens" in page.text_content("#result") and "seed 7" in page.text_content("#result")
    assert "max tokens reached" in page.text_content("#result")
    told = page.evaluate("jaxgpt.shown()")
    assert "".join(segment["text"] for segment in told) == text
    parts = [part for segment in told for part in segment.get("parts", [])]
    logprobs = choice["logprobs"]
    assert [part["name"] for part in parts] == logprobs["tokens"][: len(parts)] and len(parts) > 50
    assert [part["logprob"] for part in parts] == pytest.approx(logprobs["token_logprobs"][: len(parts)], abs=1e-4)
    assert any(len(segment["parts"]) > 1 for segment in told[1:])  # a character of several tokens


def test_a_tokens_card_opens_by_pointer_and_by_cursor_keys_and_an_alternative_can_be_taken(page):
    text = generate(page, "Hi", max_tokens=30, temperature=1, seed=1)
    [segment] = page.evaluate("jaxgpt.shown().slice(1).filter((one) => one.parts.length === 1).slice(0, 1)")
    place = page.evaluate("jaxgpt.shown().findIndex((one) => one.parts?.length === 1)")
    box = page.locator("#mirror span").nth(place).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#card:not([hidden])")
    assert f"log-probability {segment['parts'][0]['logprob']:.3f}" in page.text_content("#card p")
    assert page.locator("#card tr").count() >= 5
    page.mouse.move(2, 2)
    page.wait_for_selector("#card", state="hidden")
    page.focus("#text")
    page.keyboard.press("Control+Home")
    page.keyboard.press("ArrowRight")
    assert page.is_hidden("#card")  # what a person wrote has no probability
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#card:not([hidden])")
    assert "%" in page.text_content("#announcer")
    page.keyboard.press("Escape")
    assert page.is_hidden("#card")
    for _ in range(20):  # to a token with an alternative that is whole characters
        page.keyboard.press("ArrowRight")
        if page.locator("#card button").count():
            break
    page.locator("#card button").first.click()
    page.wait_for_selector("#card", state="hidden")
    finish(page)
    changed = page.input_value("#text")
    assert changed != text and changed.startswith("Hi")
    page.click("#undo")
    assert page.input_value("#text") == text


def test_text_comes_while_it_is_made_and_stop_or_escape_frees_the_slot(page, server):
    set_fields(page, max_tokens=2000, temperature=0)
    for stop in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        page.fill("#text", "Hi")
        page.click("#go")
        for _ in range(3):  # it grows, again and again
            length = len(page.input_value("#text"))
            wait_for(page, lambda: len(page.input_value("#text")) > length)  # noqa: B023
        assert requests(server, "running") == 1
        stop()
        finish(page)
        wait_for(page, lambda: requests(server, "running") == 0)
        assert "you stopped it" in page.text_content("#result")
        assert page.input_value("#text").startswith("Hi")


def test_regenerate_makes_another_text_after_the_same_beginning_and_with_a_fixed_seed_the_same(page):
    first = generate(page, "Hi", max_tokens=30, temperature=1)
    page.click("#again")
    finish(page)
    second = page.input_value("#text")
    assert second != first and second.startswith("Hi")
    page.click("#keep-seed")
    page.click("#again")
    finish(page)
    assert page.input_value("#text") == second
    more = generate(page)  # Continue
    assert more.startswith(second) and len(more) > len(second)
    page.click("#undo")
    assert page.input_value("#text") == second


def test_editing_keeps_the_tokens_that_it_does_not_touch(page):
    edit = "(segments, text) => jaxgpt.edited(segments, text)"
    token = lambda text: {"text": text, "parts": [], "run": 1}
    edited = lambda segments, text: page.evaluate(f"([segments, text]) => ({edit})(segments, text)", [segments, text])
    before = [{"text": "ab"}, token(" cd"), token("😀"), token("ef")]
    assert edited(before, "ab cd😀ef!") == [*before, {"text": "!"}]
    assert edited(before, "ab cX😀ef") == [{"text": "ab"}, *({"text": t} for t in (" c", "X")), *before[2:]]
    assert edited(before, "ab cd😁ef") == [*before[:2], {"text": "😁"}, before[3]]
    assert edited(before, "") == []


def test_a_text_that_fills_the_context_is_refused_here_with_both_numbers(page):
    page.fill("#text", "word" * 2000)
    page.click("#go")
    page.wait_for_selector("#failure:not([hidden])")
    assert re.search(r"has 8,000 tokens.*2,048.*leave out 5,953 or more", page.text_content("#failure"))


# ---------------------------------------------------------------- chat


def test_a_chat_turn_an_edited_branch_another_answer_and_the_rest_of_one(page, server):
    page.click("#tab-chat")
    set_fields(page, max_tokens=12, temperature=1, seed=3)
    page.fill("#draft", "你好")
    page.keyboard.press("Control+Enter")
    finish(page)
    answers, asked = page.locator(".assistant .body"), page.locator(".user .body")
    rules = dict(max_tokens=12, temperature=1, top_k=50, top_p=0.95, seed=3)
    messages = [{"role": "user", "content": "你好"}]
    [choice] = server.post("/v1/chat/completions", messages=messages, **rules).json["choices"]
    first = choice["message"]["content"]
    assert answers.all_text_contents() == [first] and asked.all_text_contents() == ["你好"]
    page.focus(".assistant .body")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#card:not([hidden])")

    page.fill("#draft", "And?")
    page.keyboard.press("Enter")
    finish(page)
    assert answers.count() == 2 and answers.nth(0).text_content() == first

    page.locator(".user button", has_text="Edit").first.click()
    page.fill(".message textarea", "Bye")
    page.click(".message button.primary")
    finish(page)
    assert asked.all_text_contents() == ["Bye"] and answers.count() == 1  # a branch of its own
    page.locator(".user button", has_text="‹").click()
    assert asked.all_text_contents() == ["你好", "And?"] and answers.nth(0).text_content() == first

    set_fields(page, seed="")
    page.locator(".assistant button", has_text="Regenerate").last.click()
    finish(page)
    assert "2/2" in page.locator(".assistant").last.text_content()
    short = answers.last.text_content()
    page.locator(".assistant button", has_text="Continue").last.click()
    finish(page)
    longer = answers.last.text_content()
    assert longer.startswith(short.rstrip("�")) and len(longer) > len(short)
    page.reload()
    page.wait_for_selector("#facts:not(:empty)")  # a chat is drawn once the model is known
    assert asked.all_text_contents() == ["你好", "And?"] and answers.last.text_content() == longer


def test_five_turns_on_the_page_are_answered_as_plain_requests_are(page, server):
    page.click("#tab-chat")
    set_fields(page, max_tokens=8, temperature=0)
    messages = []
    for turn in ("Hi", "你好", "And? 😀", "é", "ok"):
        page.fill("#draft", turn)
        page.keyboard.press("Control+Enter")
        finish(page)
        messages.append({"role": "user", "content": turn})
        told = server.post("/v1/chat/completions", messages=messages, max_tokens=8, temperature=0).json
        messages.append({"role": "assistant", "content": told["choices"][0]["message"]["content"]})
    expected = [message["content"] for message in messages[1::2]]
    assert page.locator(".assistant .body").all_text_contents() == expected and all(expected)


def test_a_model_without_a_template_has_no_chat_view(browser, server):
    def without(route):
        card = server.get("/v1/models").json
        card["data"][0]["has_chat_template"] = False
        route.fulfill(json=card)

    with opened(browser, server.url, KEY, {"**/v1/models": without}) as page:
        page.wait_for_selector("#facts:not(:empty)")
        assert page.is_hidden("#tabs") and page.is_visible("#text")


def test_a_model_with_a_template_begins_as_a_chat_with_questions_to_try(browser, server):
    card = server.get("/v1/models").json
    assert card["data"][0]["examples"] == {}
    asked = {"en": [EVIL, "Spell cat."], "zh": ["你是谁？"]}
    card["data"][0]["examples"] = asked
    with opened(browser, server.url, KEY, {"**/v1/models": lambda route: route.fulfill(json=card)}) as page:
        page.wait_for_selector("#facts:not(:empty)")
        assert page.is_visible("#draft") and page.is_hidden("#text")
        set_fields(page, max_tokens=5)
        page.fill("#draft", "my own")
        buttons = page.locator("#turns button")
        assert buttons.all_text_contents() == asked["en"] and page.evaluate(UNNAMED) == []
        page.click("#language")
        assert buttons.all_text_contents() == asked["zh"] and buttons.first.get_attribute("lang") == "zh-CN"
        page.click("#language")
        buttons.first.focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        finish(page)
        assert page.locator(".user .body").all_text_contents() == ["Spell cat."]
        assert page.locator(".assistant .body").count() == 1 and page.locator(".examples").count() == 0
        assert page.input_value("#draft") == "my own" and page.evaluate("document.activeElement.id") == "draft"
        page.click("#new")
        assert buttons.all_text_contents() == asked["en"]


# ---------------------------------------------------------------- what goes wrong


def test_a_server_with_keys_asks_for_one_which_stays_in_this_tab_and_out_of_commands(browser, server):
    with opened(browser, server.url) as page:
        for key in ("wrong", KEY):
            page.wait_for_selector("#key[open]")
            page.fill("#key-field", key)
            page.keyboard.press("Enter")
        choose_completion(page)
        assert generate(page, "Hi", max_tokens=5) != "Hi"
        assert KEY in page.evaluate("JSON.stringify(sessionStorage)")
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")
        assert KEY not in page.evaluate("jaxgpt.asCurl()")
        assert KEY not in page.content()


def test_the_copied_command_is_the_request_word_for_word_in_a_real_shell(page, server):
    prompt = "it's $HOME `id` \"x\" \\ 中文 😀\n'; echo '"
    page.fill("#text", prompt)
    set_fields(page, stops="a'b\n\\n\\n", seed=5)
    script = "curl() { printf '%s\\0' \"$@\"; }\n" + page.evaluate("jaxgpt.asCurl()")
    printed = subprocess.run(["bash", "-c", script], env={"JAXGPT_API_KEY": "k e'y"}, capture_output=True, check=True)
    arguments = printed.stdout.decode().split("\0")[:-1]
    assert arguments[:2] == ["-N", f"{server.url}/v1/completions"] and arguments[-2] == "-d"
    assert "Authorization: Bearer k e'y" in arguments
    body = json.loads(arguments[-1])
    assert (body["prompt"], body["stop"], body["seed"]) == (prompt, ["a'b", "\n\n"], 5)
    assert server.post_json(ANSWERS, body).status == 200


def test_a_full_server_is_waited_for_with_a_countdown_and_then_answers(page, server):
    crowd = threading.Event()

    def ask(_):
        while not crowd.is_set():
            server.post(ANSWERS, prompt="Hi", max_tokens=2000, temperature=0)

    with ThreadPoolExecutor(4) as others:  # one has the slot, one waits, two are told to come back
        asking = others.map(ask, range(4))
        wait_for(page, lambda: requests(server, "running") == 1 and requests(server, "waiting") == 1)
        page.fill("#text", "Hi")
        page.click("#go")
        page.wait_for_selector("#failure:not([hidden])")
        told = page.text_content("#failure")
        crowd.set()
    list(asking)
    assert re.search(r"The server is busy. Trying again in \d+ s", told)
    page.wait_for_selector("#mirror .token")  # by itself
    finish(page)
    assert page.is_hidden("#failure") and len(page.input_value("#text")) > 2


def test_an_error_in_the_middle_of_a_stream_is_shown_and_what_came_is_kept(browser, server):
    chunk = {"choices": [{"index": 0, "text": "abc", "finish_reason": None, "logprobs": None}]}
    route = faked(chunk, {"error": {"message": "the engine failed", "type": "server_error"}})
    with opened(browser, server.url, KEY, {f"**{ANSWERS}": route}) as page:
        choose_completion(page)
        assert generate(page, "Hi") == "Hiabc"
        assert "the engine failed" in page.text_content("#failure")


def test_html_in_a_prompt_an_answer_a_name_or_an_error_stays_text(browser, server):
    logprobs = {
        "tokens": [EVIL],
        "token_logprobs": [-1.0],
        "top_logprobs": [{EVIL: -1.0, "x": -2.0}],
        "text_offset": [0],
    }
    choice = {"index": 0, "text": EVIL, "finish_reason": "stop", "logprobs": logprobs}
    card = server.get("/v1/models").json
    card["data"][0] |= {"id": EVIL, "system": EVIL}
    routes = {
        "**/v1/models": lambda route: route.fulfill(json=card),
        f"**{ANSWERS}": faked({"choices": [choice]}),
        "**/v1/chat/completions": failing(400, EVIL),
        "**/tokenize": lambda route: route.fulfill(json={"tokens": [1], "count": 1, "max_model_len": 9}),
    }
    with opened(browser, server.url, KEY, routes) as page:
        choose_completion(page)
        own = page.evaluate("document.querySelectorAll('img, svg, script').length")
        assert generate(page, EVIL) == EVIL + EVIL
        box = page.locator("#mirror .token").bounding_box()
        page.mouse.move(box["x"] + 5, box["y"] + 5)
        page.wait_for_selector("#card:not([hidden])")
        assert EVIL.replace(" ", "␣") in page.text_content("#card")
        page.click("#tab-chat")
        page.fill("#draft", EVIL)
        page.click("#go")
        page.wait_for_selector("#failure:not([hidden])")
        assert EVIL in page.text_content("#failure") and page.text_content(".user .body") == EVIL
        page.click("#open-history")
        assert EVIL[:40] in page.text_content("#entries")
        page.wait_for_timeout(100)
        assert page.evaluate("document.querySelectorAll('img, svg, script').length") == own == 1


# ---------------------------------------------------------------- the stream's format

READ = """async ([bytes, cuts]) => {
  const data = Uint8Array.from(bytes), results = [];
  for (const at of cuts) {
    const pieces = at === null ? [...data].map((byte) => Uint8Array.of(byte)) : [data.slice(0, at), data.slice(at)];
    const stream = new ReadableStream({ start(to) { pieces.forEach((piece) => to.enqueue(piece)); to.close(); } });
    const events = [];
    for await (const event of jaxgpt.eventsOf(stream)) events.push(event);
    results.push(JSON.stringify(events));
  }
  return results;
}"""


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_an_event_stream_cut_at_any_byte_is_the_same_text(page, end):
    texts = ["你好 😀", '{"a":"\\n"}', " two spaces", "[DONE]"]
    lines = [
        ": ping",
        "",
        *(line for text in texts for line in (f"data: {text}", "")),
        "data: a",
        "data:b",
        "",
        "id: 1",
        "",
    ]
    content = "".join(line + end for line in lines).encode()
    read = page.evaluate(READ, [list(content), [*range(len(content) + 1), None]])
    assert len(read) == len(content) + 2
    assert set(read) == {json.dumps([*texts, "a\nb"], ensure_ascii=False, separators=(",", ":"))}


# ---------------------------------------------------------------- history, languages, sizes


def test_history_is_exported_imported_and_cleared_and_another_file_is_refused(page, tmp_path):
    text = generate(page, PROMPT, max_tokens=8)
    page.click("#new")
    assert page.input_value("#text") == ""
    page.click("#open-history")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "history.json"
    download.value.save_as(file)
    assert json.loads(file.read_text(encoding="utf-8"))["format"] == "jaxgpt-history"
    page.click("#clear")
    page.click("#clear")  # asked once more
    assert page.locator("#entries .title").count() == 0
    (tmp_path / "bad.json").write_text('{"format": "jaxgpt-history", "entries": [{"id": "1", "segments": "no"}]}')
    page.set_input_files("#file", tmp_path / "bad.json")
    wait_for(page, lambda: "not a history" in page.text_content("#history p"))
    page.set_input_files("#file", file)
    wait_for(page, lambda: page.locator("#entries .title").count() == 1)
    page.click("#entries .title")
    assert page.input_value("#text") == text and page.locator("#mirror .token").count() > 0


UNNAMED = """[...document.querySelectorAll("button, input, select, textarea")]
  .filter((one) => !(one.tagName === "BUTTON" && one.textContent.trim()) && !one.ariaLabel && !one.labels?.length)
  .map((one) => one.outerHTML)"""


@pytest.mark.parametrize("locale, word", [("zh-CN", "生成"), ("en-US", "Generate")])
def test_at_360_pixels_nothing_sticks_out_and_every_control_has_a_name_in_both_languages(browser, server, locale, word):
    viewport = {"width": 360, "height": 640}
    with opened(
        browser, server.url, KEY, viewport=viewport, locale=locale, color_scheme="dark", has_touch=True
    ) as page:
        choose_completion(page)
        assert page.text_content("#go") == word
        page.click("summary")
        generate(page, "longwordwithoutspaces" * 9, max_tokens=5)
        box = page.locator("#mirror .token").first.bounding_box()
        page.touchscreen.tap(box["x"] + 3, box["y"] + 8)
        page.wait_for_selector("#card:not([hidden])")
        assert page.evaluate("document.querySelector('#card').getBoundingClientRect().right") <= 360
        page.touchscreen.tap(5, 5)
        assert page.is_hidden("#card")
        for view in ("chat", "completion"):
            page.click(f"#tab-{view}")
            assert page.evaluate("document.documentElement.scrollWidth") == 360
            assert page.evaluate(UNNAMED) == []


def test_when_the_server_dies_what_came_is_kept_and_can_be_tried_again(page, server):
    """The last test: it kills the server of this file."""
    set_fields(page, max_tokens=2000, temperature=0)
    page.fill("#text", "Hi")
    page.click("#go")
    wait_for(page, lambda: len(page.input_value("#text")) > 20)
    server.process.kill()
    finish(page)
    assert "What came is kept" in page.text_content("#failure")
    kept = page.input_value("#text")
    assert len(kept) > 20
    page.click("#failure button")  # Try again
    wait_for(page, lambda: "cannot be reached" in page.text_content("#failure"))
    assert page.input_value("#text") == kept
