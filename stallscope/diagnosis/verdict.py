"""From an incident's charges to a verdict: who, by which mechanism, through which request, and how sure.

A tenant is accused only if its charges carry the incident and it sent more than chance makes of its usual (``changes``).
Where the recording could be replayed, that decides (``blame``); without a replay, no confidence is higher than medium.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from stallscope.diagnosis.blame import ACCUSES, Judgement, judge_by_replay
from stallscope.diagnosis.case import FAR_MORE, Case, Finding, dominates, reason_for, open_case
from stallscope.diagnosis.changes import Changes
from stallscope.diagnosis.evidence import charges_of, share, suspect_requests, victims
from stallscope.diagnosis.incidents import Waits, Window, not_usual, windows_of_changes
from stallscope.diagnosis.load import STEP_TIME, Loads
from stallscope.diagnosis.model import Confidence, Culprit, Incident, Intervention, Verdict
from stallscope.diagnosis.neighbors import judge_changes
from stallscope.diagnosis.outstanding import stands_out
from stallscope.diagnosis.partition import Mechanism, Party
from stallscope.diagnosis.remedies import try_remedies
from stallscope.diagnosis.replay.interventions import DRAWS, IncidentReplays
from stallscope.diagnosis.replay.replayer import Replayer
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.suspects import (
    STEP_FIXED,
    Suspect,
    find_suspect,
    healthy_waits,
    largest_mechanism,
    usual_charges,
)

CARRIES = 0.4  # share of the loss above which tenants, the engine or one's own tenant carry an incident
LEAST_SHARE = 0.1  # share below which a tenant is not accused beside others
HARMED = 0.3  # share of the loss that must be others' for theirs alone to be looked at
ENOUGH_OF_SET = 0.8  # culprits are the smallest set that makes up this share of what the accused caused
# After a stall those who are as usual queue for one another: that backlog is part of the loss, and no cause of it. Who
# carries this much of the whole and that much of what is no backlog carries the incident too.
CARRIES_WITH_BACKLOG, CARRIES_BUT_BACKLOG = 0.25, 0.6
MOST_OF_THEIRS = 0.5  # of what tenants are charged, for those who changed to be accused where no replay can tell
BACKLOG_WORTH_SAYING = 0.1
DOMINATES = 0.5


def judge(
    replica: Replica,
    waits: Waits,
    changes: Changes,
    episodes: list[Window],
    windows: list[Window],
    replayer: Replayer | None = None,
    *,
    remedies: bool = False,
) -> Iterator[tuple[Incident | None, float]]:
    """What changed and hurt others, then each window of stalls that this does not explain, as an incident (None: it was
    none), with the share of all that is done.

    Without a ``replayer``, by charges alone, and of the windows only.

    ``episodes``: all stretches with stalled waits, of which the windows are some: none of them counts as usual.
    ``remedies``: those are tried too, on the incidents that could be replayed.
    """
    loads = Loads(replica, not_usual(waits, episodes, replica.timeline_ns), changes)
    healthy = healthy_waits(waits, windows)
    usual = usual_charges(waits, healthy)
    changed = windows_of_changes(waits, changes)
    of_changed: list[IncidentReplays | None] = [None] * len(changed)
    of_windows: list[IncidentReplays | None] = [None] * len(windows)
    if replayer is not None and replayer.trusted:
        of_changed = list(replayer.incidents([stretch for stretch, _ in changed], waits, healthy, loads))
        of_windows = list(replayer.incidents(windows, waits, healthy, loads))
    total = len(changed) + len(windows)
    blamed: list[tuple[Window, Finding]] = []
    for number, ((_, window), replays) in enumerate(zip(changed, of_changed, strict=True), start=1):
        incident = None
        case = open_case(replica, waits, window, loads, healthy, usual)
        judgement = judge_changes(case, replays) if replays is not None else _changed_by_charges(case, windows)
        if judgement.finding is not None:
            blamed.append((window, judgement.finding))
            incident = _incident(case, judgement, replays if remedies else None)
        yield incident, number / total
    for number, (window, replays) in enumerate(zip(windows, of_windows, strict=True), start=len(changed) + 1):
        incident = None
        case = open_case(replica, waits, window, loads, healthy, usual)
        by_charges = judge_by_charges(case)
        judgement = Judgement(by_charges, ())
        if not _beyond_replay(by_charges):
            if _explained(window, replays, blamed, by_charges):
                yield None, number / total
                continue
            if replays is not None:
                judgement = judge_by_replay(case, replays, by_charges)
        if case.breaks_slo:
            # A promise that was broken is an incident, however usual that is, and whatever a replay can say of it.
            judgement = judgement if judgement.finding is not None else Judgement(by_charges, ())
        if judgement.finding is not None and (case.breaks_slo or not _is_natural(case, judgement.finding)):
            incident = _incident(case, judgement, replays if remedies else None)
        yield incident, number / total


def _changed_by_charges(case: Case, windows: Sequence[Window]) -> Judgement:
    """Where there is no replay: those who changed and are charged most of what others lost, if that is out of the way."""
    stalled = any(one.start <= case.window.end and one.end >= case.window.start for one in windows)
    if not stalled and not stands_out(case):
        return Judgement(None, ())
    finding = judge_by_charges(case)
    if finding.culprits and all(suspect.change is not None for suspect in finding.culprits):
        return Judgement(finding, ())
    # Much of a stall may be nobody's: what all queue for one another, and what a step costs in any case.
    changed = [suspect for suspect in case.suspects if suspect.change is not None]
    caused, by_all = (sum(suspect.caused_ns for suspect in those) for those in (changed, case.suspects))
    if caused < MOST_OF_THEIRS * by_all or caused < case.share_of(Party.ENGINE) * case.charged_ns or not caused:
        return Judgement(None, ())
    chosen = _smallest_set(changed)
    reasons = tuple(reason_for(case, suspect) for suspect in chosen)
    mechanism = str(chosen[0].mechanism)
    return Judgement(Finding(Verdict.NOISY_NEIGHBOR, Confidence.LOW, tuple(chosen), mechanism, reasons, {}, {}), ())


def _explained(
    window: Window, replays: IncidentReplays | None, blamed: Sequence[tuple[Window, Finding]], by_charges: Finding
) -> bool:
    """Whether a stall is what somebody is blamed for already: their return to usual restores it, or charges say so."""
    for other, finding in blamed:
        if window.start > other.end or window.end < other.start:
            continue
        culprits = {suspect.tenant for suspect in finding.culprits}
        if by_charges.culprits and {suspect.tenant for suspect in by_charges.culprits} <= culprits:
            return True
        if replays is None:
            if by_charges.verdict is Verdict.OVERLOAD:
                return True
            continue
        effect = replays.usual(sorted(culprits), DRAWS[:1])
        if max(effect.mean, effect.own if finding.verdict is Verdict.SELF_INFLICTED else 0.0) >= ACCUSES:
            return True
    return False


def _is_natural(case: Case, finding: Finding) -> bool:
    """Whether it is no more than what the trace is full of, and nobody had changed; an overload: nor all together."""
    if _beyond_replay(finding) or finding.verdict is Verdict.ENGINE_STALL:
        return False
    if finding.verdict is Verdict.OVERLOAD and not case.loads.changes.all_grew(case.window.start, case.window.end):
        return True
    changed = any(suspect.change is not None for suspect in finding.culprits)
    return not changed and not stands_out(case)


def _beyond_replay(finding: Finding) -> bool:
    """Whether no replay of the engine could say more."""
    return finding.verdict in (Verdict.INSUFFICIENT_DATA, Verdict.OUTSIDE_ENGINE, Verdict.COLD_CACHE)


# --- by charges ---------------------------------------------------------------------------------------------------


def judge_by_charges(case: Case) -> Finding:
    """What the charges alone say."""
    charged, backlog = case.charged_ns, case.backlog
    engine, unseen = case.share_of(Party.ENGINE), case.share_of(Party.UNSEEN)
    # What a culprit's own requests lost is no measure of what it did to others.
    to_others = (1.0 - case.own_share) * charged
    of = to_others if to_others >= HARMED * charged else charged
    accused = [s for s in case.suspects if s.change is not None and share(s.caused_ns, of) >= LEAST_SHARE]
    carried = share(sum(s.caused_ns for s in accused), of)
    chosen: list[Suspect] = []
    if unseen >= 0.5 and (only := _only_one_that_changed(case)) is not None:
        verdict = Verdict.NOISY_NEIGHBOR
        chosen = [only]
        mechanism = str(only.mechanism) if only.caused_ns > 0 else None
        reasons = [
            reason_for(case, only),
            f"nobody else had changed; but {unseen:.0%} of the victims' loss lies in stretches without telemetry",
        ]
    elif unseen >= 0.5:
        verdict = Verdict.INSUFFICIENT_DATA
        mechanism = None
        reasons = [f"{unseen:.0%} of the victims' loss lies in stretches without telemetry"]
    elif (outside := case.share_of(Party.FRONTEND)) >= CARRIES:
        verdict = Verdict.OUTSIDE_ENGINE
        mechanism = largest_mechanism(case.excess[case.excess["holder"] == int(Party.FRONTEND)])
        reasons = [f"{outside:.0%} of the loss lies before the engine's queue, or after its last token"]
    elif (cold := case.cold_share) >= CARRIES:
        verdict = Verdict.COLD_CACHE
        mechanism = str(Mechanism.CACHE_EVICTION)
        reasons = [f"{cold:.0%} of the loss is prompts computed in full that are usually found in the prefix cache"]
    elif accused and _carries(carried, backlog) and carried >= engine:
        verdict = Verdict.NOISY_NEIGHBOR
        chosen = _smallest_set(accused)
        mechanism = str(chosen[0].mechanism)
        reasons = [reason_for(case, suspect) for suspect in chosen]
    elif (hog := _hog(case, of)) is not None:
        verdict = Verdict.NOISY_NEIGHBOR
        chosen = [hog]
        mechanism = str(hog.mechanism)
        reasons = [f"{reason_for(case, hog)}: it is as usual, and far more than anybody else's"]
    elif _carries(engine, backlog):
        verdict = Verdict.ENGINE_STALL
        mechanism = engine_mechanism(case)
        reasons = [f"{engine:.0%} of the loss is time that no request's work explains"]
    elif case.own_share >= CARRIES and case.own and case.own[0].change is not None:
        verdict = Verdict.SELF_INFLICTED
        chosen = [case.own[0]]
        mechanism = str(chosen[0].mechanism)
        reasons = [reason_for(case, chosen[0])]
    else:
        verdict = Verdict.OVERLOAD
        mechanism = largest_mechanism(case.excess[case.excess["holder"] >= 0])
        reasons = ["no tenant sent more than chance makes of its usual: together they were too much"]
    named = all(case.replica.tenants[suspect.tenant] != "(unknown)" for suspect in chosen)
    # The shares that count for confidence are those of what is no backlog.
    sure = {
        Verdict.NOISY_NEIGHBOR: share(carried, 1 - backlog) >= 0.6 and named,
        Verdict.ENGINE_STALL: share(engine, 1 - backlog) >= 0.6,
        Verdict.OUTSIDE_ENGINE: case.share_of(Party.FRONTEND) >= 0.6,
    }.get(verdict, False)
    confidence = Confidence.MEDIUM if sure else Confidence.LOW
    return Finding(verdict, confidence, tuple(chosen), mechanism, tuple(reasons), {}, {})


def _only_one_that_changed(case: Case) -> Suspect | None:
    """Who, where charges say little: one tenant that had changed, while others waited."""
    if len(case.unusual) != 1:
        return None
    (tenant,) = case.unusual
    waited = case.waits.table.loc[case.window.waits, "tenant"].to_numpy()
    if (waited != tenant).mean() < HARMED:
        return None
    return find_suspect(case.excess, tenant, case.loads, case.window)


def _hog(case: Case, of_ns: float) -> Suspect | None:
    """Who costs others most by far, and holds most of the slots or blocks that they lack, all the time.

    A tenant that always takes most of the time of steps is what the engine is for.
    """
    if case.unusual or not case.suspects or case.suspects[0].resource == STEP_TIME:
        return None
    if not dominates(case, case.suspects[0]):
        return None
    first, others = case.suspects[0], case.suspects[1:]
    alone = not others or first.caused_ns >= FAR_MORE * others[0].caused_ns
    return first if alone and share(first.caused_ns, of_ns) >= CARRIES_WITH_BACKLOG else None


def engine_mechanism(case: Case) -> str | None:
    """How the engine itself cost the victims most."""
    return largest_mechanism(case.excess[case.excess["holder"] == int(Party.ENGINE)])


def _smallest_set(accused: list[Suspect]) -> list[Suspect]:
    """The first of the accused (sorted by what they caused) that together caused enough."""
    total = sum(suspect.caused_ns for suspect in accused)
    chosen: list[Suspect] = []
    for suspect in accused:
        if sum(s.caused_ns for s in chosen) >= ENOUGH_OF_SET * total:
            break
        chosen.append(suspect)
    return chosen


def _carries(part: float, backlog: float) -> bool:
    """Whether who has this share of the loss carries the incident; ``backlog``: share that has no cause of its own."""
    return part >= CARRIES or (part >= CARRIES_WITH_BACKLOG and share(part, 1 - backlog) >= CARRIES_BUT_BACKLOG)


# --- as it is reported --------------------------------------------------------------------------------------------


def _incident(case: Case, judgement: Judgement, replays: IncidentReplays | None) -> Incident:
    """``replays``: remedies are tried in those, if it could be replayed."""
    finding, interventions = judgement.finding, judgement.interventions
    assert finding is not None
    tried: tuple[Intervention, ...] = ()
    if replays is not None and interventions:
        tried = try_remedies(replays, [suspect.tenant for suspect in finding.culprits], finding.mechanism)
    replica, window, charged = case.replica, case.window, case.charged_ns
    accused = {suspect.tenant for suspect in finding.culprits}
    others = [suspect for suspect in case.suspects if suspect.tenant not in accused]
    fixed = case.everything[case.everything["mechanism"] == STEP_FIXED]
    return Incident(
        replica=replica.name,
        start_ns=window.start,
        end_ns=window.end,
        verdict=finding.verdict,
        confidence=finding.confidence,
        mechanism=finding.mechanism,
        culprits=tuple(_culprit(case, suspect, finding) for suspect in finding.culprits),
        victims=victims(replica, case.waits, window, case.healthy, case.everything),
        lost_s=case.lost_ns / 1e9,
        charged_s=charged / 1e9,
        charges=charges_of(replica, pd.concat([case.excess, fixed])),
        runner_up=replica.tenants[others[0].tenant] if others else None,
        runner_up_share=share(others[0].caused_ns, charged) if others else 0.0,
        reasons=(*finding.reasons, *_backlog(case, finding.verdict)),
        group=finding.group,
        interventions=interventions,
        remedies=tried,
    )


def _backlog(case: Case, verdict: Verdict) -> list[str]:
    """That a part of the loss has no cause of its own, where it is worth saying."""
    if verdict not in (Verdict.NOISY_NEIGHBOR, Verdict.ENGINE_STALL) or case.backlog < BACKLOG_WORTH_SAYING:
        return []
    return [f"{case.backlog:.0%} of the loss is backlog: requests of tenants as usual queued for one another"]


def _culprit(case: Case, suspect: Suspect, finding: Finding) -> Culprit:
    replica, tenant = case.replica, suspect.tenant
    requests = suspect_requests(replica, case.waits, case.window, tenant)
    top = requests[0] if requests else None
    return Culprit(
        tenant=replica.tenants[tenant],
        tenant_source=replica.sources[tenant],
        mechanism=str(suspect.mechanism),
        caused_s=suspect.caused_ns / 1e9,
        share=share(suspect.caused_ns, case.charged_ns),
        load=suspect.load.level,
        usual_load=suspect.load.usual,
        load_of=suspect.resource,
        requests=requests,
        dominating_request=top.request if top and top.share >= DOMINATES else None,
        restored=finding.restored.get(tenant),
        shapley=finding.shapley.get(tenant),
    )
