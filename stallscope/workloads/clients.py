"""Requests as their clients saw them: the record of each, its span in a trace file, and the figures of a run."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

import stallscope
from stallscope.errors import UsageError
from stallscope.workloads.traffic import PlannedRequest
from stallscope_telemetry import names
from stallscope_telemetry.files import SUFFIXES, OtlpFileExporter

OK = "ok"
REJECTED = "rejected"  # 429: too many requests
TIMEOUT = "timeout"  # the client lost patience, and went away
DISCONNECTED = "disconnected"  # the answer ended before its end
UNREACHABLE = "unreachable"  # no connection
ERROR = "error"  # an error in the stream, or no stream at all
ABANDONED = "abandoned"  # the driver stopped first: interrupted, or done with waiting

FILE_NAME = "clients.otlp.jsonl.zst"  # in a folder, beside the engine's
_SCOPE = InstrumentationScope(names.SCOPE, stallscope.__version__)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


@dataclass(frozen=True, slots=True)
class Caller:
    """Ids of the client's span, which the request takes along as its ``traceparent``."""

    trace_id: int
    span_id: int

    @property
    def traceparent(self) -> str:
        """The header of W3C Trace Context, sampled: https://www.w3.org/TR/trace-context/#traceparent-header"""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"


def new_caller(ids: random.Random) -> Caller:
    return Caller(ids.getrandbits(128) or 1, ids.getrandbits(64) or 1)


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """One request, from the moment it was due. Times are ns since the Unix epoch.

    ``token_times_ns`` holds one time a token received; ``output_tokens`` is what the server counted, where it did.
    ``http_status`` is 0 where there was no answer.
    """

    planned: PlannedRequest
    caller: Caller
    due_ns: int
    sent_ns: int
    end_ns: int
    status: str
    http_status: int = 0
    token_times_ns: Sequence[int] = ()
    output_tokens: int = 0

    @property
    def late_ns(self) -> int:
        """How late the driver was: a slow client must not be taken for a slow server."""
        return max(self.sent_ns - self.due_ns, 0)

    @property
    def longest_gap_ns(self) -> int | None:
        """Between two tokens; None where there were no two."""
        times = self.token_times_ns
        return max(later - sooner for sooner, later in pairwise(times)) if len(times) > 1 else None


# --- in a trace file ----------------------------------------------------------------------------------------


def open_file(out: Path, force: bool) -> OtlpFileExporter:
    """A new trace file: ``out`` itself, or one for the clients in the folder ``out``.

    Raises UsageError where it exists (unless ``force``) or can't be written.
    """
    path = out if out.name.endswith(SUFFIXES) else out / FILE_NAME
    if path.exists() and not force:
        raise UsageError(f"{path} exists: choose another name, or overwrite it with --force")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if force:
            path.unlink(missing_ok=True)
        return OtlpFileExporter(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be written: {error}") from error


def client_resource(model: str) -> Resource:
    """Who sends client spans. No replica: which one served a request is not the client's to know."""
    return Resource({names.SERVICE_NAME: "stallscope-load", names.MODEL: model})


def client_span(record: ClientRecord, resource: Resource) -> ReadableSpan:
    """The span of a request as its client saw it; the server's request span is its child."""
    caller = record.caller
    return ReadableSpan(
        names.CLIENT_SPAN,
        context=SpanContext(caller.trace_id, caller.span_id, is_remote=False, trace_flags=_SAMPLED),
        resource=resource,
        attributes=_attributes(record),
        kind=SpanKind.CLIENT,
        start_time=record.sent_ns,
        end_time=record.end_ns,
        instrumentation_scope=_SCOPE,
    )


def _attributes(record: ClientRecord) -> dict[str, int | str]:
    planned, times = record.planned, record.token_times_ns
    attributes: dict[str, int | str] = {
        names.REQUEST_ID: planned.request_id,
        names.TENANT: planned.tenant,
        names.USAGE_PROMPT: planned.prompt_tokens,
        names.USAGE_COMPLETION: record.output_tokens or len(times),
        names.REQUEST_MAX_TOKENS: planned.output_tokens,
        names.CLIENT_STATUS: record.status,
    }
    optional: tuple[tuple[str, int | str], ...] = (
        (names.CLIENT_LATE, record.late_ns),
        (names.HTTP_STATUS, record.http_status),
        (names.PRIORITY, planned.priority),
        (names.SESSION, planned.session),
        (names.PREDECESSOR, planned.predecessor),
        (names.RETRY_OF, planned.retry_of),
    )
    attributes.update({name: value for name, value in optional if value})
    if times:
        gaps = [times[0] - record.sent_ns, *(later - sooner for sooner, later in pairwise(times))]
        attributes[names.TOKEN_TIMES] = ",".join(map(str, gaps))
    return attributes


# --- the figures of a run -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figures:
    """What one tenant's clients saw. Quantiles are seconds, None where nothing was measured.

    TTFT and longest gap are of all requests that got so far; end to end is of those that ended well.
    """

    tenant: str
    statuses: Mapping[str, int]
    output_tokens: int
    ttft_p50: float | None
    ttft_p99: float | None
    longest_gap_p99: float | None
    e2e_p50: float | None
    e2e_p99: float | None

    @property
    def sent(self) -> int:
        return sum(self.statuses.values())

    @property
    def ok(self) -> int:
        return self.statuses.get(OK, 0)


@dataclass(frozen=True, slots=True)
class Lateness:
    """How late the driver sent its requests, in seconds."""

    p50: float
    p99: float
    most: float


@dataclass(slots=True)
class Tally:
    """Adds up records as they come, a few numbers each, so that a long run fits in memory."""

    _statuses: dict[str, Counter[str]] = field(default_factory=dict)
    _measured: dict[tuple[str, str], array[int]] = field(default_factory=dict)  # by tenant and what: ns, or tokens
    _late: array[int] = field(default_factory=lambda: array("q"))

    def add(self, record: ClientRecord) -> None:
        tenant, times = record.planned.tenant, record.token_times_ns
        self._statuses.setdefault(tenant, Counter())[record.status] += 1
        self._late.append(record.late_ns)
        self._put(tenant, "tokens", record.output_tokens or len(times))
        if times:
            self._put(tenant, "ttft", times[0] - record.sent_ns)
        if record.longest_gap_ns is not None:
            self._put(tenant, "gap", record.longest_gap_ns)
        if record.status == OK:
            self._put(tenant, "e2e", record.end_ns - record.sent_ns)

    def _put(self, tenant: str, what: str, value: int) -> None:
        self._measured.setdefault((tenant, what), array("q")).append(value)

    def figures(self) -> tuple[Figures, ...]:
        """One for each tenant that sent anything, by name."""
        return tuple(
            Figures(
                tenant,
                dict(statuses),
                sum(self._measured[tenant, "tokens"]),
                self._seconds(tenant, "ttft", 50),
                self._seconds(tenant, "ttft", 99),
                self._seconds(tenant, "gap", 99),
                self._seconds(tenant, "e2e", 50),
                self._seconds(tenant, "e2e", 99),
            )
            for tenant, statuses in sorted(self._statuses.items())
        )

    def lateness(self) -> Lateness:
        """Zeros where nothing was sent."""
        p50, p99, most = np.percentile(self._late, (50, 99, 100)) / 1e9 if self._late else (0.0, 0.0, 0.0)
        return Lateness(float(p50), float(p99), float(most))

    def _seconds(self, tenant: str, what: str, percent: int) -> float | None:
        values = self._measured.get((tenant, what))
        return float(np.percentile(values, percent)) / 1e9 if values else None
