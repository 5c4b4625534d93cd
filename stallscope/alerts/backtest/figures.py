"""Shares and rates with what chance leaves open."""

from __future__ import annotations

from dataclasses import dataclass

_WEEK_S = 7 * 86400


@dataclass(frozen=True)
class Share:
    """``hits`` of ``of``, with the 95% interval of Wilson (JASA 22(158), 1927)."""

    hits: int
    of: int
    low: float
    high: float


@dataclass(frozen=True)
class Calm:
    """Time without an incident, s, and pages that began in it; ``most_per_week``: the upper bound (95%, one-sided) of
    their rate on one such trace, if they come independently (Poisson); None where there was no such time.

    Without a page it is the rule of three: 3 in the time seen.
    """

    length_s: float
    pages: int
    most_per_week: float | None


def share(hits: int, of: int) -> Share | None:
    """None of nothing."""
    if not of:
        return None
    from scipy.stats import binomtest

    interval = binomtest(hits, of).proportion_ci(method="wilson")
    return Share(hits, of, float(interval.low), float(interval.high))


def calm(length_s: float, pages: int) -> Calm:
    if length_s <= 0:
        return Calm(0.0, pages, None)
    from scipy.stats import chi2

    return Calm(length_s, pages, float(chi2.ppf(0.95, 2 * (pages + 1)) / 2 / length_s * _WEEK_S))
