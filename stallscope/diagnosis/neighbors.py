"""Whom a change hurt: those who changed return to their usual in a replay, and a percentile of the others tells.

A change is no accusation. To blame is who moved somebody else's percentile so that it would be noticed; of several that
changed at a time, those whose part of that (Shapley, "A value for n-person games", 1953) is not small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from math import factorial

from stallscope.diagnosis.case import Case, Finding, reason_for
from stallscope.diagnosis.evidence import share
from stallscope.diagnosis.metrics import IN_WORDS
from stallscope.diagnosis.model import Confidence, InterventionKind, Verdict
from stallscope.diagnosis.parties import ChangedParty, parties_of, tenants_of
from stallscope.diagnosis.replay.harm import Harm
from stallscope.diagnosis.replay.interventions import DRAWS, Effect, IncidentReplays
from stallscope.diagnosis.shortage import mechanism_of
from stallscope.diagnosis.stalls import Judgement
from stallscope.diagnosis.suspects import Suspect
from stallscope.trace.reserved import UNKNOWN

LEAST_PART = 0.25  # of the harm, below which a party is not accused beside others
MOST_PARTIES = 4


def judge_changes(case: Case, replays: IncidentReplays) -> Judgement:
    """Who of those that had changed in a window hurt others, or only themselves; no finding if nobody would notice."""
    parties = parties_of(case, case.loads.changes.during(replays.window.start, replays.window.end))
    hurt = _hurt_others(replays, parties)
    if hurt is None:
        return _self_inflicted(case, replays, parties)
    harm, parts = hurt
    chosen = sorted((one for one in parts if parts[one] >= LEAST_PART), key=lambda one: -parts[one])
    return _noisy(case, replays, harm, {one: parts[one] for one in chosen})


def _hurt_others(
    replays: IncidentReplays, parties: Sequence[ChangedParty]
) -> tuple[Harm, dict[ChangedParty, float]] | None:
    """The worst of what the parties did to others, and each one's part of it."""
    harm = replays.harm(replays.usual(tenants_of(parties)), tenants_of(parties))
    if harm is not None and harm.counts:
        return harm, _parts(replays, harm, parties)
    if len(parties) == 1:
        return None
    alone = {party: replays.harm(replays.usual(party.tenants), party.tenants) for party in parties}
    hurt = {party: harm for party, harm in alone.items() if harm is not None and harm.counts}
    if not hurt:
        return None
    worst = max(hurt, key=lambda party: hurt[party].excess_s)
    return hurt[worst], {worst: 1.0}


def _parts(replays: IncidentReplays, harm: Harm, parties: Sequence[ChangedParty]) -> dict[ChangedParty, float]:
    """Each party's Shapley value: the mean of what its return adds to what that of those before it restored."""
    restored = _restored(replays, harm, tenants_of(parties))

    def worth(some: Sequence[ChangedParty]) -> float:
        return restored(replays.usual(tenants_of(some))) if some else 0.0

    if len(parties) > MOST_PARTIES:
        # What is left out is what does next to nothing alone.
        parties = sorted(parties, key=lambda one: -worth([one]))[:MOST_PARTIES]
    n = len(parties)
    value = {frozenset(some): worth(some) for size in range(n + 1) for some in combinations(parties, size)}
    return {
        one: sum(
            factorial(len(some)) * factorial(n - len(some) - 1) / factorial(n) * (value[some | {one}] - value[some])
            for some in value
            if one not in some
        )
        for one in parties
    }


def _restored(replays: IncidentReplays, harm: Harm, culprits: Sequence[int]) -> Callable[[Effect], float]:
    """How much of a harm an effect undoes, as a share of what the culprits' return undoes by the same draws."""

    def restored(effect: Effect) -> float:
        usual = replays.usual(culprits, DRAWS[: len(effect.outcomes)])
        undone, most = (replays.same_harm(harm, one.outcomes).excess_s for one in (effect, usual))
        return share(undone, most)

    return restored


# --- findings -----------------------------------------------------------------------------------------------------


def _noisy(case: Case, replays: IncidentReplays, harm: Harm, parts: dict[ChangedParty, float]) -> Judgement:
    names = case.replica.tenants
    tenants = tenants_of(list(parts))
    effect = replays.usual(tenants)
    who = ", ".join(names[tenant] for tenant in tenants)
    intervention = replays.describe(InterventionKind.USUAL, f"{who} as usual", tenants, effect)
    restored = _restored(replays, harm, tenants)
    reasons = [party.group or reason_for(case, party.suspects[0]) for party in parts]
    reasons.append(f"with {who} as usual, {_in_words(harm, names)}")
    total = sum(parts.values())
    mechanism = mechanism_of(case, replays, tenants, lambda one: restored(replays.relaxed(one, tenants)))
    finding = Finding(
        Verdict.NOISY_NEIGHBOR,
        Confidence.MEDIUM if UNKNOWN in (names[tenant] for tenant in tenants) else Confidence.HIGH,
        tuple(suspect for party in parts for suspect in party.suspects),
        mechanism,
        tuple(reasons),
        {
            tenant: min(max(restored(replays.usual(party.tenants, DRAWS[:1])), 0.0), 1.0)
            for party in parts
            for tenant in party.tenants
        },
        {tenant: part / total / len(party.tenants) for party, part in parts.items() for tenant in party.tenants},
        next((party.group for party in parts if party.group), ""),
    )
    return Judgement(finding, (intervention,))


def _self_inflicted(case: Case, replays: IncidentReplays, parties: Sequence[ChangedParty]) -> Judgement:
    """Whether a change slowed down what its tenant sends anyway."""
    worst: tuple[Harm, Suspect] | None = None
    for suspect in (suspect for party in parties for suspect in party.suspects):
        if suspect.change is None or suspect.change.newcomer:
            continue
        effect = replays.usual([suspect.tenant])
        for harm in (replays.harm_to([suspect.tenant], effect), replays.change_of_all(effect, [suspect.tenant])):
            if harm is not None and harm.counts and (worst is None or harm.excess_s > worst[0].excess_s):
                worst = harm, suspect
    if worst is None:
        return Judgement(None, ())
    harm, suspect = worst
    name = case.replica.tenants[suspect.tenant]
    effect = replays.usual([suspect.tenant])
    finding = Finding(
        Verdict.SELF_INFLICTED,
        Confidence.HIGH,
        (suspect,),
        str(suspect.mechanism),
        (reason_for(case, suspect), f"with {name} as usual, {_in_words(harm, case.replica.tenants)}"),
        {suspect.tenant: 1.0},
        {},
    )
    return Judgement(finding, (replays.describe(InterventionKind.USUAL, f"{name} as usual", [suspect.tenant], effect),))


def _in_words(harm: Harm, tenants: Sequence[str]) -> str:
    count, whose = len(harm.requests), f"{tenants[harm.tenant]}'s requests"
    which = f"{count:,} of {whose} around it" if count else f"{whose} in it"
    what = f"the {IN_WORDS[harm.metric]} p{harm.quantile * 100:.0f} of {which}"
    return f"{what} would have been {harm.without_s:.3g} s, not {harm.with_s:.3g} s (both replayed)"
