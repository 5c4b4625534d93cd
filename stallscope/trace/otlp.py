"""OTLP JSON-lines files, plain, gzip or zstd, to span dictionaries: the first stop of the flow.

The format is the OpenTelemetry Collector's file exporter's: one TracesData object a line, times and 64-bit integers
as decimal strings. Only here and in ``decode`` does Python loop over spans.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict

import orjson

from stallscope.errors import UsageError
from stallscope.trace.findings import Findings

SUFFIXES = (".otlp.jsonl", ".otlp.jsonl.gz", ".otlp.jsonl.zst")
CHUNK_BYTES = 1 << 18

Value = int | str | bool | float | list[int] | list[str]
Attributes = dict[str, Value]
Progress = Callable[[int, int], None]  # bytes read so far, bytes there are

# What an untrusted document may raise while it is taken apart as if it were well formed.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


class ArrayValue(TypedDict):
    values: NotRequired[list[AnyValue]]


class AnyValue(TypedDict, total=False):
    """One of these keys; protojson writes 64-bit integers as strings."""

    intValue: str | int
    stringValue: str
    boolValue: bool
    doubleValue: float
    arrayValue: ArrayValue


class KeyValue(TypedDict):
    key: str
    value: AnyValue


class Span(TypedDict):
    """The fields of a span that are read here. Nothing is certain about a foreign one."""

    name: str
    traceId: NotRequired[str]
    startTimeUnixNano: str | int
    endTimeUnixNano: str | int
    attributes: NotRequired[list[KeyValue]]


class _ResourceJson(TypedDict, total=False):
    attributes: list[KeyValue]


class _ScopeSpans(TypedDict, total=False):
    spans: list[Span]


class _ResourceSpans(TypedDict, total=False):
    resource: _ResourceJson
    scopeSpans: list[_ScopeSpans]


class _TracesData(TypedDict):
    resourceSpans: list[_ResourceSpans]


@dataclass(eq=False, slots=True)
class Resource:
    """The process that sent spans; one object for all that have the same attributes."""

    attributes: Attributes


@dataclass(frozen=True, slots=True)
class SpanGroup:
    """Spans of one line that share a resource. ``source`` is the file, ``line`` counts from 1."""

    resource: Resource
    spans: list[Span]
    source: str
    line: int


# --- which files --------------------------------------------------------------------------------------------


def find_files(path: Path) -> list[Path]:
    """The trace files that ``path`` names: itself, or all below a folder, in the order of their names.

    Raises UsageError where there is none.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; give a trace file or a folder of them")
    if not path.is_dir():
        if path.stat().st_size == 0:
            raise UsageError(f"{path}: the file is empty; record again, or wait until the exporter has written")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    if not files:
        raise UsageError(f"{path}: no trace file in this folder; expected names that end in {', '.join(SUFFIXES)}")
    return files


# --- bytes to lines -----------------------------------------------------------------------------------------


class _Decompressor(Protocol):
    """What zlib's and zstandard's decompression objects have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _decompressor(magic: bytes) -> tuple[Callable[[], _Decompressor], type[Exception]] | None:
    """How to undo the compression that the first bytes of a file show, and what that raises; None for plain bytes."""
    if magic.startswith(b"\x1f\x8b"):
        return (lambda: zlib.decompressobj(wbits=31)), zlib.error
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        return (lambda: zstandard.ZstdDecompressor().decompressobj()), zstandard.ZstdError
    return None


def _inflate(
    chunks: Iterable[bytes], start: Callable[[], _Decompressor], error: type[Exception], broken: Callable[[str], None]
) -> Iterator[bytes]:
    """Decompresses one or several members or frames; calls ``broken`` where they end early or are damaged."""
    stream = start()
    for chunk in chunks:
        rest = chunk
        while rest:
            if stream.eof:
                stream = start()
            try:
                plain = stream.decompress(rest)
            except error as reason:
                broken(f"compressed data is damaged ({reason})")
                return
            rest = stream.unused_data if stream.eof else b""
            yield plain
    if not stream.eof:
        broken("compressed data ends early")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line longer than a chunk: joined once, or very long lines would cost squared time
    for chunk in chunks:
        head, newline, tail = chunk.partition(b"\n")
        parts.append(head)
        if not newline:
            continue
        yield b"".join(parts)
        *whole, last = tail.split(b"\n")
        yield from whole
        parts = [last]
    yield b"".join(parts)


# --- lines to spans -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Reader:
    """Reads files one after the other; afterwards knows whether there was OTLP in them at all."""

    findings: Findings
    progress: Progress | None = None
    saw_otlp: bool = False
    _resources: dict[bytes, Resource] = field(default_factory=dict)

    def read(self, files: list[Path]) -> Iterator[SpanGroup]:
        """Yields all spans. Lines that hold none become findings. Raises UsageError where a file can't be opened."""
        total = sum(file.stat().st_size for file in files)
        done = 0
        for file in files:
            yield from self._read_file(file, done, total)
            done += file.stat().st_size

    def _read_file(self, file: Path, done: int, total: int) -> Iterator[SpanGroup]:
        def broken(reason: str) -> None:
            self.findings.add("damaged_file", str(file), "", f"{reason}; what came before is used")

        try:
            with file.open("rb") as stream:
                magic = stream.read(4)
                stream.seek(0)
                chunks = self._chunks(lambda: stream.read(CHUNK_BYTES), done, total)
                compressed = _decompressor(magic)
                plain = chunks if compressed is None else _inflate(chunks, *compressed, broken)
                for number, line in enumerate(_lines(plain), 1):
                    if line.strip():
                        yield from self._read_line(line, str(file), number)
        except OSError as error:
            raise UsageError(f"{file}: cannot be read ({error.strerror}); check the path and its rights") from error

    def _chunks(self, read: Callable[[], bytes], done: int, total: int) -> Iterator[bytes]:
        while chunk := read():
            yield chunk
            done += len(chunk)
            if self.progress is not None:
                self.progress(done, total)

    def _read_line(self, line: bytes, source: str, number: int) -> Iterator[SpanGroup]:
        try:
            data: _TracesData = orjson.loads(line)
            for resource_spans in data["resourceSpans"]:
                resource = self._resource(resource_spans.get("resource", {}))
                for scope_spans in resource_spans.get("scopeSpans", []):
                    spans = scope_spans.get("spans", [])
                    if not isinstance(spans, list):
                        raise TypeError("spans must be a list")
                    self.saw_otlp = True
                    yield SpanGroup(resource, spans, source, number)
        except MALFORMED:
            self.findings.add(
                "unreadable_line", source, f":{number}", "a line is no OTLP JSON (truncated or damaged) and is left out"
            )

    def _resource(self, resource: _ResourceJson) -> Resource:
        raw = resource.get("attributes", [])
        key = orjson.dumps(raw)
        known = self._resources.get(key)
        if known is None:
            known = self._resources[key] = Resource(read_attributes(raw)[0])
        return known


def read_attributes(raw: list[KeyValue]) -> tuple[Attributes, int]:
    """Attributes by name, and how many were left out since their value is nothing OTLP allows."""
    try:
        return {  # integers, nine values of ten, without a call
            item["key"]: int(value["intValue"]) if "intValue" in (value := item["value"]) else _plain(value)
            for item in raw
        }, 0
    except MALFORMED:
        return _read_soundly(raw)


def _read_soundly(raw: list[KeyValue]) -> tuple[Attributes, int]:
    attributes: Attributes = {}
    bad = 0
    if not isinstance(raw, list):
        return attributes, 1
    for item in raw:
        try:
            attributes[item["key"]] = _plain(item["value"])
        except MALFORMED:
            bad += 1
    return attributes, bad


def _plain(value: AnyValue) -> Value:
    if "intValue" in value:
        return int(value["intValue"])
    if "arrayValue" in value:
        values = value["arrayValue"].get("values", [])
        if values and "stringValue" in values[0]:
            return [item["stringValue"] for item in values]
        return [int(item["intValue"]) for item in values]
    if "stringValue" in value:
        return value["stringValue"]
    if "boolValue" in value:
        return value["boolValue"]
    return value["doubleValue"]
