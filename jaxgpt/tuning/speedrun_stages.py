"""The stages of a speedrun: measure, prepare, pretrain, chat, score. Each is done once; a kill loses no finished one.

speedrun.json in the folder has what was asked, what was measured, the plan and the time spent. The runs are ordinary
ones of the config files beside it, which the same commands continue.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxgpt.config import Config, load_config
from jaxgpt.data.chat import plain_texts, with_chat_tokens
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.errors import UserError
from jaxgpt.model.sizes import parameter_count
from jaxgpt.parallel.compiler import use_compilation_cache
from jaxgpt.preparation.make_dataset import prepare
from jaxgpt.preparation.sources import documents
from jaxgpt.settings import ChatConfig, DataConfig, SourceConfig
from jaxgpt.storage.files import new_folder, write_file
from jaxgpt.storage.lease import FILE as LOCK
from jaxgpt.storage.lease import Lease
from jaxgpt.training.metrics import read_metrics
from jaxgpt.tuning import speedrun_plan
from jaxgpt.tuning.config_file import to_toml
from jaxgpt.tuning.loss_law import LAW_VOCABULARY, builtin_law
from jaxgpt.tuning.scaling import without_embeddings
from jaxgpt.tuning.speed_probe import StepTime, probe
from jaxgpt.tuning.speedrun_data import BUILTIN, SpeedrunData, chosen_data
from jaxgpt.tuning.speedrun_plan import Frame, Length, SpeedrunPlan, frame_for

FILE, LEAST_MINUTES = "speedrun.json", 2.0
_FIRST_PROBE, _FIRST_PROBE_ACCELERATOR = (4, 128), (8, 512)  # (layers, width) of SIZES, where the time is not known yet
_PREPARE_SECONDS, _PREPARE_SHARE = 12.0, 0.06  # measured on 2 cores: the start, and what grows with the training
_TOKENIZER_BYTES = 6_000_000
_SCORE_SECONDS = 18.0  # 680 questions on 2 cores, compiling included


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedrunRequest:
    """What was asked for."""

    minutes: float
    tokens: int | None
    """Of pretraining; then the size is the one that the time suggests, and no step depends on a measurement."""
    data: str
    chat: str | None
    seed: int
    workdir: Path
    price_per_hour: float | None = None
    dry_run: bool = False


@dataclasses.dataclass(frozen=True)
class Verbs:
    """What the commands `train` and `evaluate` do, which a module of this level may not import."""

    train: Callable[[Config, Path], None]
    score: Callable[[Path, bool], None]
    """(run folder, whether it knows skills): measures it, and adds the result to its report."""


class _State:
    """speedrun.json, and the clock."""

    def __init__(self, folder: Path, asked: dict[str, Any]):
        self.file = folder / FILE
        self.read: dict[str, Any] = {"asked": asked, "spent": 0.0, "done": {}}
        if self.file.exists():
            self.read = _read(self.file)
            if (there := self.read["asked"]) != asked:
                name = next(name for name in asked if there.get(name) != asked[name])
                raise UserError(
                    f"{folder} holds a speedrun with {name} = {there.get(name)}, not {asked[name]}; give the same, or "
                    "another --workdir"
                )
            self.read["spent"] += max(0.0, _latest_change(folder) - self.read["began"])
        self.read["began"] = time.time()
        self.write()

    def write(self, **values: object) -> None:
        self.read |= values
        write_file(self.file, json.dumps(self.read, indent=2, ensure_ascii=False) + "\n")

    @property
    def spent(self) -> float:
        """Seconds of this and of earlier attempts."""
        return self.read["spent"] + time.time() - self.read["began"]


def _read(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        assert {"asked", "spent", "began", "done"} <= read.keys()
        return read
    except (OSError, ValueError, AttributeError, AssertionError):
        raise UserError(f"{file}: not what a speedrun wrote; remove it to begin again") from None


def _latest_change(folder: Path) -> float:
    """When the attempt before this one wrote last. Its lock is written by whoever looks in."""
    return max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file() and path.name != LOCK)


def run_stages(request: SpeedrunRequest, verbs: Verbs) -> None:
    """Do all stages that are not done, and print what came out.

    Raises:
        UserError: the folder holds another speedrun, the data cannot be read, or the time is too short.
    """
    _check(request)
    folder, data = request.workdir, chosen_data(request.data, request.chat)
    asked = {name: getattr(request, name) for name in ("minutes", "tokens", "data", "chat", "seed")}
    folder.mkdir(parents=True, exist_ok=True)
    with Lease(folder):
        state = _State(folder, asked)
        for note in data.notes:
            print(f"data     {note}", flush=True)
        if state.spent > 60:
            print(f"going on after {_clock(state.spent)} of {_clock(60 * request.minutes)}", flush=True)
        use_compilation_cache()
        frame = frame_for(request.minutes, jax.device_count(), jax.devices()[0].platform == "cpu")
        _measured(state, request, frame)
        plan = _planned(state, request, data, frame)
        _print_plan(plan, frame)
        if request.dry_run:
            return
        for stage, sentence in (("pretrain", "reads text, and learns the words"), ("chat", "learns to answer")):
            if stage in state.read["done"]:
                continue
            with _stage(state, stage, f"the model {sentence}: {_described(getattr(plan, stage), frame)}"):
                verbs.train(load_config(folder / f"{stage}.toml"), folder / stage)
        if "score" not in state.read["done"]:
            with _stage(state, "score", "it is asked what it has never seen"):
                verbs.score(folder / "chat", data.has_skills)
        if "finished" not in state.read:
            state.write(finished=state.spent)
    _print_end(folder, state, request)


def _check(request: SpeedrunRequest) -> None:
    if request.tokens is not None and request.tokens < 1:
        raise UserError(f"--tokens {request.tokens}: at least 1")
    if not LEAST_MINUTES <= request.minutes < math.inf:
        raise UserError(
            f"--minutes {request.minutes:g}: at least {LEAST_MINUTES:g}, as compiling and preparing take one"
        )


@contextlib.contextmanager
def _stage(state: _State, name: str, sentence: str) -> Iterator[None]:
    print(f"\n=== {name}: {sentence}", flush=True)
    began = time.time()
    yield
    state.write(done={**state.read["done"], name: round(time.time() - began, 1)})


# ---------------------------------------------------------------- measure and plan


def _measured(state: _State, request: SpeedrunRequest, frame: Frame) -> None:
    """Measure this machine and choose a size, unless that is done."""
    if "size" in state.read:
        return
    with _stage(state, "measure", "how fast is this machine?"):
        measured: list[StepTime] = []
        size, tried = _FIRST_PROBE if frame.is_cpu else _FIRST_PROBE_ACCELERATOR, set[tuple[int, int]]()
        any_length = Length(8 * frame.devices, 1000)
        while size not in tried and len(tried) < 3:
            plan = SpeedrunPlan(size[0], size[1], any_length, any_length, None, 0.0)
            settings = speedrun_plan.settings_of(plan, "pretrain", {}, ".", 0, frame)
            measured.append(probe(load_config(None, settings), frame.vocab_size))
            tried.add(size)
            best = speedrun_plan.candidates(_training_seconds(state, request, measured), measured, frame)[0]
            size = best.n_layer, best.n_embd
        rate, device = measured[-1].flops / measured[-1].seconds / 1e9, jax.devices()[0].device_kind
        print(f"speed    {frame.devices} x {device}: {rate:,.0f} GFLOP/s of the model's arithmetic", flush=True)
        state.write(size=size, device=device, measured=[each._asdict() for each in measured])


def _training_seconds(state: _State, request: SpeedrunRequest, measured: list[StepTime]) -> float:
    """Seconds for the steps of both runs, in what is left of the time."""
    left = 60 * request.minutes * (1 - speedrun_plan.RESERVE) - state.spent
    left -= 2 * (speedrun_plan.OTHER_SECONDS + measured[-1].compile_seconds) + _SCORE_SECONDS
    if "prepare" not in state.read["done"]:
        left = (left - _PREPARE_SECONDS) * (1 - _PREPARE_SHARE)
    return max(left, 5.0)


def _planned(state: _State, request: SpeedrunRequest, data: SpeedrunData, frame: Frame) -> SpeedrunPlan:
    """The plan, made once: after the data is prepared, because what that took is known then."""
    if "plan" in state.read:
        return SpeedrunPlan.from_json(state.read["plan"])
    if "sources" not in state.read:
        state.write(sources=_sources(_plan_now(state, request, data, frame), data, frame, request.minutes))
    folder, sources = request.workdir, state.read["sources"]

    def settings(plan: SpeedrunPlan, stage: str) -> dict[str, Any]:
        own = speedrun_plan.settings_of(plan, stage, sources[stage], str(folder), request.seed, frame)
        return own | ({"log.price_per_hour": request.price_per_hour} if request.price_per_hour else {})

    with _stage(state, "prepare", "texts and conversations become tokens"):
        draft = _plan_now(state, request, data, frame)
        _make_tokenizer(folder / "tokenizer", data, frame.vocab_size)
        for stage in ("pretrain", "chat"):
            prepare(load_config(None, settings(draft, stage)))
    plan = _plan_now(state, request, data, frame)
    for stage in ("pretrain", "chat"):
        file = folder / f"{stage}.toml"
        header = [f"The {stage} run of a speedrun in {folder}, which wrote this file. By itself:"]
        header += [f"  python -m jaxgpt.train --config {file} --workdir {folder / stage}"]
        write_file(file, to_toml(settings(plan, stage), header))
    state.write(plan=plan.to_json(), prediction=plan.prediction and plan.prediction._asdict())
    return plan


def _plan_now(state: _State, request: SpeedrunRequest, data: SpeedrunData, frame: Frame) -> SpeedrunPlan:
    """What the time that is left, or the tokens that were asked for, is enough for."""
    (n_layer, n_embd), measured = state.read["size"], [StepTime(**each) for each in state.read["measured"]]
    seconds, share = _training_seconds(state, request, measured), speedrun_plan.CHAT_SHARE
    tokens = frame.shares(seconds, frame.token_rate(n_layer, n_embd, measured))
    if request.tokens:
        tokens = request.tokens, min(request.tokens * share / (1 - share), speedrun_plan.MOST_CHAT)
    pretrain, chat = map(frame.length, tokens)
    is_law = data.text["source"] == BUILTIN and frame.vocab_size == LAW_VOCABULARY
    parameters, exact = without_embeddings(frame.model(n_layer, n_embd)), pretrain.rows * pretrain.steps
    guess = builtin_law().predict(parameters, exact * frame.n_positions) if is_law else None
    return SpeedrunPlan(n_layer, n_embd, pretrain, chat, guess, seconds)


def _make_tokenizer(folder: Path, data: SpeedrunData, vocab_size: int) -> None:
    """Train a BPE on as much text as conversations, with the tokens of a turn."""
    if folder.exists():
        return
    half: dict[str, Any] = {"max_bytes": _TOKENIZER_BYTES // 2, "on_bad_record": "skip"}
    talks = documents(DataConfig(source=(SourceConfig(**data.chat),), format="chat", **half))
    texts = documents(DataConfig(source=(SourceConfig(**data.text),), **half))
    turns = itertools.chain.from_iterable(plain_texts(talk.text, ChatConfig()) for talk in talks)
    turns = itertools.chain(turns, (text.text for text in texts))
    with new_folder(folder, existing="keep") as new:
        with_chat_tokens(train_bpe(turns, vocab_size, sys.stderr.isatty())).save(new)


def _sources(plan: SpeedrunPlan, data: SpeedrunData, frame: Frame, minutes: float) -> dict[str, dict[str, Any]]:
    """The settings of [data] of both runs: as much text as the steps read, and a little more."""
    text, chat = (length.rows * length.steps * frame.n_positions for length in (plan.pretrain, plan.chat))
    text_bytes = max(2_000_000, round(1.2 * text * speedrun_plan.TEXT_BYTES_PER_TOKEN, -5))
    chat_bytes = max(2_000_000, round(1.1 * chat * speedrun_plan.CHAT_BYTES_PER_TOKEN, -5))
    if data.has_skills:
        most = min(speedrun_plan.MADE_BYTES, minutes * speedrun_plan.MADE_BYTES_A_MINUTE)
        chat_bytes = min(chat_bytes, most)
    share = speedrun_plan.TEXT_SHARE
    mixture = [{**data.chat, "weight": 1 - share}, {**data.text, "weight": share}]
    if not data.text_can_be_mixed:
        print(
            f"data     the chat reads no text: a mixture takes {data.text['source']} for conversations only", flush=True
        )
        mixture = [data.chat]
    return {
        "pretrain": {**data.text, "max_bytes": int(text_bytes)},
        "chat": {"source": mixture, "max_bytes": int(chat_bytes)},
    }


# ---------------------------------------------------------------- what is printed


def _described(length: Length, frame: Frame) -> str:
    tokens = length.rows * length.steps * frame.n_positions
    return f"{tokens / 1e6:.1f} million tokens in {length.steps:,} steps"


def _print_plan(plan: SpeedrunPlan, frame: Frame) -> None:
    count = parameter_count(frame.model(plan.n_layer, plan.n_embd), frame.vocab_size)
    print(
        f"plan     {count / 1e6:.1f} M parameters: {plan.n_layer} layers of {plan.n_embd}, rows of {frame.n_positions}"
    )
    print(f"         pretraining {_described(plan.pretrain, frame)}, chat {_described(plan.chat, frame)}")
    if guess := plan.prediction:
        print(f"         loss after pretraining: {guess.loss:.2f} expected, {guess.low:.2f} to {guess.high:.2f} likely")
    print(f"         {_clock(plan.seconds)} of training", flush=True)


def _print_end(folder: Path, state: _State, request: SpeedrunRequest) -> None:
    done = ", ".join(f"{name} {_clock(seconds)}" for name, seconds in state.read["done"].items())
    print(f"\ndone in {_clock(state.read['finished'])} of {_clock(60 * request.minutes)}: {done}")
    losses = [each["eval_loss"] for each in read_metrics(folder / "pretrain") if "eval_loss" in each]
    expected = f", {guess['loss']:.2f} expected" if (guess := state.read["prediction"]) else ""
    print(f"loss     {losses[-1]:.2f} nats per token after pretraining{expected}")
    print(f"report   {folder / 'chat' / 'report.html'}")
    print(f"page     python -m jaxgpt.serve --checkpoint {folder / 'chat'}")
    print(f"terminal python -m jaxgpt.sample --chat --checkpoint {folder / 'chat'}", flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
