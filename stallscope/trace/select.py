"""A part of a trace: from a time, to a time, of one replica, of one model. It is a sound trace itself.

Steps are kept whole. A request that was there before the first of them stays, with its arrival; one that was there
after the last is open, with what it had given by then, as if the recording had ended there.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.errors import UsageError
from stallscope.trace.model import Trace
from stallscope.trace.tables import with_columns

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

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
    start, end = span(trace)
    first = start if since is None else read_time(since, start, end)
    last = end if until is None else read_time(until, start, end)
    if first >= last:
        raise UsageError(f"{trace.source}: --since {since} is not before --until {until or 'the end'}")
    return between(trace, first, last)


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
    trace = trace.narrowed(start_ns=start_ns, end_ns=end_ns)
    trace = replace(trace, tables=dict(trace.tables))
    kept = trace.steps.filter(
        pc.and_(pc.greater_equal(trace.steps["scheduled"], start_ns), pc.less_equal(trace.steps["ready"], end_ns))
    )
    if not kept.num_rows:
        raise UsageError(f"{trace.source}: no step lies between {_shown(start_ns)} and {_shown(end_ns)}")
    parts = [_replica_between(_of_replicas(trace, pa.array([name])), kept) for name in _names(kept)]
    tables = {name: pa.concat_tables([part[name] for part in parts]).unify_dictionaries() for name in trace.tables}
    begin, end = pc.min(kept["scheduled"]).as_py(), pc.max(kept["ready"]).as_py()
    tables["clients"] = trace.clients.filter(_within(trace.clients["sent"], begin, end))
    coded = {name: table.combine_chunks() for name, table in tables.items()}
    return replace(trace, tables=coded)


def _names(steps: pa.Table) -> list[str]:
    names: list[str] = pc.unique(steps["replica"].cast(pa.string())).to_pylist()
    return names


def _replica_between(trace: Trace, steps: pa.Table) -> dict[str, pa.Table]:
    """All tables of one replica, cut to its rows of ``steps``."""
    mine = steps.filter(pc.is_in(steps["replica"].cast(pa.string()), value_set=pa.array(_names(trace.steps))))
    first, last = pc.min(mine["step"]).as_py(), pc.max(mine["step"]).as_py()
    start, end = pc.min(mine["scheduled"]).as_py(), pc.max(mine["ready"]).as_py()
    residency = _cut_residency(trace, first, last)
    requests = _cut_requests(trace, residency, start, end)
    present = requests["request"].cast(pa.string())
    gaps = trace.gaps.filter(
        pc.and_(
            pc.is_in(trace.gaps["request"].cast(pa.string()), value_set=present.combine_chunks()),
            _within(trace.gaps["start"], start, end),
        )
    )
    # The gap in which the part ends was not over by then.
    over = pc.less_equal(pc.add(gaps["start"], gaps["length_ns"]), end)
    return {
        "replicas": trace.replicas.filter(pc.less_equal(trace.replicas["since"], end)),
        "steps": mine,
        "residency": residency,
        "requests": requests,
        "gaps": gaps.filter(over),
        "evictions": trace.evictions.filter(_within(trace.evictions["step"], first, last)),
        "clients": trace.clients.slice(0, 0),
        "gpu": trace.gpu.filter(_within(trace.gpu["time"], start, end)),
        "coverage": _cut_coverage(trace, mine, start, end),
    }


def _within(column: pa.ChunkedArray, low: int, high: int) -> pa.ChunkedArray:
    return pc.and_(pc.greater_equal(column, low), pc.less_equal(column, high))


def _cut_residency(trace: Trace, first: int, last: int) -> pa.Table:
    """Rows that share steps with first..last, cut to them; context and blocks are those of the new first step."""
    rows = trace.residency
    rows = rows.filter(pc.and_(pc.less_equal(rows["first_step"], last), pc.greater_equal(rows["last_step"], first)))
    old_first, old_last = _ints(rows["first_step"]), _ints(rows["last_step"])
    begin, end = np.maximum(old_first, first), np.minimum(old_last, last)
    context = _ints(rows["context_start"]) + (begin - old_first) * _ints(rows["tokens"])
    block = pc.max(trace.replicas["block_size"]).as_py() or 1
    held = -(-(context + _ints(rows["tokens"])) // block)
    blocks = np.where((begin > old_first) & (_ints(rows["kv_blocks"]) > 0), held, _ints(rows["kv_blocks"]))
    changed = {
        "first_step": pa.array(begin),
        "last_step": pa.array(end),
        "context_start": pa.array(context),
        "kv_blocks": pa.array(blocks, mask=_nulls(rows["kv_blocks"])),
    }
    return with_columns(rows, changed)


def _cut_requests(trace: Trace, residency: pa.Table, start: int, end: int) -> pa.Table:
    """Requests that arrived by the end, and were in a step or not over before the start; nothing later is known."""
    table = trace.requests
    names = table["request"].cast(pa.string())
    seen = pc.is_in(names, value_set=_mentioned(residency))
    over = pc.less(pc.fill_null(table["end"], start), start)
    open_before = pc.and_(pc.is_null(table["end"]), pc.less(table["arrival"], start))
    lives = pc.or_(seen, pc.invert(pc.or_(over, open_before)))
    table = table.filter(pc.and_(lives, pc.less_equal(table["arrival"], end)))
    later = {name: pc.greater(pc.fill_null(table[name], 0), end) for name in _STATIONS}
    cut = later["end"]
    changed = {name: pc.if_else(later[name], pa.scalar(None, pa.int64()), table[name]) for name in _STATIONS}
    changed["output_tokens"] = pc.if_else(cut, _output_by_then(table, residency), table["output_tokens"])
    nothing = pa.scalar(None, pa.string())
    changed["state"] = pc.if_else(cut, "open", table["state"].cast(pa.string()))
    changed["finish_reason"] = pc.if_else(cut, nothing, table["finish_reason"].cast(pa.string()))
    return with_columns(table, changed)


_STATIONS = ("queued", "scheduled", "first_token", "end", "delivered")


def _mentioned(residency: pa.Table) -> pa.Array:
    """Requests that rows name, as themselves or as holders."""
    both = [residency[name].cast(pa.string()).combine_chunks() for name in ("request", "holder")]
    return pc.drop_null(pc.unique(pa.concat_arrays([_flat(one) for one in both])))


def _flat(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _output_by_then(requests: pa.Table, residency: pa.Table) -> pa.Array:
    """Output tokens up to the last step kept: what was computed beyond the prompt, and the token that follows it."""
    rows = residency.select(["request", "context_start", "tokens", "first_step", "last_step"])
    steps = pc.add(pc.subtract(rows["last_step"], rows["first_step"]), 1)
    computed = pc.add(rows["context_start"], pc.multiply(rows["tokens"], steps))
    most = pa.table({"request": rows["request"].cast(pa.string()), "computed": computed})
    most = most.group_by("request").aggregate([("computed", "max")])
    position = pc.index_in(requests["request"].cast(pa.string()), value_set=_flat(most["request"].combine_chunks()))
    reached = pc.fill_null(_flat(most["computed_max"].combine_chunks()).take(_flat(position)), 0)
    beyond = pc.add(pc.subtract(reached, pc.fill_null(_flat(requests["prompt_tokens"]), 0)), 1)
    known = pc.fill_null(_flat(requests["output_tokens"]), 0)
    return pc.max_element_wise(pc.min_element_wise(beyond, known), 0)


def _cut_coverage(trace: Trace, steps: pa.Table, start: int, end: int) -> pa.Table:
    """Stretches that overlap the part, cut to it; their steps are counted again, in the last that had begun."""
    table = trace.coverage.filter(
        pc.and_(pc.less_equal(trace.coverage["start"], end), pc.greater_equal(trace.coverage["end"], start))
    )
    old_begin, old_end = _ints(table["start"]), _ints(table["end"])
    begin, finish = np.maximum(old_begin, start), np.minimum(old_end, end)
    stretch = np.maximum(np.searchsorted(old_begin, _ints(steps["scheduled"]), side="right") - 1, 0)
    missing = np.append(0, np.diff(_ints(steps["step"])) - 1)  # before each step
    lost = np.rint(np.bincount(stretch, missing, len(begin))).astype(np.int64)
    whole = (begin == old_begin) & (finish == old_end)
    changed = {
        "start": pa.array(begin),
        "end": pa.array(finish),
        "steps_seen": pa.array(np.bincount(stretch, minlength=len(begin))),
        "steps_lost": pa.array(np.where(whole, _ints(table["steps_lost"]), lost)),
    }
    return with_columns(table, changed)


# --- columns ------------------------------------------------------------------------------------------------------


def _ints(column: pa.ChunkedArray) -> Ints:
    return np.asarray(column.fill_null(0).to_numpy(), dtype=np.int64)


def _nulls(column: pa.ChunkedArray) -> Mask:
    return np.asarray(pc.is_null(column).to_numpy(), dtype=np.bool_)
