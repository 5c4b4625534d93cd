"""Records to exporters: takes plain records from the engine's thread and exports them as spans in the background.

Flow: engine -> ``Emitter`` -> ``spans`` says what a span carries -> any OpenTelemetry ``SpanExporter`` (``files``,
OTLP/HTTP). Harmless by construction: the engine's thread appends to a bounded queue and nothing else.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

from stallscope_telemetry import __version__, names
from stallscope_telemetry.records import GpuSample, RequestRecord, StepRecord
from stallscope_telemetry.spans import Value, gpu_attributes, request_attributes, step_attributes

log = logging.getLogger(__name__)

DRAIN_S = 0.1  # some 20 steps of 5 ms: a millisecond or two with the GIL held, too short for a forced switch
FLUSH_S = 1.0  # what a killed process loses
PAUSE_S = 30.0  # how long a failed exporter is left alone, so that one that hangs doesn't starve the others
SPANS_PER_EXPORT = 512
CAPACITY = 8192  # records that wait for export: at 5 ms a step, most of a minute of a collector that hangs

_SCOPE = InstrumentationScope(names.SCOPE, __version__)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)

Later = Callable[[], RequestRecord]  # makes a record, in the background
_Record = StepRecord | RequestRecord | Later | GpuSample


class Emitter:
    """Turns records into spans and hands them to exporters; what an engine calls its ``Recorder``.

    ``step``, ``request`` and ``wants_keyframe`` are for one thread, the engine's; ``gpu`` is for one other. They never
    block and never raise: at most ``capacity`` records wait for export, newer ones are dropped and counted in
    ``dropped``, and the next step that finds room is asked to be a keyframe, so that readers find their way again.
    Every ``keyframe_every``-th step is one anyhow, and the first.

    With ``background=False`` there is no thread: records are exported by the caller's, in batches, and none is ever
    dropped. Together with seeded ``ids`` and a virtual clock, the same run then gives the same bytes.

    ``resource`` is what ``spans.resource_attributes`` returns. Span and trace ids come from ``ids``. The steps from
    one keyframe to the next share a trace. Must be closed, or used as a context manager: the last records wait for it.
    """

    def __init__(
        self,
        resource: Mapping[str, Value],
        exporters: Sequence[SpanExporter],
        ids: random.Random,
        *,
        background: bool = True,
        keyframe_every: int = 200,
        capacity: int = CAPACITY,
    ) -> None:
        self.dropped = 0  # records of steps and requests lost so far
        self.dropped_samples = 0  # the same of GPU samples; a count of its own, since it has a thread of its own
        self._keyframe_every = keyframe_every
        self._next_keyframe = 0
        self._capacity = capacity if background else sys.maxsize  # 0 once closed
        self._queue: deque[tuple[_Record, int]] = deque()  # a record, and ``dropped`` as it came
        self._resource = Resource(resource)
        self._exporters = [_Guarded(exporter) for exporter in exporters]
        self._ids = ids
        self._trace_id = self._new_id(128)
        self._span_id = self._new_id(63)
        self._has_failed = False
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="stallscope-emitter", daemon=True)
            self._thread.start()

    # --- on the engine's thread -----------------------------------------------------------------------------------

    def wants_keyframe(self, step: int) -> bool:
        """Whether ``step`` should carry a snapshot of everybody: one is due, and there is room for it."""
        return step >= self._next_keyframe and len(self._queue) < self._capacity

    def step(self, record: StepRecord) -> None:
        """Takes the record of a step; the caller must not change it any more."""
        if self._offer(record) and record.keyframe is not None:
            self._next_keyframe = record.step + self._keyframe_every

    def request(self, record: RequestRecord | Later) -> None:
        """Takes the record of a request that ended; the caller must not change it any more. Or takes what makes it, for
        the background to call: what that reads must not change either."""
        self._offer(record)

    def _offer(self, record: _Record) -> bool:
        # No lock: deque's own operations are atomic, and but for ``gpu`` only this thread appends.
        if len(self._queue) >= self._capacity:
            self.dropped += 1
            self._next_keyframe = 0
            return False
        self._queue.append((record, self.dropped))
        if self._thread is None and len(self._queue) >= SPANS_PER_EXPORT:
            self._drain()
        return True

    # --- on the sampler's thread ------------------------------------------------------------------------------------

    def gpu(self, sample: GpuSample) -> None:
        """Takes a GPU sample, while half of the queue is free: where room is short, it is for steps and requests."""
        if len(self._queue) < self._capacity // 2:
            self._queue.append((sample, self.dropped))
        else:
            self.dropped_samples += 1

    # --- the end --------------------------------------------------------------------------------------------------

    def close(self, timeout: float = 15.0) -> None:
        """Exports what waits and shuts the exporters down; records that come later are dropped.

        Waits at most ``timeout`` seconds (an OTLP export may take 10 by itself); what an exporter has not taken
        by then is lost, and the log says so. May be called again, to no effect.
        """
        if self._closing.is_set():
            return
        self._capacity = 0
        self._closing.set()
        if self._thread is None:
            self._finish()
            return
        self._thread.join(timeout)
        if timeout and self._thread.is_alive():
            log.warning("telemetry: an exporter hangs; gave up on %d records after %g s", len(self._queue), timeout)

    def __enter__(self) -> Emitter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- in the background ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        # By the clock and never by the engine's sign: waking a thread would cost the engine more than the record.
        flushed = time.monotonic()
        while not self._closing.wait(DRAIN_S):
            self._drain()
            if time.monotonic() - flushed >= FLUSH_S:
                for exporter in self._exporters:
                    exporter.flush()
                flushed = time.monotonic()
        self._finish()

    def _finish(self) -> None:
        # One after the other to its end: a file need not wait for a collector that hangs.
        rest = list(self._batches())
        for exporter in self._exporters:
            for spans in rest:
                exporter.export(spans)
            exporter.shutdown()

    def _drain(self) -> None:
        for spans in self._batches():
            for exporter in self._exporters:
                exporter.export(spans)

    def _batches(self) -> Iterator[list[ReadableSpan]]:
        """What waits for export, until nothing does."""
        queue = self._queue
        while queue:
            taken = (queue.popleft() for _ in range(min(len(queue), SPANS_PER_EXPORT)))
            yield [span for record, dropped in taken if (span := self._attempt(record, dropped)) is not None]

    def _attempt(self, record: _Record, dropped: int) -> ReadableSpan | None:
        # A hook's record may look at an engine's own objects only now, and those of the next version may be others.
        try:
            return self._span(record, dropped)
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                log.warning("telemetry: a record is left out: %s: %s; not logged again", type(error).__name__, error)
            return None

    def _span(self, record: _Record, dropped: int) -> ReadableSpan:
        if isinstance(record, StepRecord):
            return self._step_span(record, dropped)
        if isinstance(record, GpuSample):
            return self._gpu_span(record)
        return self._request_span(record if isinstance(record, RequestRecord) else record())

    def _step_span(self, record: StepRecord, dropped: int) -> ReadableSpan:
        if record.keyframe is not None:
            self._trace_id = self._new_id(128)
            self._span_id = self._new_id(63)
        self._span_id += 1  # unique within its trace; counting up takes a tenth off a compressed file
        return ReadableSpan(
            names.STEP_SPAN,
            context=SpanContext(self._trace_id, self._span_id, is_remote=False, trace_flags=_SAMPLED),
            resource=self._resource,
            attributes=step_attributes(record, dropped),
            kind=SpanKind.INTERNAL,
            start_time=record.scheduled_ns,
            end_time=record.ready_ns,
            instrumentation_scope=_SCOPE,
        )

    def _request_span(self, record: RequestRecord) -> ReadableSpan:
        info = record.info
        trace_id = info.trace_id or self._new_id(128)
        has_parent = info.trace_id and info.parent_span_id
        return ReadableSpan(
            names.REQUEST_SPAN,
            context=SpanContext(trace_id, self._new_id(64), is_remote=False, trace_flags=_SAMPLED),
            parent=SpanContext(trace_id, info.parent_span_id, is_remote=True) if has_parent else None,
            resource=self._resource,
            attributes=request_attributes(record),
            events=[Event(name, timestamp=time_ns) for name, time_ns in record.events],
            kind=SpanKind.SERVER,
            start_time=info.arrival_ns,
            end_time=record.end_ns,
            instrumentation_scope=_SCOPE,
        )

    def _gpu_span(self, sample: GpuSample) -> ReadableSpan:
        """In the trace of the steps about that time: whoever opens it sees both."""
        self._span_id += 1
        return ReadableSpan(
            names.GPU_SPAN,
            context=SpanContext(self._trace_id, self._span_id, is_remote=False, trace_flags=_SAMPLED),
            resource=self._resource,
            attributes=gpu_attributes(sample),
            kind=SpanKind.INTERNAL,
            start_time=sample.time_ns,
            end_time=sample.time_ns,
            instrumentation_scope=_SCOPE,
        )

    def _new_id(self, bits: int) -> int:
        return self._ids.getrandbits(bits) or 1  # 0 means "no id" in OpenTelemetry


class _Guarded:
    """An exporter that may fail: its first failure is logged, each is followed by a pause in which spans pass by."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._name = type(exporter).__name__
        self._has_failed = False
        self._paused_until = 0.0  # time.monotonic()

    def export(self, spans: list[ReadableSpan]) -> None:
        if time.monotonic() < self._paused_until:
            return
        if self._attempt(lambda: self._exporter.export(spans)) is not SpanExportResult.SUCCESS:
            self._paused_until = time.monotonic() + PAUSE_S
            self._say_once("could not export spans")

    def flush(self) -> None:
        if time.monotonic() >= self._paused_until:
            self._attempt(self._exporter.force_flush)

    def shutdown(self) -> None:
        self._attempt(self._exporter.shutdown)

    def _attempt(self, call: Callable[[], object]) -> object:
        # The one place that catches everything: an exporter is anybody's code, and telemetry that fails must cost
        # its spans and nothing more, neither the thread nor the other exporters.
        try:
            return call()
        except Exception as error:
            self._say_once(f"{type(error).__name__}: {error}")
            return None

    def _say_once(self, what: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            log.warning("telemetry: %s: %s; tried again every %g s, not logged again", self._name, what, PAUSE_S)


def exporters_from_environment() -> list[SpanExporter]:
    """An OTLP/HTTP exporter where OpenTelemetry's standard environment variables name an endpoint, else nothing.

    https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/ has the variables: endpoint,
    headers, timeout and compression are read by the exporter itself.
    """
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if is_export_off() or not any(os.environ.get(name) for name in endpoints):
        return []
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return [OTLPSpanExporter()]


def is_export_off() -> bool:
    """Whether OpenTelemetry's standard environment variables forbid to send spans."""
    return (
        os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
        or os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none"
    )
