"""Imports go only within a folder or to a lower level; heavy packages stay out of `--help`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxgpt
from jaxgpt.__main__ import VERBS

PACKAGE = Path(jaxgpt.__file__).parent
LEVELS = {
    **dict.fromkeys(["errors", "settings", "checks", "config", "cli", "failpoints", "storage"], 0),
    **dict.fromkeys(["model", "parallel", "data"], 1),
    **dict.fromkeys(["inference", "preparation"], 2),
    "training": 3,  # prepares its data, and has the model write while it learns
    **dict.fromkeys(["evaluation", "serving", "planning", "diagnosis", "tuning"], 4),
    "reporting": 5,  # draws what the others found
    **dict.fromkeys(VERBS, 6),
    "__main__": 7,
    "__init__": 7,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The folder of a module, or its own name at the top of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("jaxgpt.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stay_in_the_room_or_go_down(path):
    for other in imported_rooms(path):
        assert (
            other == room(path) or LEVELS[other] < LEVELS[room(path)] or (LEVELS[other] == LEVELS[room(path)] == 0)
        ), f"{path} (level {LEVELS[room(path)]}) imports jaxgpt.{other} (level {LEVELS[other]})"


def test_every_room_has_a_level():
    assert {room(path) for path in FILES} <= set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_fit_in_a_head(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            limit = 70 if node.name in ("fit", "train") else 60
            assert node.end_lineno - node.lineno < limit, f"{node.name} in {path}"


@pytest.mark.parametrize("verb", VERBS)
def test_help_answers_without_jax(verb):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['jaxgpt', '--help']\n"
        "try:\n"
        f"    runpy.run_module('jaxgpt.{verb}', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "heavy = {'jax', 'torch', 'tensorflow', 'transformers', 'tensorflow_datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"jaxgpt {verb}" in result.stdout


def test_torch_and_tensorflow_are_imported_nowhere():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "tensorflow"}, path
