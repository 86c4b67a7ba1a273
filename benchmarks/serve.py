"""The server under load: beside its own engine without HTTP, beside a tutorial's server, and under ten times too much.

    pip install -e '.[serve,parity]' flask
    python benchmarks/serve.py load --checkpoint runs/quickstart
    python benchmarks/serve.py peer --scratch /tmp/serve       # keeps its model there
    python benchmarks/serve.py overload --checkpoint runs/quickstart

Clients run in one process of their own (http_load.py), on the cores that the server works on, too. Every client sends
its next request when it has its answer; prompts and lengths are drawn once and are the same for all sides.

load      Tokens a second of 1, 8, 16 and 64 clients, streamed and whole, in rounds; in each round the engine does the
          same requests in a process without HTTP, all of them in its queue at once. Medians over rounds; latencies
          over all requests. "Time per token" is from the first event of a stream to its end, over the tokens that
          came after that event (one chunk's). The server has to be >= 0.9 of the engine with 64 clients, where
          neither ever waits for work, and 16 clients have to get >= 3 times what one gets.
peer      16 clients with 32 tokens of prompt and 32 new ones at 124M (random weights, float32): whole answers of
          `/generate` beside Flask and `transformers` in turn. >= 10 times the tokens a second.
overload  Full load is 64 clients, which the queue just takes. Then requests come at ten times the rate at which full
          load is answered, at random, for a minute, and nobody waits before the next. Refusals: 429 with Retry-After,
          99 % of them in <= 50 ms. Answers: 99 % in <= 2 times what they take at full load. /health, asked ten times a
          second on new connections: <= 100 ms at most. Memory: <= 16 MB more at the end than after a sixth of the time.
"""

import argparse
import collections
import contextlib
import http.client
import importlib.metadata
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from processes import Server, Worker

HERE = Path(__file__).parent
WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "en", "il", "or", "ump", "ash", "ine")]
CLIENTS = (1, 8, 16, 64)
FULL = 64
QUEUE = 64
TIMES_TOO_MUCH = 10
FLAT_BYTES = 16 << 20


# ---------------------------------------------------------------- requests


def draw_bodies(count: int, new: int, **more) -> list[dict]:
    """Prompts of 4 to 16 words, with between half and one and a half times `new` tokens to make; each with its seed."""
    draw = random.Random(1)
    words = lambda: " ".join(draw.choices(WORDS, k=draw.randint(4, 16)))
    length = lambda: draw.randint(new // 2, new + new // 2)
    return [{"prompt": words(), "max_tokens": length(), "seed": seed, **more} for seed in range(count)]


STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


# ---------------------------------------------------------------- processes


def our_server(checkpoint: str, arguments: argparse.Namespace, folder: Path) -> Server:
    command = [sys.executable, "-m", "jaxgpt.serve", "--checkpoint", checkpoint, "--port", "PORT"]
    command += ["--slots", str(arguments.slots), "--chunk", str(arguments.chunk), "--queue", str(QUEUE)]
    if arguments.weights:
        command += ["--weights", arguments.weights]
    return Server(command, folder, "jaxgpt.serve")


def clients() -> Worker:
    return Worker([sys.executable, str(HERE / "http_load.py")])


def engine_worker(arguments: argparse.Namespace) -> None:
    """The engine without HTTP. A line {"bodies"} on stdin; seconds and tokens go to stdout as JSON."""
    from jaxgpt.parallel.accelerator import keep_freed_memory

    keep_freed_memory()  # as the server does
    from jaxgpt.inference.decoder import build_decoder
    from jaxgpt.inference.engine import Engine, Request
    from jaxgpt.inference.sampling import SamplingOptions
    from jaxgpt.parallel.compiler import use_compilation_cache
    from jaxgpt.training.models import load_model

    model = load_model(arguments.checkpoint)
    use_compilation_cache(model.config.train.compilation_cache_dir)
    config, tokenizer, rows = model.config.model, model.tokenizer, arguments.slots
    kind = arguments.weights
    decoder = build_decoder(config, model.vocab_size, model.params, tokenizer.end_of_text, kind, rows)
    engine = Engine(decoder, arguments.slots, arguments.chunk, queue=100_000)
    rules = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)  # those of /v1/completions
    for line in sys.stdin:
        asked = []
        tokens, ended = [], threading.Semaphore(0)

        def deliver(piece, tokens=tokens, ended=ended) -> None:
            tokens.append(len(piece.tokens))
            if piece.finish_reason:
                ended.release()

        for body in json.loads(line)["bodies"]:
            options = SamplingOptions(max_new_tokens=body["max_tokens"], seed=body["seed"], **rules)
            asked.append((engine.check(Request(tokenizer.encode(body["prompt"]), options)), deliver))
        began = time.perf_counter()
        engine.submit(asked)
        for _ in asked:
            ended.acquire()
        print(json.dumps({"seconds": time.perf_counter() - began, "tokens": sum(tokens)}), flush=True)


# ---------------------------------------------------------------- figures


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def both(seconds: list[float]) -> str:
    return f"{1e3 * percentile(seconds, 0.5):.1f} / {1e3 * percentile(seconds, 0.99):.1f}"


def verdict(name: str, measured: str, asked: str, is_met: bool) -> None:
    print(f"| {name} | {measured} | {asked} | {'yes' if is_met else 'NO'} |", flush=True)


def table(*names: str) -> None:
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names), flush=True)


def tokens_of(done: dict) -> int:
    """Tokens of all answers; every one must have come."""
    wrong = {answer[0] for answer in done["answers"]} - {200}
    if wrong:
        raise SystemExit(f"the server answered with {wrong}")
    return sum(answer[4] for answer in done["answers"])


# ---------------------------------------------------------------- load


def load(arguments: argparse.Namespace, folder: Path) -> None:
    options = ["--checkpoint", arguments.checkpoint, "--slots", str(arguments.slots), "--chunk", str(arguments.chunk)]
    options += ["--weights", arguments.weights] if arguments.weights else []
    bodies = draw_bodies(arguments.requests, arguments.new)
    kinds = {"stream": [body | STREAMED for body in bodies], "whole": bodies}
    rates: dict = {"engine": []} | {(kind, count): [] for kind in kinds for count in CLIENTS}
    answers: dict[tuple, list[list]] = {key: [] for key in rates if key != "engine"}
    same = True
    with (
        Worker([sys.executable, __file__, "engine", *options]) as engine,
        our_server(arguments.checkpoint, arguments, folder) as server,
        clients() as load,
    ):
        for number in range(arguments.rounds + 1):
            offline = engine.ask({"bodies": bodies})
            rates["engine"].append(offline["tokens"] / offline["seconds"])
            for count in reversed(CLIENTS):  # the largest right after the engine, which it is compared with
                for kind, asked in kinds.items():
                    if not number and count != FULL:
                        continue
                    some = asked[: 32 * count]
                    job = {"port": server.port, "path": "/v1/completions", "bodies": some}
                    done = load.ask(job | {"clients": count, "count": len(some)})
                    tokens = tokens_of(done)
                    same &= len(some) < len(bodies) or tokens == offline["tokens"]
                    rates[kind, count].append(tokens / done["seconds"])
                    answers[kind, count] += done["answers"]
            if not number:  # the first round only warms up
                for made in (*rates.values(), *answers.values()):
                    made.clear()
    report_load(arguments, rates, answers, same)


def report_load(arguments: argparse.Namespace, rates: dict, answers: dict, same: bool) -> None:
    middle = {key: statistics.median(values) for key, values in rates.items()}
    shares = {key: statistics.median(a / b for a, b in zip(rates[key], rates["engine"])) for key in answers}
    table("answers", "clients", "tokens/s", "of the engine's", "lowest to highest", "first token p50 / p99, ms",
          "per token p50 / p99, ms", "whole answer p50 / p99, ms")  # fmt: skip
    spread = lambda values: f"{min(values):,.0f} to {max(values):,.0f}"
    print(f"| engine, no HTTP | | {middle['engine']:,.0f} | 1 | {spread(rates['engine'])} | | | |")
    for (kind, count), made in answers.items():
        whole = [end - sent for _, sent, _, end, _ in made]
        first = [first - sent for _, sent, first, _, _ in made]
        later = [(end - first) / (n - arguments.chunk) for _, _, first, end, n in made if n > arguments.chunk]
        columns = f"{both(first)} | {both(later)}" if kind == "stream" else "|"
        key = (kind, count)
        print(
            f"| {kind} | {count} | {middle[key]:,.0f} | {shares[key]:.2f} | {spread(rates[key])} | {columns} | "
            f"{both(whole)} |"
        )
    table("figure", "measured", "asked", "met")
    for kind in ("stream", "whole"):
        times = statistics.median(a / b for a, b in zip(rates[kind, 16], rates[kind, 1]))
        verdict(f"16 clients / one, {kind}", f"{times:.1f}", ">= 3", times >= 3)
    for kind in ("stream", "whole"):
        share = shares[kind, FULL]
        verdict(f"server / engine, {FULL} clients, {kind}", f"{share:.2f}", ">= 0.90", share >= 0.9)
    verdict("as many tokens as the engine made", "yes" if same else "no", "yes", same)


# ---------------------------------------------------------------- peer


def write_model(folder: Path) -> None:
    """124M random weights as a Hugging Face folder, with a tokenizer that has a token for each word."""
    import jax

    from jaxgpt.data.tokenizer import train_bpe
    from jaxgpt.model import gpt2
    from jaxgpt.settings import ModelConfig
    from jaxgpt.training.models import write_huggingface

    config, vocabulary = ModelConfig(n_layer=12, n_head=12, n_embd=768, n_positions=1024, dtype="float32"), 50257
    params = jax.jit(gpt2.init_params, static_argnums=(0, 1))(config, vocabulary, jax.random.key(0))
    write_huggingface(folder, config, vocabulary, params, train_bpe([" ".join(["", *WORDS]) * 20], 1000))


def peer(arguments: argparse.Namespace, folder: Path) -> None:
    model = Path(arguments.scratch or folder) / "gpt2-124M-random"
    if not model.is_dir():
        model.parent.mkdir(parents=True, exist_ok=True)
        # in a process of its own, whose memory is given back
        subprocess.run([sys.executable, __file__, "write", str(model)], check=True)
    draw = random.Random(1)
    bodies = [{"prompt": " " + " ".join(draw.choices(WORDS, k=32)), "max_new_tokens": 32} for _ in range(64)]
    flask = [arguments.peer_python, str(HERE / "flask_server.py"), str(model), "PORT"]
    per_client = {"jaxgpt": 1 if arguments.quick else 4, "Flask": 1}  # the peer takes ten times as long
    rates: dict[str, list[float]] = {side: [] for side in per_client}
    whole: dict[str, list[float]] = {side: [] for side in per_client}
    with our_server(str(model), arguments, folder) as ours, Server(flask, folder, "Flask") as theirs, clients() as load:
        for number in range(arguments.rounds + 1):
            for side, server in (("jaxgpt", ours), ("Flask", theirs)):
                count = 16 * per_client[side] if number else 4  # the first round only warms up
                job = {"port": server.port, "path": "/generate", "bodies": bodies, "clients": 16, "count": count}
                done = load.ask(job)
                tokens = tokens_of(done)
                if number:
                    rates[side].append(tokens / done["seconds"])
                    whole[side] += [end - sent for _, sent, _, end, _ in done["answers"]]
    table("server", "tokens/s", "lowest to highest", "answer p50 / p99, ms")
    for side, values in rates.items():
        spread = f"{min(values):,.1f} to {max(values):,.1f}"
        print(f"| {side} | {statistics.median(values):,.1f} | {spread} | {both(whole[side])} |")
    table("figure", "measured", "asked", "met")
    times = statistics.median(a / b for a, b in zip(rates["jaxgpt"], rates["Flask"]))
    verdict("16 clients, tokens/s to the tutorial's", f"{times:.1f}", ">= 10", times >= 10)


# ---------------------------------------------------------------- overload


class Watch:
    """Asks for /health and the memory of a server ten times a second, until it is told to stop."""

    def __init__(self, server: Server):
        self.health: list[tuple[int, float]] = []
        self.memory: list[int] = []
        self._server, self._stop = server, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self.health.append(self._server.get("/health"))
            self.memory.append(self._server.memory())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def overload(arguments: argparse.Namespace, folder: Path) -> None:
    bodies = draw_bodies(2000, arguments.new)
    with our_server(arguments.checkpoint, arguments, folder) as server, clients() as load:
        job = {"port": server.port, "path": "/v1/completions", "bodies": bodies}
        load.ask(job | {"clients": FULL, "seconds": arguments.seconds / 12})  # warms up
        full = load.ask(job | {"clients": FULL, "seconds": arguments.seconds / 4})
        tokens_of(full)
        rate = len(full["answers"]) / full["seconds"]
        before, watch = server.memory(), Watch(server)
        much = load.ask(job | {"rate": TIMES_TOO_MUCH * rate, "seconds": arguments.seconds})
        watch.stop()
        after = load.ask(job | {"clients": FULL, "seconds": arguments.seconds / 12})
        refusal = refused_with(server, bodies[0])
    report_overload(full, much, after, watch, before, refusal)


def refused_with(server: Server, body: dict) -> str | None:
    """The Retry-After of a refusal, from a queue that is filled for this."""
    text = json.dumps(body | {"prompt": [body["prompt"]] * QUEUE})
    found: list[str | None] = []

    def ask() -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
            connection.request("POST", "/v1/completions", text)
            response = connection.getresponse()
            response.read()
            if response.status == 429:
                found.append(response.getheader("Retry-After"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found[0] if found else None


def report_overload(full: dict, much: dict, after: dict, watch: Watch, before: int, refusal) -> None:
    of = lambda done, status: [end - sent for code, sent, _, end, _ in done["answers"] if code == status]
    table("phase", "requests/s", "answered/s", "answer p50 / p99, ms", "429 p50 / p99, ms", "others", "tokens/s")
    for name, done in (("full load", full), ("overload", much), ("full load, after", after)):
        good, refused = of(done, 200), of(done, 429)
        others = len(done["answers"]) - len(good) - len(refused)
        tokens = sum(answer[4] for answer in done["answers"]) / done["seconds"]
        rates = f"{len(done['answers']) / done['seconds']:,.1f} | {len(good) / done['seconds']:,.1f}"
        print(f"| {name} | {rates} | {both(good)} | {both(refused) if refused else ''} | {others} | {tokens:,.0f} |")
    print(f"\nThe generator was {1e3 * much['late']:.1f} ms behind its plan (p99).")
    table("figure", "measured", "asked", "met")
    refused, good = of(much, 429), of(much, 200)
    slow = percentile(refused, 0.99) if refused else 0.0
    verdict("429 p99", f"{1e3 * slow:.1f} ms", "<= 50 ms", bool(refused) and slow <= 0.05)
    others = collections.Counter(answer[0] for answer in much["answers"] if answer[0] not in (200, 429))
    verdict("neither answered nor refused with 429", str(dict(others) or 0), "0", not others)
    verdict("Retry-After of a refusal", str(refusal), "there", refusal is not None)
    ratio = percentile(good, 0.99) / percentile(of(full, 200), 0.99)
    verdict("answers' p99 to full load's", f"{ratio:.2f}", "<= 2", ratio <= 2)
    slowest, healthy = max(seconds for _, seconds in watch.health), all(code == 200 for code, _ in watch.health)
    verdict(
        f"/health, slowest of {len(watch.health)}", f"{1e3 * slowest:.1f} ms", "<= 100 ms", healthy and slowest <= 0.1
    )
    early, late = watch.memory[len(watch.memory) // 6], watch.memory[-1]
    shown = f"{(late - early) / 2**20:+.1f} MB ({before / 2**20:,.0f} before, {late / 2**20:,.0f} at the end)"
    verdict("memory", shown, f"<= {FLAT_BYTES >> 20} MB", late - early <= FLAT_BYTES)


# ---------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("mode", choices=["load", "peer", "overload", "engine", "write"])
    flags.add_argument("folder", nargs="?", help=argparse.SUPPRESS)
    flags.add_argument("--checkpoint", metavar="WHERE", help="what load and overload serve")
    flags.add_argument("--scratch", metavar="DIR", help="where peer keeps its model [a temporary folder]")
    flags.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="one that has torch and flask")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--requests", type=int, default=512, help="of a round of load")
    flags.add_argument("--new", type=int, default=64, help="tokens of an answer, on average")
    flags.add_argument("--seconds", type=float, default=60.0, help="of overload")
    flags.add_argument("--slots", type=int, default=16)
    flags.add_argument("--chunk", type=int, default=8)
    flags.add_argument("--weights", choices=["float32", "bfloat16", "int8"])
    flags.add_argument("--quick", action="store_true", help="only to try: few rounds, seconds and requests")
    return flags


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started ends, too
    arguments = parser().parse_args()
    if arguments.mode == "engine":
        return engine_worker(arguments)
    if arguments.mode == "write":
        return write_model(Path(arguments.folder))
    if arguments.mode != "peer" and not arguments.checkpoint:
        raise SystemExit(f"{arguments.mode} needs --checkpoint")
    if arguments.quick:
        arguments.rounds, arguments.requests, arguments.seconds = 1, 128, 12.0
    load_now = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    names = ["jax", "fastapi", "uvicorn"] + (["torch", "transformers", "flask"] if arguments.mode == "peer" else [])
    versions = [f"Python {platform.python_version()}"] + [f"{n} {importlib.metadata.version(n)}" for n in names]
    print(f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} cores, load {load_now}; {', '.join(versions)}")
    print(f"python benchmarks/serve.py {' '.join(sys.argv[1:])}")
    with tempfile.TemporaryDirectory() as folder:
        {"load": load, "peer": peer, "overload": overload}[arguments.mode](arguments, Path(folder))


if __name__ == "__main__":
    main()
