"""A text as tokens: `python -m jaxgpt.encode "ChatGPT 是一个强大的 AI 模型!" --tokenizer runs/quickstart`.

Prints the id and the piece of text of each token, then how many there are. A token may be a part of a character: it is
shown as bytes, and the token that ends the character says so.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.errors import UserError

_MOST_ROWS = 2000


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("encode", __doc__)
    parser.add_argument("text", metavar="TEXT", nargs="?", help="the text [--file, or standard input]")
    cli.add_tokenizer_arguments(parser)
    arguments = parser.parse_args(argv)

    from jaxgpt.data.tokenizer_folder import find_tokenizer
    from jaxgpt.inference.prompts import check_unicode, table_lines, token_table

    text = cli.given_text(arguments.text, arguments.file, "TEXT")
    check_unicode(text, "the text")
    tokenizer = find_tokenizer(arguments.tokenizer, _on_the_hub)
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError("the text has no tokens: it is empty")
    rows = token_table(tokenizer, ids)
    print("\n".join(table_lines(rows[:_MOST_ROWS])))
    if len(rows) > _MOST_ROWS:
        print(f"... and {len(rows) - _MOST_ROWS:,} more; --json FILE has them all")
    counts = {"tokens": len(ids), "characters": len(text), "bytes": len(text.encode())}
    each = len(text) / len(ids)
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()) + f"; {each:.2f} characters per token")
    if (back := tokenizer.decode(ids)) != text:
        print(f"decoded, it is another text: {back[:200]!r}")
    if arguments.json:
        pieces = [piece for _, piece, _ in rows]
        record = {"text": text, "ids": ids, "pieces": pieces, **counts, "characters_per_token": each, "decoded": back}
        Path(arguments.json).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _on_the_hub(name: str) -> Path:
    from jaxgpt.model.huggingface import locate  # imports jax

    return locate(name)


if __name__ == "__main__":
    sys.exit(main())
