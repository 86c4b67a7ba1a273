"""The structure of the package: imports go down, every name is there once, files and functions stay small."""

import ast
import collections
import subprocess
import sys
from pathlib import Path

import jaxgpt
from jaxgpt.__main__ import VERBS
from jaxgpt.config import config_fields

PACKAGE = Path(jaxgpt.__file__).parent
BASE = "base"  # the modules of level 0 are one room, whether they lie at the top or in storage/
LEVELS = {
    **dict.fromkeys(["errors", "settings", "config", "cli", "failpoints", "storage"], 0),
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
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
LINES = {path: path.read_text(encoding="utf-8").count("\n") for path in FILES}


def module_of(path: Path) -> str:
    """jaxgpt.data.chat of jaxgpt/data/chat.py; a package's __init__.py has the package's name."""
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def room(module: str) -> str:
    """The first name below the package: a folder, or a module at the top."""
    name = (module.split(".") + ["__init__"])[1]
    return BASE if LEVELS.get(name) == 0 else name


def level(module: str) -> int:
    return LEVELS.get(room(module), 0)


def imported_names(tree: ast.AST) -> list[str]:
    """The dotted names of all imports of a module, those inside functions too."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used here"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def imported_modules(tree: ast.AST) -> set[str]:
    """The modules of the package that a module imports: `from jaxgpt.data import chat` is jaxgpt.data.chat."""
    ours = (name for name in imported_names(tree) if name.split(".")[0] == PACKAGE.name)
    return {name if name in MODULES else name.rpartition(".")[0] for name in ours}


IMPORTS = {module: imported_modules(TREES[path]) for module, path in MODULES.items()}


def reachable(module: str) -> set[str]:
    found, waiting = set(), [module]
    while waiting:
        new = IMPORTS.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def repeated(names_and_places: list[tuple[str, str]]) -> list[str]:
    """A line for each name that stands in more than one place."""
    places = collections.defaultdict(list)
    for name, place in names_and_places:
        places[name].append(place)
    return [f"{name}: {', '.join(found)}" for name, found in sorted(places.items()) if len(found) > 1]


def test_imports_go_down_without_circles_and_never_to_torch_or_tensorflow():
    found = [f"{room(module)}: has no level" for module in MODULES if room(module) not in {*LEVELS, BASE}]
    for module, others in IMPORTS.items():
        for other in sorted(others - {PACKAGE.name}):  # the package itself holds no more than its version
            if room(other) != room(module) and level(other) >= level(module):
                found.append(f"{module} (level {level(module)}) imports {other} (level {level(other)})")
    for module in MODULES:
        circle = sorted(other for other in reachable(module) if module in reachable(other))
        if circle and module == circle[0]:
            found.append(f"circle: {', '.join(circle)}")
    for path, tree in TREES.items():
        banned = {name.split(".")[0] for name in imported_names(tree)} & {"torch", "tensorflow"}
        found += [f"{path.relative_to(PACKAGE)} imports {name}" for name in banned]
    assert not found, "\n" + "\n".join(found)


def test_files_functions_and_the_package_are_small_and_every_name_is_there_once():
    found = repeated([(path.name, str(path.relative_to(PACKAGE))) for path in FILES if path.stem != "__init__"])
    classes = []
    for path, tree in TREES.items():
        where = path.relative_to(PACKAGE)
        limit = 80 if where.parent == Path() and where.stem in VERBS else 420
        if LINES[path] > limit:
            found.append(f"{where}: {LINES[path]} lines, more than {limit}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > 60:
                    found.append(f"{where}: {node.name} has {lines} lines, more than 60")
        public = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        classes += [(node.name, str(where)) for node in public]
    found += repeated(classes)
    found += [f"{len(FILES)} files, more than 164"] if len(FILES) > 164 else []
    found += [f"{sum(LINES.values())} lines, more than 29,500"] if sum(LINES.values()) > 29_500 else []
    found += [f"{len(config_fields())} settings, more than 100"] if len(config_fields()) > 100 else []
    assert not found, "\n" + "\n".join(found)


# Asks every verb for its help, one after the other in one process, and says what was wrong.
HELP = """
import contextlib, io, runpy, sys
for verb in sys.argv.pop().split(","):
    sys.argv[1:] = ["--help"]
    code, shown = None, io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            runpy.run_module(f"jaxgpt.{verb}", run_name="__main__")
        except SystemExit as end:
            code = end.code
    heavy = sorted({"jax", "torch", "tensorflow", "transformers", "tensorflow_datasets"} & {*sys.modules})
    for name in heavy:
        del sys.modules[name]
    if code not in (None, 0) or heavy or f"jaxgpt {verb}" not in shown.getvalue():
        print(f"{verb}: exit code {code}, imports {heavy}, shows {shown.getvalue()[:200]!r}")
"""


def test_help_answers_without_jax():
    command = [sys.executable, "-c", HELP, ",".join(VERBS)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
