"""Sizes without jax: published models, parameters, bytes of a checkpoint, and the FLOPs that MFU divides by."""

from jaxgpt.config import Config
from jaxgpt.settings import ModelConfig, OptimizerConfig

GPT2_VOCAB = 50257
VOCAB_MULTIPLE = 128  # lanes of a TPU vector register: a vocabulary of 50257 would leave half-filled tiles

# Radford et al. 2019, table 2; heads from OpenAI's released hparams.json; counts as in Hugging Face's models.
PUBLISHED = {
    "124M": (dict(n_layer=12, n_head=12, n_embd=768), 124_439_808),
    "355M": (dict(n_layer=24, n_head=16, n_embd=1024), 354_823_168),
    "774M": (dict(n_layer=36, n_head=20, n_embd=1280), 774_030_080),
    "1.5B": (dict(n_layer=48, n_head=25, n_embd=1600), 1_557_611_200),
}


def padded_vocab(vocab_size: int) -> int:
    """The vocabulary rounded up to a multiple of 128. The added rows are zero and never leave this package."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the network. The published count has no padding: pass `padded_vocab` for what is stored."""
    d, layers = model.n_embd, model.n_layer
    block = 12 * d * d + 13 * d  # matrices 3 + 1 + 4 + 4; biases 3 + 1 + 4 + 1 and two LayerNorms of 2
    return layers * block + (vocab_size + model.n_positions) * d + 2 * d


def moment_bytes(model: ModelConfig, optimizer: OptimizerConfig, vocab_size: int) -> float:
    """Bytes of the optimizer's moments per stored parameter. Muon has a second moment for the embeddings only."""
    first = 2 if optimizer.adam_mu_dtype == "bfloat16" else 4
    if optimizer.name != "muon":
        return first + 4
    matrices = 12 * model.n_layer * model.n_embd**2
    embeddings = (padded_vocab(vocab_size) + model.n_positions) * model.n_embd
    return first + 4 * embeddings / (matrices + embeddings)


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """Bytes of one checkpoint: float32 weights and the optimizer's moments."""
    stored = parameter_count(config.model, padded_vocab(vocab_size))
    return round(stored * (4 + moment_bytes(config.model, config.optimizer, vocab_size)))


def checkpoints_at_once(config: Config) -> int:
    """Checkpoints on the disk at the same time: those that are kept, and the one that is being written."""
    return config.checkpoint.save_total_limit + config.checkpoint.keep_best + 1


def flops_per_token(model: ModelConfig, vocab_size: int, block_size: int) -> float:
    """Model FLOPs of training on one token: 6 x matmul parameters + causal attention, forward and backward.

    6 N is Kaplan et al. 2020 (section 2.1), with N = 12 L D^2 + V D (the tied head is a matmul; positions,
    biases and norms are not). Attention is 12 L D T (Chowdhery et al. 2022, appendix B) halved, because
    a causal query reads half of the keys on average. Recomputation is not counted.
    """
    matmul_parameters = 12 * model.n_layer * model.n_embd**2 + vocab_size * model.n_embd
    return 6.0 * matmul_parameters + 6.0 * model.n_layer * model.n_embd * block_size
