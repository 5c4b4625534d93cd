"""The part of a trace between two times: which rows of each table are left, and what changes in them.

All that decides is integers, so of a stored trace no names are read for it; what is left is read where it is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
Changed = Mapping[str, pa.Array]

_STATIONS = ("queued", "scheduled", "first_token", "end", "delivered")


def cut(trace: Trace, start_ns: int, end_ns: int) -> Trace | None:
    """What happened in the steps that were scheduled from ``start_ns`` on and ready by ``end_ns``; None: no step was.

    Of a stored trace, it is stored itself.
    """
    steps = _Columns(trace, "steps")
    kept = np.flatnonzero((steps["scheduled"] >= start_ns) & (steps["ready"] <= end_ns))
    if not len(kept):
        return None
    bounds = _Bounds.of(trace, steps, kept)
    residency, held = _residency(trace, bounds)
    requests, changed = _requests(trace, bounds, residency, held)
    present = np.zeros(trace.columns("requests", ["arrival"]).num_rows + 1, dtype=np.bool_)
    present[requests] = True
    sent = _Columns(trace, "clients")["sent"]
    stretches, counted = _coverage(trace, bounds, steps, kept)
    rows = {
        "replicas": np.flatnonzero(bounds.has(trace, "replicas", "since", since=False)),
        "steps": kept,
        "residency": residency,
        "requests": requests,
        "gaps": _gaps(trace, bounds, present),
        "evictions": np.flatnonzero(bounds.has_steps(trace, "evictions", "step", "step")),
        "clients": np.flatnonzero((sent >= bounds.start.min()) & (sent <= bounds.end.max())),
        "gpu": np.flatnonzero(bounds.has(trace, "gpu", "time")),
        "coverage": stretches,
    }
    tables = CutTables(trace, rows, {"residency": held, "requests": changed, "coverage": counted})
    return replace(trace, tables=tables if trace.is_stored else dict(tables))


class CutTables(LazyTables):
    """Rows of another trace's tables, some of whose columns are others."""

    def __init__(self, whole: Trace, rows: Mapping[str, Ints], changed: Mapping[str, Changed]) -> None:
        self._whole = whole
        self._rows = rows
        self._changed = changed

    def __getitem__(self, name: str) -> pa.Table:
        return encode(name, [self.columns(name, TABLES[name].names).cast(plain_schema(TABLES[name]))])

    def __iter__(self) -> Iterator[str]:
        return iter(TABLES)

    def __len__(self) -> int:
        return len(TABLES)

    def columns(self, name: str, columns: Sequence[str]) -> pa.Table:
        changed = self._changed.get(name, {})
        asked = [column for column in columns if column not in changed]
        read = self._whole.columns(name, asked or ["replica"]).take(pa.array(self._rows[name]))
        return pa.table([changed[one] if one in changed else read[one] for one in columns], names=list(columns))

    def request_rows(self, name: str, column: str) -> Ints:
        rows = self._rows["requests"]
        place = np.full(self._whole.columns("requests", ["arrival"]).num_rows + 1, -1)
        place[rows] = np.arange(len(rows))
        found: Ints = place[self._whole.request_rows(name, column)[self._rows[name]]]
        return found

    def scannable(self, name: str) -> pa.Table:
        return self[name]

    def narrowed(self, replicas: Collection[str] | None, start_ns: int | None, end_ns: int | None) -> CutTables:
        return self


class _Columns:
    """Integer columns of a table, 0 where null."""

    def __init__(self, trace: Trace, table: str) -> None:
        self._trace = trace
        self._table = table

    def __getitem__(self, name: str) -> Ints:
        return _ints(self._trace.columns(self._table, [name])[name])


@dataclass(frozen=True, eq=False)
class _Bounds:
    """The ``replicas`` of the steps that are left, and of each its first and last one and when they were (ns)."""

    replicas: tuple[str, ...]
    first: Ints
    last: Ints
    start: Ints
    end: Ints

    @staticmethod
    def of(trace: Trace, steps: _Columns, kept: Ints) -> _Bounds:
        names = trace.columns("steps", ["replica"])["replica"].take(pa.array(kept)).cast(pa.string())
        replicas = tuple(pc.unique(names).to_pylist())
        code = _codes(trace, "steps", replicas)[kept]
        low = np.full((2, len(replicas)), np.iinfo(np.int64).max)
        high = np.full((2, len(replicas)), np.iinfo(np.int64).min)
        for row, (begin, finish) in enumerate((("step", "step"), ("scheduled", "ready"))):
            np.minimum.at(low[row], code, steps[begin][kept])
            np.maximum.at(high[row], code, steps[finish][kept])
        return _Bounds(replicas, low[0], high[0], low[1], high[1])

    def has(self, trace: Trace, table: str, column: str, *, since: bool = True) -> Mask:
        """Which rows of a table are from a time in the bounds of their replica; or, not ``since``, from before."""
        code, time = _codes(trace, table, self.replicas), _Columns(trace, table)[column]
        inside: Mask = (code >= 0) & (time <= self.end[code])
        return inside & (time >= self.start[code]) if since else inside

    def has_steps(self, trace: Trace, table: str, first: str, last: str) -> Mask:
        """Which rows of a table share steps with their replica's bounds."""
        code, of = _codes(trace, table, self.replicas), _Columns(trace, table)
        inside: Mask = (code >= 0) & (of[first] <= self.last[code]) & (of[last] >= self.first[code])
        return inside


def _codes(trace: Trace, table: str, replicas: Sequence[str]) -> Ints:
    """The place of each row's replica among ``replicas``, -1: nowhere."""
    found = [np.zeros(0, dtype=np.int64)]
    for chunk in trace.columns(table, ["replica"])["replica"].chunks:
        place = [replicas.index(name) if name in replicas else -1 for name in chunk.dictionary.to_pylist()]
        found.append(np.append(place, -1)[chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False)])
    return np.concatenate(found).astype(np.int64)


# --- tables -------------------------------------------------------------------------------------------------------


def _residency(trace: Trace, bounds: _Bounds) -> tuple[Ints, Changed]:
    """Rows that share steps with the bounds, cut to them; context and blocks are those of the new first step."""
    rows = np.flatnonzero(bounds.has_steps(trace, "residency", "first_step", "last_step"))
    code, of = _codes(trace, "residency", bounds.replicas)[rows], _Columns(trace, "residency")
    old_first, tokens, blocks = (of[name][rows] for name in ("first_step", "tokens", "kv_blocks"))
    first = np.maximum(old_first, bounds.first[code])
    context = of["context_start"][rows] + (first - old_first) * tokens
    held = -(-(context + tokens) // _block_sizes(trace, bounds)[code])
    unknown = trace.columns("residency", ["kv_blocks"])["kv_blocks"].is_null().to_numpy()[rows]
    changed = {
        "first_step": pa.array(first),
        "last_step": pa.array(np.minimum(of["last_step"][rows], bounds.last[code])),
        "context_start": pa.array(context),
        "kv_blocks": pa.array(np.where((first > old_first) & (blocks > 0), held, blocks), mask=unknown),
    }
    return rows, changed


def _block_sizes(trace: Trace, bounds: _Bounds) -> Ints:
    code, size = _codes(trace, "replicas", bounds.replicas), _Columns(trace, "replicas")["block_size"]
    largest = np.zeros(len(bounds.replicas), dtype=np.int64)
    np.maximum.at(largest, code[code >= 0], size[code >= 0])
    return np.where(largest > 0, largest, 1)


def _requests(trace: Trace, bounds: _Bounds, residency: Ints, held: Changed) -> tuple[Ints, Changed]:
    """Requests that arrived by the end, and were in a step or not over before the start; nothing later is known."""
    columns = trace.columns("requests", ["arrival", *_STATIONS])
    count, arrival = columns.num_rows, _ints(columns["arrival"])
    code = _codes(trace, "requests", bounds.replicas)
    request, holder = (trace.request_rows("residency", name)[residency] for name in ("request", "holder"))
    seen = np.zeros(count + 1, dtype=np.bool_)
    seen[request] = seen[holder] = True
    started, ended = bounds.start[code], columns["end"].is_null().to_numpy()
    ended = ~ended
    over = np.where(ended, _ints(columns["end"]) < started, arrival < started)
    rows = np.flatnonzero((code >= 0) & (seen[:-1] | ~over) & (arrival <= bounds.end[code]))
    end = bounds.end[code[rows]]
    changed: dict[str, pa.Array] = {}
    for name in _STATIONS:
        station = columns[name].take(pa.array(rows))
        changed[name] = pa.array(_ints(station), mask=station.is_null().to_numpy() | (_ints(station) > end))
    later = _ints(columns["end"])[rows] > end
    if not later.any():
        return rows, changed
    # Output up to the last step: what was computed beyond the prompt, and the token that follows it.
    steps = held["last_step"].to_numpy() - held["first_step"].to_numpy() + 1
    tokens = _Columns(trace, "residency")["tokens"][residency]
    reached = np.zeros(count + 1, dtype=np.int64)
    np.maximum.at(reached, request, held["context_start"].to_numpy() + tokens * steps)
    of = trace.columns("requests", ["prompt_tokens", "output_tokens", "state", "finish_reason"]).take(pa.array(rows))
    output = of["output_tokens"]
    by_then = np.clip(reached[rows] - _ints(of["prompt_tokens"]) + 1, 0, _ints(output))
    unknown = output.is_null().to_numpy() & ~later
    changed["output_tokens"] = pa.array(np.where(later, by_then, _ints(output)), mask=unknown)
    changed["state"] = _replaced(of["state"], later, "open")
    changed["finish_reason"] = _replaced(of["finish_reason"], later, None)
    return rows, changed


def _replaced(column: pa.ChunkedArray, where: Mask, value: str | None) -> pa.Array:
    words = pc.if_else(pa.array(where), pa.scalar(value, pa.string()), column.cast(pa.string()))
    return words.combine_chunks().dictionary_encode() if isinstance(words, pa.ChunkedArray) else words


def _gaps(trace: Trace, bounds: _Bounds, present: Mask) -> Ints:
    """Gaps of the requests that are left. The gap in which the part ends was not over by then."""
    of, code = _Columns(trace, "gaps"), _codes(trace, "gaps", bounds.replicas)
    start = of["start"]
    inside = (code >= 0) & present[trace.request_rows("gaps", "request")] & (start >= bounds.start[code])
    return np.flatnonzero(inside & (start + of["length_ns"] <= bounds.end[code]))


def _coverage(trace: Trace, bounds: _Bounds, steps: _Columns, kept: Ints) -> tuple[Ints, Changed]:
    """Stretches that overlap the part, cut to it; their steps are counted again, in the last that had begun."""
    of, code = _Columns(trace, "coverage"), _codes(trace, "coverage", bounds.replicas)
    inside = (code >= 0) & (of["start"] <= bounds.end[code]) & (of["end"] >= bounds.start[code])
    step_code, step, scheduled = (
        column[kept] for column in (_codes(trace, "steps", bounds.replicas), steps["step"], steps["scheduled"])
    )
    rows = [np.flatnonzero(inside & (code == each)) for each in range(len(bounds.replicas))]
    seen, lost = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for each, mine in enumerate(rows):
        here = step_code == each
        stretch = np.maximum(np.searchsorted(of["start"][mine], scheduled[here], side="right") - 1, 0)
        missing = np.append(0, np.diff(step[here]) - 1)  # before each step
        seen.append(np.bincount(stretch, minlength=len(mine)))
        lost.append(np.rint(np.bincount(stretch, missing, len(mine))).astype(np.int64))
    chosen = np.concatenate(rows)
    begin, finish, known = (of[name][chosen] for name in ("start", "end", "steps_lost"))
    start, end = np.maximum(begin, bounds.start[code[chosen]]), np.minimum(finish, bounds.end[code[chosen]])
    whole = (start == begin) & (end == finish)
    changed = {
        "start": pa.array(start),
        "end": pa.array(end),
        "steps_seen": pa.array(np.concatenate(seen)),
        "steps_lost": pa.array(np.where(whole, known, np.concatenate(lost))),
    }
    return chosen, changed


def _ints(column: pa.ChunkedArray) -> Ints:
    return np.asarray((column.fill_null(0) if column.null_count else column).to_numpy(), dtype=np.int64)
