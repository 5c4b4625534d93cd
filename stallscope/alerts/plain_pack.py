"""Rules on what vLLM and SGLang export themselves, for who runs no collector: they see that it is slow, not who did it.

Names as in vLLM 0.32 (vllm/v1/metrics/loggers.py) and in SGLang 0.5.23, which needs --enable-metrics
(sglang/srt/observability/metrics_collector.py). In both, a counter that prometheus-client is given without ``_total``
is exposed with it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from stallscope.alerts import settings as s
from stallscope.alerts.promql import number, selector, span
from stallscope.alerts.quantities import Quantity
from stallscope.alerts.rules import Group, Owner, Rule, Severity
from stallscope.alerts.settings import Limit
from stallscope.alerts.slo import Objective
from stallscope.alerts.texts import Label, Percent, Text, Value
from stallscope.alerts.thresholds import Level, Teacher, Threshold
from stallscope.diagnosis.model import Verdict

# Both label a model; Prometheus adds the instance. vLLM's data-parallel ranks and SGLang's are taken together.
_BY = ("model_name", "instance")
_ANY_STALL = (Verdict.NOISY_NEIGHBOR, Verdict.OVERLOAD, Verdict.ENGINE_STALL, Verdict.SELF_INFLICTED)
_NO_NAMES = "These metrics have no tenants: they can't say who caused it."


@dataclass(frozen=True)
class Engine:
    """What an engine calls things; the histograms without ``_bucket``."""

    name: str
    version: str  # whose sources the names were read in
    queue: str
    kv_usage: str
    preemptions: str
    ttft: str
    itl: str

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.queue, self.kv_usage, self.preemptions, f"{self.ttft}_bucket", f"{self.itl}_bucket")


ENGINES = (
    Engine(
        "vllm",
        "0.32",
        queue="vllm:num_requests_waiting",
        kv_usage="vllm:kv_cache_usage_perc",
        preemptions="vllm:num_preemptions_total",
        ttft="vllm:time_to_first_token_seconds",
        itl="vllm:inter_token_latency_seconds",
    ),
    Engine(
        "sglang",
        "0.5.23",
        queue="sglang:num_queue_reqs",
        kv_usage="sglang:token_usage",
        preemptions="sglang:num_retracted_requests_total",
        ttft="sglang:time_to_first_token_seconds",
        itl="sglang:inter_token_latency_seconds",
    ),
)


@dataclass(frozen=True)
class Gauge:
    """The lowest value of a gauge in a window, the highest of the ranks of an instance."""

    name: str
    window_s: int
    by: tuple[str, ...] = _BY

    def promql(self, *matchers: str) -> str:
        chosen = selector(self.name, *matchers)
        return f"max by ({', '.join(self.by)}) (min_over_time({chosen}[{span(self.window_s)}]))"


@dataclass(frozen=True)
class Rate:
    """How much a counter rises a second."""

    name: str
    window_s: int
    by: tuple[str, ...] = _BY

    def promql(self, *matchers: str) -> str:
        chosen = selector(self.name, *matchers)
        return f"sum by ({', '.join(self.by)}) (rate({chosen}[{span(self.window_s)}]))"


@dataclass(frozen=True)
class Percentile:
    """A percentile of a histogram, interpolated between its bounds."""

    name: str
    quantile: float
    window_s: int
    by: tuple[str, ...] = _BY

    def promql(self, *matchers: str) -> str:
        chosen = selector(f"{self.name}_bucket", *matchers)
        rates = f"sum by (le, {', '.join(self.by)}) (rate({chosen}[{span(self.window_s)}]))"
        return f"histogram_quantile({number(self.quantile)}, {rates})"


def plain_groups(teacher: Teacher, owner: Owner, objectives: Sequence[Objective]) -> tuple[Group, ...]:
    """The pack, for both engines: each rule is silent where its engine does not run."""
    rules = [rule for engine in ENGINES for rule in _rules(engine, teacher, owner, objectives)]
    return (Group("stallscope-plain", s.SLO_FAST_INTERVAL_S, (), tuple(rules)),)


def notes(objectives: Sequence[Objective]) -> list[str]:
    """What a user should know of objectives in this pack."""
    whose = sorted({objective.slo.tenant for objective in objectives if objective.slo.tenant is not None})
    if not whose:
        return []
    return [f"the plain pack has no tenants, and so no objective of {', '.join(map(repr, whose))}"]


def _rules(engine: Engine, teacher: Teacher, owner: Owner, objectives: Sequence[Objective]) -> list[Rule]:
    queue = Gauge(engine.queue, s.PLAIN_FOR_S)
    return [
        _slow(
            engine, "ttft", Percentile(engine.ttft, 0.99, s.PLAIN_WINDOW_S), s.PLAIN_TTFT, teacher, owner, objectives
        ),
        _slow(engine, "itl", Percentile(engine.itl, 0.99, s.PLAIN_WINDOW_S), s.PLAIN_ITL, teacher, owner, objectives),
        _rule(
            engine,
            "StallscopePlainQueue",
            queue,
            teacher.threshold(queue, s.PLAIN_QUEUE),
            (Value(), " requests have been waiting for a minute"),
            "Requests come faster than the engine admits them, or one keeps the others out.",
            owner,
        ),
        _kv_full(engine, teacher, owner),
        _preempted(engine, teacher, owner),
    ]


def _slow(
    engine: Engine,
    metric: str,
    quantity: Percentile,
    limit: Limit,
    teacher: Teacher,
    owner: Owner,
    objectives: Sequence[Objective],
) -> Rule:
    """By the objective for all tenants where there is one, else by the usual."""
    given = next((one for one in objectives if one.slo.metric == metric and one.slo.tenant is None), None)
    if given is None:
        threshold = teacher.threshold(quantity, limit)
    else:
        quantity = Percentile(quantity.name, given.slo.quantile, quantity.window_s)
        threshold = Threshold(Level(given.limit_s, f"the objective {given.name}"))
    what = "first tokens take" if metric == "ttft" else "the gaps between tokens are"
    return _rule(
        engine,
        "StallscopePlainTtftHigh" if metric == "ttft" else "StallscopePlainItlHigh",
        quantity,
        threshold,
        (f"{what} up to ", Value(), f" s (p{number(quantity.quantile * 100)})"),
        "Percentiles of all tenants together, interpolated between the bounds of the engine's histogram: a tenant with "
        "few requests can be stalled without a trace in it.",
        owner,
        severity=Severity.PAGE,
        for_s=s.PLAIN_FOR_S,
    )


def _kv_full(engine: Engine, teacher: Teacher, owner: Owner) -> Rule:
    quantity = Gauge(engine.kv_usage, s.PLAIN_FOR_S)
    waiting = Gauge(engine.queue, s.PLAIN_FOR_S).promql()
    return _rule(
        engine,
        "StallscopePlainKvFull",
        quantity,
        teacher.threshold(quantity, s.PLAIN_KV),
        (Percent(), " of the KV cache is in use, and requests wait"),
        "Whoever holds the blocks keeps the others out; the prefix cache is not counted as use.",
        owner,
        condition=f"and on ({', '.join(_BY)}) {waiting} > 0",
    )


def _preempted(engine: Engine, teacher: Teacher, owner: Owner) -> Rule:
    quantity = Rate(engine.preemptions, s.PREEMPTION_WINDOW_S)
    return _rule(
        engine,
        "StallscopePlainPreemptions",
        quantity,
        teacher.threshold(quantity, s.PLAIN_PREEMPTIONS),
        (Value(), " requests a second lose their KV blocks and start again"),
        "The KV cache is too small for what is admitted: work is thrown away and done again.",
        owner,
    )


def _rule(
    engine: Engine,
    name: str,
    quantity: Quantity,
    threshold: Threshold,
    what: Text,
    meaning: str,
    owner: Owner,
    *,
    severity: Severity = Severity.TICKET,
    for_s: int = 0,
    condition: str = "",
) -> Rule:
    return Rule(
        name,
        threshold.exceeded_by(quantity, condition),
        severity,
        summary=(
            *what,
            " at ",
            Label("instance"),
            " (",
            Label("model_name"),
            "); which tenant did it, this can't tell.",
        ),
        description=(f"{meaning} {_NO_NAMES}",),
        evidence=(f"{quantity.promql()}, as {engine.name} {engine.version} exports it.",),
        threshold_reason=(threshold.reason(quantity), "."),
        command=(f"stallscope collect -o {shlex.quote(owner.folder)}",),
        catches=_ANY_STALL,
        about={"pack": ("plain",), "exporter": (engine.name,)},
        for_s=for_s,
        keep_firing_s=s.KEEP_FIRING_S,
    )
