"""What a batch does not explain of a recording's time, split by whether it would have happened with another batch.

Independent of the batch, and replayed when it happened: pauses of the host between steps, steps that took many times
what their batch takes, stretches in which all steps were slow (clocks that dropped). Dependent on it, and drawn anew
for the replayed batch: the usual scatter, as factors on a step's duration. Else a culprit's unexplained cost would
stay after the culprit has gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.diagnosis.timeline import Floats, Ints

LEAST_PAUSE_NS = 20_000_000
PAUSE_FACTOR = 10.0  # a step that took so many times its predicted duration was stopped, whatever was in it
CLOCK_BIN_NS = 2_000_000_000
LEAST_CLOCK_CHANGE = 0.12
_FEWEST_IN_BIN = 8
SLICE_NS = 10_000_000  # noise holds for so long: replays of the same draw meet the same noise at the same time


@dataclass(frozen=True, eq=False)
class Disturbances:
    """Of one replica; times in ns.

    ``host_ns`` and ``host_request_ns``: host work before a dispatch, and its part by request of the batch. ``pauses``
    (start, length): the host stood still. ``stops`` (start, length): so much longer did a step take that was in flight
    then. ``clock``: factor on the duration of steps, by ``CLOCK_BIN_NS`` since ``clock_start``. ``factors``: scatter.
    """

    host_ns: float
    host_request_ns: float
    pauses: list[tuple[int, int]]
    stops: list[tuple[int, int]]
    clock_start: int
    clock: list[float]
    factors: Floats

    def without_faults(self) -> Disturbances:
        """The same engine without pauses, stops and drops of its clocks."""
        return Disturbances(self.host_ns, self.host_request_ns, [], [], self.clock_start, [], self.factors)

    @property
    def any_fault(self) -> bool:
        return bool(self.pauses or self.stops or any(factor != 1.0 for factor in self.clock))


@dataclass(frozen=True, eq=False)
class StepTimes:
    """Arrays over steps, ns: the slice (``start`` to ``end``), host gap before it, size of the batch and the predicted
    duration."""

    start: Ints
    end: Ints
    host_gap: Ints
    size: Floats
    predicted: Floats


def read_disturbances(steps: StepTimes) -> Disturbances:
    """Splits what the step cost leaves unexplained."""
    duration = (steps.end - steps.start).astype(np.float64)
    ratio = duration / np.maximum(steps.predicted, 1.0)
    clock_start = int(steps.start[0])
    clock = _clock(steps.start, ratio, clock_start)
    factor = np.asarray(clock)[np.minimum((steps.start - clock_start) // CLOCK_BIN_NS, len(clock) - 1)]
    ratio = ratio / factor
    excess = duration - steps.predicted * factor
    stopped = (ratio > PAUSE_FACTOR) & (excess > LEAST_PAUSE_NS)
    host_ns, host_request_ns = _host_work(steps.host_gap.astype(np.float64), steps.size)
    host_excess = steps.host_gap - host_ns - host_request_ns * steps.size
    paused = (host_excess > LEAST_PAUSE_NS) & (steps.host_gap > PAUSE_FACTOR * (host_ns + host_request_ns * steps.size))
    return Disturbances(
        host_ns,
        host_request_ns,
        _stretches(steps.start - steps.host_gap, host_excess, paused),
        _stretches(steps.start, excess, stopped),
        clock_start,
        clock,
        ratio[~stopped & (ratio > 0)],
    )


def _clock(start: Ints, ratio: Floats, origin: int) -> list[float]:
    """Factor on all steps by time: the median of each bin where it is far from 1, else 1."""
    bins = (start - origin) // CLOCK_BIN_NS
    grouped = pd.Series(ratio).groupby(bins)
    median, count = grouped.median(), grouped.size()
    changed = median.where((count >= _FEWEST_IN_BIN) & ((median - 1.0).abs() >= LEAST_CLOCK_CHANGE), 1.0)
    values: list[float] = changed.reindex(range(int(bins.max()) + 1), fill_value=1.0).to_list()
    return values


def _host_work(gap: Floats, size: Floats) -> tuple[float, float]:
    """Fixed part and part by request of the usual host gap, ns: Theil and Sen's line through medians by batch size."""
    medians = pd.Series(gap).groupby(size.astype(np.int64)).median()
    if len(medians) < 2:
        return float(np.median(gap)), 0.0
    low, high = medians.iloc[: max(len(medians) // 3, 1)], medians.iloc[-max(len(medians) // 3, 1) :]
    x_low, x_high = float(low.index.to_numpy().mean()), float(high.index.to_numpy().mean())
    slope = max((float(high.median()) - float(low.median())) / max(x_high - x_low, 1.0), 0.0)
    return max(float(np.median(gap - slope * size)), 0.0), slope


def _stretches(
    start: Ints, length: Floats, chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> list[tuple[int, int]]:
    return list(zip(start[chosen].tolist(), length[chosen].astype(np.int64).tolist(), strict=True))
