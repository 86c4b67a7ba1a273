"""WikiText-2 and WikiText-103 as EleutherAI's lm-evaluation-harness 0.4 scores them.

The file's text is taken apart at spaces ("it 's 1 @,@ 000 ."), which no model has learned: it is scored as it would
have been written, and the result is told a word and a byte of the text as it stands in the file, so that it does not
depend on the tokenizer. Each page is scored by itself, in windows that do not overlap.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation.scoring import Request, Score

NAME = "wikitext"

_PLAIN = (
    [("s '", "s'")],
    [(f" @{sign}@ ", sign) for sign in "-,."],
    [(f" {sign} ", f"{sign} ") for sign in ":;.!?,"],
)
"""What stands in the text and what is written for it, in this order: possessives, numbers, punctuation."""
_ENCLOSED = [("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")]
_LAST = [
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def detokenize(page: str) -> str:
    """A page as it would have been written, by the harness's rules."""
    for old, new in (pair for group in _PLAIN for pair in group):
        page = page.replace(old, new)
    for left, right in _ENCLOSED:  # no space within brackets and quotation marks
        inside = rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"
        page = re.sub(inside, lambda found, left=left, right=right: left + found[1] + right, page)
    for old, new in _LAST:
        page = page.replace(old, new)
    return page


@dataclasses.dataclass(frozen=True)
class Pages:
    """A task whose questions are whole pages."""

    pages: list[str]
    """As they stand in the file."""
    source: str = ""
    name: str = NAME

    def first(self, count: int) -> "Pages":
        return dataclasses.replace(self, pages=self.pages[:count])

    def requests(self, tokenizer: Tokenizer, block_size: int) -> list[Request]:
        """What is to be scored: every token of every page once."""
        encoded = (tokenizer.encode(detokenize(page)) for page in self.pages)
        return [request for tokens in encoded for request in rolling(tokens, tokenizer.end_of_text, block_size)]

    def results(self, scores: Sequence[Score]) -> dict[str, object]:
        """{"task", "questions", "cut", "word_perplexity", ...}: `scores` are those of all requests."""
        logprob = math.fsum(score.logprob for score in scores)
        words = sum(len(re.split(r"\s+", page)) for page in self.pages)
        num_bytes = sum(len(page.encode()) for page in self.pages)
        return {
            "task": self.name,
            "questions": len(self.pages),
            "cut": sum(score.cut > 0 for score in scores),
            "word_perplexity": math.exp(min(-logprob / words, 700.0)),  # exp(710) overflows a float64
            "byte_perplexity": math.exp(-logprob / num_bytes),
            "bits_per_byte": -logprob / num_bytes / math.log(2),
            "source": self.source,
        }


def rolling(tokens: Sequence[int], end_of_text: int, block_size: int) -> Iterator[Request]:
    """Windows that score each token once. All but the last hold `block_size` targets after one token of context; the
    last begins earlier than it must, so that the model reads as much as it can, and scores what is left."""
    whole = [end_of_text, *tokens]
    for first in range(1, len(whole), block_size):
        last = min(first + block_size, len(whole))
        begin = min(first - 1, max(last - 1 - block_size, 0))
        yield Request(whole[begin:first], whole[first:last])


def read_pages(file: Path) -> Pages:
    """The pages of the original file (wiki.test.raw), cut at its top headings, or of a JSONL file of {"page": "..."}.

    Raises:
        UserError: no such file, not text, no page in it; names the line.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert it") from None
    jsonl = file.suffix in (".jsonl", ".json")
    pages = [page for page in (_jsonl_pages if jsonl else _raw_pages)(text, file) if page.strip()]
    if not pages:
        raise UserError(f"{file}: no page in it")
    return Pages(pages, str(file))


def _raw_pages(text: str, file: Path) -> Iterator[str]:
    page: list[str] = []
    for line in text.split("\n"):
        if _is_title(line):
            yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)


def _is_title(line: str) -> bool:
    """ " = Robert Boulter = ", and not " = = Career = = "."""
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def _jsonl_pages(text: str, file: Path) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            page = json.loads(line)["page"]
        except (ValueError, KeyError, TypeError, IndexError):
            page = None
        if not isinstance(page, str):
            raise UserError(f'{file}:{number}: not an object with a text "page"')
        yield page
