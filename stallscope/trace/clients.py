"""Client spans to the table of clients: what was seen outside, joined with the request that it was inside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from stallscope.trace.findings import Findings
from stallscope.trace.schema import TABLES
from stallscope.trace.tables import plain_table

# A list of durations of at most 16 digits, 115 days of ns: beyond is damage.
_TOKEN_TIMES = re.compile(r"[0-9]{1,16}(,[0-9]{1,16})*")


@dataclass(frozen=True, slots=True)
class ClientSpan:
    """A request as its client tells it: times in ns, "" and None where it does not."""

    request_id: str
    trace_id: str
    tenant: str
    sent: int
    end: int
    status: str
    output_tokens: int | None
    late: int
    token_times: str
    source: str


def client_table(spans: Sequence[ClientSpan], requests: pa.Table, findings: Findings) -> pa.Table:
    """One row a client's request, in the order of sending.

    Joined with ``requests`` by trace id, else by request id where one replica alone has it; then ``replica`` and
    ``request`` are those of the request. A request that never reached an engine has no replica.
    """
    by_trace, by_id = _places(requests) if spans else ({}, {})
    rows = []
    seen: set[tuple[str, str, int]] = set()
    for span in sorted(spans, key=lambda span: (span.sent, span.end, span.request_id, span.trace_id)):
        key = (span.trace_id, span.request_id, span.sent)
        if key in seen:
            findings.add("duplicate_client", span.source, "", "client spans that came twice; the first one counts")
            continue
        seen.add(key)
        replica, request = by_trace.get(span.trace_id) or by_id.get(span.request_id) or (None, span.request_id)
        gaps = _durations(span, findings)
        rows.append(
            {
                "replica": replica,
                "request": request,
                "trace_id": span.trace_id or None,
                "tenant": span.tenant or None,
                "sent": span.sent,
                "first_token": span.sent + gaps[0] if gaps else None,
                "end": span.end,
                "status": span.status,
                "output_tokens": span.output_tokens,
                "longest_gap_ns": max(gaps[1:], default=None),
                "late_ns": span.late,
            }
        )
    return plain_table("clients", {name: [row[name] for row in rows] for name in TABLES["clients"].names}, len(rows))


_Place = tuple[str, str]  # replica and request


def _places(requests: pa.Table) -> tuple[dict[str, _Place], dict[str, _Place]]:
    """Where a trace id, and where a request id, is found; an id that several requests share is nowhere."""
    columns = [requests.column(name).to_pylist() for name in ("replica", "request", "trace_id")]
    places = [((replica, request), trace_id) for replica, request, trace_id in zip(*columns, strict=True)]
    return _unique([(trace_id, place) for place, trace_id in places]), _unique([(one[1], one) for one, _ in places])


def _unique(pairs: list[tuple[str | None, _Place]]) -> dict[str, _Place]:
    found: dict[str, _Place] = {}
    shared: set[str] = set()
    for key, place in pairs:
        if key is not None and found.setdefault(key, place) is not place:
            shared.add(key)
    return {key: place for key, place in found.items() if key not in shared}


def _durations(span: ClientSpan, findings: Findings) -> list[int]:
    """From the sending to the first token, then from each to the next."""
    if not span.token_times:
        return []
    if _TOKEN_TIMES.fullmatch(span.token_times):
        durations = list(map(int, span.token_times.split(",")))
        if sum(durations) <= span.end - span.sent:
            return durations
    text = "token times of client spans are no durations within the request, and count as absent"
    findings.add("unsound_value", span.source, "", text)
    return []
