"""WikiText-2 and WikiText-103 as EleutherAI's lm-evaluation-harness 0.4 scores them.

The file has spaces between its words and signs ("it 's 1 @,@ 000 ."), which no model has learned: a page is scored as
it would have been written. The result is given per word and per byte of the text in the file, so it does not depend on
the tokenizer. Each page is scored by itself, in windows that do not overlap.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation.scoring import Score, ScoringRequest

NAME = "wikitext"

_PLAIN = (("s '", "s'"), *((f" @{sign}@ ", sign) for sign in "-,."), *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"))
"""(in the file, as it is written), in the order of replacement: possessives, numbers, punctuation."""
_ENCLOSED = [("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")]
_HEADINGS = [("= = = =", "===="), ("= = =", "==="), ("= =", "==")]
_LAST = [*_HEADINGS, (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]


def detokenize(page: str) -> str:
    """The page as it would have been written, by the harness's rules."""
    for old, new in _PLAIN:
        page = page.replace(old, new)
    for left, right in _ENCLOSED:  # no space within brackets and quotation marks
        inside = rf"({re.escape(left)})\s*([^{re.escape(right)}]*?)\s*({re.escape(right)})"
        page = re.sub(inside, r"\1\2\3", page)
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

    def requests(self, tokenizer: Tokenizer, block_size: int) -> list[ScoringRequest]:
        """Requests that score every token of every page once."""
        try:
            encoded = [tokenizer.encode(detokenize(page)) for page in self.pages]
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from None
        return [request for tokens in encoded for request in rolling(tokens, tokenizer.end_of_text, block_size)]

    def results(self, scores: Sequence[Score]) -> dict[str, object]:
        """{"task", "questions", "cut", "word_perplexity", ...} from the scores of all requests."""
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


def rolling(tokens: Sequence[int], end_of_text: int, block_size: int) -> Iterator[ScoringRequest]:
    """Windows that score each token once.

    All but the last hold `block_size` targets after one token of context. The last one scores what is left, with as
    much context as the model can read.
    """
    whole = [end_of_text, *tokens]
    for first in range(1, len(whole), block_size):
        last = min(first + block_size, len(whole))
        begin = min(first - 1, max(last - 1 - block_size, 0))
        yield ScoringRequest(whole[begin:first], whole[first:last])


def read_pages(file: Path) -> Pages:
    """The pages of the original file (wiki.test.raw), cut at its top headings, or of a JSONL file of {"page": ...}."""
    text = read_text(file, str(file))
    cut = _jsonl_pages if file.suffix in (".jsonl", ".json") else _raw_pages
    pages = [page for page in cut(text, file) if page.strip()]
    if not pages:
        raise UserError(f"{file}: no page in it")
    return Pages(pages, str(file))


def read_text(file: Path, where: str) -> str:
    """The content of a UTF-8 file; UserError begins with `where`."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; convert it") from None


def _raw_pages(text: str, file: Path) -> Iterator[str]:
    page: list[str] = []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):  # " = Robert Boulter = ", but not " = = Career = = "
            yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)


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
