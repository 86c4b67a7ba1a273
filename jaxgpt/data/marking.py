"""Texts in which the learned tokens stand out: green on a terminal, between [[ and ]] elsewhere."""

import itertools
import os
import sys

import numpy as np

from jaxgpt.data.tokenizer import Tokenizer

COLOUR, BRACKETS = ("\033[32m", "\033[0m"), ("[[", "]]")


def marks(colour: bool | None = None) -> tuple[str, str]:
    """What stands before and after a learned text; None asks stdout and NO_COLOR whether colour is wanted."""
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return COLOUR if colour else BRACKETS


def pieces(tokens: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """[(text, whether it is learned)], one after another, of tokens [n] and bool [n]."""
    borders = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
    spans = itertools.pairwise(borders)
    return [(tokenizer.decode(tokens[begin:end]), bool(learned[begin])) for begin, end in spans if end > begin]


def marked(parts: list[tuple[str, bool]], between: tuple[str, str], longest: int) -> str:
    """The text of `pieces`, at most `longest` characters of it, the learned ones between the two `marks`."""
    text, left = "", longest
    for piece, is_learned in parts:
        # A terminal would obey control characters of the data.
        safe = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in piece[:left])
        text += f"{between[0]}{safe}{between[1]}" if is_learned else safe
        left -= len(piece)
        if left <= 0:
            return f"{text} ..."
    return text.rstrip("\n")
