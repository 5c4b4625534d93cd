"""Scores under a clock of the test's own, and what hypothesis throws at them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from stallscope.watch.families import BLAME, FAMILIES, Family, Kind
from stallscope.watch.samples import Series
from stallscope.watch.scores import Scores

S = 10**9
START_NS = 1_790_000_000 * S
HOUR_S = 3600.0
HOSTILE = (
    "plain",
    'quo"te',
    "back\\slash",
    "back\\\\slash",
    "new\nline",
    "carriage\rreturn",
    "{brace}",
    "{{ template }}",
    'a="b",c="d"',
    "# EOF",
    " # {} 1",
    "",
    " ",
    "\ud800",
    "\udfff",
    "nul\0",
    "line\u2028separator",
    "🦙" * 75,
    "x" * 300,
    "x" * 299 + "y",
    "le",
    "(unknown)",
)
names = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=12))


@dataclass
class Clock:
    now_ns: int = START_NS

    def __call__(self) -> int:
        return self.now_ns

    def passes(self, seconds: float) -> None:
        self.now_ns += int(seconds * S)


@dataclass
class Scored:
    """Scores that are scraped, with all that was counted for each family and label value that is few."""

    scores: Scores
    clock: Clock
    added: Counter[str] = field(default_factory=Counter)

    def add(self, family: Family, labels: tuple[str, ...], amount: float) -> None:
        self.scores.add(family, labels, amount)
        self.added[family.name] += amount  # type: ignore[assignment]

    def scrape(self, after_s: float = 10.0, scraper: str = "") -> dict[Series, float]:
        self.clock.passes(after_s)
        return self.scores.exposed(scraper)


def scored(most_series: int = 20_000) -> Scored:
    clock = Clock()
    return Scored(Scores(most_series=most_series, clock=clock), clock)


def of(family: Family, *labels: str, suffix: str = "", **more: str) -> Series:
    """A series by its labels' values."""
    named = dict(zip(family.labels, labels, strict=True)) | more
    return family.name + suffix, tuple(sorted(named.items()))


def blame(victim: str, culprit: str, mechanism: str = "kv_pinning") -> Series:
    return of(BLAME, victim, culprit, mechanism)


def total(exposed: dict[Series, float], family: Family) -> float:
    """Of all series of a counter, or of all counts of a histogram."""
    name = family.name + ("_count" if family.kind is Kind.HISTOGRAM else "")
    return sum(value for (found, _), value in exposed.items() if found == name)


def buckets(*counts: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """As many as the histograms of time have, the first ones as given."""
    return np.array([*counts, *[0] * (12 - len(counts))], dtype=np.float64)


RISING = {family.name for family in FAMILIES if family.kind is not Kind.GAUGE}


def rises(series: Series) -> bool:
    name = series[0]
    return name in RISING or name.rsplit("_", 1)[0] in RISING


def parse_exposition(text: str) -> dict[Series, float]:
    """What an OpenMetrics exposition says, without ``_created``. Raises ValueError where it is none."""
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    return {
        (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
