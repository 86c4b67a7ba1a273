"""The accelerator: which process holds it, which devices jax sees, and whether they compute."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.diagnosis.finding import NOT_APPLICABLE, OK, PROBLEM, WARNING, Case, Finding
from jaxgpt.diagnosis.machine import describe, file_users, lock_owners
from jaxgpt.errors import UserError
from jaxgpt.parallel.accelerator import Accelerator, accelerators, asks_for_cpu, plugin_to_install
from jaxgpt.parallel.cluster_env import Unclear, find_place

LOCK = "tmp/libtpu_lockfile"  # libtpu locks it (lockf) as long as its process holds the chips
_TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE", "COLAB_TPU_ADDR")  # set by Colab or GKE


def holder(case: Case) -> Iterator[Finding]:
    """Finds "holder": the processes that hold the TPU, which cannot be shared."""
    root = Path(case.root)
    tpu = next((found for found in accelerators(root) if found.kind == "tpu"), None)
    lock = root / LOCK
    locked_by = lock_owners(lock, root) if lock.exists() else []
    if tpu is None:
        aside = f"; {describe(locked_by[0], root)} has libtpu's lock, to compile" if locked_by else ""
        yield Finding("holder", NOT_APPLICABLE, f"no TPU in this machine{aside}")
        return
    users = sorted({*file_users(tpu.device_files, root), *locked_by} - {os.getpid(), os.getppid()})
    if users:
        text = "the TPU is in use by " + ", ".join(describe(pid, root) for pid in users)
        fix = f"wait for it to end, or end it: kill {' '.join(map(str, users))}"
        yield Finding("holder", PROBLEM, text, fix, {"pids": users})
    elif lock.exists() and not os.access(lock, os.R_OK | os.W_OK):
        text = f"/{LOCK} belongs to another user, and libtpu cannot open it; nobody seen holds the TPU"
        yield Finding("holder", PROBLEM, text, f"sudo rm /{LOCK}")
    else:
        unseen = "" if os.geteuid() == 0 else " (other users' processes cannot be seen without root)"
        left = f"; /{LOCK} is left over and does no harm" if lock.exists() else ""
        yield Finding("holder", OK, f"nobody has the TPU open{unseen}{left}")


def compute(case: Case) -> Iterator[Finding]:
    """Finds "accelerator": jax's devices; "arithmetic": whether they compute; "mesh": whether the mesh fits."""
    started = time.monotonic()
    present = accelerators(Path(case.root))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave a GPU's memory to others
    try:
        import jax

        devices = jax.local_devices()
    except (ImportError, RuntimeError) as error:
        text, fix = f"jax cannot be imported: {error}", "pip install -U --force-reinstall jax jaxlib"
        if isinstance(error, RuntimeError):
            wanted = case.expect or (present[0].kind if present else "cpu")
            text, fix = f"jax has no devices: {error}", how_to_get(wanted, present, Path(case.root))
        yield Finding("accelerator", PROBLEM, text[:400], fix)
        for name in ("arithmetic", "mesh"):
            yield Finding(name, NOT_APPLICABLE, "jax has no devices")
        return
    seconds = time.monotonic() - started
    kind, count = devices[0].platform, len(devices)
    facts = {"platform": kind, "devices": count, "kind": devices[0].device_kind, "seconds": round(seconds, 2)}
    name = "CPU device" if kind == "cpu" else devices[0].device_kind
    text = f"{count} x {name} after {seconds:.1f} s"
    yield _judge(case, present, kind, text, facts)
    yield _arithmetic(devices)
    yield _mesh(case, kind)


def _judge(case: Case, present: list[Accelerator], kind: str, text: str, facts: dict) -> Finding:
    """Compare jax's devices with the expected ones and with those of the machine."""
    root = Path(case.root)
    if case.expect not in (None, kind):
        fix = how_to_get(case.expect, present, root)
        text = f"jax has {text}, not the {case.expect} that --expect asks for{why_not(case.expect)}"
        return Finding("accelerator", PROBLEM, text, fix, facts)
    unseen = [found for found in present if found.kind != kind]
    if kind != "cpu" or not unseen:
        named = next((name for name in _TPU_VARIABLES if os.environ.get(name)), "")
        if named and kind == "cpu" and not case.expect:
            fix = "unset it, or run where the TPU is (a container needs --privileged)"
            return Finding("accelerator", WARNING, f"{text}; {named} is set, but there is no TPU here", fix, facts)
        return Finding("accelerator", OK, text, facts=facts)
    if case.expect == "cpu" or asks_for_cpu(os.environ.get("JAX_PLATFORMS")):
        return Finding("accelerator", OK, f"{text}; {unseen[0].what} left alone, as asked", facts=facts)
    fix = how_to_get(unseen[0].kind, present, root)
    status = PROBLEM if unseen[0].device_files else WARNING
    text = f"jax sees only {text}, but this machine has {unseen[0].what}{why_not(unseen[0].kind)}"
    return Finding("accelerator", status, text, fix, facts)


def why_not(kind: str) -> str:
    """The error of asking jax for this kind of device by name; by default jax falls back to the CPU without a word."""
    import jax

    try:
        jax.local_devices(backend=kind)
    except RuntimeError as error:
        return f" ({' '.join(str(error).split())[:300]})"
    return ""


def how_to_get(kind: str, present: list[Accelerator], root: Path) -> str:
    """The fix that lets jax see devices of this kind."""
    if kind == "cpu":
        return "set JAX_PLATFORMS=cpu"
    found = next((found for found in present if found.kind == kind), None)
    name = {"tpu": "TPU", "gpu": "GPU"}[kind]
    if found is None:
        if kind == "gpu" and "CUDA_VISIBLE_DEVICES" in os.environ:
            return f"unset CUDA_VISIBLE_DEVICES, which is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
        more = "; nvidia-smi tells whether its driver runs" if kind == "gpu" else ""
        return f"this machine shows no sign of a {name}: start one that has it{more}"
    if not found.device_files:
        more = "--privileged --net=host" if kind == "tpu" else "--gpus all"
        return f"the machine has {found.what}, but no device file is here: docker run {more}"
    platforms = os.environ.get("JAX_PLATFORMS")
    if asks_for_cpu(platforms) or (platforms and kind not in platforms and "cuda" not in platforms):
        return f"unset JAX_PLATFORMS, which is {platforms}"
    if package := plugin_to_install(kind, root):
        return f'pip install -U "{package}"'
    return f"free the {name} if the line holder names somebody; else set TF_CPP_MIN_LOG_LEVEL=0 and read why jax fails"


def _arithmetic(devices: list) -> Finding:
    """Compare a matrix product on each device, summed over all of them, with the exact result."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    started, size = time.monotonic(), 64
    mesh = Mesh(np.array(devices), ("all",))
    rows = NamedSharding(mesh, PartitionSpec("all", None))
    shape = (len(devices) * size, size)
    ones = jax.make_array_from_callback(shape, rows, lambda index: np.ones((size, size), np.float32))
    total = jax.shard_map(
        lambda x: jax.lax.psum(jnp.sum(x @ x.T), "all"),
        mesh=mesh,
        in_specs=PartitionSpec("all", None),
        out_specs=PartitionSpec(),
    )
    result = float(jax.jit(total)(ones).addressable_data(0))
    seconds, expected = time.monotonic() - started, float(len(devices) * size**3)
    facts = {"result": result, "expected": expected, "seconds": round(seconds, 3)}
    if result != expected:  # sums of ones below 2^24: exact in any order, in bfloat16's float32 sums too
        text = f"a matrix product summed over {len(devices)} devices gives {result:g} instead of {expected:g}"
        return Finding("arithmetic", PROBLEM, text, "this device computes wrongly: use another machine", facts)
    text = f"a matrix product summed over {len(devices)} devices is right, compiled and run in {seconds:.2f} s"
    return Finding("arithmetic", OK, text, facts=facts)


def _mesh(case: Case, kind: str) -> Finding:
    """Whether [mesh] and the batch of the config fit the devices."""
    if not case.is_given:
        text = "no config is given; --config FILE asks whether its mesh fits the devices"
        return Finding("mesh", NOT_APPLICABLE, text)
    try:
        # A TPU's hosts know each other without being joined.
        is_alone = kind == "tpu" or find_place(os.environ, Path(case.root)) is None
    except Unclear:
        is_alone = False
    if not is_alone:
        return Finding("mesh", NOT_APPLICABLE, "the devices of the other hosts are known only once they have joined")
    import jax

    from jaxgpt.parallel.mesh import batch_shards, build_mesh
    from jaxgpt.training.step import resolve_batch

    try:
        mesh = build_mesh(case.config.mesh)
        config = case.config
        if config.train.per_device_train_batch_size != "auto":
            config = resolve_batch(config, batch_shards(mesh))
    except UserError as error:
        fix = f"change [mesh] or the batch in [train] so that they fit {jax.device_count()} devices"
        return Finding("mesh", PROBLEM, str(error), fix)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    batch = config.train.global_batch_size
    text = f"{shape}: {batch or 'as many as fit'} sequences a step over {batch_shards(mesh)} devices"
    return Finding("mesh", OK, text, facts=dict(mesh.shape) | {"global_batch_size": batch})
