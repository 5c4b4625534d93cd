"""The tables of a trace in a folder of Parquet files, read column by column where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from stallscope.errors import UsageError
from stallscope.trace.references import Ints
from stallscope.trace.schema import TABLES
from stallscope.trace.tables import encode, plain_schema

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset
    from pyarrow.parquet import ParquetFile

# Names that hardly ever occur twice are stored as they are.
_UNIQUE = {("requests", "request"), ("requests", "trace_id"), ("clients", "request"), ("clients", "trace_id")}


class StoredTables(Mapping[str, pa.Table]):
    """Tables by name, read anew whenever one is asked for: who needs a few columns takes ``columns``.

    Raises UsageError where a file is missing, damaged or of another form; where only its pages are damaged, when they
    are read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # For the whole process: Arrow's own allocators keep for themselves what a read no longer needs.
        pa.set_memory_pool(pa.system_memory_pool())
        for name, schema in TABLES.items():
            self._read(name, lambda file, names: file.schema_arrow.empty_table().select(names), plain_schema(schema))

    def __getitem__(self, name: str) -> pa.Table:
        plain = self._read(name, lambda file, names: file.read(names).select(names), plain_schema(TABLES[name]))
        return encode(name, [plain])

    def __iter__(self) -> Iterator[str]:
        return iter(TABLES)

    def __len__(self) -> int:
        return len(TABLES)

    def columns(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Some columns of a table. Names come as they are stored: plain, or coded with a dictionary for each chunk."""
        return self._read(name, lambda file, _: file.read(list(columns)).select(list(columns)))

    def dataset(self, name: str) -> Dataset:
        """A table as Arrow's dataset with plain names, of which a reader takes the columns and rows that it needs."""
        from pyarrow import dataset

        return dataset.dataset(self._folder / f"{name}.parquet", schema=plain_schema(TABLES[name]), format="parquet")

    def request_rows(self, name: str, column: str) -> Ints:
        """As ``references.request_rows`` found them when the tables were written."""
        stored = row_column(column)
        rows: Ints = self._read(name, lambda file, _: file.read([stored]))[stored].to_numpy().astype(np.int64)
        return rows

    def _read(
        self, name: str, read: Callable[[ParquetFile, list[str]], pa.Table], schema: pa.Schema | None = None
    ) -> pa.Table:
        """What ``read`` makes of the file and the table's columns, cast to ``schema``."""
        from pyarrow import parquet

        path = self._folder / f"{name}.parquet"
        try:
            coded = coded_columns(name)
            with parquet.ParquetFile(path, read_dictionary=coded, page_checksum_verification=True) as file:
                table = read(file, TABLES[name].names)
                table = table if schema is None else table.cast(schema)
        except (OSError, pa.ArrowException, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{path}: not readable as the table {name} ({reason}); convert again") from error
        pa.default_memory_pool().release_unused()  # reading takes twice what it leaves
        return table


def coded_columns(table: str) -> list[str]:
    """The columns of a table whose names are stored once and referred to by number."""
    names = (field.name for field in TABLES[table] if pa.types.is_dictionary(field.type))
    return [name for name in names if (table, name) not in _UNIQUE]


def row_column(column: str) -> str:
    """The stored column that says which row of the requests ``column`` means."""
    return f"{column}_row"
