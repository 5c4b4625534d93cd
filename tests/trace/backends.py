"""A server that answers as Jaeger's and Tempo's query APIs are documented to, on a real port, from a recording."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import orjson
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from stallscope_telemetry import names

Json = dict[str, object]
JAEGER_TYPES = {"intValue": "int64", "stringValue": "string", "boolValue": "bool", "doubleValue": "float64"}


@dataclass
class Backend:
    """What is stored: spans with their resources, by trace; and how it misbehaves.

    ``refuse``: status, type and body of every answer. ``missing``: traces that are found but not there. ``partial``:
    traces that come back in part.
    """

    lines: list[bytes]
    refuse: tuple[int, str, bytes] | None = None
    missing: set[str] = field(default_factory=set)
    partial: set[str] = field(default_factory=set)
    older: bool = False  # a Tempo without /api/v2
    asked: list[str] = field(default_factory=list)
    url: str = ""

    @cached_property
    def traces(self) -> dict[str, list[tuple[Json, Json]]]:
        """Resource and span of each, by trace."""
        found: dict[str, list[tuple[Json, Json]]] = {}
        for line in self.lines:
            for one in orjson.loads(line)["resourceSpans"]:
                for span in (span for scope in one["scopeSpans"] for span in scope["spans"]):
                    found.setdefault(span["traceId"], []).append((one["resource"], span))
        return found

    def within(self, low_ns: int, high_ns: int, limit: int) -> list[str]:
        """Traces with a span that begins then, at most ``limit``."""
        found = [
            trace
            for trace, spans in self.traces.items()
            if any(low_ns <= int(str(span["startTimeUnixNano"])) <= high_ns for _, span in spans)
        ]
        return found[:limit]

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, type and body of an answer."""
        self.asked.append(path)
        if self.refuse is not None:
            return self.refuse
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        match parts.path.split("/")[1:]:
            case ["api", "traces"]:
                return self._jaeger(query)
            case ["api", "search"]:
                return self._search(query)
            case ["api", "v2", "traces", trace] if not self.older:
                return self._tempo(trace, wrapped=True)
            case ["api", "traces", trace]:
                return self._tempo(trace, wrapped=False)
        return 404, "text/plain", b"404 page not found"

    def _jaeger(self, query: dict[str, str]) -> tuple[int, str, bytes]:
        if query.get("service") != "engine":
            return 200, "application/json", b'{"data": [], "total": 0, "limit": 0, "offset": 0, "errors": null}'
        traces = self.traces
        found = self.within(int(query["start"]) * 1000, int(query["end"]) * 1000 + 999, int(query["limit"]))
        data = [jaeger_trace(trace, traces[trace]) for trace in found]
        return 200, "application/json", json.dumps({"data": data, "total": 0, "errors": None}, indent=1).encode()

    def _search(self, query: dict[str, str]) -> tuple[int, str, bytes]:
        found = self.within(int(query["start"]) * 10**9, int(query["end"]) * 10**9, int(query["limit"]))
        traces = [{"traceID": trace.lstrip("0"), "rootTraceName": "x", "durationMs": 1} for trace in found]
        return 200, "application/json", json.dumps({"traces": traces, "metrics": {}}).encode()

    def _tempo(self, trace: str, *, wrapped: bool) -> tuple[int, str, bytes]:
        spans = self.traces.get(trace)
        if spans is None or trace in self.missing:
            return 404, "text/plain", b"trace not found"
        message = tempo_trace(spans)
        if wrapped:
            message = b"\x0a" + varint(len(message)) + message + (b"\x18\x01" if trace in self.partial else b"")
        return 200, "application/protobuf", message


def jaeger_trace(trace: str, spans: list[tuple[Json, Json]]) -> Json:
    """A trace as Jaeger's JSON has it."""
    processes: dict[str, Json] = {}
    written = []
    for resource, span in spans:
        tags = [_tag(one) for one in resource["attributes"]]  # type: ignore[attr-defined]
        process = {"serviceName": "engine", "tags": [one for one in tags if one["key"] != names.SERVICE_NAME]}
        key = next((key for key, one in processes.items() if one == process), f"p{len(processes) + 1}")
        processes[key] = process
        start, end = int(str(span["startTimeUnixNano"])), int(str(span["endTimeUnixNano"]))
        written.append(
            {
                "traceID": trace,
                "spanID": "1",
                "operationName": span["name"],
                "references": [],
                "startTime": start // 1000,
                "duration": (end - start) // 1000,
                "tags": [
                    *(_tag(one) for one in span["attributes"]),  # type: ignore[attr-defined]
                    {"key": "span.kind", "type": "string", "value": "internal"},
                ],
                "logs": [],
                "processID": key,
                "warnings": None,
            }
        )
    return {"traceID": trace, "spans": written, "processes": processes, "warnings": None}


def _tag(attribute: Json) -> Json:
    ((kind, value),) = attribute["value"].items()  # type: ignore[attr-defined]
    if kind == "arrayValue":
        plain = [int(one["intValue"]) if "intValue" in one else one["stringValue"] for one in value["values"]]
        return {"key": attribute["key"], "type": "string", "value": json.dumps(plain, separators=(",", ":"))}
    if kind == "intValue":
        value = int(value) if abs(int(value)) < 1 << 53 else str(value)
    return {"key": attribute["key"], "type": JAEGER_TYPES[kind], "value": value}


def tempo_trace(spans: list[tuple[Json, Json]]) -> bytes:
    """A trace as Tempo's protobuf has it."""
    data = {"resourceSpans": [{"resource": one, "scopeSpans": [{"spans": [_span(span)]}]} for one, span in spans]}
    encoded: bytes = ParseDict(data, TracesData()).SerializeToString()
    return encoded


def _span(span: Json) -> Json:
    return {**span, "traceId": base64.b64encode(bytes.fromhex(str(span["traceId"]))).decode()}


def varint(value: int) -> bytes:
    low = value & 0x7F
    return bytes([low]) if value < 0x80 else bytes([low | 0x80]) + varint(value >> 7)


@contextmanager
def running(backend: Backend) -> Iterator[Backend]:
    """Runs the server meanwhile; its ``url`` is without a scheme."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = backend.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    backend.url = f"127.0.0.1:{server.server_port}"
    try:
        yield backend
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
