"""`write_otlp`: a trace to a file of OTLP, a replica after the other, and of each a few thousand steps at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.errors import UsageError
from stallscope.trace.model import Trace
from stallscope.trace.to_otlp.attributes import (
    Row,
    client_attributes,
    gpu_attributes,
    last_known,
    request_attributes,
    request_events,
    request_info,
    resource_attributes,
    trace_number,
)
from stallscope.trace.to_otlp.batches import Batches, Change
from stallscope.trace.to_otlp.replica import ReplicaTables, ints
from stallscope.trace.to_otlp.rows import Ints
from stallscope_telemetry import __version__, names
from stallscope_telemetry.records import RequestState, StepRecord
from stallscope_telemetry.spans import Attributes, step_attributes

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan

Progress = Callable[[int, int], None]  # steps and requests written so far, and those there are

_STEPS_AT_ONCE = 4096
_ROWS_AT_ONCE = 512
_NOTHING = Change((), None, [], [], [], [], [], [], [], is_unknown=False)
_THRESHOLD_DIGITS = 14  # of a sampling threshold in ``tracestate``: a share of 16^14


def write_otlp(trace: Trace, path: Path, progress: Progress | None = None, *, named: str = "") -> int:
    """Writes all of a trace's tables as spans into a new file, compressed by its suffix (``files.SUFFIXES``), or that
    of ``named``.

    Returns how many rows of residency were left out: those that are estimates, beside others that are not, can't be
    told apart in spans. Where all are estimates, they are estimated again by who reads it.
    Raises UsageError where the file exists, or can't be written.
    """
    from stallscope_telemetry.files import OtlpFileExporter

    try:
        exporter = OtlpFileExporter(path, named)
        writer = _Writer(trace, progress)
        try:
            spans = writer.spans()
            while lot := list(islice(spans, _ROWS_AT_ONCE)):
                exporter.export(lot)
        finally:
            exporter.shutdown()
    except ValueError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); check the path and its rights") from error
    return writer.left_out


class _Writer:
    """Makes the spans, and counts."""

    def __init__(self, trace: Trace, progress: Progress | None) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self.left_out = 0
        self._trace = trace
        self._resource_of: Callable[[Attributes], Resource] = Resource
        self._scope = InstrumentationScope(names.SCOPE, __version__)
        self._ids = random.Random(trace.source)  # the same trace gives the same file
        self._progress = progress
        self._done = 0
        self._total = sum(len(trace.columns(table, ["replica"])) for table in ("steps", "requests"))

    def spans(self) -> Iterator[ReadableSpan]:
        for name in self._replicas():
            yield from self._spans_of(ReplicaTables.of(self._trace, name))
        resource = self._resource_of({names.SERVICE_NAME: "stallscope-load"})
        for row in _rows(self._trace.tables["clients"]):
            trace_id = trace_number(row["trace_id"]) or self._ids.getrandbits(128)
            yield self._span(names.CLIENT_SPAN, resource, client_attributes(row), row["sent"], row["end"], trace_id)

    def _replicas(self) -> list[str]:
        tables = ("steps", "requests", "gpu")
        columns = [self._trace.columns(table, ["replica"])["replica"].cast(pa.string()) for table in tables]
        names_of: list[str] = pc.unique(
            pa.chunked_array([chunk for one in columns for chunk in one.chunks])
        ).to_pylist()
        return names_of

    # --- a replica ------------------------------------------------------------------------------------------------

    def _spans_of(self, replica: ReplicaTables) -> Iterator[ReadableSpan]:
        """Steps, requests and samples, roughly by the time when each ended."""
        resources = _Resources(replica, self._resource_of)
        requests = self._request_spans(replica, resources)
        samples = self._sample_spans(replica, resources)
        if not replica.is_estimated:
            batches, left_out = replica.batches()
            self.left_out += left_out
            begin = 0
            for table in replica.step_tables(_STEPS_AT_ONCE):
                yield from self._step_spans(replica, resources, batches, begin, table)
                begin += len(table)
                until = pc.max(table["ready"]).as_py()
                yield from _until(requests, until)
                yield from _until(samples, until)
                self._advance(len(table))
        yield from _until(requests, None)
        yield from _until(samples, None)

    def _step_spans(
        self, replica: ReplicaTables, resources: _Resources, batches: Batches | None, begin: int, table: pa.Table
    ) -> Iterator[ReadableSpan]:
        end = begin + len(table)
        changes: Iterable[Change] = [_NOTHING] * len(table)
        if batches is not None:
            codes = batches.named(begin, end)
            told = zip(codes.tolist(), replica.requests.take(codes).to_pylist(), strict=True)
            infos = {code: request_info(row, int(replica.handles[code])) for code, row in told}
            changes = batches.changes(begin, end, infos)
        dropped, configuration = replica.dropped[begin:end].tolist(), resources.of_steps(table).tolist()
        trace_id = self._ids.getrandbits(128)
        for row, change, lost, number in zip(table.to_pylist(), changes, dropped, configuration, strict=True):
            if change.keyframe is not None:
                trace_id = self._ids.getrandbits(128)
            attributes = _step_attributes(row, change, lost)
            resource = resources.configurations[number]
            yield self._span(names.STEP_SPAN, resource, attributes, row["scheduled"], row["ready"], trace_id)

    def _request_spans(self, replica: ReplicaTables, resources: _Resources) -> Iterator[tuple[int, ReadableSpan]]:
        """With the times by which they are ordered."""
        gaps, begins = replica.gaps
        order = resources.order_of_requests()
        share = replica.kept_share if replica.is_estimated else 1.0
        for low in range(0, len(order), _ROWS_AT_ONCE):
            codes = order[low : low + _ROWS_AT_ONCE]
            for code, row in zip(codes.tolist(), replica.requests.take(codes).to_pylist(), strict=True):
                attributes = request_attributes(row, gaps[begins[code] : begins[code + 1]].ravel().tolist())
                trace_id = trace_number(row["trace_id"]) or self._ids.getrandbits(128)
                end = last_known(row)
                span = self._span(
                    names.REQUEST_SPAN, resources.of_model(row["model"]), attributes, row["arrival"], end, trace_id,
                    request_events(row), share,
                )  # fmt: skip
                yield end, span
            self._advance(len(codes))

    def _sample_spans(self, replica: ReplicaTables, resources: _Resources) -> Iterator[tuple[int, ReadableSpan]]:
        trace_id = self._ids.getrandbits(128)
        for row in _rows(replica.table("gpu").sort_by("time")):
            time = row["time"]
            yield time, self._span(names.GPU_SPAN, resources.any(), gpu_attributes(row), time, time, trace_id)

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)

    # --- a span ---------------------------------------------------------------------------------------------------

    def _span(
        self,
        name: str,
        resource: Resource,
        attributes: Attributes,
        start: int,
        end: int,
        trace_id: int,
        events: Iterable[tuple[str, int]] = (),
        kept_share: float = 1.0,
    ) -> ReadableSpan:
        from opentelemetry.sdk.trace import Event, ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState

        state = TraceState([("ot", f"th:{_threshold(kept_share)}")]) if kept_share < 1 else None
        flags = TraceFlags(TraceFlags.SAMPLED)
        kinds = {names.REQUEST_SPAN: SpanKind.SERVER, names.CLIENT_SPAN: SpanKind.CLIENT}
        return ReadableSpan(
            name,
            context=SpanContext(trace_id, self._ids.getrandbits(64) or 1, False, flags, state),
            resource=resource,
            attributes=attributes,
            events=[Event(event, timestamp=time) for event, time in events],
            kind=kinds.get(name, SpanKind.INTERNAL),
            start_time=start,
            end_time=end,
            instrumentation_scope=self._scope,
        )


def _threshold(share: float) -> str:
    """https://opentelemetry.io/docs/specs/otel/trace/tracestate-probability-sampling/"""
    digits = f"{round((1 - share) * 16**_THRESHOLD_DIGITS):0{_THRESHOLD_DIGITS}x}"
    return digits.rstrip("0") or "0"


def _until(spans: Iterator[tuple[int, ReadableSpan]], time: int | None) -> Iterator[ReadableSpan]:
    """Those up to the first that is later; all where there is no time."""
    for at, span in spans:
        yield span
        if time is not None and at > time:
            return


def _rows(table: pa.Table) -> Iterator[Row]:
    for batch in table.to_batches(_ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _step_attributes(row: Row, change: Change, dropped: int) -> Attributes:
    """Of a row of ``steps``, and what changed in its batch."""
    record = StepRecord(
        step=row["step"],
        scheduled_ns=row["scheduled"],
        dispatched_ns=row["dispatched"],
        ready_ns=row["ready"],
        idle_ns=row["idle_ns"] or 0,
        sched_ns=row["sched_ns"] or 0,
        device_ns=-1 if row["device_ns"] is None else row["device_ns"],
        prefill_tokens=row["prefill_tokens"] or 0,
        decode_tokens=row["decode_tokens"] or 0,
        batch_size=row["batch_size"] or 0,
        running=row["running"] or 0,
        waiting=row["waiting"] or 0,
        kv_used=row["kv_used"] or 0,
        kv_cached=row["kv_cached"] or 0,
        joined=change.joined,
        cached=change.cached,
        chunks=change.chunks,
        decodes=change.decodes,
        waits=change.waits,
        preempted=change.preempted,
        evicted=change.evicted,
        left=change.left,
        keyframe=change.keyframe,
    )
    attributes = step_attributes(record, dropped)
    if change.is_unknown:
        attributes[names.KEYFRAME] = False
    if names.R_WAITS in attributes:
        attributes[names.R_WAITS] = [
            number
            for one in change.keyframe or ()
            if one.state is not RequestState.RUNNING and one.wait_reason is not None
            for number in (one.info.handle, int(one.wait_reason), one.lacking)
        ]
    return attributes


# --- resources ----------------------------------------------------------------------------------------------------


class _Resources:
    """The resources of a replica's spans: one for each configuration, and for other models that requests name."""

    def __init__(self, replica: ReplicaTables, make: Callable[[Attributes], Resource]) -> None:
        self._replica, self._make = replica, make
        self._table = replica.table("replicas").sort_by("since")
        rows = self._table.to_pylist()
        self._attributes = [resource_attributes(row) for row in rows]
        self.configurations = [make(one) for one in self._attributes]
        self._by_model: dict[str | None, Resource] = {}
        for row, resource in zip(rows, self.configurations, strict=True):
            self._by_model.setdefault(row["model"], resource)

    def any(self) -> Resource:
        """Of what is not the engine's."""
        return self.configurations[-1] if self.configurations else self._make({names.REPLICA: self._replica.name})

    def of_model(self, model: str | None) -> Resource:
        if model not in self._by_model:
            other = {name: value for name, value in self._attributes[0].items() if name != names.MODEL}
            self._by_model[model] = self._make(other | ({names.MODEL: model} if model is not None else {}))
        return self._by_model[model]

    def of_steps(self, steps: pa.Table) -> Ints:
        """The configuration of each step: the last that had begun, and says the same of blocks and budget."""
        scheduled = ints(steps["scheduled"])
        said = {"kv_total": ints(steps["kv_total"], -1), "max_num_batched_tokens": ints(steps["budget"], -1)}
        began = np.searchsorted(ints(self._table["since"]), scheduled, side="right") - 1
        found = np.maximum(began, 0)
        agrees = {name: ints(self._table[name], -1) for name in said}
        for number in range(len(self._table)):
            same = np.logical_and.reduce([agrees[name][number] == column for name, column in said.items()])
            wrong = np.logical_or.reduce([agrees[name][found] != column for name, column in said.items()])
            found[same & (number <= began) & (wrong | (number > found))] = number
        return found

    def order_of_requests(self) -> Ints:
        """By the time when each was last known to get on; where nothing else says what the engine is, its own first."""
        requests = self._replica.requests
        last = np.max(
            [ints(requests[name]) for name in ("arrival", "queued", "scheduled", "first_token", "end")], axis=0
        )
        if not self._replica.is_estimated:
            return np.argsort(last, kind="stable")
        own = self._table["model"].cast(pa.string())[0]
        other = ~pc.equal(requests["model"].cast(pa.string()), own).fill_null(not own.is_valid).to_numpy()
        return np.lexsort((last, other))
