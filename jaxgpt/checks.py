"""Checks across settings, made for every `Config` that is built.

Each function raises `UserError` where two settings contradict each other; the message names both, and the fix.
"""

from jaxgpt.errors import UserError
from jaxgpt.settings import (
    AugmentationConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    InitConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    sources_of,
)


def check_shapes(model: ModelConfig, mesh: MeshConfig, data: DataConfig) -> None:
    if model.n_embd % model.n_head:
        raise UserError(f"model.n_head = {model.n_head} does not divide model.n_embd = {model.n_embd}")
    if model.n_head % mesh.tensor:
        raise UserError(f"mesh.tensor = {mesh.tensor} does not divide model.n_head = {model.n_head}")
    if data.block_size and data.block_size > model.n_positions:
        raise UserError(f"data.block_size = {data.block_size} is longer than model.n_positions = {model.n_positions}")
    if mesh.data == 0:
        raise UserError("mesh.data = 0: give a number of devices, or -1 for all that are left")


def check_data(data: DataConfig, tokenizer: TokenizerConfig, augmentation: AugmentationConfig) -> None:
    for part in sources_of(data):
        if part.source in ("text", "html", "jsonl", "parquet", "sgd") and not part.path:
            where = "data.path" if isinstance(data.source, str) else "a path in its table"
            raise UserError(f'data.source = "{part.source}" needs {where}, a file or a folder')
    if tokenizer.type == "folder" and not tokenizer.path:
        raise UserError('tokenizer.type = "folder" needs tokenizer.path, a Hugging Face tokenizer folder')
    if data.format == "text" and augmentation.copies:
        raise UserError('augmentation.copies is for conversations: set data.format = "chat", or leave it out')
    changes = ("shuffle_sentences", "synonym_rate", "typo_rate", "drop_turns")
    if augmentation.copies and not any(getattr(augmentation, name) for name in changes):
        raise UserError(f"augmentation.copies makes copies without a change; set one of {', '.join(changes)}")
    if augmentation.synonym_rate and not augmentation.synonyms:
        raise UserError("augmentation.synonym_rate needs augmentation.synonyms, a file of words")


def check_schedule(
    train: TrainConfig, optimizer: OptimizerConfig, evaluation: EvalConfig, checkpoint: CheckpointConfig, log: LogConfig
) -> None:
    save, evaluate, steps = checkpoint.save_steps, evaluation.eval_steps, train.max_steps
    if checkpoint.keep_best and save % evaluate:
        raise UserError(
            f"checkpoint.save_steps = {save} is not a multiple of eval.eval_steps = {evaluate}, "
            "so the best checkpoint cannot be known; change one or set checkpoint.keep_best = false"
        )
    if evaluation.early_stopping_patience and not checkpoint.keep_best:
        raise UserError(
            f"eval.early_stopping_patience = {evaluation.early_stopping_patience} needs checkpoint.keep_best = true, "
            "since the run ends with its best checkpoint; set it, or leave the patience out"
        )
    if steps and optimizer.warmup_steps > steps:
        raise UserError(f"optimizer.warmup_steps = {optimizer.warmup_steps} is more than train.max_steps = {steps}")
    if log.profile:
        first, last = (int(step) for step in log.profile.split(":"))
        if last < first:
            raise UserError(f"log.profile = {log.profile} ends before it begins; give first:last, such as 10:13")
        if steps and last > steps:
            raise UserError(f"log.profile = {log.profile} goes beyond the last step, train.max_steps = {steps}")
    if steps and optimizer.lr_scheduler_type == "warmup_stable_decay":
        decay = round(optimizer.decay_rate * steps)
        if optimizer.warmup_steps + decay > steps:
            raise UserError(
                f"optimizer.warmup_steps = {optimizer.warmup_steps} and the {decay} steps of "
                f"optimizer.decay_rate are more than train.max_steps = {steps}"
            )


def check_start(init: InitConfig, tokenizer: TokenizerConfig) -> None:
    tokens = tokenizer.special_tokens
    if init.from_checkpoint and init.from_huggingface:
        raise UserError(
            f"init.from_checkpoint = {init.from_checkpoint} and init.from_huggingface = {init.from_huggingface} "
            "are both set, but a run starts from one of them; leave the other out"
        )
    if "" in tokens:
        raise UserError("tokenizer.special_tokens holds an empty text; leave it out")
    for token in tokens:
        if tokens.count(token) > 1:
            raise UserError(f"tokenizer.special_tokens names {token!r} {tokens.count(token)} times; name it once")
