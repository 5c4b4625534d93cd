"""What to look at: a diagnosis from one tenant's side, and the stretch of time in which an incident can be seen."""

from __future__ import annotations

import difflib
from dataclasses import replace

from stallscope.diagnosis.model import Confidence, Diagnosis, Incident, Verdict
from stallscope.errors import UsageError

_TOO_SMALL = 20  # an incident shorter than this part of a picture is hard to see in it
_MARGINS, _LEAST_MARGIN_NS = 4, 15_000_000_000  # around an incident, in its lengths and at least


def around(incident: Incident, span: tuple[int, int]) -> tuple[int, int]:
    """The part of a span (ns) in which an incident can be seen: all of it, or a stretch around the incident."""
    start, end = span
    length = incident.end_ns - incident.start_ns
    if length * _TOO_SMALL > end - start:
        return span
    margin = max(_LEAST_MARGIN_NS, _MARGINS * length)
    return max(start, incident.start_ns - margin), min(end, incident.end_ns + margin)


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
