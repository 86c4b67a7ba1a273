"""Questions with given answers, in each benchmark's own file format or from TFDS, and a model's results on them.

A question is one or more (context, target) pairs; the model's answer is the pair that it finds likeliest. Prompts and
normalisations are those of EleutherAI's lm-evaluation-harness 0.4, so that the numbers compare: "acc" takes the summed
log-probability, "acc_norm" divides it by the characters of the choice, as the harness does. Standard errors are those
of a mean: the sample's standard deviation divided by the square root of the number of questions.

TFDS keeps the benchmarks under other field names than their own files; its records are turned into those of the files,
so that each format has one reader. The split is the one that the harness scores.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation import wikitext
from jaxgpt.evaluation.scoring import Score, ScoringRequest, encode_pair
from jaxgpt.preparation import catalogs
from jaxgpt.preparation.documents import BadRecords
from jaxgpt.settings import SourceConfig

_LONGEST_LINE = 10_000_000


class Question(NamedTuple):
    pairs: list[tuple[str, str]]
    """(context, target) of each choice."""
    choices: list[str]
    """Their lengths divide the log-probabilities of acc_norm."""
    answer: int
    """Number of the right choice."""
    where: str = ""
    """Its place, for messages: file:line."""


@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    questions: list[Question]
    metrics: tuple[str, ...]
    source: str = ""
    """The file or dataset that they come from."""

    def first(self, count: int) -> "Task":
        return dataclasses.replace(self, questions=self.questions[:count])

    def requests(self, tokenizer: Tokenizer, block_size: int) -> list[ScoringRequest]:
        """A request for each pair. A context of more than `block_size` tokens is cut when it is scored."""
        requests = []
        for question in self.questions:
            try:
                requests += [encode_pair(tokenizer, *pair) for pair in question.pairs]
            except UserError as error:
                raise UserError(f"{question.where}: {error}") from None
        return requests

    def results(self, scores: Sequence[Score]) -> dict[str, object]:
        """{"task", "questions", "cut", metric, "metric_stderr", ...} from the scores of all pairs, in their order."""
        remaining = iter(scores)
        rows = [[next(remaining) for _ in question.pairs] for question in self.questions]
        found: dict[str, object] = {
            "task": self.name,
            "questions": len(self.questions),
            "cut": sum(score.cut > 0 for score in scores),
            **({"source": self.source} if self.source else {}),
        }
        for metric in self.metrics:
            if metric == "perplexity":
                mean = -math.fsum(row[0].logprob for row in rows) / len(rows)
                found[metric] = math.exp(min(mean, 700.0))  # exp(710) overflows a float64
                continue
            right = [_is_right(metric, question, row) for question, row in zip(self.questions, rows, strict=True)]
            found[metric] = mean = sum(right) / len(right)
            found[f"{metric}_stderr"] = math.sqrt(mean * (1 - mean) / (len(right) - 1)) if len(right) > 1 else None
        return found


def _is_right(metric: str, question: Question, row: Sequence[Score]) -> bool:
    if len(row) == 1:
        return row[0].is_greedy
    lengths = [len(choice) for choice in question.choices] if metric == "acc_norm" else [1] * len(row)
    values = [score.logprob / length for score, length in zip(row, lengths, strict=True)]
    return values.index(max(values)) == question.answer


# ---------------------------------------------------------------- each benchmark's format


def _choices(context: str, choices: Sequence[str], answer: int, delimiter: str = " ") -> Question:
    return Question([(context, delimiter + choice) for choice in choices], list(choices), answer)


def _lambada(record: Mapping) -> Question:
    context, word = record["text"].rsplit(" ", 1)
    return Question([(context, f" {word}")], [word], 0)


def _hellaswag(record: Mapping) -> Question:
    def plain(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    endings = [plain(ending) for ending in record["endings"]]
    return _choices(plain(f"{record['activity_label']}: {context}"), endings, int(record["label"]))


def _piqa(record: Mapping) -> Question:
    return _choices(f"Question: {record['goal']}\nAnswer:", [record["sol1"], record["sol2"]], int(record["label"]))


def _winogrande(record: Mapping) -> Question:
    """The choices differ in the context: what follows the gap is scored after each of them."""
    before, after = record["sentence"].split("_", 1)
    options = [record["option1"], record["option2"]]
    return Question([(before + option, f" {after.strip()}") for option in options], options, int(record["answer"]) - 1)


def _stem_and_choices(record: Mapping) -> tuple[str, list[str], int]:
    """(question, choices, answer) of a record of ARC or OpenBookQA, in the form of its own files or of the hub."""
    question = record["question"] if "question" in record else record["question_stem"]
    if isinstance(question, Mapping):  # the original files
        stem, choices = question["stem"], question["choices"]
        texts, labels = [choice["text"] for choice in choices], [choice["label"] for choice in choices]
    else:
        stem, texts, labels = question, record["choices"]["text"], list(record["choices"]["label"])
    if record["answerKey"] not in labels:
        raise ValueError(f"the answer {record['answerKey']!r} is none of {', '.join(labels)}")
    return stem, texts, labels.index(record["answerKey"])


def _arc(record: Mapping) -> Question:
    stem, texts, answer = _stem_and_choices(record)
    return _choices(f"Question: {stem}\nAnswer:", texts, answer)


def _blimp(record: Mapping) -> Question:
    sentences = [record["sentence_good"], record["sentence_bad"]]
    return Question([("", f" {sentence}") for sentence in sentences], sentences, 0)


def _cbt(record: Mapping) -> Question:
    """The Children's Book Test: the gap XXXXX is filled with each option, and the whole question is scored."""
    options = list(record["options"])
    if record["answer"] not in options:
        raise ValueError(f"the answer {record['answer']!r} is none of the options")
    filled = [record["question"].replace("XXXXX", option) for option in options]
    context = "\n".join(record["sentences"])
    return Question([(context, f"\n{question}") for question in filled], options, options.index(record["answer"]))


def _own(record: Mapping) -> Question:
    """A user's own task: {"context": ..., "choices": [...], "answer": 0}."""
    return _choices(record["context"], record["choices"], int(record["answer"]), record.get("delimiter", " "))


FORMATS: dict[str, tuple[Callable[[Mapping], Question], tuple[str, ...]]] = {
    "lambada": (_lambada, ("acc", "perplexity")),
    "hellaswag": (_hellaswag, ("acc", "acc_norm")),
    "piqa": (_piqa, ("acc", "acc_norm")),
    "winogrande": (_winogrande, ("acc",)),
    "arc": (_arc, ("acc", "acc_norm")),
    "openbookqa": (lambda record: _choices(*_stem_and_choices(record)), ("acc", "acc_norm")),
    "blimp": (_blimp, ("acc",)),
    "cbt": (_cbt, ("acc",)),
    "choices": (_own, ("acc", "acc_norm")),
}
"""name: (record -> Question, metrics)"""


# ---------------------------------------------------------------- reading


def _task_of(name: str, records: Iterable[tuple[str, Mapping]], source: str) -> Task:
    """The task of (place, record)s in the format `name`; the place is named in an error."""
    to_question, metrics = FORMATS[name]
    questions = [_question(to_question, record, where) for where, record in records]
    if not questions:
        raise UserError(f"{source}: no question in it")
    return Task(name, questions, metrics, source)


def _file_records(file: Path) -> Iterator[tuple[str, Mapping]]:
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE), b""), 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        kind = type(record).__name__
                        raise UserError(f"{file}:{number}: a JSON {kind}, but each line must be an object")
                    yield f"{file}:{number}", record
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except ValueError as error:  # of json, and of UTF-8
        raise UserError(f"{file}:{number}: not a question of this task ({error})") from None


def _question(to_question: Callable[[Mapping], Question], record: Mapping, where: str) -> Question:
    try:
        question = to_question(record)
    except KeyError as error:
        raise UserError(f"{where}: no field {error}; it has {', '.join(record)}") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{where}: not a question of this task ({error})") from None
    count = len(question.pairs)
    if not all(isinstance(choice, str) and choice.strip() for choice in question.choices):
        raise UserError(f"{where}: a choice is missing or blank")
    if not 0 <= question.answer < count:
        raise UserError(f"{where}: the answer is choice {question.answer}, but there are {count}, numbered from 0")
    return question._replace(where=where)


# ---------------------------------------------------------------- from words on a command line


def read_tasks(
    words: Sequence[str], tfds_data_dir: Path | None = None, limit: int | None = None
) -> list[Task | wikitext.Pages]:
    """The tasks of the words NAME=FILE, NAME=tfds:DATASET, or NAME, which is TFDS's dataset of that name.

    Only the first `limit` questions of each task are kept.

    Raises:
        UserError: no such format, file, dataset or question; names the place.
    """
    tasks = [_read_word(word, tfds_data_dir) for word in words]
    return tasks if limit is None else [task.first(limit) for task in tasks]


def _read_word(word: str, tfds_data_dir: Path | None) -> Task | wikitext.Pages:
    name, _, place = word.partition("=")
    if name not in (*FORMATS, wikitext.NAME):
        raise UserError(f"task {name}: no such format; there are {', '.join([*FORMATS, wikitext.NAME])}")
    if place and not place.startswith(catalogs.TFDS):
        file = Path(place)
        return wikitext.read_pages(file) if name == wikitext.NAME else _task_of(name, _file_records(file), place)
    if name not in _SETS:
        raise UserError(f"task {word}: TFDS has no dataset of this task; give a file: {name}=FILE")
    kept = _SETS[name]
    source = place or f"{catalogs.TFDS}{kept.dataset}"
    if kept.configs and "/" not in source:
        raise UserError(f"task {word}: TFDS keeps it in parts; name one: {name}={source}/{kept.configs}")
    part = SourceConfig(source=source, path=str(tfds_data_dir) if tfds_data_dir else None)
    return _task_of(name, _tfds_records(part, kept), f"{source}, split {kept.split}")


def _tfds_records(part: SourceConfig, kept: "_TfdsSet") -> Iterator[tuple[str, Mapping]]:
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


class _TfdsSet(NamedTuple):
    dataset: str
    split: str
    record: Callable[[Mapping], Mapping]
    configs: str = ""
    """For a dataset that exists only in parts: one of them, as an example."""


def _letter(number: int) -> str:
    """The letter of an answer that TFDS has as a number; -1 is one that the benchmark does not publish."""
    return "ABCDE"[number] if number >= 0 else "hidden"


def _hellaswag_of_tfds(example: Mapping) -> Mapping:
    """TFDS has joined ctx_a and ctx_b. In the part from ActivityNet ctx_b is what follows the last whole sentence."""
    before, after = example["context"], ""
    if example["source_id"].startswith("activitynet"):
        found = re.fullmatch(r"(.*[.!?][\"')]*) (\S.*)", before, flags=re.DOTALL)
        before, after = found.groups() if found else (before, "")
    return {**example, "ctx_a": before, "ctx_b": after}


def _arc_of_tfds(example: Mapping) -> Mapping:
    columns = example["choices"]  # TFDS stores a list of objects as an object of lists
    choices = [{"text": text, "label": _letter(label)} for text, label in zip(columns["text"], columns["label"])]
    return {"question": {"stem": example["question"], "choices": choices}, "answerKey": _letter(example["answerKey"])}


def _openbookqa_of_tfds(example: Mapping) -> Mapping:
    question = example["question"]
    choices = [{"text": question[f"choice_{label}"], "label": label} for label in "ABCD"]
    return {"question": {"stem": question["stem"], "choices": choices}, "answerKey": _letter(example["answerKey"])}


_SETS = {
    "lambada": _TfdsSet("lambada", "test", lambda example: {"text": example["passage"].rstrip("\n")}),
    "hellaswag": _TfdsSet("hellaswag", "validation", _hellaswag_of_tfds),
    "piqa": _TfdsSet("piqa", "validation", dict),
    "winogrande": _TfdsSet("winogrande", "validation", lambda example: {**example, "answer": example["label"] + 1}),
    "arc": _TfdsSet("ai2_arc", "test", _arc_of_tfds, "ARC-Easy"),
    "openbookqa": _TfdsSet("openbookqa", "test", _openbookqa_of_tfds),
    "blimp": _TfdsSet("blimp", "train", dict, "adjunct_island"),
}
