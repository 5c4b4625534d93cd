"""Records as an engine makes them, and exporters that remember, fail or hang."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from stallscope_telemetry.emitter import Emitter
from stallscope_telemetry.records import (
    FinishReason,
    RequestInfo,
    RequestRecord,
    RequestSnapshot,
    RequestState,
    StepRecord,
    WaitReason,
)
from stallscope_telemetry.spans import Attributes, EngineDescription, resource_attributes

START_NS = 1_790_000_000_000_000_000
STEP_NS = 5_000_000
DESCRIPTION = EngineDescription(
    replica="r0",
    model="tiny-llama",
    engine_version="0.1.0",
    executor="virtual",
    block_size=16,
    total_blocks=4096,
    max_num_seqs=32,
    max_num_batched_tokens=2048,
    chunked_prefill=True,
    watermark=0.01,
    group="pool",
)


class Kept(SpanExporter):
    """Keeps what it gets, batch by batch."""

    def __init__(self) -> None:
        self.batches: list[list[ReadableSpan]] = []
        self.flushes = 0
        self.shutdowns = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.batches.append(list(spans))
        return SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        self.flushes += 1
        return True

    def shutdown(self) -> None:
        self.shutdowns += 1

    @property
    def spans(self) -> list[ReadableSpan]:
        return [span for batch in self.batches for span in batch]


class Hanging(Kept):
    """Hangs in its first export until released."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.released = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.entered.set()
        assert self.released.wait(60), "the test forgot to release the exporter"
        return super().export(spans)


@pytest.fixture
def resource() -> Attributes:
    return resource_attributes(DESCRIPTION)


@pytest.fixture
def hanging() -> Hanging:
    return Hanging()


@pytest.fixture
def inline(resource: Attributes) -> Callable[..., list[ReadableSpan]]:
    """Spans of ``records`` by an emitter without a thread."""

    def spans_of(*records: StepRecord | RequestRecord, seed: int = 0) -> list[ReadableSpan]:
        kept = Kept()
        with Emitter(resource, [kept], random.Random(seed), background=False) as emitter:
            feed(emitter, *records)
        return kept.spans

    return spans_of


def feed(emitter: Emitter, *records: StepRecord | RequestRecord) -> None:
    for record in records:
        if isinstance(record, StepRecord):
            emitter.step(record)
        else:
            emitter.request(record)


def make_info(handle: int, **changes: object) -> RequestInfo:
    fields: dict[str, object] = {
        "handle": handle,
        "request_id": f"req-{handle}",
        "arrival_ns": START_NS - 1000 * handle,
        "prompt_tokens": 100 + handle,
        "max_tokens": 20,
    }
    return RequestInfo(**(fields | changes))  # type: ignore[arg-type]


def full_info(handle: int) -> RequestInfo:
    """A request about which all is known, in words of several scripts."""
    return make_info(
        handle,
        tenant='größe "7" \\ 東京 \U0001f600',
        tenant_source="api_key",
        priority=2,
        session="s\n1",
        predecessor="req-0",
        retry_of="req-00",
        trace_id=0xABC,
        parent_span_id=0xDEF,
    )


def make_step(step: int, *, keyframe: bool = False, full: bool = False) -> StepRecord:
    """A quiet step; as a keyframe, with one request of each state; ``full``: with all that a step can say."""
    scheduled_ns = START_NS + step * STEP_NS
    record = StepRecord(
        step,
        scheduled_ns,
        scheduled_ns + 30_000,
        scheduled_ns + STEP_NS - 1000,
        0,
        30_000,
        -1,
        0,
        32,
        32,
        32,
        3,
        999,
        0,
    )
    if keyframe:
        record.keyframe = [
            RequestSnapshot(full_info(7), RequestState.RUNNING, 110, 4, 16, 8),
            RequestSnapshot(make_info(8), RequestState.PREEMPTED, 0, 2, 0, 0, WaitReason.KV, 5),
            RequestSnapshot(make_info(9), RequestState.WAITING, 0, 0, 0, 0, WaitReason.HEAD, 0),
        ]
    if full:
        record.idle_ns, record.device_ns, record.kv_cached = 77, 4_000_000, 12
        record.joined = [full_info(7), make_info(8)]
        record.cached, record.evicted = [(7, 16)], [(7, 3, 2)]
        record.chunks, record.decodes = [(7, 512)], [(8, 0)]
        record.waits = [(8, WaitReason.SLOTS, 1)]
        record.preempted, record.left = [(8, 7)], [(6, FinishReason.LENGTH), (5, FinishReason.ABORT)]
    return record


def make_request(info: RequestInfo, tokens: int = 3) -> RequestRecord:
    arrival_ns = info.arrival_ns
    times_ns = [arrival_ns + 9_000_000 + i * STEP_NS for i in range(tokens)]
    end_ns = times_ns[-1] if times_ns else arrival_ns + 1_000_000
    events = [("queued", arrival_ns + 1000), ("scheduled", arrival_ns + 2000), ("finished", end_ns)]
    return RequestRecord(
        info,
        arrival_ns + 1000,
        arrival_ns + 2000,
        times_ns[0] if times_ns else 0,
        end_ns,
        end_ns + 500,
        16,
        1,
        FinishReason.STOP,
        times_ns,
        events,
        prefix=7,
    )
