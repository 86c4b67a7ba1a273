"""The card of a run, card.json: what was trained on what, what that took, and what came of it.

`read_card` collects it from the files of the run folder and computes nothing anew. What the files do not say is left
out. FIELDS has the names and forms of the fields for people.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.inference.answers import SAMPLES
from jaxgpt.preparation.skills import LANGUAGES
from jaxgpt.reporting import run_files
from jaxgpt.reporting.figures import big
from jaxgpt.reporting.run_files import ACTIVITIES, Columns
from jaxgpt.storage.files import read_json_lines
from jaxgpt.training.checkpoint import EVALUATIONS
from jaxgpt.training.recovery import PROCESSES

RUNNING = "no summary yet: running, or killed"
MAX_CONVERSATIONS, MAX_CHARACTERS = 4, 2000
_REFERENCE = re.compile(r"[0-9a-f]{40,64}")


class CardField(NamedTuple):
    """How a field is shown."""

    label: str
    form: Callable[..., str] = str
    best: Callable[[Sequence[float]], float] | None = None
    """min or max, where one of them is better."""
    per: str = ""
    """ "token" or "byte": it compares only where these are the same."""


_count, _loss, _share = "{:,.0f}".format, "{:.4f}".format, "{:.1%}".format


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


FIELDS = {
    "status": CardField("status"),
    "model": CardField("model"),
    "parameters": CardField("parameters", big),
    "data": CardField("data"),
    "training_tokens": CardField("training tokens", big),
    "validation_tokens": CardField("validation tokens", big),
    "started_from": CardField("started from"),
    "steps": CardField("steps", _count),
    "tokens": CardField("tokens seen", big),
    "epochs": CardField("epochs", "{:.2f}".format),
    "processes": CardField("processes", _count),
    "seconds": CardField("time", clock),
    "seconds_training": CardField("time of training", clock),
    "seconds_compiling": CardField("time of compiling", clock),
    "seconds_evaluation": CardField("time of evaluation", clock),
    "seconds_saving": CardField("time of saving", clock),
    "seconds_other": CardField("time of the rest", clock),
    "price_per_hour": CardField("price of an hour", "{:,.6g}".format),
    "cost": CardField("cost", lambda cost: f"{cost:,.2f}" if cost >= 1 else f"{cost:.2g}", min),
    "train_loss": CardField("training loss, last", _loss, min, "token"),
    "eval_loss": CardField("validation loss, last", _loss, min, "token"),
    "best_eval_loss": CardField("validation loss, best", _loss, min, "token"),
    "best_step": CardField("step of the best", _count),
    "predicted_loss": CardField("predicted loss", _loss),
    "predicted_low": CardField("predicted loss, from", _loss),
    "predicted_high": CardField("predicted loss, to", _loss),
    "best_perplexity": CardField("perplexity of the best", "{:,.4g}".format, min, "token"),
    "bits_per_byte": CardField("bits per byte, last", _loss, min, "byte"),
    "best_bits_per_byte": CardField("bits per byte of the best", _loss, min, "byte"),
    **{f"skills_{one}": CardField(f"skills, {one.capitalize()}", _share, max) for one in LANGUAGES},
    "skills_questions": CardField("questions of the skills", _count),
    "skills_step": CardField("step of the skills", _count),
    "answers_that_stop": CardField("answers that stop", _share),
    **{f"distinct_{n}": CardField(f"distinct-{n}", "{:.3f}".format) for n in (1, 2, 3)},
    "rep_4": CardField("rep-4", "{:.3f}".format),
    "tokens_per_second": CardField("tokens/s, median", big, max),
    "mfu": CardField("MFU, median", _share, max),
    "device": CardField("device"),
    "command": CardField("command"),
    "commit": CardField("commit", lambda commit: commit[:12]),
    "versions": CardField("versions", lambda found: ", ".join(f"{name} {number}" for name, number in found.items())),
}
_MODEL = {
    "n_layer": "{} layers",
    "n_head": "{} heads",
    "n_embd": "width {}",
    "n_positions": "context {}",
    "dtype": "{}",
}


def shown_as(key: str) -> CardField:
    """The field of this name; those of tasks have their names from the tasks."""
    if field := FIELDS.get(key):
        return field
    if key.startswith("accuracy "):  # during training
        return CardField(f"{key.removeprefix('accuracy ')}, last", _share, max)
    name, is_share = key.removeprefix("task "), re.search(r" (acc|exact_match)\S*$", key)
    return CardField(name, _share, max) if is_share else CardField(name, "{:,.4g}".format)


def read_card(run: Path, records: Sequence[dict], config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict:
    """The fields that are known of a run, in the order of FIELDS, and "samples".

    Args:
        records: the lines of metrics.jsonl.
        config: config.json as plain JSON, of any version.
        summary: summary.json; empty while the run goes on.
    """
    columns, evaluations = run_files.columns(records), read_json_lines(run / EVALUATIONS)
    found = {
        "status": summary.get("status", RUNNING),
        **{name: summary.get(name) for name in ("parameters", "command", "commit", "versions")},
        **{f"{split}_tokens": summary.get("data", {}).get(f"{split}_tokens") for split in ("training", "validation")},
        "device": f"{summary['devices']} x {summary['device']}" if "device" in summary else None,
        **_task(config),
        **_trained(columns),
        **_time(run, columns, summary.get("price_per_hour")),
        **predicted_loss(run),
        **_evaluated(evaluations, columns),
    }
    order = dict.fromkeys((*FIELDS, *found))
    card = {name: found[name] for name in order if found.get(name) is not None}
    samples = _conversations(records, evaluations) if config.get("data", {}).get("format") == "chat" else []
    return card | ({"samples": samples} if samples else {})


def _task(config: Mapping[str, Any]) -> dict[str, str | None]:
    """The model, its data and what it started from, in words."""
    model, data, init = (config.get(section, {}) for section in ("model", "data", "init"))
    parts = data["source"] if isinstance(data.get("source"), list) else [data]
    whole = sum(part.get("weight", 1.0) for part in parts)
    words = []
    for part in parts if "source" in data else ():
        share = f" {part.get('weight', 1.0) / whole:.0%}" if len(parts) > 1 else ""
        words.append(" ".join(filter(None, (part["source"], part.get("path")))) + share)
    kind = " (conversations)" if data.get("format") == "chat" else ""
    return {
        "model": ", ".join(form.format(model[key]) for key, form in _MODEL.items() if key in model) or None,
        "data": ", ".join(words) + kind or None,
        "started_from": init.get("from_checkpoint")
        or init.get("from_huggingface")
        or ("random weights" if init else None),
    }


def _trained(columns: Columns) -> dict[str, float | None]:
    """The final numbers of metrics.jsonl."""

    def of(key: str, pick: Callable) -> float | None:
        values = run_files.known(columns, key)[1]
        return pick(values).item() if len(values) else None

    last = lambda values: values[-1]
    steps, tokens = of("step", max), of("tokens", max)
    found = {
        "steps": None if steps is None else int(steps),
        "tokens": None if tokens is None else int(tokens),
        "epochs": of("epoch", max),
        "train_loss": of("loss", last),
        "eval_loss": of("eval_loss", last),
        "bits_per_byte": of("eval_bits_per_byte", last),
        "tokens_per_second": of("tokens_per_second", np.median),
        "mfu": of("mfu", np.median),
    }
    if not np.isnan(losses := columns["eval_loss"]).all():
        at = np.nanargmin(losses)
        found |= {"best_eval_loss": losses[at].item(), "best_step": int(columns["step"][at])}
        for key in ("perplexity", "bits_per_byte"):
            value = columns[f"eval_{key}"][at].item()
            found[f"best_{key}"] = None if np.isnan(value) else value
    return found | {f"accuracy {name}": of(key, last) for key, name in run_files.accuracies(columns).items()}


def _time(run: Path, columns: Columns, price: float | None) -> dict[str, float]:
    """Seconds of all processes of the run, by what they did, and what that costs.

    The rest is the start with the preparation of data, and what was lost when a process was killed. A run of a version
    without processes.jsonl took as long as its metrics say.
    """
    spent = dict(zip(ACTIVITIES, run_files.seconds(columns).sum(axis=1).tolist(), strict=True))
    processes = [line for line in read_json_lines(run / PROCESSES) if isinstance(line.get("seconds"), float)]
    for line in processes:
        for name in ACTIVITIES:
            spent[name] += line.get("unlogged", {}).get(f"seconds_{name}", 0.0)
    parts = {
        "seconds_training": spent["step"] + spent["data"],
        "seconds_compiling": np.nansum(columns["seconds_compile"]).item(),
        "seconds_evaluation": spent["eval"],
        "seconds_saving": spent["save"],
    }
    known = sum(parts.values())
    total = max(sum(line["seconds"] for line in processes), known + spent["other"])
    if not total:
        return {}
    parts |= {"seconds": total, "seconds_other": total - known}
    found = {name: round(seconds, 1) for name, seconds in parts.items()}
    if price is not None:
        found |= {"price_per_hour": price, "cost": round(price * total / 3600, 6)}
    return found | ({"processes": len(processes)} if processes else {})


def predicted_loss(run: Path) -> dict[str, float]:
    """The loss that a speedrun has predicted for its pretraining, and the interval; {} for any other run."""
    place = run.resolve()
    if place.name != "pretrain":
        return {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        predicted = json.loads((place.parent / "speedrun.json").read_text(encoding="utf-8"))["prediction"]
        found = {f"predicted_{name}": float(predicted[name]) for name in ("loss", "low", "high")}
        return found if all(0 < value < math.inf for value in found.values()) else {}
    return {}


def _evaluated(evaluations: Sequence[dict], columns: Columns) -> dict[str, float | None]:
    """The newest figures of each kind that `evaluate` has found; the answers that stop are those of most questions."""
    stops = run_files.known(columns, "eval_stop_rate")[1]
    found: dict[str, float | None] = {"answers_that_stop": stops[-1].item() if len(stops) else None}
    for line in evaluations:
        if skills := line.get("skills"):
            found |= {f"skills_{language}": skills.get(language) for language in LANGUAGES}
            found |= {"skills_questions": skills.get("questions"), "skills_step": line.get("step")}
            found["answers_that_stop"] = skills.get("stops")
        if writing := (line.get("generation") or {}).get("model"):
            found |= {name: writing.get(name) for name in ("distinct_1", "distinct_2", "distinct_3", "rep_4")}
        for task in line.get("tasks") or ():
            found |= {f"task {task['task']} {name}": task[name] for name in run_files.task_metrics(task)}
    return found


def _conversations(records: Sequence[dict], evaluations: Sequence[dict]) -> list[str]:
    """Conversations of the last evaluation during training, or else of the newest one by `evaluate --skills`."""
    during: dict = next((record for record in reversed(records) if record.get("sample")), {})
    texts = [text for name in SAMPLES if (text := during.get(name))]
    if not texts:
        skills: dict = next((line["skills"] for line in reversed(evaluations) if line.get("skills")), {})
        firsts = [row["first"] for row in skills.get("rows", ()) if "first" in row]
        texts = [f"user: {one['question']}\nassistant: {one['answer']}" for one in firsts]
        texts = [texts[n * len(texts) // MAX_CONVERSATIONS] for n in range(min(len(texts), MAX_CONVERSATIONS))]
    return [_plain(text)[:MAX_CHARACTERS] for text in texts[:MAX_CONVERSATIONS]]


def _plain(text: str) -> str:
    """A conversation with the names of its roles in place of ChatML's tokens."""
    return re.sub(r"<\|im_end\|>|<\|endoftext\|>", "", re.sub(r"<\|im_start\|>(\w+)\n", r"\1: ", text)).strip()


def checkout_commit() -> str | None:
    """The git commit of the checkout that this package lies in; None where it is installed, or .git does not say."""
    git = Path(__file__).parents[2] / ".git"
    with contextlib.suppress(OSError, UnicodeError):
        if git.is_file():  # of a worktree
            git = git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir: ").strip()
        head, common = (git / "HEAD").read_text(encoding="utf-8").strip(), git
        if (git / "commondir").exists():
            common = git / (git / "commondir").read_text(encoding="utf-8").strip()
        name = head.removeprefix("ref: ")
        loose = [place / name for place in (git, common) if name != head and (place / name).is_file()]
        if loose:
            head = loose[0].read_text(encoding="utf-8").strip()
        elif name != head:
            packed = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
            head = next((line.split()[0] for line in packed if line.endswith(f" {name}")), "")
        return head if _REFERENCE.fullmatch(head) else None
    return None
