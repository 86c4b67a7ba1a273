"""Loss of a text: every token once, with its context, the same on any mesh and in any batch, and as torch has it."""

import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest
from tiny import CONFIG, MODEL, VOCAB

from jaxgpt import evaluate
from jaxgpt.errors import UserError
from jaxgpt.evaluation import harness
from jaxgpt.evaluation.perplexity import encoded_text, score, text_batches, windows
from jaxgpt.model import gpt2
from jaxgpt.model.huggingface import write_model
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.parallel.sharding import rows_sharding
from jaxgpt.reporting.run_page import add_evaluation
from jaxgpt.settings import MeshConfig
from jaxgpt.training.metrics import read_metrics
from jaxgpt.training.step import build_eval_step

BLOCK = MODEL.n_positions
TOKENS = np.random.default_rng(0).integers(1, VOCAB, 150).tolist()


@pytest.fixture(scope="module")
def params() -> dict:
    return gpt2.init_params(MODEL, VOCAB, jax.random.key(0))


@functools.cache
def eval_step_on(devices: int):
    mesh = build_mesh(MeshConfig(), jax.devices()[:devices])
    return *build_eval_step(CONFIG, VOCAB, mesh), rows_sharding(mesh)


def scored(params, tokens, stride: int, rows: int = 4, devices: int = 1):
    eval_step, shardings, of_rows = eval_step_on(devices)
    placed = jax.device_put(params, shardings)
    text = text_batches("a text", encoded_text(tokens, 1000, 0), BLOCK, stride, rows)
    return score(lambda batch: eval_step(placed, batch), text, of_rows)


@pytest.mark.parametrize("stride", [1, 7, BLOCK])
@pytest.mark.parametrize("length", [2, BLOCK, BLOCK + 1, BLOCK + 2, 150])
def test_each_target_is_scored_once_with_the_context_that_the_stride_promises(length, stride):
    found = []
    for begin, first, end in windows(length, BLOCK, stride):
        assert 0 < end - begin - 1 <= BLOCK
        for target in range(first, end):
            assert target - begin >= min(target, BLOCK - stride + 1)
            found.append(target)
    assert found == list(range(1, length))


@pytest.mark.parametrize("stride", [5, BLOCK])
def test_the_loss_is_that_of_the_windows_read_one_by_one(params, stride):
    network = jax.jit(lambda tokens_1T: gpt2.bind(MODEL, VOCAB, params)(tokens_1T))
    sequence, total = [0, *TOKENS], 0.0
    for begin, first, end in windows(len(sequence), BLOCK, stride):
        padded = np.zeros((1, BLOCK), np.int32)  # one shape; what comes after is not seen
        padded[0, : end - 1 - begin] = sequence[begin : end - 1]
        logits = np.asarray(network(padded)[0], np.float64)
        for target in range(first, end):
            row = logits[target - begin - 1]
            total -= row[sequence[target]] - np.log(np.exp(row).sum())
    found = scored(params, TOKENS, stride)
    assert found.count == len(TOKENS)
    assert found.loss_sum == pytest.approx(total, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / len(TOKENS)), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / 1000, rel=1e-5)


def test_mesh_and_batch_change_nothing(params):
    plain = scored(params, TOKENS, 5)
    for rows, devices in ((1, 1), (8, 8), (6, 2)):
        other = scored(params, TOKENS, 5, rows, devices)
        assert other.count == plain.count
        assert other.loss_sum == pytest.approx(plain.loss_sum, rel=1e-6)


@pytest.mark.system
def test_perplexity_is_that_of_a_plain_torch_loop_with_the_same_stride(params, tmp_path):
    torch = pytest.importorskip("torch")  # .ci/run installs it for the default Python
    from transformers import GPT2LMHeadModel

    write_model(tmp_path, MODEL, VOCAB, params, None)
    model = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    sequence, stride, total = torch.tensor([0, *TOKENS]), 9, 0.0
    first = 1
    for begin in range(0, len(sequence), stride):
        end = min(begin + 1 + BLOCK, len(sequence))
        with torch.no_grad():
            logits = model(sequence[None, begin : end - 1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, sequence[begin + 1 : end], reduction="none")
        total += losses[first - begin - 1 :].double().sum().item()
        first = end
        if end == len(sequence):
            break
    assert scored(params, TOKENS, stride).perplexity == pytest.approx(math.exp(total / len(TOKENS)), rel=1e-4)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A copy of the session's run: what `evaluate` finds is kept with it."""
    return shutil.copytree(trained.run, tmp_path_factory.mktemp("evaluate") / "run")


def figures(folder, *words: str) -> dict:
    assert evaluate.main([*words, "--json", str(folder / "found.json")]) == 0
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def apart(run) -> dict:
    """The figures of the validation split in windows that do not overlap."""
    return figures(run.parent, "--checkpoint", str(run), "--stride", str(BLOCK))


def test_with_windows_that_do_not_overlap_it_is_the_validation_loss_of_the_training(run, apart):
    last = [line for line in read_metrics(run) if "eval_loss" in line][-1]
    [validation] = apart["texts"]
    assert validation["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert apart["stride"] == apart["window"] == BLOCK and apart["dtype"] == "float32"


def test_texts_are_scored_alike_from_the_run_and_from_its_export_and_add_up(run, tmp_path, capsys):
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file, text in zip(files, ("the cat sat on a mat " * 5, "a mat")):
        file.write_text(text)
    found, exported = (
        figures(tmp_path, "--checkpoint", str(where), "--text", *map(str, files)) for where in (run, run / "hf")
    )
    one, two, both = found["texts"]
    assert both["tokens"] == one["tokens"] + two["tokens"] == 105 + 5
    assert both["loss"] * both["tokens"] == pytest.approx(one["loss"] * one["tokens"] + two["loss"] * two["tokens"])
    assert [text["loss"] for text in exported["texts"]] == pytest.approx([text["loss"] for text in found["texts"]])
    assert "windows of 32 tokens that move on by 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--stride", "33"], "--stride 33: a window has 32 tokens, so 1 to 32"),
        (["--stride", "0"], "--stride 0"),
        (["--batch-size", "0"], "at least one window"),
        (["--text", "{folder}/nothing.txt"], "nothing.txt: No such file"),
        (["--text", "{folder}/empty.txt"], "empty, so there is nothing to score"),
        (["--text", "{folder}/latin.txt"], "not UTF-8 at byte 1"),
        (["--checkpoint", "{run}/hf"], "has no validation data of its own"),
    ],
)
def test_what_cannot_be_scored_is_one_line(run, tmp_path, words, complaint, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"a\xe9b")
    words = [word.format(folder=tmp_path, run=run) for word in words]
    assert evaluate.main(["--checkpoint", str(run), *words]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert complaint in line


def test_a_task_of_ones_own_is_answered_beside_a_text(run, tmp_path, capsys):
    file, text = tmp_path / "own.jsonl", tmp_path / "text.txt"
    records = [{"context": "the cat sat on a", "choices": ["mat", "the"], "answer": n % 2} for n in range(4)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    text.write_text("a mat")
    found = figures(tmp_path, "--checkpoint", str(run), "--task", f"choices={file}", "--text", str(text))
    [task] = found["tasks"]
    assert (task["questions"], task["acc"], task["cut"]) == (4, 0.5, 0)
    assert len(found["texts"]) == 1
    out = capsys.readouterr().out
    assert "choices" in out and "acc_norm" in out
    assert evaluate.main(["--checkpoint", str(run), "--task", "choices"]) == 2
    assert "choices=FILE" in capsys.readouterr().err


def test_the_compute_type_is_the_one_asked_for_and_moved_data_is_found_where_one_says(run, apart, trained, tmp_path):
    words = ["--checkpoint", str(run), "--stride", str(BLOCK)]
    coarse = figures(tmp_path, *words, "--dtype", "bfloat16")
    assert coarse["dtype"] == "bfloat16" and coarse["texts"][0]["loss"] != apart["texts"][0]["loss"]
    assert coarse["texts"][0]["loss"] == pytest.approx(apart["texts"][0]["loss"], rel=0.02)
    [prepared] = (trained.folder / "prepared").iterdir()
    shutil.copytree(prepared, tmp_path / "moved")
    assert figures(tmp_path, *words, "--data", str(tmp_path / "moved"))["texts"] == apart["texts"]
    assert evaluate.main([*words, "--data", str(tmp_path / "nowhere")]) == 2


def test_an_evaluation_is_kept_with_its_run_and_shown_beside_what_openai_published(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    lambada, wiki = tmp_path / "lambada.jsonl", tmp_path / "wiki.jsonl"
    lambada.write_text("".join(json.dumps({"text": "the cat sat " * n + "on a mat"}) + "\n" for n in (1, 2, 40)))
    wiki.write_text(json.dumps({"page": "the cat sat on a mat"}))
    words = ["--checkpoint", str(tmp_path / "run"), "--task", f"lambada={lambada}", f"wikitext={wiki}"]
    found = figures(tmp_path, *words)
    out = capsys.readouterr().out
    first, second = found["tasks"]
    assert first["cut"] == 1 and "1 contexts were longer than the model reads and lost their beginning" in out
    assert {"model": "GPT-2 124M", "metric": "acc", "value": 0.4599}.items() <= first["published"][4].items()
    assert second["word_perplexity"] > 1 and second["source"] == str(wiki)
    rows = {line.split()[2]: line for line in out.splitlines() if line.startswith(("lambada", "wikitext"))}
    assert rows["acc"].split()[-5:] == ["0.4599", "0.5548", "0.6012", "0.6324", "LAMBADA"]
    assert "29.4100" in rows["word_perplexity"] and "17.4800" in out
    assert "it does not compare exactly" in out
    limited = figures(tmp_path, *words, "--limit", "2")
    assert [task["questions"] for task in limited["tasks"]] == [2, 1]
    kept = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-2:]  # the run may have more
    assert [json.loads(line) for line in kept] == [found, limited]
    assert (tmp_path / "run" / "report.html").stat().st_mtime >= (tmp_path / "run" / "metrics.jsonl").stat().st_mtime


def test_a_run_that_keeps_no_record_is_a_warning(run, apart, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "evaluations.jsonl").unlink(missing_ok=True)
    (tmp_path / "run" / "evaluations.jsonl").mkdir()  # what a read-only folder does, for the superuser as well
    add_evaluation(str(tmp_path / "run"), apart)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "evaluations.jsonl: Is a directory; the run keeps no record of this" in line
    add_evaluation(str(run / "hf"), apart)
    assert sorted(path.name for path in (run / "hf").iterdir() if "evaluations" in path.name) == []


def test_without_the_harness_it_is_one_line_that_says_how_to_get_it(run, monkeypatch):
    def version(name):
        raise harness.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(harness.importlib.metadata, "version", version)
    with pytest.raises(UserError, match=r"pip install -e '.*\[eval\]'$"):
        harness.open_model(run)


def test_what_it_writes_stands_beside_validation_texts(run, tmp_path, capsys):
    generation = figures(tmp_path, "--checkpoint", str(run), "--generate", "--max-new-tokens", "8")["generation"]
    assert generation["prompts"] > 1 and generation["model"]["tokens"] <= 8
    assert 0 < generation["real"]["distinct_1"] < generation["real"]["distinct_3"] <= 1
    assert "tokens of validation texts" in capsys.readouterr().out
