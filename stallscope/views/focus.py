"""A diagnosis from one tenant's side: the incidents that it was part of."""

from __future__ import annotations

import difflib
from dataclasses import replace

from stallscope.diagnosis.model import Confidence, Diagnosis, Incident, Verdict
from stallscope.errors import UsageError


def concerning(diagnosis: Diagnosis, tenant: str) -> Diagnosis:
    """Only incidents with this tenant as victim or culprit, and the verdict of the worst of them.

    Raises UsageError where the trace has no such tenant. Charges and causes are not cut: who did it to a tenant is
    somebody else.
    """
    known = [summary.tenant for summary in diagnosis.tenants]
    if tenant not in known:
        near = difflib.get_close_matches(tenant, known, n=3, cutoff=0.5) or known[:5]
        raise UsageError(f"{diagnosis.source}: no tenant {tenant!r}; it has {', '.join(near)}")
    incidents = tuple(incident for incident in diagnosis.incidents if _took_part(incident, tenant))
    if incidents:
        verdict, confidence = incidents[0].verdict, incidents[0].confidence
    elif diagnosis.incidents:
        verdict, confidence = Verdict.HEALTHY, Confidence.MEDIUM
    else:
        verdict, confidence = diagnosis.verdict, diagnosis.confidence
    return replace(diagnosis, incidents=incidents, verdict=verdict, confidence=confidence)


def _took_part(incident: Incident, tenant: str) -> bool:
    victims, culprits = (one.tenant for one in incident.victims), (one.tenant for one in incident.culprits)
    return tenant in (*victims, *culprits)
