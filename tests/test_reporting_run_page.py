"""report.html is one honest, self-contained page, whatever the run folder holds."""

import html.parser
import json
import re
from types import SimpleNamespace

import jax
import matplotlib
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf

from jaxgpt.config import Config, to_json
from jaxgpt.errors import UserError
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.reporting import figures
from jaxgpt.reporting.run_page import write_report, write_summary
from jaxgpt.settings import MeshConfig, ModelConfig, TrainConfig

EVIL = "</pre><script>alert('x')</script> & \"quoted\""


def run_folder(path, lines, config=None, summary=None):
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")
    if config is not None:
        (path / "config.json").write_text(config)
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def train_line(step, **more):
    line = {
        "step": step,
        "epoch": step / 500,
        "loss": 2 + 9 / step,
        "grad_norm": 1.0,
        "tokens": 512 * step,
    }
    line |= {"learning_rate": 6e-4, "tokens_per_second": 31000.0, "mfu": None, "seconds_step": 0.9}
    return line | {"seconds_data": 0.05, "seconds_eval": 0.0, "seconds_save": 0.0} | more


def eval_line(step, loss, **more):
    return {
        "step": step,
        "eval_loss": loss,
        "eval_perplexity": 2.0,
        "eval_bits_per_byte": 1.0,
    } | more


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside <style> and <svg>."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words, self._skipping = [], [], 0
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._skipping += tag in ("style", "svg")

    def handle_endtag(self, tag):
        self._skipping -= tag in ("style", "svg")

    def handle_data(self, data):
        if not self._skipping:
            self.words.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def report(path):
    return Page(write_report(path))


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(tmp_path):
    lines = [train_line(1), eval_line(1, 3.0, sample=EVIL)]
    page = report(run_folder(tmp_path, lines, to_json(Config()), {"status": EVIL}))
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            assert name not in ("href", "src", "xlink:href") or value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", page.source)


def test_whatever_a_file_holds_is_shown_as_text(tmp_path):
    lines = [eval_line(1, 3.0, sample=EVIL), {"step": 2, "loss": None, "nonfinite": {"<b>": "nan"}}]
    config = json.dumps({"data": {"path": EVIL, "<i>": "<u>"}})
    summary = {"status": EVIL, "dataset": {"<b>": EVIL}, "versions": {"<b>": EVIL}}
    page = report(run_folder(tmp_path, lines, config, summary))
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) == 5


def test_chinese_and_emoji_survive_and_so_do_the_lines_of_a_sample(tmp_path):
    page = report(run_folder(tmp_path, [eval_line(1, 3.0, sample="\n你好 🎉\n  x")]))
    assert "\n你好 🎉\n  x</pre>" in page.source


def test_headline_tells_the_last_and_the_best_validation_loss_and_its_step(tmp_path):
    lines = [eval_line(10, 3.0), eval_line(20, 1.5), train_line(30), eval_line(30, 2.25)]
    text = report(run_folder(tmp_path, lines)).text
    assert "validation loss 2.2500 nats/token, step 30" in text
    assert "best 1.5000 step 20" in text
    assert "perplexity 2 " in text and "bits per byte 1 " in text
    assert "tokens seen 15.4 k" in text and "tokens/s 31 k" in text


def test_time_is_that_of_all_starts_of_the_run_and_its_shares_are_of_all_of_it(tmp_path):
    lines = [
        train_line(1, seconds_step=3000.0, seconds_data=600.0),
        train_line(2, seconds_step=0.0),
    ]
    lines[1] |= {"seconds_data": 0.0, "seconds_eval": 0.0, "seconds_total": 400.0}
    text = report(run_folder(tmp_path, lines)).text
    assert "time 1:06:40 2 steps" in text
    assert "step 75.0%, data 15.0%, eval 0.0%, save 0.0%, other 10.0%" in text


def test_settings_that_differ_come_first_and_the_others_are_folded(tmp_path):
    config = Config(model=ModelConfig(n_layer=3))
    page = report(run_folder(tmp_path, [train_line(1)], to_json(config)))
    shown, folded = page.source.split("settings at their defaults")
    assert "<td>model.n_layer<td>3<td" in shown and "model.n_head" not in shown
    assert "<td>model.n_head<td>12" in folded and "model.n_layer" not in folded
    assert page.count("details") == 1


def test_a_config_of_another_version_is_still_shown(tmp_path):
    config = json.dumps({"model": {"n_layer": 3, "gone": True}})
    text = report(run_folder(tmp_path, [train_line(1)], config)).text
    assert "model.gone true not a setting of this version" in text


def test_samples_are_newest_first_and_the_older_are_folded(tmp_path):
    lines = [eval_line(step, 3.0, sample=f"text{step}.") for step in (10, 20, 30)]
    page = report(run_folder(tmp_path, lines))
    newest, older = page.source.split("2 older")
    assert "text30." in newest and "text20." not in newest
    assert older.index("text20.") < older.index("text10.")


def test_figures_that_are_not_finite_are_said_and_not_drawn(tmp_path):
    lines = [train_line(1), train_line(2, loss=None, nonfinite={"loss": "inf"})]
    page = report(run_folder(tmp_path, lines))
    assert "Not finite: loss was inf at step 2; 1 such lines in all." in page.text
    assert not re.search(r"\b(nan|inf)\b", page.source.split("<svg", 1)[1], re.IGNORECASE)


@pytest.mark.parametrize(
    "lines, drawn",
    [
        ([], 0),
        ([{"step": 0}], 0),
        ([{"step": 1, "loss": None, "eval_loss": None}], 0),
        ([{"step": 1, "sample": "x"}], 0),
        ([eval_line(0, 5.0)], 1),
        ([train_line(1)], 3),
        ([train_line(step) for step in range(1, 201)], 3),
        ([train_line(step, loss=2.0) for step in range(1, 201)], 3),
    ],
)
def test_any_number_of_lines_makes_a_page(tmp_path, lines, drawn):
    page = report(run_folder(tmp_path, lines))
    assert page.count("svg") == drawn
    assert page.count("h1") == 1


def test_a_line_that_is_being_written_does_not_spoil_the_page(tmp_path):
    run_folder(tmp_path, [eval_line(1, 3.0)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "eval_lo')
    assert "validation loss 3.0000 nats/token, step 1" in report(tmp_path).text


def y_labels(page):
    """The numbers beside the y axis of the first figure: those set to the left of their place."""
    first = page.source[page.source.index("<svg") : page.source.index("</svg>")]
    return [float(label) for label in re.findall(r"text-anchor: end[^>]*>([\d.]+)<", first)]


def test_the_first_steps_and_a_spike_do_not_flatten_the_loss_curve(tmp_path):
    lines = [train_line(step, loss=2 + 8 / step + (100 if step == 500 else 0)) for step in range(1, 1001)]
    page = report(run_folder(tmp_path, lines))
    assert 2 < max(y_labels(page)) < 3
    assert "the maximum is 102" in page.text


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_every_colour_of_a_figure_stand_out_from_the_light_page_and_the_dark_one(tmp_path, theme):
    page = report(run_folder(tmp_path, [train_line(1), train_line(2), eval_line(2, 2.0)]))
    variables = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", figures.PAGE_STYLE.split("@media screen")[theme]))
    for ground in ("card", "page"):
        assert contrast(variables["ink"], variables[ground]) > 10
        assert contrast(variables["muted"], variables[ground]) >= 4.5
    ramp = [matplotlib.colors.to_hex(figures.ramp(share)) for share in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    for colour in (*figures.SERIES, *figures.COLOURS.values(), *ramp):
        assert contrast(colour, variables["card"]) >= 3, colour
    assert "svg text { fill: var(--ink) !important }" in figures.PAGE_STYLE and "prefers-color-scheme" in page.source
    drawn = set(re.findall(r"#[0-9a-f]{6}\b", "".join(re.findall(r"<svg.*?</svg>", page.source, re.DOTALL))))
    assert drawn - {"#000000"} <= {*figures.SERIES, *figures.COLOURS.values()}


def test_the_same_run_makes_the_same_bytes(tmp_path):
    run_folder(tmp_path, [train_line(1), eval_line(1, 2.0)])
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


def test_making_a_page_leaves_no_global_state_of_matplotlib(tmp_path):
    before = dict(matplotlib.rcParams)
    write_report(run_folder(tmp_path, [train_line(1)]))
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.get_all_fig_managers()  # where pyplot keeps its figures


def test_thirty_thousand_lines_make_less_than_a_megabyte(tmp_path):
    lines = [train_line(step) for step in range(1, 30_001)]
    for line in lines[299::300]:
        line |= eval_line(line["step"], 2 + 1 / line["step"], sample="字" * 5000)
    path = write_report(run_folder(tmp_path, lines))
    assert path.stat().st_size < 1_000_000


# ---------------------------------------------------------------- evaluations


def evaluation(step=10, **more):
    found = {"step": step, "dtype": "float32", "window": 64, "stride": 32, "texts": [], "tasks": [], "generation": None}
    return found | more


def evaluated_text(name, loss):
    return {"name": name, "tokens": 9, "bytes": 30, "loss": loss, "perplexity": 9.5, "bits_per_byte": 1.5}


def record(path, *evaluations):
    run_folder(path, [train_line(1)])
    lines = [line if isinstance(line, str) else json.dumps(line) for line in evaluations]
    (path / "evaluations.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return report(path)


def test_without_an_evaluation_there_is_no_section_of_it(tmp_path):
    page = report(run_folder(tmp_path, [train_line(1), eval_line(1, 2.0)]))
    assert "Evaluation" not in page.text and "Tasks during training" not in page.text


def test_the_newest_figure_of_each_text_stride_type_and_step_is_told(tmp_path):
    again = [evaluation(texts=[evaluated_text("a.txt", loss)]) for loss in (3.25, 3.5)]
    others = [
        evaluation(stride=16, texts=[evaluated_text("a.txt", 3.0)]),
        evaluation(dtype="bfloat16", texts=[evaluated_text("a.txt", 3.125)]),
        evaluation(20, texts=[evaluated_text("a.txt", 2.75)]),
        evaluation(texts=[evaluated_text("b.txt", 2.875)]),
    ]
    text = record(tmp_path, *again, *others, '{"step": 30, "texts": [{"na').text
    assert re.findall(r"a\.txt loss ([\d.]+)", text) == ["3.5000", "3.0000", "3.1250", "2.7500"]
    assert "b.txt loss 2.8750" in text and "windows of 64 tokens, stride 16, float32" in text


def test_a_task_is_told_with_its_error_beside_what_was_published(tmp_path):
    task = {"task": EVIL, "questions": 5000, "cut": 0, "acc": 0.25, "acc_stderr": 0.0125, "perplexity": 50.5}
    task["published"] = [{"model": "GPT-2 124M", "metric": "acc", "value": 0.4599, "source": EVIL}]
    writing = {"prompts": 8, "temperature": 1.0, "model": {"rep_4": 0.5, "stops": None}, "real": {"rep_4": 0.125}}
    page = record(tmp_path, evaluation(tasks=[task], generation=writing))
    assert f"{EVIL} acc 25.00 % ± 1.25 % 10 5,000 questions, float32 GPT-2 124M: 45.99 % ({EVIL})" in page.text
    assert f"{EVIL} perplexity 50.5" in page.text
    assert "what it writes rep_4 0.5000" in page.text and "real texts: 0.1250" in page.text
    assert "stops" not in page.text and "script" not in {tag for tag, _ in page.tags}


def test_tasks_that_were_scored_during_training_are_drawn_over_the_steps(tmp_path):
    more = {
        "eval_piqa_acc": 0.5,
        "eval_piqa_acc_stderr": 0.01,
        "eval_my_own_acc_norm": 0.75,
        "eval_piqa_perplexity": 3.0,
    }
    page = report(run_folder(tmp_path, [train_line(1), eval_line(1, 3.0, **more), eval_line(2, 2.5, **more)]))
    assert "Tasks during training piqa my_own, acc_norm" in page.text  # and nothing else
    assert "questions answered right" in page.source and ">100%<" in page.source


def test_a_status_is_told_as_it_is(tmp_path):
    status = "finished (stopped early: no better validation loss for 3 evaluations)"
    page = report(run_folder(tmp_path, [train_line(1)], summary={"status": status}))
    assert status in page.text


@pytest.mark.parametrize("has_metrics", [True, False])
def test_the_summary_says_what_ran_and_how_it_ended(tmp_path, has_metrics):
    if has_metrics:
        run_folder(tmp_path, [train_line(1)])
    split = SimpleNamespace(num_tokens=1000, facts=lambda: {"rows": 5})
    data = {"path": tmp_path / "data", "fingerprint": "f1", "vocab_size": 65, "train": split, "validation": split}
    config = Config(model=ModelConfig(n_layer=2), train=TrainConfig(global_batch_size=4))
    mesh = build_mesh(MeshConfig(), jax.devices()[:2])
    parts = {"config": config, "dataset": SimpleNamespace(**data), "mesh": mesh, "workdir": tmp_path, "lease": None}
    write_summary(SimpleNamespace(**parts, checkpoints=SimpleNamespace(latest_step=lambda: 6)), "over", 1.26)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["status"], found["seconds"], found["devices"], found["mesh"]["data"]) == ("over", 1.3, 2, 2)
    assert found["checkpoint"] == 6
    assert found["tokens_per_step"] == 4 * config.block_size
    assert found["data"] | {"path": ""} == {
        "path": "", "fingerprint": "f1", "training_tokens": 1000, "validation_tokens": 1000, "rows": 5, "vocabulary": 65
    }  # fmt: skip
    assert found["versions"]["jax"] == jax.__version__
    assert (tmp_path / "report.html").exists() == has_metrics


def test_a_folder_without_metrics_is_the_users_error_and_gets_no_page(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
