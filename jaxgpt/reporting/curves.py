"""metrics.jsonl as columns: one array a metric over the lines, nan where a line does not know it."""

import re
from collections.abc import Sequence

import numpy as np

ACTIVITIES = ("step", "data", "eval", "save", "other")
"""What the seconds of a line are told apart by."""
_KEYS = (
    *("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu"),
    *("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_stop_rate", "seconds_total"),
    *(f"seconds_{name}" for name in ACTIVITIES),
)


def columns(records: Sequence[dict]) -> dict[str, np.ndarray]:
    """The figures of training and evaluation, and those of the tasks that were scored on the way."""
    keys = dict.fromkeys((*_KEYS, *(key for record in records for key in record if _accuracy(key))))
    return {key: np.array([record.get(key) for record in records], float) for key in keys}


def known(table: dict[str, np.ndarray], key: str, over: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """Steps (or column `over`) and values of a metric, of the lines that know both."""
    if key not in table:  # the task of another run
        return np.empty(0), np.empty(0)
    both = ~np.isnan(table[key]) & ~np.isnan(table[over])
    return table[over][both], table[key][both]


def accuracies(table: dict[str, np.ndarray]) -> dict[str, str]:
    """{"eval_piqa_acc_norm": "piqa, acc_norm", ...}: the tasks' columns that hold a number, and their names."""
    return {key: _accuracy(key) for key in table if _accuracy(key) and len(known(table, key)[0])}


def _accuracy(key: str) -> str:
    """The name of a task's accuracy; "" for what is none."""
    found = re.fullmatch(r"eval_(.+?)_(acc|acc_norm)", key)
    return "" if not found else found[1] if found[2] == "acc" else f"{found[1]}, {found[2]}"


def seconds(table: dict[str, np.ndarray]) -> np.ndarray:
    """Seconds by activity (rows) and line (columns); "other" is what of the total is left."""
    each = np.nan_to_num([table[f"seconds_{name}"] for name in ACTIVITIES])
    each[-1] = np.maximum(0, np.nan_to_num(table["seconds_total"]) - each[:-1].sum(axis=0))
    return each


def with_time(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Besides "time": seconds of training until each line. "tokens" and "time" are known on every line.

    Lines of evaluations hold neither: they get what the lines of training around them say, in proportion to the steps.
    """
    spent = seconds(table).sum(axis=0)
    time = np.where(spent > 0, spent.cumsum(), np.nan)
    return table | {"time": _filled(table["step"], time), "tokens": _filled(table["step"], table["tokens"])}


def _filled(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values`, which are 0 at step 0, with the unknown ones in proportion; all unknown where none is known."""
    there = ~np.isnan(values)
    if not there.any():
        return values
    last = steps[there][-1]
    between = np.interp(steps, np.append(0, steps[there]), np.append(0, values[there]))
    beyond = values[there][-1] * steps / max(last, 1)
    return np.where(there, values, np.where(steps > last, beyond, between))
