"""Any of the thousands of tasks of EleutherAI's lm-evaluation-harness, on a checkpoint, in this process.

    from jaxgpt.evaluation.harness import open_model
    lm_eval.simple_evaluate(model=open_model("runs/quickstart"), tasks=["lambada_openai"])

`evaluate --harness lambada_openai` does the same. The harness is in the extra "eval"; it fetches a task's data from the
Hugging Face hub, or takes it from where the task's YAML file says.
"""

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.errors import UserError, how_to_install
from jaxgpt.settings import MeshConfig
from jaxgpt.training.models import LoadedModel, load_model

if TYPE_CHECKING:  # lm_eval is imported when it is first used
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from jaxgpt.evaluation.lm_eval_model import CheckpointLM

DRAWS = 1000  # bootstrap samples for the standard errors of metrics that are no mean (perplexity)


def check_installed() -> None:
    """Raise UserError if lm-evaluation-harness is not installed."""
    try:
        importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"--harness: lm-eval is not installed; {how_to_install('eval')}") from None


def open_model(checkpoint: str | Path, rows_per_device: int = 8) -> "CheckpointLM":
    """The model of a run, a step, a Hugging Face folder or "hf:NAME" for `lm_eval.simple_evaluate(model=...)`.

    Raises:
        UserError: there is no such model, or the harness is not installed.
    """
    check_installed()
    from jaxgpt.evaluation.lm_eval_model import CheckpointLM
    from jaxgpt.parallel.compiler import use_compilation_cache
    from jaxgpt.parallel.mesh import build_mesh

    loaded = load_model(checkpoint)
    use_compilation_cache()
    return CheckpointLM(loaded, loaded.config, build_mesh(MeshConfig()), rows_per_device)


def run(
    names: Sequence[str],
    include: Path | None,
    loaded: LoadedModel,
    config: Config,
    mesh: Mesh,
    rows_per_device: int,
    limit: int | None = None,
) -> list[dict]:
    """The results of tasks, groups or tags of the harness, in the form of `tasks.results`.

    {"task", "questions", "cut", metric, "metric_stderr", ..., "few_shot", "harness"}, where a metric of a filter is
    called "metric[filter]". A group has its own entry if it has its own metric.

    Args:
        include: a folder with YAML files of more tasks.
        limit: only the first questions of each task.

    Raises:
        UserError: the harness is not installed, has no such task, or cannot get the task's data.
    """
    check_installed()
    import lm_eval

    from jaxgpt.evaluation.lm_eval_model import CheckpointLM

    manager, tasks = _load(names, include)
    model = CheckpointLM(loaded, config, mesh, rows_per_device)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        bootstrap_iters=DRAWS,
        log_samples=False,
        torch_random_seed=None,  # torch is not used
    )
    return [row for row in (_row(name, found, model.cut) for name in found["results"]) if row]


def _load(names: Sequence[str], include: Path | None) -> tuple["TaskManager", list["Task"]]:
    """The harness's task manager, and the tasks and groups with their data."""
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).is_dir():
        raise UserError(f"--harness-include {include}: no such folder")
    folder = str(include) if include is not None else None
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not {*names} <= {*manager.all_subtasks}:  # reading the harness's own files takes 7 s
        manager = TaskManager(include_path=folder)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--harness {unknown[0]}: lm-eval {_version()} has no task, group or tag of this name; "
            "`lm-eval ls tasks` lists them, --harness-include adds a folder of YAML files"
        )
    tasks = []
    for name in names:
        try:
            loaded = manager.load([name])
        except (OSError, ValueError, ImportError) as error:  # datasets' errors of a missing file or network are these
            reason = " ".join(str(error).split())
            raise UserError(f"--harness {name}: its data or a package it needs is missing ({reason})") from None
        tasks += [*loaded["groups"].values()] or [*loaded["tasks"].values()]
    return manager, tasks


def _row(name: str, found: Mapping, cut: Mapping[str, int]) -> dict | None:
    """One entry of the harness's results; None for a group without a metric of its own."""
    values: dict[str, float | None] = {}
    for key, value in found["results"][name].items():
        metric, _, filtered = key.partition(",")
        is_number = isinstance(value, (int, float))
        if filtered and (is_number or metric.endswith("_stderr")):  # an error may be "N/A"
            values[metric if filtered == "none" else f"{metric}[{filtered}]"] = value if is_number else None
    if not values:
        return None
    leaves = list(_leaves(name, found.get("group_subtasks", {})))
    sizes = found.get("n-samples", {})
    return {
        "task": name,
        "questions": sum(sizes[leaf]["effective"] for leaf in leaves if leaf in sizes),
        "cut": sum(cut.get(leaf, 0) for leaf in leaves),
        **values,
        "few_shot": found.get("n-shot", {}).get(name, 0),
        "harness": _version(),
    }


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The tasks of a group and of its groups; for a task, its own name."""
    for child in children.get(name) or ():
        yield from _leaves(child, children)
    if not children.get(name):
        yield name


def _version() -> str:
    return importlib.metadata.version("lm_eval")
