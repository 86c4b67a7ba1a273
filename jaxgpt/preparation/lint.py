"""A look at prepared conversations before the first step: what is learned of them, and what is odd about them.

The idea: most failed fine-tunings of a chat model fail here, silently: nothing is supervised, or the user's words
are, or no answer ends in the token that should stop it. Seeing three conversations with the learned tokens marked
shows it in a second.
"""

import collections
import dataclasses

import numpy as np

from jaxgpt.data.chat import END_OF_TURN, START_OF_TURN
from jaxgpt.data.dataset import PackedRows, TokenDataset
from jaxgpt.data.marking import BRACKETS, marked, marks, pieces
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError

MOST_ROWS = 5000  # two seconds; of more, as many that lie evenly spread
_EXAMPLES = 3
_LONGEST = 1500  # characters of an example


@dataclasses.dataclass
class Example:
    """A conversation to show."""

    document: int
    """Its number in the data, from 0."""
    pieces: list[tuple[str, bool]]
    """(text, whether it is learned), one after another."""


@dataclasses.dataclass
class Lint:
    """What was found in the training conversations that were looked at."""

    num_rows: int
    rows_read: int
    num_tokens: int = 0
    num_supervised: int = 0
    num_conversations: int = 0
    """Packed ones: a conversation that was cut is several."""
    num_documents: int = 0
    num_in_parts: int = 0
    """Documents of which there are several: cut between two turns, or with changed copies."""
    empty_turns: int = 0
    duplicate_turns: int = 0
    """Turns that say what an earlier one of the same conversation and role said."""
    without_answer: int = 0
    """Conversations of which nothing is learned."""
    examples: list[Example] = dataclasses.field(default_factory=list)


def check(dataset: TokenDataset, tokenizer: Tokenizer) -> Lint:
    """Look at the training rows of a dataset of conversations; of many, at MOST_ROWS of them.

    Raises:
        UserError: an answer does not end in the end-of-turn token, or the tokenizer has none; names the conversation.
    """
    if tokenizer.end_of_turn is None:
        raise UserError(f"{dataset.path}: its tokenizer has no {END_OF_TURN}, so no answer would stop; prepare again")
    rows: PackedRows = dataset.train
    numbers = np.unique(np.linspace(0, rows.num_rows - 1, min(rows.num_rows, MOST_ROWS)).astype(int)).tolist()
    lint = Lint(rows.num_rows, len(numbers))
    start = tokenizer.backend.token_to_id(START_OF_TURN)
    shown = {numbers[len(numbers) * place // _EXAMPLES] for place in range(_EXAMPLES)} if numbers else set()
    counts: collections.Counter[int] = collections.Counter()
    for number in numbers:
        for place, (document, tokens, supervised) in enumerate(rows.row(number).conversations()):
            _check_ends(tokens, supervised, tokenizer.end_of_turn, f"{dataset.path}: conversation {document + 1}")
            counts[document] += 1
            _count(lint, tokens, supervised, start, tokenizer)
            if place == 0 and number in shown:
                lint.examples.append(Example(document, pieces(tokens, supervised, tokenizer)))
    lint.num_documents = len(counts)
    lint.num_in_parts = sum(count > 1 for count in counts.values())
    return lint


def show(lint: Lint, colour: bool | None = None) -> str:
    """The report: examples first, then the counts. `colour` of None asks stdout, and NO_COLOR.

    The learned text is green where there is colour, and stands between [[ and ]] where not.
    """
    between = marks(colour)
    how = "[[marked]]" if between == BRACKETS else "green"
    lines = [f"conversations as they are learned (what is learned is {how}):"]
    for example in lint.examples:
        lines += [f"--- conversation {example.document + 1}", marked(example.pieces, between, _LONGEST)]
    share = lint.num_supervised / max(lint.num_tokens, 1)
    looked = "all" if lint.rows_read == lint.num_rows else f"{lint.rows_read:,} of {lint.num_rows:,}"
    parts = f"{lint.num_conversations:,} pieces of {lint.num_documents:,} conversations"
    lines += [
        f"--- {looked} rows, {parts}, {lint.num_tokens:,} tokens",
        f"  learned tokens       {lint.num_supervised:,} ({share:.1%})",
        f"  in several pieces    {lint.num_in_parts:,} (longer than a block and cut between two turns, or with copies)",
        f"  empty turns          {lint.empty_turns:,}",
        f"  repeated turns       {lint.duplicate_turns:,}",
    ]
    if lint.without_answer:
        lines.append(f"  warning: {lint.without_answer:,} of them have nothing to learn")
    return "\n".join(lines)


def _check_ends(tokens: np.ndarray, supervised: np.ndarray, end_of_turn: int, where: str) -> None:
    """Every run of supervised tokens ends in the end-of-turn token."""
    last = supervised & ~np.append(supervised[1:], False)
    if (tokens[last] != end_of_turn).any():
        raise UserError(
            f"{where}: an answer does not end in {END_OF_TURN}, so a model would not learn to stop; prepare again"
        )


def _count(lint: Lint, tokens: np.ndarray, supervised: np.ndarray, start: int, tokenizer: Tokenizer) -> None:
    lint.num_tokens += len(tokens)
    lint.num_supervised += int(supervised.sum())
    lint.num_conversations += 1
    lint.without_answer += not supervised.any()
    turns = [turn for turn in np.split(tokens, np.flatnonzero(tokens == start)) if len(turn)]
    lint.duplicate_turns += len(turns) - len({turn.tobytes() for turn in turns})
    for turn in turns:
        if len(turn) < 16:  # a longer one is not empty, and need not be decoded
            content = tokenizer.decode(turn).partition("\n")[2].removesuffix("\n").removesuffix(END_OF_TURN)
            lint.empty_turns += not content.strip()
