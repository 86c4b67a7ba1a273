"""Tokens as a text: `python -m jaxgpt.decode 15496 995 --tokenizer hf:gpt2`.

Ids are separated by spaces or commas, as `jaxgpt encode` and Python print them. `jaxgpt encode` is the way back.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.errors import UserError


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("decode", __doc__)
    parser.add_argument("ids", metavar="ID", nargs="*", help="the ids of the tokens [--file, or standard input]")
    arguments, given = cli.tokenizer_arguments(parser, argv, "ids")

    if arguments.tokenizer.startswith("hf:"):
        from jaxgpt.model.huggingface import locate_tokenizer  # imports jax

        arguments.tokenizer = str(locate_tokenizer(arguments.tokenizer))

    from jaxgpt.data.tokenizer_folder import find_tokenizer

    words = given.translate(str.maketrans(",[]", "   ")).split()
    if wrong := [word for word in words if not re.fullmatch("[0-9]{1,9}", word)] or ["nothing"] * (not words):
        raise UserError(f"{wrong[0][:40]!r} is no token id; ids are numbers, such as 15496 995")
    tokenizer, ids = find_tokenizer(arguments.tokenizer), [int(word) for word in words]
    for token in ids:
        if token >= tokenizer.vocab_size or tokenizer.backend.id_to_token(token) is None:
            raise UserError(f"{token} is no token: the ids of this tokenizer are 0 to {tokenizer.vocab_size - 1}")
    print(text := tokenizer.decode(ids))
    if arguments.json:
        record = json.dumps({"text": text, "ids": ids}, indent=2, ensure_ascii=False)
        Path(arguments.json).write_text(record + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
