"""SQL over the tables of a trace, by DuckDB: read where they are, column by column, and nothing else can be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from stallscope.errors import UsageError
from stallscope.trace.model import Trace
from stallscope.trace.schema import TABLES

if TYPE_CHECKING:
    import duckdb

_BATCH = 4096  # rows at hand at a time
# A trace's reader must not become one of the machine's files, or of anything else.
_SHUT_IN: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
}


@dataclass(frozen=True, eq=False)
class Answer:
    """The names of the columns, each once, and the rows, which are computed as they are taken."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[object, ...]]


def ask(trace: Trace, sql: str) -> Answer:
    """What one SELECT over the tables of ``schema.TABLES`` gives.

    Raises UsageError where it is no such statement or can't be answered, also while rows are taken, and where DuckDB is
    missing.
    """
    if find_spec("duckdb") is None:
        raise UsageError("SQL needs the package duckdb, which is not installed: pip install duckdb")
    import duckdb

    connection = duckdb.connect(":memory:", config=_SHUT_IN)
    for name in TABLES:
        connection.register(name, trace.scannable(name))
    connection.execute("set lock_configuration = true")
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise UsageError("only one SELECT can be asked: a trace is not changed by it")
        connection.execute(statements[0])
        columns = _each_once([str(column[0]) for column in connection.description or ()])
    except duckdb.Error as error:
        raise _said(error) from error
    return Answer(columns, _rows(connection))


def _rows(connection: duckdb.DuckDBPyConnection) -> Iterator[tuple[object, ...]]:
    import duckdb

    try:
        while batch := connection.fetchmany(_BATCH):
            yield from batch
    except duckdb.Error as error:
        raise _said(error) from error


def _said(error: Exception) -> UsageError:
    """What is wrong, without DuckDB's picture of the place, and which tables there are."""
    lines = [line.strip() for line in str(error).partition("\n\nLINE ")[0].splitlines() if line.strip()]
    return UsageError(f'{" ".join(lines)} (tables: {", ".join(TABLES)}; "describe steps" lists the columns of one)')


def _each_once(names: list[str]) -> tuple[str, ...]:
    """Names with a number behind those that came before."""
    found: list[str] = []
    for name in names:
        number, unique = 1, name
        while unique in found:
            number += 1
            unique = f"{name}_{number}"
        found.append(unique)
    return tuple(found)
