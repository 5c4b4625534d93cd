"""Spans to files: OpenTelemetry's file format, one TracesData JSON object a line, compressed by suffix.

The last station of a recording (``emitter`` hands over the spans); ``stallscope.trace`` and the Collector's
``otlpjsonfilereceiver`` read it. The format: https://opentelemetry.io/docs/specs/otel/protocol/file-exporter/
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from json.encoder import encode_basestring_ascii as quote
from pathlib import Path
from typing import Protocol

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.util.types import AnyValue

SUFFIXES = (".otlp.jsonl", ".otlp.jsonl.gz", ".otlp.jsonl.zst")
SPANS_PER_LINE = 512  # about 0.5 MB: what a reader must hold at a time, and what a torn line can cost

# Spans repeat what stood further back: a keyframe the last one, a request's token times those of all it ran with. So
# the window counts (8 MiB, some thousand steps) and the level hardly: level 1 takes 4.5 us a step and leaves 147
# bytes, level 6 takes 21 us and leaves 140 (32 running, 0.4 requests a step).
ZSTD_LEVEL = 1
ZSTD_WINDOW_LOG = 23


class OtlpFileExporter(SpanExporter):
    """Writes spans to a new file; the suffix of ``path`` (or of ``named``), one of ``SUFFIXES``, says how it is packed.

    ``force_flush`` makes what was exported so far readable even if the process is killed, at the price of some
    compression; ``shutdown`` ends the file. After an error of the file system it stays closed, so that whatever
    follows a torn line can't be misread. Links and status of spans are not written: the contract has none.

    Raises ValueError for another suffix, or ``.zst`` without zstandard; FileExistsError where there is a file:
    a recording is never written over; OSError where the file can't be made.
    """

    def __init__(self, path: str | Path, named: str = "") -> None:
        self.path = Path(path)
        self._compressor = _compressor(Path(named) if named else self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("xb")
        self._lock = threading.Lock()  # OpenTelemetry lets other threads call force_flush and shutdown

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with self._lock:
            if self._file.closed:
                return SpanExportResult.FAILURE
            for start in range(0, len(spans), SPANS_PER_LINE):
                line = encode_line(spans[start : start + SPANS_PER_LINE])
                self._write(self._compressor.compress(line))
        return SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        with self._lock:
            if not self._file.closed:
                self._write(self._compressor.flush_block(), flush=True)
        return True

    def shutdown(self) -> None:
        with self._lock:
            if not self._file.closed:
                self._write(self._compressor.finish(), flush=True)
                self._file.close()

    def _write(self, data: bytes, *, flush: bool = False) -> None:
        try:
            self._file.write(data)
            if flush:
                self._file.flush()
        except OSError:
            with suppress(OSError):
                self._file.close()
            raise


# --- compression ------------------------------------------------------------------------------------------------


class _Compressor(Protocol):
    """A stream of bytes in, one out. After ``flush_block`` all that went in can be read back."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush_block(self) -> bytes: ...
    def finish(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush_block(self) -> bytes:
        return b""

    def finish(self) -> bytes:
        return b""


class _Gzip:
    def __init__(self) -> None:
        stream = zlib.compressobj(wbits=31)  # a gzip header without name and time: same spans, same bytes
        self._stream = stream
        self.compress = stream.compress

    def flush_block(self) -> bytes:
        return self._stream.flush(zlib.Z_SYNC_FLUSH)

    def finish(self) -> bytes:
        return self._stream.flush()


class _Zstd:
    def __init__(self) -> None:
        import zstandard

        parameters = zstandard.ZstdCompressionParameters.from_level(ZSTD_LEVEL, window_log=ZSTD_WINDOW_LOG)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        self._stream = stream
        self._block = zstandard.COMPRESSOBJ_FLUSH_BLOCK
        self.compress = stream.compress

    def flush_block(self) -> bytes:
        return self._stream.flush(self._block)

    def finish(self) -> bytes:
        return self._stream.flush()


def _compressor(path: Path) -> _Compressor:
    if path.name.endswith(".otlp.jsonl"):
        return _Plain()
    if path.name.endswith(".otlp.jsonl.gz"):
        return _Gzip()
    if path.name.endswith(".otlp.jsonl.zst"):
        try:
            return _Zstd()
        except ImportError:
            raise ValueError(
                f"{path}: .zst needs zstandard; pip install 'stallscope-telemetry[zstd]' or write .otlp.jsonl.gz"
            ) from None
    raise ValueError(f"{path}: name it {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


# --- encoding ---------------------------------------------------------------------------------------------------
# Why not opentelemetry-exporter-otlp-json-file: it builds an object per value and takes 6.6 times as long (0.66b1:
# 66 us a step span, ours 10), all of it with the GIL held, which is what the engine would wait for. The output is the
# same: the tests hold ours against OpenTelemetry's protobuf encoder, value by value.


def encode_line(spans: Sequence[ReadableSpan]) -> bytes:
    """One TracesData JSON object and a newline. Spans of one resource and scope that follow each other share them."""
    resources = []
    for resource, of_resource in groupby(spans, key=lambda span: span.resource):
        scopes = []
        for scope, of_scope in groupby(of_resource, key=lambda span: span.instrumentation_scope):
            encoded = ",".join([_encode_span(span) for span in of_scope])
            scopes.append(f'{{"scope":{_encode_scope(scope)},"spans":[{encoded}]}}')
        resources.append(f'{{"resource":{_encode_resource(resource)},"scopeSpans":[{",".join(scopes)}]}}')
    return f'{{"resourceSpans":[{",".join(resources)}]}}\n'.encode()


def _encode_resource(resource: Resource) -> str:
    return f'{{"attributes":{_encode_attributes(resource.attributes)}}}'


def _encode_scope(scope: InstrumentationScope | None) -> str:
    return f'{{"name":{quote(scope.name)},"version":{quote(scope.version or "")}}}' if scope else "{}"


def _encode_span(span: ReadableSpan) -> str:
    context, parent = span.get_span_context(), span.parent
    if context is None:
        raise ValueError(f"span {span.name} has no context")
    # Flags as in opentelemetry.proto.trace.v1.SpanFlags: 0x100 we know whether the parent is remote, 0x200 it is.
    flags = 0x300 if parent is not None and parent.is_remote else 0x100
    parent_id = f'"parentSpanId":"{parent.span_id:016x}",' if parent is not None else ""
    events = f'"events":[{",".join([_encode_event(event) for event in span.events])}],' if span.events else ""
    state = f'"traceState":{quote(context.trace_state.to_header())},' if context.trace_state else ""
    return (
        f'{{"traceId":"{context.trace_id:032x}","spanId":"{context.span_id:016x}",{state}{parent_id}"flags":{flags},'
        f'"name":{quote(span.name)},"kind":{span.kind.value + 1},'
        f'"startTimeUnixNano":"{span.start_time}","endTimeUnixNano":"{span.end_time}",'
        f'"attributes":{_encode_attributes(span.attributes)},{events}"status":{{}}}}'
    )


def _encode_event(event: Event) -> str:
    attributes = f',"attributes":{_encode_attributes(event.attributes)}' if event.attributes else ""
    return f'{{"timeUnixNano":"{event.timestamp}","name":{quote(event.name)}{attributes}}}'


def _encode_attributes(attributes: Mapping[str, AnyValue] | None) -> str:
    if not attributes:
        return "[]"
    encoded = [f'{{"key":{quote(key)},"value":{_encode_value(value)}}}' for key, value in attributes.items()]
    return f"[{','.join(encoded)}]"


def _encode_value(value: AnyValue) -> str:
    """An AnyValue of the contract's types; 64-bit integers are strings in JSON. Raises TypeError for another type."""
    if isinstance(value, bool):
        return '{"boolValue":true}' if value else '{"boolValue":false}'
    if isinstance(value, int):
        return f'{{"intValue":"{value}"}}'
    if isinstance(value, str):
        return f'{{"stringValue":{quote(value)}}}'
    if isinstance(value, float):
        return f'{{"doubleValue":{value!r}}}'
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return f'{{"arrayValue":{{"values":[{",".join(map(_encode_value, value))}]}}}}'
    raise TypeError(f"{type(value).__name__} is no type of the telemetry contract")
