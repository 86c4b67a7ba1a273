"""Answer over HTTP: `python -m jaxgpt.serve --checkpoint runs/quickstart`, then open http://127.0.0.1:8000.

Speaks OpenAI's API (/v1/completions, /v1/chat/completions, /v1/models), has /generate, /tokenize and /detokenize,
/health, /ready and /metrics (Prometheus), and a page to try the model in a browser. Requests share one batch, each
in a slot of its own; a model with a chat template answers conversations. Anyone who reaches the port may ask, unless
there are API keys: lines of --api-key-file, or the environment variable JAXGPT_API_KEYS, separated by commas.

Ctrl-C or SIGTERM: no new work, the answers under way end, exit code 0. docs/serving.md explains the rest.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.errors import UserError, how_to_install


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = vars(parser().parse_args(argv))
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise UserError(f"the server needs packages that are not installed: {how_to_install('serve')}")

    from jaxgpt.parallel.accelerator import keep_freed_memory

    keep_freed_memory()  # before jax is imported

    from jaxgpt.serving.served_model import ServeOptions
    from jaxgpt.serving.server import run

    code = run(ServeOptions(**arguments))
    cli.leave(code)  # a thread that still compiles would crash on the way out, and one on a dead device hang


def parser() -> argparse.ArgumentParser:
    flags = cli.parser("serve", __doc__)
    cli.add_model_arguments(flags)
    flags.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0 for all of this machine's [%(default)s]")
    flags.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one [%(default)s]")
    flags.add_argument("--name", metavar="TEXT", help="the model's name for clients [the folder's]")
    flags.add_argument("--system", metavar="TEXT", help="system message of chats without one [chat.system of the run]")
    add = flags.add_argument_group("how much at once").add_argument
    add("--slots", type=int, default=16, metavar="N", help="texts made side by side [%(default)s]")
    add("--queue", type=int, default=64, metavar="N", help="texts that may wait for a slot [%(default)s]")
    add("--chunk", type=int, default=8, metavar="N", help="tokens between two looks at the queue [%(default)s]")
    add("--request-seconds", type=float, default=600.0, metavar="S", help="longest time of an answer [%(default)g]")
    add("--drain-seconds", type=float, default=30.0, metavar="S", help="for answers under way at a stop [%(default)g]")
    add = flags.add_argument_group("who may ask").add_argument
    add("--api-key-file", metavar="FILE", type=Path, help="one key a line [$JAXGPT_API_KEYS, else anyone]")
    without = "with keys: what needs none (health and ready never do)"
    add("--open", nargs="+", choices=("page", "metrics", "models"), default=[], help=without)
    add("--cors-origin", nargs="+", metavar="URL", default=[], help="sites whose pages may ask from a browser [none]")
    return flags


if __name__ == "__main__":
    sys.exit(main())
