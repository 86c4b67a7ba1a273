"""Several processes on this machine as one run: `python -m jaxgpt.launch --local-procs 2 -- train --config FILE`.

It runs the code path of a pod without one: each process stands for a host, with CPU devices of its own, joined by jax
over the loopback interface. Their output carries the process's number, [1]. A signal sent to the launcher (SIGTERM,
Ctrl-C) goes to all. The exit code is that of the first process that failed.
"""

import argparse
import sys
from collections.abc import Sequence

from jaxgpt.errors import UserError, stop_at_once

if __name__ == "__main__":
    stop_at_once()  # before what takes time is imported

from jaxgpt import cli

JOINING_VERBS = ("train",)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("launch", __doc__)
    parser.usage = "%(prog)s --local-procs N [--devices-per-proc M] -- train --config FILE [options]"
    parser.add_argument("--local-procs", metavar="N", type=int, required=True, help="processes to start")
    parser.add_argument("--devices-per-proc", metavar="M", type=int, default=1, help="CPU devices of each [default 1]")
    grace = "seconds to end, once one has failed [default 60]"
    parser.add_argument("--grace", metavar="S", type=float, default=60.0, help=grace)
    parser.add_argument("verb", nargs=argparse.REMAINDER, metavar="...", help="the verb to run, and its arguments")
    arguments = parser.parse_args(argv)
    for name in ("local_procs", "devices_per_proc"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} = {getattr(arguments, name)}, but it must be 1 or more")
    verb = [word for word in arguments.verb if word != "--"] if arguments.verb[:1] == ["--"] else arguments.verb
    if not verb or verb[0] not in JOINING_VERBS:
        given = f"not {verb[0]!r}" if verb else "and there is nothing after --"
        raise UserError(
            f"launch runs {' or '.join(JOINING_VERBS)}, {given}; for example: launch --local-procs 2 -- train"
        )
    from jaxgpt.parallel.local_launch import local_environments, run_together

    environments = local_environments(arguments.local_procs, arguments.devices_per_proc)
    return run_together([sys.executable, "-m", "jaxgpt", *verb], environments, arguments.grace)


if __name__ == "__main__":
    sys.exit(main())
