"""What request spans of other engines say in other words than ours: when a request moved on, whose it is, what is
missing.

vLLM's ``llm_request`` spans (scope ``vllm.tracing.otel``, seen with 0.32) carry durations in seconds; the times of its
stations follow from them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from stallscope.trace.otlp.spans import Attributes
from stallscope.trace.reserved import tenant_name
from stallscope_telemetry import names

PREFILL_TIME = "gen_ai.latency.time_in_model_prefill"
# Where clients and gateways put the tenant, the first that there is; all of these are claims.
TENANT_ATTRIBUTES = ("tenant.id", "enduser.id")
TENANT_KEYS = ("stallscope", "tenant")  # of tracestate
MOST_TENANT_CHARACTERS = 256
_MOST_S = 1e7
_THRESHOLD = re.compile(r"(?:^|,)\s*ot=(?:[^,]*;)?th:([0-9a-f]{1,14})(?:[;,]|\s*$)")


@dataclass(frozen=True, slots=True)
class Stations:
    """When a request was queued, first scheduled, and answered (ns), None where that is not told."""

    queued: int | None
    scheduled: int | None
    first_token: int | None


def stations(attributes: Attributes, arrival: int) -> Stations:
    """What durations in seconds say of when a request moved on.

    The first token is counted from the arrival, the rest backwards from it: queueing and prefill are the engine's own
    clock, and what lies before them is the way to it.
    """
    ttft, queue, prefill = (
        _seconds(attributes, name) for name in (names.LATENCY_TTFT, names.LATENCY_QUEUE, PREFILL_TIME)
    )
    first = None if ttft is None else arrival + _ns(ttft)
    if first is not None and prefill is not None:
        scheduled = max(first - _ns(prefill), arrival)
        return Stations(arrival if queue is None else max(scheduled - _ns(queue), arrival), scheduled, first)
    return Stations(arrival, None if queue is None else arrival + _ns(queue), first)


def claimed_tenant(attributes: Attributes, trace_state: str) -> tuple[str, str]:
    """Whose the request is, and who said so; "" twice where nobody did."""
    for name in TENANT_ATTRIBUTES:
        value = attributes.get(name)
        if isinstance(value, str) and value.strip():
            return tenant_name(value.strip()[:MOST_TENANT_CHARACTERS]), f"claim:{name}"
    if trace_state:
        entries = dict(reversed([one.strip().partition("=")[::2] for one in trace_state.split(",")]))
        for key in TENANT_KEYS:
            if value := entries.get(key, "").strip():
                return tenant_name(value[:MOST_TENANT_CHARACTERS]), "claim:tracestate"
    return "", ""


def sampled_share(trace_state: str) -> float:
    """The share of its like that a span stands for: 1 unless it was sampled by a threshold.

    https://opentelemetry.io/docs/specs/otel/trace/tracestate-probability-sampling/ has the format (``ot=th:``).
    """
    found = _THRESHOLD.search(trace_state) if "ot=" in trace_state else None
    return 1.0 - int(found[1].ljust(14, "0"), 16) / (1 << 56) if found else 1.0


def engine_of(attributes: Attributes) -> str:
    """The engine that a resource is of, where it says so without meaning to; "" where not."""
    return "vllm" if any(name.startswith("vllm.") for name in attributes) else ""


def _seconds(attributes: Attributes, name: str) -> float | None:
    value = attributes.get(name)
    sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if sound and 0 <= value < _MOST_S else None  # type: ignore[arg-type, operator]


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
