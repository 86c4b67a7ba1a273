"""Writes docs/configuration.md, every setting from jaxgpt/settings.py: `python docs/configuration.py`.

A test (tests/test_docs.py) compares the page with the program, so that the two cannot differ. No jax import.
"""

import dataclasses
import html
import re
from pathlib import Path

from jaxgpt.config import sections
from jaxgpt.settings import SourceConfig, describe_type
from jaxgpt.training.resume import ON_RESUME

PAGE = Path(__file__).with_suffix(".md")

HEAD = """# Every setting

<!-- Written by `python docs/configuration.py` from jaxgpt/settings.py. Do not edit: change the text there. -->

A config file is TOML: a `[section]` and the settings in it. What it leaves out has the default. `base = "other.toml"`
takes everything from another file first. On the command line each setting is a flag, which goes before the file:

```sh
python -m jaxgpt.train --config configs/quickstart.toml --optimizer.learning_rate 1e-3 --train.max_steps 600
```

`none` means "not set"; a list is written with commas on the command line (`--eval.tasks piqa=p.jsonl,arc=a.jsonl`).
A setting that does not exist, or a value outside its limits, is refused in one line before anything is read.

**On resume** says what happens when the same run folder is started again with another value: *free*, it simply
applies; *`--force`*, it changes what follows, so you have to ask for it; *new run*, it would be another experiment, and
another `--workdir` is needed. Nothing in a config is a secret, and nothing in it is executed.
"""

RESUME_WORDS = {"free": "free", "forced": "`--force`", "refused": "new run"}

TITLES = {
    "model": "the network",
    "tokenizer": "from text to numbers",
    "data": "what is read",
    "cleaning": "what happens to each document first",
    "chat": "conversations",
    "augmentation": "changed copies of conversations",
    "optimizer": "how it learns",
    "train": "how long, how much at once",
    "mesh": "how devices share the work",
    "checkpoint": "what is kept",
    "faults": "when something goes wrong",
    "eval": "how good is it, meanwhile",
    "log": "what is written down",
    "init": "weights to start from",
}


def reference() -> str:
    """The whole page."""
    kinds = {entry: kind for kind, entries in ON_RESUME.items() for entry in entries}
    parts = [HEAD]
    for name, section in sections().items():
        parts += [f"## [{name}]: {TITLES[name]}", ""]
        parts += ["| setting | what it may be | default | on resume | what it does |", "|---|---|---|---|---|"]
        for field in dataclasses.fields(section):
            kind = kinds[name] if name in kinds else kinds[f"{name}.{field.name}"]
            parts.append(row(section, field, RESUME_WORDS[kind]))
        parts.append("")
        if name == "data":
            parts += _source_table()
    return "\n".join(parts).rstrip() + "\n"


def _source_table() -> list[str]:
    head = "Each table of a mixture, `data.source = [{ source = ..., ... }, ...]`, has:"
    rows = [row(SourceConfig, field) for field in dataclasses.fields(SourceConfig)]
    return [head, "", "| key | what it may be | default | what it does |", "|---|---|---|---|", *rows, ""]


def row(section: type, field: dataclasses.Field, *more: str) -> str:
    """A line of a table: name, type and limits, default, `more`, help."""
    told = section.__pydantic_fields__[field.name].description or f"As data.{field.name}."
    cells = [f"`{field.name}`", _kind(field), _default(field), *more, _prose(told)]
    return f"| {' | '.join(cells)} |"


def _kind(field: dataclasses.Field) -> str:
    """Its type and limits; the choices of a pattern are listed, since a regular expression helps nobody."""
    words = describe_type(field.type)
    if "stdlib" in words:
        return "a source" if "list" not in words else "a source, or a list of tables"
    if field.name == "profile":
        return "`FIRST:LAST`, or empty"
    return _escape(words)


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "has to be given"
    if field.default is None:
        return "none"
    if field.default in ("", ()):
        return "empty"
    text = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return f"`{text}`"


def _prose(text: str) -> str:
    """Help as one line of Markdown that shows its angle brackets and bars."""
    return _escape(re.sub(r"\s+", " ", text).replace("`", ""))


def _escape(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*").replace("[", "\\[")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"written: {PAGE}")
