"""Thresholds: floors, raised by what calm traffic shows, each with its reason.

Calm is all that was sampled but for incidents and what a window that touches one still sees of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stallscope.alerts.promql import equal, number, span, unequal
from stallscope.alerts.quantities import Counted, Floats, Quantity
from stallscope.alerts.settings import LEAST_CALM_S, MARGIN_S, MOST_OWN, Limit
from stallscope.alerts.texts import ByLabel, Part
from stallscope.diagnosis.model import Incident
from stallscope.watch.samples import Samples

PERSONAL = frozenset({"culprit", "tenant"})  # labels of which each value has a usual of its own
NO_CALM = "no calm traffic was given to learn from"


@dataclass(frozen=True)
class Level:
    """A number to compare with, and why it is that one; ``learned``: from calm traffic."""

    value: float
    reason: str
    learned: bool = False


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
        if not highest:
            return Threshold(
                Level(limit.floor, f"{_floor(limit)}; {length(calm_s)} of calm had none of it", learned=True)
            )
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


def learned(quantity: Quantity, limit: Limit, highest: Mapping[tuple[str, ...], float], what: str) -> Threshold:
    """The threshold by the highest calm value of each series: of one for each tenant that lies above the floor; else of
    one for all, as a replica is like the next."""
    if not (quantity.by and quantity.by[0] in PERSONAL):
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
        return Level(limit.floor, f"{_floor(limit)}; {what} was {number(highest)}", learned=True)
    by = "" if limit.times == 1 else f"{number(limit.times)} x "
    if raised > limit.ceiling:
        most = number(limit.ceiling)
        return Level(limit.ceiling, f"{by}{what} ({number(highest)}) would be more than can be: {most}", learned=True)
    return Level(raised, f"{by}{what}: {by}{number(highest)} = {number(raised)}", learned=True)


def floor(limit: Limit, why: str) -> Level:
    return Level(limit.floor, f"{_floor(limit)}; {why}")


def _floor(limit: Limit) -> str:
    return f"{number(limit.floor)} is the floor: {limit.reason}"


def too_short(calm_s: float, window_s: int) -> str:
    """Why calm traffic taught nothing."""
    need = f"{length(LEAST_CALM_S)} are needed"
    return f"only {length(calm_s)} of calm were given to windows of {span(window_s)}, too short to learn from ({need})"


def length(seconds: float) -> str:
    """A length of time in hours and minutes: 2 h 10 min; in days from two on."""
    if seconds >= 2 * 86_400:
        return f"{seconds / 86_400:.3g} days"
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
