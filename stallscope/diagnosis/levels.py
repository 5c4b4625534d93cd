"""Portions that are slow from end to end: by themselves they look usual, beside the replica's others they don't.

What is usual is learned within a portion, so a stall that fills one raises its own bar. The medians of portions, of
which few are stalled, tell that there is something to look at; what it was, an SLO or a longer time can say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from stallscope.diagnosis.incidents import NOTICEABLE_NS
from stallscope.diagnosis.metrics import DELIVERY, IN_WORDS
from stallscope.diagnosis.timeline import Ints

FEWEST_PORTIONS = 3  # of a replica, for one of them to be told from the others
TIMES_USUAL = 3.0


@dataclass(frozen=True, order=True)
class Level:
    """A portion's steps were from ``start_ns`` to ``end_ns``; half of its requests waited for longer than ``medians``
    (ns, by metric: first token, longest gap; -1 where nobody waited for that)."""

    start_ns: int
    end_ns: int
    medians: tuple[int, ...]


def level_of(start_ns: int, end_ns: int, lengths: Sequence[Ints]) -> Level:
    """``lengths``: by metric, of each request (ns)."""
    medians = (int(np.median(each)) if len(each) else -1 for each in lengths[:DELIVERY])
    return Level(start_ns, end_ns, tuple(medians))


def slow_portions(levels: Mapping[str, Sequence[Level]]) -> Iterator[str]:
    """Of each replica, in words, the portions in which half of the requests waited far longer than in its others."""
    for replica, portions in sorted(levels.items()):
        if len(portions) < FEWEST_PORTIONS:
            continue
        usual = np.median([level.medians for level in portions], axis=0)
        for level in portions:
            for metric, (mine, others) in enumerate(zip(level.medians, usual.tolist(), strict=True)):
                if mine >= max(TIMES_USUAL * others, others + NOTICEABLE_NS):
                    waited = f"{IN_WORDS[metric]} p50 {mine / 1e9:.3g} s, mostly {max(others, 0) / 1e9:.3g} s"
                    when = f"from {_shown(level.start_ns)} to {_shown(level.end_ns)}"
                    yield f"{replica} was slow {when}: {waited}; so long a stall is no incident unless an SLO says so"


def _shown(time_ns: int) -> str:
    return f"{datetime.fromtimestamp(time_ns // 1_000_000_000, tz=UTC):%Y-%m-%dT%H:%M:%SZ}"
