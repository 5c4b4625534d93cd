"""The part of a trace between two times: which rows of each table are left, and what changes in them.

All that decides is integers, so of a stored trace no names are read for it; what is left is read where it is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.trace.model import Trace
from stallscope.trace.references import Ints
from stallscope.trace.schema import TABLES
from stallscope.trace.stored import LazyTables
from stallscope.trace.tables import encode, plain_schema

Mask = npt.NDArray[np.bool_]

_EVER = 1 << 62
_STATIONS = ("queued", "scheduled", "first_token", "end", "delivered")


def cut(trace: Trace, start_ns: int | None, end_ns: int | None) -> Trace | None:
    """What happened in the steps that were scheduled from ``start_ns`` on and ready by ``end_ns``; None: no step was.

    A side that is None is not cut. Of a stored trace, the part is stored itself.
    """
    steps = _Columns(trace, "steps", "step", "scheduled", "ready")
    low, high = (-_EVER if start_ns is None else start_ns), (_EVER if end_ns is None else end_ns)
    kept = np.flatnonzero((steps["scheduled"] >= low) & (steps["ready"] <= high))
    if not len(kept):
        return None
    bounds = _Bounds.of(steps, kept).opened(before=start_ns is None, after=end_ns is None)
    left = {"steps": _Left(kept, steps.at(kept))}
    left["residency"] = _residency(trace, bounds)
    left["requests"] = _requests(trace, bounds, left["residency"])
    left["gaps"] = _gaps(trace, bounds, left["requests"])
    left["coverage"] = _coverage(trace, bounds, steps, kept)
    sent = _Columns(trace, "clients", "sent")["sent"]
    left["clients"] = _Left(np.flatnonzero((sent >= bounds.start.min()) & (sent <= bounds.end.max())))
    left["evictions"] = _Left(np.flatnonzero(bounds.hold_steps(_Columns(trace, "evictions", "step"), "step", "step")))
    left["gpu"] = _Left(np.flatnonzero(bounds.hold(_Columns(trace, "gpu", "time"), "time")))
    said = _Columns(trace, "replicas", "since")
    code = said.codes(bounds.replicas)
    left["replicas"] = _Left(np.flatnonzero((code >= 0) & (said["since"] <= bounds.end[code])))
    tables = CutTables(trace, left)
    return replace(trace, tables=tables if trace.is_stored else dict(tables))


@dataclass(frozen=True, eq=False)
class _Left:
    """The ``rows`` of a table that are left, some of its ``columns`` as they are now (the others are as they were), and
    the rows of all requests that other columns name (``refers``; -1: none)."""

    rows: Ints
    columns: Mapping[str, pa.Array] = field(default_factory=dict)
    refers: Mapping[str, Ints] = field(default_factory=dict)


class CutTables(LazyTables):
    """What is left of another trace's tables."""

    def __init__(self, whole: Trace, left: Mapping[str, _Left]) -> None:
        self._whole = whole
        self._left = left

    def __getitem__(self, name: str) -> pa.Table:
        return encode(name, [self.columns(name, TABLES[name].names).cast(plain_schema(TABLES[name]))])

    def __iter__(self) -> Iterator[str]:
        return iter(TABLES)

    def __len__(self) -> int:
        return len(TABLES)

    def columns(self, name: str, columns: Sequence[str]) -> pa.Table:
        left = self._left[name]
        asked = [column for column in columns if column not in left.columns]
        read = self._whole.columns(name, asked).take(pa.array(left.rows)) if asked else {}
        found = [left.columns[one] if one in left.columns else read[one] for one in columns]
        return pa.table(found, names=list(columns))

    def request_rows(self, name: str, column: str) -> Ints:
        left, rows = self._left[name], self._left["requests"].rows
        refers = left.refers.get(column)
        if refers is None:
            refers = self._whole.request_rows(name, column)[left.rows]
        place = np.full(max(rows.max(initial=-1), refers.max(initial=-1)) + 2, -1)
        place[rows] = np.arange(len(rows))
        found: Ints = place[refers]
        return found

    def scannable(self, name: str) -> pa.Table:
        return self[name]

    def narrowed(self, replicas: Collection[str] | None, start_ns: int | None, end_ns: int | None) -> CutTables:
        return self


class _Columns:
    """Integer columns of a table, 0 where null, and whose rows they are."""

    def __init__(self, trace: Trace, table: str, *names: str) -> None:
        self._table = trace.columns(table, ["replica", *names])
        self.names = names

    def __getitem__(self, name: str) -> Ints:
        return _ints(self._table[name])

    def unknown(self, name: str) -> Mask:
        """Where a column is null."""
        nulls: Mask = self._table[name].is_null().to_numpy()
        return nulls

    def codes(self, replicas: Sequence[str]) -> Ints:
        """The place of each row's replica among ``replicas``, -1: nowhere."""
        found = [np.zeros(0, dtype=np.int64)]
        for chunk in self._table["replica"].chunks:
            place = [replicas.index(name) if name in replicas else -1 for name in chunk.dictionary.to_pylist()]
            found.append(np.append(place, -1)[chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False)])
        return np.concatenate(found).astype(np.int64)

    def at(self, rows: Ints) -> dict[str, pa.Array]:
        """Those rows of the columns."""
        return {name: self._table[name].take(pa.array(rows)).combine_chunks() for name in self.names}

    def of_replicas(self, rows: Ints) -> list[str]:
        names: list[str] = pc.unique(self._table["replica"].take(pa.array(rows)).cast(pa.string())).to_pylist()
        return names


@dataclass(frozen=True, eq=False)
class _Bounds:
    """The ``replicas`` of the steps that are left, and of each its first and last one and when they were (ns)."""

    replicas: tuple[str, ...]
    first: Ints
    last: Ints
    start: Ints
    end: Ints

    @staticmethod
    def of(steps: _Columns, kept: Ints) -> _Bounds:
        replicas = tuple(steps.of_replicas(kept))
        code = steps.codes(replicas)[kept]
        low = np.full((2, len(replicas)), np.iinfo(np.int64).max)
        high = np.full((2, len(replicas)), np.iinfo(np.int64).min)
        for row, (begin, finish) in enumerate((("step", "step"), ("scheduled", "ready"))):
            np.minimum.at(low[row], code, steps[begin][kept])
            np.maximum.at(high[row], code, steps[finish][kept])
        return _Bounds(replicas, low[0], high[0], low[1], high[1])

    def opened(self, *, before: bool, after: bool) -> _Bounds:
        """The same without a bound on these sides."""
        ever = np.full(len(self.replicas), _EVER)
        bounds = replace(self, first=-ever, start=-ever) if before else self
        return replace(bounds, last=ever, end=ever) if after else bounds

    def hold(self, of: _Columns, time: str) -> Mask:
        """Which rows are from a time in the bounds of their replica."""
        code = of.codes(self.replicas)
        inside: Mask = (code >= 0) & (of[time] >= self.start[code]) & (of[time] <= self.end[code])
        return inside

    def hold_steps(self, of: _Columns, first: str, last: str) -> Mask:
        """Which rows share steps with the bounds of their replica."""
        code = of.codes(self.replicas)
        inside: Mask = (code >= 0) & (of[first] <= self.last[code]) & (of[last] >= self.first[code])
        return inside


# --- tables -------------------------------------------------------------------------------------------------------


def _residency(trace: Trace, bounds: _Bounds) -> _Left:
    """Rows that share steps with the bounds, cut to them; context and blocks are those of the new first step."""
    of = _Columns(trace, "residency", "first_step", "last_step", "tokens", "context_start", "kv_blocks")
    rows = np.flatnonzero(bounds.hold_steps(of, "first_step", "last_step"))
    code = of.codes(bounds.replicas)[rows]
    old_first, last, tokens, context, blocks = (of[name][rows] for name in of.names)
    first = np.maximum(old_first, bounds.first[code])
    context = context + (first - old_first) * tokens
    held = -(-(context + tokens) // _block_sizes(trace, bounds)[code])
    changed = {
        "first_step": pa.array(first),
        "last_step": pa.array(np.minimum(last, bounds.last[code])),
        "context_start": pa.array(context),
        "kv_blocks": pa.array(
            np.where((first > old_first) & (blocks > 0), held, blocks), mask=of.unknown("kv_blocks")[rows]
        ),
    }
    refers = {name: trace.request_rows("residency", name)[rows] for name in ("request", "holder")}
    return _Left(rows, {**of.at(rows), **changed}, refers)


def _block_sizes(trace: Trace, bounds: _Bounds) -> Ints:
    of = _Columns(trace, "replicas", "block_size")
    code = of.codes(bounds.replicas)
    largest = np.zeros(len(bounds.replicas), dtype=np.int64)
    np.maximum.at(largest, code[code >= 0], of["block_size"][code >= 0])
    return np.where(largest > 0, largest, 1)


def _requests(trace: Trace, bounds: _Bounds, residency: _Left) -> _Left:
    """Requests that arrived by the end, and were in a step or not over before the start; nothing later is known."""
    of = _Columns(trace, "requests", "arrival", *_STATIONS)
    arrival, ended, code = of["arrival"], of["end"], of.codes(bounds.replicas)
    seen = np.zeros(len(arrival) + 1, dtype=np.bool_)
    for named in residency.refers.values():
        seen[named] = True
    started = bounds.start[code]
    over = np.where(of.unknown("end"), arrival, ended) < started
    rows = np.flatnonzero((code >= 0) & (seen[:-1] | ~over) & (arrival <= bounds.end[code]))
    end = bounds.end[code[rows]]
    columns = {"arrival": pa.array(arrival[rows])}
    for name in _STATIONS:
        station = of[name][rows]
        columns[name] = pa.array(station, mask=of.unknown(name)[rows] | (station > end))
    later = ended[rows] > end
    return _Left(rows, {**columns, **_by_then(trace, rows, later, residency)} if later.any() else columns)


def _by_then(trace: Trace, rows: Ints, later: Mask, residency: _Left) -> dict[str, pa.Array]:
    """What requests had given by the last step, of those that end ``later``.

    Their output is what was computed beyond the prompt, and the token that follows it.
    """
    first, last, context, tokens = (
        residency.columns[name].to_numpy(zero_copy_only=False)
        for name in ("first_step", "last_step", "context_start", "tokens")
    )
    of = trace.columns("requests", ["prompt_tokens", "output_tokens", "state", "finish_reason"])
    reached = np.zeros(of.num_rows + 1, dtype=np.int64)
    np.maximum.at(reached, residency.refers["request"], context + tokens * (last - first + 1))
    of = of.take(pa.array(rows))
    output = _ints(of["output_tokens"])
    by_then = np.clip(reached[rows] - _ints(of["prompt_tokens"]) + 1, 0, output)
    unknown = of["output_tokens"].is_null().to_numpy() & ~later
    return {
        "output_tokens": pa.array(np.where(later, by_then, output), mask=unknown),
        "state": _replaced(of["state"], later, "open"),
        "finish_reason": _replaced(of["finish_reason"], later, None),
    }


def _replaced(column: pa.ChunkedArray, where: Mask, value: str | None) -> pa.Array:
    words = pc.if_else(pa.array(where), pa.scalar(value, pa.string()), column.cast(pa.string()))
    return words.combine_chunks().dictionary_encode()


def _gaps(trace: Trace, bounds: _Bounds, requests: _Left) -> _Left:
    """Gaps of the requests that are left. The gap in which the part ends was not over by then."""
    of, refers = _Columns(trace, "gaps", "start", "length_ns", "count"), trace.request_rows("gaps", "request")
    present = np.zeros(max(requests.rows.max(initial=-1), refers.max(initial=-1)) + 2, dtype=np.bool_)
    present[requests.rows] = True
    over = of["start"] + of["length_ns"] <= bounds.end[of.codes(bounds.replicas)]
    rows = np.flatnonzero(bounds.hold(of, "start") & present[refers] & over)
    return _Left(rows, of.at(rows), {"request": refers[rows]})


def _coverage(trace: Trace, bounds: _Bounds, steps: _Columns, kept: Ints) -> _Left:
    """Stretches that overlap the part, cut to it; their steps are counted again, in the last that had begun."""
    of = _Columns(trace, "coverage", "start", "end", "steps_lost")
    code, step_code = of.codes(bounds.replicas), steps.codes(bounds.replicas)[kept]
    inside = (code >= 0) & (of["start"] <= bounds.end[code]) & (of["end"] >= bounds.start[code])
    step, scheduled = steps["step"][kept], steps["scheduled"][kept]
    rows = [np.flatnonzero(inside & (code == each)) for each in range(len(bounds.replicas))]
    seen, lost = [], []
    for each, mine in enumerate(rows):
        here = step_code == each
        stretch = np.maximum(np.searchsorted(of["start"][mine], scheduled[here], side="right") - 1, 0)
        missing = np.append(0, np.diff(step[here]) - 1)  # before each step
        seen.append(np.bincount(stretch, minlength=len(mine)))
        lost.append(np.rint(np.bincount(stretch, missing, len(mine))).astype(np.int64))
    chosen = np.concatenate(rows)
    begin, finish, known = (of[name][chosen] for name in of.names)
    start, end = np.maximum(begin, bounds.start[code[chosen]]), np.minimum(finish, bounds.end[code[chosen]])
    whole = (start == begin) & (end == finish)
    changed = {
        "start": pa.array(start),
        "end": pa.array(end),
        "steps_seen": pa.array(np.concatenate(seen)),
        "steps_lost": pa.array(np.where(whole, known, np.concatenate(lost))),
    }
    return _Left(chosen, changed)


def _ints(column: pa.ChunkedArray) -> Ints:
    return np.asarray((column.fill_null(0) if column.null_count else column).to_numpy(), dtype=np.int64)
