"""`Trace`: the tables of a recording, where it came from, and what reading it left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from stallscope.trace.findings import Finding
from stallscope.trace.references import Ints, request_rows
from stallscope.trace.schema import TABLES
from stallscope.trace.stored import LazyTables
from stallscope.trace.validate import validate


@dataclass(frozen=True, slots=True)
class Trace:
    """A recording as columnar tables (``schema.TABLES``: all are there, some may be empty).

    ``source`` is the path it was read from. ``findings`` says what could not be read or matched.
    Raises ValueError where a table is missing or has another schema.
    """

    tables: Mapping[str, pa.Table]
    source: str
    findings: tuple[Finding, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.tables, LazyTables):
            return  # it has looked at the files, and reads a table only where one is asked for
        for name, schema in TABLES.items():
            if name not in self.tables or self.tables[name].schema != schema:
                raise ValueError(f"table {name} is missing or differs from its declared schema")

    def columns(self, table: str, names: Sequence[str]) -> pa.Table:
        """Some columns of a table; no others are read where the table is stored."""
        if isinstance(self.tables, LazyTables):
            return self.tables.columns(table, names)
        return self.tables[table].select(names)

    @property
    def is_stored(self) -> bool:
        """Whether its tables are read only as they are asked for."""
        return isinstance(self.tables, LazyTables)

    def narrowed(
        self, replicas: Collection[str] | None = None, start_ns: int | None = None, end_ns: int | None = None
    ) -> Trace:
        """The same trace, of which less is read where it is stored: only what may tell of these replicas and times."""
        if not isinstance(self.tables, LazyTables):
            return self
        return replace(self, tables=self.tables.narrowed(replicas, start_ns, end_ns))

    def scannable(self, table: str) -> pa.Table:
        """A table for who reads Arrow: itself, or, where it is stored, the dataset that is read as it is asked."""
        return self.tables.scannable(table) if isinstance(self.tables, LazyTables) else self.tables[table]

    def request_rows(self, table: str, column: str) -> Ints:
        """For each row of a table, the row of ``requests`` that ``column`` names (``references.REFERENCES``), or -1."""
        if isinstance(self.tables, LazyTables):
            return self.tables.request_rows(table, column)
        return request_rows(self.tables, table, column)

    @property
    def replicas(self) -> pa.Table:
        return self.tables["replicas"]

    @property
    def steps(self) -> pa.Table:
        return self.tables["steps"]

    @property
    def residency(self) -> pa.Table:
        return self.tables["residency"]

    @property
    def requests(self) -> pa.Table:
        return self.tables["requests"]

    @property
    def gaps(self) -> pa.Table:
        return self.tables["gaps"]

    @property
    def evictions(self) -> pa.Table:
        return self.tables["evictions"]

    @property
    def clients(self) -> pa.Table:
        return self.tables["clients"]

    @property
    def gpu(self) -> pa.Table:
        return self.tables["gpu"]

    @property
    def coverage(self) -> pa.Table:
        return self.tables["coverage"]

    def validate(self) -> list[Finding]:
        """Findings where the tables break an invariant; empty for a sound trace (see ``stallscope.trace.validate``)."""
        return validate(self.tables)
