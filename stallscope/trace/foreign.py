"""Tables that others wrote (CSV, JSON lines, Parquet; plain, gzip, zstd) to columns of text, only those asked for.

With this ``tenants`` reads gateway logs, and ``mapping`` tables of requests. What a file is, its first bytes say, not
its name. Columns are found by name, in any case, with ``-`` as ``_``, with or without a colon before it; a dot leads
into an object, a Parquet struct, or a cell that holds JSON.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import zstandard

from stallscope.errors import UsageError
from stallscope.trace.findings import Findings

if TYPE_CHECKING:
    from pyarrow.csv import InvalidRow

MOST_ROW_BYTES = 1 << 24  # a log may hold the bodies of requests; a longer row is damage
MOST_TEXT = 1024  # characters kept of a value: ids, names, times and numbers have fewer
_MOST_WHOLE_BYTES = 1 << 29  # of what can only be read as a whole
_MOST_NAMES = 20
_BLOCK_ROWS = 1 << 13
_START_BYTES = 4096
_CHUNK_BYTES = 1 << 22

Record = Mapping[str, object]
_BLANK: dict[str, object] = {}
_EXPECTED = "expected CSV with a header, JSON lines or Parquet, plain, gzip or zstd"
_UNREADABLE = "rows that are no JSON object, or not as long as the CSV's header"
_DAMAGED = (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError)


@dataclass(frozen=True, slots=True)
class ForeignTable:
    """Some columns of a file as text, null where a row says nothing; a column that is null in all rows is not there.

    ``columns``: by the name that was asked for. ``rows``: the number of each row (a line, from 1 on; in Parquet a row).
    ``names``: of the columns that the file has, the first ones.
    """

    columns: Mapping[str, pa.ChunkedArray]
    rows: pa.ChunkedArray
    names: tuple[str, ...]


def read_foreign(path: Path, names: Iterable[str], findings: Findings) -> ForeignTable:
    """The columns of a file that have these names. What can't be read of it is a finding.

    Raises UsageError where there is no file, no row in it, or what is no table.
    """
    wanted = [(normal(name), name) for name in names]
    try:
        with _opened(path, findings) as stream:
            has, blocks = _reader(path, _start(path, stream))(_Source(path, stream, findings), wanted)
            kept = list(_until_damaged(blocks, path, findings))
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"{path}: cannot be read ({reason}); check the path, its rights and the file") from error
    table = _table(kept, has)
    if not len(table.rows):
        raise UsageError(f"{path}: no row in it that can be read; {_EXPECTED}")
    return table


def table_of(records: Iterable[Record], names: Iterable[str]) -> ForeignTable:
    """The values that have these names in some objects, as columns."""
    wanted = [(normal(name), name) for name in names]
    records = iter(records)
    has: list[str] = []
    blocks: list[_Block] = []
    first = 1
    while block := list(islice(records, _BLOCK_ROWS)):
        has = has or _names_of(block[0])
        blocks.append(_Block(_found(block, wanted), pa.array(np.arange(first, first + len(block)))))
        first += len(block)
    return _table(blocks, has)


def _table(blocks: Sequence[_Block], names: Sequence[str]) -> ForeignTable:
    found = dict.fromkeys(name for block in blocks for name, column in block.columns.items() if _says_anything(column))
    columns = {
        name: pa.chunked_array(
            [block.columns.get(name, pa.nulls(len(block.rows), pa.string())) for block in blocks], pa.string()
        )
        for name in found
    }
    return ForeignTable(columns, pa.chunked_array([block.rows for block in blocks], pa.int64()), tuple(names))


def _says_anything(column: pa.Array) -> bool:
    said: bool = column.null_count < len(column)
    return said


def normal(name: str) -> str:
    """A column's name in the form in which names are compared."""
    return name.strip().lower().replace("-", "_").removeprefix(":")


def tidy(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text without space around it; null where there is nothing else, or the dash that Envoy and nginx write then."""
    text = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.is_in(text, value_set=pa.array(["", "-"])), pa.scalar(None, pa.string()), text)


# --- bytes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """An open file; ``stream`` is of its content, decompressed."""

    path: Path
    stream: io.BufferedReader
    findings: Findings

    def unreadable(self, row: int) -> None:
        self.findings.add("unreadable_row", str(self.path), f":{row}", _UNREADABLE)


@dataclass(frozen=True, slots=True)
class _Block:
    """Columns of some rows."""

    columns: Mapping[str, pa.Array]
    rows: pa.Array


_Wanted = Sequence[tuple[str, str]]  # of each name: what is still to be found, in the ``normal`` form, and the name
_Reader = Callable[["_Source", _Wanted], tuple[Sequence[str], Iterator[_Block]]]


@contextmanager
def _opened(path: Path, findings: Findings) -> Iterator[io.BufferedReader]:
    with path.open("rb") as file:
        magic = file.peek(4)[:4]
        if magic.startswith(b"\x1f\x8b"):
            packed: _Packed = gzip.GzipFile(fileobj=file)
        elif magic == b"\x28\xb5\x2f\xfd":
            packed = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        else:
            yield file
            return
        yield io.BufferedReader(_Unpacked(packed, lambda error: _note_damage(path, error, findings)), _CHUNK_BYTES)


class _Packed(Protocol):
    def read1(self, size: int, /) -> bytes: ...


class _Unpacked(io.RawIOBase):
    """The content of a packed file up to where it is damaged; raises what is wrong only where that is at once."""

    def __init__(self, packed: _Packed, damaged: Callable[[Exception], None]) -> None:
        self._packed = packed
        self._damaged = damaged
        self._began = False

    def readable(self) -> bool:
        return True

    def readinto(self, room: memoryview) -> int:  # type: ignore[override]
        try:
            content = self._packed.read1(len(room))
        except _DAMAGED as error:
            if not self._began:
                raise
            self._damaged(error)
            return 0
        self._began = True
        room[: len(content)] = content
        return len(content)


class _SoundText(io.RawIOBase):
    """A stream with a sign of replacement where it is not UTF-8, on which Arrow's reader of CSV would choke."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def readable(self) -> bool:
        return True

    def readinto(self, room: memoryview) -> int:  # type: ignore[override]
        content = b""
        while not content:
            raw = self._stream.read(len(room) // 4)  # a byte may become three, and three may have been kept
            content = self._decoder.decode(raw, final=not raw).encode()
            if not raw:
                break
        room[: len(content)] = content
        return len(content)


def _note_damage(path: Path, error: Exception, findings: Findings) -> None:
    reason = " ".join(str(error).split())
    findings.add("damaged_file", str(path), "", f"the file is damaged ({reason}); what came before is used")


def _start(path: Path, stream: io.BufferedReader) -> bytes:
    """The first bytes of the content; a mark that it is UTF-8 is passed over."""
    start = stream.peek(_START_BYTES)[:_START_BYTES]
    if start.startswith(b"\xef\xbb\xbf"):
        stream.read(3)
        start = start[3:]
    if not start.strip():
        raise UsageError(f"{path}: the file is empty; {_EXPECTED}")
    return start


def _reader(path: Path, start: bytes) -> _Reader:
    if start.startswith(b"PAR1"):
        return _read_parquet
    if b"\0" in start:
        raise UsageError(f"{path}: neither text nor Parquet; {_EXPECTED}")
    first = start.lstrip()[:1]
    return _read_json_lines if first == b"{" else _read_json_list if first == b"[" else _read_csv


def _until_damaged(blocks: Iterator[_Block], path: Path, findings: Findings) -> Iterator[_Block]:
    """The blocks that can be read, before what can't."""
    try:
        yield from blocks
    except (*_DAMAGED, pa.ArrowException) as error:
        _note_damage(path, error, findings)


# --- JSON ---------------------------------------------------------------------------------------------------------


def _read_json_lines(source: _Source, wanted: _Wanted) -> tuple[Sequence[str], Iterator[_Block]]:
    names: list[str] = []

    def blocks() -> Iterator[_Block]:
        first = 1
        for lines in _line_blocks(source.stream):
            yield _block(source, names, wanted, first, map(_loaded, lines))
            first += len(lines)

    return names, blocks()


def _read_json_list(source: _Source, wanted: _Wanted) -> tuple[Sequence[str], Iterator[_Block]]:
    values = orjson.loads(_whole(source))
    names: list[str] = []
    starts = range(0, len(values), _BLOCK_ROWS)
    return names, (_block(source, names, wanted, start + 1, values[start : start + _BLOCK_ROWS]) for start in starts)


def _line_blocks(stream: io.BufferedReader) -> Iterator[list[bytes]]:
    """Lines, some at a time; of one that is too long there is only a beginning, which can't be read."""
    rest = b""
    while chunk := stream.read(_CHUNK_BYTES):
        *whole, rest = (rest + chunk).split(b"\n")
        if len(rest) > MOST_ROW_BYTES:
            rest = b"\0"
        yield whole
    yield [rest]


def _loaded(line: bytes) -> object:
    """What a line holds; None where that is no JSON."""
    try:
        return orjson.loads(line)
    except ValueError:
        return None if line.strip() else _BLANK


def _block(source: _Source, names: list[str], wanted: _Wanted, first: int, values: Iterable[object]) -> _Block:
    """The rows of some values, the first of which has the number ``first``; notes the names that the first row has."""
    rows: list[int] = []
    records: list[Record] = []
    for number, value in enumerate(values, first):
        if value is _BLANK:
            continue
        if isinstance(value, dict):
            rows.append(number)
            records.append(value)
        else:
            source.unreadable(number)
    if records and not names:
        names += _names_of(records[0])
    return _Block(_found(records, wanted), pa.array(rows, pa.int64()))


def _names_of(record: Record) -> list[str]:
    names: list[str] = []
    for key, value in record.items():
        names += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
    return names[:_MOST_NAMES]


def _found(records: Sequence[Record], wanted: _Wanted) -> dict[str, pa.Array]:
    """The wanted columns of some objects."""
    found: dict[str, pa.Array] = {}
    for key in dict.fromkeys(key for record in records for key in record):
        names, inner = _named(wanted, key), _within(wanted, key)
        if not names and not inner:
            continue
        values = [record.get(key) for record in records]
        columns = dict.fromkeys(names, _text_column(values)) if names else {}
        if inner:
            columns |= _found([_object(value) for value in values], inner)
        for name, column in columns.items():
            found[name] = pc.coalesce(found[name], column) if name in found else column
    return found


def _named(wanted: _Wanted, key: str) -> list[str]:
    """What a key is wanted as."""
    return [name for rest, name in wanted if rest == normal(key)]


def _within(wanted: _Wanted, key: str) -> _Wanted:
    """What is wanted of the objects that a key leads to."""
    before = f"{normal(key)}."
    return [(rest.removeprefix(before), name) for rest, name in wanted if rest.startswith(before)]


def _text_column(values: Sequence[object]) -> pa.Array:
    try:
        column = pa.array(values, pa.string())
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        column = pa.array(map(_text, values), pa.string())
    return pc.utf8_slice_codeunits(column, 0, MOST_TEXT)


def _text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and abs(value) < 1 << 63:  # bool, too
        return orjson.dumps(value).decode()
    return None


def _object(value: object) -> Record:
    """A value as an object, also where it is the JSON text of one; an empty one where it is neither."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = orjson.loads(value)
        except ValueError:
            return _BLANK
    return value if isinstance(value, dict) else _BLANK


def _whole(source: _Source) -> bytes:
    content = source.stream.read(_MOST_WHOLE_BYTES + 1)
    if len(content) > _MOST_WHOLE_BYTES:
        raise UsageError(f"{source.path}: more than 512 MiB in one piece; write JSON lines, or plain Parquet")
    return content


# --- CSV and Parquet ----------------------------------------------------------------------------------------------


def _read_csv(source: _Source, wanted: _Wanted) -> tuple[Sequence[str], Iterator[_Block]]:
    from pyarrow import csv as arrow

    try:
        header = next(csv.reader([source.stream.readline(MOST_ROW_BYTES).decode("utf-8", "replace")]))
    except csv.Error as error:
        raise UsageError(f"{source.path}: the header can't be read as CSV ({error}); {_EXPECTED}") from error
    numbers = [str(number) for number in range(len(header))]  # names may be there twice

    def invalid(row: InvalidRow) -> str:
        source.unreadable(row.number + 1)  # Arrow does not see the header
        return "skip"

    def blocks() -> Iterator[_Block]:
        kept = [number for number, name in zip(numbers, header, strict=True) if _is_wanted(wanted, name)]
        reader = arrow.open_csv(
            pa.PythonFile(io.BufferedReader(_SoundText(source.stream), _CHUNK_BYTES), "r"),
            arrow.ReadOptions(column_names=numbers, block_size=MOST_ROW_BYTES, use_threads=False),
            arrow.ParseOptions(newlines_in_values=True, invalid_row_handler=invalid),
            arrow.ConvertOptions(
                include_columns=kept,
                column_types=dict.fromkeys(kept, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        before = 2  # the header is line 1
        for batch in reader:
            rows = pa.array(np.arange(before, before + batch.num_rows))
            columns = [(header[int(number)], batch.column(number)) for number in kept]
            yield _Block(_picked(columns, wanted), rows)
            before += batch.num_rows

    return header[:_MOST_NAMES], blocks()


def _read_parquet(source: _Source, wanted: _Wanted) -> tuple[Sequence[str], Iterator[_Block]]:
    from pyarrow import parquet

    packed = not isinstance(source.stream.raw, io.FileIO)
    try:
        file = parquet.ParquetFile(io.BytesIO(_whole(source)) if packed else source.path)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{source.path}: not readable as Parquet ({' '.join(str(error).split())})") from error
    names = _flat(file.schema_arrow.empty_table()).column_names

    def blocks() -> Iterator[_Block]:
        kept = [name for name in names if _is_wanted(wanted, name)]
        before = 1
        for batch in file.iter_batches(_BLOCK_ROWS, columns=kept):
            table = _flat(pa.Table.from_batches([batch]))
            rows = pa.array(np.arange(before, before + batch.num_rows))
            columns = [(name, table.column(name).combine_chunks()) for name in table.column_names]
            yield _Block(_picked(columns, wanted), rows)
            before += batch.num_rows

    return names[:_MOST_NAMES], blocks()


def _flat(table: pa.Table) -> pa.Table:
    """The table with a column for each field of a struct, named by both."""
    while any(pa.types.is_struct(field.type) for field in table.schema):
        table = table.flatten()
    return table


def _is_wanted(wanted: _Wanted, name: str) -> bool:
    return bool(_named(wanted, name) or _within(wanted, name))


def _picked(columns: Iterable[tuple[str, pa.Array]], wanted: _Wanted) -> dict[str, pa.Array]:
    """The wanted columns as text: such that are columns, and such that are in cells with JSON."""
    found: dict[str, pa.Array] = {}
    for key, column in columns:
        text = _as_text(column)
        picked = dict.fromkeys(_named(wanted, key), pc.utf8_slice_codeunits(text, 0, MOST_TEXT))
        if inner := _within(wanted, key):
            picked |= _found([_object(cell) for cell in text.to_pylist()], inner)
        for name, one in picked.items():
            found[name] = pc.coalesce(found[name], one) if name in found else one
    return found


def _as_text(column: pa.Array) -> pa.Array:
    """Any column as text; one of lists or maps is null."""
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        if not pa.types.is_binary(column.type):
            return pa.nulls(len(column), pa.string())
        decoded = (None if one is None else one.decode("utf-8", "replace") for one in column.to_pylist())
        return pa.array(decoded, pa.string())
