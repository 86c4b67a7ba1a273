"""Settings as the text of a config file."""

import json
from collections.abc import Mapping, Sequence


def to_toml(settings: Mapping[str, object], header: Sequence[str], base: str = "") -> str:
    """{"model.n_layer": 4, ...} as TOML, section by section, below comments; on top of the config file `base`."""
    lines = [f"# {line}".rstrip() for line in header]
    lines += [f"base = {toml_value(base)}"] if base else []
    sections: dict[str, list[str]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {toml_value(value)}")
    return "\n".join([*lines, *(line for name in sections for line in ("", f"[{name}]", *sections[name]))]) + "\n"


def toml_value(value: object) -> str:
    """A setting's value in TOML; none is a word there, as on the command line."""
    if value is None:
        return '"none"'
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items() if item is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # TOML's basic strings, numbers and truth values are JSON's
