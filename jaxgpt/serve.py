"""Answer over HTTP: `python -m jaxgpt.serve --checkpoint runs/quickstart`, then open http://127.0.0.1:8000.

Speaks OpenAI's API (/v1/completions, /v1/chat/completions, /v1/models), has /generate, /tokenize and /detokenize,
/health, /ready and /metrics (Prometheus), and a page to try the model in a browser. Requests share one batch, each
in a slot of its own; a model with a chat template answers conversations. Anyone who reaches the port may ask, unless
there are API keys: lines of --api-key-file, or the environment variable JAXGPT_API_KEYS, separated by commas.

Ctrl-C or SIGTERM: no new work, the answers under way end, exit code 0. docs/serving.md tells the rest.
"""

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.errors import EXIT_DONE, RunFailed, UserError

OPENABLE = ("page", "metrics", "models")
KEYS = "JAXGPT_API_KEYS"
LOCAL = ("127.0.0.1", "::1", "localhost")


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    _check(arguments)
    keys = _keys(arguments.api_key_file)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("jaxgpt.serve").setLevel(logging.INFO)

    from jaxgpt.parallel.accelerator import keep_freed_memory

    keep_freed_memory()  # before jax starts its threads

    from jaxgpt.serving.app import Options
    from jaxgpt.serving.server import listen, serve

    listener = listen(arguments.host, arguments.port)
    served, build = _load(arguments)
    options = Options(keys, arguments.open, arguments.cors_origin, arguments.request_seconds)
    port = listener.getsockname()[1]
    print(f"listening on http://{arguments.host}:{port}", file=sys.stderr, flush=True)
    if not keys and arguments.host not in LOCAL:
        print("warning: no API keys: whoever reaches this port may use the model", file=sys.stderr)
    code = EXIT_DONE
    try:
        serve(listener, served, options, build, arguments.drain_seconds)
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        code = error.exit_code
    cli.leave(code)  # a thread that still compiles would crash on the way out, and one on a dead device hang


def parser() -> argparse.ArgumentParser:
    flags = cli.parser("serve", __doc__)
    cli.add_model_arguments(flags)
    flags.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0 for all of this machine's [%(default)s]")
    flags.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one [%(default)s]")
    flags.add_argument("--name", metavar="TEXT", help="the model's name for clients [the folder's]")
    flags.add_argument("--system", metavar="TEXT", help="system message of chats without one [chat.system of the run]")
    batch = flags.add_argument_group("how much at once")
    batch.add_argument("--slots", type=int, default=16, metavar="N", help="texts made side by side [%(default)s]")
    batch.add_argument("--queue", type=int, default=64, metavar="N", help="texts that may wait for one [%(default)s]")
    batch.add_argument(
        "--chunk", type=int, default=8, metavar="N", help="tokens between two looks at the queue [%(default)s]"
    )
    batch.add_argument(
        "--request-seconds", type=float, default=600.0, metavar="S", help="an answer's time at most [%(default)g]"
    )
    batch.add_argument(
        "--drain-seconds", type=float, default=30.0, metavar="S", help="for answers under way at a stop [%(default)g]"
    )
    who = flags.add_argument_group("who may ask")
    who.add_argument("--api-key-file", metavar="FILE", type=Path, help=f"one key a line [${KEYS}, else anyone]")
    who.add_argument(
        "--open", nargs="+", choices=OPENABLE, default=[], help="with keys: what needs none (health and ready never do)"
    )
    who.add_argument(
        "--cors-origin", nargs="+", metavar="URL", default=[], help="sites whose pages may ask from a browser [none]"
    )
    return flags


def _check(arguments: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise UserError("the server needs packages that are not installed: pip install 'jaxgpt[serve]'")
    if not 0 <= arguments.port < 65536:
        raise UserError(f"--port {arguments.port}: it must be between 0 and 65535")
    for name in ("slots", "queue", "chunk", "request_seconds"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: it must be more than 0")
    if arguments.drain_seconds < 0:
        raise UserError(f"--drain-seconds {arguments.drain_seconds:g}: it must be 0 or more")
    for origin in arguments.cors_origin:
        if not origin.startswith(("http://", "https://")) or origin.endswith("/"):
            raise UserError(f"--cors-origin {origin}: it must be like https://example.com, without a / at its end")


def _keys(file: Path | None) -> list[str]:
    """The API keys; never on the command line, where every user of the machine would see them."""
    if file is None:
        return [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {file}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise UserError(f"--api-key-file {file}: no key in it; write one a line")
    return keys


def _load(arguments: argparse.Namespace):
    """(the model, a function that compiles its engine)."""
    from jaxgpt.inference.decode import build_decoder
    from jaxgpt.inference.engine import Engine
    from jaxgpt.model.sizes import parameter_count
    from jaxgpt.parallel.compiler import use_compilation_cache
    from jaxgpt.serving.served_model import Served
    from jaxgpt.training.models import load_model

    model = load_model(arguments.checkpoint)
    use_compilation_cache(model.config.train.compilation_cache_dir)
    config, tokenizer = model.config.model, model.tokenizer
    count = parameter_count(config, model.vocab_size)
    name = arguments.name or arguments.checkpoint.removeprefix("hf:").rstrip("/").split("/")[-1]
    system = model.config.chat.system if arguments.system is None else arguments.system
    served = Served(name, tokenizer, config.n_positions, count, model.step, system)
    step = f", step {model.step:,}" if model.step else ""
    kind = arguments.weights or config.dtype
    print(f"{arguments.checkpoint}{step}, {count / 1e6:.1f}M parameters, {kind}", file=sys.stderr)

    vocab_size, loaded = model.vocab_size, [model.params]

    def build() -> Engine:
        params, slots = loaded.pop(), arguments.slots  # not kept: the decoder has them in a layout of its own
        decoder = build_decoder(config, vocab_size, params, tokenizer.end_of_text, arguments.weights, slots)
        del params
        return Engine(decoder, slots, arguments.chunk, arguments.queue)

    return served, build


if __name__ == "__main__":
    sys.exit(main())
