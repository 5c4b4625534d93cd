"""One replica's time, cut exactly: every instant lies in one step's slice, in a host gap, idle, or unobserved.

Slices never overlap, even where spans do (asynchronous scheduling): step k's slice runs from the later of the previous
ready and its own dispatch to its own ready. What lies between two slices is host gap, less the time in which the
engine had no request at all (idle), unless steps are missing in between: then nobody saw it (unobserved). Idle ends
when a request arrives: what holds the host up after that is host gap again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Ints = NDArray[np.signedinteger]  # times are int64, codes and positions may be int32
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

TIMELINE_COLUMNS = ("step", "scheduled", "dispatched", "ready", "idle_ns")  # of ``steps``
_NOBODY: Ints = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Intervals:
    """Stretches of time (ns), or of steps by their positions, in order and without overlaps; ``end`` is outside."""

    begin: Ints
    end: Ints

    @cached_property
    def _passed(self) -> Ints:
        """Length of the first i intervals."""
        passed = np.zeros(len(self.begin) + 1, dtype=np.int64)
        np.cumsum(self.end - self.begin, out=passed[1:])
        return passed

    def before(self, times: Ints) -> Ints:
        """How much of the intervals lies before each time."""
        if not len(self.begin):
            return np.zeros_like(times)
        begun = np.searchsorted(self.begin, times, side="right")
        rest = np.maximum(self.end[begun - 1] - times, 0)
        return self._passed[begun] - np.where(begun > 0, rest, 0)

    def between(self, begin: Ints, end: Ints) -> Ints:
        """How much of the intervals lies between each two times."""
        return self.before(end) - self.before(begin)

    def merged(self) -> Intervals:
        """The same stretches, of intervals in any order that may overlap."""
        order = np.argsort(self.begin, kind="stable")
        begin, end = self.begin[order], np.maximum.accumulate(self.end[order])
        fresh = np.ones(len(begin) + 1, dtype=np.bool_)
        fresh[1:-1] = begin[1:] > end[:-1]
        return Intervals(begin[fresh[:-1]], end[fresh[1:]])


@dataclass(frozen=True, eq=False)
class Places:
    """Times found in a timeline: each lies in the slice of step ``position``, of which the share ``passed`` is over, or
    in the gap before that slice (0) or after the last one (1)."""

    position: Ints
    passed: Floats

    def take(self, rows: Ints | Mask) -> Places:
        return Places(self.position[rows], self.passed[rows])


@dataclass(frozen=True, eq=False)
class Timeline:
    """The n steps seen, in order. Times are int64 ns since the epoch.

    Slice k runs from ``start[k]`` to ``end[k]``; ``before[k]`` is the end of the previous slice (for the first step,
    its own schedule); ``bounds`` (n + 1) holds both. ``observed`` is False where steps are missing between this one and
    the one before. ``idle`` and ``unobserved`` are the parts of the gaps that are no host gap. The steps' numbers are
    kept as that of the first (``first_step``) and how much ``later`` each is.
    """

    first_step: int
    later: Ints
    bounds: Ints
    start: Ints
    observed: Mask
    idle: Intervals
    unobserved: Intervals

    @staticmethod
    def of_steps(steps: pd.DataFrame, arrivals: Ints = _NOBODY) -> Timeline:
        """Timeline of one replica's rows of the ``steps`` table, ordered by step (columns as in the schema).

        ``arrivals``: when its requests arrived (ns, ascending).
        """
        step, scheduled, dispatched, ready, idle = (steps[name].to_numpy(np.int64) for name in TIMELINE_COLUMNS)
        bounds = np.empty(len(step) + 1, dtype=np.int64)
        bounds[:1] = scheduled[:1] - idle[:1]
        bounds[1:] = ready
        np.maximum.accumulate(bounds, out=bounds)
        before, end = bounds[:-1], bounds[1:]
        start = np.maximum(before, dispatched)
        np.minimum(start, end, out=start)
        observed = np.ones(len(step), dtype=bool)
        observed[1:] = np.diff(step) == 1

        # Few gaps hold anything but the host's own time.
        some = np.flatnonzero((idle > 0) | ~observed)
        low, high, length, seen = before[some], start[some], idle[some], observed[some]
        latest = np.clip(scheduled[some], low, high)
        woken = np.append(arrivals, latest.max(initial=0))[np.searchsorted(arrivals, low)]
        idle_end = np.where(seen, np.clip(woken, np.minimum(low + length, latest), latest), latest)
        idle_start = np.maximum(idle_end - length, low)
        missed = (np.stack(edges, axis=1)[~seen].ravel() for edges in ((low, idle_end), (idle_start, high)))
        return Timeline(
            int(step[0]),
            narrow(step - step[0]),
            bounds,
            start,
            observed,
            Intervals(idle_start, idle_end),
            Intervals(*missed),
        )

    def __len__(self) -> int:
        return len(self.start)

    @property
    def step(self) -> Ints:
        """The steps' numbers."""
        return self.first_step + self.later.astype(np.int64)

    @property
    def before(self) -> Ints:
        return self.bounds[:-1]

    @property
    def end(self) -> Ints:
        return self.bounds[1:]

    @cached_property
    def slices(self) -> Intervals:
        return Intervals(self.start, self.end)

    @cached_property
    def duration(self) -> Ints:
        """Length of each slice, ns."""
        return self.end - self.start

    def host_gap(self, begin: Ints, end: Ints) -> Ints:
        """Time of the host's own between each two times within the timeline, ns."""
        spent = self.slices.between(begin, end) + self.idle.between(begin, end)
        return end - begin - spent - self.unobserved.between(begin, end)

    def steps_before(self, step: Ints) -> Ints:
        """How many steps were seen before each step number."""
        if self.observed.all():
            before: Ints = np.clip(step - self.first_step, 0, len(self))
            return before
        return np.searchsorted(self.later, step - self.first_step)

    def locate(self, times: Ints) -> Places:
        """Where each time lies."""
        position = np.minimum(np.searchsorted(self.end, times), len(self) - 1)
        start = self.start[position]
        length = np.maximum(self.end[position] - start, 1)
        return Places(position, np.clip((times - start) / length, 0.0, 1.0))


def narrow(values: Ints) -> Ints:
    """As int32 if they fit."""
    fits = not len(values) or (values.max() < 2**31 and values.min() >= -(2**31))
    return values.astype(np.int32) if fits else values


def expand(begin: Ints, end: Ints) -> Ints:
    """The integers of each range from ``begin`` to below ``end``, one range after the other."""
    count = end - begin
    return np.repeat(begin - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))


def running_total(per_step: Floats) -> Floats:
    """The sums of the first 0, 1, ... n values (n + 1)."""
    total = np.zeros(len(per_step) + 1)
    np.cumsum(per_step, out=total[1:])
    return total


def at(running: Floats, places: Places) -> Floats:
    """A running total over steps at any places: it rises evenly over each slice."""
    before = running[places.position]
    value: Floats = before + places.passed * (running[places.position + 1] - before)
    return value
