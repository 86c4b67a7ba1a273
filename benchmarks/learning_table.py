"""The table and the picture of learning.py, from the runs in its file."""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.reporting.figures import series


def best_rate(records: Sequence[dict[str, Any]]) -> float | None:
    """The rate with the lowest loss over all tokens, with the seed that all rates ran with: the first one."""
    whole = [record for record in records if record["run"]["share"] == 1]
    swept = [r for r in whole if r["run"]["seed"] == whole[0]["run"]["seed"] and r["loss"] is not None]
    return min(swept, key=lambda record: record["loss"])["run"]["rate"] if swept else None


class Group:
    """The runs that differ in the seed only."""

    def __init__(self, records: Sequence[dict[str, Any]]):
        self.records, run = records, records[0]["run"]
        self.side, self.label, self.rate, self.tokens = run["side"], run["label"], run["rate"], records[0]["tokens"]
        self.losses = [math.nan if record["loss"] is None else record["loss"] for record in records]
        self.loss, self.training, self.command = map(self.mean, ("loss", "training", "command"))
        self.is_best = False

    def mean(self, name: str) -> float:
        """The mean over the seeds; nan if one of them has diverged."""
        found = [record.get(name) for record in self.records]
        return statistics.fmean(math.nan if value is None else value for value in found)

    def row(self) -> str:
        """A row of the Markdown table."""
        step, mark = 1e3 * self.training / self.records[0]["steps"], "**" * self.is_best
        return (
            f"| {self.label} | {mark}{self.rate:g}{mark} | {self.tokens:,} | {len(self.losses)} | "
            f"{mark}{self.loss:.4f}{mark} | {min(self.losses):.4f} to {max(self.losses):.4f} | {step:.1f} | "
            f"{self.training:.1f} | {self.command:.1f} | {self.mean('first_step'):.1f} | {self.mean('load'):.1f} |"
        )


def group(records: Sequence[dict[str, Any]]) -> list[Group]:
    """The runs by label (nanoGPT's first), rate and tokens; those of each label's best rate are marked."""
    key = lambda record: [record["run"][name] for name in ("side", "label", "rate", "share")]
    groups = [Group(list(found)) for _, found in itertools.groupby(sorted(records, key=key), key)]
    for one in groups:
        one.is_best = one.rate == best_rate([record for record in records if record["run"]["label"] == one.label])
    return groups


def table(groups: Sequence[Group]) -> str:
    """Markdown; the best rates stand out."""
    head = (
        "| side | rate | tokens | seeds | loss | from, to | ms a step | training s | command s | first step s | load |"
    )
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *(one.row() for one in groups)])


def tokens_to(target: float, points: Sequence[tuple[float, float]]) -> float | None:
    """Tokens at which the loss is `target`, between whole runs of (tokens, loss), straight over log(tokens).

    The first run's tokens if that is as good already; None if no run is.
    """
    if points and points[0][1] <= target:
        return points[0][0]
    for (low, worse), (high, better) in itertools.pairwise(points):
        if worse > target >= better:
            return low * (high / low) ** ((worse - target) / (worse - better))
    return None


def verdicts(groups: Sequence[Group]) -> list[str]:
    """For each label of ours: with which share of nanoGPT's tokens and seconds it has nanoGPT's best loss."""
    best, said = [one for one in groups if one.is_best], []
    peers = [one for one in best if one.side == "nanogpt"]
    if not peers:
        return []
    peer = min(peers, key=lambda one: one.loss)
    for label in dict.fromkeys(one.label for one in best if one.side == "ours"):
        runs = [one for one in best if one.label == label]
        goal = f"the {peer.loss:.4f} of {peer.label} (rate {peer.rate:g})"
        needed = tokens_to(peer.loss, [(one.tokens, one.loss) for one in runs])
        if needed is None:
            said.append(f"{label} does not reach {goal}: {runs[-1].loss:.4f} after {runs[-1].tokens:,} tokens.")
            continue
        known = [one.tokens for one in runs]
        training = np.interp(needed, known, [one.training for one in runs]) / peer.training
        command = np.interp(needed, known, [one.command for one in runs]) / peer.command
        most = "at most " * (needed == known[0])  # a shorter run might do
        said.append(
            f"{label} (rate {runs[0].rate:g}) reaches {goal} with {most}{needed / peer.tokens:.1%} of its tokens, "
            f"{training:.1%} of its training seconds and {command:.1%} of the whole command's."
        )
    return said


def draw(groups: Sequence[Group], file: Path) -> None:
    """An SVG: the loss of each label's best rate by tokens and by training seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    best = [one for one in groups if one.is_best and math.isfinite(one.loss)]
    for ax, name in zip(figure.subplots(1, 2, sharey=True), ("million tokens", "seconds of training")):
        for number, label in enumerate(dict.fromkeys(one.label for one in best)):
            look, ends = series(number) | {"markevery": 1}, []
            for one in (one for one in best if one.label == label):
                x, y = np.mean([record["curve"] for record in one.records], 0).T
                x = x / 1e6 if "tokens" in name else x * one.training / one.tokens
                ax.plot(x, y, color=look["color"], linewidth=0.8, alpha=0.6)
                ends.append((x[-1], y[-1]))
            ax.plot(*zip(*ends), **look, label=f"{label}, rate {one.rate:g}")
        ax.set_xlabel(name)
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss")
    figure.axes[0].legend(title="marks: ends of whole runs")
    figure.savefig(file, metadata={"Date": None})
