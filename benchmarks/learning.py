"""How far a step gets: our `train` beside nanoGPT's own train.py, by tokens and by seconds, on one machine.

    pip install -e '.[parity]'; git clone https://github.com/karpathy/nanoGPT
    python benchmarks/learning.py char --nanogpt nanoGPT --data tinyshakespeare.txt --seeds 1,2,3 --shares 0.25,0.5
    python benchmarks/learning.py bpe --nanogpt nanoGPT --data novels.jsonl.zst                 # --layers 6 --width 256
    python benchmarks/learning.py gpu --nanogpt nanoGPT --data tinyshakespeare.txt --minutes 8  # one accelerator
    python benchmarks/learning.py char ... --ours 'adamw=optimizer.name=adamw optimizer.learning_rate=4e-3'

Both read the same token ids with the same network (nanoGPT has no biases unless --bias), batch and steps. nanoGPT's
train.py is executed as it lies in its folder: PEER below, a cosine to a tenth of the rate. Ours is `jaxgpt.train` with
the workload's config. Every rate runs with the first seed, the best with the others and with --shares of the tokens,
whole runs with a schedule of their own. The two sides take turns.

The loss is the mean over all validation tokens, in windows that do not overlap, without dropout: ours as `train` writes
it, nanoGPT's by its model.py from the checkpoints it saved, in a process that is not timed. "training" is the mean step
times the steps. "command" has the start and compiling in it (nothing is cached unless JAX_COMPILATION_CACHE_DIR is set)
but no evaluation. Each run is a line of OUT/WORKLOAD.jsonl and is not repeated. It is known by its label, options and
data, not by the code or the config file: after a change of those give another --out or label.
"""

import argparse
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
from learning_table import best_rate, draw, group, table, verdicts
from train_step import machine, versions

from jaxgpt.data.dataset import TokenDataset, TokenStream, open_dataset
from jaxgpt.training.metrics import read_metrics

PEER = "weight_decay=0.1 beta1=0.9 beta2=0.99 grad_clip=1.0"  # beta2 as in nanoGPT's config for characters
RATES = [1e-3, 2e-3, 4e-3, 8e-3]
Side = tuple[str, str, dict[str, Any]]  # ours or nanogpt, a label, settings
WARMUP = 100  # steps, at most a tenth of the run; nanoGPT's config for characters. --ours may have another one
ROWS = "train.per_device_train_batch_size"  # with --ours, as many tokens in more or fewer steps
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
    device: str = "cpu"

    def steps(self, share: float, points: int, rows: int) -> int:
        """Steps of a run with a share of the tokens: a multiple of `points`, each of which ends with an evaluation."""
        return points * max(1, round(share * self.tokens / (rows * self.positions * points)))


CHARACTERS = "data.source=text data.validation_fraction=0.1 tokenizer.type=char"
PIECES = "data.source=jsonl data.max_bytes=20000000 tokenizer.type=bpe tokenizer.vocab_size=4096"
WORKLOADS = {
    "char": Workload("shakespeare_char_cpu.toml", 4, 4, 128, 64, 12, 0.0, 2000 * 12 * 64, CHARACTERS),
    "bpe": Workload("quickstart.toml", 4, 6, 192, 256, 8, 0.0, 4_000_000, PIECES),
    "gpu": Workload("shakespeare_char.toml", 6, 6, 384, 256, 64, 0.2, 1500 * 64 * 256, CHARACTERS, "cuda"),
}


def parse(text: str) -> dict[str, Any]:
    """{"field": value} of "field=value ..."."""
    return {name: value for name, _, value in (word.partition("=") for word in text.split())}


def labelled(text: str) -> tuple[str, dict[str, Any]]:
    """(label, settings) of "LABEL=section.field=value ..."; settings alone are their own label."""
    label, _, rest = text.partition("=")
    return (text, parse(text)) if "." in label else (label, parse(rest))


def options(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def write_bins(folder: Path, dataset: TokenDataset) -> None:
    """Write a text dataset as nanoGPT reads it: train.bin, val.bin, meta.pkl."""
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
    file = Path(__file__).parents[1] / "configs" / config
    return [sys.executable, "-m", f"jaxgpt.{verb}", "--config", str(file), *options(settings)]


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
    own, words = [sys.executable, __file__, "--worker"], [str(folder), str(seed), *options(keys)]
    lines = execute([*own, "train", *words], environment)
    found = (re.match(r"iter (\d+): .* time ([\d.]+)ms", line) for _, line in lines)
    times = {int(match[1]): float(match[2]) / 1e3 for match in found if match}
    between = int(keys["eval_interval"])
    step = statistics.mean(seconds for number, seconds in times.items() if number % between)
    evaluations = sum(seconds - step for number, seconds in times.items() if number and number % between == 0)
    return {
        "curve": json.loads(execute([*own, "measure", *words], environment)[-2][1]),
        "training": step * int(keys["max_iters"]),
        "command": lines[-1][0] - evaluations,
        "first_step": times[0],
    }


def worker(task: str, folder: str, seed: str, *words: str) -> None:
    """In a process of its own: execute nanoGPT's train.py, or print the losses of its checkpoints.

    train.py takes no seed, and writes each checkpoint over the last one: the library it calls is changed for that.
    """
    import torch

    os.chdir(folder)
    sys.path.insert(0, folder)
    if task == "train":
        save, manual_seed = torch.save, torch.manual_seed
        torch.manual_seed = lambda _: manual_seed(int(seed))  # type: ignore[assignment]
        torch.save = lambda state, path: save(state, f"{path}.{state['iter_num']}")  # type: ignore[assignment,misc]
        sys.argv = ["train.py", *words]
        runpy.run_path("train.py", run_name="__main__")
    else:
        keys = {name: value for name, _, value in (word.removeprefix("--").partition("=") for word in words)}
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


class Comparison:
    """The runs of one workload on one text. `file` holds those that are done."""

    def __init__(self, given: argparse.Namespace, workload: Workload, file: Path):
        self.given, self.workload, self.file, w, folder = given, workload, file, workload, file.parent.absolute()
        self.until = time.monotonic() + 60 * (given.minutes or math.inf)
        self.environment = {} if "JAX_COMPILATION_CACHE_DIR" in os.environ else {"JAX_ENABLE_COMPILATION_CACHE": "0"}
        if w.device == "cpu":
            self.environment["JAX_PLATFORMS"] = "cpu"
        if given.threads:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])  # the sides inherit it
            self.environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(given.threads))
        self.network = parse(f"n_layer={w.layers} n_head={w.heads} n_embd={w.width} dropout={w.dropout}")
        self.common = {f"model.{name}": value for name, value in self.network.items()} | parse(w.data)
        self.common |= {"model.n_positions": w.positions, "data.path": Path(given.data).absolute()}
        self.common |= {"data.prepared_dir": folder / "prepared"}
        lines = execute(ours_command("prepare", w.config, self.common), self.environment)
        place = next(match[1] for _, line in lines if (match := re.match(r"prepared data: (/.+?) \(", line)))
        dataset = open_dataset(place, verify="sizes")
        self.bins = folder / "bins" / Path(place).name
        write_bins(self.bins, dataset)
        tokens = [dataset.train.num_tokens, dataset.validation.num_tokens, dataset.vocab_size]
        self.case = [*w, dataset.fingerprint, *tokens, given.threads, given.points]

    def results(self) -> list[dict[str, Any]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [record for record in map(json.loads, lines) if record["case"] == self.case]

    def run(self, who: Side, rate: float, seed: int, share: float) -> None:
        """Train one side and add the result to the file, unless it is there already."""
        side, label, settings = who
        run = {"side": side, "label": label, "settings": settings, "rate": rate, "seed": seed, "share": share}
        same = [record["run"] for record in self.results() if record["run"]["label"] == label]
        if run in same:
            return
        if same and same[0]["settings"] != settings:
            raise SystemExit(
                f"{self.file} has {label!r} with other settings, {same[0]['settings']}: give another label"
            )
        if time.monotonic() > self.until:
            return print(f"not run, {self.given.minutes:g} minutes are over: {run}")
        rows = int(settings.get(ROWS, self.workload.rows))
        steps, tokens = self.workload.steps(share, self.given.points, rows), rows * self.workload.positions
        scratch, load = self.file.parent.absolute() / f"run-{os.getpid()}", os.getloadavg()[0]
        if side == "ours":
            command = ours_command("train", self.workload.config, self.ours(steps, rows, rate, seed) | settings)
            found = train_ours(command, self.environment, scratch)
        else:
            environment = self.environment | {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
            keys = self.nanogpt(steps, rate) | {"dataset": self.bins, "out_dir": scratch}
            found = train_nanogpt(Path(self.given.nanogpt).absolute(), keys, seed, environment)
        shutil.rmtree(scratch, ignore_errors=True)
        found["curve"] = [[step * tokens, loss] for step, loss in found["curve"]]
        found |= {"loss": found["curve"][-1][1] if found["curve"] else None, "load": load}
        print(run, {name: found.get(name) for name in ("loss", "training", "command", "load")}, flush=True)
        about = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions()}
        with self.file.open("a") as file:
            line = {"case": self.case, "run": run, "steps": steps, "tokens": steps * tokens} | found | about
            file.write(json.dumps(line) + "\n")

    def ours(self, steps: int, rows: int, rate: float, seed: int) -> dict[str, Any]:
        points = self.given.points
        return self.common | parse(
            f"optimizer.learning_rate={rate} optimizer.warmup_steps={min(WARMUP, steps // 10)} train.seed={seed} "
            f"train.max_steps={steps} {ROWS}={rows} train.global_batch_size={rows} "
            f"eval.eval_steps={steps // points} eval.eval_batches=none eval.sample_tokens=0 "
            f"checkpoint.save_steps={steps} log.tensorboard=false"
        )

    def nanogpt(self, steps: int, rate: float) -> dict[str, Any]:
        w, given, dtype = self.workload, self.given, "float32" if self.workload.device == "cpu" else "bfloat16"
        return self.network | parse(
            f"{PEER} device={w.device} dtype={dtype} compile={given.compile} bias={given.bias} "
            f"block_size={w.positions} batch_size={w.rows} gradient_accumulation_steps=1 "
            f"learning_rate={rate} min_lr={rate / 10} max_iters={steps} lr_decay_iters={steps} "
            f"warmup_iters={min(WARMUP, steps // 10)} always_save_checkpoint=True "
            f"log_interval=1 eval_iters=1 eval_interval={steps // given.points}"
        )

    def run_all(self) -> None:
        """All rates with the first seed, then each side's best with every seed and share; the sides take turns."""
        given, peer = self.given, "nanoGPT" + ", compiled" * self.given.compile + ", biases" * self.given.bias
        sides: list[Side] = [("nanogpt", peer, {})] * ("nanogpt" in given.sides)
        sides += [("ours", *one) for one in given.ours or [("ours", {})]] if "ours" in given.sides else []
        rates = [given.rates if side == "nanogpt" else given.ours_rates or given.rates for side, *_ in sides]
        fixed = [settings.get("optimizer.learning_rate") for *_, settings in sides]
        rates = [[float(one)] if one else swept for one, swept in zip(fixed, rates)]
        for turn in itertools.zip_longest(*rates):
            for side, rate in zip(sides, turn):
                if rate is not None:
                    self.run(side, rate, given.seeds[0], 1.0)
        for seed, side in itertools.product(given.seeds, sides):
            best = best_rate([record for record in self.results() if record["run"]["label"] == side[1]])
            for share in [1.0, *given.shares] if side[0] == "ours" else [1.0]:
                if best is not None:
                    self.run(side, best, seed, share)


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
    add("--ours", type=labelled, action="append", metavar="LABEL=SETTINGS", help="in place of the config; may repeat")
    add("--points", type=int, default=4, help="evaluations of a run")
    add("--threads", type=int, default=0, help="cores of either side; 0: all")
    add("--minutes", type=float, default=0, help="no run starts later; 0: no limit")
    add("--compile", action="store_true", help="nanoGPT by torch.compile")
    add("--bias", action="store_true", help="give nanoGPT the biases of GPT-2")
    given = parser.parse_args()
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
    text = "\n\n".join([about, table(groups), *verdicts(groups)])
    file.with_suffix(".md").write_text(text + "\n")
    draw(groups, file.with_suffix(".svg"))
    print(f"\n{text}\n\n{file.with_suffix('.md')}, {file.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
