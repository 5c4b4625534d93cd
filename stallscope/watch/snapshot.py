"""What is exposed at one time, free of the state it was taken from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from prometheus_client.utils import floatToGoString

from stallscope.watch.families import Family, Kind
from stallscope.watch.samples import Series as SeriesName


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """A series by its labels: ``samples`` are the name and labels of each of its lines, ``names`` the same as keys."""

    family: Family
    labels: tuple[str, ...]
    named: Mapping[str, str]
    samples: tuple[tuple[str, dict[str, str]], ...]
    names: tuple[SeriesName, ...]


def identity(family: Family, labels: tuple[str, ...], bounds: Sequence[float] = ()) -> Identity:
    """``bounds``: of a histogram, without +Inf."""
    named = dict(zip(family.labels, labels, strict=True))
    samples = [(family.name, named)]
    if family.kind is Kind.HISTOGRAM:
        edges = [*map(floatToGoString, bounds), "+Inf"]
        samples = [(f"{family.name}_bucket", {**named, "le": edge}) for edge in edges]
        samples += [(f"{family.name}_count", named), (f"{family.name}_sum", named)]
    names = tuple((name, tuple(sorted(some.items()))) for name, some in samples)
    return Identity(family, labels, named, tuple(samples), names)


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One series, or one histogram with its ``counts``, one a bucket, not cumulative; ``value`` is then its sum."""

    of: Identity
    value: float
    counts: npt.NDArray[np.float64] | None = None

    def numbers(self) -> list[float]:
        """One for each line."""
        if self.counts is None:
            return [self.value]
        cumulative: list[float] = self.counts.cumsum().tolist()
        return [*cumulative, cumulative[-1], self.value]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """``start_ns``: since when counters count. ``bounds``: upper bounds of histograms by family, without +Inf."""

    sequence: int
    when_ns: int
    start_ns: int
    points: tuple[Point, ...]  # those of a family together
    bounds: Mapping[str, tuple[float, ...]]

    def values(self) -> dict[SeriesName, float]:
        """All of it as plain numbers."""
        return {
            name: value for point in self.points for name, value in zip(point.of.names, point.numbers(), strict=True)
        }
