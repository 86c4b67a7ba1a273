"""The command `sample`: what it prints, where, and what it says to a bad flag."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import sample
from jaxgpt.config import Config, ModelConfig, to_json
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.inference.decode import generate
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.model import gpt2
from jaxgpt.training.checkpoint import Checkpoints
from jaxgpt.training.step import TrainState
from jaxgpt.training.weights import load_model

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=32, dtype="float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A run folder as `train` leaves it; its tokens are bytes, its weights are random and large."""
    run = tmp_path_factory.mktemp("sample") / "run"
    tokenizer = train_bpe(["no merges"], 257)
    tokenizer.save(run / "tokenizer")
    (run / "config.json").write_text(to_json(Config(model=MODEL)))
    rng = np.random.default_rng(0)
    _, shapes, _ = gpt2.abstract_model(MODEL, tokenizer.vocab_size)
    params = jax.device_put(jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes))
    checkpoints = Checkpoints(run, Config().checkpoint)
    checkpoints.save(1234, TrainState(jnp.asarray(1234), params, {"moments": jnp.zeros(())}), {}, 1.0)
    checkpoints.close()
    return run


def expected(checkpoint: Path, prompt: str, **options) -> str:
    """What the command prints, put together from the parts."""
    model = load_model(checkpoint)
    prompt_ids = model.tokenizer.encode(prompt)
    options = SamplingOptions(**options)
    tokens = generate(MODEL, 257, model.params, prompt_ids, options, model.tokenizer.end_of_text)
    return f"\n{'-' * 80}\n".join(prompt + model.tokenizer.decode(t) for t in tokens) + "\n"


def run(checkpoint, *flags):
    return sample.main(["--checkpoint", str(checkpoint), *flags])


def test_texts_go_to_stdout_with_their_prompt_and_a_ruled_line_between(checkpoint, capsys):
    prompt, flags = "def ñ", ["--max-new-tokens", "12", "--num-return-sequences", "3", "--seed", "4"]
    assert run(checkpoint, "--prompt", prompt, *flags) == 0
    out, err = capsys.readouterr()
    assert err == f"{checkpoint}, step 1,234, 0.0M parameters, float32\n"
    # Random bytes end and begin inside characters: they are replaced, and nothing fails.
    assert out == expected(checkpoint, prompt, max_new_tokens=12, num_return_sequences=3, seed=4)

    run(checkpoint, "--prompt", prompt, *flags)
    assert capsys.readouterr().out == out
    run(checkpoint, "--prompt", prompt, *flags[:-1], "5")
    assert capsys.readouterr().out != out


def test_without_a_prompt_the_text_starts_from_end_of_text(checkpoint, capsys):
    assert run(checkpoint, "--max-new-tokens", "12", "--temperature", "0") == 0
    model = load_model(checkpoint)
    options = SamplingOptions(max_new_tokens=12, temperature=0)
    end_of_text = model.tokenizer.end_of_text
    [tokens] = generate(MODEL, 257, model.params, [end_of_text], options, end_of_text)
    assert capsys.readouterr().out == model.tokenizer.decode(tokens) + "\n"


def test_one_steps_folder_is_a_checkpoint_too(checkpoint, capsys):
    assert run(checkpoint / "checkpoints" / "1234", "--prompt", "a", "--max-new-tokens", "5") == 0
    assert capsys.readouterr().out == expected(checkpoint, "a", max_new_tokens=5)


def test_a_text_longer_than_the_context_is_refused_in_one_line(checkpoint, capsys):
    assert run(checkpoint, "--prompt", "1234567890", "--max-new-tokens", "30") == 2
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
    assert run("runs/nothing", flag, value) == 2
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
