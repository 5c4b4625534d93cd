"""How far a finding may be relied on, where telemetry shows little or the replay drifts: less confidence, and no names
from a sample."""

from __future__ import annotations

from dataclasses import replace

from stallscope.diagnosis.case import Finding
from stallscope.diagnosis.incidents import Window
from stallscope.diagnosis.model import Confidence, ReplayCheck, Verdict
from stallscope.diagnosis.partition import Mechanism
from stallscope.diagnosis.ranks import ranks_beside, waited_for
from stallscope.diagnosis.replica import Replica

LEAST_KEPT = 0.5  # share of requests whose spans must have been kept for a name to count: below, none was tried
MOST_DRIFT = 0.25  # of the recorded percentiles, in a free run: what a prediction may be off by in one case of ten
_ORDER = (Confidence.LOW, Confidence.MEDIUM, Confidence.HIGH)
_MOST = {1: Confidence.LOW, 2: Confidence.MEDIUM}  # by fidelity


def as_far_as_seen(finding: Finding, replica: Replica, window: Window, check: ReplayCheck | None) -> Finding:
    """The finding with no more confidence than the replica's telemetry, and the replay that it rests on, bear; nobody's
    name where it was sampled.

    Who is not in the sample may have done it.
    """
    if replica.kept_share < LEAST_KEPT and finding.culprits:
        reason = (
            f"spans were sampled: {replica.kept_share:.0%} of the requests are there, and for a name it takes "
            f"{LEAST_KEPT:.0%}"
        )
        return Finding(Verdict.INSUFFICIENT_DATA, Confidence.LOW, (), finding.mechanism, (reason,), {}, {})
    finding = _beside_its_peers(finding, replica, window)
    most, reasons = _MOST.get(replica.fidelity, Confidence.HIGH), finding.reasons
    if check is not None and check.free_error > MOST_DRIFT and most is Confidence.HIGH:
        most = Confidence.MEDIUM
        reasons = (*reasons, f"the replay met the recorded percentiles within {check.free_error:.0%} only")
    if _ORDER.index(finding.confidence) <= _ORDER.index(most):
        return finding
    return replace(finding, confidence=most, reasons=reasons)


def _beside_its_peers(finding: Finding, replica: Replica, window: Window) -> Finding:
    """Of a data-parallel rank: that a stall without a cause of its own was a wait for another rank, or may have been
    one, where those are not in the trace."""
    ranks = replica.settings.get("dp_size")
    unexplained = finding.verdict is Verdict.ENGINE_STALL and finding.mechanism == Mechanism.UNEXPLAINED
    if not unexplained or not isinstance(ranks, int) or ranks < 2:
        return finding
    confidence = min(finding.confidence, Confidence.MEDIUM, key=_ORDER.index)
    peer = waited_for(replica, window.start, window.end)
    if peer is not None:
        reason = (
            f"its steps ended with those of {peer.replica} (rank {peer.rank}), whose batches had {peer.tokens:,.0f} "
            f"tokens where its own had {peer.own_tokens:,.0f}: who filled those is told there"
        )
        return replace(
            finding, confidence=confidence, mechanism=str(Mechanism.LOCKSTEP), reasons=(*finding.reasons, reason)
        )
    if len(ranks_beside(replica)) >= ranks - 1:
        return finding
    reason = f"it is one of {ranks} data-parallel ranks, and may have waited for one that the trace does not show"
    return replace(finding, confidence=confidence, reasons=(*finding.reasons, reason))
