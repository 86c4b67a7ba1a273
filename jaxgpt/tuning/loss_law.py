"""The loss of a model by its size and its training tokens: a law through measured runs that ship with the package.

L(N, D) = E + A N^-a + B D^-b (Hoffmann et al. 2022, equation 2), N parameters without embeddings (scaling.py says why),
D training tokens, L validation loss in nats per token. measured_losses.toml has the runs: builtin text, a vocabulary of
2,048, the batch and the learning rate that `speedrun` takes, one epoch. Beyond them the law is not asked.
"""

import functools
import math
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np

LAW_VOCABULARY = 2048  # entries of the tokenizer that the losses are measured with
LEVEL = 0.9  # of the interval: one prediction in ten may lie outside
_BEYOND = 2.0  # times the largest measured size, or number of tokens, up to which a loss is predicted
_START = (1.5, 8.0, 0.25, 40.0, 0.25)  # E, A, a, B, b: near what Hoffmann et al. found, and where the search begins


class LossGuess(NamedTuple):
    """A predicted validation loss in nats per token, with the ends of its interval (LEVEL)."""

    loss: float
    low: float
    high: float


class LossLaw:
    """The law through some runs."""

    def __init__(self, parameters: np.ndarray, tokens: np.ndarray, losses: np.ndarray):
        """One entry a run, six or more: the law has five numbers."""
        from scipy.optimize import least_squares

        self._largest = parameters.max(), tokens.max()
        # Residuals of logarithms, so that each run counts by its relative error; logarithms of A and B, which are > 0.
        start = np.array([_START[0], np.log(_START[1]), _START[2], np.log(_START[3]), _START[4]])
        bounds = [0.0, -5.0, 0.02, -5.0, 0.02], [losses.min(), 20.0, 1.5, 20.0, 1.5]
        residual = lambda found: np.log(_loss(found, parameters, tokens)) - np.log(losses)
        solved = least_squares(residual, np.clip(start, *bounds), bounds=bounds, x_scale="jac")
        self.numbers = solved.x
        self._freedom = len(losses) - len(start)
        self._variance = float(residual(solved.x) @ residual(solved.x)) / self._freedom
        self._inverse = np.linalg.pinv(solved.jac.T @ solved.jac)

    def loss(self, parameters: float, tokens: float) -> float:
        return float(_loss(self.numbers, np.array(parameters), np.array(tokens)))

    def predict(self, parameters: float, tokens: float) -> LossGuess | None:
        """The loss with its interval, that of one more run by linearised regression; None far beyond the runs."""
        from scipy.stats import t

        if parameters > _BEYOND * self._largest[0] or tokens > _BEYOND * self._largest[1]:
            return None
        centre, step = self.loss(parameters, tokens), 1e-5
        moved = [self.numbers + step * np.eye(5)[n] for n in range(5)]
        slope = np.array([np.log(_loss(m, np.array(parameters), np.array(tokens)) / centre) / step for m in moved])
        width = float(
            t.ppf((1 + LEVEL) / 2, self._freedom) * np.sqrt(self._variance * (1 + slope @ self._inverse @ slope))
        )
        return LossGuess(centre, centre * math.exp(-width), centre * math.exp(width))


def _loss(numbers: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    floor, log_a, size, log_b, data = numbers
    return floor + np.exp(log_a - size * np.log(parameters)) + np.exp(log_b - data * np.log(tokens))


@functools.cache
def builtin_law() -> LossLaw:
    """The law of the shipped runs on builtin text."""
    runs = tomllib.loads(Path(__file__).with_name("measured_losses.toml").read_text(encoding="utf-8"))["runs"]
    columns = (np.array([run[name] for run in runs], float) for name in ("parameters", "tokens", "loss"))
    return LossLaw(*columns)
