"""The bodies of responses: OpenAI's completions and chats, whole or as chunks, and those of /generate.

A whole answer consists of its chunks, so the two cannot differ.
"""

import itertools
import secrets
import time
from collections.abc import Sequence

from jaxgpt.inference.engine import Tokens
from jaxgpt.inference.prompts import token_bytes
from jaxgpt.inference.text import TextStream
from jaxgpt.serving.generated_texts import Part
from jaxgpt.serving.requests import GenerationRequest
from jaxgpt.serving.served_model import ServedModel

LOWEST_LOGPROB = -9999.0  # for an impossible token: JSON has no infinity


class _Answer:
    """The common parts of completions and chats."""

    prefix: str
    chunk_object: str

    def __init__(self, model: ServedModel, asked: GenerationRequest):
        self._model, self._asked = model, asked
        name, created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self._head = {"id": name, "object": self.chunk_object, "created": created, "model": model.name}
        self._begun: set[int] = set()

    def last_chunk(self, usage: dict[str, int]) -> dict:
        return self._head | {"choices": [], "usage": usage}

    def _chunk(self, choice: dict) -> dict:
        """If usage was asked for, every chunk but the last says that it is not known yet."""
        return self._head | {"choices": [choice]} | ({"usage": None} if self._asked.include_usage else {})


class Completions(_Answer):
    """https://platform.openai.com/docs/api-reference/completions/object"""

    prefix, chunk_object = "cmpl", "text_completion"

    def chunks(self, part: Part) -> list[dict]:
        return [self._chunk(self._choice(part))]

    def whole(self, parts: Sequence[Part], usage: dict) -> dict:
        choices: dict[int, dict] = {}
        for part in parts:
            new = self._choice(part)
            old = choices.setdefault(part.index, new)
            if old is not new:
                old["text"] += new["text"]
                old["finish_reason"] = new["finish_reason"]
                for name, values in (new["logprobs"] or {}).items():
                    old["logprobs"][name] += values
        return self._head | {"choices": [choices[index] for index in sorted(choices)], "usage": usage}

    def _choice(self, part: Part) -> dict:
        text, begins = part.text, part.index not in self._begun
        self._begun.add(part.index)
        prompt = self._asked.requests[part.index].prompt if self._asked.echo else []
        before = self._model.tokenizer.decode(prompt)
        logprobs = None
        if self._asked.wants_logprobs:
            logprobs = self._logprobs(part.new, [len(before) + offset for offset in part.offsets])
            if part.prompt is not None:
                stream = TextStream(self._model.tokenizer)
                lengths = (len(stream.add([token])) for token in part.prompt.tokens)
                own = self._logprobs(part.prompt, [*itertools.accumulate(lengths, initial=0)][:-1])
                logprobs = {name: own[name] + logprobs[name] for name in own}
        if begins:
            text = before + text
        return {"index": part.index, "text": text, "finish_reason": part.finish_reason, "logprobs": logprobs}

    def _logprobs(self, made: Tokens, offsets: list[int]) -> dict[str, list]:
        name = self._model.token_name
        places = zip(made.tokens, made.logprobs, made.alternatives or [[]] * len(made.tokens))
        top = [None if logprob is None else self._top(token, logprob, others) for token, logprob, others in places]
        return {
            "tokens": [name(token) for token in made.tokens],
            "token_logprobs": [None if logprob is None else _finite(logprob) for logprob in made.logprobs],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _top(self, token: int, logprob: float, others: list[tuple[int, float]]) -> dict[str, float]:
        """{name: log-probability} of the likeliest tokens and the chosen one; of two with one name, the likelier."""
        found: dict[str, float] = {}
        for one, value in [*others, (token, logprob)]:
            found.setdefault(self._model.token_name(one), _finite(value))
        return found


class Chats(_Answer):
    """https://platform.openai.com/docs/api-reference/chat/object"""

    prefix, chunk_object = "chatcmpl", "chat.completion.chunk"

    def chunks(self, part: Part) -> list[dict]:
        deltas: list[dict] = []
        if part.index not in self._begun:
            self._begun.add(part.index)
            deltas.append({"delta": {"role": "assistant", "content": ""}})
        if part.text or part.new.tokens:
            deltas.append({"delta": {"content": part.text}, "logprobs": self._logprobs(part.new)})
        if part.finish_reason:
            deltas.append({"delta": {}, "finish_reason": part.finish_reason})
        usual = {"index": part.index, "logprobs": None, "finish_reason": None}
        return [self._chunk(usual | delta) for delta in deltas]

    def whole(self, parts: Sequence[Part], usage: dict) -> dict:
        choices = []
        for index in range(len(self._asked.requests)):
            own = [part for part in parts if part.index == index]
            scored = [place for part in own for place in (self._logprobs(part.new) or {"content": []})["content"]]
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": "".join(part.text for part in own), "refusal": None},
                    "logprobs": {"content": scored, "refusal": None} if self._asked.wants_logprobs else None,
                    "finish_reason": own[-1].finish_reason,
                }
            )
        return self._head | {"object": "chat.completion", "choices": choices, "usage": usage}

    def _logprobs(self, made: Tokens) -> dict | None:
        if not self._asked.wants_logprobs:
            return None
        places = zip(made.tokens, made.logprobs, made.alternatives or [[]] * len(made.tokens))
        content = [
            self._place(token, logprob) | {"top_logprobs": [self._place(*other) for other in others]}
            for token, logprob, others in places
            if logprob is not None  # only a prompt's first token has none
        ]
        return {"content": content, "refusal": None}

    def _place(self, token: int, logprob: float) -> dict:
        written = token_bytes(self._model.tokenizer, token)
        return {"token": self._model.token_name(token), "logprob": _finite(logprob), "bytes": list(written)}


class Generated:
    """`generated_text`, as in Hugging Face's text-generation pipeline: the prompt and its continuation."""

    def __init__(self, asked: GenerationRequest, prompt: str):
        self._asked, self._prompt = asked, prompt

    def whole(self, parts: Sequence[Part], usage: dict) -> dict:
        texts = []
        for index in range(len(self._asked.requests)):
            own = [part for part in parts if part.index == index]
            text = self._prompt + "".join(part.text for part in own)
            texts.append({"generated_text": text, "finish_reason": own[-1].finish_reason})
        return {"generated_text": texts[0]["generated_text"], "sequences": texts, "usage": usage}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
