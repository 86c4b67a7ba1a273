"""A preparation in stages: shared out in any way, killed anywhere, it gives the same shards."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import wait_for

from jaxgpt.config import Config, from_json, to_json
from jaxgpt.data.dataset import open_dataset
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation import chunks, duplicates, lint, make_dataset, preparation_report, sources, splitting, stages
from jaxgpt.preparation.chunks import SPLIT_CODES, Rows, WorkFolder, write_rows
from jaxgpt.preparation.make_dataset import prepare
from jaxgpt.preparation.runners import Processes
from jaxgpt.preparation.splitting import DROPPED, STARTS, TRAIN, VALIDATION
from jaxgpt.settings import CleaningConfig, DataConfig

WORDS = np.random.default_rng(0).choice(["cat", "sat", "on", "the", "mat", "中文", "https://x.org/a"], (120, 40))
TEXTS = [f"number {number}  " + " ".join(words) + "\n" for number, words in enumerate(WORDS)]
CHUNK = 4_000  # bytes: six or seven chunks
CLEANING = {"urls": "mask", "whitespace": True, "min_chars": 100}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(stages, "CHUNK_BYTES", CHUNK)


def config_of(folder: Path, **sections) -> Config:
    """Settings for the texts in `folder`; `sections` is {section: {setting: value}}."""
    file = folder / "texts.jsonl"
    if not file.exists():
        file.write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "short  text"]), encoding="utf-8"
        )
    settings = {
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 64},
        "tokenizer": {"vocab_size": 300},
        "data": {"source": "jsonl", "path": str(file), "validation_fraction": 0.2, "num_proc": 1},
    }
    for name, section in sections.items():
        settings[name] = settings.get(name, {}) | section
    settings["data"].setdefault("prepared_dir", str(folder / "prepared"))
    return from_json(json.dumps(settings))


def chat_config(folder: Path, **sections) -> Config:
    data = {"source": "support", "format": "chat", "max_bytes": 30_000}
    return config_of(folder, **{"data": data, "model": {"n_positions": 256}} | sections)


AUGMENTED = {"augmentation": {"copies": 2, "typo_rate": 0.05}}


def elsewhere(config: Config, folder: Path, **data) -> Config:
    data = {"prepared_dir": str(folder), **data}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def shards(path: Path) -> dict[str, str]:
    """{name: SHA-256} of the shards and the tokenizer, and what the metadata says."""
    files = [*path.glob("*.array_record-*"), *path.glob("tokenizer/*"), path / "metadata.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Recorder(Processes):
    """Does the work in this process, and remembers which."""

    def __init__(self):
        super().__init__(1)
        self.done: list[tuple[str, int]] = []

    def each(self, task, numbers, progress) -> None:
        self.done += [(task.func.__name__ if hasattr(task.func, "__name__") else "?", number) for number in numbers]
        super().each(task, numbers, progress)


# ---------------------------------------------------------------- shared out in any way


def test_the_shards_do_not_depend_on_chunks(tmp_path, monkeypatch):
    config, found = config_of(tmp_path, cleaning=CLEANING), []
    for size in (1500, 10**9):
        monkeypatch.setattr(stages, "CHUNK_BYTES", size)
        found.append(shards(prepare(elsewhere(config, tmp_path / str(size)))))
    assert len(found[0]) == 5
    assert found[0] == found[1]


@pytest.mark.system
def test_the_shards_do_not_depend_on_processes(tmp_path):
    config = config_of(tmp_path, cleaning=CLEANING)
    one, two = (shards(prepare(elsewhere(config, tmp_path / str(count), num_proc=count))) for count in (1, 2))
    assert one == two


def test_conversations_do_not_depend_on_chunks(tmp_path, monkeypatch):
    config = chat_config(tmp_path, **AUGMENTED)
    found = shards(prepare(elsewhere(config, tmp_path / "small")))
    monkeypatch.setattr(stages, "CHUNK_BYTES", 10**9)
    assert shards(prepare(elsewhere(config, tmp_path / "large"))) == found


def test_the_setting_says_how_many_processes_work(tmp_path, monkeypatch):
    seen = []
    original = Processes.__init__
    monkeypatch.setattr(Processes, "__init__", lambda self, count: seen.append(count) or original(self, 1))
    for count in (3, None):
        prepare(elsewhere(config_of(tmp_path), tmp_path / str(count), num_proc=count))
    assert seen == [3, None]


@pytest.mark.system
def test_workers_do_not_import_jax(tmp_path):
    names = []
    with Processes(2) as runner:
        runner.each(count_jax, range(4), names.append)
    assert names == [0] * 4


def count_jax(_: int) -> int:
    assert "jaxgpt.preparation.stages" in sys.modules or __import__("jaxgpt.preparation.stages")
    return int("jax" in sys.modules)


def test_where_nothing_is_cleaned_there_is_no_pass_for_it(tmp_path):
    runners = [Recorder(), Recorder()]
    prepare(config_of(tmp_path), runner=runners[0])
    prepare(config_of(tmp_path, cleaning=CLEANING), runner=runners[1])
    assert {name for name, _ in runners[0].done} == {"tokenize_chunk"}
    assert {name for name, _ in runners[1].done} == {"clean_chunk", "tokenize_chunk"}


# ---------------------------------------------------------------- killed anywhere

KILLS = ["prepare.read:kill@3", "prepare.clean:kill@2", "prepare.decided:kill", "prepare.tokenize:kill@4"]
KILLS += ["prepare.write:kill"]
# A fork for each kill: the imports take longer than the work.
KILLED = f"""
import json, os, sys
from jaxgpt.config import from_json
from jaxgpt.preparation import make_dataset, stages
stages.CHUNK_BYTES = {CHUNK}
for point, text in json.load(sys.stdin):
    child = os.fork()
    if not child:
        os.environ["JAXGPT_FAILPOINT"] = point
        make_dataset.prepare(from_json(text))
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


@pytest.mark.system
@pytest.mark.parametrize(("points", "sections"), [(KILLS, {"cleaning": CLEANING}), (KILLS[3:4], AUGMENTED)])
def test_killed_in_any_stage_it_goes_on_and_gives_the_same_shards(points, sections, tmp_path):
    config = (chat_config if sections is AUGMENTED else config_of)(tmp_path, **sections)
    configs = [elsewhere(config, tmp_path / point, num_proc=1) for point in points]
    words = json.dumps([(point, to_json(each)) for point, each in zip(points, configs)])
    run = subprocess.run([sys.executable, "-c", KILLED], input=words, text=True, capture_output=True)
    codes = [line for line in run.stdout.splitlines() if not line.startswith("tokenizer ")]
    assert codes == [str(int(signal.SIGKILL))] * len(points), run.stderr
    whole = Recorder()
    expected = shards(prepare(elsewhere(config, tmp_path / "whole"), runner=whole))
    spared = {}
    for point, each in zip(points, configs):
        recorder = Recorder()
        assert shards(prepare(each, runner=recorder)) == expected
        spared[point] = len(whole.done) - len(recorder.done)
        (only,) = (tmp_path / point).iterdir()
        assert not only.name.startswith("."), "the work folder is still there"
    chunks = len(whole.done) // (1 if sections is AUGMENTED else 2)
    wanted = {"read:kill@3": 0, "clean:kill@2": 2, "decided:kill": chunks, "write:kill": 2 * chunks}
    wanted["tokenize:kill@4"] = 4 + len(whole.done) - chunks
    assert spared == {point: wanted[point.removeprefix("prepare.")] for point in points}


def test_what_was_read_before_a_kill_is_not_written_again(tmp_path, monkeypatch):
    config, written = config_of(tmp_path), []
    original = stages.write_rows

    def write(path, rows) -> None:
        original(path, rows)
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(stages, "write_rows", write)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    path = prepare(config)
    assert written == [f"read-{number:05}.parquet" for number in range(len(written))]
    assert len(written) > 5
    assert shards(path) == shards(prepare(elsewhere(config, tmp_path / "whole")))


@pytest.mark.system
def test_no_worker_outlives_a_killed_prepare(tmp_path):
    config = elsewhere(config_of(tmp_path), tmp_path / "prepared", num_proc=2)
    code = (
        "import sys\nfrom jaxgpt.config import from_json\nfrom jaxgpt.preparation import make_dataset, stages\n"
        f"stages.CHUNK_BYTES = {CHUNK}\nmake_dataset.prepare(from_json(sys.stdin.read()))\n"
    )
    hanging = os.environ | {"JAXGPT_FAILPOINT": "prepare.tokenize:hang"}
    run = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=hanging, text=True)
    run.stdin.write(to_json(config))
    run.stdin.close()
    wait_for(lambda: run.poll() is not None or len(list((tmp_path / "prepared").glob(".*/tokens-*.npz"))) == 2)
    assert run.poll() is None
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 2
    run.kill()
    run.wait()
    wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers), 10)


# ---------------------------------------------------------------- two at once, mistakes


def test_a_second_preparation_of_the_same_waits_and_finds_the_first_ones_work(tmp_path, capsys):
    config = config_of(tmp_path)
    final = make_dataset.place_of(config, None).path
    found = []
    second = threading.Thread(target=lambda: found.append(prepare(config)))
    with chunks.held_work_folder(final, {}):
        second.start()
        told = []
        wait_for(lambda: told.append(capsys.readouterr().err) or "waiting for it" in "".join(told))
        assert f"process {os.getpid()} on " in "".join(told)
        assert not final.exists()
        prepare(elsewhere(config, tmp_path / "other")).rename(final)
    second.join()
    assert found == [final]
    assert "found, nothing to do" in capsys.readouterr().out
    assert list(final.parent.iterdir()) == [final]


def test_a_source_that_changes_while_it_is_read_is_refused_and_nothing_left(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    original = sources.documents

    def changed_on_the_way(*arguments):
        yield from original(*arguments)
        Path(config.data.path).write_text('{"text": "something else"}\n')

    monkeypatch.setattr(sources, "documents", changed_on_the_way)
    with pytest.raises(UserError, match="changed while it was read; prepare again"):
        prepare(config)
    assert not Path(config.data.prepared_dir).exists()


def test_cleaning_that_leaves_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\[cleaning\] drops all of its .* documents"):
        prepare(config_of(tmp_path, cleaning={"min_chars": 10_000}))


def test_a_file_that_is_read_in_parts_is_one_document(tmp_path):
    text = "".join(TEXTS)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    data = {"source": "text", "path": str(tmp_path / "long.txt"), "max_record_bytes": 1000, "validation_fraction": 0.3}
    dataset = open_dataset(prepare(config_of(tmp_path, data=data)))
    assert dataset.train.num_documents == dataset.validation.num_documents == 1
    tokenizer = load_tokenizer(dataset.path / "tokenizer")
    parts = [split.read(0, split.num_tokens).tolist() for split in (dataset.train, dataset.validation)]
    assert [part.count(dataset.end_of_text) for part in parts] == [1, 1]
    found = [tokenizer.decode(part[1:]) for part in parts]
    border = int(len(text) * 0.7)
    assert found == [text[:border], text[border:]]


# ---------------------------------------------------------------- conversations


def test_changed_copies_are_for_training_only_and_carry_their_origin(tmp_path):
    plain, augmented = (open_dataset(prepare(chat_config(tmp_path, **sections))) for sections in ({}, AUGMENTED))
    of_split = lambda split: [n for row in range(split.num_rows) for n, _, _ in split.row(row).conversations()]
    assert sorted(of_split(plain.validation)) == sorted(of_split(augmented.validation))
    before, after = of_split(plain.train), of_split(augmented.train)
    assert set(before) == set(after)
    assert len(after) > 2 * len(before)
    assert augmented.train.num_documents == plain.train.num_documents


def test_an_answer_that_does_not_fit_is_refused_or_counted(tmp_path):
    records = [{"prompt": "hello", "response": "word " * size} for size in (2, 3, 100, *range(4, 20))]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"format": "chat", "path": str(tmp_path / "chat.jsonl")}
    settings = {"data": data, "tokenizer": {"type": "char"}, "model": {"n_positions": 128}}
    with pytest.raises(UserError, match=r"chat.jsonl:3, turns 1 and 2: .* data.block_size = 128"):
        prepare(config_of(tmp_path, **settings))
    data["on_bad_record"] = "skip"
    path = prepare(config_of(tmp_path, **settings))
    dataset, report = open_dataset(path), preparation_report.read(path)
    assert dataset.train.num_documents + dataset.validation.num_documents == len(records) - 1
    (told,) = report["bad_records"].values()
    assert told["count"] == 1
    assert "chat.jsonl:3, turns 1 and 2" in told["where"][0]


@pytest.mark.parametrize("packing", [True, False])
def test_text_among_conversations_is_learned_whole_held_out_and_counted_apart(packing, tmp_path, monkeypatch, capsys):
    from jaxgpt.inference.answers import asked_in  # imports jax, which workers of this file must not

    book = "".join(f"第{n}章 it says <|im_end|> and https://x.org/{n}\n" + "\n" * (n % 3) for n in range(160))
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    (tmp_path / "pages").mkdir()
    for n in range(20):
        (tmp_path / "pages" / f"{n:02}.html").write_text(f"<p>Page {n}</p><p>short &amp; plain {'z' * n}</p>")
    (tmp_path / "pages" / "again.html").write_text("<p>Page 3</p><p>short &amp; plain zzz</p>")
    lines = [json.dumps({"prompt": f"question {n}", "response": f"answer {n}"}) for n in range(90)]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    names = {"jsonl": ("talk.jsonl", 4), "text": ("book.txt", 3), "html": ("pages", 1)}
    parts = [{"source": s, "path": str(tmp_path / name), "weight": weight} for s, (name, weight) in names.items()]
    data = {"source": parts, "path": None, "format": "chat", "max_record_bytes": 700}
    sections = {
        "cleaning": {"html": True, "urls": "mask", "drop_duplicates": True},
        "augmentation": {"copies": 2, "typo_rate": 0.3},
        "chat": {"system": "Be kind.", "packing": packing},
    }
    path = prepare(config_of(tmp_path, data=data, **sections))
    dataset, report = open_dataset(path), preparation_report.read(path)
    texts, talks = {}, {"train": 0, "validation": 0}
    for name in talks:
        split, learned = getattr(dataset, name), 0
        for number in range(split.num_rows):
            for document, tokens, supervised in split.row(number).conversations():
                learned += supervised[1:].sum()
                if supervised[0]:
                    assert supervised.all()
                    texts.setdefault(document, []).extend(tokens[1:])
                else:
                    assert dataset.tokenizer.decode(tokens).startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
                    talks[name] += 1
        assert learned == split.num_supervised and talks[name]
    if not packing:  # else rows are in another order
        found = {document: dataset.tokenizer.decode(tokens) for document, tokens in texts.items()}
        [read] = [text for text in found.values() if text.startswith("第0章")]
        masked = re.sub("https://[a-z0-9./]+", "<url>", book)
        assert masked.startswith(read.rpartition("\n")[0]) and 2000 < len(read) < len(masked)
        assert "Page 7\nshort & plain zzzzzzz" in found.values()
        parts = report["sources"][1:]
        assert sum(part["num_bytes"] for part in parts) == len("".join(found.values()).encode())
    kinds, splits = report["kinds"], report["splits"]
    assert kinds["texts"] == len(texts) + 1 and report["divided"] == 1  # the book is on both sides
    assert sum(kinds.values()) == splits["train"]["num_documents"] + splits["validation"]["num_documents"]
    assert report["conversations"]["augmented"] == sum(talks.values()) - kinds["conversations"] > 50
    assert report["steps"][-1]["step"] == "drop_duplicates" and report["steps"][-1]["dropped"] == 1
    told = f"texts {kinds['texts']:,}, of which every token is learned; conversations {kinds['conversations']:,}"
    assert told in capsys.readouterr().out and told in (path / "report.html").read_text(encoding="utf-8")
    linted = lint.check(dataset)
    assert linted.num_texts + linted.num_documents == splits["train"]["num_documents"]
    assert linted.without_answer == 0 and "texts, " in lint.show(linted)
    assert linted.num_supervised == dataset.train.num_supervised
    asked = [dataset.tokenizer.decode(tokens[:length]) for tokens, length in asked_in(dataset.validation, 99, 64)]
    assert len(asked) == talks["validation"] and all(prompt.endswith("assistant\n") for prompt in asked)
    assert len(asked_in(dataset.validation, 3, 64)) == 3  # whatever lies in the rows that are looked at first
    if packing:
        return
    monkeypatch.setattr(stages, "CHUNK_BYTES", 900)
    again = prepare(elsewhere(config_of(tmp_path, data=data, **sections), tmp_path / "other"))
    assert shards(again) == shards(path)


def write_records(folder: Path, records: list[dict]) -> dict:
    """The data section of these conversations."""
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return {"format": "chat", "path": str(folder / "chat.jsonl")}


def test_forty_dialogues_in_any_form_need_no_setting_but_the_path_and_the_report_names_their_forms(tmp_path, capsys):
    forms = [
        lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "id": 3},
        lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
        lambda q, a: {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]},
        lambda q, a: {"instruction": q, "input": "", "output": a, "source": "x"},
    ]
    found, texts = [], [(f"what is {number}?", f"it is {number}") for number in range(40)]
    for name, chosen in (("one", forms[:1] * 4), ("four", forms)):
        folder = tmp_path / name
        folder.mkdir()
        records = [chosen[number % 4](*text) for number, text in enumerate(texts)]
        found.append(prepare(config_of(folder, data=write_records(folder, records))))
    assert {**shards(found[0]), "metadata.json": ""} == {**shards(found[1]), "metadata.json": ""}
    dataset, report = open_dataset(found[1]), preparation_report.read(found[1])
    assert dataset.train.num_documents + dataset.validation.num_documents == 40
    forms_line = "messages (10), conversations (10), prompt/completion (10), instruction/output (10)"
    assert report["forms"] == {"forms": forms_line, "fields not read": "id (10), source (10)"}
    out, page = capsys.readouterr().out, (found[1] / "report.html").read_text()
    assert f"  forms      {forms_line}\n  fields not read id (10), source (10)\n" in out
    assert "instruction/output (10)" in page and "id (10), source (10)" in page


@pytest.mark.parametrize(
    ("records", "cleaning", "told"),
    [
        (1, {}, "one conversation is left of 1,"),
        (8, {"drop_duplicates": True}, "one conversation is left of 8,"),
        (8, {"near_duplicates": 0.8, "min_chars": 4}, "one conversation is left of 8,"),
    ],
)
def test_one_conversation_is_not_cut_in_two(records, cleaning, told, tmp_path):
    data = write_records(tmp_path, [{"prompt": "hello there", "response": "good day to you"}] * records)
    with pytest.raises(UserError, match=told):
        prepare(config_of(tmp_path, data=data, cleaning=cleaning))


def test_every_record_is_in_a_split_or_counted(tmp_path):
    good = [{"prompt": f"what is {number}?", "response": f"it is {number}"} for number in range(20)]
    calls = [{"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}] * 3
    bad = [*calls, {"prompt": "x"}, {"messages": []}, {"prompt": "long", "response": "word " * 200}, {}]
    records = [*good[:10], *bad, *good, {"prompt": "hi", "response": "<!>"}]
    data = write_records(tmp_path, records) | {"on_bad_record": "skip"}
    config = config_of(tmp_path, data=data, cleaning={"drop_duplicates": True, "min_chars": 10})
    report = preparation_report.read(prepare(config))
    kept = sum(split["num_documents"] for split in report["splits"].values())
    left_out = {reason: bad["count"] for reason, bad in report["bad_records"].items()}
    dropped = {step["step"]: step["dropped"] for step in report["steps"] if step["dropped"]}
    assert (kept, dropped) == (20, {"drop_duplicates": 10, "min_chars": 1})
    assert left_out == {'"tool_calls" cannot be learned': 3, "unknown format": 3, "longer than a block": 1}
    assert kept + sum(left_out.values()) + sum(dropped.values()) == len(records)


def test_of_two_conversations_one_is_held_out(tmp_path):
    data = write_records(tmp_path, [{"prompt": text, "response": text} for text in ("one", "two")])
    dataset = open_dataset(prepare(config_of(tmp_path, data=data)))
    assert dataset.train.num_documents == dataset.validation.num_documents == 1


def test_copies_keep_what_is_not_learned(tmp_path):
    turns = [{"role": "assistant", "content": "hello"}]
    for number in range(4):
        answer = {"role": "assistant", "content": f"answer {number}", "weight": int(number == 3)}
        turns += [{"role": "user", "content": f"question {number}"}, answer]
    copies = {"copies": 3, "drop_turns": 0.5}
    config = config_of(
        tmp_path, data=write_records(tmp_path, [{"messages": turns, "n": n} for n in range(6)]), augmentation=copies
    )
    dataset = open_dataset(prepare(config))
    tokenizer = load_tokenizer(dataset.path / "tokenizer")
    learned = set()
    for row in range(dataset.train.num_rows):
        for _, tokens, supervised in dataset.train.row(row).conversations():
            learned.add(tokenizer.decode(tokens[supervised]))
    assert learned == {"", "answer 3<|im_end|>"} or learned == {"answer 3<|im_end|>"}


# ---------------------------------------------------------------- which settings make another dataset


CHAT = {"data": {"format": "chat"}}


@pytest.mark.parametrize(
    ("base", "more"),
    [
        ({}, {"cleaning": {"whitespace": True}}),
        ({}, {"data": {"on_bad_record": "skip"}}),
        ({}, {"data": {"max_record_bytes": 1000}}),
        ({}, CHAT),
        (CHAT, {"data": {"format": "chat", "block_size": 32}}),
        (CHAT, {**CHAT, "chat": {"packing": False}}),
        (CHAT, {**CHAT, "chat": {"system": "Be kind."}}),
        (CHAT, {**CHAT, **AUGMENTED}),
    ],
)
def test_each_of_these_settings_makes_another_dataset(base, more, tmp_path):
    places = {make_dataset.place_of(config_of(tmp_path, **sections), None).path for sections in (base, more)}
    assert len(places) == 2


def test_other_synonyms_make_another_dataset_and_num_proc_does_not(tmp_path):
    table = tmp_path / "synonyms.txt"
    table.write_text("hello, hi\n")
    augmentation = {"copies": 1, "synonyms": str(table), "synonym_rate": 0.5}
    config = chat_config(tmp_path, augmentation=augmentation)
    before = make_dataset.place_of(config, None).path
    assert make_dataset.place_of(elsewhere(config, Path(config.data.prepared_dir), num_proc=7), None).path == before
    table.write_text("hello, hi, good day\n")
    assert make_dataset.place_of(config, None).path != before


# ---------------------------------------------------------------- the same text at another place


def no_reading(*_):
    raise AssertionError("it is prepared again")


def test_the_same_text_elsewhere_finds_its_dataset_and_another_text_does_not(tmp_path, monkeypatch, capsys):
    config = config_of(tmp_path)
    path = prepare(config)
    moved = tmp_path / "moved" / "other.ndjson"
    moved.parent.mkdir()
    Path(config.data.path).rename(moved)
    os.utime(moved, (1, 1))
    there = elsewhere(config, Path(config.data.prepared_dir), path=str(moved))
    with monkeypatch.context() as patch:
        patch.setattr(stages, "read", no_reading)
        assert prepare(there) == path
        assert capsys.readouterr().out.endswith(f"prepared data: {path} (found, nothing to do)\n")
        copied = path.parent.rename(tmp_path / "elsewhere") / path.name
        assert prepare(elsewhere(there, copied.parent, path=str(moved))) == copied
        moved.write_text(moved.read_text() + '{"text": "more"}\n')
        with pytest.raises(AssertionError, match="prepared again"):
            prepare(elsewhere(there, copied.parent))


def test_without_its_source_a_dataset_is_found_by_name_and_settings(tmp_path, monkeypatch, capsys):
    config = config_of(tmp_path)
    path = prepare(config)
    (tmp_path / "empty").mkdir()
    copied = path.parent.rename(tmp_path / "empty" / "prepared") / path.name
    Path(config.data.path).unlink()
    monkeypatch.chdir(tmp_path / "empty")
    here = elsewhere(config, Path("prepared"), path="texts.jsonl")
    assert prepare(here).resolve() == copied
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.endswith("its source was not looked at: data.path = texts.jsonl: no such file or folder)")
    for other in ({"path": "text.jsonl"}, {"validation_fraction": 0.3}, {"prepared_dir": "elsewhere"}):
        with pytest.raises(UserError, match="no such file or folder"):
            prepare(elsewhere(here, Path("prepared"), **other))
    copied.rename(copied.with_name("texts-000000000000"))
    assert prepare(here).name == "texts-000000000000"  # the name of another version
    shutil.copytree(copied.with_name("texts-000000000000"), copied)
    with pytest.raises(UserError, match="fit these settings, and the source is not here; keep one"):
        prepare(here)


def test_digests_of_large_sources_are_remembered_and_never_decide_by_path_or_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_REMEMBERED", 100)
    file, memory = tmp_path / "a.txt", tmp_path / "prepared" / ".sources.json"
    file.write_text("text " * 100)
    data = DataConfig(source="text", path=str(file))
    key = sources.source_key(data, memory)
    os.utime(file, (1, 1))
    assert sources.source_key(data, memory) == key
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", no_reading)
        assert sources.source_key(data, memory) == key
    memory.write_text("damaged")
    file.write_text("Text " * 100)
    assert sources.source_key(data, memory) != key


# ---------------------------------------------------------------- the report


def test_the_report_counts_what_each_step_dropped_and_changed_with_examples(tmp_path):
    path = prepare(config_of(tmp_path, cleaning=CLEANING))
    report = preparation_report.read(path)
    steps = {step["step"]: step for step in report["steps"]}
    assert report["read"]["documents"] == len(TEXTS) + 1
    assert steps["whitespace"]["changed"] == len(TEXTS) + 1
    assert steps["urls"]["changed"] == sum("https:" in text for text in TEXTS)
    assert (steps["min_chars"]["dropped"], steps["min_chars"]["documents_out"]) == (1, len(TEXTS))
    assert steps["min_chars"]["drops"] == ["short  text"]
    assert len(steps["urls"]["changes"]) == 5
    assert all(len(text) <= 200 for example in steps["urls"]["changes"] for text in example.values())
    assert "<url>" in steps["urls"]["changes"][0]["after"]
    assert sum(split["num_documents"] for split in report["splits"].values()) == len(TEXTS)
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "&lt;url&gt;" in page
    assert "<url>" not in page


def test_a_training_document_that_repeats_the_sources_own_validation_split_is_dropped(tmp_path):
    cleaning, work, rows = CleaningConfig(drop_duplicates=True), WorkFolder(tmp_path), Rows()
    for number, (text, split) in enumerate([("held out", "train"), ("other", "train"), ("held out", "validation")]):
        rows.append(text, SPLIT_CODES[split], 0, number, False)
        rows.signatures.append(duplicates.signature(text, cleaning))
    write_rows(work.rows("clean", 0), rows)
    plan = splitting.decide(work, "clean", 1, 0.1, cleaning, whole=False)
    assert plan.codes.tolist() == [DROPPED, TRAIN + STARTS, VALIDATION + STARTS]
    assert plan.overlap == 1


def test_duplicates_are_dropped_and_none_is_left_between_the_splits(tmp_path):
    lines = [*TEXTS[:60], *TEXTS[:60], *(text + "x" for text in TEXTS[:20])]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    path = prepare(config_of(tmp_path, cleaning={"drop_duplicates": True, "near_duplicates": 0.8}))
    report = preparation_report.read(path)
    exact, near = report["steps"]
    assert (exact["step"], exact["dropped"], near["step"], near["dropped"]) == (
        "drop_duplicates",
        60,
        "near_duplicates",
        20,
    )
    assert sum(split["num_documents"] for split in report["splits"].values()) == 60
    assert report["splits"]["validation"]["num_documents"] < 30  # the share of what is left, not of what was read
    dropped, kept = near["drops"][0].split("\n\nrepeats\n\n")
    assert len(dropped) > 100
    assert dropped[:100] == kept[:100]


def test_the_report_belongs_to_the_dataset(tmp_path):
    path = prepare(config_of(tmp_path))
    open_dataset(path)
    (path / "report.html").write_text("other")
    with pytest.raises(UserError, match="report.html: changed"):
        open_dataset(path)


def test_the_report_shows_the_shares_of_a_mixture(tmp_path):
    for name, words in (("a", "one two three "), ("b", "four five six ")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": words * 9}) + "\n" for _ in range(60)))
    parts = [
        {"source": "jsonl", "path": str(tmp_path / f"{name}.jsonl"), "weight": w} for name, w in (("a", 3), ("b", 1))
    ]
    path = prepare(config_of(tmp_path, data={"source": parts, "path": None}))
    found = preparation_report.read(path)["sources"]
    assert [source["weight"] for source in found] == [0.75, 0.25]
    assert abs(found[0]["share_of_tokens"] - 0.75) < 0.1
    assert sum(source["num_documents"] for source in found) > 60


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"num_train_epochs": 3.0}, 3.0),
        ({"max_steps": 100, "global_batch_size": 8}, 800),
        ({"max_steps": 100, "per_device_train_batch_size": 2}, 200),
        ({"max_steps": 100, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, 600),
        ({"max_steps": 100, "per_device_train_batch_size": "auto"}, None),
    ],
)
def test_the_epochs_are_those_that_the_config_implies(train, expected, tmp_path):
    config = config_of(tmp_path, train=train, optimizer={"warmup_steps": 1})
    told = preparation_report.epochs(config, open_dataset(prepare(config)))["epochs"]
    if expected is None:
        assert "unknown" in told
    else:
        assert told["epochs"] == (expected if expected == 3.0 else round(expected / told["rows"], 3))


def test_examples_show_the_place_that_changed():
    from jaxgpt.preparation.stages import difference

    before = "x" * 1000 + "a\tb" + "y" * 1000
    shown = difference(before, before.replace("\t", " "))
    assert "a\tb" in shown["before"]
    assert "a b" in shown["after"]
    assert stages.EXAMPLES == 5
