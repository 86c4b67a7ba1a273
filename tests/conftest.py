"""Every test sees 8 virtual CPU devices, and may not broadcast arrays of different ranks by accident."""

import os
import signal
from pathlib import Path

# What a shell starts in the background ignores Ctrl-C, and so do its children; the tests send it to some.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_number, signal.SIG_DFL)

os.environ["JAX_PLATFORMS"] = "cpu"
# Level 0 compiles twice as fast (a tiny step: 2.4 s to 1.2 s; its initial values: 3.6 s to 0.5 s) and the tests
# compile far more than they run.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)
os.environ["HF_HUB_OFFLINE"] = "1"
# Compiled programs are kept for the next run of the tests, for the other workers and for child processes, in a folder
# of the tests' own: no test depends on, or leaves anything in, the user's cache.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

import jax  # noqa: E402 - reads the environment

jax.config.update("jax_numpy_rank_promotion", "raise")

# The files that take longest, first: with several workers a long one that comes last runs while the others are idle.
LONGEST = [
    "docs", "training_faults", "parallel_distributed", "train", "training_step", "notebook", "finetune",
    "evaluation_perplexity", "options", "model_backend", "training_guard", "inference_decode", "tuning_running",
    "model_huggingface", "model_cpu", "training_trials", "tpu_scripts", "serving_page", "evaluation_harness", "drill",
    "serving_faults", "training_loop", "serving_fuzz", "sample", "serving_limits", "replay", "sweep",
]  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
