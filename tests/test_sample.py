"""The command `sample`: what it prints, where, and what it says to a bad flag or file."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import sample
from jaxgpt.config import Config, to_json
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.inference.decoder import build_decoder, generate
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.model import gpt2
from jaxgpt.settings import ModelConfig
from jaxgpt.training.checkpoint import Checkpoints
from jaxgpt.training.models import load_model
from jaxgpt.training.step import TrainState

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=32, dtype="float32")
RULE = f"\n{'-' * 80}\n"


def make_run(run: Path, config: ModelConfig) -> Path:
    """A run folder as `train` leaves it; its tokens are bytes, its weights are random and large."""
    tokenizer = train_bpe(["no merges"], 257)
    tokenizer.save(run / "tokenizer")
    (run / "config.json").write_text(to_json(Config(model=config)))
    rng = np.random.default_rng(0)
    _, shapes, _ = gpt2.abstract_model(config, tokenizer.vocab_size)
    params = jax.device_put(jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes))
    checkpoints = Checkpoints(run, Config().checkpoint)
    checkpoints.save(1234, TrainState(jnp.asarray(1234), params, {"moments": jnp.zeros(())}), {}, 1.0)
    checkpoints.close()
    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("sample") / "run", MODEL)


def continuations(checkpoint: Path, prompt: str, keep: int = 10**6, **options):
    """(tokenizer, what the decoder makes of the last `keep` tokens of the prompt)."""
    model = load_model(checkpoint)
    decoder = build_decoder(model.config.model, 257, model.params, model.tokenizer.end_of_text, None)
    [made] = generate(decoder, [model.tokenizer.encode(prompt)[-keep:]], SamplingOptions(**options))
    return model.tokenizer, made


def texts(checkpoint: Path, prompt: str, **options) -> list[str]:
    tokenizer, made = continuations(checkpoint, prompt, **options)
    return [tokenizer.decode(continuation.tokens) for continuation in made]


def expected(checkpoint: Path, prompt: str, **options) -> str:
    """What the command prints, put together from the parts."""
    return RULE.join(prompt + text for text in texts(checkpoint, prompt, **options)) + "\n"


def run(checkpoint, *flags):
    return sample.main(["--checkpoint", str(checkpoint), *map(str, flags)])


def test_texts_go_to_stdout_with_their_prompt_and_a_ruled_line_between(checkpoint, capsys):
    prompt, flags = "def ñ", ["--max-new-tokens", "12", "--num-return-sequences", "3", "--seed", "4"]
    assert run(checkpoint, "--prompt", prompt, *flags) == 0
    out, err = capsys.readouterr()
    loaded, speed = err.splitlines()
    assert loaded == f"{checkpoint}, step 1,234, 0.0M parameters, float32"
    assert speed.split()[1:4] == ["tokens", "in", speed.split()[3]] and "tokens per second" in speed
    # Random bytes end and begin inside characters: they are replaced, and nothing fails.
    assert out == expected(checkpoint, prompt, max_new_tokens=12, num_return_sequences=3, seed=4)

    run(checkpoint, "--prompt", prompt, *flags)
    assert capsys.readouterr().out == out
    run(checkpoint, "--prompt", prompt, *flags[:-1], "5")
    assert capsys.readouterr().out != out


def test_without_a_prompt_the_text_starts_from_end_of_text(checkpoint, capsys):
    assert run(checkpoint, "--max-new-tokens", "12", "--temperature", "0") == 0
    assert capsys.readouterr().out == expected(checkpoint, "", max_new_tokens=12, temperature=0)


def test_one_steps_folder_is_a_checkpoint_too(checkpoint, capsys):
    assert run(checkpoint / "checkpoints" / "1234", "--prompt", "a", "--max-new-tokens", "5") == 0
    assert capsys.readouterr().out == expected(checkpoint, "a", max_new_tokens=5)


def test_on_a_terminal_the_one_text_comes_in_pieces_and_is_the_same(checkpoint, capsys, monkeypatch):
    flags = ["--prompt", "你好", "--max-new-tokens", "16"]
    run(checkpoint, *flags)
    whole = capsys.readouterr().out
    pieces, write = [], sys.stdout.write
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "write", lambda text: pieces.append(text) or write(text))
    assert run(checkpoint, *flags) == 0
    assert capsys.readouterr().out == whole == "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 3


def test_a_text_longer_than_the_context_is_refused_in_one_line(checkpoint, capsys):
    assert run(checkpoint, "--prompt", "1234567890", "--max-new-tokens", "30") == 2
    out, err = capsys.readouterr()
    error = err.splitlines()[-1]
    assert out == "" and error.startswith("error: --prompt: ")
    assert "10 tokens and 30 new ones are 8 more than the model's n_positions = 32" in error
    assert error.endswith("at most 22 new tokens, shorten the prompt, or set truncate")


def test_truncate_continues_the_end_of_a_long_prompt_and_says_so(checkpoint, capsys):
    prompt = "0123456789" * 5
    assert run(checkpoint, "--prompt", prompt, "--max-new-tokens", "12", "--truncate") == 0
    out, err = capsys.readouterr()
    assert "--prompt: cut to the last 20 of its 50 tokens\n" in err
    assert out == prompt + expected(checkpoint, prompt, keep=20, max_new_tokens=12).removeprefix(prompt)
    run(checkpoint, "--prompt", "short", "--max-new-tokens", "12", "--truncate")
    assert "cut" not in capsys.readouterr().err


def test_stop_texts_and_stop_tokens_end_a_text_and_are_not_in_it(checkpoint, capsys):
    tokenizer, [made] = continuations(checkpoint, "ab", max_new_tokens=16)
    text = tokenizer.decode(made.tokens)
    stop, token = text[len(text) // 2 :][:2], made.tokens[7]
    run(checkpoint, "--prompt", "ab", "--max-new-tokens", "16", "--stop", "not there", "--stop", stop)
    assert capsys.readouterr().out == "ab" + text[: text.index(stop)] + "\n"
    run(checkpoint, "--prompt", "ab", "--max-new-tokens", "16", "--stop-token-id", token)
    assert capsys.readouterr().out == "ab" + tokenizer.decode(made.tokens[: made.tokens.index(token)]) + "\n"


def test_logprobs_lists_each_token_after_its_text(checkpoint, capsys):
    tokenizer, [made] = continuations(checkpoint, "ab", max_new_tokens=5)
    run(checkpoint, "--prompt", "ab", "--max-new-tokens", "5", "--logprobs")
    lines = capsys.readouterr().out.removeprefix(expected(checkpoint, "ab", max_new_tokens=5)).splitlines()
    pairs = zip(made.logprobs, made.tokens, strict=True)
    assert lines == [f"{logprob:10.4f}  {tokenizer.decode([token])!r}" for logprob, token in pairs]


def test_the_weights_can_be_of_another_format(checkpoint, capsys):
    assert run(checkpoint, "--prompt", "ab", "--max-new-tokens", "5", "--weights", "int8") == 0
    out, err = capsys.readouterr()
    assert out.startswith("ab") and err.splitlines()[0].endswith(", int8")


# ---------------------------------------------------------------- files of prompts


def test_a_file_of_prompts_is_continued_line_by_line_whatever_the_batch(checkpoint, tmp_path, capsys):
    prompts = ["a", "你好\u2028世界", " \tx"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*prompts, ""]).encode())
    whole = "".join(expected(checkpoint, prompt, max_new_tokens=9) + RULE[1:] for prompt in prompts)
    for batch in (1, 2):
        assert run(checkpoint, "--prompt-file", file, "--max-new-tokens", "9", "--batch-size", batch) == 0
        assert capsys.readouterr().out == whole.removesuffix(RULE[1:])


def test_jsonl_is_one_object_a_prompt(checkpoint, tmp_path, capsys):
    prompts = ["two\nlines", "", "你好 🙂"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt, "id": 1}) for prompt in prompts))
    flags = ["--max-new-tokens", "9", "--num-return-sequences", "2"]
    assert run(checkpoint, "--prompt-file", file, "--jsonl", *flags) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for prompt, record in zip(prompts, records, strict=True):
        _, made = continuations(checkpoint, prompt, max_new_tokens=9, num_return_sequences=2)
        logprobs = record.pop("logprobs")
        assert record == {
            "prompt": prompt,
            "texts": texts(checkpoint, prompt, max_new_tokens=9, num_return_sequences=2),
            "finish_reasons": [continuation.finish_reason for continuation in made],
            "tokens": [continuation.tokens for continuation in made],
        }
        for row, continuation in zip(logprobs, made, strict=True):
            np.testing.assert_allclose(row, continuation.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("a.txt", b"one\ntwo \xff\n", "a.txt, line 2: not UTF-8 (byte 0xff at position 5)"),
        ("a.txt", "hé".encode("utf-16"), "a.txt, line 1: not UTF-8 (byte 0xff at position 1)"),
        ("a.txt", b"one\n\ntwo\n", "a.txt, line 2: an empty line"),
        ("a.txt", b"one\n \t\r\n", "a.txt, line 2: an empty line"),
        ("a.txt", b"", "a.txt: no prompt in it"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "a.jsonl, line 2: not JSON ("),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not JSON ("),
        ("a.jsonl", b'"text"', 'a.jsonl, line 1: it must be an object with a text "prompt"'),
        ("a.jsonl", b'{"text": "x"}', 'a.jsonl, line 1: it must be an object with a text "prompt"'),
        ("a.jsonl", b'{"prompt": 3}', 'a.jsonl, line 1: it must be an object with a text "prompt"'),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "a.jsonl, line 1: not valid Unicode (lone surrogate U+D800"),
    ],
)
def test_a_bad_file_is_told_with_its_line_before_anything_is_loaded(tmp_path, name, content, told, capsys):
    (tmp_path / name).write_bytes(content)
    assert run("runs/nothing", "--prompt-file", tmp_path / name) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {tmp_path}") and told in err and err.count("\n") == 1


def test_a_missing_file_and_a_folder_are_told(tmp_path, capsys):
    for path, told in ((tmp_path / "none.txt", "No such file"), (tmp_path, "Is a directory")):
        assert run("runs/nothing", "--prompt-file", path) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: --prompt-file {path}: {told}") and err.count("\n") == 1


def test_a_prompt_too_long_in_a_file_is_told_with_its_line_before_any_is_continued(checkpoint, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("short\n" + "long" * 8 + "\n")
    assert run(checkpoint, "--prompt-file", tmp_path / "a.txt", "--max-new-tokens", "5", "--batch-size", "1") == 2
    out, err = capsys.readouterr()
    assert out == "" and f"error: {tmp_path / 'a.txt'}, line 2: a prompt of 32 tokens and 5 new" in err


# ---------------------------------------------------------------- one prompt after another


def stdin_of(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding="ascii")


def test_interactive_continues_each_line_alone_and_survives_bad_ones(checkpoint, capsys, monkeypatch):
    lines = ["ñ", "", "too long" * 9, "b\udcff", "ñ", "/quit", "never"]
    monkeypatch.setattr(sys, "stdin", stdin_of("\n".join(lines).encode("utf-8", "surrogateescape")))
    assert run(checkpoint, "--interactive", "--max-new-tokens", "12") == 0
    out, err = capsys.readouterr()
    [text] = texts(checkpoint, "ñ", max_new_tokens=12)
    assert out == f"{text}\n{text}\n"
    _, too_long, not_utf8, _ = err.splitlines()
    assert too_long.startswith("error: the prompt: a prompt of 72 tokens and 12 new ones are 52 more")
    assert not_utf8 == "error: the prompt: not valid Unicode (byte 0xff at position 2)"


def test_interactive_shows_several_continuations_with_a_ruled_line_between(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", stdin_of(b"a\n"))
    assert run(checkpoint, "--interactive", "--max-new-tokens", "12", "--num-return-sequences", "2") == 0
    both = texts(checkpoint, "a", max_new_tokens=12, num_return_sequences=2)
    assert capsys.readouterr().out == RULE.join(both) + "\n"


# A process without jax's threads gives the command a terminal of its own, and passes on what is typed and shown.
TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


class Terminal:
    """A user at a terminal."""

    def __init__(self, *command: str):
        environment = os.environ | {"TERM": "dumb", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", TERMINAL, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        self._patience = threading.Timer(120, self._process.kill)  # then all reads end, and the test fails
        self._patience.start()

    def type(self, text: str) -> None:
        self._process.stdin.write(text.encode())

    def read_until(self, end: str) -> str:
        """What is shown up to `end`, with it; all of it where the command ends before."""
        shown = b""
        while not shown.endswith(end.encode()) and (byte := self._process.stdout.read(1)):
            shown += byte
        return shown.decode()

    def read(self, count: int) -> bytes:
        return self._process.stdout.read(count)

    def close(self) -> tuple[str, int]:
        """What else is shown, and the exit code."""
        with self._process:
            shown = self._process.stdout.read().decode()
            code = self._process.wait()
        self._patience.cancel()
        return shown, code


@pytest.mark.system
def test_a_session_on_a_terminal_streams_stops_an_answer_at_ctrl_c_and_ends_at_ctrl_d(tmp_path):
    checkpoint = make_run(tmp_path / "run", dataclasses.replace(MODEL, n_positions=2048))
    flags = ["--checkpoint", str(checkpoint), "--max-new-tokens", "2000", "--temperature", "0"]
    _, [whole] = continuations(checkpoint, "好", max_new_tokens=2000, temperature=0)
    assert len(whole.tokens) == 2000  # it does not end by itself

    terminal = Terminal(sys.executable, "-m", "jaxgpt.sample", *flags)  # a terminal needs no --interactive
    assert "Ctrl-C stops the answer" in terminal.read_until("\n> ")
    terminal.type("好\n")
    terminal.read_until("好\r\n")  # the echo
    assert terminal.read(20)  # the answer is being made
    terminal.type("\x03")
    terminal.read_until("\n> ")
    terminal.type("\x04")
    shown, code = terminal.close()
    [made] = re.findall(r"([\d,]+) tokens in", shown)
    assert 0 < int(made.replace(",", "")) < 2000 and code == 0


# ---------------------------------------------------------------- flags, streams, locale


def test_the_flags_have_the_names_and_defaults_of_the_options():
    settings = vars(sample.parser().parse_args(["--checkpoint", "x"]))
    options = vars(SamplingOptions())
    assert {name: settings[name] for name in options} == options | {"stop": [], "stop_token_ids": []}


@pytest.mark.parametrize(
    "flag, value, told",
    [
        ("--temperature", "-0.5", "temperature = -0.5"),
        ("--temperature", "nan", "temperature = nan"),
        ("--top-k", "-1", "top_k = -1"),
        ("--top-p", "0", "top_p = 0.0"),
        ("--top-p", "1.5", "top_p = 1.5"),
        ("--min-p", "-1", "min_p = -1.0"),
        ("--repetition-penalty", "0", "repetition_penalty = 0.0"),
        ("--num-return-sequences", "0", "num_return_sequences = 0"),
        ("--max-new-tokens", "0", "max_new_tokens = 0"),
        ("--seed", "-1", "seed = -1"),
        ("--stop", "", "stop"),
        ("--stop", "a\udcff", "--stop: not valid Unicode (byte 0xff at position 2)"),
        ("--stop-token-id", "-1", "stop_token_ids"),
        ("--batch-size", "0", "--batch-size = 0"),
        ("--prompt", "ab\udce4", "--prompt: not valid Unicode (byte 0xe4 at position 3)"),
        ("--weights", "int4", "--weights: invalid choice: 'int4'"),
        ("--top-k", "many", "--top-k: invalid int value: 'many'"),
        ("--topk", "3", "did you mean --top-k?"),
    ],
)
def test_a_bad_flag_exits_with_2_and_one_line(flag, value, told, capsys):
    assert run("runs/nothing", flag, value) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and told in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--prompt", "a", "--prompt-file", "b"], "--prompt-file: not allowed with argument --prompt"),
        (["--prompt", "a", "--interactive"], "--interactive: not allowed with argument --prompt"),
        (["--interactive", "--jsonl"], "--jsonl is for programs"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, told, capsys):
    assert run("runs/nothing", *flags) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_the_checkpoint_is_asked_for(capsys):
    assert sample.main([]) == 2
    assert "--checkpoint" in capsys.readouterr().err


def test_stdout_is_utf8_whatever_the_locale(checkpoint, capsys, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run(checkpoint, "--prompt", "你好", "--max-new-tokens", "5") == 0
    assert written.getvalue().decode() == expected(checkpoint, "你好", max_new_tokens=5)


@pytest.mark.system
def test_help_answers_without_jax_and_names_every_flag():
    code = (
        "import sys; from jaxgpt import sample\ntry: sample.main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    )
    helped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    names = [name.replace("_", "-").removesuffix("s") for name in vars(SamplingOptions())]
    for name in ("checkpoint", "prompt", "prompt-file", "interactive", "jsonl", "truncate", "weights", *names):
        assert f"--{name}" in helped.stdout
