"""Requests as their clients saw them, to spans in a file of their own: what a load driver adds to an engine's trace."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

from stallscope_telemetry import __version__, names
from stallscope_telemetry.files import OtlpFileExporter
from stallscope_telemetry.spans import Attributes

_SCOPE = InstrumentationScope(names.SCOPE, __version__)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


@dataclass(frozen=True, slots=True)
class Caller:
    """Ids of a client's span, which its request takes along, so that the server's span becomes its child."""

    trace_id: int
    span_id: int

    @classmethod
    def draw(cls, ids: random.Random) -> Caller:
        return cls(ids.getrandbits(128) or 1, ids.getrandbits(64) or 1)  # 0 means "no id"

    @property
    def traceparent(self) -> str:
        """The header of W3C Trace Context, sampled: https://www.w3.org/TR/trace-context/#traceparent-header"""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """One request that has ended for its client. Times are ns since the Unix epoch.

    ``due_ns`` is when it should have been sent. ``token_times_ns`` holds one time a token received; ``output_tokens``
    is what the server counted, 0 where it did not. ``http_status`` is 0 where there was no answer.
    """

    caller: Caller
    request_id: str
    tenant: str
    prompt_tokens: int
    max_tokens: int
    due_ns: int
    sent_ns: int
    end_ns: int
    status: str
    http_status: int = 0
    token_times_ns: Sequence[int] = ()
    output_tokens: int = 0
    priority: int = 0
    session: str = ""
    predecessor: str = ""
    retry_of: str = ""

    @property
    def late_ns(self) -> int:
        """How late the client was itself: a slow client must not be taken for a slow server."""
        return max(self.sent_ns - self.due_ns, 0)

    @property
    def tokens(self) -> int:
        """Output tokens, by whoever counted them."""
        return self.output_tokens or len(self.token_times_ns)


class ClientFile:
    """A new trace file of client spans. Raises what ``OtlpFileExporter`` raises."""

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self._exporter = OtlpFileExporter(path)
        # No replica: which one served a request is not the client's to know.
        self._resource = Resource({names.SERVICE_NAME: "stallscope-load", names.MODEL: model})

    def write(self, record: ClientRecord) -> None:
        self._exporter.export([client_span(record, self._resource)])

    def flush(self) -> None:
        """Makes what was written so far readable."""
        self._exporter.force_flush()

    def close(self) -> None:
        self._exporter.shutdown()


def client_span(record: ClientRecord, resource: Resource) -> ReadableSpan:
    """The span of a request as its client saw it: from the sending to the end of the answer."""
    caller = record.caller
    return ReadableSpan(
        names.CLIENT_SPAN,
        context=SpanContext(caller.trace_id, caller.span_id, is_remote=False, trace_flags=_SAMPLED),
        resource=resource,
        attributes=client_attributes(record),
        kind=SpanKind.CLIENT,
        start_time=record.sent_ns,
        end_time=record.end_ns,
        instrumentation_scope=_SCOPE,
    )


def client_attributes(record: ClientRecord) -> Attributes:
    """Attributes of a client span; empty ones are left out."""
    attributes: Attributes = {
        names.REQUEST_ID: record.request_id,
        names.TENANT: record.tenant,
        names.USAGE_PROMPT: record.prompt_tokens,
        names.USAGE_COMPLETION: record.tokens,
        names.REQUEST_MAX_TOKENS: record.max_tokens,
        names.CLIENT_STATUS: record.status,
    }
    optional: tuple[tuple[str, int | str], ...] = (
        (names.CLIENT_LATE, record.late_ns),
        (names.HTTP_STATUS, record.http_status),
        (names.PRIORITY, record.priority),
        (names.SESSION, record.session),
        (names.PREDECESSOR, record.predecessor),
        (names.RETRY_OF, record.retry_of),
    )
    attributes.update({name: value for name, value in optional if value})
    times = record.token_times_ns
    if times:
        gaps = [times[0] - record.sent_ns, *(later - sooner for sooner, later in pairwise(times))]
        attributes[names.TOKEN_TIMES] = ",".join(map(str, gaps))
    return attributes
