"""The model that is served: its name, its tokenizer, what it can, and the engine once that stands."""

import dataclasses
import time

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.inference.engine import Engine
from jaxgpt.inference.prompts import ChatPrompts
from jaxgpt.inference.text import token_bytes
from jaxgpt.serving.http_errors import ApiError, not_ready

STUCK_SECONDS = 120.0  # without one chunk, while requests are under way: longer than any chunk takes


@dataclasses.dataclass
class Served:
    """One model and where its engine stands; every request looks here first."""

    name: str
    tokenizer: Tokenizer
    n_positions: int
    parameters: int
    step: int
    system: str = ""
    """The system message of conversations that bring none of their own."""
    engine: Engine | None = None
    stopping: bool = False
    chat: ChatPrompts | None = None
    no_chat: str = ""
    """Why there is no chat."""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self._names: dict[int, str] = {}
        try:
            self.chat = ChatPrompts(self.tokenizer, self.n_positions, self.name)
        except UserError as error:
            self.no_chat = str(error)

    @property
    def state(self) -> str:
        """ "loading", "ready", "stopping" or "failed"."""
        if self.engine is not None and self.engine.failure is not None:
            return "failed"
        if self.stopping:
            return "stopping"
        return "loading" if self.engine is None else "ready"

    @property
    def is_healthy(self) -> bool:
        """Neither failed nor stuck: a server that loads or stops is healthy."""
        if self.engine is None:
            return True
        is_stuck = self.engine.running and time.monotonic() - self.engine.moved_at > STUCK_SECONDS
        return self.engine.failure is None and not is_stuck

    def ready_engine(self) -> Engine:
        """
        Raises:
            ApiError: 503 in any state but "ready".
        """
        if self.state != "ready":
            raise not_ready(self.state)
        return self.engine

    def check_name(self, name: str | None) -> None:
        """
        Raises:
            ApiError: 404 for another model's name.
        """
        if name is not None and name != self.name:
            message = f"there is no model {name[:100]!r}; this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def card(self) -> dict:
        """The model as /v1/models tells of it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "jaxgpt",
            "max_model_len": self.n_positions,
            "has_chat_template": self.chat is not None,
            "system": self.system if self.chat else "",
            "parameters": self.parameters,
            "step": self.step,
        }

    def token_name(self, token: int) -> str:
        r"""A token's text, or `bytes:\xe4\xbd` where it is a part of a character: a name for each token of its own."""
        if token not in self._names:
            written = token_bytes(self.tokenizer, token)
            try:
                self._names[token] = written.decode()
            except UnicodeDecodeError:
                self._names[token] = "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)
        return self._names[token]
