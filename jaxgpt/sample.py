"""Continue a prompt: `python -m jaxgpt.sample --checkpoint runs/quickstart --prompt "def "`.

Texts go to stdout, each with its prompt and a ruled line between two; what was loaded goes to stderr.
"""

import sys
from collections.abc import Sequence

from jaxgpt import cli

RULE = "-" * 80


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    from jaxgpt.inference.decode import generate
    from jaxgpt.inference.sampling import SamplingOptions

    settings = vars(arguments)
    checkpoint, prompt = settings.pop("checkpoint"), settings.pop("prompt")
    options = SamplingOptions(**settings)  # a bad value is told before anything is read

    from jaxgpt.model.sizes import parameter_count
    from jaxgpt.training.weights import load_model

    model = load_model(checkpoint)
    config, tokenizer = model.config.model, model.tokenizer
    parameters = parameter_count(config, model.vocab_size) / 1e6
    print(f"{checkpoint}, step {model.step:,}, {parameters:.1f}M parameters, {config.dtype}", file=sys.stderr)

    prompt_ids = tokenizer.encode(prompt)
    arguments = (config, model.vocab_size, model.params, prompt_ids, options, tokenizer.end_of_text)
    texts = [prompt + tokenizer.decode(tokens) for tokens in generate(*arguments)]
    print(f"\n{RULE}\n".join(texts))


def parser():
    """The flags; all but the first two are fields of `SamplingOptions`, with the same names and defaults."""
    flags = cli.parser("sample", __doc__)
    flags.add_argument(
        "--checkpoint", metavar="DIR", required=True, help="run folder (its latest step), or one step's folder"
    )
    flags.add_argument(
        "--prompt", metavar="TEXT", default="", help="text to continue; empty starts from the end-of-text token"
    )
    for name, default, text in (
        ("max_new_tokens", 100, "tokens to add, fewer if the end-of-text token comes first"),
        ("num_return_sequences", 1, "independent continuations"),
        ("temperature", 0.8, "below 1 plays safer, above 1 wilder; 0 always takes the likeliest token"),
        ("top_k", 50, "draw only among the k likeliest tokens; 0 is off"),
        ("top_p", 0.95, "draw only among the likeliest tokens that together reach probability p; 1 is off"),
        ("seed", 0, "the same seed gives the same text"),
    ):
        flags.add_argument(
            "--" + name.replace("_", "-"),
            metavar="N" if isinstance(default, int) else "X",
            type=type(default),
            default=default,
            help=f"{text} [%(default)s]",
        )
    return flags


if __name__ == "__main__":
    sys.exit(main())
