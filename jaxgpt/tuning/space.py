"""The settings that a sweep varies, read from `--vary optimizer.learning_rate=1e-4..1e-2`. No jax import.

A point of the space is the settings of a trial as the command line would give them, {"optimizer.learning_rate":
"0.001"}, so that every rule for settings (cli.py, config.py) holds for trials, with the same messages.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from jaxgpt.config import Config, config_fields, load_config
from jaxgpt.errors import UserError
from jaxgpt.settings import describe_type

SECTIONS = ("model", "optimizer", "train")
MAX_GRID = 10_000
_RANGE = re.compile(r"(?P<low>[^:]+?)\.\.(?P<high>(?!\.)[^:]+?)(?::(?P<points>.+))?")
_WIDE = 10.0  # ends that lie this factor apart make a scale logarithmic
_MAX_CORNERS = 512

Point = dict[str, str]
"""{"model.n_layer": "4", ...}"""


@dataclasses.dataclass(frozen=True)
class Variable:
    """One setting that varies, or several that vary together."""

    keys: tuple[str, ...]
    """("optimizer.learning_rate",)"""
    text: str
    """The user's text after the =."""
    values: tuple[tuple[str, ...], ...] = ()
    """The values to try, each with a text for every key; empty for a range."""
    low: float = math.nan
    high: float = math.nan
    """The ends of a range, both of them included."""
    is_integer: bool = False
    is_log: bool = False
    """The scale of random draws and of axes: logarithmic where True, else linear."""

    @property
    def name(self) -> str:
        return "+".join(self.keys)

    @property
    def label(self) -> str:
        """The name without its section: "n_layer+n_embd"."""
        return "+".join(key.split(".")[1] for key in self.keys)

    @property
    def is_range(self) -> bool:
        return not self.values

    @property
    def is_number(self) -> bool:
        return self.is_range or (len(self.keys) == 1 and all(_number(value) is not None for (value,) in self.values))

    def at(self, share: float) -> tuple[str, ...]:
        """The value at `share` of the way through a range (0 to 1), or of a list."""
        if not self.is_range:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.is_log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            rounding = 0.5 if self.is_integer else 0.0  # each whole number gets the same share, the ends as well
            value = self.low - rounding + share * (self.high - self.low + 2 * rounding)
        return (self.write(value),)

    def write(self, value: float) -> str:
        """A number of the range as a setting: a whole number, or four digits."""
        value = min(max(value, self.low), self.high)
        if self.is_integer:
            return str(round(value))
        short = float(f"{value:.4g}")
        return repr(short if self.low <= short <= self.high else value)

    def of(self, point: Point) -> str:
        """The value in a point, as text."""
        return "+".join(point[key] for key in self.keys)

    @property
    def texts(self) -> list[str]:
        """The values of a list as texts, as `of` gives them."""
        return ["+".join(value) for value in self.values]

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest value of a variable of numbers."""
        numbers = [float(value) for (value,) in self.values] or [self.low, self.high]
        return min(numbers), max(numbers)

    def place(self, text: str) -> float:
        """The place of a value on the variable's scale: 0 for the lowest number or the first in a list, to 1."""
        if not self.is_number:
            return self.texts.index(text) / max(len(self.values) - 1, 1)
        scale = math.log if self.is_log else float
        low, high = map(scale, self.ends)
        return (scale(float(text)) - low) / ((high - low) or 1.0)

    def describe(self) -> str:
        """ "1e-4 .. 1e-2, logarithmic"; "0.1, 0.2"."""
        if self.is_range:
            kind = "whole numbers, " if self.is_integer else ""
            return f"{self.low:g} .. {self.high:g}, {kind}{'logarithmic' if self.is_log else 'linear'}"
        return ", ".join(self.texts)


# ---------------------------------------------------------------- reading


def read_space(words: Sequence[str], base: Config) -> tuple[Variable, ...]:
    """The variables that `--vary` names; without any, the learning rate from an eighth to eight times the config's.

    Raises:
        UserError: an unknown setting, one that cannot be varied, or values that are no list and no range.
    """
    if not words:
        rate = base.optimizer.peak_learning_rate
        values = tuple((repr(float(f"{rate * 2.0**power:.4g}")),) for power in range(-3, 4))
        text = ",".join(value for (value,) in values)
        return (Variable(("optimizer.learning_rate",), text, values, is_log=True),)
    variables = tuple(read_variable(word) for word in words)
    keys = [key for variable in variables for key in variable.keys]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"--vary names {twice[0]} twice; name it once, with all of its values")
    return variables


def read_variable(word: str) -> Variable:
    """The variable of one KEY=VALUES."""
    name, sign, text = word.partition("=")
    if not sign or not text.strip():
        raise UserError(
            f"--vary {word}: write KEY=VALUES: a list (optimizer.learning_rate=1e-4,1e-3), a range (=1e-4..1e-2), or a "
            "range cut into points (=1e-4..1e-2:7)"
        )
    keys = tuple(key.strip() for key in name.split("+"))
    for key in keys:
        _check_key(key, word)
    if len(set(keys)) < len(keys):
        raise UserError(f"--vary {word}: a setting is given twice")
    found = _RANGE.fullmatch(text)
    return _read_range(keys, text, found, word) if found else _read_list(keys, text, word)


def _check_key(key: str, word: str) -> None:
    if key not in config_fields():
        load_config(None, {key: ""})  # which refuses it, with the nearest name
    if key.split(".")[0] not in SECTIONS:
        raise UserError(
            f"--vary {word}: only settings of [model], [optimizer] and [train] can be varied; under another "
            f"[{key.split('.')[0]}] losses do not compare or do not change"
        )


def _read_list(keys: tuple[str, ...], text: str, word: str) -> Variable:
    values = tuple(tuple(part.strip() for part in value.split("+")) for value in text.split(","))
    if len(keys) == 1:
        values = tuple((value.strip(),) for value in text.split(","))  # a plus may belong to a number, 1e+3
    read = lambda value: [part if (number := _number(part)) is None else number for part in value]
    same = [read(value) for value in values]
    for value in values:
        if len(value) != len(keys):
            raise UserError(
                f"--vary {word}: {'+'.join(value)} has {len(value)} values for {len(keys)} settings that vary together"
            )
        if not all(value):
            raise UserError(f"--vary {word}: a value is empty; write values with commas between")
        if same.count(read(value)) > 1:
            raise UserError(f"--vary {word}: {'+'.join(value)} is given twice")
    numbers = [number for value in values if (number := _number(value[0])) is not None]
    all_numbers = len(numbers) == len(values)
    is_integer = all_numbers and all(number.is_integer() for number in numbers)
    is_log = len(keys) == 1 and all_numbers and _is_wide(numbers)
    return Variable(keys, text, values, is_integer=is_integer, is_log=is_log)


def _read_range(keys: tuple[str, ...], text: str, found: re.Match, word: str) -> Variable:
    if len(keys) > 1:
        raise UserError(f"--vary {word}: settings that vary together need a list, such as 2+64,4+128")
    described = describe_type(config_fields()[keys[0]].type)  # "int > 0 or none"
    kinds = {part.split()[0] for part in described.split(" or ")}
    if not kinds & {"int", "float"}:
        raise UserError(f"--vary {word}: {keys[0]} is no number, so it has no range; give a list of values")
    is_integer = "float" not in kinds
    low, high = (_number(found[end]) for end in ("low", "high"))
    if low is None or high is None or not low < high:
        raise UserError(f"--vary {word}: a range is two numbers, the smaller one first, such as 1e-4..1e-2")
    if is_integer and not (low.is_integer() and high.is_integer()):
        raise UserError(f"--vary {word}: {keys[0]} is a whole number, and so are the ends of its range")
    variable = Variable(keys, text, (), low, high, is_integer, _is_wide([low, high]))
    if found["points"] is None:
        return variable
    points = _number(found["points"])
    if points is None or not points.is_integer() or not 2 <= points <= MAX_GRID:
        raise UserError(f"--vary {word}: the number of points after the colon has to be 2 or more")
    shares = np.linspace(0, 1, int(points))
    values = tuple(dict.fromkeys(variable.at(float(share)) for share in shares))  # whole numbers may coincide
    return dataclasses.replace(variable, values=values)


def _is_wide(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) / min(numbers) >= _WIDE


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def grid(space: Sequence[Variable]) -> list[Point]:
    """Every combination, the last variable changing fastest. Raises UserError for a range, or for too many."""
    if ranges := [variable for variable in space if variable.is_range]:
        raise UserError(
            f"--method grid needs a list or a number of points: --vary {ranges[0].name}={ranges[0].text}:7 (or "
            "--method random, halving or tpe, which draw from the range)"
        )
    count = math.prod(len(variable.values) for variable in space)
    if count > MAX_GRID:
        raise UserError(f"the grid has {count:,} points; draw some of them with --method random --trials N")
    return [_point(space, values) for values in itertools.product(*(variable.values for variable in space))]


def draw(space: Sequence[Variable], seed: int, number: int) -> Point:
    """The random point of trial `number`, a function of these alone."""
    shares = np.random.default_rng(np.random.SeedSequence([seed, number])).random(len(space))
    return _point(space, [variable.at(float(share)) for variable, share in zip(space, shares)])


def corners(space: Sequence[Variable]) -> Iterator[Point]:
    """Points with every end of every range and every value of every list: all of their combinations, or, where these
    are many, each with the first values of the others."""
    ends = [
        variable.values or ((variable.write(variable.low),), (variable.write(variable.high),)) for variable in space
    ]
    if math.prod(map(len, ends)) <= _MAX_CORNERS:
        yield from (_point(space, values) for values in itertools.product(*ends))
        return
    first = [values[0] for values in ends]
    for place, values in enumerate(ends):
        yield from (_point(space, [*first[:place], value, *first[place + 1 :]]) for value in values)


def _point(space: Sequence[Variable], values: Sequence[tuple[str, ...]]) -> Point:
    return {key: text for variable, value in zip(space, values) for key, text in zip(variable.keys, value)}


@dataclasses.dataclass(frozen=True)
class Space:
    """The variables, and the config that they vary."""

    file: str
    """The config file."""
    overrides: dict[str, str]
    """Settings of the command line that hold for every trial."""
    variables: tuple[Variable, ...]

    def config(self, point: Point) -> Config:
        """The config of a trial. Raises UserError, which names the point, where settings contradict each other."""
        try:
            return load_config(self.file, self.overrides | point)
        except UserError as error:
            listed = ", ".join(f"{key} {value}" for key, value in point.items())
            raise UserError(f"{listed}: {error}") from None

    def check(self, points: Sequence[Point]) -> None:
        """Raise a UserError where a point is no config, or its losses would not compare with the others'."""
        if twice := [key for variable in self.variables for key in variable.keys if key in self.overrides]:
            raise UserError(f"{twice[0]} is both varied and given a value on the command line; leave one out")
        lengths: dict[int, Point] = {}
        for point in points:
            config = self.config(point)
            lengths.setdefault(config.block_size, point)
            if config.train.per_device_train_batch_size == "auto":
                raise UserError(
                    'train.per_device_train_batch_size = "auto": trials of a sweep share the device, so give a number, '
                    "for example --train.per_device_train_batch_size 8"
                )
        if len(lengths) > 1:
            listed = " and ".join(str(length) for length in sorted(lengths))
            raise UserError(
                f"the trials have windows of {listed} tokens, under which losses do not compare; set one "
                "data.block_size for all of them"
            )

    def fixed(self, base: Config) -> "Space":
        """The space with a fixed evaluation batch if the training batch varies, so that all evaluate the same rows."""
        keys = [key for variable in self.variables for key in variable.keys]
        size, key = base.train.per_device_train_batch_size, "eval.per_device_eval_batch_size"
        if "train.per_device_train_batch_size" not in keys or base.eval.per_device_eval_batch_size or size == "auto":
            return self
        return dataclasses.replace(self, overrides=self.overrides | {key: str(size)})
