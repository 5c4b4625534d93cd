"""Tables that others wrote (CSV, JSON lines, Parquet; plain, gzip, zstd) to columns of text, only those asked for.

With this ``tenants`` reads gateway logs, and ``mapping`` tables of requests. What a file is, its first bytes say, not
its name. Columns are found by name, in any case, with ``-`` as ``_``, with or without a colon before it; a dot leads
into an object, a Parquet struct, or a cell that holds JSON.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    from _typeshed import WriteableBuffer
    from pyarrow.csv import InvalidRow

MOST_ROW_BYTES = 1 << 24  # a log may hold the bodies of requests; a longer row is damage
MOST_TEXT = 1024  # characters kept of a value: ids, names, times and numbers have fewer
_MOST_WHOLE_BYTES = 1 << 31  # of what can only be read as a whole
_MOST_SHAPES = 4096  # kept at a time, of objects with other keys
_MOST_NAMES = 20
_BLOCK_ROWS = 1 << 16
_START_BYTES = 4096
_CHUNK_BYTES = 1 << 18
_EXPECTED = "expected CSV with a header, JSON lines or Parquet, plain, gzip or zstd"
_UNREADABLE = "rows that are no JSON object, or not as long as the CSV's header, are left out"
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


def read_foreign(path: Path, wanted: Iterable[str], findings: Findings) -> ForeignTable:
    """The wanted columns of a file. What can't be read of it is a finding.

    Raises UsageError where there is no file, no row in it, or what is no table.
    """
    finder = _Finder([(normal(name), name) for name in wanted])
    try:
        with _opened(path, findings) as stream:
            names, blocks = _reader(path, _start(path, stream))(_Source(path, stream, findings), finder)
            kept = list(_until_damaged(blocks, path, findings))
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"{path}: cannot be read ({reason}); check the path, its rights and the file") from error
    rows = pa.chunked_array([block.rows for block in kept], pa.int64())
    if not len(rows):
        raise UsageError(f"{path}: no row in it that can be read; {_EXPECTED}")
    found = dict.fromkeys(name for block in kept for name in block.columns)
    columns = {
        name: pa.chunked_array(
            [block.columns.get(name, pa.nulls(len(block.rows), pa.string())) for block in kept], pa.string()
        )
        for name in found
    }
    return ForeignTable(columns, rows, tuple(names))


def normal(name: str) -> str:
    """A column's name in the form in which names are compared."""
    return name.strip().lower().replace("-", "_").removeprefix(":")


def said(column: pa.ChunkedArray) -> pa.ChunkedArray:
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


_Reader = Callable[["_Source", "_Finder"], tuple[Sequence[str], Iterator[_Block]]]


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
    def read(self, size: int, /) -> bytes: ...


class _Unpacked(io.RawIOBase):
    """The content of a packed file up to where it is damaged; raises what is wrong only where that is at once."""

    def __init__(self, packed: _Packed, damaged: Callable[[Exception], None]) -> None:
        self._packed = packed
        self._damaged = damaged
        self._began = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        room = memoryview(buffer).cast("B")
        try:
            content = self._packed.read(len(room))
        except _DAMAGED as error:
            if not self._began:
                raise
            self._damaged(error)
            return 0
        self._began = True
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

_Cells = dict[str, tuple[list[int], list[str]]]  # of each name: positions, and their values


class _Finder:
    """Looks for names in objects; where the values are is worked out once for all objects of the same keys."""

    def __init__(self, wanted: Sequence[tuple[str, str]]) -> None:
        """``wanted``: of each name what is still to be found, in the ``normal`` form, and the name."""
        self._wanted = wanted
        self._shapes: dict[tuple[str, ...], tuple[list[tuple[str, str]], list[tuple[str, _Finder]]]] = {}

    def fill(self, record: Mapping[str, object], position: int, cells: _Cells) -> None:
        """Adds what is found to the cells of a row."""
        shape = tuple(record)
        places = self._shapes.get(shape)
        if places is None:
            if len(self._shapes) == _MOST_SHAPES:
                self._shapes.clear()
            places = self._shapes[shape] = ([*self.here(shape)], [*self.within(shape)])
        for key, name in places[0]:
            text = _text(record[key])
            if text is not None:
                positions, values = cells.setdefault(name, ([], []))
                positions.append(position)
                values.append(text)
        for key, finder in places[1]:
            inner = _object(record[key])
            if inner is not None:
                finder.fill(inner, position, cells)

    def here(self, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Keys whose values are wanted, with the names they are wanted by."""
        for key in keys:
            yield from ((key, name) for rest, name in self._wanted if rest == normal(key))

    def within(self, keys: Iterable[str]) -> Iterator[tuple[str, _Finder]]:
        """Keys in whose values there may be something that is wanted, and what finds it there."""
        for key in keys:
            before = f"{normal(key)}."
            rests = [(rest.removeprefix(before), name) for rest, name in self._wanted if rest.startswith(before)]
            if rests:
                yield key, _Finder(rests)


def _text(value: object) -> str | None:
    if isinstance(value, str):
        return value[:MOST_TEXT]
    if isinstance(value, int | float):  # bool, too
        return orjson.dumps(value).decode() if abs(value) < 1 << 63 else None
    return None


def _object(value: object) -> Mapping[str, object] | None:
    """A value as an object, also where it is the JSON text of one."""
    if isinstance(value, str | bytes) and value[:1] in ("{", b"{"):
        try:
            value = orjson.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def _read_json_lines(source: _Source, finder: _Finder) -> tuple[Sequence[str], Iterator[_Block]]:
    names: list[str] = []
    return names, _blocks(_objects(source, names), finder)


def _read_json_list(source: _Source, finder: _Finder) -> tuple[Sequence[str], Iterator[_Block]]:
    values = orjson.loads(_whole(source))
    names: list[str] = []

    def objects() -> Iterator[tuple[int, Mapping[str, object]]]:
        for number, value in enumerate(values, 1):
            if isinstance(value, dict):
                _note_names(names, value)
                yield number, value
            else:
                source.unreadable(number)

    return names, _blocks(objects(), finder)


def _objects(source: _Source, names: list[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The objects of all lines with their numbers; ``names`` are noted from the first."""
    for number, line in enumerate(_lines(source.stream), 1):
        try:
            value = orjson.loads(line)
        except ValueError:
            if line.strip():
                source.unreadable(number)
            continue
        if isinstance(value, dict):
            _note_names(names, value)
            yield number, value
        else:
            source.unreadable(number)


def _lines(stream: io.BufferedReader) -> Iterator[bytes]:
    """Lines; of one that is too long only the beginning, which can't be read."""
    while line := stream.readline(MOST_ROW_BYTES):
        yield line
        while len(line) == MOST_ROW_BYTES and not line.endswith(b"\n"):
            line = stream.readline(MOST_ROW_BYTES)


def _note_names(names: list[str], record: Mapping[str, object]) -> None:
    if names:
        return
    for key, value in record.items():
        names += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
    del names[_MOST_NAMES:]


def _blocks(objects: Iterable[tuple[int, Mapping[str, object]]], finder: _Finder) -> Iterator[_Block]:
    cells: _Cells = {}
    rows: list[int] = []
    for row, record in objects:
        finder.fill(record, len(rows), cells)
        rows.append(row)
        if len(rows) == _BLOCK_ROWS:
            yield _Block(_columns(cells, len(rows)), pa.array(rows, pa.int64()))
            cells, rows = {}, []
    yield _Block(_columns(cells, len(rows)), pa.array(rows, pa.int64()))


def _columns(cells: _Cells, length: int) -> dict[str, pa.Array]:
    columns = {}
    for name, (positions, values) in cells.items():
        value_of = np.full(length, -1)
        value_of[positions] = np.arange(len(values))
        columns[name] = pa.array(values, pa.string()).take(pa.array(value_of, mask=value_of < 0))
    return columns


def _whole(source: _Source) -> bytes:
    content = source.stream.read(_MOST_WHOLE_BYTES + 1)
    if len(content) > _MOST_WHOLE_BYTES:
        raise UsageError(f"{source.path}: more than 2 GiB in one piece; write JSON lines, or plain Parquet")
    return content


# --- CSV and Parquet ----------------------------------------------------------------------------------------------


def _read_csv(source: _Source, finder: _Finder) -> tuple[Sequence[str], Iterator[_Block]]:
    from pyarrow import csv as arrow

    header = next(csv.reader([source.stream.readline(MOST_ROW_BYTES).decode("utf-8", "replace")]), [])
    numbers = [str(number) for number in range(len(header))]  # names may be there twice

    def invalid(row: InvalidRow) -> str:
        source.unreadable(row.number + 1)  # Arrow does not see the header
        return "skip"

    def blocks() -> Iterator[_Block]:
        kept = [number for number, name in zip(numbers, header, strict=True) if _is_wanted(finder, name)]
        reader = arrow.open_csv(
            pa.PythonFile(source.stream, "r"),
            arrow.ReadOptions(column_names=numbers, block_size=MOST_ROW_BYTES, use_threads=False),
            arrow.ParseOptions(newlines_in_values=True, invalid_row_handler=invalid),
            arrow.ConvertOptions(
                include_columns=kept,
                column_types=dict.fromkeys(kept, pa.binary()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        before = 2  # the header is line 1
        for batch in reader:
            rows = pa.array(np.arange(before, before + batch.num_rows))
            columns = [(header[int(number)], batch.column(number)) for number in kept]
            yield _Block(_picked(columns, finder, batch.num_rows), rows)
            before += batch.num_rows

    return header[:_MOST_NAMES], blocks()


def _read_parquet(source: _Source, finder: _Finder) -> tuple[Sequence[str], Iterator[_Block]]:
    from pyarrow import parquet

    packed = not isinstance(source.stream.raw, io.FileIO)
    try:
        file = parquet.ParquetFile(io.BytesIO(_whole(source)) if packed else source.path)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{source.path}: not readable as Parquet ({' '.join(str(error).split())})") from error
    names = _flat(file.schema_arrow.empty_table()).column_names

    def blocks() -> Iterator[_Block]:
        kept = [name for name in names if _is_wanted(finder, name)]
        before = 1
        for batch in file.iter_batches(_BLOCK_ROWS, columns=kept):
            table = _flat(pa.Table.from_batches([batch]))
            rows = pa.array(np.arange(before, before + batch.num_rows))
            columns = [(name, table.column(name).combine_chunks()) for name in table.column_names]
            yield _Block(_picked(columns, finder, batch.num_rows), rows)
            before += batch.num_rows

    return names[:_MOST_NAMES], blocks()


def _flat(table: pa.Table) -> pa.Table:
    """The table with a column for each field of a struct, named by both."""
    while any(pa.types.is_struct(field.type) for field in table.schema):
        table = table.flatten()
    return table


def _is_wanted(finder: _Finder, name: str) -> bool:
    return any(True for _ in finder.here([name])) or any(True for _ in finder.within([name]))


def _picked(columns: Iterable[tuple[str, pa.Array]], finder: _Finder, length: int) -> dict[str, pa.Array]:
    """The wanted columns as text: such that are columns, and such that are in cells with JSON."""
    found: dict[str, pa.Array] = {}
    cells: _Cells = {}
    for key, column in columns:
        text = _as_text(column)
        for _, name in finder.here([key]):
            found.setdefault(name, pc.utf8_slice_codeunits(text, 0, MOST_TEXT))
        for _, inner in finder.within([key]):
            for position, cell in enumerate(text.to_pylist()):
                record = _object(cell)
                if record is not None:
                    inner.fill(record, position, cells)
    return _columns(cells, length) | {name: column for name, column in found.items() if column.null_count < length}


def _as_text(column: pa.Array) -> pa.Array:
    """Any column as text; one of lists or maps is null."""
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        if not pa.types.is_binary(column.type):
            return pa.nulls(len(column), pa.string())
        decoded = (None if one is None else one.decode("utf-8", "replace") for one in column.to_pylist())
        return pa.array(decoded, pa.string())
