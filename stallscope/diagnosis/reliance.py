"""How far a finding may be relied on, where telemetry shows little: less confidence, and no names from a sample."""

from __future__ import annotations

from dataclasses import replace

from stallscope.diagnosis.case import Finding
from stallscope.diagnosis.model import Confidence, Verdict
from stallscope.diagnosis.replica import BATCHES_SEEN, Replica

LEAST_KEPT = 0.5  # share of requests whose spans must have been kept for a name to count: below, none was tried
_ORDER = (Confidence.LOW, Confidence.MEDIUM, Confidence.HIGH)
_MOST = {1: Confidence.LOW, 2: Confidence.MEDIUM}  # by fidelity


def as_far_as_seen(finding: Finding, replica: Replica) -> Finding:
    """The finding with no more confidence than the replica's telemetry bears; nobody's name where it was sampled.

    Who is not in the sample may have done it.
    """
    if replica.kept_share < LEAST_KEPT and finding.culprits:
        reason = (
            f"spans were sampled: {replica.kept_share:.0%} of the requests are there, and for a name it takes "
            f"{LEAST_KEPT:.0%}"
        )
        return Finding(Verdict.INSUFFICIENT_DATA, Confidence.LOW, (), finding.mechanism, (reason,), {}, {})
    most = _MOST.get(replica.fidelity, Confidence.HIGH)
    if replica.fidelity >= BATCHES_SEEN or _ORDER.index(finding.confidence) <= _ORDER.index(most):
        return finding
    return replace(finding, confidence=most)
