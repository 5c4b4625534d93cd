"""``stallscope collect`` as its senders meet it: OpenTelemetry's exporters, an engine, retries, restarts, signals."""

from __future__ import annotations

import gzip
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import zstandard
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from stallscope import cli
from stallscope.trace import read_trace
from tests.live.collecting import (
    JSON,
    Running,
    as_json,
    begun,
    collecting,
    eventually,
    request,
    segments,
    stored,
    trace_ids,
)

EXPORTERS: dict[str, Callable[[Running], SpanExporter]] = {
    "HTTP": lambda running: HttpExporter(endpoint=running.url),
    "HTTP, gzip": lambda running: HttpExporter(endpoint=running.url, compression=Compression.Gzip),
    "HTTP, deflate": lambda running: HttpExporter(endpoint=running.url, compression=Compression.Deflate),
    "gRPC": lambda running: GrpcExporter(endpoint=running.grpc, insecure=True),
    "gRPC, gzip": lambda running: GrpcExporter(endpoint=running.grpc, insecure=True, compression=grpc.Compression.Gzip),
}


def test_what_opentelemetrys_exporters_send_is_in_the_folder(tmp_path: Path) -> None:
    made = set()
    with collecting(tmp_path) as running:
        for exporter in EXPORTERS.values():
            provider = TracerProvider()
            provider.add_span_processor(BatchSpanProcessor(exporter(running)))
            for _ in range(20):
                with provider.get_tracer("test").start_as_current_span("work") as span:
                    made.add(f"{span.get_span_context().trace_id:032x}")
            assert provider.force_flush()
            provider.shutdown()
        said = running.end(signal.SIGTERM)
    ids, damage = stored(tmp_path)
    assert ids == Counter(made)
    assert damage == []
    assert said.startswith("received 100 spans in 5 requests (0 sent again)")
    assert running.errors() == ""


def test_a_recording_that_went_to_a_collector_is_the_same_trace(tmp_path: Path) -> None:
    folder, file = tmp_path / "collected", tmp_path / "written.otlp.jsonl"
    with collecting(folder, "--rotate-size", "300kB", "--max-body", "300kB") as running:
        command = [sys.executable, "-m", "stallscope.cli", "record", "kv_pinning", "--variant", "sample"]
        environment = {**os.environ, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": running.url}
        subprocess.run(
            [*command, "--executor", "virtual", "-o", str(file)], check=True, env=environment, capture_output=True
        )
        while_collecting = read_trace(folder)
        running.end(signal.SIGINT)
    assert len(segments(folder)) > 1
    written = read_trace(file)
    assert read_trace(folder).tables == while_collecting.tables == written.tables
    assert while_collecting.findings == ()


def test_json_is_taken_in_any_encoding(tmp_path: Path) -> None:
    ids = random.Random(1)
    sent = []
    with collecting(tmp_path) as running:
        for compress, encoding in ((bytes, "identity"), (gzip.compress, "gzip"), (zstandard.compress, "zstd")):
            message = request(ids, 3)
            sent += trace_ids(message)
            answer = running.post(compress(as_json(message)), f"{JSON}; charset=utf-8", content_encoding=encoding)
            assert (answer.status_code, answer.headers["content-type"], answer.json()) == (200, JSON, {})
        running.end(signal.SIGTERM)
    found, damage = stored(tmp_path)
    assert found == Counter(sent)
    assert damage == []


def test_a_request_that_is_sent_again_is_stored_once_also_after_a_restart(tmp_path: Path) -> None:
    messages = [request(random.Random(seed), 2).SerializeToString() for seed in range(4)]
    # A segment a message: after the restart those that are closed and compressed must be known, too.
    options = ("--rotate-size", "100B")
    with collecting(tmp_path, *options) as running:
        for message in messages * 2:
            assert running.post(message).status_code == 200
        with grpc.insecure_channel(running.grpc) as channel:
            export = channel.unary_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export")
            assert export(messages[0]) == b""
        assert "received 8 spans in 9 requests (5 sent again)" in running.end(signal.SIGTERM)
    with collecting(tmp_path, *options) as running:
        for message in messages:
            assert running.post(message, content_encoding="identity").status_code == 200
        assert "received 0 spans in 4 requests (4 sent again)" in running.end(signal.SIGTERM)
    ids, _ = stored(tmp_path)
    assert set(ids.values()) == {1}
    assert len(ids) == 8


def test_unsound_spans_are_left_out_and_told(tmp_path: Path) -> None:
    message = request(random.Random(3), 4)
    spans = message.resource_spans[0].scope_spans[0].spans
    spans[1].trace_id = bytes(16)
    spans[2].span_id = b"short"
    sound = [spans[0].trace_id.hex(), spans[3].trace_id.hex()]
    with collecting(tmp_path) as running:
        answer = ExportTraceServiceResponse.FromString(running.post(message.SerializeToString()).content)
        assert answer.partial_success.rejected_spans == 2
        assert "trace id" in answer.partial_success.error_message
        with grpc.insecure_channel(running.grpc) as channel:
            export = channel.unary_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export")
            again = ExportTraceServiceResponse.FromString(export(message.SerializeToString()))
        assert again == answer
        spans[0].trace_id = random.Random(4).randbytes(16)
        sound.append(spans[0].trace_id.hex())
        as_text = running.post(as_json(message), JSON).json()
        assert as_text["partialSuccess"]["rejectedSpans"] == "2"
        running.end(signal.SIGTERM)
    ids, damage = stored(tmp_path)
    assert ids == Counter(sound) + Counter([sound[1]])
    assert damage == []


def test_what_is_under_way_at_the_end_is_still_taken(tmp_path: Path) -> None:
    message = request(random.Random(5), 2, padding=1000)
    body = message.SerializeToString()
    with collecting(tmp_path) as running:

        def slowly() -> object:
            yield body[:500]
            running.process.send_signal(signal.SIGTERM)
            yield body[500:]

        assert running.client.post(running.url, content=slowly(), headers={"Content-Type": "application/x-protobuf"})
        assert running.process.wait(60) == 0
    assert set(stored(tmp_path)[0]) == set(trace_ids(message))


def test_a_sender_that_never_ends_does_not_keep_the_collector_from_ending(tmp_path: Path) -> None:
    body = request(random.Random(8), 20, padding=1000).SerializeToString()
    with (
        collecting(tmp_path, before="from stallscope.live import over_http; over_http.CLOSE_S = 1") as running,
        begun(running, body) as connection,
    ):
        eventually(lambda: running.post(body[:1]).status_code == 400)  # by then it has begun to read
        running.end(signal.SIGTERM)
        assert connection.recv(100).startswith(b"HTTP/1.1 503")
    assert "Traceback" not in running.errors()


def test_segments_are_closed_by_age_compressed_and_still_read(tmp_path: Path) -> None:
    message = request(random.Random(6), 50)
    with collecting(tmp_path, "--rotate-age", "1s") as running:
        assert running.post(message.SerializeToString()).status_code == 200
        (segment,) = segments(tmp_path)
        plain = segment.read_bytes()
        eventually(lambda: segment.read_bytes()[:4] == b"\x28\xb5\x2f\xfd")
        assert segment.stat().st_size < len(plain)
        assert set(stored(tmp_path)[0]) == set(trace_ids(message))
        later = request(random.Random(7))
        assert running.post(later.SerializeToString()).status_code == 200
        assert len(segments(tmp_path)) == 2
        running.end(signal.SIGTERM)
    assert set(stored(tmp_path)[0]) == {*trace_ids(message), *trace_ids(later)}


def test_two_collectors_do_not_share_a_folder_or_a_port(tmp_path: Path) -> None:
    with collecting(tmp_path / "one") as running:
        http = running.url.removeprefix("http://").removesuffix("/v1/traces")
        for options, says in (
            ([str(tmp_path / "one"), "--http", "127.0.0.1:0", "--grpc", "off"], "another collector"),
            ([str(tmp_path / "two"), "--http", http, "--grpc", "off"], f"can't listen on {http}"),
            ([str(tmp_path / "two"), "--http", "off", "--grpc", running.grpc], f"can't listen on {running.grpc}"),
        ):
            command = [sys.executable, "-m", "stallscope.cli", "collect", "-o", *options]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert (ended.returncode, ended.stdout) == (2, "")
            assert says in ended.stderr
            assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rotate-size", "64"], "--rotate-size 64"),
        (["--rotate-age", "soon"], "--rotate-age soon"),
        (["--disk-budget", "100MB"], "3 times"),
        (["--max-pending", "30MB"], "2 times"),
        (["--http", "4318"], "HOST:PORT"),
        (["--http", "off", "--grpc", "off"], "nothing to receive by"),
        (["--http", "nowhere.invalid:4318"], "nowhere.invalid"),
        (["-o", "file"], "file"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr(sys, "argv", ["stallscope", "collect", "-o", "spans", "--grpc", "127.0.0.1:0", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    written = capsys.readouterr()
    assert (ended.value.code, written.out) == (2, "")
    assert says in written.err
    assert len(written.err.splitlines()) == 1
