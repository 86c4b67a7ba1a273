"""EleutherAI's harness over HTTP = the harness with its own torch model of the same weights: the same numbers."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import serving

NEEDED = ("lm_eval", "torch", "accelerate", "peft", "aiohttp", "tenacity")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(MISSING), reason=f"pip install -e '.[eval,parity]' brings {', '.join(MISSING)}"),
]

QUESTIONS = 32
WORDS = ["the end", " of the text", "你好", "世界", "中文", "😀", "👍🏽", " ñandú", "。", "café", " and more"]
YAML = """
task: own_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_target: 0
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def model():
    """It ends texts often: what it would write after a scored text must not change the score."""
    made = serving.make_model()
    made.params["wte"][made.tokenizer.end_of_text] += 0.25 * made.params["ln_f"]["bias"]
    return made


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    return serving.save_huggingface(tmp_path_factory.mktemp("model") / "hf", model)


@pytest.fixture(scope="module")
def server(folder):
    with serving.started(folder, "--weights", "float32", "--slots", "8") as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("DISABLE_MULTIPROC", "1")  # the bootstrap of the harness would fork a process with jax in it
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def questions(server, model, tmp_path_factory) -> Path:
    """A folder with the task; the first choice of a question is what the model itself finds likeliest, where it can be.

    No token joins a context with a choice: the harness sends texts whose parts it has encoded one by one.
    """
    where, draw = tmp_path_factory.mktemp("questions"), np.random.default_rng(1)
    text = lambda most: "".join(WORDS[draw.integers(len(WORDS))] for _ in range(draw.integers(1, most)))
    contexts = list(dict.fromkeys(text(6) for _ in range(300)))
    tell = lambda number: server.post("/v1/completions", prompt=contexts[number], max_tokens=1, temperature=0).json
    likeliest = [told["choices"][0]["text"] for told in serving.at_once(len(contexts), tell)]
    encode, lines = model.tokenizer.encode, []
    for context, first in zip(contexts, likeliest):
        choices = [first, text(2), text(4)]
        apart = all(encode(context) + encode(choice) == encode(context + choice) for choice in choices)
        if first and "\ufffd" not in first and apart and len(lines) < QUESTIONS:
            lines.append(json.dumps({"context": context, "choices": choices}))
    assert len(lines) == QUESTIONS
    (where / "choices.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (where / "choices.yaml").write_text(YAML.replace("FILE", str(where / "choices.jsonl")), encoding="utf-8")
    return where


def evaluate(model, questions: Path) -> tuple[dict, np.ndarray, list[bool]]:
    """(results, log-probabilities, whether greedy) of all choices, in their order."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(questions), include_defaults=False)
    asked = dict(tasks=["own_choices"], task_manager=manager, bootstrap_iters=20, log_samples=True)
    found = lm_eval.simple_evaluate(model=model, **asked)
    samples = sorted(found["samples"]["own_choices"], key=lambda sample: sample["doc_id"])
    told = [response[0] for sample in samples for response in sample["resps"]]
    return (
        {name: value for name, value in found["results"]["own_choices"].items() if name.startswith("acc")},
        np.array([float(logprob) for logprob, _ in told]),
        [bool(greedy) for _, greedy in told],
    )


@pytest.fixture(scope="module")
def expected(folder, questions):
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)  # its threads and XLA's would wait for each other's cores
    return evaluate(HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8), questions)


@pytest.fixture
def over_http(server, folder):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    def client(**options) -> LocalCompletionsAPI:
        where = dict(base_url=f"{server.url}/v1/completions", model=folder.name, max_length=serving.MODEL.n_positions)
        own = {} if options.get("tokenizer_backend") else dict(tokenizer=str(folder), tokenizer_backend="huggingface")
        return LocalCompletionsAPI(**where, **own, **options)

    return client


@pytest.mark.parametrize("tokenized, batch, concurrent", [(True, 8, 4), (False, 1, 1)])
def test_scores_over_http_are_those_of_torch(over_http, questions, expected, tokenized, batch, concurrent):
    client = over_http(tokenized_requests=tokenized, batch_size=batch, num_concurrent=concurrent)
    results, logprobs, greedy = evaluate(client, questions)
    assert len(logprobs) == 3 * QUESTIONS and logprobs.std() > 1
    np.testing.assert_allclose(logprobs, expected[1], rtol=0, atol=1e-3)
    assert greedy == expected[2] and 5 < sum(greedy) < len(greedy) - 5
    assert results == expected[0]


def test_the_harness_can_ask_the_server_itself_for_tokens(over_http, questions, expected):
    """Without a tokenizer's folder; it takes one only from /tokenizer_info, /tokenize and /detokenize."""
    _, logprobs, greedy = evaluate(over_http(tokenizer_backend="remote", batch_size=8), questions)
    np.testing.assert_allclose(logprobs, expected[1], rtol=0, atol=1e-3)
    assert greedy == expected[2]


def test_the_model_does_end_texts_so_the_scores_above_say_something(server, questions):
    lines = [json.loads(line) for line in (questions / "choices.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = dict(max_tokens=1, temperature=0)
    ends = [
        server.post("/v1/completions", prompt=line["context"] + choice, **asked).json["choices"][0]["finish_reason"]
        for line in lines
        for choice in line["choices"]
    ]
    assert 3 < ends.count("stop") < len(ends) - 3
