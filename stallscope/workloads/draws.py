"""Numbers that a scenario leaves to its seed. Each draw knows its bounds: a file is judged before it runs."""

from __future__ import annotations

import csv
import hashlib
import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stallscope.errors import UsageError

_LOGNORMAL_CUT = 3.0  # standard deviations: a draw without bounds could not be checked against the engine
_DIGEST_BYTES = 16
_FLOAT_BITS = 53


def stream(seed: int, *key: str | int) -> np.random.Generator:
    """A random stream of its own for ``key``: what others draw, or whether they do, does not change it."""
    return np.random.default_rng(_digest(seed, *key))


def chance(seed: int, *key: str | int) -> float:
    """A number in [0, 1) of its own for ``key``: a draw from ``stream``, at a twentieth of its price."""
    return (_digest(seed, *key) >> (8 * _DIGEST_BYTES - _FLOAT_BITS)) / 2.0**_FLOAT_BITS


def _digest(seed: int, *key: str | int) -> int:
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=_DIGEST_BYTES).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True, slots=True)
class Literal:
    """Always the same number."""

    value: float

    @property
    def bounds(self) -> tuple[float, float]:
        return self.value, self.value

    def sample(self, generator: np.random.Generator, size: int) -> NDArray[np.float64]:
        return np.full(size, self.value, np.float64)

    def scaled(self, factor: float) -> Literal:
        return Literal(self.value * factor)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Evenly between ``low`` and ``high``."""

    low: float
    high: float

    @property
    def bounds(self) -> tuple[float, float]:
        return self.low, self.high

    def sample(self, generator: np.random.Generator, size: int) -> NDArray[np.float64]:
        return generator.uniform(self.low, self.high, size)

    def scaled(self, factor: float) -> Uniform:
        return Uniform(self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of ``values``, each as likely: a list in the file, or a column of a CSV."""

    values: tuple[float, ...]

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.values), max(self.values)

    def sample(self, generator: np.random.Generator, size: int) -> NDArray[np.float64]:
        return generator.choice(np.array(self.values, np.float64), size)

    def scaled(self, factor: float) -> Choice:
        return Choice(tuple(value * factor for value in self.values))


@dataclass(frozen=True, slots=True)
class Lognormal:
    """exp(Normal(log ``median``, ``sigma``)), cut at three standard deviations.

    A median that is evenly drawn itself is drawn once a run (``settle``), so that runs differ in more than chance.
    """

    median: float | Uniform
    sigma: float

    @property
    def bounds(self) -> tuple[float, float]:
        spread = math.exp(_LOGNORMAL_CUT * self.sigma)
        low, high = (self.median, self.median) if isinstance(self.median, float | int) else self.median.bounds
        return low / spread, high * spread

    def sample(self, generator: np.random.Generator, size: int) -> NDArray[np.float64]:
        drawn = self.median if isinstance(self.median, float | int) else float(self.median.sample(generator, 1)[0])
        return np.clip(drawn * np.exp(self.sigma * generator.standard_normal(size)), *self.bounds)

    def scaled(self, factor: float) -> Lognormal:
        median = self.median * factor if isinstance(self.median, float | int) else self.median.scaled(factor)
        return replace(self, median=median)


Draw = Literal | Uniform | Choice | Lognormal


def settle(draw: Draw, seed: int, *key: str | int) -> Draw:
    """``draw`` once that is drawn which a run draws once."""
    if isinstance(draw, Lognormal) and isinstance(draw.median, Uniform):
        return replace(draw, median=draw_one(draw.median, seed, *key, "median"))
    return draw


def draw_one(draw: Draw, seed: int, *key: str | int) -> float:
    """The number that a run takes from ``draw`` once."""
    return float(draw.sample(stream(seed, *key), 1)[0])


def read_column(path: Path, column: str) -> tuple[float, ...]:
    """Numbers of one column of a CSV file with a header; points in time (ISO 8601) become seconds.

    Raises UsageError where file or column is missing, empty, or holds something else.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if column not in (reader.fieldnames or ()):
                columns = ", ".join(reader.fieldnames or ()) or "none"
                raise UsageError(f"{path}: no column {column!r}; there is {columns}")
            values = tuple(_number(row[column], path, reader.line_num) for row in reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read as a CSV file: {error}") from error
    if not values:
        raise UsageError(f"{path}: has no rows")
    return values


def _number(text: str | None, path: Path, line: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        try:
            moment = datetime.fromisoformat(text or "")
            value = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
        except ValueError:
            raise UsageError(f"{path}, line {line}: {text!r} is neither a number nor a time") from None
    if not math.isfinite(value):
        raise UsageError(f"{path}, line {line}: {text!r} is not finite")
    return value
