"""Text to a tokenized dataset: `python -m jaxgpt.prepare --config configs/quickstart.toml`.

Finds the dataset that belongs to the settings [data] and [tokenizer], or makes it, and prints its folder.
`train` does the same when it starts.
"""

import sys
from collections.abc import Sequence

from jaxgpt import cli


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("prepare", __doc__)
    cli.add_config_arguments(parser)
    config = cli.config_from(parser.parse_args(argv))

    from jaxgpt.data.preparation import given_tokenizer, prepare
    from jaxgpt.model.huggingface import locate

    prepare(config, given_tokenizer(config, locate))


if __name__ == "__main__":
    sys.exit(main())
