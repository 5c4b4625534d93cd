"""Files of spans: OpenTelemetry's format to the letter, compressed or not, and readable after a crash."""

from __future__ import annotations

import base64
import gzip
import io
import random
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import zstandard
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

from stallscope_telemetry.emitter import Emitter
from stallscope_telemetry.files import SPANS_PER_LINE, SUFFIXES, OtlpFileExporter, encode_line
from stallscope_telemetry.spans import Attributes, resource_attributes

from .conftest import DESCRIPTION, START_NS, Kept, feed, full_info, make_info, make_request, make_step


def by_protobuf(spans: list[ReadableSpan]) -> object:
    """What OpenTelemetry's own encoder makes of ``spans``, as OTLP's JSON (ids in hex instead of base64)."""
    message: dict[str, list[dict[str, list[dict[str, list[dict[str, str]]]]]]] = MessageToDict(encode_spans(spans))
    for of_resource in message["resourceSpans"]:
        for of_scope in of_resource["scopeSpans"]:
            for span in of_scope["spans"]:
                for key in {"traceId", "spanId", "parentSpanId"} & span.keys():
                    span[key] = base64.b64decode(span[key]).hex()
                span["kind"] = {"SPAN_KIND_INTERNAL": 1, "SPAN_KIND_SERVER": 2}[span["kind"]]  # type: ignore[assignment]
    return message


def read(path: Path) -> list[dict[str, list[dict[str, list[dict[str, list[object]]]]]]]:
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    return [orjson.loads(line) for line in data.splitlines()]


def test_lines_equal_what_the_protobuf_encoder_makes(inline: Callable[..., list[ReadableSpan]]) -> None:
    spans = inline(
        make_step(0, keyframe=True),
        make_step(1),
        make_step(2, full=True),
        make_request(full_info(7)),
        make_request(make_info(8), tokens=0),
    )
    assert orjson.loads(encode_line(spans)) == by_protobuf(spans)


@given(tenant=st.text(), request_id=st.text(), handle=st.integers(0, 2**63 - 1), tokens=st.integers(0, 3))
def test_any_text_and_any_number_survive(tenant: str, request_id: str, handle: int, tokens: int) -> None:
    kept = Kept()
    info = make_info(handle, tenant=tenant, request_id=request_id, prompt_tokens=handle, arrival_ns=START_NS)
    with Emitter(resource_attributes(DESCRIPTION), [kept], random.Random(0), background=False) as emitter:
        feed(emitter, make_request(info, tokens))
    assert orjson.loads(encode_line(kept.spans)) == by_protobuf(kept.spans)


def test_a_clients_lone_surrogate_does_not_cost_the_line(inline: Callable[..., list[ReadableSpan]]) -> None:
    info = make_info(1, tenant="a\ud800b", request_id="\udfff")
    step = make_step(0)
    step.joined = [info]
    spans = inline(step, make_request(info))
    assert orjson.loads(encode_line(spans)) == by_protobuf(spans)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_exported_is_what_is_read(
    tmp_path: Path, suffix: str, inline: Callable[..., list[ReadableSpan]]
) -> None:
    spans = inline(*[make_step(step, keyframe=step % 50 == 0) for step in range(SPANS_PER_LINE + 1)])
    exporter = OtlpFileExporter(tmp_path / f"trace{suffix}")
    assert exporter.export(spans) is SpanExportResult.SUCCESS
    exporter.force_flush()
    exporter.export(spans[:3])
    exporter.shutdown()
    exporter.shutdown()
    assert exporter.force_flush()
    assert exporter.export(spans) is SpanExportResult.FAILURE
    lines = read(exporter.path)
    assert [len(line["resourceSpans"][0]["scopeSpans"][0]["spans"]) for line in lines] == [SPANS_PER_LINE, 1, 3]
    assert lines[0] == by_protobuf(spans[:SPANS_PER_LINE])


def test_spans_of_two_resources_stand_apart(resource: Attributes) -> None:
    kept = Kept()
    for replica in ("r0", "r1"):
        attributes = resource | {"service.instance.id": replica}
        with Emitter(attributes, [kept], random.Random(0), background=False) as emitter:
            feed(emitter, make_step(0), make_step(1))
    assert orjson.loads(encode_line(kept.spans)) == by_protobuf(kept.spans)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from telemetry.conftest import *
from stallscope_telemetry.files import OtlpFileExporter
kept = Kept()
with Emitter(resource_attributes(DESCRIPTION), [kept], random.Random(0), background=False) as emitter:
    feed(emitter, *[make_step(step) for step in range(40)])
exporter = OtlpFileExporter({path!r})
exporter.export(kept.spans[:10])
exporter.export(kept.spans[10:30])
exporter.force_flush()
exporter.export(kept.spans[30:])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_killed_processs_file_is_readable_to_its_last_flushed_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace{suffix}"
    script = KILLED.format(tests=str(Path(__file__).parent.parent), path=str(path))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    data = path.read_bytes()
    if suffix.endswith(".gz"):
        data = zlib.decompressobj(wbits=31).decompress(data)
    elif suffix.endswith(".zst"):
        data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    complete, _, _torn = data.rpartition(b"\n")
    spans = [orjson.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"] for line in complete.splitlines()]
    assert [len(line) for line in spans][:2] == [10, 20]


FULL_DISK = """
import resource as limits, sys
sys.path.insert(0, {tests!r})
from telemetry.conftest import *
from stallscope_telemetry.files import OtlpFileExporter
limits.setrlimit(limits.RLIMIT_FSIZE, (40_000, limits.RLIM_INFINITY))
exporter = OtlpFileExporter({path!r})
with Emitter(resource_attributes(DESCRIPTION), [exporter], random.Random(0), background=False) as emitter:
    for step in range(2000):
        emitter.step(make_step(step))
assert emitter.dropped == 0
"""


def test_a_full_disk_ends_the_file_and_not_the_run(tmp_path: Path) -> None:
    path = tmp_path / "trace.otlp.jsonl"
    script = FULL_DISK.format(tests=str(Path(__file__).parent.parent), path=str(path))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert path.stat().st_size == 40_000, "what fits is there, and nothing was written behind the torn line"
    assert "OtlpFileExporter: OSError" in run.stderr


def test_a_recording_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "trace.otlp.jsonl"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        OtlpFileExporter(path)
    assert path.read_text() == "precious"


def test_another_suffix_is_refused_with_the_names_that_would_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"trace\.json: name it \.otlp\.jsonl, \.otlp\.jsonl\.gz or \.otlp\.jsonl\.zst"
    ):
        OtlpFileExporter(tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []


def test_zst_without_zstandard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"stallscope-telemetry\[zstd\]"):
        OtlpFileExporter(tmp_path / "trace.otlp.jsonl.zst")
    assert list(tmp_path.iterdir()) == []
