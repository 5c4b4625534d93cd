"""What rules have in common: that something lasts, what a query finds, and a mechanism in words."""

from __future__ import annotations

from dataclasses import replace

from stallscope.alerts import settings as s
from stallscope.alerts.quantities import Counted
from stallscope.alerts.texts import Found, Text
from stallscope.alerts.thresholds import Threshold
from stallscope.views.words import MECHANISM_WORDS

# Mechanisms by which a tenant holds up others.
BLAMED = (
    "step_boundary",
    "prefill_queue",
    "kv_pinning",
    "slot_exhaustion",
    "head_of_line",
    "policy",
    "prefill_interference",
    "decode_drag",
    "prefill_priority",
    "preemption",
    "recompute",
    "cache_eviction",
)


def lasting(label: str, rises: str) -> str:
    """That a counter rose at several scrapes: what it counts goes on."""
    return f"and on ({label}) ({rises} >= {s.RISES})"


def found(query: str, given: str, label: str, otherwise: str) -> Found:
    return Found(f"sort_desc(topk(3, {query}))", given, label, otherwise)


def mechanism(query: str, given: str) -> Found:
    words = {name: MECHANISM_WORDS[name] for name in BLAMED}
    return Found(f"topk(1, {query})", given, "mechanism", "by what, the command tells", words)


def amounts(query: str, given: str) -> Found:
    """The mechanisms that a query has above a thousandth, and how much each."""
    return replace(found(f"{query} > 0.001", given, "mechanism", "see the metric"), valued=True)


def reason(threshold: Threshold, quantity: Counted) -> Text:
    return (threshold.reason(quantity), ".")
