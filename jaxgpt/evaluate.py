"""How good is a model? `python -m jaxgpt.evaluate --checkpoint runs/quickstart --text a.txt --task piqa=piqa.jsonl`.

--text: loss, perplexity and bits per byte of each file; windows overlap, so that every token has context, and the
stride is part of the number. --task NAME=FILE: questions with given answers, without examples before them, in the
benchmark's own JSONL format (lambada, hellaswag, piqa, winogrande, arc, openbookqa, blimp, cbt) or one's own
("choices": {"context": "...", "choices": ["...", "..."], "answer": 0}), and wikitext=wiki.test.raw. NAME alone or
NAME=tfds:DATASET takes them from TFDS. --harness: any task of lm-evaluation-harness. --generate: is what the model
writes varied, and does it end? With none of these, the validation split of the run. docs/evaluation.md tells what
each number is.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.errors import UserError

NEW_TOKENS = 100
OF_THE_RUN = Path()  # --generate without a FILE


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    _check(arguments)
    contents = [(str(file), _read(file)) for file in arguments.text]
    found = evaluate(arguments, contents, _read_tasks(arguments), _read_prompts(arguments.generate))
    from jaxgpt.evaluation.result_table import report

    print(report(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _record(arguments.checkpoint, found)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("evaluate", __doc__)
    parser.add_argument(
        "--checkpoint", metavar="WHERE", required=True, help="run, RUN@best, step, Hugging Face folder, hf:NAME"
    )
    parser.add_argument("--text", metavar="FILE", nargs="+", type=Path, default=[], help="UTF-8 files, one text each")
    parser.add_argument("--task", metavar="NAME[=FILE]", nargs="+", default=[], help="questions with given answers")
    parser.add_argument("--tfds-data-dir", metavar="DIR", type=Path, help="where TFDS's datasets lie [TFDS's own]")
    parser.add_argument("--harness", metavar="NAME", nargs="+", default=[], help="tasks of lm-evaluation-harness")
    parser.add_argument("--harness-include", metavar="DIR", type=Path, help="more tasks for --harness, as YAML files")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N questions of each task")
    parser.add_argument("--data", metavar="DIR", type=Path, help="the run's prepared data, where it has been moved")
    parser.add_argument(
        "--stride", metavar="N", type=int, help="tokens that a window moves on by [half of the model's block]"
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="rows on each device [%(default)s]")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="compute type [the model's]")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there, too")
    writing = parser.add_argument_group("what the model writes")
    writing.add_argument(
        "--generate", metavar="FILE", nargs="?", type=Path, const=OF_THE_RUN,
        help="check what it writes after the prompts of FILE, one a line [after validation texts of the run]",
    )  # fmt: skip
    writing.add_argument("--max-new-tokens", metavar="N", type=int, help=f"[{NEW_TOKENS}, at most half of the block]")
    writing.add_argument("--temperature", metavar="T", type=float, default=1.0, help="0: the likeliest [%(default)s]")
    writing.add_argument("--seed", metavar="N", type=int, default=0, help="draws the same texts again [%(default)s]")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: at least one window at a time")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: at least one question")
    if arguments.harness_include is not None and not arguments.harness:
        raise UserError("--harness-include: name the tasks with --harness NAME ...")
    if arguments.harness:
        from jaxgpt.evaluation.harness import check_installed

        check_installed()


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


def _read_tasks(arguments: argparse.Namespace) -> list:
    if not arguments.task:
        return []
    from jaxgpt.evaluation.task_catalog import read_tasks

    return read_tasks(arguments.task, arguments.tfds_data_dir, arguments.limit)


def _read_prompts(file: Path | None) -> list[str] | None:
    """The prompts of a file; [] for those of the run's validation texts, None where nothing is to be written."""
    if file is None:
        return None
    if file == OF_THE_RUN:
        return []
    from jaxgpt.inference.prompts import read_prompts

    if not file.is_file():
        raise UserError(f"--generate {file}: no such file")
    return [prompt.text for prompt in read_prompts(file)]


def evaluate(
    arguments: argparse.Namespace,
    contents: Sequence[tuple[str, str]],
    tasks: Sequence = (),
    prompts: Sequence[str] | None = None,
) -> dict:
    """Figures of each text, of all together, of each task, of what the model writes, and how they were made, ready
    for JSON.

    Raises:
        UserError: there is nothing to score, or the stride does not fit the model.
    """
    import jax

    from jaxgpt.config import with_settings
    from jaxgpt.evaluation.published import with_published
    from jaxgpt.model.sizes import parameter_count
    from jaxgpt.parallel.compiler import use_compilation_cache
    from jaxgpt.parallel.mesh import build_mesh
    from jaxgpt.settings import MeshConfig
    from jaxgpt.training.models import load_model

    model = load_model(arguments.checkpoint)
    config = with_settings(model.config, model_dtype=arguments.dtype or model.config.model.dtype)
    stride = arguments.stride if arguments.stride is not None else max(config.block_size // 2, 1)
    if not 1 <= stride <= config.block_size:
        raise UserError(f"--stride {stride}: a window has {config.block_size} tokens, so 1 to {config.block_size}")
    use_compilation_cache(config.train.compilation_cache_dir)
    mesh = build_mesh(MeshConfig())
    # What can be refused comes before what takes long.
    asked = _prompts(arguments, prompts, model) if prompts is not None else None
    whole = not (tasks or arguments.harness or asked)
    texts = _scores(arguments, contents, model, config, mesh, stride) if contents or whole else []
    return {
        "checkpoint": str(arguments.checkpoint),
        "step": model.step,
        "parameters": parameter_count(config.model, model.vocab_size),
        "dtype": config.model.dtype,
        "window": config.block_size,
        "stride": stride,
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "texts": texts,
        "tasks": [
            with_published(result)
            for result in [
                *_answers(tasks, config, model, mesh, arguments.batch_size),
                *_harness(arguments, config, model, mesh),
            ]
        ],
        "generation": _generation(asked, config, model) if asked else None,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# ---------------------------------------------------------------- texts


def _scores(arguments, contents, model, config, mesh, stride: int) -> list[dict]:
    import jax
    from tqdm import tqdm

    from jaxgpt.evaluation.perplexity import Score, score
    from jaxgpt.parallel.mesh import batch_shards
    from jaxgpt.parallel.sharding import rows_sharding
    from jaxgpt.training.step import build_eval_step

    parts = _parts(arguments, contents, model, config.block_size, stride, arguments.batch_size * batch_shards(mesh))
    eval_step, shardings = build_eval_step(config, model.vocab_size, mesh)
    params = jax.device_put(model.params, shardings)
    losses, scores = lambda batch: eval_step(params, batch), {}
    for name, batches, count, num_bytes in parts:
        with tqdm(total=count, desc=name, unit="batch", disable=None, leave=False) as bar:
            scores[name] = score(losses, batches, rows_sharding(mesh), num_bytes, bar.update)
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


def _parts(arguments, contents, model, block_size: int, stride: int, rows: int) -> list:
    """[(name, batches, how many, UTF-8 bytes)] of what is to be scored."""
    from jaxgpt.evaluation.perplexity import Text, text_batches, text_of, windows
    from jaxgpt.evaluation.result_table import ANSWERS

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
    from jaxgpt.training.models import is_huggingface
    from jaxgpt.training.resume import dataset_read_by

    if is_huggingface(arguments.checkpoint):
        raise UserError(
            f"{arguments.checkpoint} has no validation data of its own; name texts with --text FILE ..., or prompts "
            "with --generate FILE"
        )
    return dataset_read_by(*find_step(Path(arguments.checkpoint)), arguments.data)


# ---------------------------------------------------------------- tasks


def _answers(tasks: Sequence, config, model, mesh, rows_per_device: int) -> list[dict]:
    if not tasks:
        return []
    import jax
    from tqdm import tqdm

    from jaxgpt.evaluation.scoring import Scorer

    scorer = Scorer(config, model.vocab_size, mesh, rows_per_device)
    params = jax.device_put(model.params, scorer.param_shardings)
    found = []
    for task in tasks:
        requests = task.requests(model.tokenizer, config.block_size)
        with tqdm(total=len(requests), desc=task.name, unit="choice", disable=None, leave=False) as bar:
            found.append(task.results(scorer(params, requests, bar.update)))
    return found


def _harness(arguments, config, model, mesh) -> list[dict]:
    if not arguments.harness:
        return []
    from jaxgpt.evaluation import harness

    include, rows = arguments.harness_include, arguments.batch_size
    return harness.run(arguments.harness, include, model, config, mesh, rows, arguments.limit)


# ---------------------------------------------------------------- what the model writes


def _prompts(arguments, texts: Sequence[str], model):
    """(prompts, how they are continued)."""
    from jaxgpt.evaluation.text_statistics import validation_prompts, written_prompts
    from jaxgpt.inference.sampling import SamplingOptions

    positions = model.config.model.n_positions
    new = arguments.max_new_tokens if arguments.max_new_tokens is not None else min(NEW_TOKENS, max(positions // 2, 1))
    # Nothing is left out by rank or probability: the figures are those of the model's own distribution.
    options = SamplingOptions(
        max_new_tokens=new, temperature=arguments.temperature, top_k=0, top_p=1.0, seed=arguments.seed
    )
    if texts:
        origin, system = f"the prompts of {arguments.generate}", model.config.chat.system
        return written_prompts(texts, origin, model.tokenizer, positions, options, system), options
    return validation_prompts(_dataset(arguments), model.tokenizer, positions, new), options


def _generation(asked: tuple, config, model) -> dict:
    from tqdm import tqdm

    from jaxgpt.evaluation.text_statistics import TOGETHER, check
    from jaxgpt.inference.decode import build_decoder

    prompts, options = asked
    rows = min(len(prompts.tokens), TOGETHER)
    decoder = build_decoder(config.model, model.vocab_size, model.params, model.tokenizer.end_of_text, rows=rows)
    with tqdm(total=len(prompts.tokens), desc="writing", unit="text", disable=None, leave=False) as bar:
        return check(decoder, prompts, model.tokenizer.end_of_turn, options, bar.update)


# ---------------------------------------------------------------- the run's record


def _record(checkpoint: str, found: dict) -> None:
    """Add the figures to the run that they are of, for its report and for `compare`."""
    from jaxgpt.reporting.run_files import EVALUATIONS
    from jaxgpt.reporting.run_page import write_report
    from jaxgpt.training.checkpoint import find_step
    from jaxgpt.training.models import is_huggingface

    if is_huggingface(checkpoint):
        return
    run, _ = find_step(Path(checkpoint))
    try:
        with open(run / EVALUATIONS, "a", encoding="utf-8") as file:
            file.write(json.dumps(found, ensure_ascii=False) + "\n")
        if (run / "metrics.jsonl").exists():
            write_report(run)
    except OSError as error:  # someone else's run, or a disk that is full: the figures are printed
        print(f"warning: {error.filename or run}: {error.strerror}; the run keeps no record of this", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
