"""OTLP as JSON: TracesData objects, one a line as the OpenTelemetry Collector's file exporter writes them, or one
document; times and 64-bit integers come as decimal strings. Records of other producers (``formats``) come the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NotRequired, TypedDict, cast

import orjson

from stallscope.trace.formats.records import Record
from stallscope.trace.formats.registry import EXPERIMENTAL, format_of
from stallscope.trace.otlp.spans import MALFORMED, Attributes, Resource, Resources, Span, Value

# What a reader must hold at a time, some thirty times over where a line is made of nothing but empty objects. Exporters
# write some thousand spans a line, which are some megabytes.
MOST_LINE_BYTES = 1 << 26
MOST_DOCUMENT_BYTES = 1 << 28
TOO_LONG = b"!"  # stands for a line that is longer, and is no JSON


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


class _SpanJson(TypedDict):
    """The fields of a span that are read here. Nothing is certain about a foreign one."""

    name: str
    traceId: NotRequired[str]
    traceState: NotRequired[str]
    startTimeUnixNano: str | int
    endTimeUnixNano: str | int
    attributes: NotRequired[list[KeyValue]]


class _ResourceJson(TypedDict, total=False):
    attributes: list[KeyValue]


class _ScopeSpans(TypedDict, total=False):
    spans: list[_SpanJson]


class _ResourceSpans(TypedDict, total=False):
    resource: _ResourceJson
    scopeSpans: list[_ScopeSpans]


class _TracesData(TypedDict):
    resourceSpans: list[_ResourceSpans]


# --- bytes to texts -----------------------------------------------------------------------------------------


def texts(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The JSON texts of a file, each with the number of its first line (from 1): its lines, or all of it, where its
    first two lines are not whole texts.

    A line beyond ``MOST_LINE_BYTES`` becomes ``TOO_LONG``.
    """
    lines = ((number, line) for number, line in enumerate(_lines(chunks), 1) if line.strip())
    first = list(_take(lines, 2))
    if not any(_is_whole(line) for _, line in first):
        document = b"\n".join(line for _, line in _until_too_long(chain(first, lines)))
        if _is_whole(document):
            yield 1, document
        else:
            yield from ((number, line) for number, line in enumerate(document.split(b"\n"), 1) if line.strip())
        return
    yield from first
    yield from lines


def _take(lines: Iterator[tuple[int, bytes]], count: int) -> Iterator[tuple[int, bytes]]:
    for _ in range(count):
        if (line := next(lines, None)) is not None:
            yield line


def _is_whole(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except ValueError:
        return False
    return True


def _until_too_long(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    size = 0
    for number, line in lines:
        size += len(line) + 1
        if size > MOST_DOCUMENT_BYTES:
            return
        yield number, line


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line longer than a chunk: joined once, or very long lines would cost squared time
    size = 0
    for chunk in chunks:
        head, newline, tail = chunk.partition(b"\n")
        size += len(head)
        if size <= MOST_LINE_BYTES:
            parts.append(head)
        else:
            parts = [TOO_LONG]
        if not newline:
            continue
        yield b"".join(parts)
        *whole, last = tail.split(b"\n")
        yield from whole
        parts, size = [last], len(last)
    yield b"".join(parts)


# --- texts to spans -----------------------------------------------------------------------------------------


class JsonDecoder:
    """Takes texts apart."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self.remarks: Counter[tuple[str, str, str]] = Counter()  # kind, producer and text of what is to be known

    def groups(self, text: bytes) -> Iterator[tuple[Resource, list[Span], int]]:
        """Resource, its spans, and how many more are malformed. Raises one of ``MALFORMED`` where it is no OTLP, nor
        anything else that is known."""
        data: _TracesData = orjson.loads(text)
        if "resourceSpans" not in data:
            yield from self._foreign(data)
            return
        for resource_spans in data["resourceSpans"]:
            resource = self._resource(resource_spans.get("resource", {}))
            for scope_spans in resource_spans.get("scopeSpans", []):
                raw = scope_spans.get("spans", [])
                if not isinstance(raw, list):
                    raise TypeError("spans must be a list")
                spans = [span for one in raw if (span := _span(one)) is not None]
                yield resource, spans, len(raw) - len(spans)

    def _foreign(self, data: object) -> Iterator[tuple[Resource, list[Span], int]]:
        """The same of a record of another producer, or a list of such."""
        for record in cast("list[Record]", data if isinstance(data, list) else [data]):
            reader = format_of(record)
            if reader is None:
                raise ValueError("no OTLP, and nothing else that is known")
            kind, remark = EXPERIMENTAL
            self.remarks[kind, reader.PRODUCER, remark] += 1
            try:
                converted = reader.convert(record)
            except MALFORMED:
                yield self._resource({}), [], 1
                continue
            if converted is None:
                continue
            if converted.remark is not None:
                kind, remark = converted.remark
                self.remarks[kind, reader.PRODUCER, remark] += 1
            content = converted.resource
            yield self._resources.get(repr(content).encode(), content.copy), converted.spans, 0

    def _resource(self, resource: _ResourceJson) -> Resource:
        raw = resource.get("attributes", [])
        return self._resources.get(orjson.dumps(raw), lambda: _attributes(raw)[0])


def _span(raw: _SpanJson) -> Span | None:
    try:
        get = raw.get
        trace_id, trace_state = get("traceId", ""), get("traceState", "")
        return Span(
            raw["name"],
            trace_id.lower() if isinstance(trace_id, str) else "",
            trace_state if isinstance(trace_state, str) else "",
            int(raw["startTimeUnixNano"]),
            int(raw["endTimeUnixNano"]),
            *_attributes(raw.get("attributes", [])),
        )
    except MALFORMED:
        return None


def _attributes(raw: list[KeyValue]) -> tuple[Attributes, int]:
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
