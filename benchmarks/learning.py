"""How far a step gets: our `train` beside nanoGPT's own train.py, by tokens and by seconds, on one machine.

    pip install -e '.[parity]'; git clone https://github.com/karpathy/nanoGPT
    python benchmarks/learning.py char --nanogpt nanoGPT --data tinyshakespeare.txt --seeds 1,2,3 --shares 0.25,0.5
    python benchmarks/learning.py bpe --nanogpt nanoGPT --data novels.jsonl.zst                 # --layers 6 --width 256
    python benchmarks/learning.py gpu --nanogpt nanoGPT --data tinyshakespeare.txt --minutes 8  # one accelerator
    python benchmarks/learning.py char ... --ours 'adamw=optimizer.name=adamw optimizer.learning_rate=4e-3'

Both read the same token ids with the same network (nanoGPT has no biases unless --bias), batch and steps. nanoGPT's
train.py is executed as it lies in its folder: PEER below, a cosine to a tenth of the rate. Ours is the command
`jaxgpt.train` with the workload's config. Every rate runs with the first seed, the best with the others and with --shares
of the tokens, whole runs with a schedule of their own. The two sides take turns.

The loss is the mean over all validation tokens, in windows that do not overlap, without dropout: ours as `train` writes
it, nanoGPT's by its model.py from the checkpoints it saved, in a process that is not timed. "training" is the mean step
times the steps. "command" has the start and compiling in it, where nothing is cached unless JAX_COMPILATION_CACHE_DIR is
set, but no evaluation. Each run is a line of OUT/WORKLOAD.jsonl and is not repeated. It is known by its label, options
and data, not by the code or the config file: after a change of those give another --out or label.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from train_step import machine, versions

from jaxgpt.data.dataset import TokenDataset, TokenStream, open_dataset
from jaxgpt.reporting.figures import series
from jaxgpt.training.metrics import read_metrics

PEER = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "grad_clip": 1.0}  # beta2 as in its config for characters
RATES = [1e-3, 2e-3, 4e-3, 8e-3]
WARMUP = 100  # steps, at most a tenth of the run; nanoGPT's config for characters. --ours may have another one
TOO_HIGH = "a learning rate that is too high"  # in the message of a run that a bad step has ended


class Workload(NamedTuple):
    """A config, a network, a batch, the number of training tokens, and the form of the text."""

    config: str
    layers: int
    heads: int
    width: int
    positions: int
    rows: int
    dropout: float
    tokens: int
    data: str

    def steps(self, share: float, points: int) -> int:
        """Steps of a run with a share of the tokens: a multiple of `points`, each of which ends with an evaluation."""
        return points * max(1, round(share * self.tokens / (self.rows * self.positions * points)))


CHARACTERS = "data.source=text data.validation_fraction=0.1 tokenizer.type=char"
PIECES = "data.source=jsonl data.max_bytes=20000000 tokenizer.type=bpe tokenizer.vocab_size=4096"
WORKLOADS = {
    "char": Workload("shakespeare_char_cpu.toml", 4, 4, 128, 64, 12, 0.0, 2000 * 12 * 64, CHARACTERS),
    "bpe": Workload("quickstart.toml", 4, 6, 192, 256, 8, 0.0, 4_000_000, PIECES),
    "gpu": Workload("shakespeare_char.toml", 6, 6, 384, 256, 64, 0.2, 1500 * 64 * 256, CHARACTERS),
}


class Contender(NamedTuple):
    """A side with settings of its own, and the rates to try."""

    side: str
    label: str
    settings: dict[str, str]
    rates: Sequence[float]


def contenders(given: argparse.Namespace) -> list[Contender]:
    found = []
    if "nanogpt" in given.sides:
        label = "nanoGPT" + ", compiled" * given.compile + ", biases" * given.bias
        found.append(Contender("nanogpt", label, {}, given.rates))
    for text in given.ours if "ours" in given.sides else []:
        label, _, rest = text.partition("=")
        label, rest = (text, text) if "." in label else (label, rest)  # settings alone are their own label
        settings = parse(rest)
        fixed = settings.get("optimizer.learning_rate")
        found.append(Contender("ours", label, settings, [float(fixed)] if fixed else given.ours_rates or given.rates))
    return found


def parse(text: str) -> dict[str, str]:
    """{"section.field": value} of "section.field=value ..."."""
    words = [word.partition("=") for word in text.split()]
    if bad := ["".join(word) for word in words if "." not in word[0] or not word[2]]:
        raise SystemExit(f"{bad[0]!r} is no section.field=value")
    return {name: value for name, _, value in words}


# ---------------------------------------------------------------- the same tokens for both


def write_bins(folder: Path, dataset: TokenDataset) -> None:
    """Write a text dataset as nanoGPT reads it: train.bin, val.bin, meta.pkl."""
    if dataset.vocab_size > 1 << 16:
        raise SystemExit(f"nanoGPT's files hold 16 bits a token, and the vocabulary has {dataset.vocab_size} entries")
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", dataset.train), ("val", dataset.validation)):
        assert isinstance(split, TokenStream)
        split.read(0, split.num_tokens).astype(np.uint16).tofile(folder / f"{name}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": dataset.vocab_size}))


def windows(tokens: np.ndarray, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (inputs, targets), each (windows, positions): every token but the first is a target once; -1 is none."""
    count = -(-(len(tokens) - 1) // positions)
    inputs, targets = np.zeros(count * positions, np.int64), np.full(count * positions, -1, np.int64)
    inputs[: len(tokens) - 1], targets[: len(tokens) - 1] = tokens[:-1], tokens[1:]
    return inputs.reshape(count, positions), targets.reshape(count, positions)


# ---------------------------------------------------------------- one run


def execute(command: Sequence[str], environment: dict[str, str], may_say: str = "\n") -> list[tuple[float, str]]:
    """Run a process: its lines, each with its second, the last one empty. It may fail only with a line of `may_say`."""
    began, lines = time.perf_counter(), []
    environment = os.environ | environment | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    )
    assert process.stdout
    for line in process.stdout:
        lines.append((time.perf_counter() - began, line.rstrip()))
    if process.wait() and not any(may_say in line for _, line in lines):
        raise SystemExit("\n".join(["failed: " + " ".join(command), *(line for _, line in lines[-15:])]))
    return [*lines, (time.perf_counter() - began, "")]


def ours_command(verb: str, config: str, settings: dict[str, Any]) -> list[str]:
    options = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in settings.items())
    file = Path(__file__).parents[1] / "configs" / config
    return [sys.executable, "-m", f"jaxgpt.{verb}", "--config", str(file), *options]


def train_ours(command: Sequence[str], environment: dict[str, str], workdir: Path) -> dict[str, Any]:
    """Run `train` and read what it wrote. A diverged run has no curve."""
    lines = execute([*command, "--workdir", str(workdir)], environment, may_say=TOO_HIGH)
    if any(TOO_HIGH in line for _, line in lines):
        return {"curve": []}
    records = read_metrics(workdir)
    logged = [record for record in records if "seconds_total" in record]
    steps = logged[-1]["step"]
    spent = sum(record["seconds_total"] - record["seconds_eval"] - record["seconds_save"] for record in logged)
    # No metrics follow the last evaluation; its time lies between two lines on the screen.
    step_line, last_line = (max(at for at, line in lines if f"| {name} " in line) for name in ("loss", "eval_loss"))
    evaluations = sum(record["seconds_eval"] for record in logged) + last_line - step_line
    return {
        "curve": [[record["step"], record["eval_loss"]] for record in records if "eval_loss" in record],
        "training": spent * steps / (steps - 1),  # the first step, which compiles, is in no line
        "command": lines[-1][0] - evaluations,
        "first_step": logged[0]["seconds_compile"],
    }


def train_nanogpt(folder: Path, keys: dict[str, Any], seed: int, environment: dict[str, str]) -> dict[str, Any]:
    """Run nanoGPT's train.py with its settings `keys`, then measure the checkpoints that it saved."""
    words = [str(folder), str(seed), *(f"--{name}={value}" for name, value in keys.items())]
    lines = execute([sys.executable, __file__, "--worker", "train", *words], environment)
    found = (re.match(r"iter (\d+): .* time ([\d.]+)ms", line) for _, line in lines)
    times = {int(match[1]): float(match[2]) / 1e3 for match in found if match}
    between = keys["eval_interval"]
    step = statistics.mean(seconds for number, seconds in times.items() if number % between)
    evaluations = sum(seconds - step for number, seconds in times.items() if number and number % between == 0)
    measured = execute([sys.executable, __file__, "--worker", "measure", *words], environment)
    return {
        "curve": json.loads(measured[-2][1]),
        "training": step * keys["max_iters"],
        "command": lines[-1][0] - evaluations,
        "first_step": times[0],
    }


def worker(task: str, folder: str, seed: str, *words: str) -> None:
    """In a process of its own: execute nanoGPT's train.py, or print the losses of its checkpoints.

    train.py takes no seed, and writes each checkpoint over the last one: the library it calls is changed for that.
    """
    import torch

    keys: dict[str, str] = dict(word.removeprefix("--").split("=", 1) for word in words)  # type: ignore[misc]
    os.chdir(folder)
    sys.path.insert(0, folder)
    if task == "train":
        save, manual_seed = torch.save, torch.manual_seed
        torch.manual_seed = lambda _: manual_seed(int(seed))
        torch.save = lambda state, path: save(state, f"{path}.{state['iter_num']}")  # type: ignore[assignment,misc]
        sys.argv = ["train.py", *words]
        runpy.run_path("train.py", run_name="__main__")
    else:
        found = sorted((int(path.suffix[1:]), path) for path in Path(keys["out_dir"]).glob("ckpt.pt.*"))
        print(json.dumps([[step, checkpoint_loss(path, keys)] for step, path in found]))


def checkpoint_loss(path: Path, keys: dict[str, str]) -> float | None:
    """Mean validation loss of a checkpoint of nanoGPT; None where it is no number."""
    import torch

    network, device = importlib.import_module("model"), keys["device"]  # nanoGPT's model.py
    saved = torch.load(path, map_location=device, weights_only=True)
    model = network.GPT(network.GPTConfig(**saved["model_args"])).to(device).eval()
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()})
    tokens = np.fromfile(Path(keys["dataset"]) / "val.bin", np.uint16)
    inputs, targets = (torch.from_numpy(array) for array in windows(tokens, int(keys["block_size"])))
    rows, total = int(keys["batch_size"]), 0.0
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=keys["dtype"] == "bfloat16"):
        for x, y in zip(inputs.split(rows), targets.split(rows)):
            total += model(x.to(device), y.to(device))[1].item() * int((y >= 0).sum())
    return total / (len(tokens) - 1) if math.isfinite(total) else None


# ---------------------------------------------------------------- all runs


class Comparison:
    """The runs of one workload on one text. `file` holds those that are done."""

    def __init__(self, given: argparse.Namespace, workload: Workload, file: Path):
        self.given, self.workload, self.file = given, workload, file
        self.until = time.monotonic() + 60 * given.minutes
        self.environment = {} if "JAX_COMPILATION_CACHE_DIR" in os.environ else {"JAX_ENABLE_COMPILATION_CACHE": "0"}
        if given.device == "cpu":
            self.environment["JAX_PLATFORMS"] = "cpu"
        if given.threads:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])  # the sides inherit it
            self.environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(given.threads))
        w, folder = workload, file.parent.absolute()
        self.common: dict[str, Any] = parse(w.data) | {"model.n_layer": w.layers, "model.n_head": w.heads}
        self.common |= {"model.n_embd": w.width, "model.n_positions": w.positions, "model.dropout": w.dropout}
        self.common |= {"data.path": Path(given.data).absolute(), "data.prepared_dir": folder / "prepared"}
        lines = execute(ours_command("prepare", w.config, self.common), self.environment)
        place = next(match[1] for _, line in lines if (match := re.match(r"prepared data: (.+) \(vocabulary", line)))
        dataset = open_dataset(place, verify="sizes")
        self.bins = folder / "bins" / Path(place).name
        write_bins(self.bins, dataset)
        tokens = [dataset.train.num_tokens, dataset.validation.num_tokens, dataset.vocab_size]
        self.case = [*w, dataset.fingerprint, *tokens, given.device, given.threads]

    def results(self) -> list[dict[str, Any]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [record for record in map(json.loads, lines) if record["case"] == self.case]

    def run(self, who: Contender, rate: float, seed: int, share: float) -> None:
        """Train one side and add the result to the file, unless it is there already."""
        run = who._asdict() | {"rate": rate, "seed": seed, "share": share}
        del run["rates"]
        if any(record["run"] == run for record in self.results()):
            return
        if self.given.minutes and time.monotonic() > self.until:
            print(f"not run, {self.given.minutes:g} minutes are over: {run}", flush=True)
            return
        steps, row = self.workload.steps(share, self.given.points), self.workload.rows * self.workload.positions
        scratch, load = self.file.parent.absolute() / f"run-{os.getpid()}", os.getloadavg()[0]
        if who.side == "ours":
            settings = self.ours(steps, rate, seed) | who.settings
            found = train_ours(ours_command("train", self.workload.config, settings), self.environment, scratch)
        else:
            environment = self.environment | {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
            keys = self.nanogpt(steps, rate) | {"dataset": self.bins, "out_dir": scratch}
            found = train_nanogpt(Path(self.given.nanogpt).absolute(), keys, seed, environment)
        shutil.rmtree(scratch, ignore_errors=True)
        found["curve"] = [[step * row, loss] for step, loss in found["curve"]]
        record = {"case": self.case, "run": run, "steps": steps, "tokens": steps * row, "load": load, **found}
        record |= {"loss": found["curve"][-1][1] if found["curve"] else None, "date": time.strftime("%Y-%m-%d")}
        with self.file.open("a") as file:
            file.write(json.dumps(record | {"machine": machine(), "versions": versions()}) + "\n")
        told = {name: record.get(name) for name in ("loss", "training", "command", "load")}
        print(f"{who.label}, rate {rate:g}, seed {seed}, share {share:g}: {told}", flush=True)

    def ours(self, steps: int, rate: float, seed: int) -> dict[str, Any]:
        rows, points = self.workload.rows, self.given.points
        return self.common | {
            **{"optimizer.learning_rate": rate, "optimizer.warmup_steps": min(WARMUP, steps // 10)},
            **{"train.max_steps": steps, "train.seed": seed, "checkpoint.save_steps": steps},
            **{"train.per_device_train_batch_size": rows, "train.global_batch_size": rows},
            **{"eval.eval_steps": steps // points, "eval.eval_batches": "none", "eval.sample_tokens": 0},
            **{"log.tensorboard": "false"},
        }

    def nanogpt(self, steps: int, rate: float) -> dict[str, Any]:
        w, given = self.workload, self.given
        return PEER | {
            **{"device": given.device, "dtype": "float32" if given.device == "cpu" else "bfloat16"},
            **{"compile": given.compile, "bias": given.bias, "dropout": w.dropout, "block_size": w.positions},
            **{"n_layer": w.layers, "n_head": w.heads, "n_embd": w.width, "batch_size": w.rows},
            **{"gradient_accumulation_steps": 1, "learning_rate": rate, "min_lr": rate / 10, "lr_decay_iters": steps},
            **{"max_iters": steps, "warmup_iters": min(WARMUP, steps // 10), "log_interval": 1, "eval_iters": 1},
            **{"eval_interval": steps // given.points, "always_save_checkpoint": True},
        }

    def run_all(self) -> None:
        """All rates with the first seed, then each side's best with every seed and share; the sides take turns."""
        sides = contenders(self.given)
        for rates in itertools.zip_longest(*(who.rates for who in sides)):
            for who, rate in zip(sides, rates):
                if rate is not None:
                    self.run(who, rate, self.given.seeds[0], 1.0)
        for seed, who in itertools.product(self.given.seeds, sides):
            best = best_rate([record for record in self.results() if record["run"]["label"] == who.label])
            for share in [1.0, *self.given.shares] if who.side == "ours" else [1.0]:
                if best is not None:
                    self.run(who, best, seed, share)


# ---------------------------------------------------------------- what came of it


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
        found = [record.get(name) for record in self.records]
        return math.nan if None in found else statistics.fmean(found)

    def row(self) -> str:
        """A row of the Markdown table."""
        step, mark = 1e3 * self.training / self.records[0]["steps"], "**" * self.is_best
        return (
            f"| {self.label} | {mark}{self.rate:g}{mark} | {self.tokens:,} | {len(self.losses)} | "
            f"{mark}{self.loss:.4f}{mark} | {min(self.losses):.4f} to {max(self.losses):.4f} | {step:.1f} | "
            f"{self.training:.1f} | {self.command:.1f} | {self.mean('first_step'):.1f} | {self.mean('load'):.1f} |"
        )


HEAD = "| side | rate | tokens | seeds | loss | from, to | ms a step | training s | command s | first step s | load |"


def group(records: Sequence[dict[str, Any]]) -> list[Group]:
    """The runs by label (nanoGPT's first), rate and tokens; those of each label's best rate are marked."""
    keys = ("side", "label", "rate", "share")
    found: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(tuple(record["run"][key] for key in keys), []).append(record)
    groups = [Group(found[key]) for key in sorted(found)]
    for one in groups:
        one.is_best = one.rate == best_rate([record for record in records if record["run"]["label"] == one.label])
    return groups


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
    peer = min((one for one in best if one.side == "nanogpt"), key=lambda one: one.loss, default=None)
    for label in dict.fromkeys(one.label for one in best if one.side == "ours") if peer else ():
        runs = [one for one in best if one.label == label]
        goal = f"{peer.label}'s {peer.loss:.4f} (rate {peer.rate:g})"
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


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(*sys.argv[2:])
    numbers = {kind: lambda text, kind=kind: [kind(word) for word in text.split(",")] for kind in (str, int, float)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("workload", choices=WORKLOADS)
    add("--data", required=True, help="a text file; for bpe a JSONL file, of which the first 20 MB are read")
    add("--nanogpt", default="nanoGPT", help="folder of nanoGPT")
    add("--out", default="runs/learning")
    add("--tokens", type=int)
    add("--layers", type=int)
    add("--width", type=int, help="heads are as wide as without it")
    add("--rates", type=numbers[float], default=RATES, help="commas between")
    add("--ours-rates", type=numbers[float], help="where they are not the same")
    add("--seeds", type=numbers[int], default=[1])
    add("--shares", type=numbers[float], default=[], help="of the tokens, for further runs of ours")
    add("--sides", type=numbers[str], default=["nanogpt", "ours"])
    add("--ours", action="append", metavar="LABEL=SETTINGS", help="in place of the config as it is; may be repeated")
    add("--points", type=int, default=4, help="evaluations of a run")
    add("--threads", type=int, default=0, help="cores of either side; 0: all")
    add("--minutes", type=float, default=0, help="no run starts later; 0: no limit")
    add("--device", choices=("cpu", "cuda"))
    add("--compile", action="store_true", help="nanoGPT by torch.compile")
    add("--bias", action="store_true", help="give nanoGPT the biases of GPT-2")
    given = parser.parse_args()
    given.ours = given.ours or ["ours="]
    given.device = given.device or ("cuda" if given.workload == "gpu" else "cpu")
    if "nanogpt" in given.sides and not (Path(given.nanogpt) / "train.py").is_file():
        raise SystemExit(f"--nanogpt {given.nanogpt}: no train.py there; git clone https://github.com/karpathy/nanoGPT")
    workload = WORKLOADS[given.workload]
    named = {name: getattr(given, name) or getattr(workload, name) for name in ("tokens", "layers", "width")}
    workload = workload._replace(**named, heads=named["width"] * workload.heads // workload.width)
    file = Path(given.out) / f"{given.workload}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(given, workload, file)
    comparison.run_all()
    groups = group(comparison.results())
    about = f"{time.strftime('%Y-%m-%d')}, {machine()}; {versions()}"
    rows = "\n".join([HEAD, "|---" * HEAD.count(" |") + "|", *(one.row() for one in groups)])
    text = "\n\n".join([about, rows, *verdicts(groups)])
    file.with_suffix(".md").write_text(text + "\n")
    draw(groups, file.with_suffix(".svg"))
    print(f"\n{text}\n\n{file.with_suffix('.md')}, {file.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
