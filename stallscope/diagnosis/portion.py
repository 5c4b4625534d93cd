"""A portion of a replica's time that is diagnosed by itself, so that the diagnoses of all portions add up to one.

Each is seen with a margin on both sides, which says what led up to a stall and how it went on; an incident belongs to
the portion in which it began. One that goes on for long is cut where portions meet, and put together afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stallscope.diagnosis.incidents import Waits, Window
from stallscope.diagnosis.timeline import Ints, Mask

BEFORE_NS = 60_000_000_000  # seen before a portion: what led up to a stall, and that it began there
AFTER_NS = 180_000_000_000  # and after it
REACH_NS = 120_000_000_000  # a stall that goes on for no longer after the end is judged as a whole
EVER = 1 << 62  # ns, later than any time


@dataclass(frozen=True)
class Portion:
    """From ``start`` to before ``end``, ns."""

    start: int = -EVER
    end: int = EVER

    @property
    def view(self) -> tuple[int | None, int | None]:
        """From when to when (ns) there is something to see; None: from the first, or to the last."""
        return (
            self.start - BEFORE_NS if self.start > -EVER else None,
            self.end + AFTER_NS if self.end < EVER else None,
        )

    def holds(self, times: Ints) -> Mask:
        """Which of the times (ns) lie in it."""
        held: Mask = (times >= self.start) & (times < self.end)
        return held

    def own(self, window: Window, waits: Waits) -> Window | None:
        """What of a window this portion answers for: all, its part of a long one, or (None) nothing."""
        before = window.start < self.start and window.end <= self.start + REACH_NS
        if before or window.start >= self.end:
            return None
        if window.start >= self.start and window.end <= self.end + REACH_NS:
            return window
        table = waits.table.loc[window.waits]
        mine = table[self.holds(table["begin"].to_numpy(np.int64))]
        if mine.empty:
            return None
        return Window(int(mine["begin"].min()), int(mine["end"].max()), mine.index.to_numpy(np.int64))


WHOLE = Portion()
