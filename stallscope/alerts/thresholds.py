"""Quantities that alerts compare, and thresholds for them: floors, raised by what calm traffic shows.

A quantity is written in PromQL and computed from samples by the same definition. Calm is all that was sampled but for
incidents and what a window that touches one still sees of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stallscope.alerts.promql import equal, number, one_of, selector, span, unequal
from stallscope.alerts.settings import LEAST_CALM_S, MARGIN_S, MOST_OWN, Limit
from stallscope.alerts.texts import ByLabel, Part
from stallscope.diagnosis.model import Incident
from stallscope.watch.families import BLAME, OTHER, Family
from stallscope.watch.samples import Samples

Floats = npt.NDArray[np.float64]
PERSONAL = frozenset({"culprit", "tenant"})  # labels of which each value has a usual of its own
SEVERAL = (OTHER, "(unknown)")  # no tenant, but several: such a pair may be of two
NO_CALM = "no calm traffic was given to learn from"


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

    ``where``: values of a label that count. ``others``: without what victims did to themselves.
    ``recorded``: a recording rule that has the rise a second already, by all labels.
    """

    counter: Family
    by: tuple[str, ...]
    window_s: int
    where: tuple[str, tuple[str, ...]] | None = None
    over: Family | None = None
    whole: bool = False
    others: bool = False
    recorded: str = ""

    def promql(self, *matchers: str) -> str:
        matchers = (one_of(*self.where), *matchers) if self.where else matchers
        grouped = f"sum by ({', '.join(self.by)}) " if self.by else "sum "
        if self.recorded:
            return f"{grouped}({selector(self.recorded, *matchers)})"
        rise = self._rise(self.counter, matchers)
        if self.others:
            return f"{grouped}({without_own(rise, self._function, self.window_s)})"
        return f"{grouped}({rise})" + (f" / {grouped}({self._rise(self.over, ())})" if self.over else "")

    def _rise(self, counter: Family, matchers: Sequence[str]) -> str:
        return f"{self._function}({selector(counter.name, *matchers)}[{span(self.window_s)}])"

    @property
    def _function(self) -> str:
        return "increase" if self.whole else "rate"

    def of(self, samples: Samples) -> dict[tuple[str, ...], Floats]:
        """Values at each scrape by the labels of ``by``; NaN where the window begins before the samples."""
        window = _Window(samples.times_ns, self.window_s)
        rises = _summed(samples, self.counter, self.by, self)
        if self.over is None:
            return {key: window.rise(each, whole=self.whole) for key, each in rises.items()}
        whole = _summed(samples, self.over, self.by, None)
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                key: window.rise(each, whole=True) / window.rise(whole[key], whole=True)
                for key, each in rises.items()
                if key in whole
            }

    def counts(self, labels: Mapping[str, str]) -> bool:
        """Whether a series is part of it."""
        if self.where and labels.get(self.where[0]) not in self.where[1]:
            return False
        return not (self.others and labels["victim"] == labels["culprit"] and labels["victim"] not in SEVERAL)


def without_own(rise: str, function: str, window_s: int) -> str:
    """``rise`` of blame, without the pairs of a tenant with itself."""
    named = selector(BLAME.name, *(unequal("victim", several) for several in SEVERAL))
    of_all = f"sum by (victim) ({function}({named}[{span(window_s)}]))"
    # (?s: lets a dot be a newline too, which names may have.
    return f'{rise} unless on (victim, culprit) label_replace({of_all}, "culprit", "$1", "victim", "(?s:(.*))")'


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


def _summed(
    samples: Samples, family: Family, by: tuple[str, ...], quantity: Counted | None
) -> dict[tuple[str, ...], Floats]:
    """Increments at each scrape, summed by labels."""
    found: dict[tuple[str, ...], Floats] = defaultdict(lambda: np.zeros(len(samples.times_ns)))
    for labels, values in samples.of(family.name):
        if quantity is None or quantity.counts(labels):
            risen = np.diff(values, prepend=np.nan)
            found[tuple(labels[name] for name in by)] += np.where(np.isnan(risen), 0.0, np.maximum(risen, 0.0))
    return dict(found)


# --- thresholds ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """A number to compare with, and why it is that one."""

    value: float
    reason: str


@dataclass(frozen=True)
class Threshold:
    """``own``: levels of values of the quantity's first label; ``otherwise`` of all others."""

    otherwise: Level
    own: Mapping[str, Level] = field(default_factory=dict)

    def exceeded_by(self, quantity: Quantity, condition: str = "") -> str:
        """An expression with the series that are above their level, where the condition (``and on ...``) holds too.

        Each ends in its number, which a backtest may raise.
        """
        label = quantity.by[0] if self.own else ""
        levels = [(self.otherwise, [unequal(label, name) for name in self.own])]
        levels += [(level, [equal(label, name)]) for name, level in self.own.items()]
        return "\nor\n".join(
            f"{_under(quantity.promql(*matchers), condition)} > {number(level.value)}" for level, matchers in levels
        )

    def reason(self, quantity: Quantity) -> Part:
        if not self.own:
            return self.otherwise.reason
        return ByLabel(quantity.by[0], {name: level.reason for name, level in self.own.items()}, self.otherwise.reason)


def _under(expr: str, condition: str) -> str:
    return f"({expr}\n{condition})" if condition else expr


class Teacher(Protocol):
    """Knows of calm traffic, or of none."""

    def threshold(self, quantity: Quantity, limit: Limit) -> Threshold: ...


@dataclass(frozen=True)
class NoTeacher:
    """Nothing to learn from: every threshold is its floor."""

    why: str = NO_CALM

    def threshold(self, quantity: Quantity, limit: Limit) -> Threshold:
        return Threshold(floor(limit, self.why))


@dataclass(frozen=True)
class FromSamples:
    """Learns from the samples of a trace outside its incidents."""

    samples: Samples
    incidents: Sequence[Incident]

    def threshold(self, quantity: Quantity, limit: Limit) -> Threshold:
        if not isinstance(quantity, Counted):
            return Threshold(floor(limit, "a trace does not tell this"))
        calm = self.calm(quantity.window_s)
        calm_s = _seconds(self.samples.times_ns, calm)
        if calm_s < LEAST_CALM_S:
            return Threshold(floor(limit, too_short(calm_s, quantity.window_s)))
        highest = {key: _highest(values[calm]) for key, values in quantity.of(self.samples).items()}
        return learned(quantity, limit, highest, f"the highest in {length(calm_s)} of calm")

    def calm(self, window_s: int) -> npt.NDArray[np.bool_]:
        """Scrapes at which a window of that length saw nothing of an incident, and was full."""
        times = self.samples.times_ns
        calm = times - times[:1] >= window_s * 1_000_000_000
        margin = round(MARGIN_S * 1e9)
        for incident in self.incidents:
            after = incident.end_ns + margin + window_s * 1_000_000_000
            calm &= (times < incident.start_ns - margin) | (times > after)
        return calm


def learned(
    quantity: Quantity, limit: Limit, highest: Mapping[tuple[str, ...], float], what: str, *, personal: bool = True
) -> Threshold:
    """The threshold by the highest calm value of each series: of one for each tenant that lies above the floor; else of
    one for all, as a replica is like the next."""
    if not highest:
        return Threshold(floor(limit, f"{what} had none of it"))
    if not (personal and quantity.by and quantity.by[0] in PERSONAL):
        return Threshold(_level(limit, max(highest.values()), what))
    of_each: dict[str, float] = {}
    for key, value in highest.items():
        of_each[key[0]] = max(value, of_each.get(key[0], 0.0))
    above = sorted(
        (name for name in of_each if limit.times * of_each[name] > limit.floor), key=lambda one: -of_each[one]
    )
    own, rest = above[:MOST_OWN], [value for name, value in of_each.items() if name not in above[:MOST_OWN]]
    others = _level(limit, max(rest, default=0.0), f"{what}, of tenants without one of their own," if own else what)
    return Threshold(others, {name: _level(limit, of_each[name], what) for name in sorted(own)})


def _level(limit: Limit, highest: float, what: str) -> Level:
    raised = limit.times * highest
    if raised <= limit.floor:
        return Level(limit.floor, f"{_floor(limit)}; {what} was {number(highest)}")
    by = "" if limit.times == 1 else f"{number(limit.times)} x "
    if raised > limit.ceiling:
        return Level(
            limit.ceiling, f"{by}{what} ({number(highest)}) would be more than can be: {number(limit.ceiling)}"
        )
    return Level(raised, f"{by}{what}: {by}{number(highest)} = {number(raised)}")


def floor(limit: Limit, why: str) -> Level:
    return Level(limit.floor, f"{_floor(limit)}; {why}")


def _floor(limit: Limit) -> str:
    return f"{number(limit.floor)} is the floor: {limit.reason}"


def too_short(calm_s: float, window_s: int) -> str:
    """Why calm traffic taught nothing."""
    need = f"{length(LEAST_CALM_S)} are needed"
    return f"only {length(calm_s)} of calm were given to windows of {span(window_s)}, too short to learn from ({need})"


def length(seconds: float) -> str:
    """A length of time in hours and minutes: 2 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return " ".join([f"{hours} h"] * bool(hours) + [f"{minutes} min"] * bool(minutes))


def _seconds(times_ns: npt.NDArray[np.int64], chosen: npt.NDArray[np.bool_]) -> float:
    """How long the chosen scrapes last together, each until the next."""
    steps = np.diff(times_ns, append=times_ns[-1:]) / 1e9
    return float(steps[chosen].sum())


def _highest(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.max()) if len(known) else 0.0
