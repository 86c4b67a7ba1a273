"""The command `sample`: what it prints, where, and what it says to a bad flag."""

import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from jaxgpt import sample
from jaxgpt.config import Config, ModelConfig
from jaxgpt.inference.decode import generate
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.model import gpt2

VOCAB, END_OF_TEXT = 257, 256
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=32, dtype="float32")


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    vocab_size, end_of_text = VOCAB, END_OF_TEXT

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


@pytest.fixture
def checkpoint(monkeypatch):
    """Stands in for what `load_model` reads from disk; tests/ of training hold the reading itself to account."""
    rng = np.random.default_rng(0)
    _, shapes, _ = gpt2.abstract_model(MODEL, VOCAB)
    params = jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes)
    params = jax.device_put(params)
    loaded = types.SimpleNamespace(
        config=Config(model=MODEL), vocab_size=VOCAB, params=params, tokenizer=Bytes(), step=1234
    )
    module = types.SimpleNamespace(load_model=lambda path: loaded)
    monkeypatch.setitem(sys.modules, "jaxgpt.training.checkpoint", module)
    return loaded


def run(*flags):
    return sample.main(["--checkpoint", "runs/tiny", *flags])


def test_texts_go_to_stdout_with_their_prompt_and_a_ruled_line_between(checkpoint, capsys):
    prompt, flags = "def ñ", ["--max-new-tokens", "12", "--num-return-sequences", "3", "--seed", "4"]
    assert run("--prompt", prompt, *flags) == 0
    out, err = capsys.readouterr()
    assert err == "runs/tiny, step 1,234, 0.0M parameters, float32\n"

    options = SamplingOptions(max_new_tokens=12, num_return_sequences=3, seed=4)
    expected = generate(MODEL, VOCAB, checkpoint.params, list(prompt.encode()), options, END_OF_TEXT)
    # Random bytes end and begin inside characters: they are replaced, and nothing fails.
    texts = [prompt + bytes(tokens).decode(errors="replace") for tokens in expected]
    assert out == f"\n{'-' * 80}\n".join(texts) + "\n"

    run("--prompt", prompt, *flags)
    assert capsys.readouterr().out == out
    run("--prompt", prompt, *flags[:-1], "5")
    assert capsys.readouterr().out != out


def test_without_a_prompt_the_text_starts_from_end_of_text(checkpoint, capsys):
    assert run("--max-new-tokens", "12", "--temperature", "0", "--num-return-sequences", "3") == 0
    options = SamplingOptions(max_new_tokens=12, temperature=0, num_return_sequences=3)
    tokens, *_ = generate(MODEL, VOCAB, checkpoint.params, [END_OF_TEXT], options, END_OF_TEXT)
    text = bytes(tokens).decode(errors="replace")
    assert capsys.readouterr().out == f"\n{'-' * 80}\n".join([text] * 3) + "\n"


def test_a_text_longer_than_the_context_is_refused_in_one_line(checkpoint, capsys):
    assert run("--prompt", "1234567890", "--max-new-tokens", "30") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "10 tokens and 30 new ones are 8 more than the model's n_positions = 32" in error


def test_the_flags_have_the_defaults_of_the_options():
    settings = vars(sample.parser().parse_args(["--checkpoint", "x"]))
    assert settings.pop("checkpoint") == "x" and settings.pop("prompt") == ""
    assert SamplingOptions(**settings) == SamplingOptions()


@pytest.mark.parametrize(
    "flag, value, told",
    [
        ("--temperature", "-0.5", "temperature = -0.5"),
        ("--temperature", "nan", "temperature = nan"),
        ("--top-k", "-1", "top_k = -1"),
        ("--top-p", "0", "top_p = 0.0"),
        ("--top-p", "1.5", "top_p = 1.5"),
        ("--num-return-sequences", "0", "num_return_sequences = 0"),
        ("--max-new-tokens", "0", "max_new_tokens = 0"),
        ("--seed", "-1", "seed = -1"),
        ("--top-k", "many", "--top-k: invalid int value: 'many'"),
        ("--topk", "3", "did you mean --top-k?"),
    ],
)
def test_a_bad_flag_exits_with_2_and_one_line(flag, value, told, capsys):
    assert run(flag, value) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and told in err and err.count("\n") == 1


def test_the_checkpoint_is_asked_for(capsys):
    assert sample.main([]) == 2
    assert "--checkpoint" in capsys.readouterr().err


def test_help_answers_without_jax_and_names_every_flag():
    code = (
        "import sys; from jaxgpt import sample\ntry: sample.main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    )
    helped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    for flag in ("--checkpoint", "--prompt", "--max-new-tokens", "--num-return-sequences", "--temperature", "--seed"):
        assert flag in helped.stdout
