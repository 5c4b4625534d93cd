"""Columns to Arrow tables of the declared schemas, always encoded in the same way, so that equal data are equal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stallscope.trace.schema import TABLES

Column = Sequence[object] | npt.NDArray[np.int64]  # or a pyarrow array, which has no types


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with names as plain strings: how tables are built and merged, before names are coded."""
    return pa.schema([(one.name, pa.string() if pa.types.is_dictionary(one.type) else one.type) for one in schema])


def plain_table(name: str, columns: Mapping[str, Column], rows: int) -> pa.Table:
    """A table ``name`` with plain strings; columns that are not given are null in all ``rows``."""
    arrays = [
        pa.array(columns[column.name], type=column.type) if column.name in columns else pa.nulls(rows, column.type)
        for column in plain_schema(TABLES[name])
    ]
    return pa.Table.from_arrays(arrays, schema=plain_schema(TABLES[name]))


def same(value: str, rows: int) -> pa.Array:
    """One string, ``rows`` times."""
    return pa.repeat(pa.scalar(value, pa.string()), rows)


def names_at(names: Sequence[str], positions: npt.NDArray[np.int64]) -> pa.Array:
    """The names at these positions, null at -1."""
    return pa.array(names, pa.string()).take(pa.array(positions, mask=positions < 0))


def encode(name: str, parts: Iterable[pa.Table]) -> pa.Table:
    """Puts plain parts one below the other and codes names in the order in which they first appear."""
    schema = TABLES[name]
    whole = pa.concat_tables([plain_schema(schema).empty_table(), *parts]).combine_chunks()
    columns = []
    for field in schema:
        column = whole.column(field.name).combine_chunks()
        columns.append(column.dictionary_encode() if pa.types.is_dictionary(field.type) else column)
    return pa.Table.from_arrays(columns, schema=schema)


def with_columns(table: pa.Table, changed: Mapping[str, pa.Array | pa.ChunkedArray]) -> pa.Table:
    """The table with other columns, of the types that they had."""
    for name, column in changed.items():
        at = table.schema.get_field_index(name)
        field = table.schema.field(at)
        whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        table = table.set_column(at, field, whole.dictionary_encode() if pa.types.is_dictionary(field.type) else whole)
    return table
