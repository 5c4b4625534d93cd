"""What is no OTLP is refused with the code that OTLP has for it, costs no memory, and harms nobody else."""

from __future__ import annotations

import contextlib
import gzip
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import orjson
import pytest
import zstandard
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status

from tests.live.collecting import JSON, PROTOBUF, Running, as_json, collecting, request, stored, trace_ids

SOUND = request(random.Random(1), 4)
HALF = SOUND.SerializeToString()[:-7]
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
MEMORY_MB = 400  # of the process: what it has without any request is a seventh of it
BOMBS: dict[str, Callable[[], bytes]] = {  # of 500 MB each; several members and frames are made sooner than one
    "gzip": lambda: gzip.compress(bytes(10_000_000)) * 50,
    "deflate": lambda: zlib.compress(bytes(500_000_000), 1),
    "zstd": lambda: zstandard.compress(bytes(500_000_000)),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with collecting(tmp_path_factory.mktemp("spans"), "--max-body", "4MB") as running:
        yield running
        # After all of that: sound spans are taken, and nothing else was.
        assert running.post(SOUND.SerializeToString()).status_code == 200
        folder = running.folder
        assert set(stored(folder)[0]) == set(trace_ids(SOUND))
        peak = next(
            line for line in Path(f"/proc/{running.process.pid}/status").read_text().splitlines() if "VmHWM" in line
        )
        assert int(peak.split()[1]) / 1000 < MEMORY_MB


def spans_that_are(span: object) -> bytes:
    return orjson.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]})


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (HALF, {"content-type": PROTOBUF}, 400),
        (b"hello", {"content-type": PROTOBUF}, 400),
        (as_json(SOUND)[:-9], {"content-type": JSON}, 400),
        (as_json(SOUND), {"content-type": PROTOBUF}, 400),
        (b"[1]", {"content-type": JSON}, 400),
        (b'{"resourceSpans": 1}', {"content-type": JSON}, 400),
        (b'{"resourceSpans": [[]]}', {"content-type": JSON}, 400),
        (b"[" * 100_000, {"content-type": JSON}, 400),
        (b"\xff\xfe{}", {"content-type": JSON}, 400),
        (spans_that_are(7), {"content-type": JSON}, 400),
        (spans_that_are({"traceId": "xyz", "spanId": "", "name": "a"}), {"content-type": JSON}, 400),
        (as_json(SOUND), {"content-type": "text/plain"}, 415),
        (as_json(SOUND), {}, 415),
        (bytes(10_000_000), {"content-type": "text/plain"}, 415),
        (SOUND.SerializeToString(), {"content-type": PROTOBUF, "content-encoding": "br"}, 415),
        (b"no gzip", {"content-type": PROTOBUF, "content-encoding": "gzip"}, 400),
        (gzip.compress(HALF)[:-9], {"content-type": PROTOBUF, "content-encoding": "gzip"}, 400),
        (b"no deflate", {"content-type": PROTOBUF, "content-encoding": "deflate"}, 400),
        (b"no zstd", {"content-type": PROTOBUF, "content-encoding": "zstd"}, 400),
        (bytes(5_000_000), {"content-type": PROTOBUF}, 413),
    ],
)
def test_over_http(running: Running, body: bytes, headers: dict[str, str], status: int) -> None:
    answer = running.client.post(running.url, content=body, headers=headers)
    assert answer.status_code == status
    assert "retry-after" not in answer.headers
    if headers.get("content-type") == PROTOBUF:
        assert answer.headers["content-type"] == PROTOBUF
        told = Status.FromString(answer.content)
        assert told.message
        if status == 400:
            assert told.details[0].Unpack(BadRequest())
    else:
        assert answer.json()["message"]


@pytest.mark.parametrize("encoding", BOMBS)
def test_a_bomb_is_never_inflated(running: Running, encoding: str) -> None:
    answer = running.post(BOMBS[encoding](), content_encoding=encoding)
    assert answer.status_code == 413
    assert b"decompressed" in answer.content


def test_a_body_far_beyond_the_limit_is_not_read_to_its_end(running: Running) -> None:
    with contextlib.suppress(httpx.TransportError):  # who still sends when the connection is closed may not hear why
        assert running.post(bytes(100_000_000)).status_code == 413


def test_many_empty_members_cost_no_squared_time(running: Running) -> None:
    body = gzip.compress(b"") * 190_000
    assert running.post(body, content_encoding="gzip").status_code == 200


def test_a_body_without_a_length_is_cut_off_at_the_limit(running: Running) -> None:
    answer = running.client.post(
        running.url, content=(bytes(100_000) for _ in range(60)), headers={"Content-Type": PROTOBUF}
    )
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/metrics", 404),
        ("POST", "/v1/logs", 404),
        ("POST", "/v1/traces/", 404),
        ("GET", "/v1/traces", 405),
        ("PUT", "/v1/traces", 405),
    ],
)
def test_other_signals_and_methods_are_refused_and_not_taken_and_lost(
    running: Running, method: str, path: str, status: int
) -> None:
    answer = httpx.request(method, running.url.replace("/v1/traces", path), headers={"Content-Type": PROTOBUF})
    assert answer.status_code == status
    assert Status.FromString(answer.content).message


@pytest.mark.parametrize(
    ("body", "compression", "code"),
    [
        (HALF, grpc.Compression.NoCompression, grpc.StatusCode.INVALID_ARGUMENT),
        (bytes(5_000_000), grpc.Compression.NoCompression, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (bytes(100_000_000), grpc.Compression.Gzip, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_over_grpc(running: Running, body: bytes, compression: grpc.Compression, code: grpc.StatusCode) -> None:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(running.grpc, options=options, compression=compression) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(EXPORT)(body)
        assert refused.value.code() is code
        with pytest.raises(grpc.RpcError) as unknown:
            channel.unary_unary("/opentelemetry.proto.collector.metrics.v1.MetricsService/Export")(b"")
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(("body", "content_type"), [(b"", PROTOBUF), (b"{}", JSON), (b'{"resourceSpans":[]}', JSON)])
def test_a_request_without_spans_is_fine(running: Running, body: bytes, content_type: str) -> None:
    assert running.post(body, content_type).status_code == 200
