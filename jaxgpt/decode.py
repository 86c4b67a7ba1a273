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
    cli.add_tokenizer_arguments(parser)
    arguments = parser.parse_args(argv)

    from jaxgpt.data.tokenizer_folder import find_tokenizer
    from jaxgpt.inference.prompts import token_table

    words = re.split(r"[\s,\[\]]+", cli.given_text(" ".join(arguments.ids) or None, arguments.file, "ID"))
    ids = [_id(word) for word in words if word]
    if not ids:
        raise UserError("there are no ids; give some, such as 15496 995")
    tokenizer = find_tokenizer(arguments.tokenizer, _on_the_hub)
    for token in ids:
        if tokenizer.backend.id_to_token(token) is None:
            raise UserError(f"{token} is no token: the ids of this tokenizer are 0 to {tokenizer.vocab_size - 1}")
    text = tokenizer.decode(ids)
    print(text)
    if arguments.json:
        record = {"text": text, "ids": ids, "pieces": [piece for _, piece, _ in token_table(tokenizer, ids)]}
        Path(arguments.json).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _id(word: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", word):
        raise UserError(f"{word[:40]!r} is no token id; ids are numbers such as 15496")
    return int(word)


def _on_the_hub(name: str) -> Path:
    from jaxgpt.model.huggingface import locate  # imports jax

    return locate(name)


if __name__ == "__main__":
    sys.exit(main())
