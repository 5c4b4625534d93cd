"""A request's body to a batch: decompressed within bounds, parsed, its spans counted, its unsound ones left out.

Bodies are kept as they came: an ExportTraceServiceRequest is a TracesData in protobuf and in JSON alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson
import zstandard
from google.protobuf.message import DecodeError
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from stallscope.live.refusals import TooLarge, Wrong
from stallscope.trace.otlp.json import is_sound

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

PROTOBUF, JSON = "application/x-protobuf", "application/json"
ENCODINGS = ("gzip", "deflate", "zlib", "zstd")  # OTLP asks for the first; OpenTelemetry's exporters know the others

_NO_TRACE, _NO_SPAN = bytes(16), bytes(8)
_TRACE_ID_BYTES, _SPAN_ID_BYTES = len(_NO_TRACE), len(_NO_SPAN)
_START: dict[str, Callable[[], _Stream]] = {
    "gzip": lambda: zlib.decompressobj(31),
    "deflate": lambda: zlib.decompressobj(15),
    "zlib": lambda: zlib.decompressobj(15),
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj(),
}
# Of so many bytes zlib makes at most 1 MB and zstd 32, and many small members in a row cost no squared time.
_PIECE_BYTES = 1 << 10
_ZSTD_WINDOW = 1 << 27
_UNSOUND = "spans without a sound trace id, span id, name or times were left out"


class _Stream(Protocol):
    """What zlib's and zstandard's decompression objects have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """What of one request is kept.

    ``message``: TracesData, as protobuf or, where it begins with a brace, as JSON. ``spans`` are in it, ``refused``
    more were not sound.
    """

    message: bytes
    spans: int
    refused: int = 0

    @property
    def remark(self) -> str:
        """Why some spans were refused; empty where none was."""
        return f"{self.refused:,} {_UNSOUND}" if self.refused else ""


def plain(body: bytes, encoding: str, most: int) -> bytes:
    """The body without the compression that its Content-Encoding names (one of ``ENCODINGS``, or "identity").

    Never makes much more than ``most`` bytes. Raises TooLarge where there are more, Wrong where they are damaged.
    """
    if encoding == "identity":
        return body
    try:
        whole = _inflate(body, _START[encoding], most)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise Wrong(f"the body is no {encoding}: {error}") from None
    if len(whole) > most:
        raise TooLarge(f"the body is larger than {most:,} bytes once decompressed; send smaller batches")
    return whole


def _inflate(body: bytes, start: Callable[[], _Stream], most: int) -> bytes:
    """Little more than ``most`` bytes. Raises EOFError where it ends early."""
    stream = start()
    parts: list[bytes] = []
    size = 0
    for low in range(0, len(body), _PIECE_BYTES):
        rest = body[low : low + _PIECE_BYTES]
        while rest:
            if stream.eof:  # there may be several members or frames
                stream = start()
            parts.append(stream.decompress(rest))
            rest = stream.unused_data if stream.eof else b""
            size += len(parts[-1])
            if size > most:
                return b"".join(parts)
    if not stream.eof:
        raise EOFError("it ends early")
    return b"".join(parts)


def batch_of(body: bytes, content_type: str) -> Batch:
    """What is kept of a body of this type, ``PROTOBUF`` or ``JSON``. Raises Wrong where it is no OTLP."""
    return _of_json(body) if content_type == JSON else of_protobuf(body)


# --- protobuf -----------------------------------------------------------------------------------------------------


def of_protobuf(body: bytes) -> Batch:
    """What is kept of a body that is to be protobuf. Raises Wrong where it is none of OTLP's."""
    try:
        data = TracesData.FromString(body)
    except DecodeError as error:
        raise Wrong(f"the body is no ExportTraceServiceRequest in protobuf: {error}") from None
    scopes = [scope for resource in data.resource_spans for scope in resource.scope_spans]
    spans = sum(len(scope.spans) for scope in scopes)
    unsound = sum(not _is_sound(span) for scope in scopes for span in scope.spans)
    if not unsound:
        return Batch(body, spans)
    if unsound == spans:
        raise Wrong(f"none of the {spans:,} spans has a sound trace id and span id")
    for scope in scopes:
        sound = [span for span in scope.spans if _is_sound(span)]
        del scope.spans[:]
        scope.spans.extend(sound)
    return Batch(data.SerializeToString(), spans - unsound, unsound)


def _is_sound(span: Span) -> bool:
    trace_id, span_id = span.trace_id, span.span_id
    return (
        len(trace_id) == _TRACE_ID_BYTES
        and len(span_id) == _SPAN_ID_BYTES
        and trace_id != _NO_TRACE
        and span_id != _NO_SPAN
    )


# --- JSON -----------------------------------------------------------------------------------------------------------


def _of_json(body: bytes) -> Batch:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Wrong(f"the body is no JSON: {error}") from None
    try:
        if b"null" in body and (without := _without_nulls(data)) != data:
            return _of_json(orjson.dumps(without))
        return _sound_json(data, body)
    except (RecursionError, orjson.JSONEncodeError):
        raise Wrong("the body is nested too deeply") from None


def _sound_json(data: Any, body: bytes) -> Batch:
    try:
        scopes = list(_scopes(data))
        spans = sum(len(scope["spans"]) for scope in scopes)
        sound = [[span for span in scope["spans"] if _is_sound_json(span)] for scope in scopes]
    except (AttributeError, KeyError, TypeError):
        raise Wrong('the body is no ExportTraceServiceRequest in JSON: expected {"resourceSpans": [...]}') from None
    unsound = spans - sum(map(len, sound))
    if not unsound:
        return Batch(body.strip(), spans)
    if unsound == spans:
        raise Wrong(f"none of the {spans:,} spans has a sound trace id, span id, name and times")
    for scope, kept in zip(scopes, sound, strict=True):
        scope["spans"] = kept
    return Batch(orjson.dumps(data), spans - unsound, unsound)


def _without_nulls(data: Any) -> Any:
    """The same in JSON of protobuf, where a field that is null is one that is absent."""
    if isinstance(data, dict):
        return {key: _without_nulls(value) for key, value in data.items() if value is not None}
    if isinstance(data, list):
        return [_without_nulls(value) for value in data]
    return data


def _scopes(data: Any) -> Iterator[dict[str, Any]]:
    """Those with spans. Raises AttributeError or TypeError where the document has another shape."""
    for resource in _list(data, "resourceSpans"):
        _list(resource.get("resource", {}), "attributes")
        for scope in _list(resource, "scopeSpans"):
            if _list(scope, "spans"):
                yield scope


def _list(data: Any, key: str) -> list[Any]:
    """A field that is a list, or absent."""
    found = data.get(key, [])
    if not isinstance(found, list):
        raise TypeError(key)
    return found


def _is_sound_json(span: Any) -> bool:
    """Whether the reader of traces takes it, and it has ids."""
    try:
        trace_id, span_id = bytes.fromhex(span["traceId"]), bytes.fromhex(span["spanId"])
        return (
            len(trace_id) == _TRACE_ID_BYTES
            and len(span_id) == _SPAN_ID_BYTES
            and trace_id != _NO_TRACE
            and span_id != _NO_SPAN
            and isinstance(span.get("attributes", []), list)
            and is_sound(span)
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
