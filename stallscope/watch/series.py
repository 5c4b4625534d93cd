"""One exposed series: what it shows, and what it holds back until it was seen without that.

``rate()`` sees a rise only between two samples. So a series is shown as it begins (at zero, or at the value with which
it left) until it has been scraped that way; what came for it meanwhile is held, and added then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from stallscope.watch.families import COVERAGE, LAST_SEEN, OLDEST_WAIT, OTHER, Family
from stallscope.watch.snapshot import Identity, Point

if TYPE_CHECKING:
    from stallscope.watch.seats import Seat

Counts: TypeAlias = npt.NDArray[np.float64]

MOST_FOLDED_GAUGES = 10_000
# What several replicas or tenants are together, as one gauge; all others are sums.
_TOGETHER: Mapping[str, Callable[[Iterable[float]], float]] = {
    COVERAGE.name: min,
    LAST_SEEN.name: min,
    OLDEST_WAIT.name: max,
}


class Series:
    """``sequence``: of the scrape that is the first to show it, ``born_ns`` when that began to be so."""

    __slots__ = ("born_ns", "identity", "is_held", "is_out", "seat", "sequence")
    seat: Seat

    def __init__(self, identity: Identity, sequence: int, born_ns: int) -> None:
        self.identity = identity
        self.sequence, self.born_ns = sequence, born_ns
        self.is_held = True
        self.is_out = False  # it is exposed no more

    @property
    def lines(self) -> int:
        return len(self.identity.samples)

    @property
    def holds(self) -> bool:
        """Something is held."""
        return False

    @property
    def is_zero(self) -> bool:
        """There is no value to go on from."""
        return True

    def release(self) -> None:
        """What was held is shown from now on, and what comes at once."""
        self.is_held = False

    def hand_over(self, other: Series) -> None:
        """What is held is another's of the family."""

    def point(self) -> Point:
        """What it shows."""
        raise NotImplementedError


class Counter(Series):
    """A number that rises."""

    __slots__ = ("held", "value")

    def __init__(self, identity: Identity, sequence: int, born_ns: int, value: float = 0.0) -> None:
        super().__init__(identity, sequence, born_ns)
        self.value, self.held = value, 0.0

    @property
    def holds(self) -> bool:
        return self.held > 0

    @property
    def is_zero(self) -> bool:
        return not self.value

    def add(self, amount: float) -> None:
        if self.is_held:
            self.held += amount
        else:
            self.value += amount

    def release(self) -> None:
        super().release()
        self.value += self.held
        self.held = 0.0

    def hand_over(self, other: Series) -> None:
        if isinstance(other, Counter):
            other.add(self.held)
            self.held = 0.0

    def point(self) -> Point:
        return Point(self.identity, self.value)


class Gauge(Series):
    """A number as it is, or several that share one series: ``parts``, by the labels that they came with."""

    __slots__ = ("parts",)

    def __init__(self, identity: Identity, sequence: int, born_ns: int) -> None:
        super().__init__(identity, sequence, born_ns)
        self.is_held = False
        self.parts: dict[tuple[str, ...], float] = {}

    @property
    def value(self) -> float:
        return _TOGETHER.get(self.identity.family.name, math.fsum)(self.parts.values())

    def set(self, came_with: tuple[str, ...], value: float) -> None:
        self.parts[came_with] = value
        if len(self.parts) > MOST_FOLDED_GAUGES:
            del self.parts[next(iter(self.parts))]

    def point(self) -> Point:
        return Point(self.identity, self.value)


class Histogram(Series):
    """``counts``: one a bucket, the last one up to +Inf, not cumulative. ``total``: of all that was observed."""

    __slots__ = ("counts", "held_counts", "held_total", "total")

    def __init__(self, identity: Identity, sequence: int, born_ns: int, counts: Counts, total: float = 0.0) -> None:
        super().__init__(identity, sequence, born_ns)
        self.counts, self.total = counts, total
        self.held_counts, self.held_total = np.zeros(len(counts)), 0.0

    @property
    def holds(self) -> bool:
        return bool(self.held_counts.any())

    @property
    def is_zero(self) -> bool:
        return not self.counts.any()

    def add(self, counts: Counts, total: float) -> None:
        if self.is_held:
            self.held_counts = self.held_counts + counts
            self.held_total += total
        else:
            self.counts = self.counts + counts  # a new one: a scrape may still read the old
            self.total += total

    def release(self) -> None:
        super().release()
        self.add(self.held_counts, self.held_total)
        self.held_counts, self.held_total = np.zeros(len(self.counts)), 0.0

    def hand_over(self, other: Series) -> None:
        if isinstance(other, Histogram):
            other.add(self.held_counts, self.held_total)
            self.held_counts, self.held_total = np.zeros(len(self.counts)), 0.0

    def point(self) -> Point:
        return Point(self.identity, self.total, self.counts)


def folded(family: Family, labels: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Labels under which an amount may be counted: its own, then with ever more of them ``(other)``, at last all.

    Of blame the victim is folded first: a page needs the culprit's name.
    """
    fixed = [at for at, name in enumerate(family.labels) if name not in OPEN]
    order = [at for at, name in enumerate(family.labels) if name in OPEN]
    if "culprit" not in family.labels:
        order.reverse()  # a device before its replica
    found = [labels]
    for at in (*order, *fixed):
        last = found[-1]
        found.append((*last[:at], OTHER, *last[at + 1 :]))
    return list(dict.fromkeys(found))


OPEN = frozenset({"tenant", "victim", "culprit", "replica", "device"})  # labels whose values come from outside
