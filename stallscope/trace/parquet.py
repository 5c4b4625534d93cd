"""A trace as a dataset in Parquet, and back: each table in partitions by replica and hour, which are read alone.

``TABLE/replica=R/hour=2026-01-31T14/N.parquet`` (UTC; N is the number of the write), and ``trace.json``, which lists
the partitions and what they span. That is replaced last: what a write that broke off has left is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa

from stallscope.errors import UsageError
from stallscope.trace.findings import Finding
from stallscope.trace.model import Trace
from stallscope.trace.references import REFERENCES, Ints, request_rows
from stallscope.trace.schema import TABLES
from stallscope.trace.stored import ALWAYS_READ, Part, StoredTables, coded_columns, row_column
from stallscope.trace.tables import plain_schema

FORMAT_VERSION = 3
METADATA = "trace.json"
Progress = Callable[[int, int], None]  # rows written so far, rows there are
_HOUR_NS = 3_600_000_000_000
# When a row begins, and what may come last of what it tells; rows with numbers of steps are looked up among the steps.
_BEGINS = {
    "replicas": "since", "requests": "arrival", "gaps": "start", "clients": "sent", "gpu": "time", "coverage": "start",
}  # fmt: skip
_ENDS = {
    "requests": ("queued", "scheduled", "first_token", "end", "delivered"),
    "clients": ("first_token", "end"),
    "coverage": ("end",),
}


def is_trace_folder(path: Path) -> bool:
    """Whether `write_parquet` has written there."""
    return (path / METADATA).is_file()


def read_parquet(folder: Path) -> Trace:
    """What `write_parquet` wrote; its tables are read where they are asked for.

    Raises UsageError where the dataset's list of partitions is missing, damaged or of another version.
    """
    try:
        metadata = orjson.loads((folder / METADATA).read_bytes())
        version, source = metadata["format"], str(metadata["source"])
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{folder}: format {version}, this version reads {FORMAT_VERSION}; convert the recording again"
            )
        findings = tuple(Finding(**finding) for finding in metadata["findings"])
        parts = [Part(**part) for part in metadata["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / METADATA}: not readable as a trace's metadata ({error}); convert again") from error
    return Trace(StoredTables(folder, parts), source, findings)


def write_parquet(trace: Trace, folder: str | Path, progress: Progress | None = None) -> None:
    """Writes a dataset. ``progress`` is called with the rows written and the rows in all.

    Raises UsageError where the folder holds anything already, or can't be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"{folder}: the folder is not empty; name a new one")
        known = np.full(trace.columns("requests", ["arrival"]).num_rows, -1)
        parts = list(write_parts(dict(trace.tables), folder, 0, {}, known, progress))
        write_metadata(folder, trace.source, trace.findings, parts)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); check the path and its rights") from error


def write_metadata(folder: Path, source: str, findings: tuple[Finding, ...], parts: list[Part]) -> None:
    metadata = {
        "format": FORMAT_VERSION,
        "source": source,
        "findings": [asdict(finding) for finding in findings],
        "parts": [asdict(part) for part in parts],
    }
    new = folder / f".{METADATA}"
    new.write_bytes(orjson.dumps(metadata, option=orjson.OPT_INDENT_2))
    new.replace(folder / METADATA)


# --- partitions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rows:
    """A replica's rows of one table, and from when to when each tells of something (ns); they lie in ``hour``."""

    table: pa.Table
    begin: Ints
    end: Ints
    hour: Ints


def write_parts(
    tables: Mapping[str, pa.Table],
    folder: Path,
    number: int,
    taken: Mapping[str | None, int],
    known: Ints,
    progress: Progress | None,
) -> Iterator[Part]:
    """Writes all rows of the tables, and says where.

    ``taken``: how many requests of each replica have a number already. ``known``: the numbers of those of these
    requests that have one, and are not written; -1 for the others.
    """
    named = {
        (name, column): request_rows(tables, name, column) for name, columns in REFERENCES.items() for column in columns
    }
    rows = {name: _by_replica(tables[name]["replica"]) for name in TABLES}
    numbers = np.append(known, -1)
    done, total = 0, sum(len(table) for table in tables.values())
    for replica in dict.fromkeys(one for of in rows.values() for one in of):
        mine = {name: of[replica] for name, of in rows.items() if replica in of}
        if "requests" in mine:
            mine["requests"] = mine["requests"][known[mine["requests"]] < 0]
        refers = {key: found[mine[key[0]]] for key, found in named.items() if key[0] in mine}
        placed = _placed({name: tables[name].take(found) for name, found in mine.items()})
        first = taken.get(replica, 0)
        if "requests" in placed:
            _outlast(placed, refers, mine["requests"], len(known))
            order = np.argsort(placed["requests"].hour, kind="stable")
            numbers[mine["requests"][order]] = first + np.arange(len(order))
        for name, column in refers:
            table = placed[name].table.append_column(row_column(column), pa.array(numbers[refers[name, column]]))
            placed[name] = replace(placed[name], table=table)
        for hour in np.unique(np.concatenate([one.hour for one in placed.values()])).tolist():
            part = _write_part(placed, folder, replica, hour, number, first)
            first += part.rows.get("requests", 0)
            done += sum(part.rows.values())
            if progress is not None:
                progress(done, total)
            yield part


def _write_part(
    placed: Mapping[str, _Rows], folder: Path, replica: str | None, hour: int, number: int, first: int
) -> Part:
    """Writes a replica's rows of one hour."""
    chosen = {name: np.flatnonzero(one.hour == hour) for name, one in placed.items()}
    chosen = {name: found for name, found in chosen.items() if len(found)}
    # What tells of all that comes after it says nothing of how long that is, if there is anything else.
    timed = [name for name in chosen if name not in ALWAYS_READ] or list(chosen)
    part = Part(
        replica=replica,
        hour=_named_hour(hour),
        number=number,
        start=min(int(placed[name].begin[chosen[name]].min()) for name in timed),
        end=max(int(placed[name].end[chosen[name]].max()) for name in timed),
        first_request=first,
        rows={name: len(found) for name, found in chosen.items()},
    )
    for name, found in chosen.items():
        write_table(placed[name].table.take(found).drop_columns("replica"), folder, part, name)
    return part


def _named_hour(hour: int) -> str:
    """An hour since the epoch by its date."""
    return f"{datetime.fromtimestamp(hour * 3600, tz=UTC):%Y-%m-%dT%H}"


def write_table(table: pa.Table, folder: Path, part: Part, name: str) -> None:
    """Writes the file of a part's table, which has all of its columns but the replica."""
    from pyarrow import parquet

    path = folder / part.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A dictionary of Arrow's has the names of all parts in it.
    table = table.cast(plain_schema(table.schema))
    parquet.write_table(table, path, **_encoding(name, table.schema))


def _encoding(table: str, schema: pa.Schema) -> dict[str, object]:
    """How columns are written: half the size of the defaults, and read twice as fast."""
    return {
        "compression": "zstd",
        # Most integers are times and counters, which differ little from one row to the next.
        "column_encoding": {field.name: "DELTA_BINARY_PACKED" for field in schema if pa.types.is_int64(field.type)},
        "use_dictionary": coded_columns(table),
        # Only where all names of a column fit into its dictionary does a reader get them as codes.
        "dictionary_pagesize_limit": 1 << 28,
        "write_page_checksum": True,
    }


def _by_replica(column: pa.ChunkedArray) -> dict[str | None, Ints]:
    """The rows of each replica, in the order in which the replicas first appear."""
    coded = column.unify_dictionaries().combine_chunks()
    codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    bounds = np.flatnonzero(np.diff(codes[order])) + 1
    names = coded.dictionary.to_pylist()
    found = [rows for rows in np.split(order, bounds) if len(rows)]
    return {
        names[codes[rows[0]]] if codes[rows[0]] >= 0 else None: rows for rows in sorted(found, key=lambda rows: rows[0])
    }


# --- what rows tell of --------------------------------------------------------------------------------------------


def _placed(tables: Mapping[str, pa.Table]) -> dict[str, _Rows]:
    """A replica's tables with the times of their rows, which lie in the hours of its steps."""
    spans = {name: _span(name, table, tables.get("steps")) for name, table in tables.items()}
    begin = spans["steps"][0] if "steps" in spans else np.concatenate([begin for begin, _ in spans.values()])
    first, last = int(begin.min()) // _HOUR_NS, int(begin.max()) // _HOUR_NS
    return {
        name: _Rows(tables[name], begin, end, np.clip(begin // _HOUR_NS, first, last))
        for name, (begin, end) in spans.items()
    }


def _span(name: str, table: pa.Table, steps: pa.Table | None) -> tuple[Ints, Ints]:
    """From when to when each row tells of something, ns."""
    if name == "steps":
        return _ints(table["scheduled"]), _ints(table["ready"])
    if name == "residency":
        return _at_steps(steps, _ints(table["first_step"]), _ints(table["last_step"]))
    if name == "evictions":
        return _at_steps(steps, _ints(table["step"]), _ints(table["step"]))
    begin = _ints(table[_BEGINS[name]])
    ends = [begin + _ints(table["length_ns"])] if name == "gaps" else [_ints(table[one]) for one in _ENDS.get(name, ())]
    return begin, np.maximum.reduce([begin, *ends])


def _at_steps(steps: pa.Table | None, first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """When steps were scheduled and ready, by their numbers; of those that were not seen, those nearest inside."""
    if steps is None:
        return np.zeros_like(first), np.zeros_like(last)
    order = np.argsort(_ints(steps["step"]), kind="stable")
    step, scheduled, ready = (_ints(steps[one])[order] for one in ("step", "scheduled", "ready"))
    begin = scheduled[np.minimum(np.searchsorted(step, first), len(step) - 1)]
    return begin, np.maximum(ready[np.maximum(np.searchsorted(step, last, side="right") - 1, 0)], begin)


def _outlast(placed: dict[str, _Rows], refers: Mapping[tuple[str, str], Ints], requests: Ints, count: int) -> None:
    """A request is needed as long as there are rows that name it: its row tells of all that time."""
    at = np.full(count + 1, -1)
    at[requests] = np.arange(len(requests))
    end = placed["requests"].end.copy()
    for (name, _), found in refers.items():
        row = at[found]
        np.maximum.at(end, row[row >= 0], placed[name].end[row >= 0])
    placed["requests"] = replace(placed["requests"], end=end)


def _ints(column: pa.ChunkedArray) -> Ints:
    values: Ints = column.fill_null(0).to_numpy()
    return values
