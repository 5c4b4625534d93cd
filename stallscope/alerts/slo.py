"""Burn rates of SLOs by tenant: several windows and rates, as Google's SRE workbook has them (alerting on SLOs).

A request (of an itl SLO: a gap between two tokens) that is slower than the limit uses up the error budget, which is
what the percentile leaves: 1% for p99. The histograms count exactly those where the limit is one of their bounds.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.utils import floatToGoString

from stallscope.alerts import settings as s
from stallscope.alerts.commands import command, doctor
from stallscope.alerts.promql import equal, number, selector, span, unequal
from stallscope.alerts.rules import Group, Owner, RecordingRule, Rule, Severity
from stallscope.alerts.settings import Burn
from stallscope.alerts.texts import Found, Label, Percent
from stallscope.alerts.thresholds import length
from stallscope.diagnosis.metrics import METRICS
from stallscope.diagnosis.model import Verdict
from stallscope.diagnosis.slo import Slo
from stallscope.errors import UsageError
from stallscope.watch import families as f
from stallscope.watch.names import label_value

_HISTOGRAMS = {"ttft": f.TTFT, "itl": f.ITL}
_UNIT = {"ttft": "requests", "itl": "gaps between tokens"}
_STALLS = (
    Verdict.NOISY_NEIGHBOR,
    Verdict.SELF_INFLICTED,
    Verdict.OVERLOAD,
    Verdict.ENGINE_STALL,
    Verdict.COLD_CACHE,
)


@dataclass(frozen=True)
class Objective:
    """An SLO as rules see it; ``others``: tenants that have one of their own for the metric."""

    slo: Slo
    others: tuple[str, ...]

    @property
    def name(self) -> str:
        """The SLO as it was given, without its tenant."""
        return f"{self.slo.metric}={limit_of(self.slo)}@p{self.percent:.12g}"

    @property
    def full_name(self) -> str:
        return self.name if self.slo.tenant is None else f"{self.slo.tenant}:{self.name}"

    @property
    def percent(self) -> float:
        return round(self.slo.quantile * 100, 9)

    @property
    def budget(self) -> float:
        """Share of requests that may be slower."""
        return round(1 - self.slo.quantile, 12)

    @property
    def limit_s(self) -> float:
        return self.slo.limit_ns / 1e9

    @property
    def bucket_missing(self) -> bool:
        """Whether the histogram has the limit only where ``collect`` is told of the SLO."""
        return self.limit_s not in f.BUCKETS[self.histogram.name]

    @property
    def histogram(self) -> f.Family:
        return _HISTOGRAMS[self.slo.metric]

    @property
    def labels(self) -> dict[str, str]:
        """What tells it from other objectives."""
        return {"slo": self.name} if self.tenant is None else {"slo": self.name, "tenant": self.tenant}

    @property
    def tenant(self) -> str | None:
        """As the metrics have it."""
        return None if self.slo.tenant is None else label_value(self.slo.tenant)

    def matchers(self) -> tuple[str, ...]:
        if self.tenant is not None:
            return (equal("tenant", self.tenant),)
        return tuple(unequal("tenant", label_value(name)) for name in self.others)

    def bound(self) -> str:
        """The matcher of the limit's bucket: whole seconds are written 2.0, or 2 in the older text format."""
        text = floatToGoString(self.limit_s)
        whole = text.removesuffix(".0")
        return equal("le", text) if whole == text else f'le=~"{whole}(\\\\.0)?"'


def limit_of(slo: Slo) -> str:
    """``500ms``, ``2s``: as a user may give it."""
    units = (("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1_000))
    for unit, length_ns in units:
        if slo.limit_ns % length_ns == 0:
            return f"{slo.limit_ns // length_ns}{unit}"
    return f"{slo.limit_ns / 1_000:g}us"


def objectives(slos: Sequence[Slo]) -> tuple[Objective, ...]:
    """SLOs that rules can be made of. Raises UsageError for those that make no sense, alone or together."""
    kept = tuple(dict.fromkeys(slos))
    for slo in kept:
        _check(slo)
    for number_of, one in enumerate(kept):
        for other in kept[number_of + 1 :]:
            if (one.tenant, one.metric) == (other.tenant, other.metric):
                _check_both(*sorted((one, other), key=lambda each: each.quantile))
    named = {
        metric: sorted({slo.tenant for slo in kept if slo.tenant is not None and slo.metric == metric})
        for metric in METRICS
    }
    return tuple(Objective(slo, () if slo.tenant is not None else tuple(named[slo.metric])) for slo in kept)


def _said(slo: Slo) -> str:
    return repr(Objective(slo, ()).full_name)


def _check(slo: Slo) -> None:
    limit_s, budget = slo.limit_ns / 1e9, 1 - slo.quantile
    if slo.metric not in _HISTOGRAMS:
        raise UsageError(
            f"SLO {_said(slo)}: no metric of the collector tells {slo.metric}; give one of {', '.join(_HISTOGRAMS)}"
        )
    if limit_s < s.SHORTEST_LIMIT_S:
        raise UsageError(f"SLO {_said(slo)}: nothing is answered within {limit_of(slo)}; give at least 1ms")
    if limit_s > s.LONGEST_LIMIT_S:
        raise UsageError(f"SLO {_said(slo)}: nobody waits longer than {limit_of(slo)}; give at most 60m")
    if budget < s.LEAST_BUDGET:
        raise UsageError(
            f"SLO {_said(slo)}: one slow request in {1 / budget:,.0f} can't be told from luck; give at most p99.9999"
        )
    if slo.tenant == "":
        raise UsageError(f"SLO {_said(slo)}: the tenant has no name; leave out the colon for all tenants")


def _check_both(lower: Slo, higher: Slo) -> None:
    """Two of one tenant and metric, by their percentiles."""
    if lower.quantile == higher.quantile:
        raise UsageError(f"SLOs {_said(lower)} and {_said(higher)} contradict each other; give one of them")
    if lower.limit_ns >= higher.limit_ns:
        raise UsageError(
            f"SLOs {_said(lower)} and {_said(higher)}: the higher percentile with the shorter limit says all that the "
            "other does; leave that out"
        )


def notes(found: Sequence[Objective]) -> list[str]:
    """What a user should know of the rules that are made of objectives."""
    said = []
    for objective in found:
        if objective.bucket_missing:
            said.append(
                f"SLO {_said(objective.slo)}: {objective.limit_s:g} s is no bound of {objective.histogram.name} unless "
                f"collect is told: stallscope collect --slo {shlex.quote(objective.full_name)}"
            )
        if not _reachable(objective, s.FAST_BURNS):
            said.append(
                f"SLO {_said(objective.slo)} allows {objective.budget:.0%} of {_UNIT[objective.slo.metric]} to be "
                "slower: they can't be used up fast enough for a page; there is only a ticket"
            )
        need = _least(objective, s.FAST_BURNS[0])
        if objective.budget <= 0.0001:
            said.append(
                f"SLO {_said(objective.slo)} needs {need:,} {_UNIT[objective.slo.metric]} of a tenant in an hour to "
                "be told from luck; with fewer it can't page"
            )
    return said


# --- rules --------------------------------------------------------------------------------------------------------


def slo_groups(found: Sequence[Objective], owner: Owner, *, recorded: bool = True) -> tuple[Group, ...]:
    """A group of rules that page and one of those that don't, each with the windows that it is the first to read."""
    fast = [_rule(one, s.FAST_BURNS, owner, page=True, recorded=recorded) for one in found]
    fast += [_bucket_lost(one, owner) if one.bucket_missing else None for one in found]
    slow = [_rule(one, s.SLOW_BURNS, owner, page=False, recorded=recorded) for one in found]
    first: list[RecordingRule] = []
    then: list[RecordingRule] = []
    for objective in found if recorded else ():
        read_first = _windows(objective, s.FAST_BURNS)
        first += [_recording(objective, window) for window in sorted(read_first)]
        then += [_recording(objective, window) for window in sorted(_windows(objective, s.SLOW_BURNS) - read_first)]
    groups = (
        Group("stallscope-slo-fast", s.SLO_FAST_INTERVAL_S, tuple(first), tuple(filter(None, fast))),
        Group("stallscope-slo-slow", s.SLO_SLOW_INTERVAL_S, tuple(then), tuple(filter(None, slow))),
    )
    return tuple(group for group in groups if group.rules)


def _windows(objective: Objective, burns: Sequence[Burn]) -> set[int]:
    return {window for burn in _reachable(objective, burns) for window in (burn.long_s, burn.short_s)}


def _reachable(objective: Objective, burns: Sequence[Burn]) -> tuple[Burn, ...]:
    """Those that can be: all requests being slow is 1 over the budget."""
    return tuple(burn for burn in burns if burn.factor * objective.budget < 1)


def _least(objective: Objective, burn: Burn) -> int:
    return math.ceil(s.LEAST_SLOW_REQUESTS / (burn.factor * objective.budget))


def _recorded_name(window_s: int) -> str:
    return f"stallscope:slo_slow:ratio_rate{span(window_s)}"


def _recording(objective: Objective, window_s: int) -> RecordingRule:
    return RecordingRule(_recorded_name(window_s), _ratio(objective, window_s), objective.labels)


def _ratio(objective: Objective, window_s: int) -> str:
    """Share of requests that were slower than the limit, by tenant."""
    name, chosen = objective.histogram.name, objective.matchers()
    within = selector(f"{name}_bucket", objective.bound(), *chosen)
    every = selector(f"{name}_count", *chosen)
    window = span(window_s)
    return f"1 - sum by (tenant) (rate({within}[{window}])) / sum by (tenant) (rate({every}[{window}]))"


def _share(objective: Objective, window_s: int, *, recorded: bool) -> str:
    if not recorded:
        return f"({_ratio(objective, window_s)})"
    labels = [equal(label, value) for label, value in objective.labels.items()]
    return selector(_recorded_name(window_s), *labels)


def _rule(objective: Objective, wanted: Sequence[Burn], owner: Owner, *, page: bool, recorded: bool) -> Rule | None:
    """None where no burn can be as fast as that."""
    burns = _reachable(objective, wanted)
    if not burns:
        return None
    alternatives = []
    for burn in burns:
        over = number(burn.factor * objective.budget)
        every = selector(f"{objective.histogram.name}_count", *objective.matchers())
        counted = f"sum by (tenant) (increase({every}[{span(burn.long_s)}]))"
        alternatives.append(
            f"(\n  {_share(objective, burn.long_s, recorded=recorded)} > {over}\n"
            f"  and on (tenant) {_share(objective, burn.short_s, recorded=recorded)} > {over}\n"
            f"  and on (tenant) {counted} >= {_least(objective, burn)}\n)"
        )
    first, last, unit = burns[0], burns[-1], _UNIT[objective.slo.metric]
    allowed = f"{number(objective.budget * 100)}%"
    culprits = (
        f"sort_desc(topk(3, sum by (culprit) (increase({f.BLAME.name}{{victim=%[1]q}}[{span(first.long_s)}])) > 0))"
    )
    return Rule(
        "StallscopeSloFastBurn" if page else "StallscopeSloSlowBurn",
        "\nor\n".join(alternatives),
        Severity.PAGE if page else Severity.TICKET,
        summary=(
            Label("tenant"),
            " misses its objective: ",
            Percent(),
            f" of its {unit} were slower than {limit_of(objective.slo)} ({allowed} may be); stalled by: ",
            Found(culprits, "tenant", "culprit", "no other tenant"),
            ".",
        ),
        description=(
            f"{objective.name}: what may be slow in 30 days is used up "
            + " or ".join(f"{burn.factor:g} times too fast for {span(burn.long_s)}" for burn in burns)
            + ", and it goes on. "
            + _bucket_note(objective),
        ),
        evidence=(
            f"{objective.histogram.name}: the share above {objective.limit_s:g} s over "
            + ", ".join(f"{span(burn.long_s)} and {span(burn.short_s)}" for burn in burns)
            + ".",
        ),
        threshold_reason=(
            "; ".join(
                f"{burn.factor:g} x {allowed} over {span(burn.long_s)} and {span(burn.short_s)}, of at least "
                f"{_least(objective, burn):,} {unit}"
                for burn in burns
            )
            + f": at that rate the budget of 30 days is gone in {length(30 * 86_400 / last.factor)} or sooner.",
        ),
        command=command(owner, "tenant"),
        catches=_STALLS,
        names="victim",
        about={name: (value,) for name, value in objective.labels.items()},
        keep_firing_s=s.KEEP_FIRING_S,
    )


def _bucket_note(objective: Objective) -> str:
    if not objective.bucket_missing:
        return f"{objective.limit_s:g} s is a bound of {objective.histogram.name}, so the share is exact."
    return f"Needs the bound {objective.limit_s:g} s, which the collector has with --slo {objective.name} alone."


def _bucket_lost(objective: Objective, owner: Owner) -> Rule:
    """An SLO whose bucket nobody exposes would never fire, and never say so."""
    name = objective.histogram.name
    bucket = selector(f"{name}_bucket", objective.bound(), *objective.matchers())
    every = selector(f"{name}_count", *objective.matchers())
    return Rule(
        "StallscopeTelemetryLost",
        f"sum by (tenant) ({every}) unless on (tenant) {bucket}",
        Severity.TICKET,
        summary=(
            f"The objective {objective.name} of ",
            Label("tenant"),
            " is not watched: the collector was not told of it.",
        ),
        description=(
            f"{name} has no bucket that ends at {objective.limit_s:g} s, so no burn rate can be computed: start the "
            f"collector with --slo {objective.name} (before it, the tenant and a colon, where it has one of its own).",
        ),
        evidence=(f"{name}_count has the tenant, {name}_bucket has no such bound.",),
        threshold_reason=("a bucket is there or is not.",),
        command=doctor(owner),
        catches=(Verdict.INSUFFICIENT_DATA,),
        names="victim",
        about={"cause": ("slo_bucket",), **{name: (value,) for name, value in objective.labels.items()}},
        for_s=s.DOWN_FOR_S,
    )
