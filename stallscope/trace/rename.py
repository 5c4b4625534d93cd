"""Other names in a trace, the same everywhere: how a recording is shown to one tenant without naming the others."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from stallscope.errors import UsageError
from stallscope.trace.model import Trace
from stallscope.trace.schema import TABLES

UNKNOWN = "(unknown)"
REDACTED_SOURCE = "the trace"
Rename = Callable[[str], str]

# Columns by what they name; replicas, phases and the like are nobody's.
_KINDS = {
    "tenant": ("tenant", "owner_tenant"),
    "request": ("request", "holder", "predecessor", "retry_of", "evicting_request", "owner_request"),
    "session": ("session",),
    "adapter": ("adapter",),
    "trace": ("trace_id",),
}


def renamed(trace: Trace, names: dict[str, Rename]) -> Trace:
    """The trace with other names; ``names``: one function for each kind (tenant, request, session, adapter, trace).

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


def redacted(trace: Trace, tenant: str) -> Trace:
    """What ``tenant`` may see: of all others, names and ids of requests, sessions and adapters become neutral labels.

    Findings keep their words but not their places, the source is not named. Raises UsageError where the trace has no
    such tenant.
    """
    _find_tenant(trace, tenant)
    names = {kind: _labels(trace, kind, tenant) for kind in _KINDS}
    findings = tuple(replace(finding, where="in the trace") for finding in trace.findings)
    return replace(renamed(trace, names), source=REDACTED_SOURCE, findings=findings)


def _find_tenant(trace: Trace, tenant: str) -> None:
    known = set(_names(trace, "tenant"))
    if tenant not in known:
        near = difflib.get_close_matches(tenant, sorted(known), n=3, cutoff=0.5) or sorted(known)[:5]
        raise UsageError(f"{trace.source}: no tenant {tenant!r}; it has {', '.join(near)}")


def _labels(trace: Trace, kind: str, tenant: str) -> Rename:
    """Keeps a tenant's own names of this kind, and labels all others by the order in which they appear."""
    kept = {tenant, UNKNOWN} if kind == "tenant" else _own_names(trace, kind, tenant)
    labels: dict[str, str] = {}
    number = 0
    for name in _names(trace, kind):
        if name in kept:
            continue
        number += 1
        while f"{kind}-{number}" in kept:
            number += 1
        labels[name] = f"{kind}-{number}"
    return lambda name: labels.get(name, name)


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
