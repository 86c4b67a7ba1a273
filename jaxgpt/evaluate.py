"""How good is a model? `python -m jaxgpt.evaluate --checkpoint runs/quickstart --text a.txt --task piqa=piqa.jsonl`.

--text: loss, perplexity and bits per byte of each file; windows overlap, so that every token has context, and the
stride is part of the number. --task NAME=FILE: questions with given answers, without examples before them, in the
benchmark's own JSONL format (lambada, hellaswag, piqa, winogrande, arc, openbookqa, blimp, cbt) or one's own
("choices": {"context": "...", "choices": ["...", "..."], "answer": 0}). With neither, the validation split of the run.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.config import UserError

ANSWERS = "validation answers"


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("evaluate", __doc__)
    parser.add_argument("--checkpoint", metavar="WHERE", required=True, help="run, step, Hugging Face folder, hf:NAME")
    parser.add_argument("--text", metavar="FILE", nargs="+", type=Path, default=[], help="UTF-8 files, one text each")
    parser.add_argument("--task", metavar="NAME=FILE", nargs="+", default=[], help="questions with given answers")
    parser.add_argument("--data", metavar="DIR", type=Path, help="the run's prepared data, where it has been moved")
    parser.add_argument(
        "--stride", metavar="N", type=int, help="tokens that a window moves on by [half of the model's block]"
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="rows on each device [%(default)s]")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="compute type [the model's]")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there, too")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: at least one window at a time")
    contents = [(str(file), _read(file)) for file in arguments.text]
    found = evaluate(arguments, contents, _read_tasks(arguments.task))
    print(report(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_tasks(words: Sequence[str]) -> list:
    """The tasks, before anything is loaded."""
    if not words:
        return []
    from jaxgpt.evaluation.tasks import read_task

    for word in words:
        if "=" not in word:
            raise UserError(f"--task {word}: write the task and its file as NAME=FILE")
    return [read_task(name, Path(file)) for name, _, file in (word.partition("=") for word in words)]


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--text {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--text {file}: not UTF-8 at byte {error.start}; convert it") from None
    if not text:
        raise UserError(f"--text {file}: empty, so there is nothing to score")
    return text


def evaluate(arguments: argparse.Namespace, contents: Sequence[tuple[str, str]], tasks: Sequence = ()) -> dict:
    """Figures of each text, of all together, of each task, and how they were made, ready for JSON.

    Raises:
        UserError: there is nothing to score, or the stride does not fit the model.
    """
    import jax

    from jaxgpt.config import MeshConfig
    from jaxgpt.parallel.compiler import use_compilation_cache
    from jaxgpt.parallel.mesh import batch_shards, build_mesh
    from jaxgpt.parallel.sharding import rows_sharding
    from jaxgpt.planning.memory import with_settings
    from jaxgpt.training.step import build_eval_step
    from jaxgpt.training.weights import load_model

    model = load_model(arguments.checkpoint)
    config = with_settings(model.config, model_dtype=arguments.dtype or model.config.model.dtype)
    block_size = config.block_size
    stride = arguments.stride if arguments.stride is not None else max(block_size // 2, 1)
    if not 1 <= stride <= block_size:
        raise UserError(f"--stride {stride}: a window has {block_size} tokens, so 1 to {block_size}")
    use_compilation_cache(config.train.compilation_cache_dir)
    mesh = build_mesh(MeshConfig())
    rows = arguments.batch_size * batch_shards(mesh)
    scores = []
    if contents or not tasks:
        parts = _parts(arguments, contents, model, block_size, stride, rows)
        eval_step, shardings = build_eval_step(config, model.vocab_size, mesh)
        params = jax.device_put(model.params, shardings)
        scores = _scores(parts, lambda batch: eval_step(params, batch), rows_sharding(mesh))
    return {
        "checkpoint": str(arguments.checkpoint),
        "step": model.step,
        "dtype": config.model.dtype,
        "window": block_size,
        "stride": stride,
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "texts": scores,
        "tasks": _answers(tasks, config, model, mesh, arguments.batch_size),
    }


def _parts(arguments, contents, model, block_size: int, stride: int, rows: int) -> list:
    """[(name, batches, how many, UTF-8 bytes)] of what is to be scored."""
    from jaxgpt.evaluation.perplexity import Text, text_batches, text_of, windows

    def part(name: str, text: Text):
        count = -(-sum(1 for _ in windows(text.num_tokens, block_size, stride)) // rows)
        return name, text_batches([text], block_size, stride, rows), count, text.num_bytes

    if contents:
        encoded = [(name, model.tokenizer.encode(content), len(content.encode())) for name, content in contents]
        return [part(name, text_of(tokens, size, model.tokenizer.end_of_text)) for name, tokens, size in encoded]
    dataset = _dataset(arguments)
    validation = dataset.validation
    if dataset.format == "text":
        return [part("validation", Text(validation.read, validation.num_tokens, validation.num_bytes))]
    if arguments.stride is not None:
        raise UserError("--stride: conversations are scored whole, each by itself; leave it out")
    count = -(-validation.rows_to_evaluate(block_size) // rows)
    numbers = (range(batch * rows, (batch + 1) * rows) for batch in range(count))
    batches = (validation.evaluation_rows(list(batch), block_size) for batch in numbers)
    return [(ANSWERS, batches, count, validation.num_bytes)]


def _dataset(arguments):
    """The data that the run has read."""
    from jaxgpt.training.checkpoint import find_step
    from jaxgpt.training.resume import dataset_read_by
    from jaxgpt.training.weights import is_huggingface

    if is_huggingface(arguments.checkpoint):
        raise UserError(f"{arguments.checkpoint} has no validation data of its own; name texts with --text FILE ...")
    return dataset_read_by(*find_step(Path(arguments.checkpoint)), arguments.data)


def _scores(parts: list, losses, sharding) -> list[dict]:
    from tqdm import tqdm

    from jaxgpt.evaluation.perplexity import Score, score

    scores = {}
    for name, batches, count, num_bytes in parts:
        with tqdm(total=count, desc=name, unit="batch", disable=None, leave=False) as bar:
            scores[name] = score(losses, batches, sharding, num_bytes, bar.update)
    if len(scores) > 1:
        sums = zip(*((each.loss_sum, each.count, each.num_bytes) for each in scores.values()))
        scores["all"] = Score(*map(sum, sums))
    return [
        {
            "name": name,
            "tokens": each.count,
            "bytes": each.num_bytes,
            "loss": each.loss,
            "perplexity": each.perplexity,
            "bits_per_byte": each.bits_per_byte,
        }
        for name, each in scores.items()
    ]


def _answers(tasks: Sequence, config, model, mesh, rows_per_device: int) -> list[dict]:
    if not tasks:
        return []
    from tqdm import tqdm

    from jaxgpt.evaluation.scoring import Scorer, encode_pair
    from jaxgpt.evaluation.tasks import results

    scorer = Scorer(config, model.vocab_size, model.params, mesh, rows_per_device)
    found = []
    for task in tasks:
        requests = [encode_pair(model.tokenizer, *pair) for question in task.questions for pair in question.pairs]
        with tqdm(total=len(requests), desc=task.name, unit="choice", disable=None, leave=False) as bar:
            found.append(results(task, scorer(requests, bar.update)))
    return found


def report(found: dict) -> str:
    """The figures as tables."""
    step = f", step {found['step']:,}" if found["step"] else ""
    head = f"{found['checkpoint']}{step}, {found['dtype']} on {found['devices']}"
    parts = [head]
    if found["texts"]:
        parts.append(_texts_table(found))
    if found["tasks"]:
        parts.append(_tasks_table(found["tasks"]))
    return "\n".join(parts)


def _tasks_table(tasks: Sequence[dict]) -> str:
    lines = [f"{'task (no examples)':<20}  {'questions':>9}  {'metric':<10}  {'value':>8}  {'error':>7}"]
    for task in tasks:
        for metric in ("acc", "acc_norm", "perplexity"):
            if metric in task:
                error = task.get(f"{metric}_stderr")
                told = f"{error:>7.4f}" if error is not None else f"{'':>7}"
                value = f"{task[metric]:>8.4f}"
                lines.append(f"{task['task']:<20}  {task['questions']:>9,}  {metric:<10}  {value}  {told}".rstrip())
        if task["cut"]:
            lines.append(f"  {task['cut']:,} contexts were longer than the model reads and lost their beginning")
    return "\n".join(lines)


def _texts_table(found: dict) -> str:
    width = max(len("text"), *(len(each["name"]) for each in found["texts"]))
    how = f"windows of {found['window']:,} tokens that move on by {found['stride']:,}"
    if found["texts"][0]["name"] == ANSWERS:
        how = f"conversations of up to {found['window']:,} tokens, of which the answers are scored"
    lines = [
        how,
        f"{'text':<{width}}  {'tokens':>12}  {'bytes':>12}  {'loss':>8}  {'perplexity':>10}  {'bits/byte':>9}",
    ]
    for each in found["texts"]:
        lines.append(
            f"{each['name']:<{width}}  {each['tokens']:>12,}  {each['bytes']:>12,}  {each['loss']:>8.4f}  "
            f"{each['perplexity']:>10.2f}  {each['bits_per_byte']:>9.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
