"""A trace as a folder of Parquet files, one a table, and back; not yet partitioned by replica and hour."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import orjson
import pyarrow as pa

from stallscope.errors import UsageError
from stallscope.trace.findings import Finding
from stallscope.trace.model import Trace
from stallscope.trace.references import REFERENCES, request_rows
from stallscope.trace.stored import StoredTables, coded_columns, row_column

FORMAT_VERSION = 2
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
            stored = table
            for column in REFERENCES.get(name, ()):
                stored = stored.append_column(row_column(column), pa.array(request_rows(trace.tables, name, column)))
            parquet.write_table(stored, folder / f"{name}.parquet", **_encoding(name, stored.schema))
        metadata = {
            "format": FORMAT_VERSION,
            "source": trace.source,
            "findings": [asdict(finding) for finding in trace.findings],
        }
        (folder / METADATA).write_bytes(orjson.dumps(metadata, option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); check the path and its rights") from error


def _encoding(table: str, schema: pa.Schema) -> dict[str, object]:
    """How columns are written: half the size of the defaults, and read twice as fast."""
    return {
        "compression": "zstd",
        # Most integers are times and counters, which differ little from one row to the next.
        "column_encoding": {field.name: "DELTA_BINARY_PACKED" for field in schema if pa.types.is_int64(field.type)},
        "use_dictionary": coded_columns(table),
        # Only where all names of a column fit into its dictionary does a reader get them as codes.
        "dictionary_pagesize_limit": 1 << 28,
        "write_page_checksum": True,
    }


def read_parquet(folder: Path) -> Trace:
    """What `write_parquet` wrote; its tables are read where they are asked for.

    Raises UsageError where a table is missing, damaged or of another form.
    """
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
    return Trace(StoredTables(folder), source, findings)
