"""The state a run starts from: its own latest checkpoint, else another model's weights, else fresh ones.

Everything here that can refuse does so before the run writes anything.
"""

import contextlib
import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxgpt import __version__
from jaxgpt.config import Config, flatten, to_json, with_settings
from jaxgpt.data.dataset import TokenDataset, open_dataset
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.tokenizer_folder import has_tokenizer, load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.model import huggingface
from jaxgpt.model.huggingface import HuggingFaceModel, leaf_at
from jaxgpt.model.sizes import padded_vocab
from jaxgpt.parallel import distributed
from jaxgpt.settings import ModelConfig
from jaxgpt.storage.files import append_json
from jaxgpt.training import checkpoint
from jaxgpt.training.checkpoint import FOLDER, Checkpoints, find_step, finished_steps, read_config, read_metadata
from jaxgpt.training.metrics import METRICS_FILE, read_metrics
from jaxgpt.training.models import HUB
from jaxgpt.training.recovery import QUARANTINE, break_crash_loop, check_weights, clean_leftovers, newest_whole_step
from jaxgpt.training.step import Program, TrainState

logger = logging.getLogger(__name__)

# May a setting change between two starts of one run? Each stands here once, by itself or with its section.
# fmt: off
ON_RESUME: dict[str, tuple[str, ...]] = {
    # Where and how it runs and is watched, not what it computes.
    "free": (
        "mesh", "checkpoint", "faults", "eval", "log",
        "model.scan_layers", "model.remat", "model.attention",  # the same sums, rounded in another order
        "tokenizer.path", "data.path",  # may be moved: their contents are compared by digest
        "data.prepared_dir", "data.verify", "data.num_proc",
        "train.per_device_train_batch_size", "train.gradient_accumulation_steps",  # they share out the same rows
        "train.num_train_epochs",  # becomes max_steps, and is compared there
    ),
    # Changes what follows and not what was: `train --force` accepts it.
    "forced": (
        "model.dropout", "model.dtype",
        "optimizer.learning_rate", "optimizer.lr_scheduler_type",
        "optimizer.warmup_steps", "optimizer.min_lr_rate", "optimizer.decay_rate", "optimizer.weight_decay",
        "optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_epsilon", "optimizer.max_grad_norm",
        "data.skip_list",
        "train.max_steps",  # the schedule is stretched over it; free where it is not (ENDLESS)
    ),
    # Another experiment.
    "refused": (
        "model.n_layer", "model.n_head", "model.n_embd", "model.n_positions",
        "tokenizer.type", "tokenizer.vocab_size", "tokenizer.train_bytes", "tokenizer.special_tokens",
        "data.source", "data.text_field", "data.skills", "data.encoding", "data.max_bytes", "data.format",
        "data.on_bad_record", "data.max_record_bytes", "cleaning", "chat", "augmentation",
        "data.validation_fraction",  # it would train on documents that were held out
        # Row r of step s is window s * global_batch_size + r, of block_size tokens. Another value would repeat
        # windows or skip them from the first step on, and the tokens of the steps before would be counted wrong.
        "data.block_size", "train.global_batch_size",
        "optimizer.name", "optimizer.adam_mu_dtype",  # they decide what the stored state of the optimizer is
        "train.seed",  # the order of the data, too
        "init",
    ),
}
# fmt: on
ENDLESS = ("constant", "inverse_sqrt")  # schedules that do not know max_steps

# Until one rate served all parameters; a setting of its time says which muon a run was trained with.
REMOVED_RATE = "muon_learning_rate"
# None in a config that a user wrote, a number once devices and data are known; and what a run that goes on keeps.
KEPT = (
    "train.global_batch_size", "optimizer.learning_rate", "optimizer.warmup_steps",
    "eval.eval_steps", "checkpoint.save_steps",
)  # fmt: skip
RESOLVED = ("data.block_size", "train.max_steps", "tokenizer.vocab_size", *KEPT)


class Change(NamedTuple):
    """A setting with another value than the run had so far."""

    old: object
    new: object
    kind: str  # a key of ON_RESUME

    def __str__(self) -> str:
        return f"was {self.old}, now {self.new}"


def resume_conflicts(old: Config, new: Config) -> dict[str, Change]:
    """Settings in which `new` differs from the resolved `old`; what `new` leaves open is no difference yet."""
    before, after = flatten(old), flatten(new)
    kinds = {entry: kind for kind, entries in ON_RESUME.items() for entry in entries}
    if {old.optimizer.lr_scheduler_type, new.optimizer.lr_scheduler_type} <= set(ENDLESS):
        kinds["train.max_steps"] = "free"
    return {
        name: Change(before[name], after[name], kinds.get(name) or kinds[name.split(".")[0]])
        for name in before
        if before[name] != after[name] and not (name in RESOLVED and after[name] is None)
    }


def as_before(config: Config, run: Path) -> Config:
    """`config` with what it leaves open as the run has it, where that suits the settings that are given."""
    if not finished_steps(run):
        return config
    before, now = flatten(read_config(run)), flatten(config)
    for names in (KEPT[:1], KEPT[1:2], KEPT[2:3], KEPT[3:]):  # evaluations and checkpoints depend on each other
        if all(now[name] is None for name in names):
            with contextlib.suppress(UserError):
                config = with_settings(config, **{name.replace(".", "_"): before[name] for name in names})
    return config


# ---------------------------------------------------------------- the run folder

CHANGES = "changes.jsonl"  # the settings that changed in the course of a run, one line a start


def check_workdir(config: Config, workdir: Path, force: bool = False) -> dict[str, Change]:
    """Refuse a folder that holds another experiment's run, or weights that cannot be resumed.

    Returns:
        The settings that differ from those of the run so far and are accepted, for `record_changes`.

    Raises:
        UserError: names every setting that differs and may not, with both values. With `force`, those that decide
            what follows and not what was may differ.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file, not a folder")
    if not (workdir / "config.json").exists():
        if (workdir / FOLDER).exists() or checkpoint.has_saved(workdir):
            raise UserError(f"{workdir} holds files of a run but no config.json; choose another --workdir")
        return {}
    steps = finished_steps(workdir)
    if not checkpoint.named_steps(workdir) and not any((workdir / QUARANTINE).glob("*")) and _had_checkpoints(workdir):
        raise UserError(
            f"{workdir / FOLDER} holds no checkpoint any more, though the run has saved some: put them back, or choose "
            f"another --workdir (init.from_huggingface = {workdir / 'hf'} starts from the weights, if there are any)"
        )
    if steps and not (workdir / FOLDER / str(steps[-1]) / "optimizer").is_dir():
        raise UserError(
            f"{workdir} holds weights without an optimizer state, so it cannot be resumed; choose another --workdir "
            f'and start from these weights with init.from_checkpoint = "{workdir}"'
        )
    old = read_config(workdir)
    if steps and old.optimizer.name == "muon" and f'"{REMOVED_RATE}"' in (workdir / "config.json").read_text("utf-8"):
        raise UserError(
            f"{workdir} was trained by an earlier version's muon (optimizer.{REMOVED_RATE}), whose state cannot go on; "
            f'choose another --workdir and start from these weights with init.from_checkpoint = "{workdir}"'
        )
    changes = resume_conflicts(old, config)
    _refuse(workdir, changes, force)
    if steps and (config.train.max_steps or steps[-1]) < steps[-1]:
        raise UserError(
            f"train.max_steps = {config.train.max_steps}, but the run in {workdir} has done {steps[-1]} steps; "
            f"set it to {steps[-1]} or more"
        )
    return changes


def _had_checkpoints(workdir: Path) -> bool:
    """Whether a run, also one that was killed, says that it has had a checkpoint."""
    if (said := checkpoint.has_saved(workdir)) is not None:
        return said
    lines = read_metrics(workdir) if (workdir / METRICS_FILE).exists() else []
    last = max((line["step"] for line in lines), default=0)  # a run of an older version had no summary until its end
    return (workdir / "hf").exists() or last > read_config(workdir).save_steps


def _refuse(workdir: Path, changes: dict[str, Change], force: bool) -> None:
    listed = {
        kind: ", ".join(f"{name} {change}" for name, change in changes.items() if change.kind == kind)
        for kind in ("forced", "refused")
    }
    if listed["refused"]:
        also = f"; --force would accept only: {listed['forced']}" if listed["forced"] else ""
        raise UserError(
            f"{workdir} belongs to another experiment: {listed['refused']}; set back what differs or choose another "
            f"--workdir{also}"
        )
    if listed["forced"] and not force:
        raise UserError(
            f"{workdir} has run with other settings: {listed['forced']}; set back what differs, choose another "
            "--workdir, or go on with the new values with --force"
        )


def record_changes(workdir: Path, step: int, changes: dict[str, Change]) -> None:
    """Append to changes.jsonl the settings that differ from `step` on, {"step": 500, "changes": {name: [old, new]}}.

    Call it before config.json is rewritten, so that a crash between the two loses nothing. Forced ones are printed.
    """
    if not changes:
        return
    pairs = {name: [change.old, change.new] for name, change in changes.items()}
    append_json(workdir / CHANGES, {"step": step, "changes": pairs})
    for name, change in changes.items():
        if change.kind == "forced":
            print(f"changed  {name} {change}, from step {step} on (--force)", flush=True)


# ---------------------------------------------------------------- another model's weights


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights that this run starts from: checked, and not read yet."""

    setting: str  # what the user asked for: "init.from_huggingface = gpt2"
    source: tuple[Path, int] | HuggingFaceModel  # a run folder and its step, or a Hugging Face folder
    vocab_size: int  # tokens that the embedding has rows for; the tokenizer may know fewer
    tokenizer: Tokenizer | None  # what the weights were trained with; None where a Hugging Face folder does not hold it
    tokenizer_path: str  # the tokenizer.path that gives the same tokenizer


def weights_to_start_from(config: Config, step: int | None) -> Weights | None:
    """The weights that init.from_checkpoint or init.from_huggingface names; None for a run that goes on from `step`.

    Raises:
        UserError: there is no such model, or it has another shape; names both numbers.
    """
    if step is not None:
        return None
    if config.init.from_huggingface:
        return _huggingface_weights(config, config.init.from_huggingface)
    if not config.init.from_checkpoint:
        return None
    setting = f"init.from_checkpoint = {config.init.from_checkpoint}"
    run, found = find_step(Path(config.init.from_checkpoint), tell=True)
    _check_shape(setting, read_config(run).model, config.model)
    tokenizer = load_tokenizer(run / "tokenizer")
    vocab_size = read_metadata(run, found).get("vocab_size") or tokenizer.vocab_size
    return Weights(setting, (run, found), vocab_size, tokenizer, str(run / "tokenizer"))


def _huggingface_weights(config: Config, name: str) -> Weights:
    setting = f"init.from_huggingface = {name}"
    model = huggingface.open_model(huggingface.locate(name))
    _check_shape(setting, model.config, config.model)
    tokenizer = load_tokenizer(model.folder) if has_tokenizer(model.folder) else None
    if tokenizer is None:
        warning = "%s holds no tokenizer: only the size of its vocabulary, %d, is compared with the data's"
        logger.warning(warning, setting, model.vocab_size)
    is_folder = Path(name).expanduser() == model.folder
    return Weights(setting, model, model.vocab_size, tokenizer, name if is_folder else HUB + name.removeprefix(HUB))


def _check_shape(setting: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    shape = {name: getattr(theirs, name) for name in ("n_layer", "n_head", "n_embd", "n_positions")}
    for name, there in shape.items():
        if there != (here := getattr(ours, name)):
            fix = ", ".join(f"{key} = {value}" for key, value in shape.items())
            raise UserError(f"{setting} has model.{name} = {there}, but this config has {here}; set in [model] {fix}")


def check_tokenizer(weights: Weights | None, tokenizer: Tokenizer | None) -> None:
    """Refuse to feed tokens to weights that learned another vocabulary; None stands for what is not known yet."""
    if weights is None or tokenizer is None:
        return
    if weights.tokenizer is None:
        if padded_vocab(weights.vocab_size) != padded_vocab(tokenizer.vocab_size):
            raise UserError(
                f"{weights.setting} has a vocabulary of {weights.vocab_size} and no tokenizer, but the tokenizer of "
                f"the data has {tokenizer.vocab_size} tokens; put the model's own into its folder and use that"
            )
    elif not tokenizer.extends(weights.tokenizer):
        raise UserError(
            f"{weights.setting} has another tokenizer ({weights.tokenizer.vocab_size} tokens) than the data "
            f'({tokenizer.vocab_size}); set tokenizer.type = "folder" and tokenizer.path = "{weights.tokenizer_path}"'
        )


def grow(wte_VD: np.ndarray, known: int, wanted: int) -> np.ndarray:
    """The embedding for `wanted` tokens, padded; those after the `known` ones start as the mean of these.

    A new token is then as likely as an old one on average, and the odds among the old ones stay. Small random
    rows would have logits near 0, far above those of a trained model, and take most of the probability
    (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    """
    if wanted <= known:
        return wte_VD
    grown_VD = np.zeros((padded_vocab(wanted), wte_VD.shape[1]), np.float32)
    grown_VD[:known] = wte_VD[:known]
    grown_VD[known:wanted] = wte_VD[:known].mean(axis=0, dtype=np.float64)[None]
    return grown_VD


def read_weights(weights: Weights, vocab_size: int, target: dict) -> dict:
    """The parameters for a vocabulary of `vocab_size`, laid out as `target` (a tree of ShapeDtypeStructs) says."""

    def place(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        leaf = leaf_at(target, path)
        if path == ("wte",):
            array = grow(array, weights.vocab_size, vocab_size)
        # Each device gets its own part, on whichever host it is.
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    if isinstance(weights.source, HuggingFaceModel):
        return huggingface.read_params(weights.source, place)
    wte = target["wte"]
    rows = (padded_vocab(weights.vocab_size), wte.shape[1])
    everywhere = jax.sharding.NamedSharding(wte.sharding.mesh, jax.sharding.PartitionSpec())
    stored = {**target, "wte": jax.ShapeDtypeStruct(rows, wte.dtype, sharding=everywhere)}
    check_weights(*weights.source)
    params = checkpoint.restore_params(*weights.source, stored, jax.tree.map(lambda leaf: leaf.sharding, stored))
    return {**params, "wte": place(("wte",), np.asarray(params["wte"].addressable_data(0)))}


# ---------------------------------------------------------------- data and state


def check_data(workdir: Path, step: int | None, weights: Weights | None, dataset: TokenDataset) -> TokenDataset:
    """`dataset` with the vocabulary of the model, which may have rows for more tokens than its tokenizer knows.

    Raises:
        UserError: it is not what the run has read so far, or not in the language of the weights to start from.
    """
    check_tokenizer(weights, dataset.tokenizer)
    if step is None:
        return dataclasses.replace(dataset, vocab_size=max(dataset.vocab_size, weights.vocab_size if weights else 0))
    saved = read_metadata(workdir, step)
    text = ("data_fingerprint", dataset.fingerprint, "its text, or what is held out of it, has changed")
    tokenizer = ("tokenizer_digest", dataset.tokenizer_digest, "its text is the same, and its tokenizer another one")
    for name, value, reason in (text, tokenizer):
        if saved[name] != value:
            raise UserError(
                f"the prepared data in {dataset.path} is not what the run in {workdir} has read up to step {step}: "
                f"{reason} ({name} was {saved[name][:12]}, now {value[:12]}); choose another --workdir"
            )
    return dataclasses.replace(dataset, vocab_size=saved["vocab_size"])


def dataset_read_by(run: Path, step: int, folder: Path | None = None) -> TokenDataset:
    """The prepared data that the run had read up to `step`, in `folder` if it was moved; else raises `UserError`."""
    saved = read_metadata(run, step)
    folder = folder or saved.get("data_path")
    if folder is None:
        raise UserError(f"{run}: its checkpoints do not say where the prepared data lies; name it with --data DIR")
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: the data of the run is not there; prepare it again, or name it with --data DIR")
    dataset = open_dataset(folder, verify="sizes")
    if (dataset.fingerprint, dataset.tokenizer_digest) != (saved["data_fingerprint"], saved["tokenizer_digest"]):
        raise UserError(f"{folder}: is not the data that the run in {run} has read; name that with --data DIR")
    return dataset


def initial_state(
    program: Program, checkpoints: Checkpoints, step: int | None, weights: Weights | None, vocab_size: int
) -> TrainState:
    """The state of the run's own `step`, else one around `weights`, else a fresh one."""
    if step is not None:
        return checkpoints.restore(step, program.abstract_state)
    if weights:
        return program.fresh_optimizer(read_weights(weights, vocab_size, program.abstract_state.params))
    return program.init()


# ---------------------------------------------------------------- taking up a run


def take_up(workdir: Path, config: Config) -> int | None:
    """The step that the run in `workdir` goes on from: its newest checkpoint that is whole; None where there is none.

    What a dead process left is removed, damaged checkpoints are moved to quarantine/. The writer does so, under the
    run's lease, and tells the other processes.

    Raises:
        RunFailed: the run crashes again and again at one step.
    """
    step = None
    if distributed.is_writer():
        clean_leftovers(workdir)
        step = break_crash_loop(workdir, newest_whole_step(workdir), identity(config))
    return _agreed(step)


def newest_step(workdir: Path) -> int | None:
    """The newest whole checkpoint of a run that is going on, for it to go back to."""
    return _agreed(newest_whole_step(workdir) if distributed.is_writer() else None)


def _agreed(step: int | None) -> int | None:
    agreed = distributed.broadcast_from_writer(-1 if step is None else step)
    return None if agreed < 0 else agreed


def identity(config: Config) -> str:
    """Names the settings and the program: after a crash under other ones another attempt makes sense."""
    return hashlib.sha256(f"{__version__} {to_json(config)}".encode()).hexdigest()[:16]
