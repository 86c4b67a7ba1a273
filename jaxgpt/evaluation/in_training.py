"""Questions scored during a training (eval.tasks), with the parameters that are on the devices."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation import tasks as task_files
from jaxgpt.evaluation.scoring import RequestScorer, ScoringRequest
from jaxgpt.evaluation.tasks import Task
from jaxgpt.evaluation.wikitext import Pages


class NamedTask(NamedTuple):
    name: str
    """In the names of its metrics: eval_NAME_acc."""
    task: Task | Pages


def read_tasks(words: Sequence[str]) -> list[NamedTask]:
    """The tasks that eval.tasks names. If a format comes twice, the stem of the file is added to its name."""
    parts = [word.partition("=") for word in words]
    times = Counter(form for form, _, _ in parts)
    found: dict[str, NamedTask] = {}
    for word, (form, _, place) in zip(words, parts, strict=True):
        name = f"{form}_{Path(place).stem}" if times[form] > 1 else form
        if name in found:
            raise UserError(f"eval.tasks: {word} is the second task that would be called {name}; rename its file")
        try:
            [task] = task_files.read_tasks([word])
        except UserError as error:
            raise UserError(f"eval.tasks: {error}") from None
        found[name] = NamedTask(name, task)
    return list(found.values())


def task_scorer(words: Sequence[str]) -> Callable[[Config, int, Tokenizer, Mesh], "TaskScores | None"]:
    """Read the tasks of eval.tasks; returns a function that makes their `TaskScores` once the run is resolved.

    The function returns None if there are no tasks. Both raise UserError and name the line: the function for a question
    that the tokenizer cannot write or the model has no room for.
    """
    tasks = read_tasks(words)
    return lambda config, vocab_size, tokenizer, mesh: (
        TaskScores(tasks, config, vocab_size, tokenizer, mesh) if tasks else None
    )


class TaskScores:
    """Maps parameters that lie as in the training to {"eval_NAME_acc": 0.5, "eval_NAME_acc_stderr": 0.05, ...}."""

    def __init__(self, tasks: Sequence[NamedTask], config: Config, vocab_size: int, tokenizer: Tokenizer, mesh: Mesh):
        self._tasks = tasks
        self._requests = [_requests(task, tokenizer, config.block_size) for _, task in tasks]
        self._block_size = config.block_size
        self._scorer = RequestScorer(config, vocab_size, mesh, config.per_device_eval_batch_size)

    def __call__(self, params: dict, go_on: Callable[[], object] = lambda: None) -> dict[str, float]:
        """`go_on` is called after each batch; what it raises ends the scoring."""
        values: dict[str, float] = {}
        for (name, task), requests in zip(self._tasks, self._requests, strict=True):
            found = task.results(self._scorer(params, requests, lambda count: go_on()))
            values |= {f"eval_{name}_{key}": value for key, value in found.items() if isinstance(value, float)}
        return values

    def describe(self) -> str:
        """A line for each task: its name, size and source."""
        lines = []
        for (name, task), requests in zip(self._tasks, self._requests, strict=True):
            count = f"{len(task.questions):,} questions" if isinstance(task, Task) else f"{len(task.pages):,} pages"
            long = sum(len(request.context) + len(request.target) - 1 > self._block_size for request in requests)
            cut = f"; {long:,} contexts are longer than the model reads and lose their beginning" if long else ""
            lines.append(f"task     {name}: {count} ({task.source}){cut}")
        return "\n".join(lines)


def _requests(task: Task | Pages, tokenizer: Tokenizer, block_size: int) -> list[ScoringRequest]:
    """All requests of a task, as int32 arrays, since they are kept for the whole training."""
    try:
        requests = task.requests(tokenizer, block_size)
        owners = [question for question in task.questions for _ in question.pairs] if isinstance(task, Task) else []
        for question, request in zip(owners, requests):
            if len(request.target) > block_size:
                raise UserError(
                    f"{question.where}: an answer of {len(request.target)} tokens, but the model reads {block_size}; "
                    "shorten it, or take the question out"
                )
    except UserError as error:
        raise UserError(f"eval.tasks: {error}") from None
    return [ScoringRequest(*(np.array(tokens, np.int32) for tokens in request)) for request in requests]
