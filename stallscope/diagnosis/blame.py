"""Who is to blame for an incident, by what would have been: suspects as usual, groups of them, everyone, no faults.

A tenant is to blame if its return to usual restores the victims, and its load was beyond chance. A steady heavy tenant
is capacity, not an incident, even though its deletion would help; where only everyone's return to usual helps, it is
overload, and no name. What moves nobody's percentile is no incident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from math import factorial

import numpy as np
import pandas as pd

from stallscope.diagnosis.case import Case, Finding, dominates, load_reason
from stallscope.diagnosis.model import Confidence, Intervention, InterventionKind, Verdict
from stallscope.diagnosis.outstanding import stands_out
from stallscope.diagnosis.partition import MECHANISMS, Mechanism, Party
from stallscope.diagnosis.replay.interventions import DRAWS, Effect, IncidentReplays
from stallscope.diagnosis.replay.relaxations import relaxations
from stallscope.diagnosis.suspects import Suspect, largest_mechanism

ENOUGH = 0.8  # share of the victims' excess that the return of all culprits to usual must restore
NEARLY_ALL = 0.9  # share of the excess that must be a tenant's own for it to have harmed nobody else
ACCUSES = 0.5  # below, nobody is accused
MOST_SUSPECTS = 6
MOST_CULPRITS = 4
LEAST_GAIN = 0.1  # what one more culprit must add
FEWEST_ALIKE = 3  # newcomers of one shape that count as one
ALIKE = 1.5  # their sizes differ by no larger factor
WORTH_TRYING = 0.1  # share of the culprits' charges by the mechanisms of a relaxation, for that to be tried
TIE = 0.1  # restored so nearly alike, relaxations are told apart by charges
PINS = 0.05  # share of the charges by one shortage from which on a head that does not fit counts as pinning
LEAST_RESTORABLE = 0.3  # of the excess, that everyone's return is taken to restore at least
REPRODUCED = (0.5, 2.0)  # replayed over recorded excess, outside of which a replay says nothing
HINTS = 0.1  # the same, above which it may hint at somebody where the charges name nobody


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One suspect, or several newcomers that act alike; the one that cost most first."""

    suspects: tuple[Suspect, ...]
    group: str = ""

    @property
    def tenants(self) -> tuple[int, ...]:
        return tuple(suspect.tenant for suspect in self.suspects)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What replays say of a window: a finding and the replays behind it. Without a finding it was no incident."""

    finding: Finding | None
    interventions: tuple[Intervention, ...]


def judge_by_replay(case: Case, replays: IncidentReplays, by_charges: Finding) -> Judgement:
    """The finding that replays support; ``by_charges`` where they don't reproduce the incident."""
    reproduced = replays.replayed_excess / max(replays.recorded_excess, 1e-9)
    trial = _Trial(case, replays)
    if REPRODUCED[0] <= reproduced <= REPRODUCED[1]:
        return Judgement(trial.decide(), tuple(trial.interventions))
    if by_charges.verdict is Verdict.OVERLOAD and reproduced >= HINTS:
        # Less than half of the incident is there, but the charges name nobody: better a hint than nothing.
        found = trial.decide()
        if found is not None and found.verdict is Verdict.NOISY_NEIGHBOR:
            return Judgement(replace(found, confidence=Confidence.LOW), tuple(trial.interventions))
    return Judgement(by_charges, ())


class _Trial:
    """The replays of one case, in the order in which they are needed."""

    def __init__(self, case: Case, replays: IncidentReplays) -> None:
        self.case = case
        self.replays = replays
        self.interventions: list[Intervention] = []

    def decide(self) -> Finding | None:
        candidates = self._candidates()
        glances = {one: self._glance(one.tenants) for one in candidates}
        best = max(glances.values(), default=0.0)
        if (finding := self._engine(best)) is not None:
            return finding
        if (finding := self._self_inflicted()) is not None:
            return finding
        if (finding := self._neighbors(glances)) is not None:
            return finding
        return self._chronic() or self._overload()

    # --- suspects ---------------------------------------------------------------------------------------------

    def _candidates(self) -> list[_Candidate]:
        """Those worth a replay: whose load was unusual, by what the victims are charged for them."""
        found: dict[int, Suspect] = {}
        for suspect in [*self.case.suspects, *self.case.own]:
            if suspect.tenant not in found and suspect.unusual:
                found[suspect.tenant] = suspect
        groups = self._alike([suspect for suspect in found.values() if suspect.load.usual <= 0])
        grouped = {tenant for group in groups for tenant in group.tenants}
        single = [_Candidate((suspect,)) for suspect in found.values() if suspect.tenant not in grouped]
        ranked = sorted([*groups, *single], key=lambda one: -sum(s.caused_ns for s in one.suspects))
        return ranked[:MOST_SUSPECTS]

    def _alike(self, newcomers: list[Suspect]) -> list[_Candidate]:
        """Newcomers whose requests are of one shape, as groups."""
        replica = self.case.replica
        sizes = replica.requests[["prompt_tokens"]].assign(limit=replica.clients["max_tokens"])
        shapes = {}
        for suspect in newcomers:
            mine = sizes[replica.tenant_of_request == suspect.tenant]
            shapes[suspect.tenant] = mine.median().to_numpy(np.float64) + 1.0
        left = sorted(newcomers, key=lambda s: -s.caused_ns)
        groups = []
        while left:
            shape = shapes[left[0].tenant]
            group = [s for s in left if np.abs(np.log(shapes[s.tenant] / shape)).max() <= np.log(ALIKE)]
            left = [s for s in left if s not in group]
            if len(group) >= FEWEST_ALIKE:
                text = f"{len(group)} newcomers of one shape: prompts of about {shape[0] - 1:,.0f} tokens"
                groups.append(_Candidate(tuple(group), text))
        return groups

    def _glance(self, tenants: Sequence[int]) -> float:
        """What these tenants' return to usual restores, by one draw: enough to choose whom to look at."""
        return self._of_restorable(self.replays.usual(tenants, DRAWS[:1]).mean)

    def _of_restorable(self, restored: float) -> float:
        """A share of the excess as a share of what everyone's return restores: a busy engine has stalls too."""
        return restored / max(self._restorable, LEAST_RESTORABLE)

    @cached_property
    def _restorable(self) -> float:
        return self.replays.usual(self._everyone).own

    @property
    def _everyone(self) -> list[int]:
        return list(range(len(self.case.replica.tenants)))

    def _counts(self, effect: Effect, apart: Sequence[int] = ()) -> bool:
        """Whether what the effect undoes had moved a percentile so that somebody would notice."""
        harm = self.replays.harm(effect, apart)
        return harm is not None and harm.counts

    # --- findings ---------------------------------------------------------------------------------------------

    def _engine(self, best: float) -> Finding | None:
        """Whether an engine without faults restores the victims, and better than any tenant's return."""
        if not self.replays.stretch.machine.disturbances.any_fault:
            return None
        effect = self.replays.without_faults()
        if effect.mean < max(ACCUSES, best) or not self._counts(effect):
            return None
        reason = f"without the engine's pauses and slow stretches the victims would have been spared {effect.mean:.0%}"
        engines = self.case.excess[self.case.excess["holder"] == int(Party.ENGINE)]
        confidence = Confidence.HIGH if effect.mean >= ENOUGH else Confidence.MEDIUM
        mechanism = largest_mechanism(engines) or str(Mechanism.UNEXPLAINED)
        return Finding(Verdict.ENGINE_STALL, confidence, (), mechanism, (reason,), {}, {})

    def _self_inflicted(self) -> Finding | None:
        """Whether nearly all of the excess is one tenant's own, and its return to usual ends it."""
        for suspect in self.case.own[:1]:
            tenants = [suspect.tenant]
            mine = self.replays.excess_of(tenants)
            if not suspect.unusual or mine < NEARLY_ALL * self.replays.replayed_excess:
                continue
            effect = self.replays.usual(tenants)
            harm = self.replays.own_harm(effect, tenants)
            if effect.own < ACCUSES or harm is None or not harm.counts:
                continue
            self._note(InterventionKind.USUAL, f"{self._name(suspect.tenant)} as usual", tenants, effect)
            return Finding(
                Verdict.SELF_INFLICTED,
                Confidence.HIGH if effect.own >= ENOUGH else Confidence.MEDIUM,
                (suspect,),
                str(suspect.mechanism),
                (load_reason(self.case, suspect),),
                {suspect.tenant: effect.own},
                {},
            )
        return None

    def _neighbors(self, glances: dict[_Candidate, float]) -> Finding | None:
        """The fewest whose return to usual restores the victims."""
        chosen = self._smallest_set(glances)
        if not chosen:
            return None
        tenants = [tenant for one in chosen for tenant in one.tenants]
        effect = self.replays.usual(tenants)
        restored = min(self._of_restorable(effect.mean), 1.0)
        if restored < ACCUSES or not self._counts(effect, tenants):
            return None
        names = [self._name(tenant) for tenant in tenants]
        self._note(InterventionKind.USUAL, f"{', '.join(names)} as usual", tenants, effect)
        suspects = [suspect for one in chosen for suspect in one.suspects]
        reasons = [load_reason(self.case, one.suspects[0]) for one in chosen if not one.group]
        reasons += [one.group for one in chosen if one.group]
        it = "they" if len(tenants) > 1 else "it"
        reasons.append(f"as usual, {it} would have spared the victims {effect.mean:.0%}")
        sure = restored >= ENOUGH and "(unknown)" not in names
        return Finding(
            Verdict.NOISY_NEIGHBOR,
            Confidence.HIGH if sure else Confidence.MEDIUM,
            tuple(suspects),
            self._mechanism(tenants),
            tuple(reasons),
            {tenant: glances[one] for one in chosen for tenant in one.tenants},
            self._shapley(chosen),
            next((one.group for one in chosen if one.group), ""),
        )

    def _smallest_set(self, glances: dict[_Candidate, float]) -> list[_Candidate]:
        """Found by adding the one that helps most, until enough is restored."""
        chosen: list[_Candidate] = []
        reached = 0.0
        left = list(glances)
        while left and reached < ENOUGH and len(chosen) < MOST_CULPRITS:
            before = [tenant for one in chosen for tenant in one.tenants]
            gains = {one: self._glance([*before, *one.tenants]) if chosen else glances[one] for one in left}
            best = max(left, key=lambda one: gains[one])
            if gains[best] < reached + LEAST_GAIN:
                break
            chosen.append(best)
            reached = gains[best]
            left.remove(best)
        return chosen

    def _chronic(self) -> Finding | None:
        """Where nobody is other than usual: whether one tenant that dominates, held to its fair share, restores all."""
        suspect = next((one for one in self.case.suspects if dominates(self.case, one)), None)
        if suspect is None:
            return None
        tenant = suspect.tenant
        cap = self._fair_share(tenant)
        effect = self.replays.capped({tenant: cap})
        if effect.mean < ENOUGH or not self._counts(effect, [tenant]):
            return None
        what = f"{self._name(tenant)} held to its fair share, {cap} requests at once"
        self._note(InterventionKind.FAIR_SHARE, what, [tenant], effect)
        return Finding(
            Verdict.NOISY_NEIGHBOR,
            Confidence.MEDIUM,
            (suspect,),
            self._mechanism([tenant]),
            (f"{what}, would have spared the victims {effect.mean:.0%}: its load is as usual, and too much",),
            {tenant: effect.mean},
            {tenant: 1.0},
        )

    def _fair_share(self, tenant: int) -> int:
        """Requests at once that give a tenant an equal part of slots and KV cache, among those who are active."""
        replica, config, window = self.case.replica, self.replays.history.config, self.case.window
        active = replica.requests
        active = active[(active["arrival"] <= window.end) & (active["seen_until"] >= window.start)]
        tenants = max(int(active["tenant"].nunique()), 1)
        mine = active[active["tenant"] == tenant]
        tokens = float((mine["prompt_tokens"] + mine["output_tokens"]).mean()) if len(mine) else 1.0
        by_blocks = config.kv_blocks * config.block_size / tenants / max(tokens, 1.0)
        return max(1, int(min(config.max_num_seqs / tenants, by_blocks)))

    def _overload(self) -> Finding | None:
        """Whether everyone's return to usual restores the victims; None where even that would not be noticed."""
        everyone = self._everyone
        effect = self.replays.usual(everyone)
        harm = self.replays.own_harm(effect, everyone)
        if effect.own < ACCUSES or harm is None or not harm.counts or not stands_out(self.case):
            return None
        effect = replace(effect, restored=(effect.own,))
        charged = self.case.excess[self.case.excess["holder"] >= 0]
        reason = "only everyone's return to usual would have spared the victims: together they were too much"
        self._note(InterventionKind.USUAL, "everyone as usual", everyone, effect)
        return Finding(Verdict.OVERLOAD, Confidence.MEDIUM, (), largest_mechanism(charged), (reason,), {}, {})

    # --- the mechanism ----------------------------------------------------------------------------------------

    def _mechanism(self, culprits: Sequence[int]) -> str | None:
        """What the engine was short of, and of the mechanisms of that the one by which the culprits cost most."""
        excess = self.case.excess
        theirs = excess[excess["holder"].isin(list(culprits))]
        charged = np.bincount(theirs["mechanism"], theirs["ns"], len(MECHANISMS))
        by_name = pd.Series(charged, index=[str(mechanism) for mechanism in MECHANISMS])
        total = max(float(by_name.sum()), 1e-9)
        tried = {}
        for relaxation in relaxations(self.replays.history.config):
            part = by_name.reindex([str(one) for one in relaxation.mechanisms]).fillna(0.0)
            if part.sum() / total >= WORTH_TRYING:
                restored = self.replays.relaxed(relaxation, culprits).mean
                tried[_named(part)] = restored + TIE * float(part.sum()) / total
        return max(tried, key=lambda name: tried[name]) if tried else largest_mechanism(theirs)

    # --- shares, and what is shown ----------------------------------------------------------------------------

    def _shapley(self, chosen: Sequence[_Candidate]) -> dict[int, float]:
        """Each one's mean gain over all orders in which they return to usual (Shapley, 1953); a group's is shared."""
        n = len(chosen)
        value = {
            frozenset(part): self._glance([tenant for one in part for tenant in one.tenants]) if part else 0.0
            for size in range(n + 1)
            for part in combinations(chosen, size)
        }
        gains = {
            one: sum(
                factorial(len(part)) * factorial(n - len(part) - 1) / factorial(n) * (value[part | {one}] - value[part])
                for part in value
                if one not in part
            )
            for one in chosen
        }
        total = sum(gains.values()) or 1.0
        return {tenant: gains[one] / total / len(one.tenants) for one in chosen for tenant in one.tenants}

    def _name(self, tenant: int) -> str:
        return self.case.replica.tenants[tenant]

    def _note(self, kind: InterventionKind, what: str, tenants: Sequence[int], effect: Effect) -> None:
        self.interventions.append(self.replays.describe(kind, what, tenants, effect))


def _named(charged: pd.Series[float]) -> str:
    """Of the mechanisms that one relaxation takes away, the one that most is charged by.

    Who stands before the others and does not fit lacks blocks: pinning is the cause where there is any of it.
    """
    pinning = str(Mechanism.KV_PINNING)
    if charged.idxmax() == str(Mechanism.HEAD_OF_LINE) and charged.get(pinning, 0.0) >= PINS * charged.sum():
        return pinning
    return str(charged.idxmax())
