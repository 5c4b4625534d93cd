"""Who is to blame for an incident, by what would have been: each suspect as usual, groups of them, everyone, no faults.

A tenant is to blame if its return to usual restores the victims, and its load was beyond chance. A steady heavy tenant
is capacity, not an incident, even though its deletion would help; where only everyone's return to usual helps, it is
overload, and no name.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import factorial

from stallscope.diagnosis.case import Case, Finding, load_reason
from stallscope.diagnosis.model import Confidence, Intervention, InterventionKind, Verdict
from stallscope.diagnosis.replay.interventions import DRAWS, IncidentReplays
from stallscope.diagnosis.suspects import Suspect, largest_mechanism

ENOUGH = 0.8  # share of the victims' excess that the return of all culprits to usual must restore
ACCUSES = 0.5  # below, nobody is accused
MOST_SUSPECTS = 6
MOST_CULPRITS = 4
LEAST_GAIN = 0.1  # what one more culprit must add
REPRODUCED = (0.5, 2.0)  # replayed over recorded excess, outside of which a replay says nothing


def judge_by_replay(
    case: Case, replays: IncidentReplays, by_charges: Finding
) -> tuple[Finding, tuple[Intervention, ...]]:
    """The finding that replays support, and those replays; ``by_charges`` where they don't reproduce the incident."""
    reproduced = replays.replayed_excess / max(replays.recorded_excess, 1e-9)
    if not REPRODUCED[0] <= reproduced <= REPRODUCED[1]:
        return by_charges, ()
    trial = _Trial(case, replays)
    finding = trial.decide()
    return finding, tuple(trial.interventions)


class _Trial:
    """The replays of one case, in the order in which they are needed."""

    def __init__(self, case: Case, replays: IncidentReplays) -> None:
        self.case = case
        self.replays = replays
        self.interventions: list[Intervention] = []

    def decide(self) -> Finding:
        suspects = self._suspects()
        restored = {suspect.tenant: self._glance([suspect.tenant]) for suspect in suspects}
        unusual = sorted(suspects, key=lambda s: -restored[s.tenant])
        faults = self._faults()
        best = restored[unusual[0].tenant] if unusual else 0.0
        if faults >= ACCUSES and faults >= best:
            return self._engine(faults)
        if (finding := self._self_inflicted(unusual, restored)) is not None:
            return finding
        chosen = self._smallest_set(unusual, restored)
        total = self._restored([suspect.tenant for suspect in chosen]) if chosen else 0.0
        if chosen and total >= ACCUSES:
            return self._neighbors(chosen, total, restored)
        return self._overload()

    # --- suspects ---------------------------------------------------------------------------------------------

    def _suspects(self) -> list[Suspect]:
        """Those worth a replay: whose load was unusual, by what the victims are charged for them."""
        found: dict[int, Suspect] = {}
        for suspect in [*self.case.suspects, *self.case.own]:
            if suspect.tenant not in found and suspect.unusual:
                found[suspect.tenant] = suspect
        return sorted(found.values(), key=lambda s: -s.caused_ns)[:MOST_SUSPECTS]

    def _restored(self, tenants: Sequence[int]) -> float:
        return self.replays.usual(tenants).mean

    def _glance(self, tenants: Sequence[int]) -> float:
        """The same by one draw: enough to choose whom to look at."""
        return self.replays.usual(tenants, DRAWS[:1]).mean

    def _faults(self) -> float:
        if not self.replays.stretch.machine.disturbances.any_fault:
            return 0.0
        return self.replays.without_faults().mean

    def _smallest_set(self, unusual: list[Suspect], restored: dict[int, float]) -> list[Suspect]:
        """The fewest whose return to usual restores enough, found by adding the one that helps most."""
        chosen: list[Suspect] = []
        reached = 0.0
        left = list(unusual)
        while left and reached < ENOUGH and len(chosen) < MOST_CULPRITS:
            gains = {
                s.tenant: restored[s.tenant] if not chosen else self._glance([c.tenant for c in [*chosen, s]])
                for s in left
            }
            best = max(left, key=lambda s: gains[s.tenant])
            if gains[best.tenant] < reached + LEAST_GAIN:
                break
            chosen.append(best)
            reached = gains[best.tenant]
            left.remove(best)
        return chosen

    # --- findings ---------------------------------------------------------------------------------------------

    def _neighbors(self, chosen: list[Suspect], total: float, restored: dict[int, float]) -> Finding:
        tenants = [suspect.tenant for suspect in chosen]
        names = [self.case.replica.tenants[tenant] for tenant in tenants]
        self._note(InterventionKind.USUAL, f"{' and '.join(names)} as usual", tenants)
        reasons = [load_reason(self.case, suspect) for suspect in chosen]
        reasons.append(f"as usual, {'they' if len(chosen) > 1 else 'it'} would have spared the victims {total:.0%}")
        sure = total >= ENOUGH and "(unknown)" not in names
        return Finding(
            Verdict.NOISY_NEIGHBOR,
            Confidence.HIGH if sure else Confidence.MEDIUM,
            tuple(chosen),
            str(chosen[0].mechanism),
            tuple(reasons),
            {tenant: restored[tenant] for tenant in tenants},
            self._shapley(tenants),
        )

    def _self_inflicted(self, unusual: list[Suspect], restored: dict[int, float]) -> Finding | None:
        """Whether nearly all of the excess is one tenant's own, and its return to usual ends it."""
        whole = self.replays.replayed_excess
        for suspect in self.case.own[:1]:
            mine = self.replays.excess_of([suspect.tenant])
            if suspect.unusual and mine >= ENOUGH * whole and self.replays.usual([suspect.tenant]).own >= ACCUSES:
                self._note(
                    InterventionKind.USUAL,
                    f"{self.case.replica.tenants[suspect.tenant]} as usual",
                    [suspect.tenant],
                )
                return Finding(
                    Verdict.SELF_INFLICTED,
                    Confidence.HIGH,
                    (suspect,),
                    str(suspect.mechanism),
                    (load_reason(self.case, suspect),),
                    {suspect.tenant: self.replays.usual([suspect.tenant]).own},
                    {},
                )
        return None

    def _engine(self, faults: float) -> Finding:
        reason = f"without the engine's pauses and slow stretches the victims would have been spared {faults:.0%}"
        mechanism = largest_mechanism(self.case.excess[self.case.excess["holder"] == -2]) or "unexplained"
        confidence = Confidence.HIGH if faults >= ENOUGH else Confidence.MEDIUM
        return Finding(Verdict.ENGINE_STALL, confidence, (), mechanism, (reason,), {}, {})

    def _overload(self) -> Finding:
        excess = self.case.excess
        return Finding(
            Verdict.OVERLOAD,
            Confidence.MEDIUM,
            (),
            largest_mechanism(excess[excess["holder"] >= 0]),
            ("no tenant's return to its usual would have spared the victims: together they were too much",),
            {},
            {},
        )

    def _shapley(self, tenants: Sequence[int]) -> dict[int, float]:
        """Each one's mean gain over all orders in which they return to usual (Shapley, 1953)."""
        n = len(tenants)
        value = {
            frozenset(part): self._glance(part) if part else 0.0
            for size in range(n + 1)
            for part in combinations(tenants, size)
        }
        if n == 1:
            return {tenants[0]: 1.0}
        return {
            one: sum(
                factorial(len(part)) * factorial(n - len(part) - 1) / factorial(n) * (value[part | {one}] - value[part])
                for part in value
                if one not in part
            )
            for one in tenants
        }

    def _note(self, kind: InterventionKind, what: str, tenants: Sequence[int]) -> None:
        self.interventions.append(self.replays.describe(kind, what, tenants, self.replays.usual(tenants)))
