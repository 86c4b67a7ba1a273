"""Continue a prompt: `python -m jaxgpt.sample --checkpoint runs/quickstart --prompt "def "`.

Texts go to stdout, each with its prompt and a ruled line between two; what was loaded, how long it took and
what went wrong go to stderr. On a terminal, without --prompt and --prompt-file, it asks for one text after another.

With --chat the model answers messages instead, and stops by itself: one of --prompt, each of --prompt-file by itself,
or else a whole conversation from the terminal or from a pipe, one message a line (/reset, /system TEXT and /quit).
"""

import argparse
import dataclasses
import io
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.errors import UserError
from jaxgpt.inference.prompts import Prompt, check_unicode, ctrl_c, read_prompts, typed_lines

RULE = "-" * 80
RULES = (
    ("max_new_tokens", 100, "tokens to add, fewer if the end-of-text token comes first"),
    ("num_return_sequences", 1, "independent continuations of each prompt"),
    ("temperature", 0.8, "below 1 plays safer, above 1 wilder; 0 always takes the likeliest token"),
    ("top_k", 50, "draw only among the k likeliest tokens; 0 is off"),
    ("top_p", 0.95, "draw only among the likeliest tokens that together reach probability p; 1 is off"),
    ("min_p", 0.0, "draw only among tokens at least p times as likely as the likeliest; 0 is off"),
    ("repetition_penalty", 1.0, "above 1 makes tokens that were there already less likely; 1 is off"),
    ("seed", 0, "the same seed gives the same text"),
)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stdin):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale, and bytes that are not UTF-8 get a message
            stream.reconfigure(encoding="utf-8", errors="surrogateescape" if stream is sys.stdin else None)
    prompts = _prompts(arguments)

    from jaxgpt.parallel.accelerator import keep_freed_memory

    keep_freed_memory()  # before jax starts its threads

    from jaxgpt.inference.sampling import SamplingOptions

    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {name: tuple(settings[name]) for name in ("stop", "stop_token_ids")}
    options = SamplingOptions(**settings)  # a bad value is told before anything is read

    rows = options.num_return_sequences * min(len(prompts) if prompts else 1, arguments.batch_size)
    kind = ChatWriter if arguments.chat else Writer
    writer = kind(*_load(arguments.checkpoint, arguments.weights, rows), options, arguments)
    if prompts is None:
        writer.converse()
    else:
        writer.write(prompts)
    writer.print_speed()


def parser() -> argparse.ArgumentParser:
    """The flags; those of `SamplingOptions` have the same names and defaults."""
    flags = cli.parser("sample", __doc__)
    cli.add_model_arguments(flags)
    prompt = flags.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; empty starts from the end-of-text token")
    prompt.add_argument(
        "--prompt-file",
        metavar="FILE",
        type=Path,
        help='one prompt a line; in a .jsonl file, objects with "prompt", which may hold line breaks',
    )
    prompt.add_argument("--interactive", action="store_true", help="ask for prompts, and show each text as it is made")
    flags.add_argument("--chat", action="store_true", help="answer messages, with a model fine-tuned on conversations")
    flags.add_argument(
        "--system", metavar="TEXT", help="with --chat, the system message [chat.system of the run; empty for none]"
    )
    flags.add_argument("--batch-size", metavar="N", type=int, default=8, help="prompts at a time [%(default)s]")
    flags.add_argument(
        "--jsonl",
        action="store_true",
        help="one JSON object a prompt: prompt, texts (without the prompt), finish_reasons, tokens, logprobs",
    )
    flags.add_argument(
        "--logprobs", action="store_true", help="after a text, each of its tokens with its log-probability"
    )
    flags.add_argument("--truncate", action="store_true", help="of a prompt that is too long, use its last tokens")
    rules = flags.add_argument_group("how tokens are chosen")
    for name, default, text in RULES:
        rules.add_argument(
            "--" + name.replace("_", "-"),
            metavar="N" if isinstance(default, int) else "X",
            type=type(default),
            default=default,
            help=f"{text} [%(default)s]",
        )
    rules.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be given repeatedly"
    )
    rules.add_argument(
        "--stop-token-id",
        metavar="N",
        dest="stop_token_ids",
        type=int,
        action="append",
        default=[],
        help="end before this token; may be given repeatedly",
    )
    return flags


# ---------------------------------------------------------------- what the user wrote


def _prompts(arguments: argparse.Namespace) -> list[Prompt] | None:
    """The prompts of the command line or of the file; None to ask for them.

    Raises:
        UserError: they cannot be read, or flags that do not go together.
    """
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


# ---------------------------------------------------------------- what the model makes of it


def _load(checkpoint: str, weights: str | None, rows: int):
    """(decoder, tokenizer, system message of the run); the weights as they were loaded are not kept."""
    from jaxgpt.inference.decode import build_decoder
    from jaxgpt.model.sizes import parameter_count
    from jaxgpt.parallel.compiler import use_compilation_cache
    from jaxgpt.training.models import load_model

    model = load_model(checkpoint)
    use_compilation_cache(model.config.train.compilation_cache_dir)
    config, tokenizer = model.config.model, model.tokenizer
    step = f", step {model.step:,}" if model.step else ""
    parameters = parameter_count(config, model.vocab_size) / 1e6
    print(f"{checkpoint}{step}, {parameters:.1f}M parameters, {weights or config.dtype}", file=sys.stderr)
    decoder = build_decoder(config, model.vocab_size, model.params, tokenizer.end_of_text, weights, rows)
    return decoder, tokenizer, model.config.chat.system


class Writer:
    """Continues prompts and prints what comes out."""

    repeats_prompt = True

    def __init__(self, decoder, tokenizer, system: str, options, arguments: argparse.Namespace):
        self._decoder, self._tokenizer, self._options = decoder, tokenizer, options
        self._arguments = arguments
        self._is_first = True
        self._tokens, self._seconds = 0, 0.0

    def write(self, prompts: Sequence[Prompt]) -> None:
        """The texts of all prompts, a batch at a time. Every prompt is checked before the first is continued."""
        ids = [self._encode(prompt) for prompt in prompts]
        if (
            len(prompts) == self._options.num_return_sequences == 1
            and sys.stdout.isatty()
            and not self._arguments.jsonl
        ):
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
        from jaxgpt.inference.text import fit_prompt

        try:
            ids = self._tokenizer.encode(prompt.text)
            kept = fit_prompt(ids, self._options, self._decoder.config.n_positions, self._arguments.truncate)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from None
        if len(kept) < len(ids):
            print(f"{prompt.where}: cut to the last {len(kept):,} of its {len(ids):,} tokens", file=sys.stderr)
        return kept

    def _complete(self, ids: list[list[int]]):
        from jaxgpt.inference.text import complete

        began = time.perf_counter()
        batch = complete(self._decoder, self._tokenizer, ids, self._options)
        self._count(batch, began)
        return batch

    def _show(self, beginning: str, ids: list[int], asked_to_stop: threading.Event | None = None) -> list:
        """Print `beginning` and the text as it grows; several continuations are printed when all are made."""
        from jaxgpt.inference.text import TextGeneration

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

    def _count(self, batch, began: float) -> None:
        self._seconds += time.perf_counter() - began
        self._tokens += sum(len(completion.tokens) for completions in batch for completion in completions)

    def _print(self, prompt: str, completions) -> None:
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

    def _print_logprobs(self, completion) -> None:
        """A line a token: the natural logarithm of its probability, and its text."""
        if self._arguments.logprobs:
            for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
                print(f"{logprob:10.4f}  {self._tokenizer.decode([token])!r}")


class ChatWriter(Writer):
    """Answers messages and prints the answers."""

    repeats_prompt = False

    def __init__(self, decoder, tokenizer, system: str, options, arguments: argparse.Namespace):
        from jaxgpt.inference.conversation import ChatPrompts

        self._prompts = ChatPrompts(tokenizer, decoder.config.n_positions, arguments.checkpoint)
        self._system = system if arguments.system is None else arguments.system
        stop = (*options.stop_token_ids, self._prompts.end_of_turn)
        super().__init__(decoder, tokenizer, system, dataclasses.replace(options, stop_token_ids=stop), arguments)

    def converse(self) -> None:
        """Answer one line after another, each after all that was said, until the input ends or /quit."""
        from jaxgpt.inference.conversation import ChatSession

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
        from jaxgpt.inference.conversation import ChatSession

        try:
            return ChatSession(self._prompts, self._system).ask(prompt.text, self._options.max_new_tokens).ids
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from None


def _obeyed(line: str, session) -> bool:
    """Whether the line was a command of a conversation; it has been carried out. Any other line is a message."""
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


if __name__ == "__main__":
    sys.exit(main())
