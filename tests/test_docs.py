"""The documentation is true: commands parse, the English tutorial runs, links lead somewhere, the site builds.

A code block whose commands need what a test machine has not got stands under a comment, `<!-- needs: docker -->`.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
from pages import FENCE, ROOT, arguments_of, blocks, commands, our_commands, relative, shell_lines

from jaxgpt import cli
from jaxgpt.__main__ import VERBS
from jaxgpt.config import load_config, sections
from jaxgpt.errors import UserError
from jaxgpt.tuning.space import read_space

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = [ENGLISH, CHINESE, *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = {"en": ROOT / "docs" / "tutorial.md", "zh": ROOT / "docs" / "zh" / "tutorial.md"}
SETTINGS = tuple(f"--{name}." for name in sections())
# What a command line says instead of a value of the reader's own, and a value to parse it with.
PLACEHOLDERS = {
    "C": "configs/quickstart.toml",
    "FILE": "configs/quickstart.toml",
    "N": "1",
    "M": "1",
    "K": "1",
    "S": "1",
    "X": "1",
    "T": "1",
}
ELSEWHERE = {  # options that no test gives to their verb, and why
    "--config": "every verb with settings has it",
    "--help": "every verb has it",
    "--tfds-data-dir": "test_evaluation_tasks.py reads such a folder through the function below",
    "--points": "drills of half an hour and more, run by hand; docs/reliability.md has what came of them",
    "--devices": "the same",
}


class Parsed(Exception):
    """Ends a command where its arguments have been read."""


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """A function that has a verb read its arguments, and checks the settings and files that they name."""
    original = cli._Parser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    monkeypatch.setattr(cli._Parser, "parse_args", stop)
    monkeypatch.chdir(ROOT)

    def parse(words: list[str], written: dict[str, Path]):
        verb, *arguments = words
        assert verb in VERBS, f"there is no verb {verb}"
        arguments = [PLACEHOLDERS.get(word, word) for word in arguments if not word.startswith(("...", "["))]
        if not arguments:
            return
        try:
            importlib.import_module(f"jaxgpt.{verb}").main.__wrapped__(arguments)
        except Parsed as parsed:
            namespace = parsed.args[0]
        check_parsed(verb, namespace, written)

    def check_parsed(verb: str, namespace, written: dict[str, Path]) -> None:
        if verb == "launch" and namespace.verb:
            parse([word for word in namespace.verb if word != "--"], written)
        config = getattr(namespace, "config", None)
        if config is None:
            return
        config = written.get(config, config)
        overrides = {key: value for key, value in vars(namespace).items() if "." in key and value != "VALUE"}
        built = load_config(config, overrides)
        if verb == "sweep" and namespace.vary:
            read_space(namespace.vary, built)

    return parse


def written_configs(page: Path, folder: Path) -> dict[str, Path]:
    """The config files that a page has its reader write, {"my.toml": FILE}: as a here-document, or under their name."""
    (folder / "configs").symlink_to(ROOT / "configs")
    found = {}
    for block in blocks(page):
        documents = re.findall(r"cat > (\S+\.toml) <<'?(\w+)'?\n(.*?)^\2$", block.text, re.MULTILINE | re.DOTALL)
        named = re.match(r"# (\S+\.toml)\n", block.text) if block.language == "toml" else None
        for name, text in [(name, text) for name, _, text in documents] + ([(named[1], block.text)] if named else []):
            found[name] = folder / name
            found[name].write_text(text, encoding="utf-8")
    return found


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_command_is_one_that_the_program_takes(page, parse, tmp_path):
    written = written_configs(page, tmp_path)
    for shown in our_commands(page):
        made = next((word for word in shown.words if word.startswith("runs/") and word.endswith(".toml")), None)
        known = written | ({made: ROOT / "configs" / "quickstart.toml"} if made else {})
        complaint = ""
        try:
            parse(shown.words, known)
        except (UserError, AssertionError, SystemExit) as error:
            complaint = str(error)
        if shown.in_a_sentence and ("required" in complaint or "expected at least one argument" in complaint):
            continue
        assert complaint == shown.error, f"{shown.where}: {' '.join(shown.words)}"


def test_commands_are_found():
    counts = {relative(page): len(our_commands(page)) for page in PAGES}
    assert (
        counts["README.md"] >= 10
        and counts["docs/guide.md"] >= 15
        and counts["docs/tutorial.md"] >= 15
        and counts["docs/tuning.md"] >= 5
    )


def test_every_option_that_a_page_shows_is_given_to_its_verb_in_a_test():
    tests = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py")}
    tests["run"] = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    del tests[Path(__file__).name]
    untried = {}
    for shown in (shown for page in PAGES for shown in our_commands(page)):
        verb, *words = shown.words
        mine = [t for t in tests.values() if re.search(rf"jaxgpt\.{verb}\b|import [\w, ]*\b{verb}\b|\"{verb}\"", t)]
        assert mine, f"{shown.where}: no test runs {verb}"
        before = words[: words.index("--")] if "--" in words else words
        for option in {word.split("=")[0] for word in before if word.startswith("--")}:
            is_setting = option.startswith(SETTINGS) or option in ELSEWHERE
            if not is_setting and not any(option in text for text in mine):
                untried[f"{verb} {option}"] = shown.where
    assert not untried, "no test gives these to their verb"


# ---------------------------------------------------------------- what pages name


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{relative(page)}: no {target}"
        if anchor:
            assert anchor in anchors(file), f"{relative(page)}: {target}: there are {sorted(anchors(file))}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site's builder and GitHub both write those of plain words."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_files_and_extras_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    folders = "benchmarks|configs|deploy|docs|jaxgpt|notebooks|tests|tpu_scripts"
    for name in set(re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\.(?:py|toml|sh|md|yaml|ipynb))\b", text)):
        assert re.search(r"[A-Z]{3}", name) or (ROOT / name).exists(), f"{relative(page)} names {name}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for found in re.findall(r"pip install [^\n]*?['\"](?:-e )?(?:jaxgpt|\.)\[([\w,]+)\]", text):
        assert {*found.split(",")} <= {*extras}, f"{relative(page)} installs [{found}]"


def test_the_page_of_settings_is_that_of_the_program():
    page = ROOT / "docs" / "configuration.md"
    current = runpy.run_path(str(ROOT / "docs" / "configuration.py"))["reference"]()
    assert page.read_text(encoding="utf-8") == current, "out of date; renew it: python docs/configuration.py"


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        (ENGLISH, CHINESE),
        *((ROOT / "docs" / f"{name}.md", ROOT / "docs" / "zh" / f"{name}.md") for name in ("guide", "speedrun")),
    ],
    ids=["README", "guide", "speedrun"],
)
def test_the_chinese_page_has_the_headings_and_the_commands_of_the_english_one(english, chinese):
    """It may have more commands: those of an example in Chinese, under `<!-- only here -->`."""

    def outline(page: Path) -> list[str]:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        return re.findall(r"^(#+) ", text, re.MULTILINE)

    def shown(page: Path) -> list[str]:
        text = re.sub(r"<!-- only here -->\s*```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        lines = [line for match in FENCE.finditer(text) if match[2] in ("", "sh") for line in shell_lines(match[3])]
        ours = [words for line in lines for words in commands(line) if arguments_of(words) or words[0] == "pip"]
        return [" ".join(words) for words in ours]

    assert outline(chinese) == outline(english)
    assert shown(chinese) == shown(english)


def test_the_chinese_page_on_serving_has_the_sections_the_code_and_the_figures_of_the_english_one():
    def shown(page: Path) -> tuple[object, ...]:
        code, text = FENCE.findall(page.read_text(encoding="utf-8")), FENCE.sub("", page.read_text(encoding="utf-8"))
        figures = re.findall(r"\d[\d,.]*\d|\d", re.sub(r"`[^`\n]*`", "", text))
        return (
            code, re.findall(r"^(#+) ", text, re.MULTILINE), {*re.findall(r"`([^`\n]+)`", text)}, sorted(figures),
            text.count("\n|"),
        )  # fmt: skip

    english, chinese = (shown(ROOT / "docs" / language / "serving.md") for language in ("", "zh"))
    assert chinese == english


def test_messages_that_troubleshooting_quotes_are_those_of_the_program():
    """Those of the headings; dots stand for what differs."""
    others = ("ERROR: Package", "The TPU is already in use", "DEADLINE_EXCEEDED")  # pip's and jax's
    source = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "jaxgpt").rglob("*.py")))
    source = re.sub(r"[\"']\s*\n\s*(?:\+ )?f?[\"']", "", source)  # literals that stand one under another are one
    source = re.sub(r"\{[^{}\n]*\}", "...", source)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (.*)$", page, re.MULTILINE)
    assert len(headings) >= 20
    for message in re.findall(r"`([^`]+)`", "\n".join(headings)):
        if not message.startswith(others):
            pieces = [piece.strip(" ,") for piece in message.split("...")]
            lost = [piece for piece in pieces if piece and piece not in source]
            assert not lost, f"{message}: the program never says {lost}"


# ---------------------------------------------------------------- the tutorials, as they stand, only smaller

TINY = {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "data.max_bytes": 300_000,
    "data.num_proc": 1,
    "train.max_steps": 4,
    "train.per_device_train_batch_size": 1,
    "optimizer.name": "adamw",  # whose step compiles in half the time
    "optimizer.warmup_steps": 1,
    "eval.eval_steps": 2,
    "eval.eval_batches": 1,
    "eval.sample_tokens": 4,
    "eval.chat_prompts": 2,
    "checkpoint.save_steps": 2,
    "log.tensorboard": "false",
}
SMALLER = {
    "train": [word for name, value in TINY.items() for word in (f"--{name}", str(value))],
    "sample": ["--max-new-tokens", "4"],
    "serve": ["--port", "0", "--slots", "1", "--queue", "4", "--chunk", "4"],
}
SMALLER |= {"prepare": SMALLER["train"], "sweep": SMALLER["train"]}
PLAIN = ("cat", "cp", "mkdir", "python", "echo")


def tutorial_steps(page: Path) -> list[tuple[str, object]]:
    """What a reader types, in order: ("ours", words), ("ask", words) of curl, or ("shell", text)."""
    steps: list[tuple[str, object]] = []
    for block in blocks(page):
        if block.language != "sh" or block.needs:
            continue
        rest = block.text
        while rest:
            document = re.match(r"(cat > \S+ <<'(\w+)'\n.*?^\2\n)", rest, re.MULTILINE | re.DOTALL)
            line = document[1] if document else re.match(r"(?:.*\\\n)*.*\n?", rest)[0]
            rest = rest[len(line) :]
            if document:
                steps.append(("shell", line))
                continue
            for words in commands(line.replace("\\\n", " ")):
                kind = "ours" if arguments_of(words) else "ask" if words[0] == "curl" else "shell"
                assert kind != "shell" or words[0] in PLAIN, f"{relative(page)}: mark what this needs: {line}"
                steps.append((kind, arguments_of(words) or (words if kind == "ask" else shlex.join(words))))
    return steps


def run_shell(text: str) -> None:
    subprocess.run(["bash", "-ec", text.replace("python ", f"{sys.executable} ", 1)], check=True)


def run_ours(verb: str, arguments: list[str]) -> None:
    more = SMALLER.get(verb, [])
    if "--find-learning-rate" in arguments:
        more = [*more, "--train.max_steps", "30"]
    code = importlib.import_module(f"jaxgpt.{verb}").main([*arguments, *more])
    assert code == 0, f"{verb} {' '.join(arguments)}: exit code {code}"


@contextlib.contextmanager
def served(arguments: list[str]):
    """The server of a tutorial, on a free port; gives its address."""
    command = [sys.executable, "-m", "jaxgpt.serve", *arguments, *SMALLER["serve"]]
    log, deadline = Path("serve.log"), time.monotonic() + 120
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stderr=file, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        while "ready after" not in (told := log.read_text(encoding="utf-8")):
            assert process.poll() is None and time.monotonic() < deadline, told
            time.sleep(0.1)
        yield re.search(r"http://[\w.]+:\d+", told)[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text(encoding="utf-8")
    finally:
        process.kill()
        process.wait()


def ask(words: list[str], address: str) -> bytes:
    """What curl would get: its address, -H and -d."""
    [url] = [word for word in words if word.startswith("http")]
    data = words[words.index("-d") + 1].encode() if "-d" in words else None
    headers = dict(words[place + 1].split(": ") for place, word in enumerate(words) if word == "-H")
    url = url.replace("http://127.0.0.1:8000", address)
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
        return answer.read()


def follow(page: str, without: list[str]) -> None:
    """Do what a tutorial says, in this folder; not these verbs."""
    asked = 0
    with contextlib.ExitStack() as running:
        address = ""
        for kind, what in tutorial_steps(Path(page)):
            print(f"> {what if isinstance(what, str) else ' '.join(what)}", flush=True)
            if kind == "shell":
                run_shell(what)
            elif kind == "ask":
                json.loads(ask(what, address))
                asked += 1
            elif what[0] == "serve":
                address = running.enter_context(served(what[1:]))
                assert b"<html" in ask([address], address)
            elif what[0] not in without:
                run_ours(what[0], what[1:])
    assert address and asked


def test_the_chinese_tutorial_has_the_commands_of_the_english_one_in_their_order():
    """It may leave some out, and has files and texts of its own; its options are ones that the English one shows."""
    english, chinese = (
        [(what[0] if kind == "ours" else kind, {word for word in what if word.startswith("--")})
         for kind, what in tutorial_steps(TUTORIALS[language]) if kind != "shell"]
        for language in ("en", "zh")
    )  # fmt: skip
    rest = iter(verb for verb, _ in english)
    assert all(verb in rest for verb, _ in chinese), f"{chinese} are not in the order of {english}"
    for verb, options in chinese:
        assert options <= set().union(*(shown for other, shown in english if other == verb)), verb
    assert len(chinese) >= 15


def run_in_a_process(code: str, folder: Path) -> None:
    """Run `code`, which may import this file, in a folder with our configs, on one device as a reader would."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "jaxgpt").symlink_to(ROOT / "jaxgpt")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    command = [sys.executable, "-c", f"import test_docs; {code}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


# Doctor has tests of its own, and looks at this machine. What differs in the Chinese tutorial is its data.
@pytest.mark.parametrize(
    ("language", "without"),
    [
        pytest.param("en", ["doctor"], marks=pytest.mark.system),
        pytest.param("zh", ["doctor"], marks=pytest.mark.chaos),
    ],
)
def test_a_tutorial_runs_from_its_first_command_to_its_last(language, without, tmp_path):
    run_in_a_process(f"test_docs.follow({str(TUTORIALS[language])!r}, {without})", tmp_path)


def make_data(page: str) -> None:
    """Write the files of a tutorial in this folder, and prepare the data of its first training."""
    prepared = 0
    for kind, what in tutorial_steps(Path(page)):
        if kind == "shell":
            run_shell(what)
        elif kind == "ours" and what[0] == "prepare":
            run_ours(what[0], what[1:])
            prepared += 1
    assert prepared


@pytest.mark.system
def test_the_data_of_the_chinese_tutorial_is_made_and_prepared(tmp_path):
    run_in_a_process(f"test_docs.make_data({str(TUTORIALS['zh'])!r})", tmp_path)


# ---------------------------------------------------------------- the site


@pytest.mark.system
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    if importlib.util.find_spec("material") is None and "CI" not in os.environ:
        pytest.skip("mkdocs-material is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    assert not re.search(r"^(WARNING|ERROR)", built.stderr, re.MULTILINE), built.stderr
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]+", page.read_text())
        fetched = [tag for tag in fetched if 'rel="canonical"' not in tag]
        assert not fetched, f"{page.name} fetches {fetched}"
