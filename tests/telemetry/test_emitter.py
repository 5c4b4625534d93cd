"""The emitter: bounded, harmless to the engine's thread, and the same bytes for the same run."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind

from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, StepResult, VirtualClock
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch
from stallscope_telemetry import emitter as emitter_module
from stallscope_telemetry import names
from stallscope_telemetry.emitter import SPANS_PER_EXPORT, Emitter, exporters_from_environment
from stallscope_telemetry.files import OtlpFileExporter
from stallscope_telemetry.records import GpuSample, RequestRecord
from stallscope_telemetry.spans import Attributes, resource_attributes

from .conftest import DESCRIPTION, START_NS, Hanging, Kept, feed, full_info, make_info, make_request, make_step

DEADLOCK_S = 60  # no test waits that long unless something is stuck


@pytest.fixture(autouse=True, scope="module")
def _quick_drains() -> Iterator[None]:
    """The thread looks at its queue every 10 ms: nothing tested here depends on how often, only how long it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emitter_module, "DRAIN_S", 0.01)
        yield


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLOCK_S
    while not condition():
        assert time.monotonic() < deadline, "stuck"
        time.sleep(0.01)


# --- spans ------------------------------------------------------------------------------------------------------


def test_step_spans_are_internal_and_last_from_scheduling_to_ready_outputs(
    inline: Callable[..., list[ReadableSpan]],
) -> None:
    record = make_step(4, keyframe=True)
    (span,) = inline(record)
    assert (span.name, span.kind, span.parent) == (names.STEP_SPAN, SpanKind.INTERNAL, None)
    assert (span.start_time, span.end_time) == (record.scheduled_ns, record.ready_ns)
    assert span.attributes is not None
    assert span.attributes[names.STEP] == 4
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == names.SCOPE
    assert dict(span.resource.attributes) == resource_attributes(DESCRIPTION)


def test_steps_from_a_keyframe_to_the_next_share_a_trace(inline: Callable[..., list[ReadableSpan]]) -> None:
    spans = inline(*[make_step(step, keyframe=step % 3 == 0) for step in range(9)])
    traces = [span.context.trace_id for span in spans]
    assert [traces.index(trace) for trace in traces] == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    assert len({span.context.span_id for span in spans}) == 9


def test_request_spans_are_server_spans_below_their_caller(inline: Callable[..., list[ReadableSpan]]) -> None:
    record = make_request(full_info(7))
    (span,) = inline(record)
    assert (span.name, span.kind) == (names.REQUEST_SPAN, SpanKind.SERVER)
    assert (span.start_time, span.end_time) == (record.info.arrival_ns, record.end_ns)
    assert span.context.trace_id == 0xABC
    assert span.parent is not None
    assert (span.parent.trace_id, span.parent.span_id, span.parent.is_remote) == (0xABC, 0xDEF, True)
    assert [(event.name, event.timestamp) for event in span.events] == list(record.events)


def test_requests_without_a_caller_get_a_trace_each_and_no_parent(inline: Callable[..., list[ReadableSpan]]) -> None:
    spans = inline(*[make_request(make_info(handle)) for handle in range(3)])
    assert [span.parent for span in spans] == [None] * 3
    assert len({span.context.trace_id for span in spans}) == 3
    assert all(span.context.is_valid for span in spans)


# --- the bounded queue ------------------------------------------------------------------------------------------


@contextmanager
def stuck_emitter(resource: Attributes, hanging: Hanging, capacity: int) -> Iterator[Emitter]:
    """An emitter whose thread is inside an export that hangs, with an empty queue."""
    emitter = Emitter(resource, [hanging], random.Random(0), capacity=capacity)
    try:
        assert emitter.wants_keyframe(0)
        emitter.step(make_step(0, keyframe=True))
        assert hanging.entered.wait(DEADLOCK_S)
        yield emitter
    finally:
        hanging.released.set()
        emitter.close(DEADLOCK_S)


def test_a_full_queue_drops_the_newest_and_counts_them(resource: Attributes, hanging: Hanging) -> None:
    with stuck_emitter(resource, hanging, capacity=5) as emitter:
        feed(emitter, *[make_step(step) for step in range(1, 5)], make_request(make_info(1)))
        assert emitter.dropped == 0
        feed(emitter, *[make_step(step) for step in range(5, 9)], make_request(make_info(2)))
        assert emitter.dropped == 5
    assert [span.attributes[names.STEP] for span in hanging.spans if span.name == names.STEP_SPAN] == [0, 1, 2, 3, 4]


def test_the_first_step_with_room_after_a_drop_becomes_a_keyframe_that_says_how_many_were_lost(
    resource: Attributes, hanging: Hanging
) -> None:
    with stuck_emitter(resource, hanging, capacity=2) as emitter:
        for step in range(1, 5):
            assert not emitter.wants_keyframe(step)  # none is due, and later there is no room for one
            emitter.step(make_step(step))
        hanging.released.set()
        wait_until(lambda: len(hanging.spans) == 3)
        assert emitter.wants_keyframe(5)
        assert emitter.wants_keyframe(6), "it stays due until one was taken"
        emitter.step(make_step(6, keyframe=True))
        assert not emitter.wants_keyframe(7)
    last = hanging.spans[-1]
    assert last.attributes is not None
    assert (last.attributes[names.STEP], last.attributes[names.DROPPED]) == (6, 2)
    assert names.DROPPED not in (hanging.spans[0].attributes or {})


@given(calls=st.lists(st.sampled_from(["step", "request"]), max_size=40), capacity=st.integers(1, 10))
def test_the_queue_never_grows_above_its_bound(calls: list[str], capacity: int) -> None:
    hanging = Hanging()
    with stuck_emitter(resource_attributes(DESCRIPTION), hanging, capacity) as emitter:
        for step, call in enumerate(calls, start=1):
            feed(emitter, make_step(step) if call == "step" else make_request(make_info(step)))
            assert emitter.dropped == max(0, step - capacity)
    assert len(hanging.spans) == 1 + min(len(calls), capacity)


def test_gpu_samples_are_dropped_first_and_counted_apart(resource: Attributes, hanging: Hanging) -> None:
    with stuck_emitter(resource, hanging, capacity=6) as emitter:
        for number in range(5):
            emitter.gpu(GpuSample("GPU-a", START_NS + number))
        assert (emitter.dropped, emitter.dropped_samples) == (0, 2)
        feed(emitter, *[make_step(step) for step in range(1, 4)])
        assert (emitter.dropped, emitter.dropped_samples) == (0, 2)
    emitter.gpu(GpuSample("GPU-a", START_NS))
    assert (emitter.dropped, emitter.dropped_samples) == (0, 3)
    assert [span.name for span in hanging.spans].count(names.GPU_SPAN) == 3


def test_gpu_samples_lie_in_the_trace_of_the_steps_about_them(resource: Attributes) -> None:
    kept = Kept()
    with Emitter(resource, [kept], random.Random(0), background=False) as emitter:
        emitter.step(make_step(0, keyframe=True))
        emitter.gpu(GpuSample("GPU-a", START_NS))
        emitter.step(make_step(1))
    assert [span.name for span in kept.spans] == [names.STEP_SPAN, names.GPU_SPAN, names.STEP_SPAN]
    assert len({span.context.trace_id for span in kept.spans}) == 1
    assert len({span.context.span_id for span in kept.spans}) == 3


def test_keyframes_come_first_and_then_every_n_steps(resource: Attributes) -> None:
    with Emitter(resource, [], random.Random(0), background=False, keyframe_every=4) as emitter:
        keyframes = []
        for step in range(17, 30):  # an engine need not begin at 0
            keyframe = emitter.wants_keyframe(step)
            emitter.step(make_step(step, keyframe=keyframe))
            keyframes += [step] if keyframe else []
    assert keyframes == [17, 21, 25, 29]


def test_what_comes_after_closing_is_dropped_and_counted(resource: Attributes) -> None:
    kept = Kept()
    emitter = Emitter(resource, [kept], random.Random(0))
    emitter.step(make_step(0, keyframe=True))
    emitter.close()
    emitter.close()
    feed(emitter, make_step(1), make_request(make_info(1)))
    assert not emitter.wants_keyframe(2)
    assert (len(kept.spans), kept.shutdowns, emitter.dropped) == (1, 1, 2)


def test_closing_gives_up_on_an_exporter_that_hangs(
    resource: Attributes, hanging: Hanging, caplog: pytest.LogCaptureFixture
) -> None:
    with stuck_emitter(resource, hanging, capacity=10) as emitter:
        emitter.step(make_step(1))
        emitter.close(timeout=0.05)
        assert "gave up on 1 records" in caplog.text


# --- exporters that fail ----------------------------------------------------------------------------------------


class Failing(Kept):
    """Raises, or says FAILURE, at every export; raises at the rest, too."""

    def __init__(self, *, raises: bool) -> None:
        super().__init__()
        self.raises = raises

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        super().export(spans)
        if self.raises:
            raise RuntimeError("no such luck")
        return SpanExportResult.FAILURE

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        raise RuntimeError("no flush")

    def shutdown(self) -> None:
        raise RuntimeError("no shutdown")


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_a_failing_exporter_is_logged_once_and_leaves_the_others_alone(
    resource: Attributes, raises: bool, background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    failing, kept = Failing(raises=raises), Kept()
    with Emitter(resource, [failing, kept], random.Random(0), background=background) as emitter:
        for step in range(3 * SPANS_PER_EXPORT):
            emitter.step(make_step(step))
    assert len(kept.spans) == 3 * SPANS_PER_EXPORT
    assert len(failing.batches) == 1, "it is left alone for a while"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "Failing" in caplog.text


@pytest.mark.parametrize("background", [True, False])
def test_a_record_that_is_made_later_and_fails_costs_itself(
    resource: Attributes, background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown() -> RequestRecord:
        raise AttributeError("the next version's requests have no such thing")

    kept = Kept()
    with Emitter(resource, [kept], random.Random(0), background=background) as emitter:
        for record in (unknown, lambda: make_request(make_info(1)), unknown):
            emitter.request(record)
        emitter.step(make_step(0))
    assert [span.name for span in kept.spans] == [names.REQUEST_SPAN, names.STEP_SPAN]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_the_background_thread_flushes_exporters_while_it_runs(resource: Attributes) -> None:
    kept = Kept()
    with Emitter(resource, [kept], random.Random(0)) as emitter:
        emitter.step(make_step(0, keyframe=True))
        wait_until(lambda: kept.flushes > 0)
        assert len(kept.spans) == 1


# --- virtual time -----------------------------------------------------------------------------------------------


class Jump:
    """An executor of virtual time: a step takes what its tokens say."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock

    def dispatch(self, batch: Batch) -> None:
        self.clock.wait_until(self.clock.now_ns() + 1_000_000 + 1_000 * sum(batch.num_tokens))

    def collect(self, batch: Batch) -> StepResult:
        return StepResult()


def record_virtual_run(path: Path, seed: int) -> Emitter:
    clock = VirtualClock(START_NS)
    requests = [
        Request(make_info(handle, arrival_ns=START_NS + handle * 3_000_000, tenant=f"t{handle % 3}"))
        for handle in range(60)
    ]
    config = EngineConfig(max_num_seqs=8, kv_blocks=40)
    emitter = Emitter(
        resource_attributes(DESCRIPTION), [OtlpFileExporter(path)], random.Random(seed), background=False, capacity=1
    )
    with emitter:
        Engine(config, Jump(clock), clock, emitter).run(requests)
    return emitter


@pytest.mark.parametrize("suffix", [".otlp.jsonl", ".otlp.jsonl.gz", ".otlp.jsonl.zst"])
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in "abc"]
    for path, seed in zip(paths, [5, 5, 6], strict=True):
        record_virtual_run(path, seed)
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second
    assert first != other


def test_without_a_background_nothing_is_dropped_and_memory_stays_bounded(resource: Attributes) -> None:
    kept = Kept()
    with Emitter(resource, [kept], random.Random(0), background=False, capacity=1) as emitter:
        for step in range(2 * SPANS_PER_EXPORT + 1):
            emitter.step(make_step(step))
        assert [len(batch) for batch in kept.batches] == [SPANS_PER_EXPORT] * 2
    assert len(kept.spans) == 2 * SPANS_PER_EXPORT + 1
    assert emitter.dropped == 0


# --- OTLP over HTTP ---------------------------------------------------------------------------------------------


class Collector:
    """A local OTLP/HTTP receiver: parses what comes and answers, or hangs until released."""

    def __init__(self, *, answers: bool) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.reached = threading.Event()
        self.released = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    collector.requests.append(ExportTraceServiceRequest.FromString(body))
                collector.reached.set()
                if not answers:
                    collector.released.wait(DEADLOCK_S)
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Collector:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


def test_spans_reach_a_collector_over_http(resource: Attributes, monkeypatch: pytest.MonkeyPatch) -> None:
    with Collector(answers=True) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        with Emitter(resource, exporters_from_environment(), random.Random(0)) as emitter:
            feed(emitter, make_step(0, keyframe=True), make_step(1, full=True), make_request(full_info(7)))
    spans = [
        (span.name, span.trace_id.hex(), span.parent_span_id.hex())
        for request in collector.requests
        for of_resource in request.resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]
    assert [name for name, _, _ in spans] == [names.STEP_SPAN, names.STEP_SPAN, names.REQUEST_SPAN]
    assert spans[2][1:] == (f"{0xABC:032x}", f"{0xDEF:016x}")
    sent = {attribute.key for attribute in collector.requests[0].resource_spans[0].resource.attributes}
    assert sent == set(resource)


def test_an_endpoint_that_refuses_connections_costs_nothing_but_its_spans(
    resource: Attributes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Collector(answers=True) as collector:
        nobody = collector.url  # closed a line further on
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{nobody}/v1/traces")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    kept = Kept()
    with Emitter(resource, [*exporters_from_environment(), kept], random.Random(0)) as emitter:
        feed(emitter, *[make_step(step) for step in range(50)])
    assert len(kept.spans) == 50
    assert emitter.dropped == 0


def test_an_endpoint_that_hangs_makes_the_queue_drop_and_the_engine_goes_on(
    resource: Attributes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Collector(answers=False) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        emitter = Emitter(resource, exporters_from_environment(), random.Random(0), capacity=10)
        emitter.step(make_step(0))
        assert collector.reached.wait(DEADLOCK_S)
        feed(emitter, *[make_step(step) for step in range(1, 31)])
        assert emitter.dropped == 20
        collector.released.set()
        emitter.close(DEADLOCK_S)


@pytest.mark.parametrize(
    ("variables", "exporters"),
    [
        ({}, 0),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, 0),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}, 1),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:4318/v1/traces"}, 1),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318", "OTEL_SDK_DISABLED": "True"}, 0),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318", "OTEL_TRACES_EXPORTER": "none"}, 0),
    ],
)
def test_the_standard_variables_say_whether_to_export(
    variables: dict[str, str], exporters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    made: list[SpanExporter] = exporters_from_environment()
    assert len(made) == exporters
    for exporter in made:
        exporter.shutdown()
