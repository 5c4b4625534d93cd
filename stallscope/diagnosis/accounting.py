"""What the charges of a stall say by themselves, where no replay can tell what would have been: who, and how sure.

A tenant is accused only if its charges carry what others lost, and it had changed.
"""

from __future__ import annotations

import pandas as pd

from stallscope.diagnosis.case import FAR_MORE, Case, Finding, dominates, reason_for
from stallscope.diagnosis.evidence import share
from stallscope.diagnosis.incidents import FEWEST_STALLED
from stallscope.diagnosis.load import STEP_TIME
from stallscope.diagnosis.model import Confidence, Verdict
from stallscope.diagnosis.parties import ChangedParty, parties_of
from stallscope.diagnosis.partition import MECHANISMS, Mechanism, Party
from stallscope.diagnosis.replica import BATCHES_SEEN
from stallscope.diagnosis.suspects import Suspect, largest_mechanism
from stallscope.trace.reserved import UNKNOWN

CARRIES = 0.4  # share of the loss above which tenants, the engine or one's own tenant carry an incident
SURELY = 0.6  # the same, of what is no backlog, to be surer of it
LEAST_SHARE = 0.1  # share below which a tenant is not accused beside others
HARMED = 0.3  # share of the loss that must be others' for theirs alone to be looked at
MOST_UNSEEN = 0.5  # share of the loss without telemetry, from which on charges say nothing
ENOUGH_OF_SET = 0.8  # culprits are the smallest set that makes up this share of what the accused caused
COMES_AND_GOES = 0.5  # share that a stall's time and a change's must have in common to be one
SHORT = 0.1  # share of what a culprit is charged that a shortage of blocks or slots must be, to be the mechanism
MOST_OF_THEIRS = 0.5  # of what tenants are charged, for those who changed to be accused though others carry much
# After a stall those who are as usual queue for one another: that backlog is part of the loss, and no cause of it. Who
# carries this much of the whole and that much of what is no backlog carries the incident too.
CARRIES_WITH_BACKLOG, CARRIES_BUT_BACKLOG = 0.25, 0.6
_CONDITION_WORDS = {
    Mechanism.GRAMMAR_COMPILE: "waiting until grammars were compiled",
    Mechanism.KV_TRANSFER: "waiting for KV blocks from elsewhere, as from a prefill instance",
    Mechanism.ADAPTER_SWAP: "waiting for room for adapters",
    Mechanism.ENCODER: "waiting for the encoder",
}
_SHORTAGES = [
    MECHANISMS.index(one)
    for one in (
        Mechanism.KV_PINNING,
        Mechanism.HEAD_OF_LINE,
        Mechanism.PREEMPTION,
        Mechanism.RECOMPUTE,
        Mechanism.SLOT_EXHAUSTION,
    )
]


def judge_by_charges(case: Case) -> Finding:
    """The first that the charges support: the engine, who changed, a hog, a tenant itself, nobody."""
    return (
        _unseen(case)
        or _outside(case)
        or _cold(case)
        or _changed(case)
        or _condition(case)
        or _hog(case)
        or _engine(case)
        or _self_inflicted(case)
        or _overload(case)
    )


def most_of_theirs(case: Case) -> Finding | None:
    """Those who changed, if tenants are charged mostly for them, and the engine for less or for little of it all.

    Much of a stall may be nobody's: what all queue for one another, and what a step costs in any case. Through many
    steps their usual scatter adds up, too.
    """
    changed = [suspect for suspect in case.suspects if suspect.change is not None]
    caused, by_all = (sum(suspect.caused_ns for suspect in those) for those in (changed, case.suspects))
    engines = _nobodys(case) * case.charged_ns
    if not caused or caused < MOST_OF_THEIRS * by_all:
        return None
    if caused < engines and engines >= CARRIES_WITH_BACKLOG * case.lost_ns:
        return None
    return _noisy(case, _smallest_set(changed), sure=False)


# --- one by one -------------------------------------------------------------------------------------------------


def _unseen(case: Case) -> Finding | None:
    """Where most of the loss lies in stretches without telemetry: the only one that had changed, or nobody."""
    unseen = case.share_of(Party.UNSEEN)
    if unseen < MOST_UNSEEN:
        return None
    where = f"{unseen:.0%} of the victims' loss lies in stretches without telemetry"
    only = _only_party_that_changed(case)
    if only is None:
        return _finding(Verdict.INSUFFICIENT_DATA, None, where)
    charged = case.excess[case.excess["holder"].isin(only.tenants)]
    mechanism = largest_mechanism(_cost_to_others(case, only) if charged.empty else charged)
    reasons = (only.group or reason_for(case, only.suspects[0]), f"nobody else had changed; but {where}")
    return Finding(Verdict.NOISY_NEIGHBOR, Confidence.LOW, only.suspects, mechanism, reasons, {}, {}, only.group)


def _cost_to_others(case: Case, party: ChangedParty) -> pd.DataFrame:
    """What a party cost others while it was not as usual, wherever there is telemetry: in the dark nothing is charged.

    Columns of ``Waits.charges``; all that was charged, not only what is more than usual.
    """
    changes = [suspect.change for suspect in party.suspects if suspect.change is not None]
    table = case.waits.table
    near = (table["end"] > min(one.start for one in changes)) & (table["begin"] < max(one.until for one in changes))
    others = table.index[near & ~table["tenant"].isin(party.tenants)]
    charges = case.waits.charges
    return charges[charges["holder"].isin(party.tenants) & charges["query"].isin(others)]


def _only_party_that_changed(case: Case) -> ChangedParty | None:
    """The only one that had changed while others waited."""
    parties = parties_of(case, case.loads.changes.during(case.window.start, case.window.end))
    if len(parties) != 1:
        return None
    waited = case.waits.table.loc[case.window.waits, "tenant"]
    return parties[0] if (~waited.isin(parties[0].tenants)).mean() >= HARMED else None


def _outside(case: Case) -> Finding | None:
    outside = case.share_of(Party.FRONTEND)
    if outside < CARRIES:
        return None
    mechanism = largest_mechanism(case.excess[case.excess["holder"] == int(Party.FRONTEND)])
    reason = f"{outside:.0%} of the loss lies before the engine's queue, or after its last token"
    return _finding(Verdict.OUTSIDE_ENGINE, mechanism, reason, sure=outside >= SURELY)


def _cold(case: Case) -> Finding | None:
    if case.cold_share < CARRIES:
        return None
    reason = f"{case.cold_share:.0%} of the loss is prompts computed in full that are usually found in the prefix cache"
    return _finding(Verdict.COLD_CACHE, str(Mechanism.CACHE_EVICTION), reason)


def _changed(case: Case) -> Finding | None:
    """Those who had changed, if they carry what others lost, and more of it than the engine."""
    lost_ns = _lost_by_others(case)
    suspects = [suspect for suspect in case.suspects if suspect.change is not None]
    accused = [suspect for suspect in suspects if share(suspect.caused_ns, lost_ns) >= LEAST_SHARE]
    carried = share(sum(suspect.caused_ns for suspect in accused), lost_ns)
    if not accused or not _carries(case, carried) or carried < _nobodys(case):
        return None
    return _noisy(case, _smallest_set(accused), sure=share(carried, 1 - case.backlog) >= SURELY)


def _nobodys(case: Case) -> float:
    """Share of what is charged that is the engine's, or is for what requests waited for apart from all others."""
    return case.share_of(Party.ENGINE) + case.condition_share


def _condition(case: Case) -> Finding | None:
    """Where requests waited for something that no other request holds: that is named, and no tenant."""
    waited = case.condition_share
    if waited < CARRIES:
        return None
    mechanism = largest_mechanism(case.of_conditions)
    verdict = Verdict.OUTSIDE_ENGINE if mechanism == Mechanism.KV_TRANSFER else Verdict.ENGINE_STALL
    reason = f"{waited:.0%} of the loss is {_CONDITION_WORDS[Mechanism(mechanism or Mechanism.KV_TRANSFER)]}"
    return _finding(verdict, mechanism, reason, sure=waited >= SURELY)


def _hog(case: Case) -> Finding | None:
    """Who costs others most by far, and holds most of the slots or blocks that they lack, all the time.

    A tenant that always takes most of the time of steps is what the engine is for.
    """
    first = case.suspects[0] if case.suspects else None
    if case.unusual or first is None or first.resource == STEP_TIME or not dominates(case, first):
        return None
    if len(case.suspects) > 1 and first.caused_ns < FAR_MORE * case.suspects[1].caused_ns:
        return None
    if share(first.caused_ns, _lost_by_others(case)) < CARRIES_WITH_BACKLOG:
        return None
    reason = f"{reason_for(case, first)}: it is as usual, and far more than anybody else's"
    return Finding(Verdict.NOISY_NEIGHBOR, Confidence.LOW, (first,), str(first.mechanism), (reason,), {}, {})


def _engine(case: Case) -> Finding | None:
    engine = case.share_of(Party.ENGINE)
    if not _carries(case, engine):
        return None
    mechanism = largest_mechanism(case.excess[case.excess["holder"] == int(Party.ENGINE)])
    if case.replica.fidelity < BATCHES_SEEN and mechanism == Mechanism.UNEXPLAINED and case.unusual:
        return _work_not_told(case, engine)
    reason = f"{engine:.0%} of the loss is time that no request's work explains"
    return _finding(Verdict.ENGINE_STALL, mechanism, reason, sure=share(engine, 1 - case.backlog) >= SURELY)


def _work_not_told(case: Case, engine: float) -> Finding:
    """Where batches are estimates, work that is done twice, or for what the cache had lost, is not told: it looks like
    the engine's own. If it comes and goes with the only one that had changed, it is that one's doing; a single request
    may be there by chance."""
    where = f"{engine:.0%} of the loss is time that no work that was told explains"
    only = _only_party_that_changed(case)
    if only is None or _requests_of(only) < FEWEST_STALLED or _overlap(case, only) < COMES_AND_GOES:
        return _finding(Verdict.INSUFFICIENT_DATA, Mechanism.UNEXPLAINED, f"{where}, and somebody had changed")
    reasons = (only.group or reason_for(case, only.suspects[0]), f"nobody else had changed, and {where}")
    mechanism = largest_mechanism(_cost_to_others(case, only))
    return Finding(Verdict.NOISY_NEIGHBOR, Confidence.LOW, only.suspects, mechanism, reasons, {}, {}, only.group)


def _requests_of(party: ChangedParty) -> int:
    return sum(suspect.change.count for suspect in party.suspects if suspect.change is not None)


def _overlap(case: Case, party: ChangedParty) -> float:
    """How much a window and the time of a party's change have in common, as a share of both together."""
    changes = [suspect.change for suspect in party.suspects if suspect.change is not None]
    begin, end = min(one.start for one in changes), max(one.until for one in changes)
    common = min(end, case.window.end) - max(begin, case.window.start)
    return max(common, 0) / max(max(end, case.window.end) - min(begin, case.window.start), 1)


def _self_inflicted(case: Case) -> Finding | None:
    if case.own_share < CARRIES or not case.own or case.own[0].change is None:
        return None
    own = case.own[0]
    reasons = (reason_for(case, own),)
    return Finding(Verdict.SELF_INFLICTED, Confidence.LOW, (own,), str(own.mechanism), reasons, {}, {})


def _overload(case: Case) -> Finding:
    mechanism = largest_mechanism(case.excess[case.excess["holder"] >= 0])
    reason = "no tenant sent more than chance makes of its usual: together they were too much"
    return _finding(Verdict.OVERLOAD, mechanism, reason)


# --- what they have in common -----------------------------------------------------------------------------------


def _finding(verdict: Verdict, mechanism: str | None, reason: str, *, sure: bool = False) -> Finding:
    """One without a name."""
    return Finding(verdict, Confidence.MEDIUM if sure else Confidence.LOW, (), mechanism, (reason,), {}, {})


def _noisy(case: Case, culprits: list[Suspect], *, sure: bool) -> Finding:
    named = all(case.replica.tenants[suspect.tenant] != UNKNOWN for suspect in culprits)
    confidence = Confidence.MEDIUM if sure and named else Confidence.LOW
    reasons = tuple(reason_for(case, suspect) for suspect in culprits)
    mechanism = _mechanism(case, culprits[0])
    return Finding(Verdict.NOISY_NEIGHBOR, confidence, tuple(culprits), mechanism, reasons, {}, {})


def _mechanism(case: Case, culprit: Suspect) -> str:
    """What a culprit is charged most by; of a shortage of blocks or slots, a part of the charges is enough.

    Where blocks are short, most of the waiting looks like that for any prompt; where they are not, none is charged.
    """
    charged = case.excess[case.excess["holder"] == culprit.tenant]
    short = charged[charged["mechanism"].isin(_SHORTAGES)]
    if short["ns"].sum() >= SHORT * charged["ns"].sum() and (name := largest_mechanism(short)) is not None:
        return name
    return str(culprit.mechanism)


def _lost_by_others(case: Case) -> float:
    """What is charged but to the victims' own tenants (ns): what a culprit's own requests lost is no measure of what it
    did to others. All of it, where next to none of others waited."""
    to_others = (1.0 - case.own_share) * case.charged_ns
    waited = case.waits.table.loc[case.window.waits, "tenant"]
    others = int((~waited.isin(list(case.unusual))).sum())
    enough = others >= FEWEST_STALLED if case.unusual else to_others >= HARMED * case.charged_ns
    return to_others if enough else case.charged_ns


def _smallest_set(accused: list[Suspect]) -> list[Suspect]:
    """The first of the accused (sorted by what they caused) that together caused enough."""
    total = sum(suspect.caused_ns for suspect in accused)
    chosen: list[Suspect] = []
    for suspect in accused:
        if sum(s.caused_ns for s in chosen) >= ENOUGH_OF_SET * total:
            break
        chosen.append(suspect)
    return chosen


def _carries(case: Case, part: float) -> bool:
    """Whether who has this share of the loss carries the incident."""
    but_backlog = share(part, 1 - case.backlog)
    return part >= CARRIES or (part >= CARRIES_WITH_BACKLOG and but_backlog >= CARRIES_BUT_BACKLOG)
