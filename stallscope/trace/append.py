"""Adds a trace to a dataset: other replicas, or what the same ones did later, as an engine's next file has it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.errors import UsageError
from stallscope.trace.lock import only_writer
from stallscope.trace.model import Trace
from stallscope.trace.parquet import (
    Progress,
    is_trace_folder,
    read_parquet,
    write_metadata,
    write_parts,
    write_table,
)
from stallscope.trace.references import Ints, request_rows
from stallscope.trace.rename import renamed
from stallscope.trace.schema import TABLES
from stallscope.trace.stored import Part, StoredTables, row_column
from stallscope.trace.tables import Column, encode, plain_schema, plain_table

# Of a request that goes on in another trace: what is known better later, and what only grows. The rest was known first.
_KNOWN_LATER = ("end", "delivered", "state", "finish_reason")
_FIDELITY_REQUESTS = 1  # of a stretch of which no step is known
_NOBODY: Ints = np.zeros(0, dtype=np.int64)
_GROWING = ("cached_tokens", "output_tokens", "preemptions")


def append_parquet(trace: Trace, folder: str | Path, progress: Progress | None = None) -> None:
    """Writes a trace's rows beside those of a dataset; a request that had not ended there goes on in its row.

    ``progress`` is called with the rows written and the rows in all.
    A replica whose steps begin anew is another life of its process, and is named as within one trace ("NAME #2").
    Raises UsageError where there is no dataset, where a replica's steps are not later than those that it has, where
    another process keeps writing to it, and where the folder can't be written.
    """
    folder = Path(folder)
    if not is_trace_folder(folder):
        raise UsageError(f"{folder} is no dataset that could be added to; without --append, one is made")
    with only_writer(folder):
        _append(trace, folder, progress)


def _append(trace: Trace, folder: Path, progress: Progress | None) -> None:
    stored = read_parquet(folder)
    trace = _with_lives(trace, stored, folder)
    tables = dict(trace.tables)
    known = _known_requests(stored, tables)
    old = stored.tables.parts if isinstance(stored.tables, StoredTables) else ()
    number = 1 + max((part.number for part in old), default=-1)
    taken: dict[str | None, int] = {}
    for part in old:
        taken[part.replica] = max(taken.get(part.replica, 0), part.first_request + part.rows.get("requests", 0))
    try:
        again = _told_again(tables, known)
        new = [_with_later(part, folder, number, tables, known) for part in old]
        new = [_without_gaps(part, folder, number, again.get(part.replica, _NOBODY)) for part in new]
        parts = [*new, *write_parts(tables, folder, number, taken, known, progress)]
        write_metadata(folder, str(folder), (*stored.findings, *trace.findings), parts)
        _sweep(folder, parts)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); check the path and its rights") from error


def _sweep(folder: Path, parts: Sequence[Part]) -> None:
    """Takes away files that belong to no part: of rows that were written anew, or of a write that broke off."""
    listed = {folder / part.path(table) for part in parts for table in part.rows}
    for table in TABLES:
        for file in (folder / table).rglob("*.parquet"):
            if file not in listed:
                file.unlink()


# --- lives --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Life:
    """A replica's process: its steps' numbers and times (ns), from the first to the last."""

    name: str
    first_step: int
    last_step: int
    start: int
    end: int


def _with_lives(trace: Trace, stored: Trace, folder: Path) -> Trace:
    """The trace with its replicas named as the lives that they go on with, or as new ones, and with what is missing
    between a life's last step there and the first one here."""
    known = _lives(stored, trace)
    names: dict[str, str] = {}
    missing: list[tuple[str, int, int, int]] = []
    for life in sorted(_lives(trace, trace), key=lambda one: one.start):
        base = _base(life.name)
        earlier = [one for one in known if _base(one.name) == base]
        latest = max(earlier, key=lambda one: one.end, default=None)
        name = life.name
        if latest is not None:
            if life.start < latest.end:
                raise UsageError(
                    f"{folder} has steps of {latest.name!r} that are as late as those of {trace.source}: "
                    "what is added must be later, or of another replica"
                )
            name = latest.name if life.first_step > latest.last_step else f"{base} #{len(earlier) + 1}"
            if life.first_step > latest.last_step + 1:
                missing.append((name, latest.end, life.start, life.first_step - latest.last_step - 1))
        names[life.name] = name
        known.append(replace(life, name=name))
    if any(old != new for old, new in names.items()):
        trace = renamed(trace, {"replica": lambda name: names.get(name, name)})
    return _with_missing(trace, missing) if missing else trace


def _with_missing(trace: Trace, missing: Sequence[tuple[str, int, int, int]]) -> Trace:
    """With coverage that says, of each replica, from when to when (ns) so many steps are lost."""
    replica, start, end, lost = (list(column) for column in zip(*missing, strict=True))
    count = len(missing)
    columns: dict[str, Column] = {
        "replica": replica, "start": start, "end": end, "fidelity": [_FIDELITY_REQUESTS] * count,
        "steps_seen": [0] * count, "steps_lost": lost, "spans_dropped": [0] * count, "sampled_share": [1.0] * count,
    }  # fmt: skip
    known = trace.coverage.cast(plain_schema(TABLES["coverage"]))
    coverage = encode("coverage", [plain_table("coverage", columns, count), known])
    return replace(trace, tables={**trace.tables, "coverage": coverage})


def _base(name: str) -> str:
    return re.sub(r" #\d+$", "", name)


def _lives(trace: Trace, asked: Trace) -> list[_Life]:
    """The lives in a trace of those replicas that are in ``asked``, too."""
    bases = {_base(name) for name in _replicas(asked)}
    found = []
    for name in _replicas(trace):
        if _base(name) in bases:
            part = trace.narrowed([name]).columns("steps", ["replica", "step", "scheduled", "ready"])
            part = part.filter(pc.equal(part["replica"].cast(pa.string()), name))
            ends = pc.min(part["scheduled"]).as_py(), pc.max(part["ready"]).as_py()
            found.append(_Life(name, pc.min(part["step"]).as_py(), pc.max(part["step"]).as_py(), *ends))
    return found


def _replicas(trace: Trace) -> list[str]:
    names: list[str] = pc.unique(trace.columns("steps", ["replica"])["replica"].cast(pa.string())).to_pylist()
    return names


# --- requests that go on ------------------------------------------------------------------------------------------


def _known_requests(stored: Trace, tables: Mapping[str, pa.Table]) -> Ints:
    """For each request its number in the dataset, where it is one that had not ended there; else -1."""
    requests = tables["requests"]
    names, arrival = requests["request"].cast(pa.string()), requests["arrival"].to_numpy()
    known = np.full(len(requests), -1)
    replicas = requests["replica"].cast(pa.string())
    for replica in pc.unique(replicas).to_pylist():
        rows = stored.narrowed([replica]).columns("requests", ["request", "arrival", "end"])
        open_rows = np.flatnonzero(rows["end"].is_null().to_numpy())
        there = rows.take(open_rows)
        mine = np.flatnonzero(pc.equal(replicas, replica).to_numpy())
        place = pc.index_in(names.take(mine), value_set=there["request"].cast(pa.string()).combine_chunks())
        at = place.fill_null(-1).to_numpy()
        same = (at >= 0) & (np.append(there["arrival"].to_numpy(), -1)[at] == arrival[mine])
        known[mine[same]] = open_rows[at[same]]
    return known


def _with_later(part: Part, folder: Path, number: int, tables: Mapping[str, pa.Table], known: Ints) -> Part:
    """Writes anew a part's requests of which more is known now, if there are any."""
    inside = (known >= part.first_request) & (known < part.first_request + part.rows.get("requests", 0))
    mine = pc.equal(tables["requests"]["replica"].cast(pa.string()), part.replica).fill_null(False).to_numpy()
    rows = np.flatnonzero(inside & mine)
    if not len(rows):
        return part
    old = StoredTables(folder, [part])["requests"]
    merged = _merged(old, tables["requests"].take(rows), known[rows] - part.first_request)
    # They go on in the parts that are added: this one tells of all that time.
    end = max(part.end, pc.max(tables["steps"]["ready"]).as_py() or 0)
    changed = replace(part, end=end, rewritten={**part.rewritten, "requests": number})
    write_table(merged.drop_columns("replica"), folder, changed, "requests")
    return changed


def _merged(old: pa.Table, new: pa.Table, at: Ints) -> pa.Table:
    """The old rows; those at these positions with what the new ones say of the same requests."""
    schema = plain_schema(TABLES["requests"])
    old, new = old.cast(schema).combine_chunks(), new.cast(schema)
    order = np.arange(len(old))
    order[at] = len(old) + np.arange(len(at))
    columns = []
    for name in schema.names:
        before, after = old[name].take(at), new[name]
        if name in _GROWING:
            value = pc.max_element_wise(before, after)
        else:
            value = pc.coalesce(after, before) if name in _KNOWN_LATER else pc.coalesce(before, after)
        columns.append(pa.chunked_array([*old[name].chunks, *value.chunks], schema.field(name).type).take(order))
    return encode("requests", [pa.Table.from_arrays(columns, schema=schema)])


def _told_again(tables: Mapping[str, pa.Table], known: Ints) -> dict[str | None, Ints]:
    """The numbers of requests all of whose gaps are told anew, as by a span at the end: some begin before the steps."""
    gaps, steps = tables["gaps"], tables["steps"]
    numbers = np.append(known, -1)[request_rows(tables, "gaps", "request")]
    start, replicas = gaps["start"].to_numpy(), gaps["replica"].cast(pa.string())
    found: dict[str | None, Ints] = {}
    for replica in pc.unique(replicas).to_pylist():
        first = pc.min(steps["scheduled"].filter(pc.equal(steps["replica"].cast(pa.string()), replica))).as_py()
        early = pc.equal(replicas, replica).to_numpy() & (numbers >= 0) & (start < (first or 0))
        found[replica] = np.unique(numbers[early])
    return found


def _without_gaps(part: Part, folder: Path, number: int, requests: Ints) -> Part:
    """Writes anew a part's gaps without those of the requests with these numbers, if it has any."""
    from pyarrow import parquet

    if not part.rows.get("gaps") or not len(requests):
        return part
    table = parquet.ParquetFile(folder / part.path("gaps")).read()
    kept = table.filter(pa.array(~np.isin(table[row_column("request")].to_numpy(), requests)))
    if len(kept) == len(table):
        return part
    rewritten = {**part.rewritten, "gaps": number}
    changed = replace(part, rows={**part.rows, "gaps": len(kept)}, rewritten=rewritten)
    write_table(kept, folder, changed, "gaps")
    return changed
