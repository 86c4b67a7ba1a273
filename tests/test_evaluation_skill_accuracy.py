"""Held-out questions as a model's prompts, and the table of what it answers; the answers here are given."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import save_as_run

from jaxgpt import evaluate
from jaxgpt.config import Config
from jaxgpt.data.chat import with_chat_tokens
from jaxgpt.data.tokenizer import Tokenizer, train_bpe
from jaxgpt.errors import UserError
from jaxgpt.evaluation import skill_accuracy
from jaxgpt.evaluation.skill_accuracy import answered, skill_questions, skill_table
from jaxgpt.inference.decoder import Continuation
from jaxgpt.model import gpt2
from jaxgpt.preparation.skills import held_out, skill_names
from jaxgpt.reporting.run_files import evaluation_rows
from jaxgpt.settings import ModelConfig
from jaxgpt.training.models import LoadedModel

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=512, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [
        turn.question + turn.answer for name in skill_names() for one in held_out(name, "english", 20) for turn in one
    ]
    return with_chat_tokens(train_bpe(texts, 600))


def model(tokenizer: Tokenizer, likely: int, n_positions: int = 512) -> LoadedModel:
    """Random weights; the token `likely` is it everywhere."""
    shape = dataclasses.replace(MODEL, n_positions=n_positions)
    _, shapes, _ = gpt2.abstract_model(shape, tokenizer.vocab_size)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape, np.float32)), shapes)
    params["ln_f"]["bias"] = 50.0 * params["wte"][likely]
    return LoadedModel(Config(model=shape), tokenizer.vocab_size, params, tokenizer, 0)


def test_right_answers_count_and_wrong_ones_and_those_without_an_end_do_not(tokenizer, monkeypatch):
    loaded = model(tokenizer, 0)
    questions = skill_questions(loaded, "it", 3)
    assert len(questions.asked) == 3 * 2 * len(skill_names()) and questions.options.temperature == 0
    assert all(len(prompt) + questions.options.max_new_tokens <= 512 for _, prompt in questions.asked)
    by_prompt = {tuple(prompt): turn for turn, prompt in questions.asked}

    def given(decoder, prompts, options):
        answers = []
        for turn in (by_prompt[tuple(prompt)] for prompt in prompts):
            text = "I do." if turn.skill == "spelling" else turn.answer
            reason = "length" if (turn.skill, turn.language) == ("sorting", "chinese") else "stop"
            tokens = tokenizer.encode(text)
            answers.append([Continuation(tokens, [0.0] * len(tokens), reason)])
        return answers

    monkeypatch.setattr(skill_accuracy, "generate", given)
    found = answered(questions, loaded.config, loaded)
    rows = {(row["skill"], row["language"]): row for row in found["rows"]}
    first = next(turn for turn, _ in questions.asked if (turn.skill, turn.language) == ("addition", "english"))
    assert rows["addition", "english"] == {
        "skill": "addition", "language": "english", "questions": 3, "right": 3, "stops": 3, "wrong": [],
        "first": {"question": first.question, "answer": first.answer},
    }  # fmt: skip
    assert (rows["spelling", "chinese"]["right"], rows["spelling", "chinese"]["stops"]) == (0, 3)
    assert rows["spelling", "english"]["wrong"][0]["answer"] == "I do."
    assert (rows["sorting", "chinese"]["right"], rows["sorting", "chinese"]["stops"]) == (0, 0)
    count = len(skill_names())
    assert found["english"] == pytest.approx((count - 1) / count)
    assert found["chinese"] == pytest.approx((count - 2) / count)
    assert found["stops"] == pytest.approx(1 - 1 / (2 * count))
    table = skill_table(found).splitlines()
    assert table[0].startswith(f"{6 * count} held-out questions") and len(table) == count + 3
    assert next(line for line in table if line.startswith("spelling")).split()[1:] == ["0.0%", "0.0%", "6", "100.0%"]


def test_a_run_is_asked_and_keeps_the_figures(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(skill_accuracy, "skill_names", lambda: ["greeting", "identity"])  # short: one compilation
    save_as_run(tmp_path / "run", model(tokenizer, tokenizer.end_of_turn, 128))
    (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)
    words = ["--checkpoint", str(tmp_path / "run"), "--skills", "--limit", "1", "--json", str(tmp_path / "found.json")]
    assert evaluate.main(words) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["texts"] == found["tasks"] == [] and found["skills"]["questions"] == 4
    assert (found["skills"]["stops"], found["skills"]["english"]) == (1.0, 0.0)  # empty answers
    assert "mean              0.0%      0.0%" in capsys.readouterr().out
    assert [row.metric for row in evaluation_rows(tmp_path / "run")][:2] == ["acc", "stops"]


def test_a_model_that_does_not_chat_is_refused(tokenizer):
    plain = train_bpe(["no merges"], 257)
    with pytest.raises(UserError, match="it: no chat model"):
        skill_questions(model(plain, 0), "it", 1)
