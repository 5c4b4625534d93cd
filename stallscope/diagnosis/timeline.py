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

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_NOBODY: Ints = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Timeline:
    """Arrays over the n steps seen, in order. Times are int64 ns since the epoch.

    ``start`` and ``end`` bound the slice; ``before`` is the end of the previous slice (for the first step, its own
    schedule); ``idle_start`` and ``idle_end`` bound the idle part of the gap; ``observed`` is False where steps are
    missing between this one and the one before.
    """

    step: Ints
    scheduled: Ints
    before: Ints
    idle_start: Ints
    idle_end: Ints
    start: Ints
    end: Ints
    observed: NDArray[np.bool_]

    @staticmethod
    def of_steps(steps: pd.DataFrame, arrivals: Ints = _NOBODY) -> Timeline:
        """Timeline of one replica's rows of the ``steps`` table, ordered by step (columns as in the schema).

        ``arrivals``: when its requests arrived (ns, ascending).
        """
        step, scheduled, dispatched, ready, idle = (
            steps[name].to_numpy(np.int64) for name in ("step", "scheduled", "dispatched", "ready", "idle_ns")
        )
        before = np.empty_like(ready)
        before[1:] = np.maximum.accumulate(ready)[:-1]
        before[:1] = scheduled[:1] - idle[:1]
        end = np.maximum(ready, before)
        start = np.minimum(np.maximum(before, dispatched), end)
        observed = np.ones(len(step), dtype=bool)
        observed[1:] = np.diff(step) == 1
        latest = np.clip(scheduled, before, start)
        woken = np.append(arrivals, latest.max(initial=0))[np.searchsorted(arrivals, before)]
        idle_end = np.where(observed, np.clip(woken, np.minimum(before + idle, latest), latest), latest)
        idle_start = np.maximum(idle_end - idle, before)
        return Timeline(step, scheduled, before, idle_start, idle_end, start, end, observed)

    def __len__(self) -> int:
        return len(self.step)

    @cached_property
    def duration(self) -> Ints:
        """Length of each slice, ns."""
        return self.end - self.start

    @cached_property
    def knots(self) -> Ints:
        """Four times a step at which a cumulative function may bend: idle start and end, slice start and end."""
        return np.stack([self.idle_start, self.idle_end, self.start, self.end], axis=1).ravel()

    def over_slices(self, per_step: Floats) -> Floats:
        """Cumulative function that rises by ``per_step[k]`` evenly over slice k; its values at ``knots``."""
        after = np.cumsum(per_step)
        before = after - per_step
        return np.stack([before, before, before, after], axis=1).ravel()

    @cached_property
    def host_gap(self) -> Floats:
        """Cumulative host-gap time at ``knots``, ns."""
        return self._over_gaps(self.observed)

    @cached_property
    def unobserved(self) -> Floats:
        """Cumulative time between slices in which steps are missing, at ``knots``, ns."""
        return self._over_gaps(~self.observed)

    @cached_property
    def idle(self) -> Floats:
        """Cumulative time without any request, at ``knots``, ns."""
        length = self.idle_end - self.idle_start
        after = np.cumsum(length)
        return np.stack([after - length, after, after, after], axis=1).ravel().astype(np.float64)

    def _over_gaps(self, counted: NDArray[np.bool_]) -> Floats:
        early = np.where(counted, self.idle_start - self.before, 0)
        late = np.where(counted, self.start - self.idle_end, 0)
        late_sum = np.cumsum(late)
        early_sum = np.cumsum(early)
        first = early_sum + late_sum - late
        last = early_sum + late_sum
        total: Floats = np.stack([first, first, last, last], axis=1).ravel().astype(np.float64)
        return total

    def at(self, values: Floats, times: Ints) -> Floats:
        """A cumulative function, given by its values at ``knots``, at any times."""
        # Relative to the start: 2^53 ns would be 104 days, and epoch times are beyond that.
        origin = self.knots[0]
        found: Floats = np.interp((times - origin).astype(np.float64), self._relative_knots, values)
        return found

    @cached_property
    def _relative_knots(self) -> Floats:
        relative: Floats = (self.knots - self.knots[0]).astype(np.float64)
        return relative

    def position(self, step: Ints) -> Ints:
        """Index of the first step seen at or after each given step number."""
        return np.searchsorted(self.step, step).astype(np.int64)
