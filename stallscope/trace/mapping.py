"""Any table of requests, or any spans, to the canonical table: a YAML file says which column is what, in which unit.

For engines and gateways that stallscope does not know. What comes out is the table ``requests`` alone, from which
batches can't be told: fidelity 1. ``docs/tenants.md`` has the keys of a mapping.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.errors import UsageError
from stallscope.nodes import Node, read_yaml
from stallscope.trace.findings import Finding, Findings
from stallscope.trace.foreign import ForeignTable, Record, read_foreign, table_of, tidy
from stallscope.trace.otlp import Reader, SpanGroup, find_sources
from stallscope.trace.references import Ints
from stallscope.trace.reserved import UNKNOWN
from stallscope.trace.tables import Column, encode, plain_table, same
from stallscope.trace.tenants import tenant_names, trace_ids
from stallscope_telemetry.records import FinishReason

Mask = npt.NDArray[np.bool_]

NAMES = (
    "request", "tenant", "replica", "model", "adapter", "session", "predecessor", "retry_of", "trace_id",
    "finish_reason",
)  # fmt: skip
COUNTS = ("prompt_tokens", "cached_tokens", "output_tokens", "max_tokens", "preemptions", "priority")
TIMES = ("arrival", "queued", "scheduled", "first_token", "end", "delivered")
# Durations from the arrival on, and the times that they tell.
DURATIONS = {"time_in_queue": "scheduled", "ttft": "first_token", "duration": "end"}
LATEST = 1 << 62  # ns since the epoch, or of a duration: one and another can be added
# Before the column, or the attribute of a span, that named a tenant. Whoever sends spans may be the client itself.
TABLE_SOURCE, SPAN_SOURCE = "table:", "claim:"

_FINISH_REASONS = pa.array([reason.name.lower() for reason in FinishReason])
_DECIMAL = r"^(?P<whole>\d{1,19})(?:\.(?P<fraction>\d*))?$"
_SCIENTIFIC = r"^\d+(\.\d*)?[eE][+-]?\d{1,2}$"


class Unit(StrEnum):
    """In what times are written."""

    NS = "ns"
    US = "us"
    MS = "ms"
    S = "s"
    RFC3339 = "rfc3339"


_NS = {Unit.NS: 1, Unit.US: 1_000, Unit.MS: 1_000_000, Unit.S: 1_000_000_000}


@dataclass(frozen=True, slots=True)
class Field:
    """Where a value is found: in a column, or the same everywhere (``value``). ``unit``: of a time or duration."""

    column: str
    value: str = ""
    unit: Unit = Unit.NS


@dataclass(frozen=True, slots=True)
class RequestMapping:
    """Where the values of requests are found, by canonical name. ``span``: in spans of this name; "": in a table."""

    fields: Mapping[str, Field]
    span: str = ""

    @property
    def columns(self) -> list[str]:
        return [field.column for field in self.fields.values() if field.column]


def read_mapped(path: Path, mapping: Path) -> tuple[pa.Table, tuple[Finding, ...]]:
    """The requests in a table or in OTLP files (a file, or a folder) as ``schema.REQUESTS``, and what can't be used.

    Rows without sound times are left out; a row without an end is of a request that was still open. Raises UsageError
    where either file can't be read, the mapping says what the table has not, or no row is sound.
    """
    said = read_mapping(mapping)
    findings = Findings()
    table = _spans(path, said, findings) if said.span else read_foreign(path, said.columns, findings)
    for key, one in said.fields.items():
        if one.column and one.column not in table.columns:
            has = ", ".join(map(repr, table.names))
            raise UsageError(f"{mapping}: {key}: {path} has no {one.column!r} with anything in it; it has {has}")
    requests = _Rows(table, said, str(path), findings).requests()
    if not requests.num_rows:
        first = findings.all()[-1]
        raise UsageError(f"{path}: no row can be used: {first.text} ({first.where}); look at units in {mapping}")
    return requests, findings.all()


# --- the mapping --------------------------------------------------------------------------------------------------


def read_mapping(path: Path) -> RequestMapping:
    """What a file says. Raises UsageError, with file and key, where it is no mapping."""
    root = Node(str(path), "", read_yaml(path))
    nodes = root.mapping(["unit", "span", *NAMES, *COUNTS, *TIMES, *DURATIONS])
    unit = _unit(nodes.pop("unit")) if "unit" in nodes else None
    span = nodes.pop("span").text() if "span" in nodes else ""
    fields = {key: _field(key, node, unit) for key, node in nodes.items()}
    for key, time in DURATIONS.items():
        if key in fields and time in fields and (key != "duration" or "arrival" in fields):
            raise nodes[key].error(f"{time} says that already; leave one of them out")
    if len(fields.keys() & {"arrival", "end", "duration"}) < 2:
        raise root.error("two of arrival, end and duration are needed to know when requests came and went")
    return RequestMapping(fields, span)


def _field(key: str, node: Node, unit: Unit | None) -> Field:
    """``COLUMN``, ``{column: COLUMN, unit: UNIT}`` or, for names, ``{value: TEXT}``."""
    timed = key in TIMES or key in DURATIONS
    if isinstance(node.value, str):
        column, value = node.text(), ""
    else:
        parts = node.mapping(["column", "unit"] if timed else ["column", "value"] if key in NAMES else ["column"])
        column, value = (parts[part].text() if part in parts else "" for part in ("column", "value"))
        unit = _unit(parts["unit"]) if "unit" in parts else unit
        if bool(column) == bool(value):
            raise node.error("say which column it is: {column: NAME}" + (", or one {value: TEXT}" * (key in NAMES)))
    if not timed:
        return Field(column, value)
    if unit is None:
        raise node.error(f"its unit is missing: {{column: {column}, unit: ms}}; units are {', '.join(Unit)}")
    if unit is Unit.RFC3339 and key in DURATIONS:
        raise node.error("a duration has no date; its unit is one of ns, us, ms and s")
    return Field(column, unit=unit)


def _unit(node: Node) -> Unit:
    if node.value not in list(Unit):
        raise node.error(f"must be one of {', '.join(Unit)}, not {node.value!r}")
    return Unit(node.text())


# --- spans --------------------------------------------------------------------------------------------------------


def _spans(path: Path, mapping: RequestMapping, findings: Findings) -> ForeignTable:
    """Spans of the mapping's name as a table: a column for each attribute, those of the resource behind ``resource.``,
    and ``start``, ``end`` (ns), ``trace_id``. Raises UsageError where there is none."""
    reader = Reader(findings)
    table = table_of(_span_records(reader.read(find_sources(path)), mapping.span), mapping.columns)
    if not len(table.rows):
        raise UsageError(f"{path}: no span in it is called {mapping.span!r}; give OTLP files with such spans")
    return table


def _span_records(groups: Iterable[SpanGroup], name: str) -> Iterator[Record]:
    for group in groups:
        resource = {f"resource.{key}": value for key, value in group.resource.attributes.items()}
        for span in group.spans:
            if span.name == name:
                own = {"start": span.start, "end": span.end, "trace_id": span.trace_id}
                yield resource | span.attributes | own


# --- rows to requests ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a foreign table, seen through a mapping."""

    table: ForeignTable
    mapping: RequestMapping
    path: str
    findings: Findings

    def requests(self) -> pa.Table:
        times, sound = self._times()
        columns: dict[str, Column] = {key: pa.array(time, mask=time < 0) for key, time in times.items()}
        columns |= {key: self._count(key) for key in COUNTS if key in self.mapping.fields}
        columns |= self._names()
        finished = times["end"] >= 0
        columns["state"] = np.where(finished, "finished", "open")
        if "finish_reason" in columns:
            columns["finish_reason"] = pc.if_else(pa.array(finished), columns["finish_reason"], None)
        plain = plain_table("requests", columns, len(sound)).filter(pa.array(sound))
        plain = plain.sort_by([("replica", "ascending"), ("arrival", "ascending")])
        return encode("requests", [_with_unique_names(plain)])

    # --- times ----------------------------------------------------------------------------------------------------

    def _times(self) -> tuple[dict[str, Ints], Mask]:
        """The canonical times in ns, -1 where there is none, and which rows can be used."""
        said, unsound = self._said_times()
        if "duration" in said and "arrival" not in said:
            said["arrival"] = _sum(said["end"], -said["duration"], said["duration"] >= 0)
            del said["duration"]
        for key, time in DURATIONS.items():
            if key in said:
                duration = said.pop(key)
                said[time] = _sum(said["arrival"], duration, duration >= 0)
        arrival, end = said["arrival"], said["end"]
        unsound |= arrival < 0
        self._note("unsound_row", unsound, "rows without sound times of arrival and end")
        backwards = ~unsound & (end >= 0) & (end < arrival)
        self._note("backward_row", backwards, "rows of requests that end before they arrive")
        sound = ~unsound & ~backwards
        for key in ("queued", "scheduled", "first_token"):
            if key in said:
                outside = sound & (said[key] >= 0) & ((said[key] < arrival) | ((end >= 0) & (said[key] > end)))
                self._note("unsound_value", outside, f"times of {key} outside of their requests", key)
                said[key] = np.where(outside, -1, said[key])
        return said, sound

    def _said_times(self) -> tuple[dict[str, Ints], Mask]:
        """What the columns of times and durations say, in ns (-1: nothing), and rows that so can't be used."""
        said: dict[str, Ints] = {}
        unsound = np.zeros(len(self.table.rows), dtype=np.bool_)
        for key in (*TIMES, *DURATIONS):
            if key not in self.mapping.fields:
                continue
            text = self._text(key)
            unit = self.mapping.fields[key].unit
            said[key] = _dates(text) if unit is Unit.RFC3339 else _numbers(text, _NS[unit])
            wrong = _unread(text, said[key])
            if key in ("arrival", "end", "duration"):
                unsound |= wrong
            else:
                self._note("unsound_value", wrong, f"values of {key} that are no time in {unit}", key)
        return said, unsound

    # --- counts and names -----------------------------------------------------------------------------------------

    def _count(self, key: str) -> pa.Array:
        text = self._text(key)
        counts = _numbers(text, 1)
        self._note("unsound_value", _unread(text, counts), f"values of {key} that are no number", key)
        return pa.array(counts, mask=counts < 0)

    def _names(self) -> dict[str, Column]:
        """The columns of names, with what takes the place of those that are missing."""
        rows = len(self.table.rows)
        names = {key: self._text(key) for key in NAMES if key in self.mapping.fields}
        nothing = pa.nulls(rows, pa.string())
        numbered = pc.binary_join_element_wise("row", _whole(self.table.rows).cast(pa.string()), "-")
        names["request"] = pc.coalesce(names.get("request", nothing), numbered)
        names["replica"] = pc.fill_null(names.get("replica", nothing), UNKNOWN)
        tenant = tenant_names(names.get("tenant", nothing))
        names["tenant"] = pc.fill_null(tenant, UNKNOWN)
        if "tenant" in self.mapping.fields:
            field = self.mapping.fields["tenant"]
            kind = SPAN_SOURCE if self.mapping.span else TABLE_SOURCE
            source = same(f"{kind}{field.column or 'mapping'}", rows)
            names["tenant_source"] = pc.if_else(pc.is_valid(tenant), source, nothing)
        if "trace_id" in names:
            names["trace_id"] = trace_ids(names["trace_id"])
        if "finish_reason" in names:
            reason = pc.utf8_lower(names["finish_reason"])
            names["finish_reason"] = pc.if_else(pc.is_in(reason, value_set=_FINISH_REASONS), reason, nothing)
        return names

    def _text(self, key: str) -> pa.Array:
        field = self.mapping.fields[key]
        return (
            same(field.value, len(self.table.rows)) if field.value else _whole(tidy(self.table.columns[field.column]))
        )

    def _note(self, kind: str, rows: Mask, text: str, key: str = "") -> None:
        """Counts rows, or values of a column."""
        positions = np.flatnonzero(rows)
        if len(positions):
            source = f"{self.path}: {key}" if key else self.path
            first = self.table.rows[int(positions[0])].as_py()
            self.findings.add(kind, source, f", row {first}" if key else f":{first}", text, len(positions))


def _with_unique_names(requests: pa.Table) -> pa.Table:
    """An id that several requests of a replica have gets " #2", " #3" in the order of their arrival."""
    names = requests.select(["replica", "request"]).to_pandas()
    use = pa.array(names.groupby(["replica", "request"]).cumcount().to_numpy() + 1)
    again = pc.binary_join_element_wise(_whole(requests["request"]), use.cast(pa.string()), " #")
    unique = pc.if_else(pc.greater(use, 1), again, _whole(requests["request"]))
    return requests.set_column(requests.schema.get_field_index("request"), "request", unique)


def _sum(time: Ints, duration: Ints, known: Mask) -> Ints:
    """A time and a duration; -1 where either is unknown, or what comes of it is before the epoch."""
    return np.where((time >= 0) & known, np.maximum(time + duration, -1), -1)


# --- text to numbers ----------------------------------------------------------------------------------------------


def _numbers(text: pa.Array, factor: int) -> Ints:
    """Numbers times a power of ten up to 10^9, as whole numbers: exact but for such with an exponent.

    -1 where the text says nothing, or what is negative, beyond ``LATEST`` or no number.
    """
    parts = pc.extract_regex(text, _DECIMAL)
    whole = pc.struct_field(parts, "whole").cast(pa.uint64())  # 19 digits fit
    whole = pc.if_else(pc.less_equal(whole, LATEST // factor), whole, None).cast(pa.int64())
    digits = pc.utf8_rpad(pc.struct_field(parts, "fraction"), 9, "0")
    fraction = pc.utf8_slice_codeunits(digits, 0, 9).cast(pa.int64())
    exact = pc.add(pc.multiply(whole, factor), pc.divide(pc.multiply(fraction, factor), 1_000_000_000))
    floats = pc.if_else(pc.match_substring_regex(text, _SCIENTIFIC), text, None).cast(pa.float64())
    floats = pc.round(pc.multiply(floats, factor))
    floats = pc.if_else(pc.less_equal(floats, float(LATEST)), floats, None).cast(pa.int64())
    numbers: Ints = pc.fill_null(pc.coalesce(exact, floats), -1).to_numpy(zero_copy_only=False)
    return numbers


def _dates(text: pa.Array) -> Ints:
    """Dates of ISO 8601, of UTC where they name no zone, in ns since the epoch; -1 where a text is none."""
    dates = pd.to_datetime(text.to_pandas().astype(object), utc=True, format="ISO8601", errors="coerce")
    sound = dates.between(pd.Timestamp(0, tz="UTC"), pd.Timestamp(LATEST, tz="UTC"))
    ns = dates.where(sound).dt.as_unit("ns").dt.tz_localize(None).to_numpy().astype(np.int64)
    return np.where(sound.to_numpy(), ns, -1)


def _unread(text: pa.Array, numbers: Ints) -> Mask:
    """Where there is a text, but no number in it."""
    said: Mask = pc.is_valid(text).to_numpy(zero_copy_only=False)
    return said & (numbers < 0)


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
