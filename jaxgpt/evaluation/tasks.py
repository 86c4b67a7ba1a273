"""Questions with given answers, in each benchmark's own file format, and what a model's scores of them come to.

A question is one or more (context, target) pairs; the model's answer is the pair that it finds likeliest. Prompts and
normalisations are those of EleutherAI's lm-evaluation-harness 0.4, so that the numbers compare: "acc" takes the summed
log-probability, "acc_norm" that over the characters of the choice (which is what the harness calls so). Standard errors
are those of a mean: the sample's standard deviation over the root of the number of questions.
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
from jaxgpt.evaluation.scoring import Request, Score, encode_pair

_LONGEST_LINE = 10_000_000


class Question(NamedTuple):
    pairs: list[tuple[str, str]]
    """(context, target) of each choice."""
    choices: list[str]
    """What the lengths of acc_norm are counted of."""
    answer: int
    """The right choice."""


@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    questions: list[Question]
    metrics: tuple[str, ...]
    source: str = ""
    """The file or dataset that they come from."""

    def first(self, count: int) -> "Task":
        return dataclasses.replace(self, questions=self.questions[:count])

    def requests(self, tokenizer: Tokenizer, block_size: int) -> list[Request]:
        """What is to be scored; a context of more than `block_size` tokens is cut as it is scored."""
        return [encode_pair(tokenizer, *pair) for question in self.questions for pair in question.pairs]

    def results(self, scores: Sequence[Score]) -> dict[str, object]:
        return results(self, scores)


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
    """Of ARC's and OpenBookQA's files, and of those of the Hugging Face hub."""
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


def _openbookqa(record: Mapping) -> Question:
    return _choices(*_stem_and_choices(record))


def _blimp(record: Mapping) -> Question:
    sentences = [record["sentence_good"], record["sentence_bad"]]
    return Question([("", f" {sentence}") for sentence in sentences], sentences, 0)


def _cbt(record: Mapping) -> Question:
    """The Children's Book Test: the gap XXXXX is filled with each option, and the whole question is scored."""
    story = "\n".join(record["sentences"])
    filled = [record["question"].replace("XXXXX", option) for option in record["options"]]
    if record["answer"] not in record["options"]:
        raise ValueError(f"the answer {record['answer']!r} is none of the options")
    return Question(
        [(story, f"\n{text}") for text in filled], list(record["options"]), record["options"].index(record["answer"])
    )


def _own(record: Mapping) -> Question:
    """A task of one's own: {"context": ..., "choices": [...], "answer": 0}."""
    return _choices(record["context"], record["choices"], int(record["answer"]), record.get("delimiter", " "))


FORMATS: dict[str, tuple[Callable[[Mapping], Question], tuple[str, ...]]] = {
    "lambada": (_lambada, ("acc", "perplexity")),
    "hellaswag": (_hellaswag, ("acc", "acc_norm")),
    "piqa": (_piqa, ("acc", "acc_norm")),
    "winogrande": (_winogrande, ("acc",)),
    "arc": (_arc, ("acc", "acc_norm")),
    "openbookqa": (_openbookqa, ("acc", "acc_norm")),
    "blimp": (_blimp, ("acc",)),
    "cbt": (_cbt, ("acc",)),
    "choices": (_own, ("acc", "acc_norm")),
}
"""name: (record -> Question, metrics)"""


# ---------------------------------------------------------------- reading


def read_task(name: str, file: Path) -> Task:
    """The questions of a JSONL file in the format `name`.

    Raises:
        UserError: no such format, file or question; names the line.
    """
    if name not in FORMATS:
        raise UserError(f"task {name}: no such format; there are {', '.join(FORMATS)}")
    return task_of(
        name, ((f"{file}:{number}", _record(line, f"{file}:{number}")) for number, line in _lines(file)), str(file)
    )


def task_of(name: str, records: Iterable[tuple[str, Mapping]], source: str) -> Task:
    """The task of records in the format `name`, each with the place to name in a complaint.

    Raises:
        UserError: one is not a question of this task, or there is none.
    """
    to_question, metrics = FORMATS[name]
    questions = [_question(to_question, record, where) for where, record in records]
    if not questions:
        raise UserError(f"{source}: no question in it")
    return Task(name, questions, metrics, source)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(file, "rb") as lines:
            number = 0
            while line := lines.readline(_LONGEST_LINE):
                number += 1
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None


def _record(line: bytes, where: str) -> Mapping:
    try:
        record = json.loads(line)
    except ValueError as error:  # of UTF-8 as well
        raise UserError(f"{where}: not a question of this task ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, but each line must be an object")
    return record


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
    return question


# ---------------------------------------------------------------- results


def results(task: Task, scores: Sequence[Score]) -> dict[str, object]:
    """{"task", "questions", "cut", metric, "metric_stderr", ...}; `scores` are those of all pairs, in their order."""
    rows: list[list[Score]] = []
    remaining = iter(scores)
    for question in task.questions:
        rows.append([next(remaining) for _ in question.pairs])
    found = {
        "task": task.name,
        "questions": len(task.questions),
        "cut": sum(score.cut > 0 for score in scores),
        **({"source": task.source} if task.source else {}),
    }
    for metric in task.metrics:
        if metric == "perplexity":
            mean = -math.fsum(row[0].logprob for row in rows) / len(rows)
            found[metric] = math.exp(min(mean, 700.0))  # exp(710) overflows a float64
            continue
        right = [_is_right(metric, question, row) for question, row in zip(task.questions, rows, strict=True)]
        found[metric] = mean = sum(right) / len(right)
        found[f"{metric}_stderr"] = math.sqrt(mean * (1 - mean) / (len(right) - 1)) if len(right) > 1 else None
    return found


def _is_right(metric: str, question: Question, row: Sequence[Score]) -> bool:
    if len(row) == 1:
        return row[0].is_greedy
    lengths = [len(choice) for choice in question.choices] if metric == "acc_norm" else [1] * len(row)
    values = [score.logprob / length for score, length in zip(row, lengths, strict=True)]
    return values.index(max(values)) == question.answer
