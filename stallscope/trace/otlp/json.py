"""OTLP as JSON: TracesData objects, one a line as the OpenTelemetry Collector's file exporter writes them, or one
document; times and 64-bit integers come as decimal strings. Records of other producers (``formats``) come the same way.

What is read has declared types, so that msgspec makes no dictionary of what nobody looks at, and no string of a number:
a whole line takes two thirds of the time of ``orjson.loads``. A line that is not so in every part is read part by part
by the same types, and what does not fit is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, cast

import msgspec
import orjson

from stallscope.trace.formats.records import Record
from stallscope.trace.formats.registry import EXPERIMENTAL, format_of
from stallscope.trace.otlp.spans import MALFORMED, Attributes, Resource, Resources, Span, Value

# What a reader must hold at a time, some thirty times over where a line is made of nothing but empty objects. Exporters
# write some thousand spans a line, which are some megabytes.
MOST_LINE_BYTES = 1 << 26
MOST_DOCUMENT_BYTES = 1 << 28
TOO_LONG = b"!"  # stands for a line that is longer, and is no JSON

# What msgspec raises where a text is not of the declared types, or nested without end.
_OTHERWISE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


class _Item(msgspec.Struct, gc=False):
    """A value within an array: one of these."""

    intValue: int | None = None  # noqa: N815  (the names of protojson)
    stringValue: str | None = None  # noqa: N815


class _Array(msgspec.Struct, gc=False):
    values: list[_Item] = []


class _AnyValue(msgspec.Struct, gc=False):
    """One of these."""

    intValue: int | None = None  # noqa: N815
    stringValue: str | None = None  # noqa: N815
    boolValue: bool | None = None  # noqa: N815
    doubleValue: float | None = None  # noqa: N815
    arrayValue: _Array | None = None  # noqa: N815


class _KeyValue(msgspec.Struct, gc=False):
    key: str
    value: _AnyValue


class _Span(msgspec.Struct, gc=False):
    """The fields of a span that are read here."""

    name: str
    startTimeUnixNano: int  # noqa: N815
    endTimeUnixNano: int  # noqa: N815
    traceId: str = ""  # noqa: N815
    traceState: str = ""  # noqa: N815
    attributes: list[_KeyValue] = []


class _ScopeSpans(msgspec.Struct, gc=False):
    spans: list[_Span] = []


class _ResourceSpans(msgspec.Struct, gc=False):
    resource: msgspec.Raw = msgspec.Raw(b"{}")
    scopeSpans: list[_ScopeSpans] = []  # noqa: N815


class _TracesData(msgspec.Struct, gc=False):
    resourceSpans: list[_ResourceSpans]  # noqa: N815


# Not strict: protojson writes 64-bit integers as strings, and others write them as numbers.
_decode = msgspec.json.Decoder(_TracesData, strict=False).decode
_is_json = msgspec.json.Decoder(msgspec.Raw).decode
_as_span = partial(msgspec.convert, type=_Span, strict=False)
_as_key_value = partial(msgspec.convert, type=_KeyValue, strict=False)


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
        _is_json(text)
    except _OTHERWISE:
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
        if not text.isascii():
            text.decode()  # raises where it is no UTF-8, which msgspec does not look at in what it skips
        try:
            data = _decode(text)
        except _OTHERWISE:
            yield from self._by_parts(orjson.loads(text))
            return
        for resource_spans in data.resourceSpans:
            resource = self._resource(bytes(resource_spans.resource))
            for scope_spans in resource_spans.scopeSpans:
                yield resource, [_span(one) for one in scope_spans.spans], 0

    def _by_parts(self, data: Mapping[str, Any]) -> Iterator[tuple[Resource, list[Span], int]]:
        """The same of a text some part of which is not as it should be."""
        if "resourceSpans" not in data:
            yield from self._foreign(data)
            return
        for resource_spans in data["resourceSpans"]:
            resource = self._resource(orjson.dumps(resource_spans.get("resource", {})))
            for scope_spans in resource_spans.get("scopeSpans", []):
                raw = scope_spans.get("spans", [])
                if not isinstance(raw, list):
                    raise TypeError("spans must be a list")
                spans = [span for one in raw if (span := _sound_parts(one)) is not None]
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
                yield self._resource(b"{}"), [], 1
                continue
            for one in converted:
                if one.remark is not None:
                    kind, remark = one.remark
                    self.remarks[kind, reader.PRODUCER, remark] += 1
                yield self._resources.get(repr(one.resource).encode(), one.resource.copy), one.spans, one.malformed

    def _resource(self, raw: bytes) -> Resource:
        return self._resources.get(raw, lambda: _sound_attributes(orjson.loads(raw).get("attributes", []))[0])


def _span(raw: _Span) -> Span:
    attributes = _attributes(raw.attributes)
    start, end = raw.startTimeUnixNano, raw.endTimeUnixNano
    if None not in attributes.values():
        return Span(raw.name, raw.traceId.lower(), raw.traceState, start, end, cast(Attributes, attributes))
    return Span(raw.name, raw.traceId.lower(), raw.traceState, start, end, *_sound(attributes))


def _attributes(raw: list[_KeyValue]) -> dict[str, Value | None]:
    """Attributes by name, None where the value is nothing OTLP allows."""
    return {  # integers, nine values of ten, without a call
        item.key: number if (number := item.value.intValue) is not None else _plain(item.value) for item in raw
    }


def _sound(attributes: dict[str, Value | None]) -> tuple[Attributes, int]:
    """Those with a value, and how many have none."""
    sound: Attributes = {key: value for key, value in attributes.items() if value is not None}
    return sound, len(attributes) - len(sound)


def _plain(value: _AnyValue) -> Value | None:
    """None where it is nothing that is allowed here."""
    array = value.arrayValue
    if array is not None:
        items = array.values
        numbers = [item.intValue for item in items]
        if None not in numbers:
            return cast("list[int]", numbers)
        words = [item.stringValue for item in items]
        return None if None in words else cast("list[str]", words)
    if value.stringValue is not None:
        return value.stringValue
    return value.boolValue if value.boolValue is not None else value.doubleValue


# --- what is not all sound ----------------------------------------------------------------------------------


def is_sound(raw: Mapping[str, object]) -> bool:
    """Whether a span's name and times are such that it is read; of the rest it costs itself what is unsound."""
    try:
        _span(_as_span({name: raw[name] for name in ("name", "startTimeUnixNano", "endTimeUnixNano")}))
    except (*MALFORMED, *_OTHERWISE):
        return False
    return True


def _sound_parts(raw: dict[str, object]) -> Span | None:
    """The span without what is unsound in it; None where that is its name or a time."""
    try:
        attributes, bad = _sound_attributes(raw.get("attributes", []))
        texts = {name: text for name in ("traceId", "traceState") if isinstance(text := raw.get(name), str)}
        span = _span(_as_span({**raw, "traceId": "", "traceState": "", **texts, "attributes": []}))
    except (*MALFORMED, *_OTHERWISE):
        return None
    span.attributes, span.bad = attributes, bad
    return span


def _sound_attributes(raw: object) -> tuple[Attributes, int]:
    if not isinstance(raw, list):
        return {}, 1
    sound, bad = [], 0
    for item in raw:
        try:
            sound.append(_as_key_value(item))
        except _OTHERWISE:
            bad += 1
    attributes, more = _sound(_attributes(sound))
    return attributes, bad + more
