"""`sample --chat`: a conversation with history from a pipe or a terminal, single messages, and what is refused."""

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_sample import Terminal, run, stdin_of
from tiny import save_as_run

from jaxgpt.config import Config
from jaxgpt.data import chat
from jaxgpt.data.tokenizer import TEMPLATE, train_bpe
from jaxgpt.errors import UserError
from jaxgpt.inference.decoder import build_decoder, generate
from jaxgpt.inference.prompts import ChatPrompts, ChatSession
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.model import gpt2
from jaxgpt.settings import ChatConfig, ModelConfig
from jaxgpt.training.models import LoadedModel, load_model, write_huggingface

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=256, dtype="float32")
TOKENIZER = chat.with_chat_tokens(train_bpe(["no merges"], 257))
SYSTEM = "Be kind."
FLAGS = ("--max-new-tokens", "12", "--temperature", "1")


def make_model(tokenizer=TOKENIZER, likely: int | None = None, n_positions: int = 256) -> LoadedModel:
    """Random weights; the token `likely` is it everywhere."""
    config, rng = dataclasses.replace(MODEL, n_positions=n_positions), np.random.default_rng(0)
    _, shapes, _ = gpt2.abstract_model(config, tokenizer.vocab_size)
    params = jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes)
    if likely is not None:
        params["ln_f"]["bias"] = 3.0 * params["wte"][likely]
    return LoadedModel(Config(model=config, chat=ChatConfig(system=SYSTEM)), tokenizer.vocab_size, params, tokenizer, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "run"
    save_as_run(path, make_model())
    return path


@functools.cache
def loaded(checkpoint: Path):
    model = load_model(checkpoint)
    return model, build_decoder(MODEL, model.vocab_size, model.params, model.tokenizer.end_of_text)


def answer(checkpoint: Path, turns: list[str], system: str = SYSTEM, new: int = 12):
    """(text, finish reason) of the answer to the last of the turns, as FLAGS has it drawn."""
    model, decoder = loaded(checkpoint)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    prompt = chat.ChatEncoder(model.tokenizer, ChatConfig(system=system), MODEL.n_positions).prompt(messages)
    options = SamplingOptions(max_new_tokens=new, temperature=1, stop_token_ids=(model.tokenizer.end_of_turn,))
    [[made]] = generate(decoder, [prompt], options)
    return model.tokenizer.decode(made.tokens), made.finish_reason


def converse(checkpoint, monkeypatch, capsys, *lines: str, flags=FLAGS) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", stdin_of("\n".join(lines).encode()))
    assert run(checkpoint, "--chat", *flags) == 0
    return capsys.readouterr()


def test_each_line_of_a_pipe_is_answered_after_all_that_was_said(checkpoint, monkeypatch, capsys):
    first, _ = answer(checkpoint, ["Hi"])
    second, _ = answer(checkpoint, ["Hi", first, "好"])
    assert second != answer(checkpoint, ["好"])[0]  # the history counts
    out, _ = converse(checkpoint, monkeypatch, capsys, "Hi", "好")
    assert out == f"{first}\n{second}\n"


def test_reset_forgets_system_instructs_and_quit_ends(checkpoint, monkeypatch, capsys):
    first, _ = answer(checkpoint, ["Hi"])
    other, _ = answer(checkpoint, ["Hi"], system="Be brief.")
    none, _ = answer(checkpoint, ["Hi"], system="")
    path, _ = answer(checkpoint, ["/etc is a folder"], system="")
    assert len({first, other, none}) == 3
    lines = [
        "Hi",
        "/reset",
        "Hi",
        "/system Be brief.",
        "Hi",
        "/system",
        "Hi",
        "/reset",
        "/etc is a folder",
        "/quit",
        "Hi",
    ]
    out, err = converse(checkpoint, monkeypatch, capsys, *lines)
    assert out == "".join(f"{text}\n" for text in (first, first, other, none, path))
    assert err.count("(a new conversation)") == 4


def test_a_bad_line_is_told_and_the_conversation_goes_on_without_it(checkpoint, monkeypatch, capsys):
    first, _ = answer(checkpoint, ["Hi"])
    out, err = converse(checkpoint, monkeypatch, capsys, "  ", "x" * 300, "Hi")
    assert out == f"{first}\n"
    blank, too_long = [line for line in err.splitlines() if line.startswith("error: ")]
    assert blank == "error: the message is blank; write something"
    assert "takes " in too_long and "n_positions = 256; shorten it" in too_long


def test_one_message_is_answered_alone_and_files_line_by_line(checkpoint, tmp_path, capsys):
    texts = {message: answer(checkpoint, [message])[0] for message in ("Hi", "你好")}
    assert run(checkpoint, "--chat", "--prompt", "Hi", *FLAGS) == 0
    assert capsys.readouterr().out == f"{texts['Hi']}\n"
    (tmp_path / "a.txt").write_text("Hi\n你好\n", encoding="utf-8")
    assert run(checkpoint, "--chat", "--prompt-file", tmp_path / "a.txt", "--jsonl", *FLAGS) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {record["prompt"]: record["texts"] for record in records} == {key: [text] for key, text in texts.items()}


def test_jsonl_of_a_conversation_is_an_object_a_message(checkpoint, monkeypatch, capsys):
    first, reason = answer(checkpoint, ["Hi"])
    second, _ = answer(checkpoint, ["Hi", first, "Ho"])
    out, _ = converse(checkpoint, monkeypatch, capsys, "Hi", "Ho", flags=(*FLAGS, "--jsonl"))
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == ["Hi", "Ho"]
    assert [record["texts"] for record in records] == [[first], [second]]
    assert records[0]["finish_reasons"] == [reason]


def test_an_answer_ends_at_the_end_of_its_turn_here_and_in_transformers_settings(tmp_path, capsys):
    model = make_model(likely=TOKENIZER.end_of_turn)
    save_as_run(tmp_path / "run", model)
    (tmp_path / "hf").mkdir()
    write_huggingface(tmp_path / "hf", MODEL, model.vocab_size, model.params, TOKENIZER)
    flags = ("--max-new-tokens", "100", "--jsonl", "--prompt", "Hi", "--seed", "1")
    for folder, system in ((tmp_path / "run", ()), (tmp_path / "hf", ("--system", SYSTEM))):
        assert run(folder, "--chat", *system, *flags) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["finish_reasons"] == ["stop"] and len(record["tokens"][0]) < 100
        assert "<|im_end|>" not in record["texts"][0]
    settings = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [TOKENIZER.end_of_turn, TOKENIZER.end_of_text]
    assert settings["pad_token_id"] == TOKENIZER.end_of_text
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == TEMPLATE


def test_letters_of_special_tokens_in_a_message_are_text():
    prompts = ChatPrompts(TOKENIZER, 256, "a model")
    ids = prompts.fit([{"role": "user", "content": "<|im_end|><|endoftext|>"}], 12).ids
    assert (ids.count(TOKENIZER.end_of_turn), ids.count(TOKENIZER.end_of_text)) == (1, 0)


def test_when_the_context_is_full_the_oldest_turns_fall_out_whole_and_the_system_message_stays():
    session = ChatSession(ChatPrompts(TOKENIZER, 256, "a model"), SYSTEM)
    dropped = 0
    for number in range(20):
        prompt = session.ask(f"Question {number:02}", 40)
        dropped += prompt.dropped
        text = TOKENIZER.decode(prompt.ids)
        assert text.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nQuestion {dropped // 2:02}")
        assert text.endswith(f"Question {number:02}<|im_end|>\n<|im_start|>assistant\n") and len(prompt.ids) <= 256 - 40
        session.answered(f"Question {number:02}", f"Answer {number:02}")
    assert dropped > 10
    kept = len(session.messages)
    session.answered("Hello?", " ")  # stopped before its first word
    assert len(session.messages) == kept
    with pytest.raises(UserError, match="the message with the system message takes"):
        session.ask("x" * 200, 40)
    assert len(session.messages) == kept


def test_that_turns_fell_out_is_said_in_one_line(checkpoint, monkeypatch, capsys):
    _, err = converse(checkpoint, monkeypatch, capsys, *["Hello " * 8] * 4, flags=("--max-new-tokens", "30"))
    assert "(the context is full: the oldest 2 turns were left out)\n" in err


@pytest.mark.system
def test_a_session_on_a_terminal_stops_an_answer_at_ctrl_c_and_goes_on(tmp_path):
    save_as_run(tmp_path / "run", make_model(likely=TOKENIZER.encode("a")[0], n_positions=2048))
    flags = ["--checkpoint", str(tmp_path / "run"), "--chat", "--max-new-tokens", "1900", "--temperature", "0"]
    terminal = Terminal(sys.executable, "-m", "jaxgpt.sample", *flags)
    assert "/reset forgets" in terminal.read_until("\n> ")
    terminal.type("Hi\n")
    terminal.read_until("Hi\r\n")
    assert terminal.read(5)  # the answer is being made
    terminal.type("\x03")
    terminal.read_until("\n> ")
    terminal.type("/quit\n")
    shown, code = terminal.close()
    [made] = re.findall(r"([\d,]+) tokens in", shown)
    assert 0 < int(made.replace(",", "")) < 1900 and code == 0


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--chat", "--num-return-sequences", "2"], "a conversation goes on from one answer"),
        (["--chat", "--truncate", "--prompt", "a"], "--truncate: with --chat the oldest turns fall out"),
        (["--system", "Be kind.", "--prompt", "a"], "--system is for conversations"),
        (["--chat", "--system", "a\udcff", "--prompt", "a"], "--system: not valid Unicode"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, told, capsys):
    assert run("runs/nothing", *flags) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_a_model_without_chat_tokens_and_a_blank_message_are_refused_in_one_line(checkpoint, tmp_path, capsys):
    save_as_run(tmp_path / "plain", make_model(tokenizer=train_bpe(["no merges"], 257)))
    assert run(tmp_path / "plain", "--chat", "--prompt", "Hi") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'plain'}: no chat model") and 'data.format = "chat"' in error
    assert run(checkpoint, "--chat", "--prompt", " ") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: --prompt: the message is blank; write something"
