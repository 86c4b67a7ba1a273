"""summary.json of a run, and the page made from it."""

import json
import platform
from importlib.metadata import version

from jaxgpt import __version__
from jaxgpt.model.sizes import parameter_count
from jaxgpt.reporting import run_page
from jaxgpt.storage.files import write_file
from jaxgpt.training.run_state import Run


def write_report(run: Run, status: str, seconds: float) -> None:
    """summary.json and run_page.html: what ran, on what, and how it ended."""
    config, dataset, devices = run.config, run.dataset, run.mesh.devices.flatten()
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")
    summary = {
        "status": status,
        "seconds": round(seconds, 1),
        "parameters": parameter_count(config.model, dataset.vocab_size),
        "tokens_per_step": config.train.global_batch_size * config.block_size,
        "device": devices[0].device_kind,
        "devices": int(devices.size),
        "mesh": dict(run.mesh.shape),
        "data": {
            "path": str(dataset.path),
            "fingerprint": dataset.fingerprint,
            "training_tokens": dataset.train.num_tokens,
            "validation_tokens": dataset.validation.num_tokens,
            **dataset.train.facts(),
            "vocabulary": dataset.vocab_size,
        },
        "versions": {
            "jaxgpt": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }
    write_file(run.workdir / "summary.json", json.dumps(summary, indent=2))
    if (run.workdir / "metrics.jsonl").exists():  # a run that failed in its first step has none
        run_page.write_report(run.workdir)
