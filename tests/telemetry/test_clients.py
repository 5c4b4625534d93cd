"""Client spans: what they carry, and that the server's span is their child."""

from __future__ import annotations

import random

from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from stallscope_telemetry import names
from stallscope_telemetry.clients import Caller, ClientRecord, client_attributes, client_span

RECORD = ClientRecord(Caller(7, 9), "chat-1", "chat", 20, 5, 1_000, 1_500, 9_000, "ok", 200, [2_000, 2_300, 2_300], 3)


def test_a_span_lasts_from_the_sending_to_the_end_and_has_the_callers_ids() -> None:
    span = client_span(RECORD, Resource({}))
    assert (span.name, span.kind, span.start_time, span.end_time) == ("llm_client", SpanKind.CLIENT, 1_500, 9_000)
    context = span.get_span_context()
    assert context is not None
    assert (context.trace_id, context.span_id) == (7, 9)


def test_a_traceparent_is_one_that_opentelemetry_reads() -> None:
    caller = Caller.draw(random.Random(1))
    extracted = TraceContextTextMapPropagator().extract({"traceparent": caller.traceparent})
    (remote,) = extracted.values()
    context = remote.get_span_context()  # type: ignore[attr-defined]
    assert (context.trace_id, context.span_id, context.trace_flags.sampled) == (caller.trace_id, caller.span_id, True)


def test_token_times_begin_at_the_sending_and_lateness_is_before_it() -> None:
    attributes = client_attributes(RECORD)
    assert attributes[names.TOKEN_TIMES] == "500,300,0"
    assert attributes[names.CLIENT_LATE] == 500
    assert attributes[names.USAGE_COMPLETION] == 3


def test_what_did_not_happen_is_left_out() -> None:
    attributes = client_attributes(ClientRecord(Caller(7, 9), "chat-1", "chat", 20, 5, 10, 10, 20, "unreachable"))
    assert not {names.TOKEN_TIMES, names.HTTP_STATUS, names.CLIENT_LATE, names.RETRY_OF} & attributes.keys()
    assert attributes[names.USAGE_COMPLETION] == 0
