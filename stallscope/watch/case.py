"""A stall that is looked into while it goes on: what it cost whom, and whom the diagnoses so far lay it at.

Seconds are counted as they pass; blame follows once a diagnosis names somebody, for what came before as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from stallscope.diagnosis.model import Confidence, Diagnosis, Incident, InterventionKind, Verdict
from stallscope.diagnosis.partition import Mechanism

LEADS_UP_NS = 10_000_000_000  # an incident that ended so much before the first stalled wait is another one
_LOOK_NS = 10_000_000_000  # after the first diagnosis, until the next; then twice as long each time, up to
_LOOK_SELDOM_NS = 60_000_000_000
_FAR_WORSE = 2.0  # times what was lost in as long before the last one: then at once
LONGEST_NS = 300_000_000_000  # from then on there is too little left of the calm before: what was found stays
LASTING_NS = 3_600_000_000_000  # what goes on longer is another case: of the calm before nothing is left
_CHANCE_NS = 20_000_000_000  # what a tenant as usual holds up for no longer is chance; for longer, more than its share
_NO_TENANTS = (Verdict.ENGINE_STALL, Verdict.OUTSIDE_ENGINE)
USUAL = "usual"  # in place of a verdict: a stall that no diagnosis finds worth an incident


@dataclass(frozen=True, slots=True)
class Blamed:
    """Who did it: a tenant, by which mechanism, and which share of it."""

    culprit: str
    mechanism: str
    share: float


@dataclass(frozen=True, slots=True)
class Attribution:
    """What a diagnosis says of a stall."""

    verdict: Verdict
    blamed: tuple[Blamed, ...]
    incident: Incident


@dataclass(eq=False, slots=True)
class Case:
    """One stall of one replica. Times are ns on the engine's clock, ``waiting`` seconds by victim, not judged yet."""

    start_ns: int
    waiting: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    attribution: Attribution | None = None
    counted: bool = False  # as an incident
    looks: int = 0
    _suspected: frozenset[str] = frozenset()  # at the last look, too weakly to blame them unless the next one agrees
    _looked_ns: int = 0
    _rate: float = 0.0  # at the last look

    @property
    def is_usual(self) -> bool:
        """Whether a diagnosis has found nothing in it."""
        return self.looks > 0 and self.attribution is None and not self._suspected

    def wants_look(self, now_ns: int, rate: float) -> bool:
        """Whether another diagnosis may say more; ``rate``: what was lost of late."""
        if now_ns > self.start_ns + LONGEST_NS:
            return False
        names_nobody = self.attribution is None or not self.attribution.blamed
        if not self.looks or (names_nobody and rate > _FAR_WORSE * self._rate):
            return True
        return now_ns >= self._looked_ns + min(_LOOK_NS << self.looks - 1, _LOOK_SELDOM_NS)

    def suspects(self, diagnosis: Diagnosis) -> bool:
        """Whether charges alone say that this is more than a busy moment."""
        found = attribution_of(diagnosis, self._since_ns)
        return (found is not None and found.verdict is not Verdict.OVERLOAD) or bool(self._weak(diagnosis))

    def looked(self, diagnosis: Diagnosis | None, now_ns: int, rate: float) -> None:
        """Takes what a diagnosis says of it; what an earlier one was sure of stays where this one says nothing."""
        self.looks, self._looked_ns, self._rate = self.looks + 1, now_ns, rate
        if diagnosis is None:
            return
        found = attribution_of(diagnosis, self._since_ns, self._suspected)
        self._suspected = self._weak(diagnosis)
        if found is not None or self._is_unsure:
            self.attribution = found

    @property
    def _since_ns(self) -> int:
        """What was over before then is another stall."""
        return self.start_ns - LEADS_UP_NS

    def _weak(self, diagnosis: Diagnosis) -> frozenset[str]:
        weak = (one for one in diagnosis.incidents if one.end_ns >= self._since_ns and _is_weak(one))
        return frozenset(culprit.tenant for one in weak for culprit in one.culprits)

    @property
    def _is_unsure(self) -> bool:
        return self.attribution is not None and self.attribution.incident.confidence is Confidence.LOW

    def judged(self, now_ns: int, is_here: Callable[[str], bool]) -> Iterator[tuple[str, str, str, float]]:
        """Victim, culprit, mechanism, seconds of what can be laid at somebody's door by now, once.

        When no diagnosis is made any more, who has gone (``is_here``) is not blamed for what still goes on.
        """
        if self.attribution is None:
            return
        is_old = now_ns > self.start_ns + LONGEST_NS
        for victim, seconds in self.waiting.items():
            for one in self.attribution.blamed:
                if one.culprit != victim and not (is_old and not is_here(one.culprit)):
                    yield victim, one.culprit, one.mechanism, seconds * one.share
        self.waiting.clear()


def attribution_of(diagnosis: Diagnosis, since_ns: int, suspected: frozenset[str] = frozenset()) -> Attribution | None:
    """What a diagnosis says of the time since ``since_ns``: the neighbors to blame, or else the costliest incident.

    What an engine that stalled meanwhile cost is no neighbor's. ``suspected``: whom a weak suspicion is enough for.
    """
    there = [one for one in diagnosis.incidents if one.end_ns >= since_ns and not _is_chance(one, suspected)]
    if not there:
        return None
    noisy = [one for one in there if one.verdict is Verdict.NOISY_NEIGHBOR and one.culprits]
    worst = max(noisy or there, key=lambda one: one.lost_s)
    if not noisy:
        return Attribution(worst.verdict, (), worst)
    caused: dict[tuple[str, str], float] = defaultdict(float)
    for incident in noisy:
        total = sum(culprit.caused_s for culprit in incident.culprits)
        for culprit in incident.culprits:
            share = culprit.caused_s / total if total else 1 / len(incident.culprits)
            caused[culprit.tenant, culprit.mechanism] += share * incident.lost_s
    total = sum(caused.values())
    total += sum(one.lost_s for one in there if one.verdict in _NO_TENANTS)
    blamed = [Blamed(*who, lost / total if total else 1 / len(caused)) for who, lost in caused.items()]
    return Attribution(Verdict.NOISY_NEIGHBOR, tuple(blamed), worst)


def _is_weak(incident: Incident) -> bool:
    """Whether it is a suspicion of tenants who did nothing that one could name."""
    unnamed = bool(incident.culprits) and all(one.mechanism == Mechanism.UNEXPLAINED for one in incident.culprits)
    return unnamed and incident.confidence is Confidence.LOW


def _is_chance(incident: Incident, suspected: frozenset[str]) -> bool:
    """Whether it is nothing to count: a weak suspicion of nobody, or of who was not ``suspected`` before, or bad luck
    with a tenant who is as usual."""
    if not incident.culprits:
        return incident.confidence is Confidence.LOW
    if _is_weak(incident):
        return not suspected.issuperset(culprit.tenant for culprit in incident.culprits)
    kinds = {
        one.kind for one in incident.interventions if one.kind in (InterventionKind.USUAL, InterventionKind.FAIR_SHARE)
    }
    return kinds == {InterventionKind.FAIR_SHARE} and incident.end_ns - incident.start_ns < _CHANCE_NS
