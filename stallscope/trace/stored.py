"""The tables of a trace in a folder of Parquet files, read column by column where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from stallscope.errors import UsageError
from stallscope.trace.schema import TABLES
from stallscope.trace.tables import encode, plain_schema

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile


class StoredTables(Mapping[str, pa.Table]):
    """Tables by name, read anew whenever one is asked for: who needs a few columns takes ``columns``.

    Raises UsageError where a file is missing, damaged or of another form; where only its pages are damaged, when they
    are read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in TABLES:
            self._read(name, lambda file, schema: file.schema_arrow.empty_table().cast(schema))

    def __getitem__(self, name: str) -> pa.Table:
        return self._read(name, lambda file, schema: encode(name, [file.read().cast(schema)]))

    def __iter__(self) -> Iterator[str]:
        return iter(TABLES)

    def __len__(self) -> int:
        return len(TABLES)

    def columns(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Some columns of a table. Names are coded as stored: each chunk of a column has a dictionary of its own."""
        wanted = pa.schema([TABLES[name].field(column) for column in columns])
        return self._read(name, lambda file, _: file.read(wanted.names).select(wanted.names).cast(wanted))

    def _read(self, name: str, read: Callable[[ParquetFile, pa.Schema], pa.Table]) -> pa.Table:
        """What ``read`` makes of the file and the schema that it must fit, with plain names."""
        from pyarrow import parquet

        path = self._folder / f"{name}.parquet"
        coded = [field.name for field in TABLES[name] if pa.types.is_dictionary(field.type)]
        try:
            with parquet.ParquetFile(path, read_dictionary=coded) as file:
                return read(file, plain_schema(TABLES[name]))
        except (OSError, pa.ArrowException, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{path}: not readable as the table {name} ({reason}); convert again") from error
