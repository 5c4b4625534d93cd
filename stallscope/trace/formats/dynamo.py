"""NVIDIA Dynamo's files: a forward pass becomes a step with its sums, a request trace a request.

Forward passes (``dynamo.fpm.trace.v1``) are described on docs.nvidia.com/dynamo under "Forward Pass Metrics Trace
Reference" and in ``ai-dynamo`` 1.6.1 (``dynamo/common/forward_pass_metrics.py``); requests
(``dynamo.request.trace.v1``) under "Request Trace Reference" and in ``lib/llm/src/request_trace/types.rs``. Written
from those: never seen from a live engine.
"""

from __future__ import annotations

from stallscope.trace.formats.records import Converted, Record, amount, milliseconds, part, step_span, text
from stallscope.trace.otlp.spans import Attributes, Span
from stallscope.trace.plain_spans import PREFILL_TIME
from stallscope_telemetry import names

PRODUCER = "NVIDIA Dynamo"

_PASS, _REQUEST = "dynamo.fpm.trace.v1", "dynamo.request.trace.v1"
_SAMPLED = (
    "sampled_steps",
    "forward passes between samples were not written; set DYN_FPM_MODE=full to have each of them",
)
# Sessions and what a session is of, under the names of several versions, newest first; all are claims.
_TENANT_NAMES = ("session_type_id", "workflow_type_id")
_SESSION_NAMES = ("session_id", "workflow_id")
_FINISH_REASONS = {"tool_calls": "stop", "cancelled": "abort"}


def is_mine(record: Record) -> bool:
    """Whether it is a record of Dynamo's, as written or out of its envelope."""
    return _event(record).get("schema") in (_PASS, _REQUEST)


def convert(record: Record) -> list[Converted]:
    """Nothing where it tells of something else, a tool or a payload. Raises one of ``MALFORMED``."""
    event = _event(record)
    if event["schema"] == _PASS:
        return [_step(event)]
    return [_request(event)] if event.get("event_type") == "request_end" else []


def _event(record: Record) -> Record:
    event = record.get("event")
    return event if isinstance(event, dict) else record


def _step(event: Record) -> Converted:
    told = part(event, "fpm")
    scheduled, queued = part(told, "scheduled_requests"), part(told, "queued_requests")
    wall = milliseconds(told, "wall_time")
    if wall is None:
        raise ValueError("a forward pass without a duration")
    end = amount(event, "observed_at_unix_ms") * 1_000_000
    prefills, decodes = amount(scheduled, "num_prefill_requests", 0), amount(scheduled, "num_decode_requests", 0)
    prefill_tokens = amount(scheduled, "sum_prefill_tokens", 0)
    waiting = amount(queued, "num_prefill_requests", 0) + amount(queued, "num_decode_requests", 0)
    contexts = amount(scheduled, "sum_prefill_kv_tokens", 0) + amount(scheduled, "sum_decode_kv_tokens", 0)
    attributes: Attributes = {
        names.STEP: amount(told, "counter_id"),
        names.PREFILL_TOKENS: prefill_tokens,
        names.DECODE_TOKENS: decodes,
        names.BATCH_SIZE: prefills + decodes,
        names.RUNNING: prefills + decodes,
        names.WAITING: waiting,
        names.KV_USED: contexts + prefill_tokens,
    }
    resource = _resource(_worker(told.get("worker_id")), amount(told, "dp_rank"))
    sampled = event.get("capture_mode") == "sampled"
    return Converted(
        resource, [step_span(end - round(wall * 1e9), end, attributes)], _SAMPLED if sampled else None
    )  # fmt: skip


def _request(event: Record) -> Converted:
    told, context = part(event, "request"), part(event, "agent_context")
    request_id = text(told, "request_id")
    if not request_id:
        raise ValueError("a request without an id")
    arrival = amount(told, "request_received_ms") * 1_000_000
    total = milliseconds(told, "total_time_ms")
    end = amount(event, "event_time_unix_ms") * 1_000_000 if total is None else arrival + round(total * 1e6)
    attributes: Attributes = {
        names.REQUEST_ID: request_id,
        names.USAGE_PROMPT: amount(told, "input_tokens", amount(part(told, "replay"), "input_length", 0)),
        names.USAGE_COMPLETION: amount(told, "output_tokens", 0),
        names.CACHED_TOKENS: amount(told, "cached_tokens", 0),
        # Where nothing says when it was scheduled, it was at once: the steps' sums say when its prompt was computed.
        names.LATENCY_QUEUE: (milliseconds(told, "prefill_wait_time_ms") or 0.0) / 1e3,
    }
    for name, of in (("ttft_ms", names.LATENCY_TTFT), ("prefill_time_ms", PREFILL_TIME)):
        duration = milliseconds(told, name)
        if duration is not None:
            attributes[of] = duration / 1e3
    tenant = next((name for name in _TENANT_NAMES if text(context, name)), None)
    if tenant is not None:
        attributes |= {names.TENANT: text(context, tenant), names.TENANT_SOURCE: f"claim:{tenant}"}
    session = next((text(context, name) for name in _SESSION_NAMES if text(context, name)), None)
    if session is not None:
        attributes[names.SESSION] = session
    reason = text(part(told, "finish_reason_metadata"), "finish_reason")
    if reason:
        attributes[names.FINISH_REASON] = _FINISH_REASONS.get(reason, reason)
    worker = part(told, "worker")
    resource = _resource(_worker(worker.get("decode_worker_id")), amount(worker, "decode_dp_rank", 0))
    return Converted(resource | _model(told), [Span(names.REQUEST_SPAN, "", "", arrival, end, attributes)])


def _worker(value: object) -> str:
    """The worker's id, which passes write as a string and requests as a number."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError("nothing says which worker it was")
    return str(value)


def _resource(worker: str, rank: int) -> Attributes:
    """A replica for each worker and data-parallel rank: each has a scheduler of its own.

    KV is told in tokens, hence blocks of one. Ends are told in ms, so that a step may begin before the last one is
    over; as it does where scheduling is asynchronous.
    """
    return {
        names.REPLICA: f"{worker}/{rank}",
        names.ENGINE: "dynamo",
        names.BLOCK_SIZE: 1,
        names.ASYNC_SCHEDULING: True,
    }


def _model(told: Record) -> Attributes:
    model = text(told, "model")
    return {names.MODEL: model} if model else {}
