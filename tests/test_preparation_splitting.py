"""The share that is held out is the one asked for, whatever the lengths of the documents; all of it is counted."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.config import from_json
from jaxgpt.data.dataset import SPLITS, open_dataset
from jaxgpt.errors import UserError
from jaxgpt.preparation import preparation_report, stages
from jaxgpt.preparation.make_dataset import prepare
from jaxgpt.preparation.splitting import SHORT, held_out

RNG = np.random.default_rng(0)
# The bytes of the documents of 30 corpora.
SHAPES = {
    "a book and a note": [1_000_000, 40_000],
    "a note and a book": [40_000, 1_000_000],
    "a book and forty notes": [1_000_000, *[1_000] * 40],
    "two books": [700_000, 900_000],
    "three books": [10**6] * 3,
    "ten novels": [*range(300_000, 1_300_000, 100_000)],
    "fifty novels": [10**6] * 50,
    "twenty equal": [3_000] * 20,
    "sixty lines": [50] * 60,
    "sixty-one lines": [50] * 61,
    "a hundred lines": RNG.integers(20, 90, 100),
    "four lines": [40, 50, 60, 70],
    "two lines": [900, 300],
    "one line": [800],
    "one book": [5_000_000],
    "forty pages": RNG.integers(1_000, 9_000, 40),
    "a thousand tweets": RNG.integers(10, 280, 1_000),
    "ten thousand": RNG.integers(100, 5_000, 10_000),
    "a hundred thousand": RNG.integers(100, 5_000, 100_000),
    "log-normal": RNG.lognormal(7, 2, 5_000).astype(int) + 1,
    "log-normal, few": RNG.lognormal(9, 2, 50).astype(int) + 1,
    "pareto": (RNG.pareto(1, 3_000) * 1_000).astype(int) + 1,
    "powers of two": [2**n for n in range(30)],
    "powers of three": [3**n for n in range(14)],
    "half in one": [100_000, *[100] * 1_000],
    "a fifth in one": [25_000, *[100] * 1_000],
    "a fiftieth in one": [2_040, *[100] * 1_000],
    "a dump of ten gigabytes": [10**10, *[10_000] * 300],
    "eight files of one size and one of another": [64_000] * 8 + [1_000_000],
    "bytes": [1, 2, 3, 4, 5, *[1_000] * 100],
}


def held(sizes, fraction: float, seed: int, whole: bool = False) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array(sizes, np.int64)
    draws = np.random.default_rng(seed).integers(0, 2**64, len(sizes), np.uint64)
    return sizes, held_out(sizes, draws, fraction, whole)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_share_is_within_a_point_of_what_was_asked(shape):
    assert len(SHAPES) == 30
    for fraction in (0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9):
        for seed in range(5):
            sizes, out = held(SHAPES[shape], fraction, seed)
            assert ((out >= 0) & (out <= sizes)).all()
            assert abs(out.sum() / sizes.sum() - fraction) < 0.01, (fraction, seed)
            assert 0 < out.sum() < sizes.sum()
            long = sizes > max(SHORT, 0.02 * sizes.sum())
            assert (out[long] < sizes[long]).all(), "a long document is held out as a whole"
            assert (out < sizes).any(), "training has no beginning of a document"


def test_each_of_several_long_documents_gives_its_end():
    sizes, out = held([*range(300_000, 1_300_000, 100_000)], 0.05, 0)
    assert np.abs(out / sizes - 0.05).max() < 0.001


def test_short_documents_are_held_out_whole_and_stay_so_in_a_corpus_that_grows():
    sizes, before = held(SHAPES["ten thousand"], 0.05, 0)
    assert set(np.unique(before / sizes)) == {0, 1}
    draws = np.random.default_rng(0).integers(0, 2**64, 12_000, np.uint64)
    grown = np.concatenate([sizes, RNG.integers(100, 5_000, 2_000)])
    assert (held_out(grown, draws, 0.05)[:10_000] == held_out(sizes, draws[:10_000], 0.05)).all()


@pytest.mark.parametrize("sizes", [[500] * 40, [90_000, *[500] * 40], [300, 400], [100, 100, 90_000], [10, 10, 10]])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.99])
def test_conversations_are_never_cut_and_are_on_both_sides(sizes, fraction):
    for seed in range(5):
        sizes, out = held(sizes, fraction, seed, whole=True)
        assert ((out == 0) | (out == sizes)).all() and 0 < out.sum() < sizes.sum()
        if len(sizes) > 3 and fraction < 0.9:
            assert (out[sizes == 90_000] == 0).all()
            small = sizes[sizes < 90_000].sum()
            assert abs(out.sum() - min(fraction * sizes.sum(), small)) <= 500


# ---------------------------------------------------------------- through a preparation


def config_of(folder: Path, data: dict, **sections):
    settings = {
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16},
        "tokenizer": {"type": "char"},
        "data": {"prepared_dir": str(folder / "prepared"), "num_proc": 1, **data},
    }
    return from_json(json.dumps(settings | sections))


def sentences(first: int, size: int) -> str:
    text = "".join(f"Sentence {n} is here.\n" + "\n" * (n % 5 == 0) for n in range(first, first + size // 20 + 9))
    return text[:size]


def split_texts(path: Path) -> dict[str, str]:
    dataset = open_dataset(path)
    return {
        name: dataset.tokenizer.decode(split.read(0, split.num_tokens))
        for name, split in ((name, getattr(dataset, name)) for name in SPLITS)
    }


@pytest.mark.parametrize(
    ("sizes", "fraction"), [((30_000, 1_200), 0.05), ((9_000, 9_000, 9_000), 0.3), ((30_000, *[300] * 20), 0.1)]
)
def test_long_files_give_their_last_paragraphs_and_every_file_is_learned(sizes, fraction, tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    texts = [sentences(10_000 * number, size) for number, size in enumerate(sizes)]
    for number, text in enumerate(texts):
        (tmp_path / "books" / f"{number:02}.txt").write_text(text)
    data = {"source": "text", "path": str(tmp_path / "books"), "validation_fraction": fraction}
    path = prepare(config_of(tmp_path, data))
    report, found = preparation_report.read(path), split_texts(path)
    counts = report["splits"]
    share = counts["validation"]["num_tokens"] / sum(split["num_tokens"] for split in counts.values())
    assert abs(share - fraction) < 0.01 and report["warnings"] == []
    assert sum(counts[split]["num_documents"] for split in SPLITS) - report["divided"] == len(texts)
    assert sum(counts[split]["num_bytes"] for split in SPLITS) == sum(map(len, texts))
    ends = found["validation"].split("<|endoftext|>")[1:]
    for text in (text for text in texts if len(text) > 1_000):
        (end,) = (end for end in ends if text.endswith(end))
        assert text[: -len(end)].endswith("\n") and text[: -len(end)] in found["train"]
    monkeypatch.setattr(stages, "CHUNK_BYTES", 9_000)
    data |= {"prepared_dir": str(tmp_path / "again"), "max_record_bytes": 8_000}  # rows and chunks in other places
    again = prepare(config_of(tmp_path, data))
    assert preparation_report.read(again)["splits"].keys() == counts.keys()
    assert abs(len(split_texts(again)["validation"]) / len(found["validation"]) - 1) < 0.05


def test_a_mixture_of_two_files_learns_both_by_their_weights_and_holds_out_of_both(tmp_path):
    for name, size in (("book", 90_000), ("notes", 6_000)):
        (tmp_path / f"{name}.txt").write_text(name + sentences(0, size))
    parts = [{"source": "text", "path": str(tmp_path / f"{name}.txt")} for name in ("book", "notes")]
    path = prepare(config_of(tmp_path, {"source": parts, "validation_fraction": 0.1, "max_record_bytes": 2_000}))
    report, found = preparation_report.read(path), split_texts(path)
    assert [source["share_of_tokens"] for source in report["sources"]] == pytest.approx([0.5, 0.5], abs=0.01)
    assert report["warnings"] == [] and report["divided"] == 2
    assert "<|endoftext|>book" in found["train"] and "<|endoftext|>notes" in found["train"]
    assert [report["splits"][split]["num_documents"] for split in SPLITS] == [2, 2]
    assert found["train"].count("<|endoftext|>") > 4  # a document that goes on after another one is told from it


def test_what_cannot_be_divided_is_told(tmp_path, capsys):
    lines = [{"prompt": f"question {n}", "response": "y" * size} for n, size in enumerate((20, 20, 400))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"source": "jsonl", "path": str(tmp_path / "a.jsonl"), "format": "chat", "block_size": 512}
    path = prepare(config_of(tmp_path, data, model={"n_positions": 512}))
    (warning,) = preparation_report.read(path)["warnings"]
    assert "of the tokens are held out, not data.validation_fraction = 5.0%" in warning
    assert f"  warning    {warning}" in capsys.readouterr().out
    assert "of the tokens are held out" in (path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("texts", "cleaning"),
    [(["a"], {}), (["a"] * 5, {"drop_duplicates": True}), (["a", "much longer"], {"min_chars": 12})],
)
def test_one_conversation_is_one_clear_line(texts, cleaning, tmp_path):
    lines = [json.dumps({"prompt": "question", "response": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = {"source": "jsonl", "path": str(tmp_path / "a.jsonl"), "format": "chat"}
    with pytest.raises(UserError, match=r"a\.jsonl: one conversation is left.* give two or more"):
        prepare(config_of(tmp_path, data, cleaning=cleaning))
    assert not (tmp_path / "prepared").exists()
