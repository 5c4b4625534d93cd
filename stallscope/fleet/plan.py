"""Which portions a dataset is diagnosed in: for each replica, runs of hours with enough requests to know the usual by.

All of it is in the dataset's list of parts: no table is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from stallscope.diagnosis.portion import EVER, Portion
from stallscope.trace import Trace
from stallscope.trace.stored import Part, StoredTables

ENOUGH_REQUESTS = 20_000  # of a portion: the 300 that a p99 needs, even of a tenant with a sixtieth of them
MOST_STEPS = 1_000_000  # beyond which another hour waits for the next portion: they set its memory


@dataclass(frozen=True)
class Task:
    """One portion of one replica, and where it is read: ``parts`` of the dataset ``folder``, cut to ``view`` (ns; None:
    as far as there is something)."""

    folder: Path
    source: str
    replica: str
    parts: tuple[Part, ...]
    portion: Portion
    view: tuple[int | None, int | None]

    @property
    def counted(self) -> Portion:
        """The portion without what was not asked for."""
        low, high = self.view
        return Portion(
            self.portion.start if low is None else max(self.portion.start, low),
            self.portion.end if high is None else min(self.portion.end, high),
        )

    @property
    def name(self) -> str:
        """Replica and hours, for people."""
        since = f" from {_shown(self.portion.start)}" if self.portion.start > -EVER else ""
        return f"{self.replica}{since}" + (f" to {_shown(self.portion.end)}" if self.portion.end < EVER else "")


def _shown(time_ns: int) -> str:
    return f"{datetime.fromtimestamp(time_ns // 1_000_000_000, tz=UTC):%Y-%m-%dT%H:%MZ}"


def plan(trace: Trace, start_ns: int | None = None, end_ns: int | None = None) -> list[Task]:
    """The portions of a stored trace, or of what it has between two times. Raises ValueError where it isn't stored."""
    tables = trace.tables
    if not isinstance(tables, StoredTables):
        raise ValueError(f"{trace.source} is not a dataset")
    of_replica: dict[str, list[Part]] = {}
    for part in tables.parts:
        if part.replica is not None:
            of_replica.setdefault(part.replica, []).append(part)
    return [
        _task(tables, trace.source, replica, parts, portion, (start_ns, end_ns))
        for replica, parts in of_replica.items()
        for portion in _portions(parts, start_ns, end_ns)
    ]


def span(trace: Trace) -> tuple[int, int]:
    """From when to when (ns) a stored trace's hours tell of something, by its list of parts."""
    tables = trace.tables
    parts = [part for part in tables.parts if part.rows.get("steps")] if isinstance(tables, StoredTables) else []
    return min((part.start for part in parts), default=0), max((part.end for part in parts), default=0)


def _task(
    tables: StoredTables,
    source: str,
    replica: str,
    parts: Sequence[Part],
    portion: Portion,
    asked: tuple[int | None, int | None],
) -> Task:
    low, high = portion.view
    view = (
        low if asked[0] is None else max(asked[0], -EVER if low is None else low),
        high if asked[1] is None else min(asked[1], EVER if high is None else high),
    )
    read = StoredTables(tables.folder, parts).narrowed(None, *view)
    return Task(tables.folder, source, replica, read.parts, portion, view)


def _portions(parts: Sequence[Part], start_ns: int | None, end_ns: int | None) -> Iterator[Portion]:
    """Runs of hours that follow one another and together are all time; of what was asked for, those that have any."""
    edges = [-EVER, *_edges(_hours(parts)), EVER]
    low, high = (-EVER if start_ns is None else start_ns), (EVER if end_ns is None else end_ns)
    inside = [edge for edge in edges if low < edge < high]
    # What lies before and after what was asked for is nobody's: it is not seen.
    edges = [-EVER, *inside, EVER]
    yield from (Portion(start, end) for start, end in pairwise(edges))


def _hours(parts: Sequence[Part]) -> dict[int, tuple[int, int]]:
    """Requests and steps of each hour (its start, ns) that has steps, in order."""
    found: dict[int, tuple[int, int]] = {}
    for part in sorted(parts, key=lambda one: one.hour):
        if not part.rows.get("steps"):
            continue
        begin = _start_of(part.hour)
        requests, steps = found.get(begin, (0, 0))
        found[begin] = requests + part.rows.get("requests", 0), steps + part.rows["steps"]
    return found


def _start_of(hour: str) -> int:
    return round(datetime.fromisoformat(f"{hour}:00:00").replace(tzinfo=UTC).timestamp()) * 1_000_000_000


def _edges(hours: Mapping[int, tuple[int, int]]) -> list[int]:
    """Where one portion ends and the next begins. The last ones join those before, rather than be too small."""
    edges: list[int] = []
    requests = steps = 0
    left = sum(count for count, _ in hours.values())
    for begin, (more, steps_more) in hours.items():
        full = requests >= ENOUGH_REQUESTS and left >= ENOUGH_REQUESTS
        if requests and (full or steps + steps_more > MOST_STEPS):
            edges.append(begin)
            requests = steps = 0
        requests, steps, left = requests + more, steps + steps_more, left - more
    return edges
