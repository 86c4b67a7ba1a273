"""The model that is served: its name, its tokenizer, what it can do, and its engine once that is compiled."""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.inference.decoder import build_decoder
from jaxgpt.inference.engine import Engine
from jaxgpt.inference.prompts import ChatPrompts, token_bytes
from jaxgpt.model.sizes import parameter_count
from jaxgpt.parallel.compiler import use_compilation_cache
from jaxgpt.preparation.skills import LANGUAGES, held_out, skill_names, weights
from jaxgpt.serving.schemas import ApiError, bad_request, not_ready
from jaxgpt.settings import sources_of
from jaxgpt.storage.files import read_json_lines
from jaxgpt.training.checkpoint import EVALUATIONS, FOLDER, find_step, read_config
from jaxgpt.training.models import is_huggingface, load_model

STUCK_SECONDS = 120.0  # without one chunk, while requests are under way: longer than any chunk takes
EXAMPLES = 6  # questions of each language that the page shows
RIGHT = 0.8  # share of the held-out questions of a skill that a model answers rightly which has it
_LANGUAGES = dict(zip(LANGUAGES, ("en", "zh"), strict=True))  # as the page has them


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The flags of `jaxgpt serve`, whose --help explains them."""

    checkpoint: str
    weights: str | None
    host: str
    port: int
    name: str | None
    system: str | None
    slots: int
    queue: int
    chunk: int
    request_seconds: float
    drain_seconds: float
    api_key_file: Path | None
    open: Sequence[str]
    cors_origin: Sequence[str]


@dataclasses.dataclass
class ServedModel:
    """One model and the state of its engine; every request looks here first."""

    name: str
    tokenizer: Tokenizer
    n_positions: int
    parameters: int
    step: int
    system: str = ""
    """The system message of conversations that have none."""
    engine: Engine | None = None
    stopping: bool = False
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Questions to begin a chat with, by the language of the page."""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _names: dict[int, str] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def state(self) -> str:
        """ "loading", "ready", "stopping" or "failed"."""
        if self.engine is not None and self.engine.failure is not None:
            return "failed"
        if self.stopping:
            return "stopping"
        return "loading" if self.engine is None else "ready"

    @property
    def is_healthy(self) -> bool:
        """Whether the engine has neither failed nor got stuck: a server that loads or stops is healthy."""
        if self.engine is None:
            return True
        is_stuck = self.engine.running and time.monotonic() - self.engine.moved_at > STUCK_SECONDS
        return self.engine.failure is None and not is_stuck

    def ready_engine(self) -> Engine:
        """The engine; ApiError 503 in any state but "ready"."""
        if self.engine is None or self.state != "ready":
            raise not_ready(self.state)
        return self.engine

    def chat_prompts(self) -> ChatPrompts:
        """The function from conversations to prompts; ApiError 400 if the model has no chat template."""
        try:
            return ChatPrompts(self.tokenizer, self.n_positions, self.name)
        except UserError as error:
            raise bad_request(str(error), "messages", "no_chat_template") from None

    def check_name(self, name: str | None) -> None:
        """Refuse a request for another model with ApiError 404."""
        if name is not None and name != self.name:
            message = f"there is no model {name[:100]!r}; this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def card(self) -> dict:
        """The model's entry of /v1/models."""
        is_chat = self.tokenizer.end_of_turn is not None
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "jaxgpt",
            "max_model_len": self.n_positions,
            "has_chat_template": is_chat,
            "system": self.system if is_chat else "",
            "examples": self.examples if is_chat else {},
            "parameters": self.parameters,
            "step": self.step,
        }

    def token_name(self, token: int) -> str:
        r"""A token's text, or a name like `bytes:\xe4\xbd` for a token that is a part of a character."""
        if token not in self._names:
            written = token_bytes(self.tokenizer, token)
            try:
                self._names[token] = written.decode()
            except UnicodeDecodeError:
                self._names[token] = "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)
        return self._names[token]


def example_questions(checkpoint: str) -> dict[str, list[str]]:
    """{"en": [...], "zh": [...]}: a held-out question of each of some skills that the model of a checkpoint has.

    It has those that `evaluate --skills` found, or all that it was trained on where that was not asked; {} without
    either. The hf/ of a run has those of the run.
    """
    if not is_huggingface(checkpoint):
        run, _ = find_step(Path(checkpoint))
    else:
        run = Path(checkpoint).absolute().parent
        if Path(checkpoint).name != "hf" or not (run / FOLDER).is_dir():
            return {}
    evaluated = [found["skills"] for found in read_json_lines(run / EVALUATIONS) if found.get("skills")]
    if evaluated:
        rows = evaluated[-1]["rows"]
        has = {(row["skill"], row["language"]) for row in rows if row["right"] >= RIGHT * row["questions"]}
    else:
        data = read_config(run).data
        if "skills" not in [part.source for part in sources_of(data)]:
            return {}
        often = weights(data.skills)
        has = {(skill, one) for skill in skill_names() for one in LANGUAGES if often[skill] and often[one]}
    found = {}
    for language, short in _LANGUAGES.items():
        skills = [skill for skill in skill_names() if (skill, language) in has]
        chosen = [skills[n * len(skills) // EXAMPLES] for n in range(EXAMPLES)] if len(skills) > EXAMPLES else skills
        found[short] = [_question(skill, language) for skill in chosen]
    return found


def _question(skill: str, language: str) -> str:
    """A short held-out question that begins a conversation, one that is not typed in haste if there is any."""
    asked = [turns[0].question for turns in held_out(skill, language, 10) if len(turns) == 1]
    return min(asked, key=lambda text: (text[-1] not in ".?!。？！", len(text)))


def load(options: ServeOptions) -> tuple[ServedModel, Callable[[], Engine]]:
    """(the model of a checkpoint, a function that compiles its engine; to be called once)."""
    loaded = load_model(options.checkpoint)
    use_compilation_cache()
    config, vocab_size, tokenizer = loaded.config.model, loaded.vocab_size, loaded.tokenizer
    count = parameter_count(config, vocab_size)
    name = options.name or options.checkpoint.removeprefix("hf:").rstrip("/").split("/")[-1]
    system = loaded.config.chat.system if options.system is None else options.system
    examples: dict[str, list[str]] = {}
    try:
        examples = example_questions(options.checkpoint) if tokenizer.end_of_turn is not None else {}
    except UserError as error:  # of the run around hf/
        print(f"warning: no questions to try: {error}", file=sys.stderr)
    model = ServedModel(name, tokenizer, config.n_positions, count, loaded.step, system, examples=examples)
    step = f", step {loaded.step:,}" if loaded.step else ""
    kind = options.weights or config.dtype
    print(f"{options.checkpoint}{step}, {count / 1e6:.1f}M parameters, {kind}", file=sys.stderr)
    params = [loaded.params]
    del loaded

    def build() -> Engine:
        # The parameters are not kept: the decoder has them in a layout of its own.
        weights, slots = options.weights, options.slots
        # A folder's own chat template is tried here: in the first request it would hold up all others.
        end, ends = tokenizer.end_of_text, [end for end in (tokenizer.end_of_turn, *tokenizer.ends) if end is not None]
        decoder = build_decoder(config, vocab_size, params.pop(), end, weights, slots, ends)
        return Engine(decoder, slots, options.chunk, options.queue)

    return model, build
