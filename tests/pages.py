"""What the pages of the documentation hold: blocks of code, commands of ours, and the marks that stand before them."""

import dataclasses
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"<!-- needs: ([\w ,]+) -->\s*$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A piece of code of a page."""

    language: str
    text: str
    needs: str
    """What its mark says it needs; empty where there is none."""
    line: int


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The fenced and the indented blocks of code."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        mark = NEEDS.search(text[: match.start()])
        line = 1 + text.count("\n", 0, match.start())
        found.append(Block(match[2], match[3], mark[1] if mark else "", line))
    outside = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for number, line in enumerate(outside.splitlines(), 1):
        if line.startswith("    "):
            found.append(Block("", line.strip() + "\n", "", number))
    return found


def shell_lines(text: str) -> list[str]:
    """Commands as a shell would read them: continued lines joined, here-documents and outputs left out."""
    text = re.sub(r"<<'?(\w+)'?(.*?)\n.*?^\1$", r"\2", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip() for line in text.splitlines()]
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line]


def commands(line: str) -> list[list[str]]:
    """The words of each command of a line, [["pip", "install", "-e", "."], ["python", ...]]."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    try:
        for word in lexer:
            if word in ("&&", "||", "|", ";", "&"):
                found.append([])
            else:
                found[-1].append(word)
    except ValueError:  # an apostrophe: prose or output, no command
        return []
    return [words for words in found if words]


def arguments_of(words: list[str]) -> list[str] | None:
    """[VERB, its arguments ...] of a command that is ours, else None."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[:2] in (["python", "-m"], ["python3", "-m"]) and words[2:] and words[2].startswith("jaxgpt."):
        return [words[2].removeprefix("jaxgpt."), *words[3:]]
    return words[1:] if words[:1] == ["jaxgpt"] and words[1:] else None


@dataclasses.dataclass(frozen=True)
class Shown:
    """A command of ours on a page."""

    where: str
    words: list[str]
    """[VERB, argument ...]"""
    error: str = ""
    """What it is said to complain about; empty where it works."""
    in_a_sentence: bool = False
    """It may lack what it needs."""


def our_commands(page: Path) -> list[Shown]:
    """The commands of ours in code and in `code in a line`."""
    found = []
    for block in blocks(page):
        if block.language in ("", "sh", "bash", "console"):
            error = re.search(r"^error: (.*)$", block.text, re.MULTILINE)
            where = f"{relative(page)}:{block.line}"
            for line in shell_lines(block.text):
                for words in map(arguments_of, commands(line)):
                    found += [Shown(where, words, error[1] if error else "")] if words else []
    outside = FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))
    for match in re.finditer(r"`((?:[A-Z_]+=\S+ )?(?:python -m jaxgpt\.|jaxgpt )[^`]+)`", outside):
        where = f"{relative(page)}:{1 + outside.count(chr(10), 0, match.start())}"
        text = " ".join(match[1].replace("\\|", "|").split())
        for words in map(arguments_of, commands(text)):
            found += [Shown(where, words, in_a_sentence=True)] if words and words[0] != "VERB" else []
    return found
