"""EleutherAI's harness with its own torch model, with ours as its model, and our tasks: the same numbers.

The harness's own YAML files of the tasks, on questions that this test writes, so that nothing is fetched.
"""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import ONE_DEVICE

from jaxgpt.config import Config
from jaxgpt.data.chat import with_chat_tokens
from jaxgpt.data.pipeline import Batch
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.errors import UserError
from jaxgpt.evaluation import harness
from jaxgpt.evaluation.scoring import RequestScorer, encode_pair
from jaxgpt.evaluation.tasks import read_tasks
from jaxgpt.inference.prompts import ChatPrompts
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.settings import ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.training.models import export_model, load_model
from jaxgpt.training.step import build_program

MISSING = [name for name in ("lm_eval", "torch", "accelerate", "peft") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(MISSING), reason=f"pip install -e '.[eval,parity]' brings {', '.join(MISSING)}"),
]
BLOCK, QUESTIONS = 64, 16
SENTENCES = [
    "The old fisherman mended his nets beside the harbour wall.",
    "A green lamp burned in the window of the bakery.",
    "Nobody in the village remembered who had built the bridge.",
    "She folded the letter twice and hid it under the clock.",
    "春天来了，河边的柳树慢慢变绿。",
    "老师问学生：“你们今天读了什么书？”",
    "The children counted seven herons before the rain began.",
    "他把钥匙放在桌子上，然后关上了门。",
]
WORDS = sorted({word for sentence in SENTENCES if sentence.isascii() for word in sentence.split()})
YAML = {  # our format: (the harness's file, name of the task)
    "lambada": ("lambada/lambada_openai.yaml", "own_lambada"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "own_hellaswag"),
    "piqa": ("piqa/piqa.yaml", "own_piqa"),
    "arc": ("arc/arc_easy.yaml", "own_arc"),
    "winogrande": ("winogrande/default.yaml", "own_winogrande"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "own_openbookqa"),
    "blimp": ("blimp/_template_yaml", "own_blimp"),
}
CHOICES = """
output_type: multiple_choice
doc_to_text: context
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


# ---------------------------------------------------------------- a model that has learned something


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder of a model that knows some of the sentences by heart, and chats."""
    tokenizer = with_chat_tokens(train_bpe(SENTENCES * 20, 400))
    config = Config(
        model=ModelConfig(n_layer=2, n_head=4, n_embd=64, n_positions=BLOCK, dtype="float32"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(max_steps=30),
    )
    draw = np.random.default_rng(0)
    program = build_program(config, tokenizer.vocab_size, build_mesh(ONE_DEVICE, jax.devices()[:1]))
    state = program.init()
    for _ in range(30):
        tokens = np.array([tokenizer.encode(text(draw, 14))[: BLOCK + 1] for _ in range(8)], np.int32)[None]
        inputs, targets = tokens[..., :-1], tokens[..., 1:]
        state, _ = program.train_step(state, Batch(inputs, targets, np.ones(targets.shape, np.float32)))
    where = tmp_path_factory.mktemp("model") / "hf"
    export_model(where, config.model, tokenizer.vocab_size, state.params, tokenizer)
    return where


def text(draw, sentences: int) -> str:
    return " ".join(SENTENCES[draw.integers(len(SENTENCES))] for _ in range(sentences))


# ---------------------------------------------------------------- questions


def record(name: str, draw, number: int) -> dict:
    """A question of each benchmark's format, some with contexts longer than the model."""
    words = lambda most: " ".join(draw.choice(WORDS, draw.integers(1, most)))
    # All of BLiMP's text is scored, and the harness's own model refuses targets longer than itself.
    context = text(draw, 8 if number % 4 == 0 and name != "blimp" else 1)
    four, three = int(draw.integers(4)), [words(6) for _ in range(4)]
    labelled = {"text": three, "label": list("ABCD")}
    return {
        "lambada": {"text": f"{SENTENCES[0]} {context}"},
        "hellaswag": {
            "activity_label": "Fishing",
            "ctx_a": context,
            "ctx_b": "the man",
            "endings": [f"{choice} [step] and [title] {words(3)}." for choice in three],
            "label": str(four),
        },
        "piqa": {"goal": context, "sol1": three[0], "sol2": f"{three[1]} 河边", "label": four % 2},
        "arc": {"question": context, "choices": labelled, "answerKey": "ABCD"[four]},
        "winogrande": {
            "sentence": f"{context} Then _ saw that {words(5)}.",
            "option1": WORDS[number % 9],
            "option2": WORDS[10 + number % 9],
            "answer": str(1 + four % 2),
        },
        "openbookqa": {"question_stem": context, "choices": labelled, "answerKey": "ABCD"[four]},
        "blimp": {"sentence_good": context, "sentence_bad": f"{three[0]} {words(5)}."},
        "choices": {"context": context, "choices": [*three[:3], "然后关上了门。"], "answer": four},
    }[name]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """NAME.jsonl of each format and YAML files that have the harness read them."""
    import lm_eval

    where, draw = tmp_path_factory.mktemp("questions"), np.random.default_rng(1)
    tasks = Path(lm_eval.__file__).parent / "tasks"
    for name in [*YAML, "choices"]:
        file = where / f"{name}.jsonl"
        lines = [json.dumps(record(name, draw, number), ensure_ascii=False) for number in range(QUESTIONS)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        head = f"include: {tasks / YAML[name][0]}\ndataset_name: null\n" if name in YAML else CHOICES
        data = f"task: own_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{SPLITS}}}}\n"
        splits = ", ".join(f"{split}: {file}" for split in ("train", "validation", "test"))
        own_split = "" if name in YAML else "test_split: test\n"
        (where / f"{name}.yaml").write_text(head + data.replace("SPLITS", splits) + own_split, encoding="utf-8")
    return where


# ---------------------------------------------------------------- the three sides


@pytest.fixture(scope="module")
def peer(folder):
    """The harness's own model, in torch."""
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)  # its threads and XLA's would wait for each other's cores
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def ours(folder):
    return harness.open_model(folder, rows_per_device=1)


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("DISABLE_MULTIPROC", "1")  # for the torch model; ours sets it by itself
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def answers(questions, peer, ours) -> dict[str, dict]:
    """What the harness makes of each side's answers to all tasks."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(questions), include_defaults=False)
    names = [f"own_{name}" for name in [*YAML, "choices"]]
    asked = dict(tasks=names, task_manager=manager, bootstrap_iters=20, log_samples=True)
    return {side: lm_eval.simple_evaluate(model=model, **asked) for side, model in (("peer", peer), ("ours", ours))}


@pytest.fixture(scope="module")
def score(folder):
    """Our own way from pairs of texts to scores."""
    model = load_model(folder)
    scorer = RequestScorer(model.config, model.vocab_size, build_mesh(ONE_DEVICE, jax.devices()[:1]), 4)
    params = jax.device_put(model.params, scorer.param_shardings)
    return lambda pairs: scorer(params, [encode_pair(model.tokenizer, *pair) for pair in pairs])


def responses(found: dict, name: str) -> list[tuple[float, bool]]:
    """(log-probability, is greedy) of all pairs of a task, in their order."""
    samples = sorted(found["samples"][f"own_{name}"], key=lambda sample: sample["doc_id"])
    return [tuple(response[0]) for sample in samples for response in sample["resps"]]


@pytest.mark.parametrize("name", [*YAML, "choices"])
def test_three_ways_to_the_same_log_probabilities_and_accuracies(name, answers, questions, score):
    theirs, adapted = (responses(answers[side], name) for side in ("peer", "ours"))
    [task] = read_tasks([f"{name}={questions / f'{name}.jsonl'}"])
    own = score([pair for question in task.questions for pair in question.pairs])
    for each in (adapted, [(score.logprob, score.is_greedy) for score in own]):
        np.testing.assert_allclose([a for a, _ in each], [float(b) for b, _ in theirs], rtol=0, atol=1e-3)
        assert [a for _, a in each] == [b for _, b in theirs]
    figures = task.results(own)
    assert figures["cut"] > 0 or name == "blimp"  # some contexts are longer than the model
    for metric in task.metrics:
        expected = answers["peer"]["results"][f"own_{name}"][f"{metric},none"]
        exactly = metric != "perplexity"
        for found in (answers["ours"]["results"][f"own_{name}"][f"{metric},none"], figures[metric]):
            assert found == (expected if exactly else pytest.approx(expected, rel=1e-4))
        if exactly:
            error = answers["peer"]["results"][f"own_{name}"][f"{metric}_stderr,none"]
            assert figures[f"{metric}_stderr"] == pytest.approx(error, rel=1e-9)


def test_the_model_is_right_at_times_so_the_accuracies_say_something(answers):
    found = [entry["acc,none"] for entry in answers["peer"]["results"].values()]
    assert any(0 < acc < 1 for acc in found)
    assert 0 < answers["peer"]["results"]["own_lambada"]["acc,none"] < 1  # some targets are greedy, others not


# ---------------------------------------------------------------- the other kinds of request


def instances(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    made = [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]
    for instance in made:
        instance.task_name = "a_task"
    return made


def test_whole_texts_longer_than_the_model_have_the_same_log_probability(peer, ours):
    draw = np.random.default_rng(2)
    asked = instances("loglikelihood_rolling", [(text(draw, count),) for count in (1, 2, 7, 20)])
    expected = peer.loglikelihood_rolling(asked)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, rel=0, abs=1e-3)


def test_pairs_with_an_empty_context_spaces_at_its_end_or_special_tokens_read_the_same(peer, ours):
    pairs = [("", "The old"), ("The old ", "fisherman"), ("<|endoftext|>The", " old"), ("", "<|endoftext|>她"),
             ("<|im_start|>user\nThe", " old<|im_end|>")]  # fmt: skip
    asked = instances("loglikelihood", pairs)
    # One at a time: asked for the same tokens with two borders between context and target, the peer's cache of logits
    # takes the wrong positions for one of them.
    for (found, greedy), request in zip(ours.loglikelihood(asked), asked, strict=True):
        [(expected, their_greedy)] = peer.loglikelihood([request])
        assert found == pytest.approx(expected, abs=1e-3)
        assert greedy == their_greedy


def test_greedy_texts_are_the_same_with_stop_texts_limits_and_contexts_that_are_cut(peer, ours):
    draw = np.random.default_rng(3)
    rules = [
        {"until": ["."], "max_gen_toks": 24, "do_sample": False},
        {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0.0},
        {"until": ["。", " wall"], "max_gen_toks": 24},
        {"max_gen_toks": 8},
    ]
    contexts = ["The old fisherman", "他把钥匙", text(draw, 9), "A green lamp burned in"]
    asked = instances("generate_until", [(context, dict(rule)) for rule in rules for context in contexts])
    expected = peer.generate_until(asked)
    assert ours.generate_until(asked) == expected
    assert len(set(expected)) > 6


def test_a_repeated_request_that_draws_gets_other_texts_and_the_next_call_the_same(ours):
    rule = {"max_gen_toks": 16, "do_sample": True, "temperature": 1.5}
    asked = instances("generate_until", [("The", rule)] * 3)
    made = ours.generate_until(asked)
    assert len(set(made)) == 3
    assert ours.generate_until(asked) == made


def test_a_chat_becomes_the_text_that_transformers_makes_of_it(peer, ours):
    chat = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "谁修了网？"},
        {"role": "assistant", "content": "The old fisherman"},
    ]
    assert ours.apply_chat_template(chat[:2]) == peer.apply_chat_template(chat[:2])
    assert ours.apply_chat_template(chat, add_generation_prompt=False) == peer.apply_chat_template(
        chat, add_generation_prompt=False
    )
    made = ours.apply_chat_template(chat[:2])
    assert ours.tok_encode(made) == peer.tok_encode(made) == ChatPrompts(ours._tokenizer, BLOCK, "").encode(chat[:2])


# ---------------------------------------------------------------- as a part of evaluate


@pytest.fixture
def run(folder, questions):
    loaded = load_model(folder)
    mesh = build_mesh(ONE_DEVICE, jax.devices()[:1])
    return lambda *names, limit=None, config=loaded.config, include=questions: harness.run(
        names, include, loaded, config, mesh, rows_per_device=4, limit=limit
    )


def test_run_gives_results_in_the_form_of_our_own_tasks(run, answers, questions):
    lambada, piqa = run("own_lambada", "own_piqa")
    expected = answers["peer"]["results"]["own_lambada"]
    assert (lambada["task"], lambada["questions"], lambada["few_shot"]) == ("own_lambada", QUESTIONS, 0)
    assert lambada["acc"] == expected["acc,none"]
    assert lambada["perplexity"] == pytest.approx(expected["perplexity,none"], rel=1e-4)
    assert lambada["perplexity_stderr"] > 0
    assert piqa["acc_norm_stderr"] > 0
    assert lambada["cut"] > 0
    assert json.loads(json.dumps([lambada, piqa])) == [lambada, piqa]
    assert run("own_piqa", limit=5)[0]["questions"] == 5


def test_an_unknown_task_missing_data_and_an_unknown_rule_are_one_line(run, ours, tmp_path, questions, monkeypatch):
    from lm_eval.tasks import TaskManager

    own_only = functools.partial(TaskManager, include_defaults=False)  # the harness's own tasks take 7 s to read
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_only)
    with pytest.raises(UserError, match="--harness nowhere: lm-eval .* has no task"):
        run("nowhere")
    with pytest.raises(UserError, match="--harness-include .*: no such folder"):
        run("own_piqa", include=tmp_path / "gone")
    yaml = (questions / "piqa.yaml").read_text(encoding="utf-8").replace("own_piqa", "own_gone")
    (tmp_path / "gone.yaml").write_text(yaml.replace("piqa.jsonl", "gone.jsonl"), encoding="utf-8")
    with pytest.raises(UserError, match="--harness own_gone: its data") as error:
        run("own_gone", include=tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="task a_task: generation_kwargs has num_beams"):
        ours.generate_until(instances("generate_until", [("The", {"num_beams": 4})]))


def test_the_harness_is_loaded_only_when_asked_and_torch_not_by_us(folder):
    code = f"""
import sys
import jaxgpt.evaluate
from jaxgpt.evaluation import harness
assert "lm_eval" not in sys.modules
harness.open_model({str(folder)!r})
assert "lm_eval" in sys.modules and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
