"""Continue a prompt: `python -m jaxgpt.sample --checkpoint runs/quickstart --prompt "def "`.

Texts go to stdout, each with its prompt and a ruled line between two; what was loaded, how long it took and
what went wrong go to stderr. On a terminal, without --prompt and --prompt-file, it asks for one text after another.

With --chat the model answers messages instead, and stops by itself: one of --prompt, each of --prompt-file by itself,
or else a whole conversation from the terminal or from a pipe, one message a line (/reset, /system TEXT and /quit).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.parallel.accelerator import keep_freed_memory

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
    keep_freed_memory()  # before jax starts its threads

    from jaxgpt.inference.terminal import Loaded, sample
    from jaxgpt.training.models import load_model

    def load() -> Loaded:
        model = load_model(arguments.checkpoint)
        return Loaded(model.config, model.vocab_size, model.params, model.tokenizer, model.step)

    sample(arguments, load)


def parser() -> argparse.ArgumentParser:
    """The flags; those of `SamplingOptions` have the same names and defaults."""
    flags = cli.parser("sample", __doc__)
    cli.add_model_arguments(flags)
    prompt = flags.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; empty starts from the end-of-text token")
    lines = 'one prompt a line; in a .jsonl file, objects with "prompt", which may hold line breaks'
    prompt.add_argument("--prompt-file", metavar="FILE", type=Path, help=lines)
    prompt.add_argument("--interactive", action="store_true", help="ask for prompts, and show each text as it is made")
    flags.add_argument("--chat", action="store_true", help="answer messages, with a model fine-tuned on conversations")
    system = "with --chat, the system message [chat.system of the run; empty for none]"
    flags.add_argument("--system", metavar="TEXT", help=system)
    flags.add_argument("--batch-size", metavar="N", type=int, default=8, help="prompts at a time [%(default)s]")
    record = "one JSON object a prompt: prompt, texts (without the prompt), finish_reasons, tokens, logprobs"
    flags.add_argument("--jsonl", action="store_true", help=record)
    flags.add_argument("--logprobs", action="store_true", help="after a text, its tokens with their log-probabilities")
    flags.add_argument("--truncate", action="store_true", help="of a prompt that is too long, use its last tokens")
    rules = flags.add_argument_group("how tokens are chosen")
    for name, default, text in RULES:
        flag, metavar = "--" + name.replace("_", "-"), "N" if isinstance(default, int) else "X"
        rules.add_argument(flag, metavar=metavar, type=type(default), default=default, help=f"{text} [%(default)s]")
    rules.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable")
    ids = rules.add_argument("--stop-token-id", metavar="N", dest="stop_token_ids", type=int, action="append")
    ids.default, ids.help = [], "end before this token; repeatable"
    return flags


if __name__ == "__main__":
    sys.exit(main())
