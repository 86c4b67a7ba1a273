"""`compare`: what was set differently, what came of it, and whether the numbers may be compared at all."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest

from jaxgpt import compare
from jaxgpt.config import Config, to_json
from jaxgpt.reporting import figures
from jaxgpt.reporting.comparison import (
    comparability,
    differing_settings,
    distinguishing_names,
    read_runs,
    text_report,
)
from jaxgpt.reporting.comparison_page import write_page
from jaxgpt.settings import DataConfig, EvalConfig, ModelConfig, OptimizerConfig, TrainConfig

CONFIG = Config(
    model=ModelConfig(n_layer=2),
    train=TrainConfig(max_steps=400, global_batch_size=8, gradient_accumulation_steps=1, per_device_train_batch_size=4),
    data=DataConfig(block_size=64),
    eval=EvalConfig(eval_batches=20),
)
LINES = [
    {"step": 2, "loss": 3.0, "tokens": 1024, "tokens_per_second": 100.0, "seconds_step": 4.0, "seconds_total": 5.0},
    {"step": 2, "eval_loss": 2.0, "eval_perplexity": 7.4, "eval_bits_per_byte": 1.25, "eval_piqa_acc": 0.5},
    {"step": 4, "loss": 2.5, "tokens": 2048, "tokens_per_second": 300.0, "seconds_step": 4.0, "seconds_total": 7.0},
    {"step": 4, "eval_loss": 2.5, "eval_perplexity": 12.2, "eval_bits_per_byte": 1.5, "eval_piqa_acc": 0.75},
]
SUMMARY = {"status": "finished", "parameters": 1234, "device": "cpu", "devices": 2}


def make_run(folder, config=CONFIG, lines=LINES, summary=SUMMARY, fingerprint="f1", tokenizer="t1"):
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text(tokenizer)
    (folder / "config.json").write_text(config if isinstance(config, str) else to_json(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary is not None:
        told = summary | {"data": {"fingerprint": fingerprint, "validation_tokens": 10**6}}
        (folder / "summary.json").write_text(json.dumps(told))
    return folder


def pair(tmp_path, first=None, second=None):
    return read_runs([make_run(tmp_path / "a", **first or {}), make_run(tmp_path / "b", **second or {})])


# ---------------------------------------------------------------- settings


def test_differing_settings_are_exactly_those_set_differently(tmp_path):
    other = dataclasses.replace(
        CONFIG, model=ModelConfig(n_layer=3), optimizer=OptimizerConfig(learning_rate=0.5, warmup_steps=7)
    )
    found = differing_settings(pair(tmp_path, second={"config": other}))
    assert found == {
        "model.n_layer": [2, 3],
        "optimizer.learning_rate": [CONFIG.optimizer.learning_rate, 0.5],
        "optimizer.warmup_steps": [CONFIG.optimizer.warmup_steps, 7],
    }


def test_a_setting_that_a_version_does_not_know_differs_only_from_what_is_not_its_default(tmp_path):
    old = json.loads(to_json(CONFIG))
    del old["model"]["remat"], old["optimizer"]["max_grad_norm"]
    old["model"]["gone"] = True
    new = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(max_grad_norm=0.25))
    found = differing_settings(pair(tmp_path, {"config": json.dumps(old)}, {"config": new}))
    assert found == {"optimizer.max_grad_norm": ["–", 0.25], "model.gone": [True, "–"]}


# ---------------------------------------------------------------- numbers


def test_final_numbers_are_those_of_the_files(tmp_path):
    run, _ = pair(tmp_path)
    assert run.card == {
        "status": "finished",
        "model": "2 layers, 12 heads, width 768, context 1024, bfloat16",
        "parameters": 1234,
        "data": "stdlib",
        "validation_tokens": 10**6,
        "started_from": "random weights",
        "steps": 4,
        "tokens": 2048,
        "seconds": 12.0,
        "seconds_training": 8.0,
        "seconds_compiling": 0.0,
        "seconds_evaluation": 0.0,
        "seconds_saving": 0.0,
        "seconds_other": 4.0,
        "train_loss": 2.5,
        "eval_loss": 2.5,
        "best_eval_loss": 2.0,
        "best_step": 2,
        "best_perplexity": 7.4,
        "bits_per_byte": 1.5,
        "best_bits_per_byte": 1.25,
        "tokens_per_second": 200.0,
        "device": "2 x cpu",
        "accuracy piqa": 0.75,
    }


def test_a_curve_lies_where_the_file_says_over_steps_tokens_and_time(tmp_path):
    lines = [*LINES, {"step": 6, "eval_loss": 1.0}]  # its training line has not been written yet
    run, _ = pair(tmp_path, {"lines": lines})
    evaluated = ~np.isnan(run.columns["eval_loss"])
    places = {axis: run.columns[axis][evaluated].tolist() for axis in ("step", "tokens", "time")}
    assert places == {"step": [2, 4, 6], "tokens": [1024, 2048, 3072], "time": [5.0, 12.0, 18.0]}


def test_a_run_that_goes_on_still_and_one_that_has_only_begun_compare(tmp_path, capsys):
    running = {"summary": None, "lines": LINES[:1]}
    make_run(tmp_path / "a", **running), make_run(tmp_path / "b", summary=None, lines=[])
    (tmp_path / "a" / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "2" / "metadata.json").write_text('{"data_fingerprint": "f1"}')
    assert (
        compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(tmp_path / "c.html"), "--by", "step"])
        == 0
    )
    told = capsys.readouterr().out
    assert "running, or killed" in told and "b: no step has been logged yet" in told
    assert "b: not known before the first checkpoint" in told and "a: not known" not in told


# ---------------------------------------------------------------- what does not compare


def test_runs_that_compare_give_no_warning(tmp_path):
    other = dataclasses.replace(CONFIG, model=ModelConfig(n_layer=3))
    assert comparability(pair(tmp_path, second={"config": other})) == ({"token", "byte"}, [])


@pytest.mark.parametrize(
    "second, comparable, said",
    [
        ({"tokenizer": "t2"}, {"byte"}, r"tokenizers differ \(a \| b\).*[Bb]its per byte do"),
        ({"fingerprint": "f2"}, set(), r"data differ \(a \| b\)"),
        (
            {"config": dataclasses.replace(CONFIG, eval=EvalConfig(eval_batches=21))},
            {"token", "byte"},
            r"different numbers of rows \(160: a \| 168: b\)",
        ),
        (
            {"config": dataclasses.replace(CONFIG, eval=EvalConfig(eval_batches=None))},
            {"token", "byte"},
            r"different numbers of rows \(160: a \| all: b\)",
        ),
        (
            {"config": dataclasses.replace(CONFIG, data=DataConfig(block_size=32))},
            {"token", "byte"},
            r"windows differ \(64: a \| 32: b tokens\)",
        ),
    ],
)
def test_a_warning_says_why_numbers_do_not_compare(tmp_path, second, comparable, said):
    found, warnings = comparability(pair(tmp_path, second=second))
    assert found == comparable
    assert len(warnings) == 1 and re.search(said, warnings[0])


def test_no_loss_per_token_is_called_the_best_where_tokenizers_differ(tmp_path):
    better = [line | ({"eval_loss": 1.0, "eval_bits_per_byte": 1.0} if "eval_loss" in line else {}) for line in LINES]
    text = text_report(pair(tmp_path, second={"tokenizer": "t2", "lines": better}), 120)
    starred = [line.split("  ")[0] for line in text.splitlines() if "*" in line]
    assert starred == ["bits per byte, last ≠", "bits per byte of the best ≠", "* the best"]


# ---------------------------------------------------------------- names and tables


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/x/a", "/x/b"], ["a", "b"]),
        (["/x/a/run", "/x/b/run", "/x/other"], ["a/run", "b/run", "other"]),
        (["/x/a/b/run", "/y/a/b/run"], ["x/a/b/run", "y/a/b/run"]),
        (["/run", "/x/run"], ["//run", "x/run"]),
    ],
)
def test_names_are_the_shortest_that_differ(paths, names):
    from pathlib import Path

    assert distinguishing_names([Path(path) for path in paths]) == names


def test_every_run_and_number_is_told_however_narrow_the_screen(tmp_path):
    runs = read_runs([make_run(tmp_path / f"run{number:02d}") for number in range(13)])
    text = text_report(runs, 60)
    assert max(map(len, text.splitlines())) <= 60
    assert [text.count(run.name) for run in runs] == [1] * 13  # there is no table of settings
    assert sum(line.count("2.0000") for line in text.splitlines() if line.startswith("validation loss, best")) == 13


# ---------------------------------------------------------------- the page


class Tags(html.parser.HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.tags = []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_the_page_shows_what_files_hold_as_text_and_asks_nothing_of_the_network(tmp_path):
    evil = "<script>alert('x')</script>"
    config = json.loads(to_json(CONFIG))
    config["data"]["path"] = evil
    lines = [*LINES, {"step": 4, "eval_<u>$x^_acc": 0.5}]
    first = {"config": json.dumps(config), "lines": lines, "summary": SUMMARY | {"status": evil}}
    source = write_page(tmp_path / "c.html", pair(tmp_path, first), ["step"]).read_text()
    tags = Tags(source).tags
    assert not {"script", "u", "link", "iframe", "img", "object"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            assert name not in ("href", "src", "xlink:href") or value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", source)
    assert source.count("&lt;script&gt;") >= 2


@pytest.mark.parametrize("by, axes", [(None, ["step", "tokens", "time"]), ("tokens", ["tokens"])])
def test_the_page_draws_both_losses_by_each_axis(tmp_path, capsys, by, axes):
    folders = [str(make_run(tmp_path / name, lines=[x for x in LINES])) for name in "ab"]
    more = ["--by", by] if by else []
    assert compare.main([*folders, "--html", str(tmp_path / "c.html"), *more]) == 0
    source = (tmp_path / "c.html").read_text()
    for axis in ("step", "tokens", "time"):
        for title in ("Validation loss", "Training loss", "piqa"):
            assert (f"<h2>{title} by {axis}</h2>" in source) == (axis in axes)
    assert "training time (seconds)" in source or by


def test_the_same_runs_make_the_same_page(tmp_path):
    runs = pair(tmp_path)
    one, other = (write_page(tmp_path / name, runs, ["step"]).read_bytes() for name in "12")
    assert one == other


def test_24_lines_look_different_and_any_two_of_the_first_six_in_marker_too():
    looks = [figures.series(number) for number in range(24)]
    assert len({(str(look["color"]), str(look["linestyle"])) for look in looks}) == 24
    assert len({look["marker"] for look in looks[:6]}) == 6
    figures.series(10**6)


# ---------------------------------------------------------------- the verb


def test_json_holds_what_the_screen_tells(tmp_path, capsys):
    folders = [str(make_run(tmp_path / name, summary=SUMMARY | {"commit": name})) for name in "ab"]
    assert compare.main([*folders, "--json", str(tmp_path / "c.json")]) == 0
    found = json.loads((tmp_path / "c.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["a", "b"]
    assert found["runs"][0]["best_eval_loss"] == 2.0 and found["runs"][0]["skills_english"] is None
    assert found["differing"] == ["commit"] and [run["commit"] for run in found["runs"]] == ["a", "b"]
    assert found["settings"] == {} and found["warnings"] == []
    told = capsys.readouterr().out
    assert "The settings are the same." in told
    shown = [
        line.split() for line in told.splitlines() if line.split()[1:2] == ["≠"]
    ]  # two parts where folders are long
    assert {words[0] for words in shown} == {"commit"} and [word for words in shown for word in words[2:]] == ["a", "b"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["{a}"], "two runs or more, got 1"),
        ([], "two runs or more, got 0"),
        (["{a}", "{a}"], "the same run twice"),
        (["{a}", "{a}/../a"], r"the same run twice, as .*a and as .*\.\./a"),
        (["{a}", "{none}"], "none: no such folder"),
        (["{a}", "{empty}"], "empty: no run, as it holds no config.json"),
        (["{a}", "{quiet}"], r"metrics\.jsonl: no such file"),
        (["{a}", "{broken}"], r"config\.json: cannot be read as JSON"),
        (["{a}", "{b}", "--by", "step"], "add --html FILE"),
        (["{a}", "{b}", "--html", "{none}/c.html"], "there is no folder"),
        (["{a}", "{b}", "--json", "{empty}"], "a folder; name a file in it"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, words, said):
    folders = {name: tmp_path / name for name in ("a", "b", "quiet", "broken", "empty", "none")}
    for name in ("a", "b", "quiet", "broken"):
        make_run(folders[name])
    (folders["quiet"] / "metrics.jsonl").unlink()
    (folders["broken"] / "config.json").write_text("{")
    folders["empty"].mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert compare.main([word.format(**folders) for word in words]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and not told.out
    assert re.search(said, told.err)
    assert sorted(tmp_path.rglob("*")) == before
