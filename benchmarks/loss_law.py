"""The losses by which `speedrun` predicts: whole pretraining runs of several sizes and numbers of tokens.

    python -m jaxgpt.speedrun --minutes 10 --dry-run --workdir runs/law
    python benchmarks/loss_law.py runs/law              # an hour on two cores; a run that is done is not repeated

Takes the config of that speedrun (its tokenizer, batch and learning rate) with other sizes and steps and with enough
text for one epoch, and prints the runs as jaxgpt/tuning/measured_losses.toml has them.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from jaxgpt.config import load_config
from jaxgpt.training.metrics import read_metrics
from jaxgpt.tuning.scaling import without_embeddings

MILLIONS = {  # (layers, width): tokens
    (3, 96): (0.5, 1, 2, 4),
    (4, 128): (0.5, 1, 2),
    (4, 192): (0.25, 0.5, 1, 2),
    (5, 256): (0.25, 0.5, 1),
}
TEXT = 14_000_000  # bytes, 5 M tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a speedrun's, which has pretrain.toml")
    folder = parser.parse_args().folder
    for (layers, width), counts in MILLIONS.items():
        for millions in counts:
            steps, workdir = round(millions * 1e6 / 2048), folder / f"{layers}x{width}-{millions}"
            settings = {
                "model.n_layer": layers, "model.n_embd": width, "model.n_head": width // 32, "train.max_steps": steps,
                "train.global_batch_size": 8, "train.per_device_train_batch_size": 8, "data.max_bytes": TEXT,
                "eval.eval_steps": 100_000, "eval.eval_batches": "none", "eval.sample_tokens": 0,
                "checkpoint.save_steps": 100_000,
            }  # fmt: skip
            options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
            file = folder / "pretrain.toml"
            command = [sys.executable, "-m", "jaxgpt.train", "--config", str(file), "--workdir", str(workdir), *options]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            model = load_config(file, {name: value for name, value in settings.items() if "model" in name}).model
            loss = [record["eval_loss"] for record in read_metrics(workdir) if "eval_loss" in record][-1]
            count = without_embeddings(model)
            print(f"    {{ parameters = {count}, tokens = {steps * 2048}, loss = {loss:.4f} }},", flush=True)


if __name__ == "__main__":
    main()
