"""What a model writes, in figures worked out by hand; a chat run is scored and checked by its validation answers."""

import json

import jax
import numpy as np
import pytest
from tiny import RUN, save_as_run

from jaxgpt import evaluate, train
from jaxgpt.config import Config
from jaxgpt.data import chat
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.errors import UserError
from jaxgpt.evaluation.text_statistics import Prompts, Written, check, figures, validation_prompts, written_prompts
from jaxgpt.inference.decoder import build_decoder
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.model import gpt2
from jaxgpt.settings import ModelConfig
from jaxgpt.training.checkpoint import find_step
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.models import LoadedModel, load_model
from jaxgpt.training.resume import dataset_read_by

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=32, dtype="float32")
TOKENIZER = train_bpe(["no merges"], 257)
OPTIONS = SamplingOptions(max_new_tokens=8, temperature=1.0, top_k=0, top_p=1.0)


def make_model(likely: int | None = None) -> LoadedModel:
    """Random weights; the token `likely` is it everywhere."""
    _, shapes, _ = gpt2.abstract_model(MODEL, TOKENIZER.vocab_size)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes)
    if likely is not None:
        params["ln_f"]["bias"] = 50.0 * params["wte"][likely]
    return LoadedModel(Config(model=MODEL), TOKENIZER.vocab_size, params, TOKENIZER, 0)


def test_figures_are_those_worked_out_by_hand():
    found = figures([Written([1, 2, 1, 2, 1, 2], True), Written([1, 2, 3], False)])
    assert found["distinct_1"] == pytest.approx(3 / 9)  # 1, 2 and 3
    assert found["distinct_2"] == pytest.approx(3 / 7)  # 12, 21 and 23
    assert found["distinct_3"] == pytest.approx(3 / 5)  # 121, 212 and 123
    assert found["rep_4"] == pytest.approx(1 / 3)  # 1212 comes again; the second text has no four tokens
    assert (found["stops"], found["tokens"]) == (0.5, 4.5)
    assert figures([Written([], True)]) == {
        **dict.fromkeys(["distinct_1", "distinct_2", "distinct_3", "rep_4"]),
        "stops": 1.0,
        "tokens": 0.0,
    }


def test_a_model_that_repeats_itself_and_one_that_ends_at_once_are_seen_as_such():
    prompts = Prompts([[1, 2, 3], [4]], "somewhere")
    for likely, expected in (
        (7, {"distinct_1": 1 / 16, "rep_4": 4 / 5, "stops": 0.0, "tokens": 8.0}),
        (TOKENIZER.end_of_text, {"distinct_1": None, "rep_4": None, "stops": 1.0, "tokens": 0.0}),
    ):
        model = make_model(likely)
        decoder = build_decoder(MODEL, model.vocab_size, jax.device_put(model.params), TOKENIZER.end_of_text)
        found = check(decoder, prompts, None, OPTIONS)
        assert {key: found["model"][key] for key in expected} == pytest.approx(expected)
        assert found["real"] is None and found["prompts"] == 2


def test_prompts_that_are_too_long_lose_their_beginning_and_are_counted():
    found = written_prompts(["short", "x" * 30 + "yz"], "a file", TOKENIZER, 32, OPTIONS)
    assert [len(tokens) for tokens in found.tokens] == [5, 24] and found.cut == 1
    assert TOKENIZER.decode(found.tokens[1]).endswith("xyz")
    chatting = chat.with_chat_tokens(TOKENIZER)
    [tokens] = written_prompts(["Hi"], "a file", chatting, 64, OPTIONS, system="Be kind.").tokens
    assert "Be kind." in chatting.decode(tokens) and tokens.count(chatting.end_of_turn) == 2


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """A run on conversations whose answers have 4 letters and an end."""
    folder = tmp_path_factory.mktemp("chat")
    rng, turns = np.random.default_rng(0), []
    for _ in range(60):
        question, answer = ("".join(rng.choice(list("abcd"), 4)) for _ in range(2))
        turns.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    (folder / "text.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    settings = RUN.format(folder=folder).replace('"text"', '"jsonl"\nformat = "chat"').replace("text.txt", "text.jsonl")
    settings = settings.replace("n_positions = 32", "n_positions = 64").replace("n_layer = 2", "n_layer = 1")
    settings += "warmup_steps = 1\n[train]\nmax_steps = 1\nper_device_train_batch_size = 1\n"
    (folder / "config.toml").write_text(settings + "[eval]\nsample_tokens = 0\n[log]\ntensorboard = false\n")
    assert train.main(["--config", str(folder / "config.toml"), "--workdir", str(folder / "run")]) == 0
    return folder / "run"


def test_a_chat_run_is_scored_by_its_validation_answers(conversations, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert evaluate.main(["--checkpoint", str(conversations), "--batch-size", "1", "--json", str(file)]) == 0
    [answers] = json.loads(file.read_text())["texts"]
    last = [line for line in read_metrics(conversations) if "eval_loss" in line][-1]
    assert answers["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert answers["name"] == "validation answers"
    assert "conversations of up to 64 tokens, of which what is learned is scored" in capsys.readouterr().out
    assert evaluate.main(["--checkpoint", str(conversations), "--stride", "3"]) == 2
    assert "--stride: conversations are scored whole" in capsys.readouterr().err


def test_what_a_chat_run_writes_stands_beside_the_real_answers(conversations, tmp_path, capsys):
    file = tmp_path / "found.json"
    words = ["--generate", "--max-new-tokens", "12", "--json", str(file)]
    assert evaluate.main(["--checkpoint", str(conversations), *words]) == 0
    found = json.loads(file.read_text())
    generation = found["generation"]
    assert generation["real"]["stops"] == 1.0 and 4 <= generation["real"]["tokens"] <= 6
    assert generation["model"]["tokens"] <= 12 and generation["prompts"] > 1
    assert found["texts"] == found["tasks"] == []
    out = capsys.readouterr().out
    assert "before answers of validation conversations" in out and "distinct-1" in out
    # The real answers are those of the prompts.
    model = load_model(conversations)
    dataset = dataset_read_by(*find_step(conversations))
    prompts = validation_prompts(dataset, model.tokenizer, 64, 12)
    known = [
        line["messages"] for line in map(json.loads, (conversations.parent / "text.jsonl").read_text().splitlines())
    ]
    answers = {question["content"]: answer["content"] for question, answer in known}
    for tokens, real in zip(prompts.tokens, prompts.real, strict=True):
        [question] = [question for question in answers if question in model.tokenizer.decode(tokens)]
        assert model.tokenizer.decode(real.tokens).strip() == answers[question]
    with pytest.raises(UserError, match="--max-new-tokens 64: the model reads and writes 64 tokens at most"):
        validation_prompts(dataset, model.tokenizer, 64, 64)


def test_prompts_of_a_file_are_continued_the_same_with_the_same_seed(tmp_path, capsys):
    checkpoint, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    save_as_run(checkpoint, make_model())
    prompts.write_text("Once\nThere was a\n")
    words = ["--checkpoint", str(checkpoint), "--generate", str(prompts), "--max-new-tokens", "8", "--json"]
    found = []
    for name, more in (("a", []), ("b", []), ("c", ["--seed", "1"]), ("d", ["--temperature", "0"])):
        assert evaluate.main([*words, str(tmp_path / name), *more]) == 0
        found.append(json.loads((tmp_path / name).read_text())["generation"])
    assert found[0] == found[1] and found[0]["real"] is None
    assert len({json.dumps(one["model"]) for one in found}) == 3
    for more, complaint in (
        (["--max-new-tokens", "40"], "max_new_tokens = 40"),
        (["--generate"], "where the prepared data lies"),
    ):
        assert evaluate.main([*words, str(tmp_path / "e"), *more]) == 2
        assert complaint in capsys.readouterr().err
    assert evaluate.main(["--checkpoint", str(checkpoint), "--generate", str(tmp_path / "nothing.txt")]) == 2
    assert "nothing.txt: no such file" in capsys.readouterr().err
