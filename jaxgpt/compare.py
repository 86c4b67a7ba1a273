"""Runs beside each other: `python -m jaxgpt.compare runs/a runs/b runs/c --html compare.html`.

The settings in which they differ, their final numbers, and a line for each thing that keeps the numbers from being
compared. --html writes a page with the curves of all runs on one plot, by steps, by tokens and by time. Runs that go on
still, and runs of other versions, are welcome.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.errors import UserError


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("compare", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="run folders, two or more")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with curves there")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there, too")
    parser.add_argument("--by", choices=["step", "tokens", "time"], help="draw the curves by this only [by each]")
    arguments = parser.parse_args(argv)
    _check(arguments)
    from jaxgpt.reporting.comparison import read_runs

    runs = read_runs(arguments.runs)
    print(report(runs, shutil.get_terminal_size((120, 24)).columns))
    if arguments.json:
        _write(arguments.json, "--json", lambda file: file.write_text(as_json(runs), encoding="utf-8"))
    if arguments.html:
        from jaxgpt.reporting.comparison_page import AXES, write_page

        axes = [arguments.by] if arguments.by else list(AXES)
        _write(arguments.html, "--html", lambda file: write_page(file, runs, axes))
        print(f"\npage {arguments.html}")


def _check(arguments: argparse.Namespace) -> None:
    for option, file in (("--html", arguments.html), ("--json", arguments.json)):
        if file and not file.parent.is_dir():
            raise UserError(f"{option} {file}: there is no folder {file.parent}")
        if file and file.is_dir():
            raise UserError(f"{option} {file}: a folder; name a file in it")
    if arguments.by and not arguments.html:
        raise UserError(f"--by {arguments.by}: it is for the curves of the page; add --html FILE")


def _write(file: Path, option: str, write) -> None:
    try:
        write(file)
    except OSError as error:
        raise UserError(f"{option} {file}: cannot be written ({error})") from None


def report(runs: Sequence, width: int) -> str:
    """Warnings, settings and final numbers as tables at most `width` wide, if the names let them."""
    from jaxgpt.reporting.comparison import best_of, comparability, differing_settings, table, told
    from jaxgpt.reporting.comparison_page import formatted
    from jaxgpt.reporting.figures import word

    names = [run.name for run in runs]
    comparable, warnings = comparability(runs)
    settings = [[name, *map(word, values)] for name, values in differing_settings(runs).items()]
    lines, starred = [], False
    for key, values in table(runs).items():
        best = best_of(key, values, comparable)
        starred |= bool(best)
        marks = ["*" if place in best else " " * bool(best) for place in range(len(values))]
        cells = [formatted(key, value) + mark for value, mark in zip(values, marks, strict=True)]
        lines.append([told(key).label, *cells])
    parts = [f"warning  {warning}" for warning in warnings]
    parts += [""] if warnings else []
    parts.append(
        _tables(["settings that differ", *names], settings, width) if settings else "The settings are the same."
    )
    parts += ["", _tables(["final numbers", *names], lines, width)]
    return "\n".join([*parts, *(["* the best"] if starred else [])])


def _tables(head: list[str], rows: list[list[str]], width: int) -> str:
    """The rows under `head`; columns that do not fit beside each other go below, each time with the first column."""
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    groups: list[list[int]] = [[]]
    for place in range(1, len(head)):
        if groups[-1] and widths[0] + sum(2 + widths[other] for other in [*groups[-1], place]) > width:
            groups.append([])
        groups[-1].append(place)
    tables = []
    for group in groups:
        cells = [
            [row[0].ljust(widths[0]), *(row[place].rjust(widths[place]) for place in group)] for row in [head, *rows]
        ]
        tables.append("\n".join("  ".join(line).rstrip() for line in cells))
    return "\n\n".join(tables)


def as_json(runs: Sequence) -> str:
    """{"runs": [{"name", "path", a number each}], "settings": {name: a value each}, "warnings": [...]}"""
    from jaxgpt.reporting.comparison import comparability, differing_settings, numbers

    found = {
        "runs": [{"name": run.name, "path": str(run.path), **numbers(run)} for run in runs],
        "settings": differing_settings(runs),
        "warnings": comparability(runs)[1],
    }
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
