"""The plan of a speedrun: the law, the sizes, the settings, the texts, and what is refused at once."""

import json
import math

import numpy as np
import pytest

from jaxgpt.config import flatten, load_config
from jaxgpt.errors import UserError
from jaxgpt.tuning import speedrun_plan
from jaxgpt.tuning.config_file import to_toml
from jaxgpt.tuning.loss_law import LossLaw, builtin_law
from jaxgpt.tuning.speed_probe import StepTime, seconds_of
from jaxgpt.tuning.speedrun_data import chosen_data, presets
from jaxgpt.tuning.speedrun_plan import Frame, Length, SpeedrunPlan, candidates, settings_of

FRAME = Frame(n_positions=256, vocab_size=2048, devices=1, is_cpu=True)
PROBES = [StepTime(1.5e10, 0.2, 5.0), StepTime(5e10, 0.5, 8.0)]


def test_the_law_finds_its_numbers_again_and_its_interval_holds_most_new_runs():
    sizes, tokens = (grid.ravel() for grid in np.meshgrid([1e5, 4e5, 1.6e6, 6e6], [5e5, 1e6, 2e6, 4e6]))
    true = lambda n, d: 1.2 + 9 * n**-0.3 + 45 * d**-0.27
    exact = LossLaw(sizes, tokens, true(sizes, tokens))
    assert exact.loss(3e6, 3e6) == pytest.approx(true(3e6, 3e6), rel=1e-3)
    assert exact.predict(1e9, 3e6) is None and exact.predict(3e6, 1e10) is None  # far beyond the runs
    random, inside = np.random.default_rng(0), 0
    for _ in range(40):
        noisy = LossLaw(sizes, tokens, true(sizes, tokens) * np.exp(random.normal(0, 0.01, len(sizes))))
        guess = noisy.predict(3e6, 3e6)
        inside += guess.low < true(3e6, 3e6) * math.exp(random.normal(0, 0.01)) < guess.high
    assert 31 <= inside <= 40  # 36 expected


def test_more_time_never_means_a_smaller_model_and_reads_more():
    found = [candidates(seconds, PROBES, FRAME)[0] for seconds in (60, 500, 10_000, 40_000)]
    sizes = [one.n_layer * one.n_embd**2 for one in found]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert all(speedrun_plan.SIZES.count((one.n_layer, one.n_embd)) == 1 for one in found)
    slow = candidates(600, [probe._replace(seconds=10 * probe.seconds) for probe in PROBES], FRAME)[0]
    assert slow.n_layer * slow.n_embd**2 <= sizes[2]


def test_a_step_takes_what_the_line_through_the_probes_says():
    assert seconds_of(1.5e10, PROBES) == pytest.approx(0.2)
    assert seconds_of(3.25e10, PROBES) == pytest.approx(0.35)
    assert seconds_of(3e10, PROBES[:1]) == pytest.approx(0.4)  # in proportion
    assert seconds_of(3e10, [PROBES[0], PROBES[1]._replace(seconds=0.1)]) > 0  # noise: no time runs backwards


@pytest.mark.parametrize(("tokens", "devices"), [(1e5, 1), (4e6, 1), (1e9, 8), (5e6, 3)])
def test_a_length_reads_the_tokens_with_rows_for_every_device(tokens, devices):
    frame = FRAME._replace(devices=devices)
    length = frame.length(tokens)
    assert length.rows % devices == 0
    assert length.rows * length.steps * 256 == pytest.approx(tokens, rel=0.05)


@pytest.mark.parametrize("stage", ["pretrain", "chat"])
def test_the_config_file_says_what_is_trained(tmp_path, stage):
    plan = SpeedrunPlan(3, 96, Length(8, 90), Length(16, 40), builtin_law().predict(4e5, 1e6), 100.0)
    assert SpeedrunPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    sources = [{"source": "skills", "weight": 0.9}, {"source": "builtin", "weight": 0.1}]
    data = {"source": sources, "max_bytes": 5} if stage == "chat" else {"source": "builtin"}
    settings = settings_of(plan, stage, data, "runs/a b", 7, FRAME)
    (tmp_path / "x.toml").write_text(to_toml(settings, ["written by a test", ""]))
    config = load_config(tmp_path / "x.toml")
    assert flatten(config) == flatten(load_config(None, settings))
    assert (config.model.n_layer, config.model.n_embd, config.train.seed) == (3, 96, 7)
    assert (config.train.max_steps, config.train.global_batch_size) == getattr(plan, stage)[::-1]
    assert config.init.from_checkpoint == ("runs/a b/pretrain@best" if stage == "chat" else None)


def test_the_texts_are_found_by_what_they_hold(tmp_path):
    def file(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    talk = file(
        "talk.jsonl",
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
    )
    story, rows = file("story.txt", "Once upon a time"), file("rows.jsonl", json.dumps({"text": "Once"}))
    book = file("book.jsonl", json.dumps({"title": "x", "body": "word " * 30}))
    file("folder/a.md", "a")
    assert chosen_data("builtin", None)[:2] == ({"source": "builtin"}, {"source": "skills"})
    assert chosen_data(story, None).text == {"source": "text", "path": story}
    assert chosen_data(str(tmp_path / "folder"), None).text["source"] == "text"
    assert chosen_data(rows, None).text == {"source": "jsonl", "path": rows}
    assert chosen_data(book, None).text["text_field"] == "body"
    alone, beside = chosen_data(talk, None), chosen_data(story, talk)
    assert alone.text == {"source": "builtin"} and alone.chat == beside.chat == {"source": "jsonl", "path": talk}
    assert not alone.has_skills and beside.text["path"] == story
    for name in presets():
        found = chosen_data(name, None)
        assert found.text["source"].startswith("huggingface:") and all("licence" in note for note in found.notes)
        load_config(None, {"data.source": [found.text, {**found.chat, "weight": 2.0}]})


@pytest.mark.parametrize(
    ("data", "chat", "said"),
    [
        ("novells", None, "no such file or folder, and no set of that name; the sets are builtin, english"),
        ("{folder}/x.png", None, "nothing in it that can be read"),
        ("{folder}/empty.jsonl", None, "holds no record"),
        ("{folder}/odd.jsonl", None, "neither a text nor a conversation"),
        ("builtin", "{folder}/story.txt", "holds texts, and no conversations"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, data, chat, said):
    for name, text in (("x.png", "x"), ("empty.jsonl", ""), ("odd.jsonl", '{"a": 1, "b": 2}\n'), ("story.txt", "Once")):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        chosen_data(data.format(folder=tmp_path), chat and chat.format(folder=tmp_path))
