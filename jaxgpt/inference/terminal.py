"""The command `sample`: prompts from flags, files, a pipe or a terminal; texts to stdout, everything else to stderr."""

import argparse
import contextlib
import dataclasses
import io
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NamedTuple

from jaxgpt.config import Config
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.inference.decoder import Decoder, build_decoder
from jaxgpt.inference.prompts import ChatPrompts, ChatSession, Prompt, check_unicode, read_prompts
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.inference.text import Completion, TextGeneration, complete, fit_prompt
from jaxgpt.model.sizes import parameter_count
from jaxgpt.parallel.compiler import use_compilation_cache

RULE = "-" * 80


class Loaded(NamedTuple):
    """A trained model, as `training.models.load_model` gives it."""

    config: Config
    vocab_size: int
    params: dict
    tokenizer: Tokenizer
    step: int


def sample(arguments: argparse.Namespace, load: Callable[[], Loaded]) -> None:
    """Carry out `jaxgpt sample` with its parsed flags; calls `load` once flags and prompt files are checked.

    Raises:
        UserError: a flag or a prompt cannot be used.
    """
    for stream in (sys.stdout, sys.stdin):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale, and bytes that are not UTF-8 get a message
            stream.reconfigure(encoding="utf-8", errors="surrogateescape" if stream is sys.stdin else None)
    prompts = _prompts(arguments)
    settings = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(SamplingOptions)}
    settings |= {name: tuple(settings[name]) for name in ("stop", "stop_token_ids")}
    options = SamplingOptions(**settings)

    model = load()
    use_compilation_cache(model.config.train.compilation_cache_dir)
    config, tokenizer, weights = model.config.model, model.tokenizer, arguments.weights
    step = f", step {model.step:,}" if model.step else ""
    millions = parameter_count(config, model.vocab_size) / 1e6
    print(f"{arguments.checkpoint}{step}, {millions:.1f}M parameters, {weights or config.dtype}", file=sys.stderr)
    rows = options.num_return_sequences * min(len(prompts) if prompts else 1, arguments.batch_size)
    end, ends = tokenizer.end_of_text, tokenizer.ends
    decoder = build_decoder(config, model.vocab_size, model.params, end, weights, rows, ends)
    system = model.config.chat.system if arguments.system is None else arguments.system
    del model  # the weights as they were loaded
    writer = (ChatWriter if arguments.chat else Writer)(decoder, tokenizer, options, arguments, system)
    if prompts is None:
        writer.converse()
    else:
        writer.write(prompts)
    writer.print_speed()


def _prompts(arguments: argparse.Namespace) -> list[Prompt] | None:
    """The prompts of the command line or of the file; None to ask for them. Refuses flags that do not go together."""
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size = {arguments.batch_size}, but it must be at least 1")
    for text in arguments.stop:
        check_unicode(text, "--stop")
    check_unicode(arguments.system or "", "--system")
    if arguments.system is not None and not arguments.chat:
        raise UserError("--system is for conversations; give --chat with it")
    if arguments.truncate and arguments.chat:
        raise UserError("--truncate: with --chat the oldest turns fall out by themselves; leave it out")
    if arguments.prompt_file is not None:
        return read_prompts(arguments.prompt_file)
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if arguments.interactive or (arguments.prompt is None and (is_terminal or arguments.chat)):
        if sys.stdin is None:
            raise UserError("--interactive: there is no standard input to read prompts from")
        if arguments.chat and arguments.num_return_sequences > 1:
            raise UserError("--num-return-sequences: a conversation goes on from one answer; give --prompt with it")
        if arguments.jsonl and not arguments.chat:
            raise UserError("--jsonl is for programs: give --prompt or --prompt-file with it")
        return None
    prompt = arguments.prompt or ""
    check_unicode(prompt, "--prompt")
    return [Prompt(prompt, "--prompt")]


@dataclasses.dataclass(eq=False)
class Writer:
    """Continues prompts and prints the texts."""

    _decoder: Decoder
    _tokenizer: Tokenizer
    _options: SamplingOptions
    _arguments: argparse.Namespace
    _system: str
    _is_first = True
    _tokens, _seconds = 0, 0.0
    repeats_prompt = True

    def write(self, prompts: Sequence[Prompt]) -> None:
        """Print the texts of all prompts, a batch at a time. Every prompt is checked before the first is continued."""
        ids = [self._encode(prompt) for prompt in prompts]
        is_alone = len(prompts) == self._options.num_return_sequences == 1
        if is_alone and sys.stdout.isatty() and not self._arguments.jsonl:
            self._show(prompts[0].text if self.repeats_prompt else "", ids[0])
            return
        size = self._arguments.batch_size
        for start in range(0, len(prompts), size):
            batch = self._complete(ids[start : start + size])
            for prompt, completions in zip(prompts[start : start + size], batch, strict=True):
                self._print(prompt.text, completions)

    def converse(self) -> None:
        """Ask for a prompt, show its continuation while it is made, and so on until Ctrl-D or /quit."""
        if sys.stdin.isatty():
            print("Type the beginning of a text. Ctrl-C stops the answer, Ctrl-D or /quit ends.", file=sys.stderr)
        for line in typed_lines():
            try:
                check_unicode(line, "the prompt")
                ids = self._encode(Prompt(line, "the prompt"))
            except UserError as error:  # the next one may be better
                print(f"error: {error}", file=sys.stderr)
                continue
            with ctrl_c() as asked_to_stop:
                self._show("", ids, asked_to_stop)

    def print_speed(self) -> None:
        if self._seconds:
            speed = f"{self._tokens / self._seconds:,.1f} tokens per second"
            print(f"{self._tokens:,} tokens in {self._seconds:.2f} s, {speed}, compilation included", file=sys.stderr)

    def _encode(self, prompt: Prompt) -> list[int]:
        try:
            ids = self._tokenizer.encode(prompt.text)
            kept = fit_prompt(ids, self._options, self._decoder.config.n_positions, self._arguments.truncate)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from None
        if len(kept) < len(ids):
            print(f"{prompt.where}: cut to the last {len(kept):,} of its {len(ids):,} tokens", file=sys.stderr)
        return kept

    def _complete(self, ids: list[list[int]]) -> list[list[Completion]]:
        began = time.perf_counter()
        batch = complete(self._decoder, self._tokenizer, ids, self._options)
        self._count(batch, began)
        return batch

    def _show(self, beginning: str, ids: list[int], asked_to_stop: threading.Event | None = None) -> list[Completion]:
        """Print `beginning` and the text as it grows; several continuations are printed when all are made."""
        began, is_alone = time.perf_counter(), self._options.num_return_sequences == 1
        generation = TextGeneration(self._decoder, self._tokenizer, [ids], self._options)
        print(beginning, end="", flush=True)
        for texts in generation:
            if is_alone:
                print(texts[0], end="", flush=True)
            if asked_to_stop is not None and asked_to_stop.is_set():
                break
        self._count(generation.completions, began)
        [completions] = generation.completions
        if is_alone:
            print()
            self._print_logprobs(completions[0])
        else:
            self._is_first = True
            self._print(beginning, completions)
        return completions

    def _count(self, batch: list[list[Completion]], began: float) -> None:
        self._seconds += time.perf_counter() - began
        self._tokens += sum(len(completion.tokens) for completions in batch for completion in completions)

    def _print(self, prompt: str, completions: list[Completion]) -> None:
        if self._arguments.jsonl:
            record = {
                "prompt": prompt,
                "texts": [completion.text for completion in completions],
                "finish_reasons": [completion.finish_reason for completion in completions],
                "tokens": [completion.tokens for completion in completions],
                "logprobs": [completion.logprobs for completion in completions],
            }
            print(json.dumps(record, ensure_ascii=False), flush=True)
            return
        for completion in completions:
            if not self._is_first:
                print(RULE)
            self._is_first = False
            print((prompt if self.repeats_prompt else "") + completion.text, flush=True)
            self._print_logprobs(completion)

    def _print_logprobs(self, completion: Completion) -> None:
        """Print a line a token: the natural logarithm of its probability, and its text."""
        if self._arguments.logprobs:
            for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
                print(f"{logprob:10.4f}  {self._tokenizer.decode([token])!r}")


@dataclasses.dataclass(eq=False)
class ChatWriter(Writer):
    """Answers messages and prints the answers."""

    repeats_prompt = False

    def __post_init__(self) -> None:
        self._prompts = ChatPrompts(self._tokenizer, self._decoder.config.n_positions, self._arguments.checkpoint)
        stop = (*self._options.stop_token_ids, self._prompts.end_of_turn)
        self._options = dataclasses.replace(self._options, stop_token_ids=stop)

    def converse(self) -> None:
        """Answer one line after another, each after all that was said, until the input ends or /quit."""
        if sys.stdin.isatty():
            print("Ctrl-C stops an answer; /reset forgets, /system TEXT instructs, /quit ends.", file=sys.stderr)
        session = ChatSession(self._prompts, self._system)
        for line in typed_lines():
            if _obeyed(line, session):
                continue
            try:
                check_unicode(line, "the message")
                prompt = session.ask(line, self._options.max_new_tokens)
            except UserError as error:  # the next one may be better
                print(f"error: {error}", file=sys.stderr)
                continue
            if prompt.dropped:
                print(f"(the context is full: the oldest {prompt.dropped} turns were left out)", file=sys.stderr)
            if self._arguments.jsonl:
                [[answer]] = self._complete([prompt.ids])
                self._print(line, [answer])
            else:
                with ctrl_c() as asked_to_stop:
                    [answer] = self._show("", prompt.ids, asked_to_stop)
            session.answered(line, answer.text)

    def _encode(self, prompt: Prompt) -> list[int]:
        try:
            return ChatSession(self._prompts, self._system).ask(prompt.text, self._options.max_new_tokens).ids
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from None


def _obeyed(line: str, session: ChatSession) -> bool:
    """Whether the line was a command of a conversation, which has been carried out; any other line is a message."""
    command, _, text = line.strip().partition(" ")
    if command == "/reset" and not text:
        session.reset()
    elif command == "/system":
        session.reset()
        session.system = text.strip()
    else:
        return False
    print("(a new conversation)", file=sys.stderr)
    return True


def typed_lines() -> Iterator[str]:
    """The lines that the user types, without empty ones, up to the end of the input or /quit."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - with it, `input` has the arrow keys and a history
    while True:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:  # forget the line, as a shell does
            print()
            continue
        if line.strip() == "/quit":
            return
        if line:
            yield line


@contextlib.contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one raises KeyboardInterrupt as usual."""
    asked = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
