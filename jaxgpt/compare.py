"""Compare runs: `python -m jaxgpt.compare runs/a runs/b runs/c --html compare.html`.

Prints the settings in which they differ, their final numbers, and a line for each reason why the numbers may not be
compared. --html writes a page with the curves of all runs in one figure, by steps, by tokens and by time. Runs in
progress, and runs of other versions, are welcome.
"""

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
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers there")
    parser.add_argument("--by", choices=["step", "tokens", "time"], help="draw the curves by this only [by each]")
    arguments = parser.parse_args(argv)
    for option, file in (("--html", arguments.html), ("--json", arguments.json)):
        if file and not file.parent.is_dir():
            raise UserError(f"{option} {file}: there is no folder {file.parent}")
        if file and file.is_dir():
            raise UserError(f"{option} {file}: a folder; name a file in it")
    if arguments.by and not arguments.html:
        raise UserError(f"--by {arguments.by}: it is for the curves of the page; add --html FILE")
    from jaxgpt.reporting.comparison_page import compare

    compare(arguments.runs, arguments.json, arguments.html, arguments.by)


if __name__ == "__main__":
    sys.exit(main())
