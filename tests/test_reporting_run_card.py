"""card.json: what a run says of itself, from its files and from nothing else."""

import json
from pathlib import Path

import jax
import pytest
from test_reporting_run_page import EVIL, eval_line, report, run_folder, train_line

from jaxgpt.config import Config, to_json
from jaxgpt.errors import UserError
from jaxgpt.preparation.skills import LANGUAGES, held_out, skill_names
from jaxgpt.reporting import run_card
from jaxgpt.reporting.run_card import checkout_commit, predicted_loss, read_card
from jaxgpt.serving.served_model import EXAMPLES, example_questions
from jaxgpt.settings import DataConfig, InitConfig, SourceConfig
from jaxgpt.storage.lease import Lease
from jaxgpt.training.recovery import PROCESSES, record_process
from jaxgpt.training.start import locked

PARTS = ["seconds_training", "seconds_compiling", "seconds_evaluation", "seconds_saving", "seconds_other"]
SPEEDRUN = '{"prediction": {"loss": 2.0, "low": 1.75, "high": 2.25}}'


def card(path, *lines, evaluations=(), summary=None, **config):
    run_folder(path, lines, to_json(Config(**config)), summary)
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations), encoding="utf-8")
    return read_card(path, lines, json.loads((path / "config.json").read_text()), summary or {})


def skills(right: dict, language="english", **more):
    """An evaluation of the skills in which so many of 10 answers were right."""
    rows = [
        {"skill": skill, "language": language, "questions": 10, "right": count, "stops": 9,
         "first": {"question": f"{skill}?", "answer": f"my {skill}"}}
        for skill, count in right.items()
    ]  # fmt: skip
    share = sum(right.values()) / 10 / len(right)
    found = {"questions": 10 * len(right), "stops": 0.9, "english": share, "chinese": 0.5, "rows": rows}
    return {"step": 7, "texts": [], "tasks": [], "generation": None, "dtype": "float32", "skills": found} | more


def test_a_trained_run_has_the_card_of_what_was_done(trained):
    found = json.loads((trained.run / "card.json").read_text())
    assert (found["name"], found["status"]) == ("run", "finished")
    assert found["model"] == "2 layers, 2 heads, width 32, context 32, float32"
    assert found["data"] == f"text {trained.text}" and found["started_from"] == "random weights"
    assert (found["steps"], found["tokens"], found["processes"]) == (6, 6 * 8 * 32, 1)
    assert found["device"] == "8 x cpu" and found["versions"]["jax"] == jax.__version__ and "python" in found["command"]
    assert min(found[name] for name in PARTS) >= 0 and found["seconds_evaluation"] > 0 < found["seconds_saving"]
    assert sum(found[name] for name in PARTS) == pytest.approx(found["seconds"], abs=0.5)
    assert found["eval_loss"] >= found["best_eval_loss"] and None not in found.values()
    assert not {"cost", "skills_english", "predicted_loss", "rep_4", "samples"} & set(found)


def test_what_evaluate_finds_comes_into_the_card_and_what_nobody_knows_does_not(tmp_path):
    task = {"task": "piqa", "questions": 9, "cut": 0, "acc": 0.25, "acc_stderr": 0.0125}
    writing = {"prompts": 8, "temperature": 1.0, "model": {"distinct_1": 0.5, "rep_4": 0.125, "stops": None}}
    lines = [train_line(1, seconds_compile=3600.0), eval_line(1, 2.5), eval_line(2, 2.25, eval_stop_rate=0.25)]
    found = card(tmp_path, *lines, summary={"price_per_hour": 2.5})
    assert found["answers_that_stop"] == 0.25 and not {"skills_english", "rep_4", "device", "commit"} & set(found)
    assert (
        found["cost"] == pytest.approx(2.5 * found["seconds"] / 3600, abs=1e-3) and found["seconds_compiling"] == 3600
    )
    old, new = skills({"addition": 3}), skills({"addition": 8}, tasks=[task], generation=writing)
    found = card(tmp_path, *lines, summary={"price_per_hour": 2.5}, evaluations=[old, new])
    assert (found["skills_english"], found["skills_chinese"], found["skills_step"]) == (0.8, 0.5, 7)
    assert (found["answers_that_stop"], found["rep_4"], found["task piqa acc"]) == (0.9, 0.125, 0.25)
    assert "distinct_2" not in found and "task piqa acc_stderr" not in found
    text = report(tmp_path).text
    assert "skills, English 80.0% mean of the skills" in text and "answers that stop 90.0% by themselves, of 10" in text
    assert "piqa acc 25.0%" in text and "cost 2.50 2.5 an hour" in text and "time of compiling 1:00:00" in text


def test_conversations_are_those_of_the_last_evaluation_or_else_the_first_answers_to_skills(tmp_path):
    asked = "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    during = [eval_line(1, 3.0, sample="old"), eval_line(2, 2.0, sample=f"{asked}Hi.<|im_end|>", sample_2=EVIL)]
    evaluated = [skills(dict.fromkeys("abcdefgh", 5))]
    chat = {"data": DataConfig(format="chat", source="skills"), "evaluations": evaluated}
    assert card(tmp_path, *during, **chat)["samples"] == ["user: 你好\nassistant: Hi.", EVIL]
    found = card(tmp_path, train_line(1), **chat)["samples"]
    assert found == [f"user: {letter}?\nassistant: my {letter}" for letter in "aceg"]
    assert "samples" not in card(tmp_path, *during)  # a text is no conversation


@pytest.mark.parametrize(
    "data, init, words",
    [
        ({}, {}, ("stdlib", "random weights")),
        ({"source": "skills", "format": "chat"}, {"from_checkpoint": "runs/a"}, ("skills (conversations)", "runs/a")),
        (
            {"source": (SourceConfig(source="text", path="a.txt", weight=3.0), SourceConfig(source="stdlib"))},
            {"from_huggingface": "gpt2"},
            ("text a.txt 75%, stdlib 25%", "gpt2"),
        ),
    ],
)
def test_data_and_beginning_are_told_in_words(tmp_path, data, init, words):
    found = card(tmp_path, train_line(1), data=DataConfig(**data), init=InitConfig(**init))
    assert (found["data"], found["started_from"]) == words


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("pretrain", SPEEDRUN, {"predicted_loss": 2.0, "predicted_low": 1.75, "predicted_high": 2.25}),
        ("chat", SPEEDRUN, {}),
        ("pretrain", None, {}),
        ("pretrain", "{", {}),
        ("pretrain", '{"prediction": null}', {}),
        ("pretrain", '{"prediction": {"loss": 0, "low": 0, "high": NaN}}', {}),
        ("pretrain", '{"prediction": {"loss": 2.0}}', {}),
    ],
)
def test_a_predicted_loss_stands_beside_the_reached_one(tmp_path, name, content, found):
    (tmp_path / name).mkdir()
    if content is not None:
        (tmp_path / "speedrun.json").write_text(content)
    assert predicted_loss(tmp_path / name) == found
    run = run_folder(tmp_path / name, [eval_line(1, 2.5)])
    if found:
        assert "predicted 2.0000 1.7500 to 2.2500; reached +25.0%" in report(run).text


def test_processes_that_were_killed_count(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    dead = Lease(run)
    with dead:
        pass
    older = {name: value for name, value in dead.owner.items() if name != "began"} | {"id": "of an older version"}
    for beat, owner in ((30.0, dead.owner), (50.0, older)):
        (run / "lease.json").write_text(json.dumps(owner | {"beat": owner.get("began", 0.0) + beat}))
        with locked(run):
            pass
    [line] = [json.loads(line) for line in (run / PROCESSES).read_text().splitlines()]
    assert (line["seconds"], line["status"]) == (30.0, "killed")
    unlogged = {"seconds_eval": 2.0, "seconds_total": 5.0}
    record_process(run, {"id": "b", "began": 100.0}, 110.0, status="finished", unlogged=unlogged)
    record_process(run, {"id": "b", "began": 100.0}, 120.0, status="killed")  # after its report, while it exported
    found = card(run, train_line(1))
    assert (found["processes"], found["seconds"], found["seconds_evaluation"]) == (2, 40.0, 2.0)
    assert found["seconds_other"] == pytest.approx(40 - 0.95 - 2, abs=0.06)


HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "files, found",
    [
        ({}, None),
        ({".git/HEAD": HASH}, HASH),
        ({".git/HEAD": "ref: refs/heads/a/b\n", ".git/refs/heads/a/b": HASH + "\n"}, HASH),
        ({".git/HEAD": "ref: refs/heads/a", ".git/packed-refs": f"# pack\n{HASH} refs/heads/a\n"}, HASH),
        (
            {".git": "gitdir: w/t", "w/t/HEAD": "ref: refs/a", "w/t/commondir": "../c\n", "w/c/refs/a": HASH},
            HASH,
        ),
        ({".git/HEAD": "ref: refs/heads/new"}, None),
        ({".git/HEAD": "ref: refs/heads/a", ".git/refs/heads/a": "what?"}, None),
        ({".git": "gitdir: gone"}, None),
    ],
)  # fmt: skip
def test_the_commit_is_read_from_git_files(tmp_path, monkeypatch, files, found):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(run_card, "__file__", str(tmp_path / "jaxgpt" / "reporting" / "run_card.py"))
    assert checkout_commit() == found


# ---------------------------------------------------------------- questions to try


def set_data(run: Path, **settings) -> None:
    found = json.loads((run / "config.json").read_text())
    found.pop("sha256")
    found["data"] |= settings
    (run / "config.json").write_text(json.dumps(found))


def test_examples_are_held_out_questions_of_the_skills_that_the_model_has(trained_copy):
    run, all_skills = trained_copy.run, skill_names()
    assert example_questions(str(run)) == {} == example_questions("hf:gpt2")
    mixture = [{"source": "skills", "path": None, "text_field": "text", "weight": 9.0}]
    mixture.append(mixture[0] | {"source": "docstrings", "weight": 1.0})
    set_data(run, source=mixture, skills=[*(f"{skill}=0" for skill in all_skills[3:]), "chinese=0"])
    found = example_questions(f"{run}@best")
    assert [len(found["en"]), found["zh"]] == [3, []]
    for question, skill in zip(found["en"], all_skills, strict=False):
        assert question in [turns[0].question for turns in held_out(skill, "english", 10)]

    right = dict(zip(all_skills, [8, 7, 10] + [9] * (len(all_skills) - 3), strict=True))
    lines = [skills({"addition": 10}), skills(right, "chinese"), {"step": 8, "texts": []}]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = example_questions(str(run))
    assert found["en"] == [] and len(set(found["zh"])) == EXAMPLES and found == example_questions(str(run / "hf"))
    elsewhere = run.rename(run.parent / "runs")
    (elsewhere / "hf").rename(run.parent / "hf")
    assert example_questions(str(run.parent / "hf")) == {}


def test_every_skill_has_an_example_that_begins_a_conversation():
    from jaxgpt.serving.served_model import _question

    found = {(skill, one): _question(skill, one) for skill in skill_names() for one in LANGUAGES}
    assert len(set(found.values())) == len(found) and max(map(len, found.values())) < 80


def test_a_damaged_config_around_hf_is_named(trained_copy):
    (trained_copy.run / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        example_questions(str(trained_copy.run / "hf"))
