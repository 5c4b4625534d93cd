"""What a backtest runs rules over: samples of one trace, its incidents, and when rules are evaluated on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stallscope.diagnosis.model import Incident
from stallscope.diagnosis.slo import Slo
from stallscope.errors import InconclusiveError
from stallscope.watch.families import LAST_SEEN
from stallscope.watch.rehearsal import Part, Progress, rehearse
from stallscope.watch.samples import Samples


@dataclass(frozen=True, eq=False)
class Timeline:
    """A trace as a scraper saw it; ``name`` is what it is called in the answer."""

    name: str
    samples: Samples
    incidents: tuple[Incident, ...]


def rehearsed(
    trace: str, slos: Sequence[Slo] = (), progress: Progress | None = None, part: Part | None = None
) -> Timeline:
    """The timeline of a trace (a file, a folder or a URL), or of the ``part`` of it.

    Raises UsageError where there is nothing sound.
    """
    found = rehearse(trace, slos=slos, part=part, progress=progress)
    return Timeline(trace, found.samples, found.incidents)


@dataclass(frozen=True)
class Grid:
    """Evaluations of rules between the scrapes of a timeline, in whole ms from the first evaluation on.

    A scrape and an evaluation hardly ever coincide, so that a window of 10 s holds one of the samples that are scraped
    every 10 s, not two: here scrapes are ``phase_ms`` after evaluations, half of the shorter interval, which is the
    middle of what chance gives.
    """

    start_ns: int
    scrape_ms: int
    evaluation_ms: int
    phase_ms: int
    slots: npt.NDArray[np.int64]  # of each scrape: how many scrape intervals after the first it was
    until_ns: int  # the end of what was recorded: a rehearsal scrapes on until the last stall is judged

    @property
    def length_s(self) -> float:
        """From the first scrape until there was nothing recorded any more."""
        return (self.until_ns - self.start_ns) / 1e9 - self.phase_ms / 1e3

    def is_recorded(self, time_ns: int) -> bool:
        """Whether there still was something recorded when that was scraped which an evaluation at a time sees."""
        return time_ns - self.phase_ms * 1_000_000 <= self.until_ns

    @property
    def evaluations(self) -> int:
        """The last one sees the last scrape."""
        return 1 + math.ceil((self.phase_ms + int(self.slots[-1]) * self.scrape_ms) / self.evaluation_ms)

    def time_ns(self, elapsed_ms: int) -> int:
        return self.start_ns + elapsed_ms * 1_000_000

    @property
    def end_ns(self) -> int:
        return self.time_ns((self.evaluations - 1) * self.evaluation_ms)


def grid_of(timeline: Timeline, evaluation_s: float) -> Grid:
    """Raises InconclusiveError where there are too few scrapes, or no two of them have the same distance."""
    times = timeline.samples.times_ns
    if len(times) < 2:
        raise InconclusiveError(f"{timeline.name}: {len(times)} scrapes; rules need at least 2, give a longer trace")
    scrape_ms = round(float(np.median(np.diff(times))) / 1e6)
    slots = np.rint((times - times[0]) / (max(scrape_ms, 1) * 1e6)).astype(np.int64)
    if scrape_ms < 2 or (np.diff(slots) < 1).any():
        raise InconclusiveError(f"{timeline.name}: scrapes are not at one interval; record them again")
    evaluation_ms = round(evaluation_s * 1e3)
    phase_ms = min(scrape_ms, evaluation_ms) // 2
    start_ns = int(times[0]) - phase_ms * 1_000_000
    return Grid(start_ns, scrape_ms, evaluation_ms, phase_ms, slots, _until_ns(timeline.samples))


def _until_ns(samples: Samples) -> int:
    """When the last span ended, or the last scrape was, where nothing tells that."""
    last = int(samples.times_ns[-1])
    seen = [values for _, values in samples.of(LAST_SEEN.name) if not np.isnan(values).all()]
    if not seen:
        return last
    return min(last, round(max(float(np.nanmax(values)) for values in seen) * 1e9))
