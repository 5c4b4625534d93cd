"""Other names in a trace, the same everywhere: how it is shown to one tenant without naming the others, or shared."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from stallscope.errors import UsageError
from stallscope.trace.model import Trace
from stallscope.trace.reserved import UNKNOWN
from stallscope.trace.schema import TABLES

REDACTED_SOURCE = "the trace"
Rename = Callable[[str], str]

# Columns by what they name; phases and the like are nobody's.
_KINDS = {
    "tenant": ("tenant", "owner_tenant"),
    "request": ("request", "holder", "predecessor", "retry_of", "evicting_request", "owner_request"),
    "session": ("session",),
    "adapter": ("adapter",),
    "trace": ("trace_id",),
    "replica": ("replica",),
    "group": ("group",),
    "device": ("device",),
}
_OF_TENANTS = ("tenant", "request", "session", "adapter", "trace")


def renamed(trace: Trace, names: dict[str, Rename]) -> Trace:
    """The trace with other names; ``names``: one function for each kind (tenant, request, session, adapter, trace,
    replica, group, device) that is to change.

    Different names must stay different.
    """
    tables = {}
    for table_name, table in trace.tables.items():
        changed = table
        for kind, rename in names.items():
            for column in _KINDS[kind]:
                if column in TABLES[table_name].names:
                    at = table.schema.get_field_index(column)
                    changed = changed.set_column(at, table.schema.field(at), _mapped(table.column(column), rename))
        tables[table_name] = changed
    return replace(trace, tables=tables)


class UnknownTenantError(UsageError):
    """Says which tenants there are: not for whoever may know of one alone."""


def redacted(trace: Trace, tenant: str) -> Trace:
    """What ``tenant`` may see: of all others, names and ids of requests, sessions and adapters become neutral labels.

    Findings keep their words but not their places, the source is not named. Raises UnknownTenantError where the trace
    has no such tenant.
    """
    _find_tenant(trace, tenant)
    kept = {kind: _own_names(trace, kind, tenant) for kind in _OF_TENANTS} | {"tenant": {tenant, UNKNOWN}}
    return _nameless(renamed(trace, {kind: _labels(trace, kind, kept[kind]) for kind in _OF_TENANTS}))


def anonymized(trace: Trace) -> Trace:
    """What may be shared: all names and ids are labels by the order in which they appear, the same one everywhere.

    Models, settings, times and amounts stay. Nothing in it leads back to a name.
    """
    labels = {kind: _labels(trace, kind, {UNKNOWN} if kind == "tenant" else set()) for kind in _KINDS}
    tables = dict(renamed(trace, labels).tables)
    # Which prompts begin alike is kept, but nothing that a known prompt could be compared with.
    at = tables["requests"].schema.get_field_index("prefix")
    prefix = tables["requests"].column("prefix").combine_chunks().dictionary_encode().indices.cast(pa.int64())
    tables["requests"] = tables["requests"].set_column(at, TABLES["requests"].field(at), prefix)
    return _nameless(replace(trace, tables=tables))


def _nameless(trace: Trace) -> Trace:
    """Without the source and the places of findings, which may name anything."""
    findings = tuple(replace(finding, where="in the trace") for finding in trace.findings)
    return replace(trace, source=REDACTED_SOURCE, findings=findings)


def _find_tenant(trace: Trace, tenant: str) -> None:
    known = set(_names(trace, "tenant"))
    if tenant not in known:
        near = difflib.get_close_matches(tenant, sorted(known), n=3, cutoff=0.5) or sorted(known)[:5]
        raise UnknownTenantError(f"{trace.source}: no tenant {tenant!r}; it has {', '.join(near)}")


def _labels(trace: Trace, kind: str, kept: set[str]) -> Rename:
    """Keeps some names of this kind, and labels all others by the order in which they appear."""
    labels: dict[str, str] = {}
    number = 0
    for name in _names(trace, kind):
        if name in kept:
            continue
        number += 1
        while _label(kind, number) in kept:
            number += 1
        labels[name] = _label(kind, number)
    return lambda name: labels.get(name, name)


def _label(kind: str, number: int) -> str:
    """Trace ids stay such as OpenTelemetry allows."""
    return f"a{number:031x}" if kind == "trace" else f"{kind}-{number}"


def _names(trace: Trace, kind: str) -> list[str]:
    """All names of a kind, each once."""
    columns = (
        table.column(column)
        for table_name, table in trace.tables.items()
        for column in _KINDS[kind]
        if column in TABLES[table_name].names
    )
    return list(dict.fromkeys(name for column in columns for name in _distinct(column)))


def _own_names(trace: Trace, kind: str, tenant: str) -> set[str]:
    """Names of a kind in a tenant's own requests, as the engine or its clients saw them."""
    column = _KINDS[kind][0]
    tables = (table for table in (trace.requests, trace.clients) if column in table.schema.names)
    own = (table.filter(pc.equal(table.column("tenant").cast(pa.string()), tenant)) for table in tables)
    return {name for table in own for name in _distinct(table.column(column))}


def _distinct(column: pa.ChunkedArray) -> list[str]:
    return [name for name in pc.unique(column.cast(pa.string())).to_pylist() if name is not None]


def _mapped(column: pa.ChunkedArray, rename: Rename) -> pa.Array:
    """The coded column with each of its names renamed; what only its dictionary still had is gone."""
    coded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    names = pa.array([rename(name) for name in coded.dictionary.to_pylist()], pa.string())
    return pa.DictionaryArray.from_arrays(coded.indices, names)
