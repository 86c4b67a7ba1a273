"""Requests as rows of tokens for the network: whose context is the same share it, so that it is read once.

A row is a context and, after it, the targets of one or more requests as branches: each goes on from the context, at
the positions after it, and none sees another. The four endings of a HellaSwag question take 2.5 times fewer tokens so.

Axes in names: B rows, T positions, K targets.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

SMALLEST = 16  # positions of the smallest shape
FEWEST = 4  # targets of the smallest shape
WORTH_SHARING = 0.25  # of the tokens: branches need attention with a mask, which is slower than the plain kind


class Request(NamedTuple):
    context: Sequence[int]
    """Not empty: at least the end-of-text token."""
    target: Sequence[int]


class Member(NamedTuple):
    """A request in a row."""

    place: int
    """Its number among the requests."""
    first: int
    """Where its targets begin among the row's."""
    count: int
    cut: int
    """Tokens of the context that did not fit, at its beginning."""


class Row(NamedTuple):
    tokens: list[int]
    positions: list[int]
    branches: list[int]
    """0 for the context, then 1, 2, ...; all 0 in a row of one request, which is read from left to right."""
    targets: list[int]
    outputs: list[int]
    """At which place of the row each target is predicted."""
    members: list[Member]

    @property
    def is_shared(self) -> bool:
        return len(self.members) > 1


class RowBatch(NamedTuple):
    """Rows as arrays of few shapes. Where no context is shared, positions and branches are None."""

    tokens_BT: np.ndarray
    positions_BT: np.ndarray | None
    branches_BT: np.ndarray | None
    targets_BK: np.ndarray
    outputs_BK: np.ndarray


def batches(requests: Sequence[Request], rows: int, block_size: int) -> Iterator[tuple[RowBatch, list[Row]]]:
    """The requests in batches of `rows` rows, the longest first: neighbours in length share a batch."""
    size = lambda row: (row.is_shared, len(row.tokens), len(row.targets))
    ordered = sorted(rows_of(requests, block_size), key=size, reverse=True)
    for _, group in itertools.groupby(ordered, lambda row: row.is_shared):
        group = list(group)
        for start in range(0, len(group), rows):  # all but the last are full
            part = group[start : start + rows]
            yield _batch(part, rows, block_size), part


def rows_of(requests: Sequence[Request], block_size: int) -> Iterator[Row]:
    """The rows of requests that follow each other. A row has at most `block_size` tokens."""
    numbered = enumerate(requests)
    for context, family in itertools.groupby(numbered, lambda item: [int(token) for token in item[1].context]):
        targets = {place: [int(token) for token in request.target] for place, request in family}
        longest = len(context) - 1 + max(map(len, targets.values()))
        apart = sum(len(context) + len(target) - 1 for target in targets.values())
        saved = len(context) * (len(targets) - 1)
        if longest <= block_size and all(targets.values()) and saved >= WORTH_SHARING * apart:
            yield from _shared(context, targets, block_size)
        else:
            yield from (_alone(place, context, target, block_size) for place, target in targets.items())


def _shared(context: list[int], targets: dict[int, list[int]], block_size: int) -> Iterator[Row]:
    waiting = collections.deque(targets.items())
    while waiting:
        row = Row(list(context), list(range(len(context))), [0] * len(context), [], [], [])
        while waiting and len(row.tokens) + len(waiting[0][1]) - 1 <= block_size:
            _add_branch(row, len(context), *waiting.popleft())
        if not row.is_shared:
            row.branches[:] = [0] * len(row.branches)
        yield row


def _add_branch(row: Row, context: int, place: int, target: list[int]) -> None:
    """The first target is predicted at the end of the context, the others at the one before them."""
    begin, inputs = len(row.tokens), len(target) - 1
    row.members.append(Member(place, len(row.targets), len(target), 0))
    row.tokens.extend(target[:-1])
    row.positions.extend(range(context, context + inputs))
    row.branches.extend([len(row.members)] * inputs)
    row.targets.extend(target)
    row.outputs.extend([context - 1, *range(begin, begin + inputs)])


def _alone(place: int, context: list[int], target: list[int], block_size: int) -> Row:
    """What does not fit is cut: the beginning of the context, and of a target that is too long by itself."""
    whole = context + target
    inputs = whole[:-1][-block_size:]
    kept = target[-len(inputs) :] if len(target) > len(inputs) else target
    length = len(inputs)
    member = Member(place, 0, len(kept), len(whole) - 1 - length)
    return Row(inputs, list(range(length)), [0] * length, kept, list(range(length - len(kept), length)), [member])


def _batch(part: list[Row], rows: int, block_size: int) -> RowBatch:
    positions = _length(max(len(row.tokens) for row in part), block_size)
    targets = _targets(max(len(row.targets) for row in part))

    def filled(name: str, width: int) -> np.ndarray:
        array = np.zeros((rows, width), np.int32)
        for number, row in enumerate(part):
            values = getattr(row, name)
            array[number, : len(values)] = values
        return array

    shared = part[0].is_shared
    return RowBatch(
        filled("tokens", positions),
        filled("positions", positions) if shared else None,
        filled("branches", positions) if shared else None,
        filled("targets", targets),
        filled("outputs", targets),
    )


def _length(length: int, block_size: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: above 16, less than a third of a row is padding."""
    size = SMALLEST
    while size < length:
        size *= 2
    return min(size * 3 // 4 if length <= size * 3 // 4 and size > SMALLEST else size, block_size)


def _targets(count: int) -> int:
    """The next power of two."""
    size = FEWEST
    while size < count:
        size *= 2
    return size
