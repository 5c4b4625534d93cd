"""What is exposed at one time, free of the state it was taken from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from prometheus_client.utils import floatToGoString

from stallscope.watch.families import Family
from stallscope.watch.samples import Series as SeriesName


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One series, or one histogram with its ``counts``, one a bucket, not cumulative; ``value`` is then its sum."""

    family: Family
    labels: tuple[str, ...]
    named: Mapping[str, str]
    value: float
    counts: npt.NDArray[np.float64] | None


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """``start_ns``: since when counters count. ``bounds``: upper bounds of histograms by family, without +Inf."""

    sequence: int
    when_ns: int
    start_ns: int
    points: tuple[Point, ...]  # those of a family together
    bounds: Mapping[str, tuple[float, ...]]

    def samples(self, point: Point) -> Iterator[tuple[str, Mapping[str, str], float]]:
        """Each line of a point: its name, labels and value."""
        name = point.family.name
        if point.counts is None:
            yield name, point.named, point.value
            return
        edges = [*map(floatToGoString, self.bounds[name]), "+Inf"]
        cumulative = point.counts.cumsum().tolist()
        for edge, count in zip(edges, cumulative, strict=True):
            yield f"{name}_bucket", {**point.named, "le": edge}, count
        yield f"{name}_count", point.named, cumulative[-1]
        yield f"{name}_sum", point.named, point.value

    def values(self) -> dict[SeriesName, float]:
        """All of it as plain numbers."""
        return {
            (name, tuple(sorted(labels.items()))): float(value)
            for point in self.points
            for name, labels, value in self.samples(point)
        }
