"""Figures for Prometheus. Names follow vLLM's, with jaxgpt_ before them; times are in seconds."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from jaxgpt.serving.served_model import Served

FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The figures of one server."""

    def __init__(self, served: Served):
        self._registry = CollectorRegistry()  # one a server: the library's own is global
        own = dict(registry=self._registry)
        self.requests = Counter("jaxgpt_requests", "Requests answered", ["route", "status"], **own)
        self.prompt_tokens = Counter("jaxgpt_prompt_tokens", "Tokens of accepted prompts", **own)
        self.new_tokens = Counter("jaxgpt_generation_tokens", "Tokens of finished answers", **own)
        self.disconnects = Counter("jaxgpt_client_disconnects", "Clients that left before the end", **own)
        self.first_token = Histogram(
            "jaxgpt_time_to_first_token_seconds", "From the request to its first token", buckets=FIRST_TOKEN, **own
        )
        self.token = Histogram(
            "jaxgpt_time_per_output_token_seconds", "Between tokens, after the first", buckets=TOKEN, **own
        )
        self.whole = Histogram("jaxgpt_request_seconds", "Whole requests", ["route"], buckets=WHOLE, **own)

        def gauge(name: str, text: str, value) -> None:
            Gauge(name, text, **own).set_function(lambda: 0 if served.engine is None else value(served.engine))

        gauge("jaxgpt_requests_waiting", "Texts that wait for a slot", lambda engine: engine.waiting)
        gauge("jaxgpt_requests_running", "Texts that have a slot", lambda engine: engine.running)
        gauge("jaxgpt_slots", "Texts that can be made at once", lambda engine: engine.slots)
        gauge("jaxgpt_batch_fill_ratio", "Slots in use / slots", lambda engine: engine.running / engine.slots)
        gauge("jaxgpt_engine_tokens", "Tokens the engine has made", lambda engine: engine.tokens)
        info = Gauge("jaxgpt_model_info", "The model that is served", ["model", "step"], **own)
        info.labels(served.name, served.step).set(1)

    def text(self) -> tuple[bytes, str]:
        """(the page, its content type)."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
