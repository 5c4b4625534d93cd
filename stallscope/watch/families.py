"""Every metric that a watch exposes: names, labels, units and meaning; alert rules, boards and docs are made from it.

Names follow Prometheus: base units, counters end in ``_total``. Tenants are as the telemetry names them; ``(other)`` is
all those that have no series of their own, ``(unknown)`` those whom nothing names.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """As in OpenMetrics."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    """``name`` as in PromQL, a histogram's without ``_bucket``; ``unit`` as in OpenMetrics ("" for none)."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    unit: str
    help: str


def _counter(name: str, labels: str, unit: str, text: str) -> Family:
    return Family(name, Kind.COUNTER, tuple(labels.split()), unit, text)


def _gauge(name: str, labels: str, unit: str, text: str) -> Family:
    return Family(name, Kind.GAUGE, tuple(labels.split()), unit, text)


def _histogram(name: str, labels: str, unit: str, text: str) -> Family:
    return Family(name, Kind.HISTOGRAM, tuple(labels.split()), unit, text)


# --- who stalls whom ----------------------------------------------------------------------------------------------
BLAME = _counter(
    "stallscope_blame_seconds_total",
    "victim culprit mechanism",
    "seconds",
    "Seconds that requests of the victim waited beyond usual, where a diagnosis lays that at the culprit's door.",
)
STALLED = _counter(
    "stallscope_stalled_seconds_total",
    "victim",
    "seconds",
    "Seconds that stalled requests waited beyond usual, or beyond the SLO if that is more, whoever did it.",
)
JUDGED = _counter(
    "stallscope_judged_seconds_total",
    "replica verdict",
    "seconds",
    "Stalled seconds by what the diagnosis says of them: noisy_neighbor, engine_stall, overload, ...",
)
INCIDENTS = _counter(
    "stallscope_incidents_total", "verdict", "", "Incidents, each counted once, when its verdict is first known."
)
# --- tenants ------------------------------------------------------------------------------------------------------
TTFT = _histogram(
    "stallscope_ttft_seconds", "tenant", "seconds", "From a request's arrival at the engine to its first token."
)
ITL = _histogram("stallscope_itl_seconds", "tenant", "seconds", "Between two tokens of a request, each gap counted.")
E2E = _histogram(
    "stallscope_e2e_seconds", "tenant", "seconds", "From a request's arrival at the engine to its last token."
)
REQUESTS = _counter("stallscope_requests_total", "tenant", "", "Requests that arrived at the engine.")
TOKENS = _counter(
    "stallscope_tokens_total", "tenant phase", "", "Tokens computed: prefill (recomputed ones among them), or decode."
)
RECOMPUTED = _counter(
    "stallscope_recomputed_tokens_total", "tenant", "", "Tokens computed again after a preemption had thrown them away."
)
PREEMPTIONS = _counter("stallscope_preemptions_total", "tenant", "", "Preemptions of the tenant's requests.")
STEP_TIME = _counter(
    "stallscope_step_seconds_total",
    "tenant",
    "seconds",
    "Step time that the tenant's tokens cost, by the cost model; what steps cost in any case is nobody's.",
)
KV = _counter(
    "stallscope_kv_block_seconds_total", "tenant", "", "KV blocks that the tenant's requests held, times seconds."
)
OLDEST_WAIT = _gauge(
    "stallscope_oldest_wait_seconds", "tenant", "seconds", "Age of the oldest request that has no first token yet."
)
# --- replicas -----------------------------------------------------------------------------------------------------
STEPS = _counter("stallscope_steps_total", "replica", "", "Iterations seen.")
STEPS_LOST = _counter("stallscope_steps_lost_total", "replica", "", "Iterations missing between those that were seen.")
DROPPED = _counter(
    "stallscope_dropped_spans_total", "replica", "", "Spans that the engine's telemetry dropped, as it says itself."
)
COVERAGE = _gauge(
    "stallscope_coverage_ratio",
    "replica",
    "ratio",
    "Share of the last minute's iterations of which the batch is known.",
)
RUNNING = _gauge("stallscope_running_requests", "replica", "", "Requests in the batch.")
WAITING = _gauge("stallscope_waiting_requests", "replica", "", "Requests in the queue.")
KV_USED = _gauge("stallscope_kv_used_blocks", "replica", "", "KV blocks that requests hold.")
KV_TOTAL = _gauge("stallscope_kv_total_blocks", "replica", "", "KV blocks there are.")
BUSY = _counter("stallscope_busy_seconds_total", "replica", "seconds", "Time with a step under way.")
HOST_GAP = _counter(
    "stallscope_host_gap_seconds_total", "replica", "seconds", "Time between steps though requests were there."
)
UNEXPLAINED = _counter(
    "stallscope_unexplained_seconds_total",
    "replica",
    "seconds",
    "Step time beyond what the batches explain, by the cost model.",
)
THROTTLED = _counter(
    "stallscope_gpu_throttled_seconds_total",
    "replica device reason",
    "seconds",
    "Time in which the GPU said that its clocks were held down; by thermal, power or other.",
)
LAST_SEEN = _gauge(
    "stallscope_last_span_timestamp_seconds", "replica", "seconds", "When the latest span ended, on the engine's clock."
)
# --- the watch itself ---------------------------------------------------------------------------------------------
LAG = _gauge("stallscope_watch_lag_seconds", "", "seconds", "How far behind its spans the diagnosis is.")
SERIES = _gauge("stallscope_series", "", "", "Series exposed, of the budget.")
FOLDED = _counter(
    "stallscope_folded_values_total", "label", "", "Values of a label that were counted as (other), for the budget."
)
RECEIVED = _counter("stallscope_received_spans_total", "", "", "Spans that the collector has taken, and has on disk.")
REFUSED = _counter("stallscope_refused_spans_total", "", "", "Spans that it refused as unsound.")
UNWATCHED = _counter(
    "stallscope_unwatched_batches_total", "", "", "Batches that are kept on disk, but that the diagnosis has missed."
)

FAMILIES: tuple[Family, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Family))

OTHER = "(other)"
# Upper bounds, s; a watch adds those of its SLOs, so that the share of requests within one is exact.
BUCKETS: dict[str, tuple[float, ...]] = {
    TTFT.name: (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
    ITL.name: (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8),
    E2E.name: (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0),
}
SCRAPE_S, WINDOW_S, EVALUATION_S = 10, 5, 10  # of the latency budget: a page within 60 s of a lasting stall's start
