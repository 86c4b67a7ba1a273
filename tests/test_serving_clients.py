"""Conversations of five turns by the clients that people have: each sends back the answers in its own form.

They are installed outside of the environment of the tests, in the folder that JAXGPT_CLIENTS names (.ci/run makes it):

    python -m venv F && F/bin/pip install 'openai>=3' langchain-openai
    npm install --prefix F openai ai @ai-sdk/openai-compatible && export JAXGPT_CLIENTS=F

Without it these tests are skipped, except on a CI machine (the variable CI is set), where they fail.
"""

import contextlib
import dataclasses
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import serving
from browser import chromium

pytest_plugins = ["serving"]
pytestmark = pytest.mark.system

TURNS = ["Hi", "你好", "And? 😀", "é", "ok"]
OPTIONS = {"model": serving.CHAT_NAME, "max_tokens": 8, "temperature": 0}
PAGE = """<pre></pre><script type="module">
const shown = document.querySelector("pre");
try {
  const { default: OpenAI } = await import("/node_modules/openai/index.mjs");
  const client = new OpenAI({ baseURL: "ADDRESS", apiKey: "none", dangerouslyAllowBrowser: true, maxRetries: 0 });
  const messages = [{ role: "user", content: "Hi" }];
  const answer = await client.chat.completions.create({ messages, model: "tiny-chat", max_tokens: 8, temperature: 0 });
  shown.textContent = "answer: " + answer.choices[0].message.content;
} catch (error) {
  shown.textContent = "error: " + error;
}
</script>"""


@pytest.fixture(scope="module")
def clients() -> Path:
    folder = os.environ.get("JAXGPT_CLIENTS")
    if not folder or not shutil.which("node"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs node, and JAXGPT_CLIENTS: see this file")
    return Path(folder)


class Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(a folder, the port where it is served), for pages of other origins."""
    folder = tmp_path_factory.mktemp("site")
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory, site):
    path = tmp_path_factory.mktemp("long") / serving.CHAT_NAME
    config = dataclasses.replace(serving.MODEL, n_positions=256)
    serving.save_as_run(path, serving.make_model(chat=True, config=config))
    with serving.started(path, "--cors-origin", f"http://127.0.0.1:{site[1]}") as running:
        yield running


def conversation(server, **fields) -> list[str]:
    """The answers, each asked for with the plain messages before it."""
    messages: list[dict] = []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        answer = server.post("/v1/chat/completions", messages=messages, **OPTIONS, **fields)
        assert answer.status == 200, answer.body
        if fields.get("stream"):
            deltas = [choice["delta"] for event in answer.events for choice in event["choices"]]
            content = "".join(delta.get("content", "") for delta in deltas)
        else:
            content = answer.json["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": content})
    return [message["content"] for message in messages[1::2]]


@pytest.fixture(scope="module")
def expected(server) -> list[str]:
    answers = conversation(server)
    assert len(set(answers)) > 2 and all(answers)
    return answers


def told_by(*command: str | Path, url: str) -> list:
    done = subprocess.run([*command, f"{url}/v1", json.dumps(TURNS)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("package", ["openai", "langchain"])
def test_python_clients_converse_in_five_turns_streamed_and_not(clients, server, expected, package):
    program = Path(__file__).with_name("clients.py")
    whole, streamed, version = told_by(clients / "bin" / "python", program, package, url=server.url)
    assert whole == streamed == expected
    assert int(version.split(".")[0]) >= 3


def test_the_openai_package_beside_the_tests_does_too(server, expected):
    """.ci/run has an older major version here than in the clients' environment."""
    program = Path(__file__).with_name("clients.py")
    whole, streamed, _ = told_by(sys.executable, program, "openai", url=server.url)
    assert whole == streamed == expected


@pytest.mark.parametrize("package", ["openai", "ai-sdk"])
def test_javascript_clients_converse_in_five_turns_streamed_and_not(clients, server, expected, package):
    program = clients / "clients.mjs"  # packages are looked for beside the program
    shutil.copy(Path(__file__).with_name("clients.mjs"), program)
    assert told_by("node", program, package, url=server.url) == [expected, expected]


@pytest.mark.parametrize("stream", [False, True])
def test_bodies_as_litellm_and_llama_index_send_them_are_answered(server, expected, stream):
    """Recorded from litellm 1.110 and llama-index-llms-openai-like 0.8, which take half a minute each to install."""
    assert conversation(server, stream=stream) == expected  # LlamaIndex: messages of role and content, nothing else
    assert conversation(server, **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}))


def test_openais_javascript_works_in_a_browser_at_an_allowed_origin_and_at_no_other(clients, server, site, expected):
    folder, port = site
    (folder / "index.html").write_text(PAGE.replace("ADDRESS", f"{server.url}/v1"), encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        (folder / "node_modules").symlink_to(clients / "node_modules")
    with chromium() as browser:
        told = []
        for host in ("127.0.0.1", "localhost"):  # one place, two origins
            page = browser.new_page()
            page.goto(f"http://{host}:{port}/")
            page.wait_for_selector("pre:not(:empty)")
            told.append(page.text_content("pre"))
    assert told[0] == f"answer: {expected[0]}"
    assert told[1].startswith("error: ") and "Connection error" in told[1]
