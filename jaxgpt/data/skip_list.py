"""Skip lists: files of training rows that are to weigh nothing, one number a line, with # for comments.

Row r of the batch at position s of the data is number s * global_batch_size + r, counted over the whole run
(pipeline.py): what `jaxgpt replay` shows beside each text.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from jaxgpt.errors import UserError


def read_skip_list(path: str | Path | None) -> frozenset[int]:
    """The numbers in the file; none where `path` is None.

    Raises:
        UserError: there is no such file, or a line is no number; names the file and the line.
    """
    if path is None:
        return frozenset()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"data.skip_list = {path}: cannot be read ({reason})") from None
    found = set()
    for number, line in enumerate(lines, start=1):
        word = line.split("#")[0].strip()
        if not word:
            continue
        if not (word.isascii() and word.isdigit()):
            raise UserError(f"{path}:{number}: {word!r} is no row; write one whole number a line, such as 12345")
        found.add(int(word))
    return frozenset(found)


def add_to_skip_list(path: Path, rows: Iterable[int], comment: str) -> list[int]:
    """Append those of `rows` that the file does not have yet, after a line of comment; returns them.

    The file is replaced as a whole, so that a crash leaves the old one or the new one.
    """
    there = read_skip_list(path) if path.exists() else frozenset()
    new = sorted(set(rows) - there)
    if new:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        text += "\n" if text and not text.endswith("\n") else ""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text + f"# {comment}\n" + "".join(f"{row}\n" for row in new), encoding="utf-8")
        os.replace(temporary, path)
    return new
