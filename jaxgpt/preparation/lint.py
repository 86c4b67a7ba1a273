"""Checks prepared conversations before the first step, and shows which of their tokens are learned.

Most failed fine-tunings of a chat model fail here, silently: nothing is supervised, or the user's words are, or no
answer ends in the token that should stop it. Three conversations with the learned tokens marked show it at a glance.
"""

import collections
import dataclasses
from typing import NamedTuple

import numpy as np

from jaxgpt.data.chat import BRACKETS, marked, marks, pieces
from jaxgpt.data.dataset import PackedRows, TokenDataset
from jaxgpt.data.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation.preparation_report import read, round_trip_line

MOST_ROWS = 5000  # two seconds; of more rows, this many are read, evenly spread
_EXAMPLES = 3
_LONGEST = 1500  # characters of an example


class Example(NamedTuple):
    """A conversation, or a text among them, to show."""

    document: int  # its number in the data, from 0
    pieces: list[tuple[str, bool]]  # (text, whether it is learned), one after another
    is_text: bool = False


@dataclasses.dataclass
class Lint:
    """Counts and examples of the training conversations that were read."""

    num_rows: int
    rows_read: int
    num_tokens: int = 0
    num_supervised: int = 0
    num_conversations: int = 0  # packed parts; a conversation that was cut gives several
    num_documents: int = 0
    num_texts: int = 0  # documents of text among the conversations
    num_in_parts: int = 0  # documents with several parts: cut between two turns, or with changed copies
    empty_turns: int = 0
    duplicate_turns: int = 0  # they repeat an earlier one of the same conversation and role
    without_answer: int = 0  # conversations without learned tokens
    changed_text: str | None = None  # what the tokenizer loses of the text
    examples: list[Example] = dataclasses.field(default_factory=list)


def check(dataset: TokenDataset) -> Lint:
    """Check the training rows of a dataset of conversations, at most MOST_ROWS of them.

    Raises:
        UserError: an answer does not end in the end-of-turn token, or the tokenizer has none; names the conversation.
    """
    rows, tokenizer = dataset.train, dataset.tokenizer
    assert isinstance(rows, PackedRows)
    start, end = tokenizer.backend.token_to_id(START_OF_TURN), tokenizer.end_of_turn
    if end is None:
        raise UserError(f"{dataset.path}: {tokenizer.why_no_chat}, so no answer would stop; prepare again")
    numbers = np.unique(np.linspace(0, rows.num_rows - 1, min(rows.num_rows, MOST_ROWS)).astype(int)).tolist()
    lint = Lint(rows.num_rows, len(numbers), changed_text=round_trip_line(read(dataset.path)))
    shown = {numbers[len(numbers) * place // _EXAMPLES] for place in range(_EXAMPLES)} if numbers else set()
    counts, texts = collections.Counter[int](), set[int]()
    for number in numbers:
        for place, (document, tokens, supervised) in enumerate(rows.row(number).conversations()):
            last = supervised & ~np.append(supervised[1:], False)
            is_text = bool(supervised[0])  # a conversation begins with a question
            if not is_text and (tokens[last] != end).any():
                raise UserError(
                    f"{dataset.path}: conversation {document + 1}: an answer does not end in "
                    f"{tokenizer.decode([end])}, so a model would not learn to stop; prepare again"
                )
            supervised[0] = False  # it follows no token, so it is no target
            lint.num_tokens += len(tokens)
            lint.num_supervised += int(supervised.sum())
            if is_text:
                texts.add(document)
            else:
                counts[document] += 1
                _count(lint, tokens, supervised, start, tokenizer)
            if place == 0 and number in shown:
                lint.examples.append(Example(document, pieces(tokens, supervised, tokenizer), is_text))
    lint.num_documents, lint.num_texts = len(counts), len(texts)
    lint.num_in_parts = sum(count > 1 for count in counts.values())
    return lint


def show(lint: Lint, colour: bool | None = None) -> str:
    """The report: examples, then counts. Learned text is green with `colour`, else between [[ and ]]; see `marks`."""
    between = marks(colour)
    how = "[[marked]]" if between == BRACKETS else "green"
    lines = [f"conversations as they are learned (what is learned is {how}):"]
    for example in lint.examples:
        kind = "text" if example.is_text else "conversation"
        lines += [f"--- {kind} {example.document + 1}", marked(example.pieces, between, _LONGEST)]
    share = lint.num_supervised / max(lint.num_tokens, 1)
    looked = "all" if lint.rows_read == lint.num_rows else f"{lint.rows_read:,} of {lint.num_rows:,}"
    parts = f"{lint.num_conversations:,} pieces of {lint.num_documents:,} conversations"
    parts += f", {lint.num_texts:,} texts" if lint.num_texts else ""
    lines += [
        f"--- {looked} rows, {parts}, {lint.num_tokens:,} tokens",
        f"  learned tokens       {lint.num_supervised:,} ({share:.1%})",
        f"  in several pieces    {lint.num_in_parts:,} (longer than a block and cut between two turns, or with copies)",
        f"  empty turns          {lint.empty_turns:,}",
        f"  repeated turns       {lint.duplicate_turns:,}",
    ]
    if lint.without_answer:
        lines.append(f"  warning: {lint.without_answer:,} of them have nothing to learn")
    if lint.changed_text:
        lines.append(f"  warning: {lint.changed_text}")
    return "\n".join(lines)


def _count(lint: Lint, tokens: np.ndarray, supervised: np.ndarray, start: int | None, tokenizer: Tokenizer) -> None:
    lint.num_conversations += 1
    lint.without_answer += not supervised.any()
    if start is None or tokenizer.own_template is not None:  # where turns begin, only our template says
        return
    turns = [turn for turn in np.split(tokens, np.flatnonzero(tokens == start)) if len(turn)]
    lint.duplicate_turns += len(turns) - len({turn.tobytes() for turn in turns})
    for turn in turns:
        if len(turn) < 16:  # a longer turn is not empty, so it need not be decoded
            content = tokenizer.decode(turn).partition("\n")[2].removesuffix("\n").removesuffix(END_OF_TURN)
            lint.empty_turns += not content.strip()
