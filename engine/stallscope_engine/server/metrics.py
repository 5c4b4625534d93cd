"""What Prometheus scrapes: plain counters that the engine's thread raises, and a collector that reads them.

Names, labels and buckets are vLLM's where the meaning is the same (``vllm/v1/metrics``, 0.32); what is ours, by
tenant, begins with ``stallscope:``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from stallscope_engine.config import EngineConfig
from stallscope_engine.request import Request
from stallscope_telemetry.records import RequestInfo

REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)  # s
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)  # s
TOKEN_GAP_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)  # s
REASONS = ("stop", "length", "abort", "error")

MOST_TENANTS = 20  # with series of their own
OTHER = "(other)"
UNKNOWN = "(unknown)"
_REVIEW_TOKENS = 100_000  # after as many, the tenants that get series of their own are chosen anew
_MOST_WEIGHED = 1_000  # tenants whose recent tokens are counted, so that names nobody heard of cost no memory


class Histogram:
    """Counts by bucket, as Prometheus wants them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it)."""
        names = [*map(str, self._bounds), "+Inf"]
        return [*zip(names, map(float, accumulate(self._counts)), strict=True)]

    @property
    def sum(self) -> float:
        return self._sum


class TenantCounters:
    """Sums of the tenants that use the most, and of all others together.

    A counter must never fall, so a tenant that loses its series leaves them and is counted as other from then on;
    one that gains them begins at 0.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Counter[str]] = {OTHER: Counter()}
        self._recent: Counter[str] = Counter()  # tokens by tenant
        self._until_review = _REVIEW_TOKENS

    def add(self, info: RequestInfo, name: str, amount: float, tokens: int = 0) -> None:
        """Adds ``amount`` to a tenant's counter ``name``; ``tokens`` are what the tenant is weighed by."""
        tenant = info.tenant or UNKNOWN
        sums = self.sums.get(tenant)
        if sums is None and len(self.sums) <= MOST_TENANTS:
            sums = self.sums[tenant] = Counter()
        if sums is None:
            sums = self.sums[OTHER]
        sums[name] += amount  # type: ignore[assignment]  # seconds too
        if tokens:
            if tenant in self._recent or len(self._recent) < _MOST_WEIGHED:
                self._recent[tenant] += tokens
            self._until_review -= tokens
            if self._until_review <= 0:
                self._review()

    def _review(self) -> None:
        """Gives the series of those who use less to those who use at least twice as much."""
        recent = self._recent
        listed = sorted((tenant for tenant in self.sums if tenant != OTHER), key=lambda tenant: recent[tenant])
        others = [tenant for tenant, _ in recent.most_common(MOST_TENANTS) if tenant not in self.sums]
        for least, most in zip(listed, others, strict=False):
            if recent[most] < 2 * recent[least]:
                break
            del self.sums[least]
            self.sums[most] = Counter()
        self._recent = Counter({tenant: tokens // 2 for tenant, tokens in recent.items() if tokens >= 2})
        self._until_review = _REVIEW_TOKENS


class Load(Protocol):
    """What the engine is at, read at scrape time."""

    config: EngineConfig

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def kv_usage(self) -> float: ...


class Metrics(Collector):
    """Counters of one replica. ``tokens`` and ``finished`` are for the engine's thread.

    ``rejected`` counts the requests that found the queue full, on the event loop.
    """

    def __init__(self, model: str, load: Load) -> None:
        self.rejected = 0
        self._labels = (model, "0")
        self._load = load
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generation_tokens = 0
        self._preemptions = 0
        self._finished = dict.fromkeys(REASONS, 0)
        self._first_token = Histogram(FIRST_TOKEN_BUCKETS)
        self._token_gap = Histogram(TOKEN_GAP_BUCKETS)
        self._end_to_end = Histogram(REQUEST_BUCKETS)
        self._queued = Histogram(REQUEST_BUCKETS)
        self._tenants = TenantCounters()

    def tokens(self, request: Request, made: int) -> None:
        """A step brought the last ``made`` (at least 1) output tokens of ``request``."""
        times, info = request.token_times_ns, request.info
        self._generation_tokens += made
        if made == request.output_tokens:
            self._first_token.observe((times[0] - info.arrival_ns) / 1e9)
            self._prompt_tokens += info.prompt_tokens
            self._cached_tokens += request.cached_tokens
            self._tenants.add(info, "prompt_tokens", info.prompt_tokens, info.prompt_tokens)
        elif made < len(times):
            self._token_gap.observe((times[-1] - times[-1 - made]) / 1e9 / made)
        self._tenants.add(info, "generation_tokens", made, made)

    def finished(self, request: Request, reason: str) -> None:
        """``request`` has ended, as one of ``REASONS`` says."""
        info = request.info
        self._finished[reason] += 1
        self._preemptions += request.preemptions
        self._end_to_end.observe((request.end_ns - info.arrival_ns) / 1e9)
        waited_s = ((request.scheduled_ns or request.end_ns) - info.arrival_ns) / 1e9
        self._queued.observe(waited_s)
        self._tenants.add(info, "requests", 1)
        self._tenants.add(info, "queue_time_seconds", waited_s)

    def collect(self) -> Iterator[Metric]:
        """The families, as the counters stand; two of them may be a token apart, since nobody stops the engine."""
        load = self._load
        for name, about, value in (
            ("num_requests_running", "Number of requests in model execution batches.", load.running),
            ("num_requests_waiting", "Number of requests waiting to be processed.", load.waiting),
            ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", load.kv_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", about, labels=("model_name", "engine"))
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, about, count in (
            ("prompt_tokens", "Number of prefill tokens processed.", self._prompt_tokens),
            ("generation_tokens", "Number of generation tokens processed.", self._generation_tokens),
            ("num_preemptions", "Cumulative number of preemption from the engine.", self._preemptions),
            (
                "prefix_cache_queries",
                "Prefix cache queries, in number of queried tokens.",
                self._prompt_tokens if self._load.config.prefix_caching else 0,
            ),
            ("prefix_cache_hits", "Prefix cache hits, in number of cached tokens.", self._cached_tokens),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", about, labels=("model_name", "engine"))
            counter.add_metric(self._labels, count)
            yield counter
        success = CounterMetricFamily(
            "vllm:request_success",
            "Count of successfully processed requests.",
            labels=("model_name", "engine", "finished_reason"),
        )
        for reason, count in self._finished.items():
            success.add_metric((*self._labels, reason), count)
        yield success
        rejections = CounterMetricFamily(
            "vllm:admission_rejections",
            "Number of admission attempts rejected by a queue limit, by reason.",
            labels=("model_name", "reason"),
        )
        rejections.add_metric((self._labels[0], "max_num_queued_reqs"), self.rejected)
        yield rejections
        for name, about, histogram in (
            ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", self._first_token),
            ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", self._token_gap),
            ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", self._end_to_end),
            ("request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", self._queued),
        ):
            family = HistogramMetricFamily(f"vllm:{name}", about, labels=("model_name", "engine"))
            family.add_metric(self._labels, histogram.buckets(), histogram.sum)
            yield family
        yield from self._collect_tenants()

    def _collect_tenants(self) -> Iterator[Metric]:
        sums = [*self._tenants.sums.items()]
        for name, about in (
            ("requests", "Requests that ended."),
            ("prompt_tokens", "Prompt tokens of requests that made a token."),
            ("generation_tokens", "Tokens made."),
            ("queue_time_seconds", "Time from arrival to the first step, summed over requests that ended."),
        ):
            counter = CounterMetricFamily(f"stallscope:tenant_{name}", about, labels=("model_name", "tenant"))
            for tenant, values in sums:
                counter.add_metric((self._labels[0], tenant), values[name])
            yield counter
