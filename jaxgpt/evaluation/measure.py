"""Everything that `jaxgpt evaluate` measures of one checkpoint."""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from jaxgpt.config import Config, with_settings
from jaxgpt.data.dataset import TokenDataset
from jaxgpt.errors import UserError
from jaxgpt.evaluation import harness, perplexity, skill_accuracy
from jaxgpt.evaluation.result_table import with_published
from jaxgpt.evaluation.scoring import RequestScorer
from jaxgpt.evaluation.tasks import Task, read_tasks
from jaxgpt.evaluation.text_statistics import TOGETHER, Prompts, check, validation_prompts, written_prompts
from jaxgpt.evaluation.wikitext import Pages, read_text
from jaxgpt.inference.decoder import build_decoder
from jaxgpt.inference.prompts import read_prompts
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.model.sizes import parameter_count
from jaxgpt.parallel.compiler import use_compilation_cache
from jaxgpt.parallel.mesh import batch_shards, build_mesh
from jaxgpt.settings import MeshConfig
from jaxgpt.training.checkpoint import find_step
from jaxgpt.training.models import LoadedModel, is_huggingface, load_model
from jaxgpt.training.resume import dataset_read_by

NEW_TOKENS = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The flags of `jaxgpt evaluate`, whose --help explains them."""

    checkpoint: str
    text: Sequence[Path] = ()
    task: Sequence[str] = ()
    tfds_data_dir: Path | None = None
    harness: Sequence[str] = ()
    harness_include: Path | None = None
    limit: int | None = None
    skills: bool = False
    data: Path | None = None
    stride: int | None = None
    batch_size: int = 8
    dtype: str | None = None
    generate: Path | None = None
    """A file of prompts; Path() for validation texts of the run, None to generate nothing."""
    max_new_tokens: int | None = None
    temperature: float = 1.0
    seed: int = 0


def measure(options: EvaluationOptions) -> dict[str, object]:
    """The figures of each text, of all together, of each task and of generated texts, and how they were made, for JSON.

    Raises:
        UserError: an option is wrong, a file cannot be read, or there is nothing to score; says which.
    """
    _check(options)
    contents = [(str(file), read_text(file, f"--text {file}")) for file in options.text]
    if empty := [name for name, content in contents if not content]:
        raise UserError(f"--text {empty[0]}: empty, so there is nothing to score")
    tasks = read_tasks(options.task, options.tfds_data_dir, options.limit)
    written = _read_prompts(options.generate)
    model = load_model(options.checkpoint)
    config = with_settings(model.config, model_dtype=options.dtype or model.config.model.dtype)
    stride = perplexity.default_stride(config.block_size) if options.stride is None else options.stride
    if not 1 <= stride <= config.block_size:
        raise UserError(f"--stride {stride}: a window has {config.block_size} tokens, so 1 to {config.block_size}")
    use_compilation_cache()
    mesh = build_mesh(MeshConfig())
    # What can be refused comes before what takes long.
    prompts = None if options.generate is None else _prompts(options, written, model)
    asked = None
    if options.skills:
        asked = skill_accuracy.skill_questions(model, options.checkpoint, options.limit)
    texts = []
    if contents or not (tasks or options.harness or prompts or asked):
        texts = _texts(options, contents, model, config.block_size, options.batch_size * batch_shards(mesh))
    losses = perplexity.score_texts(texts, config, model, mesh) if texts else {}
    results = _results(tasks, config, model, mesh, options.batch_size)
    if options.harness:
        include, rows = options.harness_include, options.batch_size
        results += harness.run(options.harness, include, model, config, mesh, rows, options.limit)
    return {
        "checkpoint": str(options.checkpoint),
        "step": model.step,
        "parameters": parameter_count(config.model, model.vocab_size),
        "dtype": config.model.dtype,
        "window": config.block_size,
        "stride": stride,
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "texts": [
            {
                "name": name,
                "tokens": each.count,
                "bytes": each.num_bytes,
                "loss": each.loss,
                "perplexity": each.perplexity,
                "bits_per_byte": each.bits_per_byte,
            }
            for name, each in losses.items()
        ],
        "tasks": [with_published(result) for result in results],
        "generation": _generation(*prompts, config, model) if prompts else None,
        "skills": skill_accuracy.answered(asked, config, model) if asked else None,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _check(options: EvaluationOptions) -> None:
    """Refuse what is wrong before anything is read."""
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: at least one window at a time")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: at least one question")
    if options.harness_include is not None and not options.harness:
        raise UserError("--harness-include: name the tasks with --harness NAME ...")
    if options.harness:
        harness.check_installed()


def _read_prompts(file: Path | None) -> list[str]:
    if file is None or file == Path():
        return []
    if not file.is_file():
        raise UserError(f"--generate {file}: no such file")
    return [prompt.text for prompt in read_prompts(file)]


def _texts(
    options: EvaluationOptions, contents: list[tuple[str, str]], model: LoadedModel, block_size: int, rows: int
) -> list[perplexity.TextBatches]:
    if not contents:
        return [perplexity.validation_batches(_dataset(options).validation, block_size, options.stride, rows)]
    encode, end_of_text = model.tokenizer.encode, model.tokenizer.end_of_text
    texts = [(name, perplexity.encoded_text(encode(text), len(text.encode()), end_of_text)) for name, text in contents]
    stride = options.stride or perplexity.default_stride(block_size)
    return [perplexity.text_batches(name, text, block_size, stride, rows) for name, text in texts]


def _dataset(options: EvaluationOptions) -> TokenDataset:
    """The data that the run has read."""
    if is_huggingface(options.checkpoint):
        raise UserError(
            f"{options.checkpoint} has no validation data of its own; name texts with --text FILE ..., or prompts "
            "with --generate FILE"
        )
    return dataset_read_by(*find_step(Path(options.checkpoint)), options.data)


def _results(
    tasks: Sequence[Task | Pages], config: Config, model: LoadedModel, mesh: Mesh, rows_per_device: int
) -> list[dict]:
    if not tasks:
        return []
    scorer = RequestScorer(config, model.vocab_size, mesh, rows_per_device)
    params = jax.device_put(model.params, scorer.param_shardings)
    results = []
    for task in tasks:
        requests = task.requests(model.tokenizer, config.block_size)
        with tqdm(total=len(requests), desc=task.name, unit="choice", disable=None, leave=False) as bar:
            results.append(task.results(scorer(params, requests, bar.update)))
    return results


def _prompts(options: EvaluationOptions, texts: list[str], model: LoadedModel) -> tuple[Prompts, SamplingOptions]:
    """The prompts, and how they are continued."""
    positions = model.config.model.n_positions
    new = min(NEW_TOKENS, max(positions // 2, 1)) if options.max_new_tokens is None else options.max_new_tokens
    # Nothing is left out by rank or probability: the figures are those of the model's own distribution.
    sampling = SamplingOptions(
        max_new_tokens=new, temperature=options.temperature, top_k=0, top_p=1.0, seed=options.seed
    )
    if texts:
        origin, system = f"the prompts of {options.generate}", model.config.chat.system
        return written_prompts(texts, origin, model.tokenizer, positions, sampling, system), sampling
    return validation_prompts(_dataset(options), model.tokenizer, positions, new), sampling


def _generation(prompts: Prompts, sampling: SamplingOptions, config: Config, model: LoadedModel) -> dict[str, object]:
    rows = min(len(prompts.tokens), TOGETHER)
    end, ends = model.tokenizer.end_of_text, model.tokenizer.ends
    decoder = build_decoder(config.model, model.vocab_size, model.params, end, rows=rows, ends=ends)
    with tqdm(total=len(prompts.tokens), desc="writing", unit="text", disable=None, leave=False) as bar:
        return check(decoder, prompts, model.tokenizer.end_of_turn, sampling, bar.update)
