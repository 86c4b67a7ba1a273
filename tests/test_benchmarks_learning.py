"""What benchmarks/learning.py makes of two trainings: the same tokens for both, what they wrote, and the table."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.data.dataset import RECORD_TOKENS, TokenStream

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import learning
import learning_table


def stream(size: int) -> TokenStream:
    tokens = np.random.default_rng(size).integers(0, 4096, size).astype(np.uint16)
    records = [{"tokens": tokens[first : first + RECORD_TOKENS]} for first in range(0, size, RECORD_TOKENS)]
    return TokenStream(records, size, size, 1, "uint16")


@pytest.mark.parametrize(("size", "positions"), [(9, 4), (10, 4), (2, 4), (5000, 64)])
def test_the_peers_loss_is_taken_over_the_windows_of_our_evaluation(size, positions):
    split = stream(size)
    ours = split.evaluation_rows(range(split.rows_to_evaluate(positions)), positions)
    inputs, targets = learning.windows(split.read(0, size), positions)
    np.testing.assert_array_equal(targets >= 0, ours.weights_BT > 0)
    np.testing.assert_array_equal(targets[targets >= 0], ours.targets_BT[ours.weights_BT > 0])
    np.testing.assert_array_equal(inputs[targets >= 0], ours.tokens_BT[ours.weights_BT > 0])


def test_the_peer_reads_the_tokens_of_our_dataset(tmp_path):
    dataset = types.SimpleNamespace(train=stream(5000), validation=stream(70), vocab_size=4096)
    learning.write_bins(tmp_path / "bins", dataset)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "bins/train.bin", np.uint16), stream(5000).read(0, 5000))
    np.testing.assert_array_equal(np.fromfile(tmp_path / "bins/val.bin", np.uint16), stream(70).read(0, 70))
    assert np.load(tmp_path / "bins/meta.pkl", allow_pickle=True) == {"vocab_size": 4096}


@pytest.mark.parametrize(
    ("text", "label", "settings"),
    [
        ("ours=", "ours", {}),
        ("adamw=optimizer.name=adamw", "adamw", {"optimizer.name": "adamw"}),
        ("train.seed=3 optimizer.name=muon", "train.seed=3 optimizer.name=muon",
         {"train.seed": "3", "optimizer.name": "muon"}),
    ],
)  # fmt: skip
def test_settings_of_ours_have_a_label(text, label, settings):
    assert learning.labelled(text) == (label, settings)


@pytest.mark.parametrize("share, points, steps", [(1, 4, 2000), (0.25, 4, 500), (0.25, 3, 501), (1e-9, 4, 4)])
def test_the_last_step_of_a_run_is_evaluated(share, points, steps):
    assert learning.WORKLOADS["char"].steps(share, points, 12) == steps


def test_seconds_of_ours_have_no_evaluation_in_them(tmp_path, monkeypatch):
    line = {"seconds_eval": 0.0, "seconds_save": 0.0}
    records = [
        {"step": 10, "seconds_total": 0.9, "seconds_compile": 7.0, **line},
        {"step": 10, "eval_loss": 3.0},
        {"step": 20, "seconds_total": 4.5, "seconds_eval": 3.0, "seconds_save": 0.5},
        {"step": 20, "eval_loss": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    screen = [(9.0, "step 20/20 | loss 2.6 | lr 1"), (11.5, "step 20/20 | eval_loss 2.5 | perplexity 12"), (14.0, "")]
    monkeypatch.setattr(learning, "execute", lambda *_, **__: screen)
    found = learning.train_ours([], {}, tmp_path)
    assert found.pop("training") == pytest.approx((0.9 + 1.0) * 20 / 19)
    assert found == {"curve": [[10, 3.0], [20, 2.5]], "command": 14.0 - 3.0 - 2.5, "first_step": 7.0}
    monkeypatch.setattr(learning, "execute", lambda *_, **__: [(1.0, f"error: {learning.TOO_HIGH}"), (2.0, "")])
    assert learning.train_ours([], {}, tmp_path) == {"curve": []}


def test_seconds_of_the_peer_have_no_evaluation_in_them(monkeypatch):
    times = [900.0, 100.0, 1100.0, 100.0, 600.0]  # the first compiles, every second step is evaluated
    screen = [(1.0, f"iter {step}: loss 3.1, time {time:.2f}ms, mfu 1%") for step, time in enumerate(times)]
    measured = [(1.0, "a warning"), (1.0, "[[2, 3.5], [4, null]]"), (2.0, "")]
    monkeypatch.setattr(learning, "execute", lambda words, _: measured if "measure" in words else [*screen, (9.0, "")])
    found = learning.train_nanogpt(Path("n"), {"eval_interval": "2", "max_iters": "4"}, 1, {})
    assert found["curve"] == [[2, 3.5], [4, None]] and found["first_step"] == 0.9
    assert found["training"] == pytest.approx(0.4) and found["command"] == pytest.approx(9.0 - 1.0 - 0.5)


def test_a_run_is_not_repeated_and_a_label_keeps_its_settings(tmp_path, monkeypatch):
    given = types.SimpleNamespace(points=2, nanogpt="n", compile=False, bias=False)
    one = object.__new__(learning.Comparison)
    one.given, one.workload, one.file = given, learning.WORKLOADS["char"], tmp_path / "char.jsonl"
    one.until, one.environment, one.network, one.case, one.bins = math.inf, {}, {}, [1], tmp_path
    one.common = {}
    calls = []
    monkeypatch.setattr(learning, "train_nanogpt", lambda *got: calls.append(got) or {"curve": [[2000, 2.0]]})
    monkeypatch.setattr(learning, "train_ours", lambda *got: calls.append(got) or {"curve": []})
    monkeypatch.setattr(learning, "versions", lambda: "none")
    for seed in (1, 1, 2):
        one.run(("nanogpt", "nanoGPT", {}), 1e-3, seed, 1.0)
    one.run(("ours", "b", {"optimizer.name": "muon"}), 1e-3, 1, 0.25)
    assert [record["loss"] for record in one.results()] == [2.0, 2.0, None] and len(calls) == 3
    assert [record["tokens"] for record in one.results()] == [1536000, 1536000, 384000]
    with pytest.raises(SystemExit, match="another label"):
        one.run(("ours", "b", {"optimizer.name": "adamw"}), 1e-3, 1, 0.25)


@pytest.mark.parametrize(
    ("target", "tokens"),
    [(2.0, 400.0), (2.5, 200.0), (3.0, 100.0), (3.5, 100.0), (1.75, 800.0), (1.4, None), (math.nan, None)],
)
def test_tokens_to_a_loss_lie_between_whole_runs(target, tokens):
    runs = [(100.0, 3.0), (400.0, 2.0), (1600.0, 1.5)]
    assert learning_table.tokens_to(target, runs) == (tokens and pytest.approx(tokens))


def record(side: str, rate: float, loss: float | None, seed: int = 1, share: float = 1.0) -> dict:
    run = {"side": side, "label": side, "settings": {}, "rate": rate, "seed": seed, "share": share}
    tokens, curve = int(1600 * share), [] if loss is None else [[800 * share, loss + 1], [1600 * share, loss]]
    seconds = {"training": 160 * share, "command": 20 + 160 * share, "first_step": 5.0, "load": 0.5}
    return {"run": run, "tokens": tokens, "steps": tokens // 4, "loss": loss, "curve": curve, **seconds}


def test_the_table_says_with_which_share_ours_reaches_the_peers_best(tmp_path):
    peer = [record("nanogpt", 1e-3, 2.2), record("nanogpt", 4e-3, 2.0), record("nanogpt", 8e-3, None)]
    peer += [record("nanogpt", 4e-3, 2.1, seed=2)]
    ours = [record("ours", 1e-3, 1.9), record("ours", 3e-3, 1.6), record("ours", 3e-3, 2.5, share=0.25)]
    groups = learning_table.group([*ours, *peer])
    assert [(one.side, one.rate, one.tokens, one.is_best) for one in groups] == [
        ("nanogpt", 1e-3, 1600, False),
        ("nanogpt", 4e-3, 1600, True),
        ("nanogpt", 8e-3, 1600, False),
        ("ours", 1e-3, 1600, False),
        ("ours", 3e-3, 400, True),
        ("ours", 3e-3, 1600, True),
    ]
    rows = learning_table.table(groups).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert "| **0.004** | 1,600 | 2 | **2.0500** | 2.0000 to 2.1000 | 400.0 | 160.0 | 180.0 | 5.0 | 0.5 |" in rows[3]
    assert "| 0.008 | 1,600 | 1 | nan |" in rows[4]
    # Half of the way from 2.5 to 1.6, on a line over the logarithm of the tokens: 800 of 1,600.
    assert learning_table.verdicts(groups) == [
        "ours (rate 0.003) reaches the 2.0500 of nanogpt (rate 0.004) with 50.0% of its tokens, 50.0% of its training "
        "seconds and 55.6% of the whole command's."
    ]
    short = learning_table.group([*peer, record("ours", 3e-3, 1.9, share=0.5), record("ours", 3e-3, 1.8)])
    assert "with at most 50.0% of its tokens" in learning_table.verdicts(short)[0]
    behind = learning_table.verdicts(learning_table.group([*peer, record("ours", 3e-3, 2.4)]))
    assert behind == ["ours does not reach the 2.0500 of nanogpt (rate 0.004): 2.4000 after 1,600 tokens."]
    learning_table.draw(groups, tmp_path / "c.svg")
    assert "<svg" in (tmp_path / "c.svg").read_text()
