"""The tables of a trace in a dataset of Parquet files: of them, what is asked for is read, by part and by column."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from stallscope.errors import UsageError
from stallscope.trace.references import Ints
from stallscope.trace.schema import TABLES
from stallscope.trace.tables import encode, plain_schema

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

# Names that hardly ever occur twice are stored as they are.
_UNIQUE = {("requests", "request"), ("requests", "trace_id"), ("clients", "request"), ("clients", "trace_id")}
ALWAYS_READ = ("replicas", "coverage")  # tables that say something of all the time that follows
_LONGEST_NAME = 80  # of a folder, after which its name is a digest's
_MUCH = 1 << 25  # bytes; to give less back to the system takes longer than it is worth
_NOBODY = "__HIVE_DEFAULT_PARTITION__"  # what others who read such datasets take for null


@dataclass(frozen=True)
class Part:
    """What one write put into the partition of a replica and an hour: a file a table that has ``rows`` there.

    From ``start`` to ``end`` (ns) lies all that its rows tell of, even if they only begin in this hour.
    ``first_request`` is the number of its first request among those of the replica, in the order of the parts.
    ``rewritten``: tables that a later write has replaced, with the number of that write.
    """

    replica: str | None
    hour: str
    number: int
    start: int
    end: int
    first_request: int
    rows: Mapping[str, int]
    rewritten: Mapping[str, int] = field(default_factory=dict)

    def path(self, table: str) -> Path:
        """Where the file of a table lies in the dataset."""
        again = f"-{self.rewritten[table]}" if table in self.rewritten else ""
        name = f"{self.number}{again}.parquet"
        return Path(table) / f"replica={_as_folder(self.replica)}" / f"hour={self.hour}" / name


def _as_folder(name: str | None) -> str:
    if name is None:
        return _NOBODY
    quoted = quote(name, safe=" ")
    if len(quoted) <= _LONGEST_NAME:
        return quoted
    return f"{quote(name[:10], safe=' ')[:40]}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"


class LazyTables(Mapping[str, pa.Table]):
    """Tables by name, of which no more is read than is asked for."""

    @abstractmethod
    def columns(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Some columns of a table. Names come as they are stored: plain, or coded with a dictionary for each chunk."""

    @abstractmethod
    def request_rows(self, name: str, column: str) -> Ints:
        """As ``references.request_rows`` would find them."""

    @abstractmethod
    def scannable(self, name: str) -> pa.Table | Dataset:
        """A table for who reads Arrow."""

    @abstractmethod
    def narrowed(self, replicas: Collection[str] | None, start_ns: int | None, end_ns: int | None) -> LazyTables:
        """The same, or only what may tell of these replicas and times."""


class StoredTables(LazyTables):
    """Tables by name, read anew whenever one is asked for: who needs a few columns takes ``columns``.

    Raises UsageError where a file that is read is missing, damaged or of another form.
    """

    def __init__(self, folder: Path, parts: Sequence[Part]) -> None:
        self.folder = folder
        self.parts = tuple(parts)
        # For the whole process: Arrow's own allocators keep for themselves what a read no longer needs.
        pa.set_memory_pool(pa.system_memory_pool())

    def __getitem__(self, name: str) -> pa.Table:
        schema = plain_schema(TABLES[name])
        return encode(name, [self._read(part, name, schema.names).cast(schema) for part in self._parts_of(name)])

    def __iter__(self) -> Iterator[str]:
        return iter(TABLES)

    def __len__(self) -> int:
        return len(TABLES)

    def columns(self, name: str, columns: Sequence[str]) -> pa.Table:
        parts = [self._read(part, name, columns) for part in self._parts_of(name)]
        table = pa.concat_tables(parts) if parts else TABLES[name].empty_table().select(columns)
        if table.nbytes > _MUCH:
            pa.default_memory_pool().release_unused()  # reading takes twice what it leaves
        return table

    def scannable(self, name: str) -> Dataset:
        """A table as Arrow's dataset with plain names, of which a reader takes the columns and rows that it needs."""
        from pyarrow import dataset, fs

        schema, replica = plain_schema(TABLES[name]), dataset.field("replica")
        parts = list(self._parts_of(name))
        if not parts:
            return dataset.dataset(schema.empty_table())
        return dataset.FileSystemDataset.from_paths(
            [str(self.folder / part.path(name)) for part in parts],
            schema=schema,
            format=dataset.ParquetFileFormat(),
            filesystem=fs.LocalFileSystem(),
            partitions=[replica.is_null() if part.replica is None else replica == part.replica for part in parts],
        )

    def request_rows(self, name: str, column: str) -> Ints:
        """By the numbers in their replicas by which the files know requests."""
        found = [np.zeros(0, dtype=np.int64)]
        rows = _RequestRows(list(self._parts_of("requests")))
        for part in self._parts_of(name):
            numbers = self._read(part, name, [row_column(column)])[row_column(column)].to_numpy().astype(np.int64)
            found.append(rows.of(part.replica, numbers))
        return np.concatenate(found)

    def narrowed(self, replicas: Collection[str] | None, start_ns: int | None, end_ns: int | None) -> StoredTables:
        """Only the parts of these replicas, and of others' time only what says something of all time after it."""
        kept = []
        for part in self.parts:
            if replicas is not None and part.replica not in replicas:
                continue
            if (start_ns is None or part.end >= start_ns) and (end_ns is None or part.start <= end_ns):
                kept.append(part)
            elif any(part.rows.get(table) for table in ALWAYS_READ):
                rows = {table: part.rows.get(table, 0) for table in ALWAYS_READ}
                kept.append(Part(part.replica, part.hour, part.number, part.start, part.end, part.first_request, rows))
        return StoredTables(self.folder, kept)

    def _parts_of(self, name: str) -> Iterator[Part]:
        return (part for part in self.parts if part.rows.get(name))

    def _read(self, part: Part, name: str, columns: Sequence[str]) -> pa.Table:
        """Some columns of a table's file; the replica is in none, but in the file's place."""
        from pyarrow import parquet

        path = self.folder / part.path(name)
        stored = [column for column in columns if column != "replica"]
        found = {"replica": _repeated(part.replica, part.rows[name])}
        try:
            if stored:
                coded = coded_columns(name)
                with parquet.ParquetFile(path, read_dictionary=coded, page_checksum_verification=True) as file:
                    table = file.read(stored)
                found |= {column: table[column] for column in stored}
            table = pa.table([found[column] for column in columns], names=list(columns))
        except (OSError, pa.ArrowException, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{path}: not readable as the table {name} ({reason}); convert again") from error
        return table


class _RequestRows:
    """The row of each request among those that are read, by its number in its replica."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._known: dict[str | None, list[tuple[int, int, int]]] = {}
        row = 0
        for part in parts:
            count = part.rows["requests"]
            self._known.setdefault(part.replica, []).append((part.first_request, count, row))
            row += count

    def of(self, replica: str | None, numbers: Ints) -> Ints:
        """-1 for those that are not read, and for number -1."""
        known = self._known.get(replica)
        if not known:
            return np.full(len(numbers), -1)
        first, count, row = np.array(known, dtype=np.int64).T
        if len(known) == 1 and first[0] == 0 and row[0] == 0 and numbers.max(initial=-1) < count[0]:
            return numbers
        at = np.maximum(np.searchsorted(first, numbers, side="right") - 1, 0)
        inside = (numbers >= first[at]) & (numbers < first[at] + count[at])
        return np.where(inside, numbers - first[at] + row[at], -1)


def _repeated(replica: str | None, rows: int) -> pa.Array:
    codes = pa.array(np.zeros(rows, dtype=np.int32), mask=np.full(rows, replica is None))
    return pa.DictionaryArray.from_arrays(codes, pa.array([replica or ""], pa.string()))


def coded_columns(table: str) -> list[str]:
    """The stored columns of a table whose names are stored once and referred to by number."""
    names = (one.name for one in TABLES[table] if pa.types.is_dictionary(one.type) and one.name != "replica")
    return [name for name in names if (table, name) not in _UNIQUE]


def row_column(column: str) -> str:
    """The stored column that says which request of the replica ``column`` means."""
    return f"{column}_row"
