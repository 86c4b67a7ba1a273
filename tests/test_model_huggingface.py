"""The same network as transformers' GPT2LMHeadModel: logits, gradients, training, greedy text; and back again."""

import logging
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import Config
from jaxgpt.data.pipeline import Batch
from jaxgpt.inference.decoder import build_decoder, generate
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.model import gpt2
from jaxgpt.model.huggingface import NAMES, open_model, read_params, write_model
from jaxgpt.parallel.mesh import build_mesh
from jaxgpt.settings import MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.training.step import build_program, summed_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file

torch.set_num_threads(1)  # its threads and XLA's would wait for each other's cores

# (layers, heads, width): the heads and widths of the four published sizes at reduced depth, and a tiny one.
PUBLISHED = [(1, 12, 768), (1, 16, 1024), (1, 20, 1280), (1, 25, 1600)]
TINY = (2, 4, 64)
SHAPES = [TINY, *(pytest.param(shape, marks=pytest.mark.system) for shape in PUBLISHED)]
VOCAB, POSITIONS = 65, 24


def random_peer(layers, heads, width, scale=1.0, positions=POSITIONS, head_scale=1.0, **settings):
    """A GPT2LMHeadModel whose every parameter matters: biases and gains are random too."""
    config = transformers.GPT2Config(
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        n_positions=positions,
        vocab_size=VOCAB,
        bos_token_id=None,
        eos_token_id=None,
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **settings},
    )
    peer = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                # Attention then prefers some positions, and the logits reach a few units.
                parameter.copy_(scale * noise * (0.1 if "wte" in name or "wpe" in name else width**-0.5))
            else:
                parameter.copy_(0.1 * noise + (name.endswith("weight")))
        peer.transformer.wte.weight *= head_scale
    return peer


def imported(peer, folder: Path):
    """(config, params) as read from what the peer itself saved."""
    peer.save_pretrained(folder)
    model = open_model(folder)
    assert model.vocab_size == VOCAB
    return model.config, jax.device_put(read_params(model), jax.devices()[0])


def tokens(step: int, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(step).integers(0, VOCAB, (rows, POSITIONS + 1), dtype=np.int32)


def our_logits(config, params, tokens_BT):
    return np.asarray(jax.jit(lambda params: gpt2.bind(config, VOCAB, params)(tokens_BT))(params))


def peer_logits(peer, tokens_BT):
    with torch.no_grad():
        return peer(torch.from_numpy(tokens_BT.astype(np.int64))).logits.float().numpy()


def peer_loss(peer, tokens_BT):
    tokens_BT = torch.from_numpy(tokens_BT.astype(np.int64))
    logits = peer(tokens_BT[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())


def as_batch(tokens_BT) -> Batch:
    return Batch(tokens_BT[..., :-1], tokens_BT[..., 1:], np.ones(tokens_BT[..., 1:].shape, np.float32))


def test_the_table_names_every_array_of_ours_and_every_tensor_of_theirs():
    _, shapes, _ = gpt2.abstract_model(ModelConfig(n_layer=2, n_head=4, n_embd=64), VOCAB)
    ours = {tuple(entry.key for entry in path) for path, _ in jax.tree_util.tree_flatten_with_path(shapes)[0]}
    theirs = {name.removeprefix("transformer.") for name, _ in random_peer(*TINY).named_parameters()}
    assert ours == set(NAMES)
    assert theirs == {name.format(layer) for name, _ in NAMES.values() for layer in range(2)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_the_gradient_of_every_tensor_agree(shape, tmp_path):
    peer = random_peer(*shape)
    config, params = imported(peer, tmp_path / "theirs")
    text = tokens(0)

    logits = peer_logits(peer, text[:, :-1])
    assert logits.std() > 0.5  # a difference of 1e-4 is small beside it
    np.testing.assert_allclose(our_logits(config, params, text[:, :-1]), logits, rtol=0, atol=1e-4)

    loss = peer_loss(peer, text)
    loss.backward()
    settings = Config(model=config)

    @jax.jit
    def mean_loss(params):
        total, count = summed_loss(settings, VOCAB, lambda x: x, params, as_batch(text))
        return total / count

    assert abs(float(mean_loss(params)) - loss.item()) < 1e-5
    grads = jax.device_get(jax.jit(jax.grad(mean_loss))(params))
    assert not grads["wte"][VOCAB:].any()
    write_model(tmp_path / "gradients", config, VOCAB, grads, None)  # under their names, by our table
    ours = load_file(tmp_path / "gradients" / "model.safetensors")
    for name, parameter in peer.named_parameters():
        difference = (ours.pop(name) - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-4, f"{name}: {difference}"
    assert not ours


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twenty_steps_of_adamw_lose_alike(shape, tmp_path):
    # Small weights and steps: where a step overshoots, the next ones multiply any difference in the last bit.
    peer, rate = random_peer(*shape, scale=0.3), 0.08 / shape[-1]
    model, params = imported(peer, tmp_path)
    optimizer = OptimizerConfig(
        learning_rate=rate, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.1, max_grad_norm=1.0
    )
    config = Config(model=model, optimizer=optimizer, train=TrainConfig(max_steps=20), mesh=MeshConfig(data=1))
    program = build_program(config, VOCAB, build_mesh(config.mesh, jax.devices()[:1]))
    decayed = [p for p in peer.parameters() if p.ndim == 2]
    others = [p for p in peer.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)

    state, losses, peer_losses = program.fresh_optimizer(params), [], []
    for step in range(20):
        text = tokens(step % 2)
        state, metrics = program.train_step(state, as_batch(text[None]))
        losses.append(float(metrics["loss_sum"] / metrics["count"]))
        theirs.zero_grad()
        loss = peer_loss(peer, text)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        theirs.step()
        peer_losses.append(loss.item())
    assert peer_losses[-1] < 0.8 * peer_losses[0]
    np.testing.assert_allclose(losses, peer_losses, rtol=0, atol=1e-4)


def test_what_we_write_transformers_loads_without_a_word(tmp_path, caplog):
    config = ModelConfig(n_layer=2, n_head=4, n_embd=64, n_positions=POSITIONS, dtype="float32")
    rng = np.random.default_rng(0)
    _, shapes, _ = gpt2.abstract_model(config, VOCAB)
    params = jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes)
    params["wte"][VOCAB:] = 1000.0  # padding that reached the file would win every argmax
    for shard in (10**9, 50_000):  # one file; several
        folder = tmp_path / str(shard)
        write_model(folder, config, VOCAB, params, end_of_text=3, max_shard_bytes=shard)
        transformers.utils.logging.enable_propagation()
        try:
            with caplog.at_level(logging.WARNING), warnings.catch_warnings():
                warnings.simplefilter("error")
                peer, told = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, attn_implementation="eager", output_loading_info=True
                )
        finally:
            transformers.utils.logging.disable_propagation()
        assert not caplog.records
        assert not any(told.values()), told
        assert type(peer) is transformers.GPT2LMHeadModel and peer.dtype == torch.float32
        assert peer.config.eos_token_id == peer.generation_config.eos_token_id == 3
        assert not peer.training
        text = tokens(5)[:, :-1]
        np.testing.assert_allclose(our_logits(config, params, text), peer_logits(peer, text), rtol=0, atol=1e-4)


def test_a_checkpoint_of_theirs_comes_back_bit_for_bit(tmp_path):
    peer = random_peer(*TINY, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)
    config, params = imported(peer, tmp_path / "theirs")
    assert config.dropout == 0.1
    write_model(tmp_path / "ours", config, VOCAB, params, None)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor.view(torch.int32), ours[name].view(torch.int32)), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened_exactly(dtype, tmp_path):
    peer = random_peer(*TINY).to(getattr(torch, dtype))
    config, params = imported(peer, tmp_path)
    assert params["wte"].dtype == jnp.float32 and config.dtype == "float32"
    peer = peer.float()
    np.testing.assert_array_equal(params["wte"][:VOCAB], peer.transformer.wte.weight.detach().numpy())
    text = tokens(1)[:, :-1]
    np.testing.assert_allclose(our_logits(config, params, text), peer_logits(peer, text), rtol=0, atol=1e-4)


def greedy(config, params, prompts: list[list[int]], new: int) -> list[list[int]]:
    decoder = build_decoder(config, VOCAB, params, end_of_text=None)
    options = SamplingOptions(max_new_tokens=new, temperature=0)
    return [continuations[0].tokens for continuations in generate(decoder, prompts, options)]


def test_fifty_prompts_go_on_alike_for_64_tokens(tmp_path):
    # Large weights: the likeliest token leads clearly, and depends on all that came before.
    peer = random_peer(*TINY, positions=96, scale=2.0, head_scale=2.0)
    config, params = imported(peer, tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, (10, length)) for length in (1, 4, 13, 20, 32)]
    ours = greedy(config, params, [prompt.tolist() for group in prompts for prompt in group], 64)
    theirs = []
    for group in prompts:  # of one length, so that there is nothing to pad
        given = torch.from_numpy(group)
        made = peer.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=64)
        theirs += made[:, group.shape[1] :].tolist()
    assert ours == theirs
    assert len({tuple(text[-16:]) for text in ours}) > 25  # not all of them ended in the same loop
