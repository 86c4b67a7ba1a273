"""Where a CPU step's time goes: its matmuls, its attention and its optimizer alone, beside the whole step.

    pip install -e '.[parity]'
    python benchmarks/cpu_floor.py --shape 124M --dtype float32

The matmuls of the step (forward, both gradients, the tied head's too) are timed one by one, by XLA and by torch. Their
sum by the faster of the two is the floor: a step that did nothing else would take that long. What the peer of
`train_step.py` takes, over the floor, is the largest ratio that any program on this machine could show. Times are
medians of wall-clock seconds, for a machine with nothing else to do.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from train_step import SHAPES, Ours, Peer, machine, versions


def matmuls(shape: str) -> list[tuple[str, int, int, int, int]]:
    """(name, rows, inputs, outputs, how often in a step) of the forward products; each has two gradients as large."""
    layers, _, width, positions, vocabulary, rows, _ = SHAPES[shape]
    tokens = rows * positions
    return [
        ("queries, keys, values", tokens, width, 3 * width, layers),
        ("attention's projection", tokens, width, width, layers),
        ("MLP in", tokens, width, 4 * width, layers),
        ("MLP out", tokens, 4 * width, width, layers),
        ("head", tokens, width, -(-vocabulary // 128) * 128, 1),
    ]


def median_seconds(call, least: float = 1.0) -> float:
    """The median time of a call, over about `least` seconds and at least five calls."""
    call()
    times = []
    while len(times) < 5 or (sum(times) < least and len(times) < 200):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


WEIGHTS = "ri,ro->io"  # the form of a weight's gradient


def products(rows: int, inputs: int, outputs: int):
    """The three products of a linear layer, as (name, left shape, right shape, einsum)."""
    yield "forward", (rows, inputs), (inputs, outputs), "ri,io->ro"
    yield "input's gradient", (rows, outputs), (inputs, outputs), "ro,io->ri"
    yield "weight's gradient", (rows, inputs), (rows, outputs), WEIGHTS


def xla_seconds(left: tuple, right: tuple, form: str, dtype: str) -> float:
    """The product, of a weight's gradient the faster of the plain one and of the form that the package uses."""
    import jax
    import jax.numpy as jnp

    from jaxgpt.model.cpu import kernel_gradient

    a, b = (jnp.asarray(np.random.default_rng(i).standard_normal(s), dtype) for i, s in enumerate((left, right)))
    kinds = [lambda a, b: jnp.einsum(form, a, b, preferred_element_type=jnp.float32)]
    if form == WEIGHTS:
        kinds.append(kernel_gradient)
    times = []
    for kind in kinds:
        product = jax.jit(kind)
        times.append(median_seconds(lambda product=product: product(a, b).block_until_ready()))
    return min(times)


def torch_seconds(left: tuple, right: tuple, form: str, dtype: str) -> float:
    import torch

    kind = getattr(torch, dtype)
    a, b = (torch.randn(s, dtype=kind) for s in (left, right))
    if form == "ro,io->ri":
        b = b.T
    if form == WEIGHTS:
        a = a.T
    return median_seconds(lambda: torch.mm(a, b))


def attention_seconds(shape: str, dtype: str) -> tuple[float, float]:
    """Attention of one layer, forward and backward, by our CPU backend and by torch's fused kernel."""
    import jax
    import jax.numpy as jnp
    import torch

    from jaxgpt.model.backend_choice import choose_backend
    from jaxgpt.settings import ModelConfig

    layers, heads, width, positions, _, rows, _ = SHAPES[shape]
    model = ModelConfig(n_layer=layers, n_head=heads, n_embd=width, n_positions=positions, dtype=dtype)
    backend, _ = choose_backend(model, "cpu", positions)
    size = (rows, positions, heads, width // heads)
    q, k, v = (jnp.asarray(np.random.default_rng(i).standard_normal(size), dtype) for i in range(3))
    ours = jax.jit(jax.grad(lambda q, k, v: backend.attend(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2)))
    parts = [torch.randn(rows, heads, positions, width // heads, dtype=getattr(torch, dtype)) for _ in range(3)]
    for part in parts:
        part.requires_grad_()

    def peer():
        torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True).float().sum().backward()

    return median_seconds(lambda: jax.block_until_ready(ours(q, k, v))), median_seconds(peer)


def optimizer_seconds(shape: str) -> float:
    """AdamW's traffic at this machine's bandwidth: seven passes over float32 parameters, four read, three written."""
    layers, _, width, positions, vocabulary, _, _ = SHAPES[shape]
    parameters = 12 * layers * width**2 + (positions + vocabulary) * width
    source = np.ones(50_000_000, np.float32)
    target = np.empty_like(source)
    copy = median_seconds(lambda: np.copyto(target, source))
    return 7 * parameters * copy / (2 * source.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    shape, dtype = arguments.shape, arguments.dtype
    print(f"{machine()}; {versions()}; {shape} {dtype}\n")
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = Ours(shape, dtype, Path(folder)), Peer(shape, dtype, Path(folder))
        counter = itertools.count()
        step = median_seconds(lambda: ours.step(next(counter)), 20)
        peer_step = median_seconds(lambda: peer.step(next(counter)), 20)
    print("| part | how often | XLA ms | torch ms |\n|---|---|---|---|")
    floor = xla_sum = torch_sum = 0.0
    for name, rows, inputs, outputs, times in matmuls(shape):
        for product, left, right, form in products(rows, inputs, outputs):
            xla, torch = (seconds(left, right, form, dtype) for seconds in (xla_seconds, torch_seconds))
            print(f"| {name}, {product} | {times} | {1e3 * xla:.2f} | {1e3 * torch:.2f} |", flush=True)
            floor += times * min(xla, torch)
            xla_sum, torch_sum = xla_sum + times * xla, torch_sum + times * torch
    layers = SHAPES[shape][0]
    attention, peer_attention = attention_seconds(shape, dtype)
    print(f"| attention, both ways | {layers} | {1e3 * attention:.2f} | {1e3 * peer_attention:.2f} |")
    optimizer = optimizer_seconds(shape)
    print(f"\nmatmuls in a step: XLA {xla_sum:.3f} s, torch {torch_sum:.3f} s, the faster of each {floor:.3f} s")
    print(f"attention in a step: ours {layers * attention:.3f} s, torch {layers * peer_attention:.3f} s")
    print(f"AdamW's traffic: {optimizer:.3f} s")
    print(f"our step {step:.3f} s, of which all else {step - xla_sum - layers * attention - optimizer:.3f} s")
    print(
        f"peer's step {peer_step:.3f} s = {peer_step / step:.2f} of ours, {peer_step / floor:.2f} of the matmuls alone"
    )


if __name__ == "__main__":
    main()
