"""How the loss falls with the size of the model: a power law through the best trial of each size, and the next size.

L(N) = E + A N^-alpha (Hoffmann et al. 2022, section 3.3, for one amount of data, so that E holds what more data would
bring). N counts parameters without embeddings: small models are mostly embeddings, which add little to what a
model can do, and only without them do models of different depth and width lie on one line (Kaplan et al. 2020,
section 3.1 and figure 6; Hoffmann et al. count all, and at the sizes that they trained it hardly matters).

Hoffmann et al. fit hundreds of runs by a Huber loss. A sweep has a handful of sizes, too few to tell an outlier; here
the law is fitted by least squares of relative residuals (those of logarithms, for residuals of a few per cent), which
also give an interval of known level.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.model.sizes import parameter_count
from jaxgpt.settings import ModelConfig

MIN_SIZES = 4  # three for the three numbers of the law, and one to test it
LEVEL = 0.9  # of the interval: one prediction in ten may lie outside
_EXPONENTS = np.geomspace(0.003, 3.0, 120)  # published ones lie between 0.05 and 0.5


class Size(NamedTuple):
    """The best trial of a size."""

    parameters: int
    """Without embeddings."""
    all_parameters: int
    loss: float
    """Validation, in nats per token."""
    number: int
    """The trial's."""


@dataclasses.dataclass(frozen=True)
class Law:
    """L(N) = floor + factor x N^-exponent"""

    floor: float
    """E: the loss of an infinitely large model on the same tokens, in nats per token."""
    factor: float
    exponent: float

    def __call__(self, parameters: float | Sequence[float] | np.ndarray) -> np.ndarray:
        return self.floor + self.factor * np.asarray(parameters, float) ** -self.exponent


class Prediction(NamedTuple):
    """The loss of one more trained model of a size, with the ends of its interval (LEVEL)."""

    parameters: int
    loss: float
    low: float
    high: float


def without_embeddings(model: ModelConfig) -> int:
    """Parameters of the blocks and the last norm."""
    return parameter_count(model, 0) - model.n_positions * model.n_embd


def check_sizes(models: Sequence[ModelConfig]) -> None:
    """Raise a UserError where the sizes are too few for a prediction."""
    count = len({without_embeddings(model) for model in models})
    if count < MIN_SIZES:
        raise UserError(
            f"--predict: the trials have {count} size{'s' * (count > 1)} of model, {MIN_SIZES} are needed; vary the "
            "size, for example --vary model.n_layer+model.n_embd+model.n_head=2+64+2,3+96+3,4+128+4,6+192+6"
        )


def fit(parameters: Sequence[float], losses: Sequence[float]) -> Law:
    """The law with the least squared relative residuals, floor and factor not below 0."""
    values = np.asarray(losses, float)
    return _fit(np.asarray(parameters, float), values, values)[0]


def predict(parameters: Sequence[float], losses: Sequence[float], wanted: Sequence[float]) -> list[Prediction]:
    """The loss at each of the `wanted` sizes.

    The interval is a profile likelihood's: it holds every value that, as one more measurement, would not raise the
    residuals of the best fit by more than Fisher's F allows. For a straight line that is the textbook's prediction
    interval, exact for any number of points; it grows wide where the points leave the law open.
    """
    from scipy.stats import f

    sizes, values, freedom = np.asarray(parameters, float), np.asarray(losses, float), len(parameters) - 3
    law, residual = _fit(sizes, values, values)
    allowed = residual + residual / freedom * float(f.ppf(LEVEL, 1, freedom))

    def prediction(size: float) -> Prediction:
        centre, more = float(law(size)), np.append(sizes, size)

        def excess(value: float) -> float:
            # Weighed as a loss near the prediction: a weight by the value itself would favour high ones.
            return _fit(more, np.append(values, value), np.append(values, centre), 1e-4)[1] - allowed

        return Prediction(int(size), centre, _crossing(excess, centre, -centre), _crossing(excess, centre, centre))

    return [prediction(size) for size in wanted]


def _crossing(excess: Callable[[float], float], centre: float, furthest: float) -> float:
    """The value between `centre` and `centre + furthest` at which `excess` turns positive."""
    from scipy.optimize import brentq

    step = furthest / 2**14
    if excess(centre + step / 2**10) > 0:  # measurements without noise: the interval is a point
        return centre
    while abs(step) < abs(furthest) and excess(centre + step) < 0:
        step *= 2
    if excess(centre + step) < 0:
        return centre + furthest
    return float(brentq(excess, centre, centre + step, xtol=abs(centre) * 1e-6))


def _fit(sizes: np.ndarray, values: np.ndarray, scales: np.ndarray, precision: float = 1e-9) -> tuple[Law, float]:
    """(law, sum of squared residuals / scales). For a given exponent the law is linear, so only that is searched."""
    centre = np.exp(np.log(sizes).mean())  # powers of about 1: the two columns keep their digits
    exponents = _EXPONENTS
    while True:
        floor, factor, residual = _linear(sizes / centre, values, scales, exponents)
        best = int(residual.argmin())
        low, high = exponents[max(best - 1, 0)], exponents[min(best + 1, len(exponents) - 1)]
        if high - low < precision * high:
            break
        exponents = np.linspace(low, high, 33)
    law = Law(float(floor[best]), float(factor[best] * centre ** exponents[best]), float(exponents[best]))
    return law, float(residual[best])


def _linear(
    sizes: np.ndarray, values: np.ndarray, scales: np.ndarray, exponents: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(floor, factor, residual) for each of the exponents: weighted least squares with both numbers >= 0."""
    weights = 1 / scales
    powers = sizes[None, :] ** -exponents[:, None] * weights[None, :]  # (exponents, sizes)
    ones, wanted = weights[None, :], (values * weights)[None, :]
    a, b, c = (ones**2).sum(), (ones * powers).sum(axis=1), (powers**2).sum(axis=1)
    p, q = (ones * wanted).sum(), (powers * wanted).sum(axis=1)
    determinant = a * c - b * b
    floor, factor = (c * p - b * q) / determinant, (a * q - b * p) / determinant
    # Where one of them would be negative, the best is on the edge.
    factor, floor = np.where(floor < 0, q / c, factor), np.maximum(floor, 0)
    floor, factor = np.where(factor < 0, p / a, floor), np.maximum(factor, 0)
    return floor, factor, ((floor[:, None] * ones + factor[:, None] * powers - wanted) ** 2).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The law of a sweep's sizes and what it predicts."""

    sizes: list[Size]
    """From the smallest to the largest."""
    law: Law
    next: Prediction
    band: list[Prediction]
    """From the smallest size to the predicted one, for a figure."""


def fit_sizes(sizes: Sequence[Size], wanted: int | None) -> Scaling | None:
    """The law through `sizes` and its prediction, by default of twice the largest; None for too few sizes."""
    if len(sizes) < MIN_SIZES:
        return None
    ordered = sorted(sizes)
    counts, losses = [size.parameters for size in ordered], [size.loss for size in ordered]
    wanted = wanted or 2 * counts[-1]
    ends = sorted([counts[0], counts[-1], wanted])
    guess, *band = predict(counts, losses, [wanted, *np.geomspace(ends[0], ends[-1], 24)])
    return Scaling(ordered, fit(counts, losses), guess, band)


def report(sizes: Sequence[Size], scaling: Scaling | None) -> str:
    """The law and its prediction, in lines; "" for a single size."""
    if len(sizes) < 2:
        return ""
    if scaling is None:
        return f"scaling  {len(sizes)} sizes of model; a law needs {MIN_SIZES}"
    law, guess = scaling.law, scaling.next
    if law.factor == 0:
        return f"scaling  the loss does not fall with the size over these {len(sizes)} sizes: no law to predict by"
    return (
        f"scaling  loss = {law.floor:.4g} + {law.factor:.4g} x N^-{law.exponent:.3g}, N parameters without "
        f"embeddings, through the best trials of {len(sizes)} sizes\n"
        f"         {guess.parameters:,} parameters: {guess.loss:.4f} nats per token, {LEVEL:.0%} interval "
        f"{guess.low:.4f} to {guess.high:.4f}, for the same tokens and as careful a search"
    )
