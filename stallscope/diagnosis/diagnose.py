"""The whole analysis of a trace, from tables to a ``Diagnosis``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from stallscope.diagnosis.changes import find_changes
from stallscope.diagnosis.evidence import quantiles
from stallscope.diagnosis.incidents import find_episodes, find_windows, measure_waits
from stallscope.diagnosis.load import KV, STEP_TIME, Loads
from stallscope.diagnosis.model import Confidence, Coverage, Diagnosis, Incident, ReplayCheck, TenantSummary, Verdict
from stallscope.diagnosis.reliance import LEAST_KEPT
from stallscope.diagnosis.replay.replayer import prepare_replay
from stallscope.diagnosis.replica import BATCHES_SEEN, Replica, replicas
from stallscope.diagnosis.slo import Slo, check_tenants
from stallscope.diagnosis.verdict import judge
from stallscope.trace import Trace

FEWEST_REQUESTS = 20  # below, usual and unusual can't be told apart
UNKNOWN = "(unknown)"


def diagnose(
    trace: Trace,
    *,
    slos: Sequence[Slo] = (),
    replay: bool = True,
    remedies: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Diagnosis:
    """Finds the incidents of a trace and judges each.

    ``slos``: what counts as stalled, in place of the learned usual. ``replay``: by what would have been; then
    ``remedies`` may be tried too. ``progress`` hears the share of the work that is done, in [0, 1]. Raises UsageError
    where an SLO is for a tenant that the trace doesn't have.
    """
    check_tenants(trace, slos)
    incidents: list[Incident] = []
    summaries: list[TenantSummary] = []
    errors: list[float] = []
    checks: list[ReplayCheck] = []
    all_of_them = max(len(pc.unique(trace.columns("steps", ["replica"])["replica"])), 1)
    for number, replica in enumerate(replicas(trace)):
        changes = find_changes(replica)
        waits = measure_waits(replica, slos, changes)
        episodes = find_episodes(waits)
        windows = find_windows(waits, episodes, replica, slos)
        replayer = None
        if replay and replica.fidelity >= BATCHES_SEEN and (windows or changes.found):
            replayer = prepare_replay(replica)
            checks.append(replayer.check)
        for incident, done in judge(replica, waits, changes, episodes, windows, replayer, remedies=remedies):
            incidents += [incident] if incident is not None else []
            if progress is not None:
                progress((number + done) / all_of_them)
        summaries.extend(_summaries(replica, waits.table))
        errors.append(replica.ledger.model.error)
    # A recording that begins with an empty cache says nothing about what went wrong in it.
    incidents.sort(key=lambda incident: (incident.verdict is Verdict.COLD_CACHE, -incident.lost_s))
    coverage = _coverage(trace, max(errors, default=0.0))
    verdict, confidence = _overall(incidents, coverage)
    steps = trace.columns("steps", ["scheduled", "ready"])
    return Diagnosis(
        source=trace.source,
        start_ns=pc.min(steps["scheduled"]).as_py() or 0,
        end_ns=pc.max(steps["ready"]).as_py() or 0,
        verdict=verdict,
        confidence=confidence,
        coverage=coverage,
        incidents=tuple(incidents),
        tenants=tuple(summaries),
        notes=tuple(f"{finding.text} ({finding.where}, {finding.count} times)" for finding in trace.findings),
        replays=tuple(checks),
    )


def _overall(incidents: list[Incident], coverage: Coverage) -> tuple[Verdict, Confidence]:
    """The verdict of the most harmful incident; without one, healthy if there was enough to see."""
    if incidents:
        return incidents[0].verdict, incidents[0].confidence
    too_little = coverage.requests < FEWEST_REQUESTS or coverage.steps_lost > coverage.steps
    if too_little or coverage.kept_share < LEAST_KEPT:
        return Verdict.INSUFFICIENT_DATA, Confidence.LOW
    return Verdict.HEALTHY, Confidence.MEDIUM if coverage.fidelity >= BATCHES_SEEN else Confidence.LOW


def _coverage(trace: Trace, error: float) -> Coverage:
    coverage, requests = trace.coverage.to_pandas(), trace.requests.to_pandas()
    states = requests["state"].astype(str)
    return Coverage(
        fidelity=int(coverage["fidelity"].min()) if len(coverage) else 0,
        steps=int(coverage["steps_seen"].sum()),
        steps_lost=int(coverage["steps_lost"].sum()),
        records_dropped=int(coverage["spans_dropped"].sum()),
        requests=len(requests),
        requests_open=int((states == "open").sum()),
        requests_lost=int((states == "lost").sum()),
        known_tenant_share=float((requests["tenant"].astype(str) != UNKNOWN).mean()) if len(requests) else 0.0,
        kept_share=float(coverage["sampled_share"].min()) if len(coverage) else 1.0,
        cost_model_error=error,
    )


def _summaries(replica: Replica, waits: pd.DataFrame) -> list[TenantSummary]:
    requests = replica.requests
    tokens = (requests["prompt_tokens"] + requests["output_tokens"]).groupby(requests["tenant"]).sum()
    timeline = replica.timeline
    span = (int(timeline.before[0]), int(timeline.end[-1]))
    loads = Loads(replica, [])
    shares = {
        resource: np.array([load.level for load in loads.of_all(resource, *span)]) for resource in (STEP_TIME, KV)
    }
    return [
        TenantSummary(
            tenant,
            replica.sources[code],
            int((requests["tenant"] == code).sum()),
            quantiles(waits[waits["tenant"] == code]),
            float(tokens.get(code, 0) / max(tokens.sum(), 1)),
            float(shares[STEP_TIME][code] / max(shares[STEP_TIME].sum(), 1e-12)),
            float(shares[KV][code] / max(shares[KV].sum(), 1e-12)),
        )
        for code, tenant in enumerate(replica.tenants)
    ]
