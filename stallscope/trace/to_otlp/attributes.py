"""Rows of tables to the attributes of spans that say the same: the inverse of ``requests``, ``clients`` and ``gpu``.

A row is a dictionary by the columns of ``schema``; what is null is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from stallscope.trace.configuration import RESOURCE_COLUMNS
from stallscope.trace.gpu import COLUMNS as GPU_COLUMNS
from stallscope.trace.reserved import UNKNOWN
from stallscope_telemetry import names
from stallscope_telemetry.records import RequestInfo
from stallscope_telemetry.spans import Attributes

Row = Mapping[str, Any]

_REQUEST_COLUMNS = {
    "handle": names.HANDLE,
    "tenant_source": names.TENANT_SOURCE,
    "adapter": names.ADAPTER,
    "priority": names.PRIORITY,
    "session": names.SESSION,
    "predecessor": names.PREDECESSOR,
    "retry_of": names.RETRY_OF,
    "prompt_tokens": names.USAGE_PROMPT,
    "cached_tokens": names.CACHED_TOKENS,
    "prefix": names.PREFIX,
    "max_tokens": names.REQUEST_MAX_TOKENS,
    "output_tokens": names.USAGE_COMPLETION,
    "preemptions": names.PREEMPTIONS,
    "state": names.STATE,
    "finish_reason": names.FINISH_REASON,
}
_SINCE_ARRIVAL = {"queued": names.QUEUED, "scheduled": names.SCHEDULED}
_LATENCIES = {"scheduled": names.LATENCY_QUEUE, "first_token": names.LATENCY_TTFT, "end": names.LATENCY_E2E}
_STATIONS = ("arrival", "queued", "scheduled", "first_token", "end")


def resource_attributes(row: Row) -> Attributes:
    """Of a row of ``replicas``."""
    attributes: Attributes = {names.SERVICE_NAME: row["engine"] or "stallscope", names.REPLICA: row["replica"]}
    attributes |= {name: row[column] for column, name in RESOURCE_COLUMNS.items() if row[column] is not None}
    attributes[names.SINCE] = row["since"]
    return attributes


def request_info(row: Row, handle: int) -> RequestInfo:
    """What a step says of a request that joined, of a row of ``requests``."""
    return RequestInfo(
        handle=handle,
        request_id=row["request"],
        arrival_ns=row["arrival"],
        prompt_tokens=row["prompt_tokens"] or 0,
        max_tokens=row["max_tokens"] or 0,
        tenant=_tenant(row),
        tenant_source=row["tenant_source"] or "",
        priority=row["priority"] or 0,
        session=row["session"] or "",
        predecessor=row["predecessor"] or "",
        retry_of=row["retry_of"] or "",
        trace_id=trace_number(row["trace_id"]) or 0,
    )


def request_attributes(row: Row, gaps: Sequence[int]) -> Attributes:
    """Of a row of ``requests``; ``gaps`` are start, length and count of each of its gaps, one after the other."""
    arrival = row["arrival"]
    attributes: Attributes = {names.REQUEST_ID: row["request"]}
    if _tenant(row):
        attributes[names.TENANT] = row["tenant"]
    attributes |= {name: row[column] for column, name in _REQUEST_COLUMNS.items() if row[column] is not None}
    for column, name in _SINCE_ARRIVAL.items():
        if row[column] is not None:
            attributes[name] = row[column] - arrival
    for column, name in _LATENCIES.items():
        if row[column] is not None:
            attributes[name] = (row[column] - arrival) / 1e9
    if row["delivered"] is not None and row["end"] is not None:
        attributes[names.DELIVERED] = row["delivered"] - row["end"]
    if row["first_token"] is not None:
        attributes[names.TOKEN_TIMES] = str(row["first_token"] - arrival)
    if gaps:
        offsets = (value if at % 3 else value - arrival for at, value in enumerate(gaps))
        attributes[names.GAPS] = ",".join(map(str, offsets))
    if row["trace_id"] is None:
        attributes[names.UNTRACED] = True
    return attributes


def request_events(row: Row) -> list[tuple[str, int]]:
    """Name and time of each station that the request got to, but for its arrival and end."""
    return [(name, row[name]) for name in ("queued", "scheduled", "first_token") if row[name] is not None]


def last_known(row: Row) -> int:
    """When a request ended, or else was last known to get on."""
    return int(max(row[name] for name in _STATIONS if row[name] is not None))


def client_attributes(row: Row) -> Attributes:
    """Of a row of ``clients``."""
    attributes: Attributes = {
        names.REQUEST_ID: row["request"],
        names.TENANT: row["tenant"] or "",
        names.CLIENT_STATUS: row["status"],
    }
    if row["output_tokens"] is not None:
        attributes[names.USAGE_COMPLETION] = row["output_tokens"]
    if row["late_ns"]:
        attributes[names.CLIENT_LATE] = row["late_ns"]
    if row["first_token"] is not None:
        # Of the gaps, tables know the longest.
        gaps = [row["first_token"] - row["sent"], row["longest_gap_ns"]]
        attributes[names.TOKEN_TIMES] = ",".join(str(gap) for gap in gaps if gap is not None)
    if row["trace_id"] is None:
        attributes[names.UNTRACED] = True
    return attributes


def gpu_attributes(row: Row) -> Attributes:
    """Of a row of ``gpu``."""
    attributes: Attributes = {names.GPU_DEVICE: row["device"]}
    return attributes | {name: row[column] for column, name in GPU_COLUMNS.items() if row[column] is not None}


def trace_number(trace_id: str | None) -> int | None:
    """A trace id as a number; one that is none of OpenTelemetry's (a label, say) gets one that is always the same."""
    if trace_id is None:
        return None
    try:
        number = int(trace_id, 16) if len(trace_id) == 32 else 0
    except ValueError:
        number = 0
    return number or int.from_bytes(hashlib.blake2b(trace_id.encode(), digest_size=16).digest())


def _tenant(row: Row) -> str:
    return "" if row["tenant"] in (None, UNKNOWN) else str(row["tenant"])
