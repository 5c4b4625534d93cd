"""Requests of engines that tell nothing of their batches: what their own spans say of their latency.

For the histograms of a watch only: who stalled whom there is for ``analyze`` to say, once the requests have ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stallscope.trace.decode import RequestSpan
from stallscope.trace.plain_spans import stations
from stallscope.trace.reserved import UNKNOWN
from stallscope_telemetry import names


@dataclass(frozen=True, slots=True)
class PlainRequest:
    """``ttft_s``: None where the span does not tell."""

    tenant: str
    ttft_s: float | None
    e2e_s: float


def plain_requests(spans: Iterable[RequestSpan]) -> list[PlainRequest]:
    """Requests that have ended, as their spans tell them."""
    return [
        PlainRequest(
            one.text(names.TENANT) or one.claim[0] or UNKNOWN,
            None if (first := _first_token(one)) is None else max(first - one.arrival, 0) / 1e9,
            max(one.end - one.arrival, 0) / 1e9,
        )
        for one in spans
    ]


def _first_token(span: RequestSpan) -> int | None:
    return stations(span.attributes, span.arrival).first_token
