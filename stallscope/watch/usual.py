"""What is usual on a replica, kept as time goes by: how long each tenant's waits are when nothing is wrong.

The bar is the one that a diagnosis of a trace sets (``diagnosis.incidents``), from the worst delays of the latest
seconds in place of those of the whole trace. While a stall is looked into nothing is learned, so that it does not
become usual.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from stallscope.diagnosis.incidents import NOTICEABLE_NS, bars_of
from stallscope.diagnosis.timeline import Floats, Ints

SECOND_NS = 1_000_000_000
BINS = 300  # seconds with such waits that are remembered
FEWEST_BINS = 20  # of them, below which nothing is unusual
NEVER = np.inf
_WINDOWS = 120  # of calm whose losses are remembered
_FEWEST_WINDOWS = 8
_LOSES_NOW_AND_THEN = 0.95  # of calm windows lose less
_FAR_MORE = 2.0
_WORTH_A_LOOK_S = 0.5  # in two windows
_WORTH_A_LOOK_YOUNG_S = 1.5  # while nobody knows what is usual: a stall may be older than the watch
_CROWDED_NS, _CROWDED_TIMES = (
    1e9,
    10.0,
)  # a wait that is too long whatever is usual: so much, and so many times the work


class Usual:
    """By kind (any small integer, as of a tenant and a metric): usual delay and bar, ns."""

    def __init__(self) -> None:
        self._worst = np.full((0, BINS), np.nan)  # log ns
        self._next = np.zeros(0, dtype=np.int64)
        self._bin = np.zeros(0, dtype=np.int64)  # the second that is not over, and its worst delay
        self._delay = np.zeros(0)
        self.median = np.zeros(0)
        self.bar = np.zeros(0)

    def learn(self, kind: Ints, time_ns: Ints, delay_ns: Floats) -> None:
        """Adds waits that ended, or were seen last, at these times."""
        if not len(kind):
            return
        self._grow(int(kind.max()) + 1)
        second = time_ns // SECOND_NS
        order = np.lexsort((delay_ns, second, kind))
        kind, second, delay = kind[order], second[order], delay_ns[order]
        last = np.append((np.diff(kind) != 0) | (np.diff(second) != 0), True)  # the worst of its second
        for one, when, worst in zip(kind[last].tolist(), second[last].tolist(), delay[last].tolist(), strict=True):
            if when == self._bin[one]:
                self._delay[one] = max(self._delay[one], worst)
                continue
            if self._bin[one]:
                self._worst[one, self._next[one] % BINS] = np.log(max(self._delay[one], 1e6))
                self._next[one] += 1
            self._bin[one], self._delay[one] = when, worst

    def settle(self) -> None:
        """Sets ``median`` and ``bar`` by what was learned so far; ``NEVER`` where that is too little."""
        self.median, self.bar = bars_of(self._worst)
        self.bar[self._next < FEWEST_BINS] = NEVER

    def bars(self, kind: Ints, own_ns: Floats) -> Floats:
        """The delay above which a wait of each kind is stalled, ns; ``own_ns``: the request's own work in each."""
        known = kind < len(self.bar)
        bar: Floats = np.where(known, np.append(self.bar, NEVER)[np.where(known, kind, -1)], NEVER)
        crowded = np.maximum(_CROWDED_NS, _CROWDED_TIMES * own_ns)
        return np.maximum(np.where(bar < NEVER, bar, crowded), NOTICEABLE_NS)

    def medians(self, kind: Ints) -> Floats:
        """The usual delay of each kind, ns; 0 where it is not known."""
        known = kind < len(self.median)
        median: Floats = np.append(self.median, 0.0)[np.where(known, kind, -1)]
        return np.nan_to_num(median)

    def _grow(self, kinds: int) -> None:
        more = kinds - len(self._next)
        if more > 0:
            self._worst = np.vstack([self._worst, np.full((more, BINS), np.nan)])
            self._next, self._bin = (np.append(old, np.zeros(more, dtype=np.int64)) for old in (self._next, self._bin))
            self._delay = np.append(self._delay, np.zeros(more))


class Losses:
    """Seconds by which a replica's requests waited too long, two windows at a time: whether that is far more than the
    little that a busy engine loses now and then. Set on StallBench's seeds 0 to 11."""

    def __init__(self) -> None:
        self.of_late = 0.0
        self._before = 0.0
        self._calm: deque[float] = deque(maxlen=_WINDOWS)

    def add(self, seconds: float) -> None:
        """The next window's."""
        self.of_late, self._before = self._before + seconds, seconds

    def learn(self) -> None:
        """What was lost of late is part of the usual."""
        self._calm.append(self.of_late)

    @property
    def is_young(self) -> bool:
        """Whether too little was seen to know what is usual."""
        return len(self._calm) < _FEWEST_WINDOWS

    @property
    def bar(self) -> float:
        """Seconds in two windows above which a stall is suspected."""
        if self.is_young:
            return _WORTH_A_LOOK_YOUNG_S
        return max(_WORTH_A_LOOK_S, _FAR_MORE * float(np.quantile(self._calm, _LOSES_NOW_AND_THEN)))

    @property
    def is_unusual(self) -> bool:
        return self.of_late > self.bar

    @property
    def is_over(self) -> bool:
        """Whether a stall that was, is no more."""
        return self.of_late <= self.bar / 2
