"""How fast data is prepared and read: `python benchmarks/prepare.py` (about ten minutes on two cores).

1. `prepare` without cleaning, from a JSONL file to the finished dataset, beside Hugging Face's
   `datasets.map(batched=True, num_proc=2)` with the same tokenizer, from its own Arrow file to another: once as its
   documentation shows it, with transformers' fast tokenizer ("huggingface"), once calling the `tokenizers` library
   itself ("bare"). `prepare` does more in its time: it reads the JSON, splits, and writes shards with their digests.
2. What each step of the cleaning costs, in one process.
3. Tokens a second that the training pipeline delivers from one process at T = 1024.

The text is the standard library's own, repeated with variations, so that no two documents are alike. Both sides run in
turns, each in a process of its own; the figures are medians. Needs: pip install -e '.[clean]' datasets
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jaxgpt.config import Config, load_config
from jaxgpt.settings import CleaningConfig

PROCESSES = 2
BLOCK_SIZE = 1024
# Every step, switched on by itself.
STEPS = {
    "html": {"html": True},
    "fix_encoding": {"fix_encoding": True},
    "unicode": {"unicode": "NFC"},
    "control_characters": {"control_characters": True},
    "emoji": {"emoji": "strip"},
    "urls": {"urls": "mask"},
    "emails": {"emails": "mask"},
    "whitespace": {"whitespace": True},
    "max_symbol_ratio": {"max_symbol_ratio": 0.5},
    "language": {"language": "en"},
    "drop_duplicates": {"drop_duplicates": True},
    "near_duplicates": {"near_duplicates": 0.8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        side, folder = arguments.one
        print(json.dumps(SIDES[side](Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        texts = write_texts(folder, arguments.megabytes * 1_000_000, arguments.vocab_size)
        print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
        print(f"{len(texts):,} documents, {(folder / 'texts.jsonl').stat().st_size / 1e6:.0f} MB, ", end="")
        print(f"vocabulary {arguments.vocab_size:,}, {arguments.rounds} rounds")
        side_by_side(folder, arguments.rounds)
        cost_of_cleaning(texts[:2000])
        reading_speed(folder)


# ---------------------------------------------------------------- 1. beside datasets.map


def write_texts(folder: Path, size: int, vocab_size: int) -> list[str]:
    """`folder`/texts.jsonl of about `size` bytes, and `folder`/tokenizer; returns the texts."""
    from jaxgpt.data.tokenizer import spread, train_bpe
    from jaxgpt.preparation.sources import documents
    from jaxgpt.settings import DataConfig

    pages = [page for document in documents(DataConfig()) for page in pieces(document.text)]
    texts, written = [], 0
    while written < size:
        number = len(texts)
        text = pages[number % len(pages)]
        texts.append(text.replace("self", f"self_{number // len(pages)}") + f"\n# {number}\n")
        written += len(texts[-1].encode())
    with open(folder / "texts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    train_bpe(spread(pages, 10_000_000, 32_768), vocab_size).save(folder / "tokenizer")
    return texts


def pieces(text: str, size: int = 4000) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def side_by_side(folder: Path, rounds: int) -> None:
    found = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, results in found.items():
            command = [sys.executable, __file__, "--one", side, str(folder)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(run.stdout.splitlines()[-1]))
    speeds = {}
    for side, results in found.items():
        speeds[side] = statistics.median(result["tokens"] / result["seconds"] for result in results)
        print(f"{side:<12} {speeds[side] / 1e6:.3f} M tokens/s, seconds: ", end="")
        print(", ".join(f"{result['seconds']:.1f}" for result in results), results[-1]["told"])
    tokenizing = statistics.median(result["tokens"] / result["told"]["tokenize"] for result in found["jaxgpt"])
    for side in ("huggingface", "bare"):
        ratio, alone = speeds["jaxgpt"] / speeds[side], tokenizing / speeds[side]
        print(f"jaxgpt over {side}: {ratio:.2f} x; its tokenizing alone {alone:.2f} x")


def settings(folder: Path, prepared_dir: Path) -> Config:
    values = {
        "data.source": "jsonl",
        "data.path": folder / "texts.jsonl",
        "data.prepared_dir": prepared_dir,
        "data.num_proc": PROCESSES,
        "tokenizer.type": "folder",
        "tokenizer.path": folder / "tokenizer",
    }
    return load_config(None, {name: str(value) for name, value in values.items()})


def ours(folder: Path) -> dict:
    import tensorflow_datasets  # noqa: F401  (not part of what is compared)

    from jaxgpt.preparation import preparation_report
    from jaxgpt.preparation.make_dataset import prepare

    with tempfile.TemporaryDirectory(dir=folder) as prepared_dir:
        config = settings(folder, Path(prepared_dir))
        started = time.perf_counter()
        path = prepare(config)
        seconds = time.perf_counter() - started
        report = preparation_report.read(path)
    counts = report["splits"].values()
    tokens = sum(split["num_tokens"] - split["num_documents"] for split in counts)  # without end-of-text
    return {"tokens": tokens, "seconds": seconds, "told": report["seconds"]}


def documented(folder: Path) -> dict:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return theirs(folder, lambda batch: tokenizer(batch["text"], add_special_tokens=False))


def bare(folder: Path) -> dict:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))

    def tokenize(batch: dict) -> dict:
        encodings = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [encoding.ids for encoding in encodings]}

    return theirs(folder, tokenize)


def theirs(folder: Path, tokenize: Callable[[dict], dict]) -> dict:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as datasets does in its processes
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began = time.perf_counter()
        dataset = datasets.load_dataset("json", data_files=str(folder / "texts.jsonl"), split="train", cache_dir=cache)
        started = time.perf_counter()
        mapped = dataset.map(tokenize, batched=True, num_proc=PROCESSES, remove_columns=["text"])
        seconds = time.perf_counter() - started
        tokens = sum(len(ids) for batch in mapped.iter(1000) for ids in batch["input_ids"])
    return {"tokens": tokens, "seconds": seconds, "told": {"load_dataset": round(started - began, 3)}}


SIDES = {"jaxgpt": ours, "huggingface": documented, "bare": bare}


# ---------------------------------------------------------------- 2. cleaning


def cost_of_cleaning(texts: list[str]) -> None:
    from jaxgpt.preparation import duplicates
    from jaxgpt.preparation.cleaning import Cleaner

    size = sum(len(text.encode()) for text in texts)
    for name, values in STEPS.items():
        config = CleaningConfig(**values)
        sign = functools.partial(duplicates.signature, settings=config)
        step = sign if duplicates.is_on(config) else Cleaner(config)
        step(texts[0])  # loads what it needs
        started = time.perf_counter()
        for text in texts:
            step(text)
        seconds = time.perf_counter() - started
        print(f"{name:<20} {1e3 * seconds / (size / 1e6):7.1f} ms a MB ({size / 1e6 / seconds:.1f} MB/s)")


# ---------------------------------------------------------------- 3. reading


def reading_speed(folder: Path) -> None:
    import jax

    from jaxgpt.data.dataset import open_dataset
    from jaxgpt.data.pipeline import train_batches
    from jaxgpt.preparation.make_dataset import prepare
    from jaxgpt.preparation.preparation_report import read_speed

    with tempfile.TemporaryDirectory(dir=folder) as prepared_dir:
        train = open_dataset(prepare(settings(folder, Path(prepared_dir)))).train
        print(f"rows read by one thread: {read_speed(train, BLOCK_SIZE, 3.0) / 1e6:.2f} M tokens/s")
        rows, steps = 64, 400
        place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        batches = train_batches(
            train,
            seed=0,
            start_step=0,
            stop_step=steps,
            global_batch_size=rows,
            accumulation=1,
            block_size=BLOCK_SIZE,
            sharding=place,
        )
        jax.block_until_ready(next(batches))
        started = time.perf_counter()
        for batch in batches:
            jax.block_until_ready(batch)
        seconds = time.perf_counter() - started
        speed = (steps - 1) * rows * BLOCK_SIZE / seconds
        print(f"batches on the device, by the pipeline of the training: {speed / 1e6:.2f} M tokens/s")


if __name__ == "__main__":
    main()
