"""What made a stall that no change explains, by what would have been: no faults, fair shares, everyone as usual.

A steady heavy tenant is capacity, not an incident, even though its deletion would help; where only everyone's return
to usual helps, it is overload, and no name. What moves nobody's percentile is no incident. Who changed, and whom that
hurt, is judged first (``neighbors``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stallscope.diagnosis.case import Case, Finding, dominates, reason_for
from stallscope.diagnosis.model import Confidence, Intervention, InterventionKind, Verdict
from stallscope.diagnosis.partition import Mechanism, Party
from stallscope.diagnosis.replay.interventions import DRAWS, Effect, IncidentReplays
from stallscope.diagnosis.shortage import mechanism_of
from stallscope.diagnosis.suspects import largest_mechanism

ENOUGH = 0.8  # share of the victims' excess that a return to usual must restore, to be sure of it
NEARLY_ALL = 0.9  # share of the excess that must be a tenant's own for it to have harmed nobody else
ACCUSES = 0.5  # below, nothing is found
REPRODUCED = (0.5, 2.0)  # replayed over recorded excess, outside of which a replay says nothing


@dataclass(frozen=True, slots=True)
class Judgement:
    """What replays say of a window: a finding and the replays behind it. Without a finding it was no incident."""

    finding: Finding | None
    interventions: tuple[Intervention, ...]


def judge_by_replay(case: Case, replays: IncidentReplays, by_charges: Finding) -> Judgement:
    """The finding that replays support; ``by_charges`` where they don't reproduce the incident."""
    reproduced = replays.replayed_excess / max(replays.recorded_excess, 1e-9)
    if not REPRODUCED[0] <= reproduced <= REPRODUCED[1]:
        return Judgement(by_charges, ())
    trial = _Trial(case, replays)
    return Judgement(trial.decide(), tuple(trial.interventions))


class _Trial:
    """The replays of one case, in the order in which they are needed."""

    def __init__(self, case: Case, replays: IncidentReplays) -> None:
        self.case = case
        self.replays = replays
        self.interventions: list[Intervention] = []

    def decide(self) -> Finding | None:
        return self._engine() or self._self_inflicted() or self._chronic() or self._overload()

    @property
    def _everyone(self) -> list[int]:
        return list(range(len(self.case.replica.tenants)))

    def _counts(self, effect: Effect, apart: Sequence[int] = ()) -> bool:
        """Whether what the effect undoes had moved a percentile so that somebody would notice."""
        harm = self.replays.harm(effect, apart)
        return harm is not None and harm.counts

    # --- findings ---------------------------------------------------------------------------------------------

    def _engine(self) -> Finding | None:
        """Whether an engine without faults restores the victims, and better than the return of those who changed."""
        if not self.replays.stretch.machine.disturbances.any_fault:
            return None
        changed = sorted(self.case.unusual)
        best = self.replays.usual(changed, DRAWS[:1]).mean if changed else 0.0
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
            if suspect.change is None or mine < NEARLY_ALL * self.replays.replayed_excess:
                continue
            effect = self.replays.usual(tenants)
            harm = self.replays.change_of_all(effect, tenants)
            if effect.own < ACCUSES or harm is None or not harm.counts:
                continue
            self._note(InterventionKind.USUAL, f"{self._name(suspect.tenant)} as usual", tenants, effect)
            return Finding(
                Verdict.SELF_INFLICTED,
                Confidence.HIGH if effect.own >= ENOUGH else Confidence.MEDIUM,
                (suspect,),
                str(suspect.mechanism),
                (reason_for(self.case, suspect),),
                {suspect.tenant: effect.own},
                {},
            )
        return None

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
            mechanism_of(self.case, self.replays, [tenant], lambda one: self.replays.relaxed(one, [tenant]).mean),
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
        harm = self.replays.change_of_all(effect, everyone)
        if effect.own < ACCUSES or harm is None or not harm.counts:
            return None
        effect = replace(effect, restored=(effect.own,))
        charged = self.case.excess[self.case.excess["holder"] >= 0]
        reason = "only everyone's return to usual would have spared the victims: together they were too much"
        self._note(InterventionKind.USUAL, "everyone as usual", everyone, effect)
        return Finding(Verdict.OVERLOAD, Confidence.MEDIUM, (), largest_mechanism(charged), (reason,), {}, {})

    # --- what is shown ----------------------------------------------------------------------------------------

    def _name(self, tenant: int) -> str:
        return self.case.replica.tenants[tenant]

    def _note(self, kind: InterventionKind, what: str, tenants: Sequence[int], effect: Effect) -> None:
        self.interventions.append(self.replays.describe(kind, what, tenants, effect))
