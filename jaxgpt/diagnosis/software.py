"""Do the versions of Python and the installed packages fit together? Read from metadata, without imports."""

import importlib.util
import platform
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jaxgpt
from jaxgpt import __version__
from jaxgpt.diagnosis.finding import OK, PROBLEM, WARNING, Case, Finding
from jaxgpt.parallel.accelerator import accelerators

# Packages that plug devices into jax, and the extra of jax whose requirements say which version of them it takes.
_PLUGINS = {
    "libtpu": ("tpu", "tpu"),
    "jax-cuda12-plugin": ("gpu", "cuda12"),
    "jax-cuda13-plugin": ("gpu", "cuda13"),
}


def versions(case: Case) -> Iterator[Finding]:
    """Finds "python": this Python, and jaxgpt's own requirements; "jax": whether jax and its plugins fit together."""
    if importlib.util.find_spec("packaging") is None:
        text = f"Python {platform.python_version()}; versions are not compared, for packaging is not installed"
        yield Finding("python", WARNING, text, "pip install packaging")
        return
    yield own_packages()
    yield jax_versions(case)


def own_packages() -> Finding:
    try:
        wanted, requires = own_requirements()
    except metadata.PackageNotFoundError:
        text = "jaxgpt is neither installed nor beside its pyproject.toml, so what it requires is not known"
        return Finding("python", WARNING, text, "pip install jaxgpt, or pip install -e . in its repository")
    unmet = list(unmet_requirements(requires))
    facts = {"python": platform.python_version(), "executable": sys.executable, "unmet": unmet}
    if not fits(platform.python_version(), wanted):
        text = f"Python {platform.python_version()}, but jaxgpt {__version__} requires {wanted}"
        return Finding("python", PROBLEM, text, "make a virtual environment with a newer Python", facts)
    if unmet:
        packages = " ".join(f'"{line.split(" (")[0]}"' for line in unmet)
        text = f"jaxgpt {__version__} lacks {', '.join(unmet)}"
        return Finding("python", PROBLEM, text, f"{sys.executable} -m pip install {packages}", facts)
    count = sum("extra ==" not in line for line in requires)
    text = f"Python {platform.python_version()}; jaxgpt {__version__} and the {count} packages it requires"
    return Finding("python", OK, text, facts=facts)


def own_requirements() -> tuple[str, list[str]]:
    """(Python's versions, requirements); from pyproject.toml in a source tree, where metadata may be old or absent."""
    project = Path(jaxgpt.__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        content = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        if content["name"] == "jaxgpt":
            return content["requires-python"], content["dependencies"]
    about = metadata.distribution("jaxgpt")
    return about.metadata["Requires-Python"], about.requires or []


def fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def unmet_requirements(lines: list[str], extra: str = "") -> Iterator[str]:
    """'jax>=0.10 (0.9.1 is installed)' for each requirement that this environment does not meet.

    `packaging` is what pip itself decides with.
    """
    from packaging.requirements import Requirement

    for line in lines:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        installed = version(requirement.name)
        if installed is None:
            yield f"{requirement.name}{requirement.specifier} (not installed)"
        elif not fits(installed, str(requirement.specifier)):
            yield f"{requirement.name}{requirement.specifier} ({installed} is installed)"


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def jax_versions(case: Case) -> Finding:
    """Whether jax, jaxlib and the device's plugin were released for each other, by jax's metadata."""
    jax = version("jax")
    if jax is None:
        return Finding("jax", PROBLEM, "jax is not installed", 'pip install "jax[tpu]", "jax[cuda13]" or jax')
    requires = metadata.requires("jax") or []
    installed = {name: found for name in ("jax", "jaxlib", *_PLUGINS) if (found := version(name))}
    text = ", ".join(f"{name} {found}" for name, found in installed.items())
    kinds = {found.kind for found in accelerators(Path(case.root))} | {case.expect}
    broken = [line for line in unmet_requirements(requires) if line.startswith("jaxlib")]
    if broken:
        fix = f'pip install -U "jax=={jax}" "{broken[0].split(" (")[0]}"'
        return Finding("jax", PROBLEM, f"jax {jax} needs {broken[0]}", fix, installed)
    for name, (kind, extra) in _PLUGINS.items():
        if name not in installed or kind not in kinds:
            continue
        apart = [line for line in unmet_requirements(requires, extra) if line.startswith(name)]
        if apart:
            return _apart(text, jax, apart[0], kind, extra, installed)
    idle = [name for name, (kind, _) in _PLUGINS.items() if name in installed and kind not in kinds]
    if idle:
        text += f" ({', '.join(idle)}: no such device here)"
    return Finding("jax", OK, text, facts=installed)


def _apart(text: str, jax: str, broken: str, kind: str, extra: str, installed: dict) -> Finding:
    """jax ignores a CUDA plugin of another version without a word; another libtpu may work, but was not tested."""
    fix = f'pip install -U "jax[{extra}]=={jax}"'
    if kind == "gpu":
        return Finding("jax", PROBLEM, f"jax {jax} does not use its CUDA plugin: it wants {broken}", fix, installed)
    return Finding("jax", WARNING, f"{text}: jax {jax} was released with {broken}", fix, installed)
