"""Which request a row means: positions in the table of requests, so that an analysis compares integers, not names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints = npt.NDArray[np.int64]

# Columns that name requests, by their tables.
REFERENCES = {"residency": ("request", "holder"), "gaps": ("request",)}


def request_rows(tables: Mapping[str, pa.Table], table: str, column: str) -> Ints:
    """For each row of a table, the row of ``requests`` (same replica) that ``column`` names; -1 where there is none."""
    requests = tables["requests"]
    names = requests.column("request").cast(pa.string()).combine_chunks()
    replicas = pc.unique(requests.column("replica").cast(pa.string()))
    known = _keys(requests, "request", names, replicas)
    asked = _keys(tables[table], column, names, replicas)
    order = np.argsort(known, kind="stable")
    found = np.minimum(np.searchsorted(known[order], asked), max(len(known) - 1, 0))
    if not len(known):
        return np.full(len(asked), -1)
    row = order[found]
    return np.where((asked >= 0) & (known[row] == asked), row, -1)


def _keys(table: pa.Table, column: str, names: pa.Array, replicas: pa.Array) -> Ints:
    """Replica and name of each row as one integer; -1 where either is none of these."""
    name, replica = _positions(table.column(column), names), _positions(table.column("replica"), replicas)
    return np.where((name >= 0) & (replica >= 0), replica * len(names) + name, -1)


def _positions(column: pa.ChunkedArray, words: pa.Array) -> Ints:
    """Where each word of a dictionary-coded column first stands among ``words``; -1: nowhere, or null."""
    coded = column.unify_dictionaries().combine_chunks()
    positions = pc.index_in(coded.dictionary, value_set=words).fill_null(-1).to_numpy(zero_copy_only=False)
    found: Ints = np.append(positions, -1)[coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)].astype(np.int64)
    return found
