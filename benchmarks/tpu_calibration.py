"""How far do estimates of `jaxgpt.planning.cost` lie from measured steps? Published runs, rebuilt and compiled here.

    python benchmarks/tpu_calibration.py [--only NAME] [--keep DIR]

Each run's train step is written anew in plain JAX at its published shapes, with its attention kernel, its loss and its
optimizer, compiled for its slice, and estimated as `python -m jaxgpt.plan` estimates. Measured / estimated is k.
Needs libtpu and no TPU; takes about half an hour on two cores (programs are kept in DIR).
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import statistics

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the slices are compiled for, not run on

import jax
import jax.numpy as jnp
import optax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from kernel_schedules import Schedule, kernel_schedules

from jaxgpt.parallel.chips import CHIPS
from jaxgpt.planning.cost import estimate
from jaxgpt.planning.program import Kernel, read_program
from jaxgpt.planning.topology import compile_only_devices, parse_slice


@dataclasses.dataclass(frozen=True)
class Run:
    """A published run of vorushin/tpuchat on one chip: 8 layers of width 1024, T = 2048, heads of 256."""

    name: str
    chip: str
    heads: int
    micro_batches: int
    rows: int
    """Of a micro-batch."""
    seconds: float
    """Measured, of one step."""
    source: str


_TOKENS = 131_072  # of a step of 16 x 4 or 64 rows
_LOG, _POST = "vorushin/tpuchat LOG.md, 20-21 Feb 2026", "vorushin.github.io, 22 Feb 2026"
RUNS = (
    Run("v5e 16 x 4 rows, 4 heads", "v5e", 4, 16, 4, _TOKENS / 148_829, _POST),
    Run("v6e 16 x 4 rows, 4 heads", "v6e", 4, 16, 4, _TOKENS / 433_606, _POST),
    Run("v6e 16 x 4 rows, 3 heads", "v6e", 3, 16, 4, _TOKENS / 464_234, _LOG),
    Run("v6e 64 rows, 3 heads", "v6e", 3, 1, 64, _TOKENS / 374_094, _LOG),
    Run("v6e 16 rows, 3 heads", "v6e", 3, 1, 16, _TOKENS / 4 / 386_769, _LOG),
    Run("v6e 4 rows, 3 heads", "v6e", 3, 1, 4, _TOKENS / 16 / 415_319, _LOG),
)

LAYERS, WIDTH, HIDDEN, HEAD, VOCAB, T = 8, 1024, 3072, 256, 32_768, 2048
BLOCK = 1024  # of splash attention, queries and keys


def rms_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def rotate(x_BNTH):
    """Rotary positions, in halves of the head."""
    half = x_BNTH.shape[-1] // 2
    angles = jnp.outer(jnp.arange(T, dtype=jnp.float32), 10_000.0 ** (-jnp.arange(half) / half))
    cos, sin = jnp.cos(angles).astype(x_BNTH.dtype), jnp.sin(angles).astype(x_BNTH.dtype)
    a, b = x_BNTH[..., :half], x_BNTH[..., half:]
    return jnp.concatenate([a * cos[None, None] + b * sin[None, None], b * cos[None, None] - a * sin[None, None]], -1)


def attend(heads: int, q_BNTH, k_BKTH, v_BKTH):
    sizes = splash.BlockSizes(
        block_q=BLOCK, block_kv=BLOCK, block_q_dkv=BLOCK, block_kv_dkv=BLOCK, block_q_dq=BLOCK, block_kv_dq=BLOCK
    )
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * heads)
    return jax.vmap(splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1))(
        q_BNTH, k_BKTH, v_BKTH
    )


def loss_of(heads: int, params: dict, tokens_BT, targets_BT):
    """One key and value head for all queries, SwiGLU, norms without gains, an untied head with a soft cap of 15."""
    x_BTD = rms_norm(params["embed"][tokens_BT])
    for layer in params["layers"]:
        h_BTD = rms_norm(x_BTD)
        q, k, v = (jnp.einsum("btd,dnh->bnth", h_BTD, layer[name]) for name in "qkv")
        out_BNTH = attend(heads, rms_norm(rotate(q)), rms_norm(rotate(k)), v)
        x_BTD = x_BTD + jnp.einsum("bnth,nhd->btd", out_BNTH, layer["out"])
        h_BTD = rms_norm(x_BTD)
        hidden_BTF = jax.nn.silu(h_BTD @ layer["gate"]) * (h_BTD @ layer["up"])
        x_BTD = x_BTD + hidden_BTF @ layer["down"]
    logits_BTV = (rms_norm(x_BTD) @ params["head"]).astype(jnp.float32)
    logits_BTV = 15.0 * jnp.tanh(logits_BTV / 15.0)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT).mean()


def abstract_params(heads: int) -> dict:
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    layer = dict(
        q=array(WIDTH, heads, HEAD),
        k=array(WIDTH, 1, HEAD),
        v=array(WIDTH, 1, HEAD),
        out=array(heads, HEAD, WIDTH),
        gate=array(WIDTH, HIDDEN),
        up=array(WIDTH, HIDDEN),
        down=array(HIDDEN, WIDTH),
    )
    return dict(embed=array(VOCAB, WIDTH), head=array(WIDTH, VOCAB), layers=[layer] * LAYERS)


def train_step(run: Run, optimizer, params, state, tokens_ABT, targets_ABT):
    gradient = jax.value_and_grad(lambda p, tokens, targets: loss_of(run.heads, p, tokens, targets))

    def add(total, micro):
        loss, grads = gradient(params, *micro)
        return jax.tree.map(jnp.add, total, grads), loss

    if run.micro_batches > 1:
        zero = jax.tree.map(jnp.zeros_like, params)
        grads, losses = jax.lax.scan(add, zero, (tokens_ABT, targets_ABT))
        grads, loss = jax.tree.map(lambda g: g / run.micro_batches, grads), losses.mean()
    else:
        loss, grads = gradient(params, tokens_ABT[0], targets_ABT[0])
    updates, state = optimizer.update(grads, state, params)
    return loss, optax.apply_updates(params, updates), state


def compiled_text(run: Run, keep: pathlib.Path | None) -> str:
    """The compiled step's text, kept in a folder if one is given."""
    file = keep and keep / f"{run.name.replace(' ', '_').replace(',', '')}.hlo"
    if file and file.exists():
        return file.read_text()
    where = jax.sharding.SingleDeviceSharding(compile_only_devices(parse_slice(f"{run.chip}-1"))[0])
    optimizer = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=0.1)
    params = abstract_params(run.heads)
    tokens = jax.ShapeDtypeStruct((run.micro_batches, run.rows, T), jnp.int32)
    arguments = (params, jax.eval_shape(optimizer.init, params), tokens, tokens)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arguments)
    step = jax.jit(lambda *xs: train_step(run, optimizer, *xs))
    text = step.lower(*arguments).compile().as_text()
    if file:
        keep.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return text


def splash_cycles(schedules: dict[str, Schedule], kernel: Kernel, _chip: str) -> float:
    """Cycles of a call of a splash kernel on 2 x 2 blocks of a causal row.

    The computing part of a grid step runs for 3 of the 4 blocks; what prepares a row of blocks and what finishes it
    runs once for every two. The compiler does not know: the kernel reads which blocks are masked from its operands.
    """
    schedule = schedules[kernel.name]
    whens = {i: region for i, region in enumerate(schedule.regions) if region.kind == "when"}
    around = lambda a, b: a is not b and a.start <= b.start and b.stop <= a.stop
    leaves = {i: r for i, r in whens.items() if not any(around(r, other) for other in whens.values())}
    largest = max(leaves, key=lambda i: leaves[i].stop - leaves[i].start)
    return schedule.scheduled({i: 3 / 4 if i == largest else 1 / 2 for i in leaves})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for compiled programs")
    args = parser.parse_args()
    factors = []
    print("| run | M cycles | kernels, M cycles | estimated ms | measured ms | k | source |")
    print("|---|---|---|---|---|---|---|")
    for run in RUNS:
        if args.only not in run.name:
            continue
        text = compiled_text(run, args.keep)
        schedules = {schedule.name: schedule for schedule in kernel_schedules(text, f"{run.chip}:2x2")}
        cost, chip = read_program(text), CHIPS[run.chip]
        time = estimate(cost, chip, (1, 1), functools.partial(splash_cycles, schedules))
        factors.append(run.seconds / time.seconds)
        print(
            f"| {run.name} | {cost.cycles / 1e6:.1f} | {time.kernel_seconds * chip.clock_hz / 1e6:.1f} "
            f"| {1e3 * time.seconds:.1f} | {1e3 * run.seconds:.1f} | {factors[-1]:.2f} | {run.source} |",
            flush=True,
        )
    print(f"\nGeometric mean {statistics.geometric_mean(factors):.2f}, {min(factors):.2f} to {max(factors):.2f}")


if __name__ == "__main__":
    main()
