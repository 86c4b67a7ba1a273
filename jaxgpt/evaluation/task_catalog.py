"""Tasks by their words on a command line: NAME=FILE, NAME=tfds:DATASET, or NAME, which is TFDS's dataset of that name.

TFDS keeps the benchmarks under other names than their own files do; the records are turned back here, so that each
format has one owner (tasks.py). The split is the one that EleutherAI's harness scores.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.evaluation import wikitext
from jaxgpt.evaluation.tasks import FORMATS, Task, read_task, task_of
from jaxgpt.preparation import catalogs
from jaxgpt.preparation.documents import BadRecords
from jaxgpt.settings import SourceConfig


def read_tasks(
    words: Sequence[str], tfds_data_dir: Path | None = None, limit: int | None = None
) -> list[Task | wikitext.Pages]:
    """The tasks that the words name; of each the first `limit` questions.

    Raises:
        UserError: no such format, file, dataset or question; names the place.
    """
    tasks = [_read(word, tfds_data_dir) for word in words]
    return tasks if limit is None else [task.first(limit) for task in tasks]


def _read(word: str, tfds_data_dir: Path | None) -> Task | wikitext.Pages:
    name, _, place = word.partition("=")
    if name not in (*FORMATS, wikitext.NAME):
        raise UserError(f"task {name}: no such format; there are {', '.join([*FORMATS, wikitext.NAME])}")
    if place and not place.startswith(catalogs.TFDS):
        return wikitext.read_pages(Path(place)) if name == wikitext.NAME else read_task(name, Path(place))
    if name not in _SETS:
        raise UserError(f"task {word}: TFDS has no dataset of this task; give a file: {name}=FILE")
    kept = _SETS[name]
    source = place or f"{catalogs.TFDS}{kept.dataset}"
    if kept.configs and "/" not in source:
        raise UserError(f"task {word}: TFDS keeps it in parts; name one: {name}={source}/{kept.configs}")
    part = SourceConfig(source=source, path=str(tfds_data_dir) if tfds_data_dir else None)
    return task_of(name, _records(part, kept), f"{source}, split {kept.split}")


def _records(part: SourceConfig, kept: "_Set") -> Iterator[tuple[str, Mapping]]:
    """(place, record in the benchmark's own format) of each example."""
    try:
        builder = catalogs.tfds_builder(part)
    except UserError as error:  # its advice is for a config file
        advice = str(error).replace("set data.path to its data_dir", "give its data_dir with --tfds-data-dir")
        raise UserError(advice) from None
    if kept.split not in builder.info.splits:
        names = ", ".join(builder.info.splits)
        raise UserError(f"{part.source} has no split {kept.split}, only {names}; prepare it whole")
    for where, value, _ in catalogs.tfds_rows(builder, kept.split, part, None, None, BadRecords("refuse")):
        try:
            yield where, kept.record(value)
        except KeyError as error:
            raise UserError(f"{where}: no feature {error}; it has {', '.join(value)}") from None
        except (IndexError, TypeError) as error:
            raise UserError(f"{where}: not a question of this task ({error})") from None


# ---------------------------------------------------------------- TFDS's records as the benchmarks' own


class _Set(NamedTuple):
    dataset: str
    split: str
    record: Callable[[Mapping], Mapping]
    configs: str = ""
    """An example, where the dataset exists in several parts only."""


def _letter(number: int) -> str:
    """An answer that TFDS numbers; -1 is one that the benchmark keeps to itself."""
    return "ABCDE"[number] if number >= 0 else "hidden"


def _lambada(example: Mapping) -> Mapping:
    return {"text": example["passage"].rstrip("\n")}


def _hellaswag(example: Mapping) -> Mapping:
    """TFDS has joined ctx_a and ctx_b. In the part from ActivityNet ctx_b is what follows the last whole sentence."""
    before, after = example["context"], ""
    if example["source_id"].startswith("activitynet"):
        found = re.fullmatch(r"(.*[.!?][\"')]*) (\S.*)", before, flags=re.DOTALL)
        before, after = found.groups() if found else (before, "")
    return {**example, "ctx_a": before, "ctx_b": after}


def _winogrande(example: Mapping) -> Mapping:
    return {**example, "answer": example["label"] + 1}


def _arc(example: Mapping) -> Mapping:
    choices = [{**choice, "label": _letter(choice["label"])} for choice in example["choices"]]
    return {"question": {"stem": example["question"], "choices": choices}, "answerKey": _letter(example["answerKey"])}


def _openbookqa(example: Mapping) -> Mapping:
    question = example["question"]
    choices = [{"text": question[f"choice_{label}"], "label": label} for label in "ABCD"]
    return {"question": {"stem": question["stem"], "choices": choices}, "answerKey": _letter(example["answerKey"])}


def _same(example: Mapping) -> Mapping:
    return example


_SETS = {
    "lambada": _Set("lambada", "test", _lambada),
    "hellaswag": _Set("hellaswag", "validation", _hellaswag),
    "piqa": _Set("piqa", "validation", _same),
    "winogrande": _Set("winogrande", "validation", _winogrande),
    "arc": _Set("ai2_arc", "test", _arc, "ARC-Easy"),
    "openbookqa": _Set("openbookqa", "test", _openbookqa),
    "blimp": _Set("blimp", "train", _same, "adjunct_island"),
}
