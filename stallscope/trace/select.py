"""A part of a trace: from a time, to a time, of one replica, of one model. It is a sound trace itself.

Steps are kept whole. A request that was there before the first of them stays, with its arrival; one that was there
after the last is open, with what it had given by then, as if the recording had ended there.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from stallscope.errors import UsageError
from stallscope.trace.cut import cut
from stallscope.trace.model import Trace

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS_NS = {"ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000, "h": 3_600_000_000_000, "d": 86_400_000_000_000}
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}(?:\.\d+)?))?")
_EXAMPLES = "give 2026-01-31T14:05:00, 14:05, +30s (after the start) or -5m (before the end)"


def span(trace: Trace) -> tuple[int, int]:
    """When the first step was scheduled and the last one ready, ns; zeros without steps."""
    steps = trace.columns("steps", ["scheduled", "ready"])
    return pc.min(steps["scheduled"]).as_py() or 0, pc.max(steps["ready"]).as_py() or 0


def select(
    trace: Trace,
    *,
    since: str | None = None,
    until: str | None = None,
    replica: str | None = None,
    model: str | None = None,
) -> Trace:
    """The part of a trace that lies between two times (``read_time``), of a replica, of the replicas of a model.

    Raises UsageError where nothing is left, and where a name or a time can't be meant.
    """
    if model is not None:
        served = trace.replicas.filter(_is(trace.replicas["model"], _known(trace, "model", model)))
        trace = _of_replicas(trace, pc.unique(served["replica"].cast(pa.string())))
    if replica is not None:
        trace = _of_replicas(trace, pa.array([_known(trace, "replica", replica)]))
    if since is None and until is None:
        return trace
    return between(trace, *time_range(trace.source, *span(trace), since, until))


def time_range(source: str, start_ns: int, end_ns: int, since: str | None, until: str | None) -> tuple[int, int]:
    """From when to when (ns) a part of a trace goes that goes from ``start_ns`` to ``end_ns``. Raises UsageError.

    A date may lie before the trace as ``since``, after it as ``until``: an alert and a board name a range without
    knowing when the recording began and ended.
    """
    early = None if since is None else _iso(since)
    late = None if until is None else _iso(until)
    from_start = since is None or (early is not None and early < start_ns)
    to_end = until is None or (late is not None and late > end_ns)
    first = start_ns if since is None or from_start else read_time(since, start_ns, end_ns)
    last = end_ns if until is None or to_end else read_time(until, start_ns, end_ns)
    if first >= last:
        raise UsageError(f"{source}: --since {since} is not before --until {until or 'the end'}")
    return first, last


def read_time(text: str, start_ns: int, end_ns: int) -> int:
    """A time within a trace that goes from ``start_ns`` to ``end_ns``, as ns since the epoch.

    ISO 8601 (the local zone where it names none), a clock time (of the day of the trace), ``+30s`` after the start,
    ``-5m`` before the end; amounts may be joined: ``+1h30m``. Raises UsageError for anything else, and for what lies
    outside the trace.
    """
    found = _relative(text, start_ns, end_ns) or _clock_time(text, start_ns, end_ns) or _iso(text)
    if found is None:
        raise UsageError(f"time {text!r} can't be read; {_EXAMPLES}")
    if not start_ns <= found <= end_ns:
        raise UsageError(
            f"time {text!r} lies outside the trace, which goes from {_shown(start_ns)} to {_shown(end_ns)}"
        )
    return found


def _relative(text: str, start_ns: int, end_ns: int) -> int | None:
    amounts = _AMOUNT.findall(text[1:])
    if text[:1] not in ("+", "-") or not amounts or "".join(map("".join, amounts)) != text[1:]:
        return None
    length = round(sum(float(number) * _UNITS_NS[unit] for number, unit in amounts))
    return start_ns + length if text[0] == "+" else end_ns - length


def _clock_time(text: str, start_ns: int, end_ns: int) -> int | None:
    """The first such time of day in the trace; if there is none, that of its first day."""
    found = _CLOCK.fullmatch(text)
    if found is None or int(found[1]) > 23 or int(found[2]) > 59 or float(found[3] or 0) >= 60:
        return None
    first = _local(start_ns).date()
    days = (_local(end_ns).date() - first).days
    times = [_at(first + timedelta(days=day), found) for day in range(min(days, 1) + 1)]
    return next((time for time in times if start_ns <= time <= end_ns), times[0])


def _at(day: date, clock: re.Match[str]) -> int:
    midnight = datetime(day.year, day.month, day.day).astimezone()
    return _ns(midnight) + round((int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3] or 0)) * 1e9)


def _iso(text: str) -> int | None:
    try:
        return _ns(datetime.fromisoformat(text).astimezone())
    except ValueError:
        return None


def _ns(time: datetime) -> int:
    """Exact: a float of seconds is not, so far from the epoch."""
    since = time - datetime(1970, 1, 1, tzinfo=UTC)
    return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1_000


def _local(time_ns: int) -> datetime:
    return datetime.fromtimestamp(time_ns / 1e9, tz=UTC).astimezone()


def _shown(time_ns: int) -> str:
    return _local(time_ns).isoformat(timespec="milliseconds")


# --- of some replicas ---------------------------------------------------------------------------------------------


def _known(trace: Trace, column: str, name: str) -> str:
    """``name``, if one of the replicas has it."""
    names = trace.columns("replicas", [column])[column].cast(pa.string())
    known = sorted(one for one in pc.unique(names).to_pylist() if one is not None)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:5]
        raise UsageError(f"{trace.source}: no {column} {name!r}; it has {', '.join(sorted(near)) or 'none'}")
    return name


def _of_replicas(trace: Trace, replicas: pa.Array) -> Trace:
    """Rows of these replicas, in every table; what clients sent elsewhere is left out."""
    if trace.is_stored:
        return trace.narrowed(replicas.to_pylist())
    tables = {
        name: table.filter(pc.is_in(table["replica"].cast(pa.string()), value_set=replicas))
        for name, table in trace.tables.items()
    }
    return replace(trace, tables=tables)


def _is(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    return pc.equal(column.cast(pa.string()), name)


# --- between two times --------------------------------------------------------------------------------------------


def between(trace: Trace, start_ns: int, end_ns: int) -> Trace:
    """What happened in the steps that were scheduled from ``start_ns`` on and ready by ``end_ns``.

    Raises UsageError where there is no such step.
    """
    part = cut(trace.narrowed(start_ns=start_ns, end_ns=end_ns), start_ns, end_ns)
    if part is None:
        raise UsageError(f"{trace.source}: no step lies between {_shown(start_ns)} and {_shown(end_ns)}")
    return part
