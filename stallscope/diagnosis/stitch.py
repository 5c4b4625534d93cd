"""Incidents as they are found in portions, and long ones put together again that were cut where portions meet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from stallscope.diagnosis.evidence import share
from stallscope.diagnosis.incidents import SLACK_NS
from stallscope.diagnosis.model import Charge, Incident, Verdict, Victim

ALONE = "a part: the portion before or after it, into which it goes on, was judged otherwise"


@dataclass(frozen=True)
class Found:
    """An incident; ``cut``: it goes on in the next portion, or came from the one before."""

    incident: Incident
    cut: bool = False

    @property
    def lost_ns(self) -> int:
        return round(self.incident.lost_s * 1e9)


def rank(found: Found) -> tuple[bool, int, str, int, int, str, tuple[str, ...]]:
    """The order of incidents: the most harm first, the same for the same ones.

    A recording that begins with an empty cache says nothing about what went wrong in it: that comes last.
    """
    one = found.incident
    culprits = tuple(culprit.tenant for culprit in one.culprits)
    cold = one.verdict is Verdict.COLD_CACHE
    return cold, -found.lost_ns, one.replica, one.start_ns, one.end_ns, str(one.mechanism), culprits


def stitched(incidents: Iterable[Found]) -> tuple[Incident, ...]:
    """All incidents in their order, those in one that were cut: of the same replica, verdict and culprits, one after
    the other without a pause."""
    whole, runs = [], list[list[Found]]()
    for found in sorted(incidents, key=lambda one: (one.incident.replica, one.incident.start_ns, rank(one))):
        if not found.cut:
            whole.append(found)
        elif run := next((run for run in runs[::-1] if _goes_on(run[-1].incident, found.incident)), None):
            run.append(found)
        else:
            runs.append([found])
    joined = [Found(_joined([found.incident for found in run])) for run in runs]
    return tuple(found.incident for found in sorted((*whole, *joined), key=rank))


def _goes_on(earlier: Incident, later: Incident) -> bool:
    return _kind(earlier) == _kind(later) and earlier.start_ns < later.start_ns <= earlier.end_ns + SLACK_NS


def _kind(one: Incident) -> tuple[object, ...]:
    return one.replica, one.verdict, frozenset(culprit.tenant for culprit in one.culprits)


def _joined(parts: Sequence[Incident]) -> Incident:
    """One incident of its parts; what can't be added up is that of the worst part."""
    if len(parts) == 1:
        return replace(parts[0], reasons=(*parts[0].reasons, ALONE))
    worst = max(parts, key=lambda part: part.lost_s)
    lost = sum(part.lost_s for part in parts)
    return replace(
        worst,
        start_ns=parts[0].start_ns,
        end_ns=max(part.end_ns for part in parts),
        lost_s=lost,
        charged_s=sum(part.charged_s for part in parts),
        victims=_victims(parts),
        charges=_charges(parts, lost),
        reasons=(*worst.reasons, f"seen in {len(parts)} portions, of which the worst is described"),
    )


def _victims(parts: Sequence[Incident]) -> tuple[Victim, ...]:
    by_tenant: dict[str, list[Victim]] = {}
    for part in parts:
        for victim in part.victims:
            by_tenant.setdefault(victim.tenant, []).append(victim)
    joined = (
        replace(
            max(each, key=lambda victim: victim.lost_s),
            stalled_requests=sum(victim.stalled_requests for victim in each),
            requests=sum(victim.requests for victim in each),
            lost_s=sum(victim.lost_s for victim in each),
        )
        for each in by_tenant.values()
    )
    return tuple(sorted(joined, key=lambda victim: (-victim.lost_s, victim.tenant)))


def _charges(parts: Sequence[Incident], lost_s: float) -> tuple[Charge, ...]:
    seconds: dict[tuple[str, str, bool], float] = {}
    for part in parts:
        for charge in part.charges:
            key = charge.holder, charge.mechanism, charge.own
            seconds[key] = seconds.get(key, 0.0) + charge.seconds
    charges = (Charge(holder, of, some, share(some, lost_s), own) for (holder, of, own), some in seconds.items())
    return tuple(sorted(charges, key=lambda charge: -charge.seconds))
