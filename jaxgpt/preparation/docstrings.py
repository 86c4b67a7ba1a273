"""The source "docstrings": English prose that every installation has, in the Python packages beside jaxgpt.

The files are parsed and never imported. A document is the docstrings of one module, those of MIN_CHARS and more that no
module before it had. Modules come in the order of a hash, so that a part of the source is a fair sample of it; the same
installed versions give the same documents. The standard library is left out: the source "stdlib" has its files whole.
"""

import ast
import csv
import hashlib
import importlib.metadata
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.preparation.documents import BadRecords, Document

MIN_CHARS = 200
_PROSE = 0.3  # share of a file that its long docstrings are; parsing all others would take most of the time
_NOT_READ = {"test", "tests", "testing", "_vendor"}  # folders of tests, and of copies of other packages
_STRING = re.compile(rb'("""|\'\'\')(.*?)\1', re.DOTALL)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_VERSION = "1"  # change it with what is taken from a file: it is part of the names of datasets


def packages() -> list[str]:
    """Name and version of each installed package, which decide what the documents are."""
    found = {(dist.name.lower(), dist.version) for dist in importlib.metadata.distributions()}
    return [f"docstrings {_VERSION}", *(f"{name} {version}" for name, version in sorted(found))]


def documents(bad: BadRecords) -> Iterator[Document]:
    """The docstrings of one module after another; files that cannot be parsed, and repeats, are counted in `bad`."""
    seen: set[bytes] = set()
    for name, file in sorted(_modules(bad), key=lambda module: hashlib.sha256(module[0].encode()).digest()):
        kept = []
        for text in _docstrings(name, file, bad):
            key = hashlib.sha256(" ".join(text.split()).encode()).digest()[:16]
            if key in seen:
                bad.unread("docstrings that another module has", name)
            else:
                kept.append(text)
                seen.add(key)
        if kept:
            yield Document("\n\n".join(kept))


def _modules(bad: BadRecords) -> Iterator[tuple[str, Path]]:
    """(package/path, file) of each Python file that an installed package lists."""
    for dist in importlib.metadata.distributions():
        name, record = dist.name, dist.read_text("RECORD")
        if record is None:
            bad.unread("packages without a list of their files", name)
        for row in csv.reader((record or "").splitlines()):
            if row and row[0].endswith(".py"):
                if _NOT_READ & {*row[0].split("/")}:
                    bad.unread("tests, and copies of other packages", name)
                else:
                    yield f"{name}/{row[0]}", Path(str(dist.locate_file(row[0])))


def _docstrings(name: str, file: Path, bad: BadRecords) -> list[str]:
    """The long docstrings of a file in their order; none if they are a small part of it."""
    try:
        source = file.read_bytes()
        sizes = (len(found[2]) for found in _STRING.finditer(source))
        if sum(size for size in sizes if size >= MIN_CHARS) < _PROSE * max(len(source), MIN_CHARS):
            bad.unread("files with little prose", name)
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that Python does not know
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        bad.unread("files that this Python cannot read", name)
        return []
    kept = []
    for text in map(ast.get_docstring, _documented(tree)):
        if text is None or len(text) < MIN_CHARS:
            continue
        if "\0" in text or not text.isascii() and text != text.encode(errors="ignore").decode():
            bad.unread("docstrings that are no text", name)  # NUL, or half of a character
        else:
            kept.append(text)
    return kept


def _documented(node: _Documented) -> Iterator[_Documented]:
    """The module, or class, with the functions and classes in it, in their order."""
    yield node
    for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child)
