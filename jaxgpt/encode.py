"""A text as tokens: `python -m jaxgpt.encode "ChatGPT 是一个强大的 AI 模型!" --tokenizer runs/quickstart`.

Prints the id and the piece of text of each token, then how many there are. A token that is a part of a character is
shown as bytes.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.errors import UserError


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("encode", __doc__)
    parser.add_argument("text", metavar="TEXT", nargs="?", help="the text [--file, or standard input]")
    arguments, text = cli.tokenizer_arguments(parser, argv, "text")

    if arguments.tokenizer.startswith("hf:"):
        from jaxgpt.model.huggingface import locate_tokenizer  # imports jax

        arguments.tokenizer = str(locate_tokenizer(arguments.tokenizer))

    from jaxgpt.data.tokenizer_folder import find_tokenizer
    from jaxgpt.inference.prompts import check_unicode, token_piece

    check_unicode(text, "the text")
    tokenizer = find_tokenizer(arguments.tokenizer)
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError("the text has no tokens: it is empty")
    pieces = [token_piece(tokenizer, token) for token in ids]
    width = max(2, len(str(max(ids))))
    print(f"{'id':>{width}}  piece", *(f"{token:>{width}}  {piece}" for token, piece in zip(ids, pieces)), sep="\n")
    each, back = len(text) / len(ids), tokenizer.decode(ids)
    counts = {"tokens": len(ids), "characters": len(text), "bytes": len(text.encode())}
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()) + f"; {each:.2f} characters per token")
    if back != text:
        print(f"decoded, it is another text: {back[:200]!r}")
    if arguments.json:
        record = {"text": text, "ids": ids, "pieces": pieces, **counts, "characters_per_token": each, "decoded": back}
        Path(arguments.json).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
