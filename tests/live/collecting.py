"""A real ``stallscope collect`` in a process of its own, and what is sent to it."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from stallscope.live.bodies import JSON, PROTOBUF
from stallscope.trace.otlp.files import plain_bytes
from stallscope.trace.otlp.json import JsonDecoder
from stallscope.trace.otlp.protobuf import Damaged, ProtobufDecoder, messages
from stallscope.trace.otlp.spans import Resources

WAIT_S = 60.0
START_NS = 1_790_000_000_000_000_000


@dataclass(frozen=True)
class Running:
    """A collector that is ready."""

    folder: Path
    process: subprocess.Popen[str]
    url: str
    grpc: str
    client: httpx.Client

    def post(self, body: bytes, content_type: str = PROTOBUF, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(self.url, content=body, headers={"Content-Type": content_type, **named})

    def end(self, sign: int) -> str:
        """Ends it by a signal; returns its last line."""
        self.process.send_signal(sign)
        assert self.process.wait(WAIT_S) == 0
        assert self.process.stdout is not None
        return self.process.stdout.read().splitlines()[-1]

    def errors(self) -> str:
        """What an ended process said on stderr."""
        assert self.process.stderr is not None
        return self.process.stderr.read()


@contextmanager
def collecting(folder: Path, *options: str, before: str = "pass") -> Iterator[Running]:
    """A collector that writes into a folder, on free ports; killed at the end if it is still there.

    ``before``: a line of Python for its process to begin with.
    """
    ports = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
    program = f"{before}; from stallscope.cli import main; main()"
    command = [sys.executable, "-c", program, "collect", "-o", str(folder), *ports, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.search(r"(http://\S+/v1/traces), gRPC at (\S+);", ready)
        assert found, (ready, process.communicate())
        with httpx.Client(timeout=WAIT_S) as client:
            yield Running(folder, process, found[1], found[2], client)
    finally:
        process.kill()
        process.wait()


def begun(running: Running, body: bytes) -> socket.socket:
    """A request over HTTP of which all but the last byte was sent."""
    host, _, port = running.url.removeprefix("http://").removesuffix("/v1/traces").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=WAIT_S)
    head = f"POST /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Type: {PROTOBUF}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body[:-1])
    return connection


def request(ids: random.Random, spans: int = 1, padding: int = 0) -> ExportTraceServiceRequest:
    """Spans with ids of their own, each in a trace of its own, and with bytes that don't compress."""
    message = ExportTraceServiceRequest()
    resource = message.resource_spans.add()
    scope = resource.scope_spans.add()
    for number in range(spans):
        span = scope.spans.add(
            trace_id=ids.randbytes(16),
            span_id=ids.randbytes(8),
            name="work",
            start_time_unix_nano=START_NS + number,
            end_time_unix_nano=START_NS + number + 1000,
        )
        if padding:
            value = span.attributes.add(key="padding").value
            value.string_value = ids.randbytes(padding // 2).hex()
    return message


def as_json(message: ExportTraceServiceRequest) -> bytes:
    """The same in OTLP's JSON."""
    spans = [
        {
            "traceId": span.trace_id.hex(),
            "spanId": span.span_id.hex(),
            "name": span.name,
            "startTimeUnixNano": str(span.start_time_unix_nano),
            "endTimeUnixNano": str(span.end_time_unix_nano),
        }
        for span in message.resource_spans[0].scope_spans[0].spans
    ]
    return orjson.dumps({"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {}, "spans": spans}]}]})


def trace_ids(message: ExportTraceServiceRequest) -> list[str]:
    return [span.trace_id.hex() for span in message.resource_spans[0].scope_spans[0].spans]


def stored(folder: Path) -> tuple[Counter[str], list[str]]:
    """How often each trace id stands in a folder, by the decoders of traces, and what was damaged in its files."""
    ids: Counter[str] = Counter()
    damage: list[str] = []
    of_protobuf, of_json = ProtobufDecoder(Resources()), JsonDecoder(Resources())
    for path in segments(folder):
        try:
            for message in messages(plain_bytes(iter([path.read_bytes()]), damage.append)):
                for _, spans, malformed in (of_json if message.startswith(b"{") else of_protobuf).groups(message):
                    assert not malformed
                    ids.update(span.trace_id for span in spans)
        except Damaged as error:
            damage.append(str(error))
    return ids, damage


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("spans-*.binpb"))


def eventually(holds: Callable[[], bool]) -> None:
    """Waits until ``holds`` does."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


__all__ = ["JSON", "PROTOBUF", "Running", "as_json", "collecting", "eventually", "request", "stored", "trace_ids"]
