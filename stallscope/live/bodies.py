"""A request's body to a batch: decompressed within bounds, parsed, its spans counted, its unsound ones left out.

Bodies are kept as they came: an ExportTraceServiceRequest is a TracesData in protobuf and in JSON alike.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import zstandard
from google.protobuf.message import DecodeError
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from stallscope.live.refusals import TooLarge, Wrong

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

PROTOBUF, JSON = "application/x-protobuf", "application/json"
ENCODINGS = ("gzip", "deflate", "zlib", "zstd")  # OTLP asks for the first; OpenTelemetry's exporters know the others

_NO_TRACE, _NO_SPAN = bytes(16), bytes(8)
_TRACE_ID_BYTES, _SPAN_ID_BYTES = len(_NO_TRACE), len(_NO_SPAN)
_ZLIB_BITS = {"gzip": 31, "deflate": 15, "zlib": 15}
_PIECE_BYTES = 1 << 10  # of which zlib makes at most a MB, and after which many small members cost no squared time
_UNSOUND = "spans without a sound trace id, span id, name or times were left out"


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
        whole = _unzstd(body, most) if encoding == "zstd" else _inflate(body, _ZLIB_BITS[encoding], most)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise Wrong(f"the body is no {encoding}: {error}") from None
    if len(whole) > most:
        raise TooLarge(f"the body is larger than {most:,} bytes once decompressed; send smaller batches")
    return whole


def _inflate(body: bytes, bits: int, most: int) -> bytes:
    """At most a MB more than ``most``. Raises EOFError where it ends early."""
    stream = zlib.decompressobj(bits)
    parts: list[bytes] = []
    size = 0
    for low in range(0, len(body), _PIECE_BYTES):
        rest = body[low : low + _PIECE_BYTES]
        while rest:
            if stream.eof:  # a gzip body may have several members
                stream = zlib.decompressobj(bits)
            parts.append(stream.decompress(rest))
            rest = stream.unused_data
            size += len(parts[-1])
            if size > most:
                return b"".join(parts)
    if not stream.eof:
        raise EOFError("it ends early")
    return b"".join(parts)


def _unzstd(body: bytes, most: int) -> bytes:
    with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(body, read_across_frames=True) as stream:
        return io.BufferedReader(stream).read(most + 1)


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


def _scopes(data: Any) -> Iterator[dict[str, Any]]:
    """Those with spans. Raises AttributeError or TypeError where the document has another shape."""
    for resource in _list(data, "resourceSpans"):
        for scope in _list(resource, "scopeSpans"):
            if _list(scope, "spans"):
                yield scope


def _list(data: Any, key: str) -> list[Any]:
    """A field that is a list, or absent."""
    found = data.get(key) or []
    if not isinstance(found, list):
        raise TypeError(key)
    return found


def _is_sound_json(span: Any) -> bool:
    """Whether the reader of traces takes it (``stallscope.trace.otlp.json``), and it has ids."""
    try:
        trace_id, span_id = bytes.fromhex(span["traceId"]), bytes.fromhex(span["spanId"])
        times = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
        return (
            len(trace_id) == _TRACE_ID_BYTES
            and len(span_id) == _SPAN_ID_BYTES
            and trace_id != _NO_TRACE
            and span_id != _NO_SPAN
            and isinstance(span["name"], str)
            and min(times) >= 0
            and isinstance(span.get("attributes") or [], list)
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return False
