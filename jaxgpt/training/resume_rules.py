"""Which settings may change between two starts of one run: each is free, forced or refused."""

from typing import NamedTuple

from jaxgpt.config import Config, flatten

# May a setting change between two starts of one run? Each stands here once, by itself or with its section.
# fmt: off
ON_RESUME: dict[str, tuple[str, ...]] = {
    # Where and how it runs and is watched, not what it computes.
    "free": (
        "mesh", "checkpoint", "faults", "eval", "log",
        "model.scan_layers", "model.remat", "model.attention",  # the same sums, rounded in another order
        "tokenizer.path", "data.path",  # may be moved: their contents are compared by digest
        "data.prepared_dir", "data.num_threads", "data.prefetch_batches", "data.verify", "data.num_proc",
        "train.per_device_train_batch_size", "train.gradient_accumulation_steps",  # they share out the same rows
        "train.num_train_epochs",  # becomes max_steps, and is compared there
        "train.compilation_cache_dir",
    ),
    # Changes what follows and not what was: `train --force` accepts it.
    "forced": (
        "model.dropout", "model.dtype",
        "optimizer.learning_rate", "optimizer.muon_learning_rate", "optimizer.lr_scheduler_type",
        "optimizer.warmup_steps", "optimizer.min_lr_rate", "optimizer.decay_rate", "optimizer.weight_decay",
        "optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_epsilon", "optimizer.max_grad_norm",
        "data.skip_list",
        "train.max_steps",  # the schedule is stretched over it; free where it is not (ENDLESS)
    ),
    # Another experiment.
    "refused": (
        "model.n_layer", "model.n_head", "model.n_embd", "model.n_positions",
        "tokenizer.type", "tokenizer.vocab_size", "tokenizer.train_bytes", "tokenizer.special_tokens",
        "data.source", "data.text_field", "data.max_bytes", "data.format",
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

# None in a config that a user wrote, a number once devices and data are known.
RESOLVED = ("data.block_size", "train.global_batch_size", "train.max_steps")


class Change(NamedTuple):
    """A setting with another value than the run had so far."""

    old: object
    new: object
    kind: str
    """A key of ON_RESUME."""

    def __str__(self) -> str:
        return f"was {self.old}, now {self.new}"


def resume_conflicts(old: Config, new: Config) -> dict[str, Change]:
    """The settings in which `new` differs from the resolved `old`: {name: Change}.

    `new` may be unresolved; what it leaves open is no difference yet.
    """
    before, after = flatten(old), flatten(new)
    kinds = {entry: kind for kind, entries in ON_RESUME.items() for entry in entries}
    if {old.optimizer.lr_scheduler_type, new.optimizer.lr_scheduler_type} <= set(ENDLESS):
        kinds["train.max_steps"] = "free"
    return {
        name: Change(before[name], after[name], kinds.get(name) or kinds[name.split(".")[0]])
        for name in before
        if before[name] != after[name] and not (name in RESOLVED and after[name] is None)
    }
