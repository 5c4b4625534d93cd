"""Diagnoses that add up: what a portion of the data says, the sum of two, and the diagnosis that a sum makes.

``merge`` is associative and commutative: all that is added is whole numbers, and of incidents and tenants those are
kept that the sum of all would keep. So who merges what first changes no byte of the result. (Beyond ``MOST_NAMES``
tenants it may: the smallest are then one.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce

from stallscope.diagnosis.evidence import tail_quantile
from stallscope.diagnosis.levels import Level, slow_portions
from stallscope.diagnosis.metrics import METRICS
from stallscope.diagnosis.model import (
    Confidence,
    Coverage,
    Diagnosis,
    Incident,
    Quantile,
    ReplayCheck,
    TenantSummary,
    Verdict,
)
from stallscope.diagnosis.reliance import LEAST_KEPT
from stallscope.diagnosis.replica import BATCHES_SEEN, MOST_TENANTS, OTHER
from stallscope.diagnosis.sketch import Sketch
from stallscope.diagnosis.stitch import Found, rank, stitched

FEWEST_REQUESTS = 20  # below, usual and unusual can't be told apart
MOST_INCIDENTS = 500
MOST_NAMES = 10_000
NAMED_FAILURES = MOST_SLOW = 10
_NEVER = 1 << 62


@dataclass(frozen=True)
class TenantTotals:
    """A tenant's sums: requests by the source of its name, tokens, ns of step time, tokens in the KV cache times ns,
    and by metric its requests' longest waits (ns)."""

    sources: Mapping[str, int]
    tokens: int
    step_ns: int
    kv_token_ns: int
    waits: tuple[Sketch, ...]

    @property
    def requests(self) -> int:
        return sum(self.sources.values())


@dataclass(frozen=True)
class Seen:
    """Sums of what telemetry shows; ``fidelity`` and ``kept_share`` are the lowest, ``error`` the highest (the cost
    model's)."""

    fidelity: int | None = None
    steps: int = 0
    steps_lost: int = 0
    records_dropped: int = 0
    requests: int = 0
    requests_open: int = 0
    requests_lost: int = 0
    requests_named: int = 0
    kept_share: float = 1.0
    error: float = 0.0


@dataclass(frozen=True)
class Partial:
    """What a portion of the data says. Without arguments: nothing at all, which changes no sum.

    ``incidents``: the worst, with the number and ``lost_ns`` of those that were ``left_out``. ``checks``: of each
    replica, its worst; ``levels``: of its portions. ``failures``: where, and why; the first by place of the ``failed``
    portions.
    """

    start_ns: int = _NEVER
    end_ns: int = -_NEVER
    incidents: tuple[Found, ...] = ()
    left_out: int = 0
    left_out_ns: int = 0
    tenants: Mapping[str, TenantTotals] = field(default_factory=dict)
    checks: Mapping[str, ReplayCheck] = field(default_factory=dict)
    levels: Mapping[str, tuple[Level, ...]] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)
    failures: tuple[tuple[str, str], ...] = ()
    failed: int = 0


def merge(one: Partial, other: Partial) -> Partial:
    """The sum of two."""
    ranked = sorted((*one.incidents, *other.incidents), key=rank)
    kept, rest = ranked[:MOST_INCIDENTS], ranked[MOST_INCIDENTS:]
    checks = dict(one.checks)
    for name, check in other.checks.items():
        checks[name] = min(check, checks.get(name, check), key=_trust)
    tenants = _added(one.tenants, other.tenants)
    levels = dict(one.levels)
    for name, some in other.levels.items():
        levels[name] = tuple(sorted((*levels.get(name, ()), *some)))
    return Partial(
        min(one.start_ns, other.start_ns),
        max(one.end_ns, other.end_ns),
        tuple(kept),
        one.left_out + other.left_out + len(rest),
        one.left_out_ns + other.left_out_ns + sum(found.lost_ns for found in rest),
        tenants if len(tenants) <= MOST_NAMES else _largest(tenants, MOST_NAMES),
        checks,
        levels,
        _both(one.seen, other.seen),
        tuple(sorted({*one.failures, *other.failures})[:NAMED_FAILURES]),
        one.failed + other.failed,
    )


def merged(partials: Iterable[Partial]) -> Partial:
    """The sum of all."""
    return reduce(merge, partials, Partial())


def finish(partial: Partial, source: str, notes: Iterable[str] = ()) -> Diagnosis:
    """The diagnosis that a sum makes; ``notes`` are those of the trace."""
    incidents = stitched(partial.incidents)
    coverage = _coverage(partial.seen)
    verdict, confidence = _overall(incidents, coverage)
    nothing = partial.start_ns > partial.end_ns
    return Diagnosis(
        source=source,
        start_ns=0 if nothing else partial.start_ns,
        end_ns=0 if nothing else partial.end_ns,
        verdict=verdict,
        confidence=confidence,
        coverage=coverage,
        incidents=incidents,
        tenants=_summaries(_largest(partial.tenants, MOST_TENANTS)),
        notes=(*notes, *_notes(partial)),
        replays=tuple(partial.checks[name] for name in sorted(partial.checks)),
    )


def _trust(check: ReplayCheck) -> tuple[bool, float, float, str]:
    """The worst first."""
    return check.trusted, check.forced_agreement, -check.free_error, repr(check)


def _both(one: Seen, other: Seen) -> Seen:
    known = [seen.fidelity for seen in (one, other) if seen.fidelity is not None]
    return Seen(
        min(known, default=None),
        one.steps + other.steps,
        one.steps_lost + other.steps_lost,
        one.records_dropped + other.records_dropped,
        one.requests + other.requests,
        one.requests_open + other.requests_open,
        one.requests_lost + other.requests_lost,
        one.requests_named + other.requests_named,
        min(one.kept_share, other.kept_share),
        max(one.error, other.error),
    )


# --- tenants ------------------------------------------------------------------------------------------------------


def _added(one: Mapping[str, TenantTotals], other: Mapping[str, TenantTotals]) -> dict[str, TenantTotals]:
    added = dict(one)
    for name, totals in other.items():
        added[name] = _sum(added[name], totals) if name in added else totals
    return added


def _sum(one: TenantTotals, other: TenantTotals) -> TenantTotals:
    sources = {
        source: one.sources.get(source, 0) + other.sources.get(source, 0) for source in {**one.sources, **other.sources}
    }
    return TenantTotals(
        sources,
        one.tokens + other.tokens,
        one.step_ns + other.step_ns,
        one.kv_token_ns + other.kv_token_ns,
        tuple(mine.merged(its) for mine, its in zip(one.waits, other.waits, strict=True)),
    )


def _largest(tenants: Mapping[str, TenantTotals], most: int) -> dict[str, TenantTotals]:
    """The largest by tokens, if there are more all others as one; ordered so, those together last."""
    named = sorted((name for name in tenants if name != OTHER), key=lambda name: (-tenants[name].tokens, name))
    rest = [tenants[OTHER]] if OTHER in tenants else []
    if len(named) + len(rest) > most:
        rest += [tenants[name] for name in named[most - 1 :]]
        named = named[: most - 1]
    kept = {name: tenants[name] for name in named}
    return kept | ({OTHER: reduce(_sum, rest)} if rest else {})


def _summaries(tenants: Mapping[str, TenantTotals]) -> tuple[TenantSummary, ...]:
    tokens, step_ns, kv = (
        max(sum(getattr(one, of) for one in tenants.values()), 1) for of in ("tokens", "step_ns", "kv_token_ns")
    )
    return tuple(
        TenantSummary(
            name,
            min(one.sources, key=lambda source: (-one.sources[source], source)),
            one.requests,
            tuple(_quantile(metric, sketch) for metric, sketch in zip(METRICS, one.waits, strict=True) if sketch.count),
            one.tokens / tokens,
            one.step_ns / step_ns,
            one.kv_token_ns / kv,
        )
        for name, one in tenants.items()
    )


def _quantile(metric: str, waits: Sketch) -> Quantile:
    share = tail_quantile(waits.count)
    return Quantile(metric, share, waits.quantile(share) / 1e9, waits.count)


# --- of all -------------------------------------------------------------------------------------------------------


def _coverage(seen: Seen) -> Coverage:
    return Coverage(
        fidelity=seen.fidelity or 0,
        steps=seen.steps,
        steps_lost=seen.steps_lost,
        records_dropped=seen.records_dropped,
        requests=seen.requests,
        requests_open=seen.requests_open,
        requests_lost=seen.requests_lost,
        known_tenant_share=seen.requests_named / max(seen.requests, 1),
        kept_share=seen.kept_share,
        cost_model_error=seen.error,
    )


def _overall(incidents: tuple[Incident, ...], coverage: Coverage) -> tuple[Verdict, Confidence]:
    """The verdict of the most harmful incident; without one, healthy if there was enough to see."""
    if incidents:
        return incidents[0].verdict, incidents[0].confidence
    too_little = coverage.requests < FEWEST_REQUESTS or coverage.steps_lost > coverage.steps
    if too_little or coverage.kept_share < LEAST_KEPT:
        return Verdict.INSUFFICIENT_DATA, Confidence.LOW
    return Verdict.HEALTHY, Confidence.MEDIUM if coverage.fidelity >= BATCHES_SEEN else Confidence.LOW


def _notes(partial: Partial) -> list[str]:
    slow = list(slow_portions(partial.levels))
    notes = slow[:MOST_SLOW]
    if len(slow) > MOST_SLOW:
        notes.append(f"{len(slow) - MOST_SLOW:,} more portions were slow")
    if partial.left_out:
        lost = partial.left_out_ns / 1e9
        notes.append(f"the worst {MOST_INCIDENTS} incidents are shown; {partial.left_out:,} more lost {lost:,.0f} s")
    notes += [f"{where} is left out: {why}" for where, why in partial.failures]
    if partial.failed > len(partial.failures):
        notes.append(f"{partial.failed - len(partial.failures):,} more portions are left out")
    return notes
