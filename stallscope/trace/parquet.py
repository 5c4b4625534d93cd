"""A trace as a folder of Parquet files, one a table, and back; not yet partitioned by replica and hour."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import orjson
import pyarrow as pa

from stallscope.errors import UsageError
from stallscope.trace.findings import Finding
from stallscope.trace.model import Trace
from stallscope.trace.schema import TABLES
from stallscope.trace.tables import encode, plain_schema

FORMAT_VERSION = 1
METADATA = "trace.json"


def is_trace_folder(path: Path) -> bool:
    """Whether `write_parquet` has written there."""
    return (path / METADATA).is_file()


def write_parquet(trace: Trace, folder: str | Path) -> None:
    """Writes each table as ``NAME.parquet``, and ``trace.json`` with format version, source and findings.

    Raises UsageError where the folder holds anything already, or can't be written.
    """
    from pyarrow import parquet

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"{folder}: the folder is not empty; name a new one")
        for name, table in trace.tables.items():
            parquet.write_table(table, folder / f"{name}.parquet", compression="zstd")
        metadata = {
            "format": FORMAT_VERSION,
            "source": trace.source,
            "findings": [asdict(finding) for finding in trace.findings],
        }
        (folder / METADATA).write_bytes(orjson.dumps(metadata, option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); check the path and its rights") from error


def read_parquet(folder: Path) -> Trace:
    """What `write_parquet` wrote. Raises UsageError where a table is missing, damaged or of another form."""
    from pyarrow import parquet

    try:
        metadata = orjson.loads((folder / METADATA).read_bytes())
        version, source = metadata["format"], str(metadata["source"])
        findings = tuple(Finding(**finding) for finding in metadata["findings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / METADATA}: not readable as a trace's metadata ({error}); convert again") from error
    if version != FORMAT_VERSION:
        raise UsageError(
            f"{folder}: format {version}, this version reads {FORMAT_VERSION}; convert the recording again"
        )
    tables = {}
    for name, schema in TABLES.items():
        file = folder / f"{name}.parquet"
        try:
            tables[name] = encode(name, [parquet.ParquetFile(file).read().cast(plain_schema(schema))])
        except (OSError, pa.ArrowException, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{file}: not readable as the table {name} ({reason}); convert again") from error
    return Trace(tables, source, findings)
