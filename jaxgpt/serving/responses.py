"""Answers in the shape that clients expect: OpenAI's completions and chats, whole or as chunks, and `generate`'s.

A whole answer is its chunks put together, so the two cannot differ.
"""

import secrets
import time
from collections.abc import Sequence

from jaxgpt.inference.engine import Tokens
from jaxgpt.inference.text import TextStream, token_bytes
from jaxgpt.serving.generated_texts import Part
from jaxgpt.serving.requests import Work
from jaxgpt.serving.served_model import Served

LOWEST_LOGPROB = -9999.0  # of a token that cannot come: JSON has no infinity


class Completions:
    """https://platform.openai.com/docs/api-reference/completions/object"""

    def __init__(self, served: Served, work: Work):
        self._served, self._work = served, work
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
        self._head["model"] = served.name
        self._begun: set[int] = set()

    def chunks(self, part: Part) -> list[dict]:
        return [self._head | {"choices": [self._choice(part)]} | _no_usage(self._work)]

    def last_chunk(self, usage: dict) -> dict:
        return self._head | {"choices": [], "usage": usage}

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
        prompt = self._work.requests[part.index].prompt if self._work.echo else []
        before = self._served.tokenizer.decode(prompt)
        logprobs = None
        if self._work.tells_logprobs:
            logprobs = self._logprobs(part.told, [len(before) + offset for offset in part.offsets])
            if part.prompt is not None:
                own = self._logprobs(part.prompt, _offsets(self._served, part.prompt.tokens))
                logprobs = {name: own[name] + logprobs[name] for name in own}
        if begins:
            text = before + text
        return {"index": part.index, "text": text, "finish_reason": part.finish_reason, "logprobs": logprobs}

    def _logprobs(self, told: Tokens, offsets: list[int]) -> dict[str, list]:
        name = self._served.token_name
        places = zip(told.tokens, told.logprobs, told.alternatives or [[]] * len(told.tokens))
        top = [None if logprob is None else self._top(token, logprob, others) for token, logprob, others in places]
        return {
            "tokens": [name(token) for token in told.tokens],
            "token_logprobs": [_finite(logprob) for logprob in told.logprobs],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _top(self, token: int, logprob: float, others: list[tuple[int, float]]) -> dict[str, float]:
        """{name: log-probability} of the likeliest tokens and of the chosen one; of two of one name the likelier."""
        found: dict[str, float] = {}
        for one, value in [*others, (token, logprob)]:
            found.setdefault(self._served.token_name(one), _finite(value))
        return found


class Chats:
    """https://platform.openai.com/docs/api-reference/chat/object"""

    def __init__(self, served: Served, work: Work):
        self._served, self._work = served, work
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": served.name}
        self._begun: set[int] = set()

    def chunks(self, part: Part) -> list[dict]:
        made = []
        if part.index not in self._begun:
            self._begun.add(part.index)
            made.append(self._chunk(part.index, {"role": "assistant", "content": ""}))
        if part.text or part.told.tokens:
            made.append(self._chunk(part.index, {"content": part.text}, self._logprobs(part.told)))
        if part.finish_reason:
            made.append(self._chunk(part.index, {}, None, part.finish_reason))
        return made

    def _chunk(self, index: int, delta: dict, logprobs: dict | None = None, finish_reason: str | None = None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]} | _no_usage(self._work)

    def last_chunk(self, usage: dict) -> dict:
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage}

    def whole(self, parts: Sequence[Part], usage: dict) -> dict:
        choices = []
        for index in range(len(self._work.requests)):
            own = [part for part in parts if part.index == index]
            told = [place for part in own for place in (self._logprobs(part.told) or {"content": []})["content"]]
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": "".join(part.text for part in own), "refusal": None},
                    "logprobs": {"content": told, "refusal": None} if self._work.tells_logprobs else None,
                    "finish_reason": own[-1].finish_reason,
                }
            )
        return self._head | {"object": "chat.completion", "choices": choices, "usage": usage}

    def _logprobs(self, told: Tokens) -> dict | None:
        if not self._work.tells_logprobs:
            return None
        places = zip(told.tokens, told.logprobs, told.alternatives or [[]] * len(told.tokens))
        content = [
            self._place(token, logprob) | {"top_logprobs": [self._place(*other) for other in others]}
            for token, logprob, others in places
        ]
        return {"content": content, "refusal": None}

    def _place(self, token: int, logprob: float) -> dict:
        written = token_bytes(self._served.tokenizer, token)
        return {"token": self._served.token_name(token), "logprob": _finite(logprob), "bytes": list(written)}


class Generated:
    """`generated_text`, as Hugging Face's text-generation pipeline has it: the prompt and what comes after."""

    def __init__(self, served: Served, work: Work, prompt: str):
        self._work, self._prompt = work, prompt

    def whole(self, parts: Sequence[Part], usage: dict) -> dict:
        texts = []
        for index in range(len(self._work.requests)):
            own = [part for part in parts if part.index == index]
            text = self._prompt + "".join(part.text for part in own)
            texts.append({"generated_text": text, "finish_reason": own[-1].finish_reason})
        return {"generated_text": texts[0]["generated_text"], "sequences": texts, "usage": usage}


def _no_usage(work: Work) -> dict:
    """Where usage was asked for, every chunk but the last says that it is not known yet."""
    return {"usage": None} if work.include_usage else {}


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None else max(logprob, LOWEST_LOGPROB)


def _offsets(served: Served, tokens: Sequence[int]) -> list[int]:
    """Where each token's text begins in the text of all."""
    stream, length, offsets = TextStream(served.tokenizer), 0, []
    for token in tokens:
        offsets.append(length)
        length += len(stream.add([token]))
    return offsets
