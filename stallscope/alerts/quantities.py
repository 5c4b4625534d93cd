"""What alerts compare: written in PromQL, and computed from samples, by the same definition."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stallscope.alerts.promql import one_of, selector, span
from stallscope.watch.families import Family
from stallscope.watch.samples import Samples

Floats = npt.NDArray[np.float64]


class Quantity(Protocol):
    """Something to compare, by labels, looking back ``window_s``."""

    @property
    def by(self) -> tuple[str, ...]: ...

    @property
    def window_s(self) -> int: ...

    def promql(self, *matchers: str) -> str:
        """An expression of it, for the series that match."""
        ...


@dataclass(frozen=True)
class Counted:
    """How much a counter rises: a second, or (``whole``) in all of the window; ``over``: as a share of another's rise.

    ``where``: values of a label that count. ``recorded``: a recording rule that has the rise a second already, by all
    labels.
    """

    counter: Family
    by: tuple[str, ...]
    window_s: int
    where: tuple[str, tuple[str, ...]] | None = None
    over: Family | None = None
    whole: bool = False
    recorded: str = ""

    def promql(self, *matchers: str) -> str:
        matchers = (one_of(*self.where), *matchers) if self.where else matchers
        grouped = f"sum by ({', '.join(self.by)})" if self.by else "sum"
        if self.recorded:
            return f"{grouped} ({selector(self.recorded, *matchers)})"
        rise = f"{grouped} ({self._rise(self.counter, matchers)})"
        return f"{rise} / {grouped} ({self._rise(self.over, ())})" if self.over else rise

    def _rise(self, counter: Family, matchers: Sequence[str]) -> str:
        function = "increase" if self.whole else "rate"
        return f"{function}({selector(counter.name, *matchers)}[{span(self.window_s)}])"

    def of(self, samples: Samples) -> dict[tuple[str, ...], Floats]:
        """Values at each scrape by the labels of ``by``; NaN where the window begins before the samples."""
        window = _Window(samples.times_ns, self.window_s)
        rises = self._summed(samples, self.counter, self.where)
        if self.over is None:
            return {key: window.rise(each, whole=self.whole) for key, each in rises.items()}
        every = self._summed(samples, self.over, None)
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                key: window.rise(each, whole=True) / window.rise(every[key], whole=True)
                for key, each in rises.items()
                if key in every
            }

    def _summed(
        self, samples: Samples, family: Family, where: tuple[str, tuple[str, ...]] | None
    ) -> Mapping[tuple[str, ...], Floats]:
        """Increments at each scrape, by labels."""
        found: dict[tuple[str, ...], Floats] = defaultdict(lambda: np.zeros(len(samples.times_ns)))
        for labels, values in samples.of(family.name):
            if where is None or labels[where[0]] in where[1]:
                risen = np.diff(values, prepend=np.nan)
                key = tuple(labels[name] for name in self.by)
                found[key] += np.where(np.isnan(risen), 0.0, np.maximum(risen, 0.0))
        return found


@dataclass(frozen=True)
class _Window:
    times_ns: npt.NDArray[np.int64]
    length_s: int

    def rise(self, increments: Floats, *, whole: bool) -> Floats:
        """The rise in the window that ends at each scrape, a second or in all of it, as Prometheus extrapolates it."""
        times = self.times_ns
        first = np.searchsorted(times, times - self.length_s * 1_000_000_000)
        total = np.cumsum(increments)
        covered_s = (times - times[first]) / 1e9
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = (total - total[first]) / covered_s
        rate[times - times[0] < self.length_s * 1_000_000_000] = np.nan
        return rate * self.length_s if whole else rate
