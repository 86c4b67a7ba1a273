"""Questions scored in the course of a training (eval.tasks), with the parameters that are on the devices."""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation import task_catalog
from jaxgpt.evaluation.scoring import Request, Scorer
from jaxgpt.evaluation.tasks import Task
from jaxgpt.evaluation.wikitext import Pages


class NamedTask(NamedTuple):
    name: str
    """In the names of its metrics: eval_NAME_acc."""
    task: Task | Pages


def read_tasks(words: Sequence[str]) -> list[NamedTask]:
    """The tasks that eval.tasks names. Where a format comes twice, the stem of the file is added to its name.

    Raises:
        UserError: no such format, file or question; names the line.
    """
    parts = [word.partition("=") for word in words]
    times = Counter(form for form, _, _ in parts)
    found: dict[str, NamedTask] = {}
    for word, (form, _, place) in zip(words, parts, strict=True):
        name = f"{form}_{Path(place).stem}" if times[form] > 1 else form
        if name in found:
            raise UserError(f"eval.tasks: {word} is the second task that would be called {name}; rename its file")
        try:
            [task] = task_catalog.read_tasks([word])
        except UserError as error:
            raise UserError(f"eval.tasks: {error}") from None
        found[name] = NamedTask(name, task)
    return list(found.values())


def task_scores(
    tasks: Sequence[NamedTask], config: Config, vocab_size: int, tokenizer: Tokenizer, mesh: Mesh
) -> "TaskScores | None":
    """What scores `tasks`, or None where there are none. `config` has its batch.

    Raises:
        UserError: a question that the tokenizer cannot write or the model has no room for; names the line.
    """
    return TaskScores(tasks, config, vocab_size, tokenizer, mesh) if tasks else None


def task_scorer(words: Sequence[str]) -> Callable[[Config, int, Tokenizer, Mesh], "TaskScores | None"]:
    """Read the tasks now; what is returned makes their `TaskScores` once config, tokenizer and mesh are known.

    Raises:
        UserError: as `read_tasks`.
    """
    return functools.partial(task_scores, read_tasks(words))


class TaskScores:
    """Parameters, laid out as the training has them, -> {"eval_NAME_acc": 0.5, "eval_NAME_acc_stderr": 0.05, ...}."""

    def __init__(self, tasks: Sequence[NamedTask], config: Config, vocab_size: int, tokenizer: Tokenizer, mesh: Mesh):
        self._tasks = tasks
        self._requests = [_requests(task, tokenizer, config.block_size) for _, task in tasks]
        self._block_size = config.block_size
        rows = config.eval.per_device_eval_batch_size or config.train.per_device_train_batch_size
        self._scorer = Scorer(config, vocab_size, mesh, rows)

    def __call__(self, params: dict, go_on: Callable[[], object] = lambda: None) -> dict[str, float]:
        """`go_on` is called after each batch; what it raises ends the scoring."""
        values: dict[str, float] = {}
        for (name, task), requests in zip(self._tasks, self._requests, strict=True):
            found = task.results(self._scorer(params, requests, lambda count: go_on()))
            values |= {f"eval_{name}_{key}": value for key, value in found.items() if isinstance(value, float)}
        return values

    def describe(self) -> str:
        """What will be scored, a line for each task."""
        lines = []
        for (name, task), requests in zip(self._tasks, self._requests, strict=True):
            count = f"{len(task.questions):,} questions" if isinstance(task, Task) else f"{len(task.pages):,} pages"
            long = sum(len(request.context) + len(request.target) - 1 > self._block_size for request in requests)
            cut = f"; {long:,} contexts are longer than the model reads and lose their beginning" if long else ""
            lines.append(f"task     {name}: {count} ({task.source}){cut}")
        return "\n".join(lines)


def _requests(task: Task | Pages, tokenizer: Tokenizer, block_size: int) -> list[Request]:
    """All that is to be scored, as int32 arrays, since it is kept for the whole training."""
    if isinstance(task, Pages):
        try:
            found = task.requests(tokenizer, block_size)
        except UserError as error:
            raise UserError(f"eval.tasks: {task.source}: {error}") from None
    else:
        each = (_of_question(task, number, tokenizer, block_size) for number in range(len(task.questions)))
        found = itertools.chain.from_iterable(each)
    return [Request(*(np.array(tokens, np.int32) for tokens in request)) for request in found]


def _of_question(task: Task, number: int, tokenizer: Tokenizer, block_size: int) -> list[Request]:
    alone = dataclasses.replace(task, questions=task.questions[number : number + 1])
    try:
        requests = alone.requests(tokenizer, block_size)
    except UserError as error:  # a character that the tokenizer does not have
        raise UserError(f"eval.tasks: {_where(task.source, number)}: {error}") from None
    longest = max(len(request.target) for request in requests)
    if longest > block_size:
        raise UserError(
            f"eval.tasks: {_where(task.source, number)}: an answer of {longest} tokens, but the model reads "
            f"{block_size}; shorten it, or take the question out"
        )
    return requests


def _where(source: str, question: int) -> str:
    """The place of a question, counted from 0 without the blank lines: file:line."""
    if not Path(source).is_file():
        return f"{source}, question {question + 1}"
    with open(source, "rb") as lines:
        numbers = (number for number, line in enumerate(lines, 1) if line.strip())
        return f"{source}:{next(itertools.islice(numbers, question, None))}"
