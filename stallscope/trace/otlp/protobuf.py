"""OTLP as protobuf: one message, several in a row, or a stream of messages that each come after their length.

A message of traces (TracesData, ExportTraceServiceRequest) is nothing but a list of ResourceSpans, in field 1: it is
taken apart one at a time, so that a file of any size needs no more memory than the largest of them.
https://protobuf.dev/programming-guides/encoding/ has the encoding. The Collector's file exporter writes 4 bytes of
length, big-endian, before each message (its README: "File Format"), which may be compressed by itself; protobuf's own
libraries write it as a varint.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from stallscope.trace.otlp.spans import Attributes, Resource, Resources, Span, Value

if TYPE_CHECKING:
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, TracesData
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage

MOST_MESSAGE_BYTES = 1 << 26  # as of a line of JSON
RESOURCE_SPANS = 0x0A  # field 1, of a length that follows
_LENGTH = struct.Struct(">I")
_VARINT_BYTES = 10
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_FIXED_BYTES = {1: 8, 5: 4}  # wire types of fields with a fixed size


class Damaged(ValueError):
    """Bytes that are no protobuf; the message says why. What came before is sound."""


# --- bytes to messages ----------------------------------------------------------------------------------------


class _Bytes:
    """A stream of bytes that is read by counts."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._buffer = b""
        self._at = 0

    def peek(self, count: int) -> bytes:
        """The next bytes, fewer at the end, which are still there afterwards."""
        left = len(self._buffer) - self._at
        if left < count:
            parts = [self._buffer[self._at :]]
            while left < count and (chunk := next(self._chunks, None)) is not None:
                parts.append(chunk)
                left += len(chunk)
            self._buffer, self._at = b"".join(parts), 0
        return self._buffer[self._at : self._at + count]

    def take(self, count: int) -> bytes:
        """Raises Damaged where there are fewer, or more than a message may have."""
        if count > MOST_MESSAGE_BYTES:
            raise Damaged(f"a message of {count:,} bytes, more than {MOST_MESSAGE_BYTES:,}")
        taken = self.peek(count)
        if len(taken) < count:
            raise Damaged("the last message ends early")
        self._at += count
        return taken

    def varint(self) -> int:
        value = 0
        for position, byte in enumerate(self.peek(_VARINT_BYTES)):
            value |= (byte & 0x7F) << (7 * position)
            if byte < 0x80:
                self._at += position + 1
                return value
        raise Damaged("the last message ends early" if len(self.peek(_VARINT_BYTES)) < _VARINT_BYTES else "no protobuf")


def messages(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The TracesData messages, or JSON texts, of a file of any of these forms. Raises Damaged.

    Those of a file without lengths come with one ResourceSpans each.
    """
    stream = _Bytes(chunks)
    length = _length_before_messages(stream.peek(_VARINT_BYTES))
    if length is None:
        yield from _one_by_one(stream)
        return
    while stream.peek(1):
        message = stream.take(length(stream))
        if not message:
            raise Damaged("a message is empty")  # as zeros read, however many
        yield _decompressed(message) if message.startswith(_ZSTD_MAGIC) else message


def _length_before_messages(head: bytes) -> Callable[[_Bytes], int] | None:
    """How to read the length before each message; None where the first comes without."""
    if head[:1] == bytes([RESOURCE_SPANS]):
        return None
    if head[:1] == b"\0" or head[4:5] in (bytes([RESOURCE_SPANS]), b"{") or head[4:8] == _ZSTD_MAGIC:
        return lambda stream: int(_LENGTH.unpack(stream.take(_LENGTH.size))[0])
    return _Bytes.varint


def _decompressed(message: bytes) -> bytes:
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(message) as reader:
            plain = reader.read(MOST_MESSAGE_BYTES + 1)
    except zstandard.ZstdError as error:
        raise Damaged(f"compressed data is damaged ({error})") from error
    if len(plain) > MOST_MESSAGE_BYTES:
        raise Damaged(f"a message of more than {MOST_MESSAGE_BYTES:,} bytes")
    return plain


def _one_by_one(stream: _Bytes) -> Iterator[bytes]:
    """Each ResourceSpans of a message of any length, as a message of its own."""
    for tag, message in _fields(stream):
        if tag == RESOURCE_SPANS:
            yield bytes([RESOURCE_SPANS]) + _varint(len(message)) + message


def _fields(stream: _Bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each field, in order; of a number its content is what it takes."""
    while stream.peek(1):
        tag = stream.varint()
        kind = tag & 7
        if kind == 0:
            yield tag, _varint(stream.varint())
        elif kind == 2:
            yield tag, stream.take(stream.varint())
        elif kind in _FIXED_BYTES:
            yield tag, stream.take(_FIXED_BYTES[kind])
        else:
            raise Damaged("no protobuf")


def fields(message: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of each field of a message. Raises Damaged."""
    return list(_fields(_Bytes([message])))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


# --- messages to spans ----------------------------------------------------------------------------------------


class ProtobufDecoder:
    """Takes messages apart."""

    def __init__(self, resources: Resources) -> None:
        # Imported by who has protobuf to read: it takes as long as a short command.
        from google.protobuf.message import DecodeError
        from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

        self._parse: Callable[[bytes], TracesData] = TracesData.FromString
        self._error: type[Exception] = DecodeError
        self._resources = resources

    def groups(self, message: bytes) -> Iterator[tuple[Resource, list[Span], int]]:
        """Resource, its spans, and how many more are malformed. Raises Damaged where it is no TracesData."""
        try:
            data = self._parse(message)
        except self._error as error:
            raise Damaged(f"no protobuf of traces ({error})") from error
        for resource_spans in data.resource_spans:
            resource = self._resource(resource_spans)
            for scope_spans in resource_spans.scope_spans:
                yield resource, [_span(one) for one in scope_spans.spans], 0

    def _resource(self, resource_spans: ResourceSpans) -> Resource:
        raw = resource_spans.resource
        return self._resources.get(raw.SerializeToString(deterministic=True), lambda: _attributes(raw.attributes)[0])


def _span(raw: SpanMessage) -> Span:
    return Span(
        raw.name,
        raw.trace_id.hex(),
        raw.trace_state,
        raw.start_time_unix_nano,
        raw.end_time_unix_nano,
        *_attributes(raw.attributes),
    )


def _attributes(raw: Iterable[KeyValue]) -> tuple[Attributes, int]:
    attributes: Attributes = {}
    bad = 0
    for item in raw:
        value = item.value
        kind = value.WhichOneof("value")
        if kind == "int_value":
            attributes[item.key] = value.int_value
        elif kind == "array_value":
            array = _array(value)
            if array is None:
                bad += 1
            else:
                attributes[item.key] = array
        elif kind in ("string_value", "bool_value", "double_value"):
            attributes[item.key] = getattr(value, kind)
        else:
            bad += 1
    return attributes, bad


def _array(value: AnyValue) -> Value | None:
    """Integers or strings, as the first one is; None where they are mixed, or anything else."""
    values = value.array_value.values
    if not values:
        return []
    kind = values[0].WhichOneof("value")
    if kind == "int_value":
        numbers = [one.int_value for one in values]
        # An absent value reads as 0: only zeros need a second look.
        return numbers if all(numbers) or all(one.HasField("int_value") for one in values) else None
    if kind == "string_value":
        words = [one.string_value for one in values]
        return words if all(words) or all(one.HasField("string_value") for one in values) else None
    return None
