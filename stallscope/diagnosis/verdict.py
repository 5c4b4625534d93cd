"""From windows to incidents, each with a verdict: whom a change hurt first, then the stalls that this does not explain.

Where the recording could be replayed, that decides (``neighbors``, ``stalls``), else charges do (``accounting``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from stallscope.diagnosis.accounting import judge_by_charges, most_of_theirs
from stallscope.diagnosis.case import Case, Finding, open_case
from stallscope.diagnosis.changes import CHANCE, Changes
from stallscope.diagnosis.evidence import charges_of, share, suspect_requests, victims
from stallscope.diagnosis.incidents import Waits, Window, not_usual, windows_of_changes
from stallscope.diagnosis.load import Loads
from stallscope.diagnosis.model import Confidence, Culprit, Incident, Intervention, ReplayCheck, Verdict
from stallscope.diagnosis.neighbors import judge_changes
from stallscope.diagnosis.outstanding import stands_out
from stallscope.diagnosis.partition import OWN_CONDITIONS
from stallscope.diagnosis.portion import WHOLE, Portion
from stallscope.diagnosis.reliance import as_far_as_seen
from stallscope.diagnosis.remedies import try_remedies
from stallscope.diagnosis.replay.interventions import DRAWS, IncidentReplays
from stallscope.diagnosis.replay.replayer import Replayer
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.stalls import ACCUSES, Judgement, judge_by_replay
from stallscope.diagnosis.stitch import Found
from stallscope.diagnosis.suspects import STEP_FIXED, Suspect, healthy_waits, usual_charges

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
    portion: Portion = WHOLE,
) -> Iterator[tuple[Found | None, float]]:
    """What changed and hurt others, then each window of stalls that this does not explain, as an incident (None: it was
    none), with the share of all that is done.

    Without a ``replayer``, by charges alone.

    ``episodes``: all stretches with stalled waits, of which the windows are some: none of them counts as usual.
    ``remedies``: those are tried too, on the incidents that could be replayed. What isn't ``portion``'s to tell is left
    out.
    """
    loads = Loads(replica, not_usual(waits, episodes, replica.timeline_ns), changes)
    healthy = healthy_waits(waits, windows)
    usual = usual_charges(waits, healthy)
    changed = windows_of_changes(waits, changes)
    of_changed: list[IncidentReplays | None] = [None] * len(changed)
    own = [(window, mine) for window in windows if (mine := portion.own(window, waits)) is not None]
    of_windows: list[IncidentReplays | None] = [None] * len(own)
    if replayer is not None and replayer.trusted:
        of_changed = list(replayer.incidents([stretch for stretch, _ in changed], waits, healthy, loads))
        of_windows = list(replayer.incidents([mine for _, mine in own], waits, healthy, loads))
    check = None if replayer is None else replayer.check
    total = len(changed) + len(own)
    blamed: list[tuple[Window, Finding]] = []
    for number, ((_, window), replays) in enumerate(zip(changed, of_changed, strict=True), start=1):
        incident = None
        mine = portion.own(window, waits)
        case = open_case(replica, waits, mine or window, loads, healthy, usual)
        judgement = judge_changes(case, replays) if replays is not None else _changed_by_charges(case, windows)
        if judgement.finding is not None:
            blamed.append((window, judgement.finding))
            if mine is not None:
                incident = Found(
                    _incident(case, judgement, replays if remedies else None, check), cut=mine is not window
                )
        yield incident, number / total
    for number, ((whole, window), replays) in enumerate(zip(own, of_windows, strict=True), start=len(changed) + 1):
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
                if _names_nobody(case, judgement) and replayer is not None:
                    judgement = _possibly_changed(case, replayer, healthy, usual) or judgement
        if case.breaks_slo:
            # A promise that was broken is an incident, however usual that is, and whatever a replay can say of it.
            judgement = judgement if judgement.finding is not None else Judgement(by_charges, ())
        if judgement.finding is not None and (case.breaks_slo or not _is_natural(case, judgement.finding)):
            incident = Found(_incident(case, judgement, replays if remedies else None, check), cut=window is not whole)
        yield incident, number / total


def _names_nobody(case: Case, judgement: Judgement) -> bool:
    """Whether there is a stall out of the way, and neither a name for it nor a fault."""
    named = judgement.finding is not None and judgement.finding.verdict is not Verdict.OVERLOAD
    return not named and stands_out(case)


def _possibly_changed(
    case: Case, replayer: Replayer, healthy: pd.DataFrame, usual: pd.Series[float]
) -> Judgement | None:
    """Whether somebody did what chance makes now and then, and more harm by it than chance does.

    How unlikely it was and by what factor a percentile rose count together.
    """
    window, changes = case.window, case.loads.changes
    there = [one for one in changes.possible if one.start <= window.end and one.until >= window.start]
    for change in sorted(there, key=lambda one: one.chance):
        loads = Loads(case.replica, case.loads.windows, Changes((change,)))
        (replays,) = replayer.incidents([window], case.waits, healthy, loads)
        harm = replays.harm(replays.usual([change.tenant]), [change.tenant])
        if harm is None or not harm.counts or change.chance - harm.magnitude > CHANCE:
            continue
        judgement = judge_changes(open_case(case.replica, case.waits, window, loads, healthy, usual), replays)
        if judgement.finding is not None and judgement.finding.verdict is Verdict.NOISY_NEIGHBOR:
            return judgement
    return None


def _changed_by_charges(case: Case, windows: Sequence[Window]) -> Judgement:
    """Where there is no replay: those who changed and are charged most, if there was a stall or it stands out."""
    stalled = any(one.start <= case.window.end and one.end >= case.window.start for one in windows)
    if not stalled and not stands_out(case):
        return Judgement(None, ())
    finding = judge_by_charges(case)
    if finding.culprits and all(suspect.change is not None for suspect in finding.culprits):
        return Judgement(finding, ())
    return Judgement(most_of_theirs(case), ())


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
    if _beyond_replay(finding):
        return False
    if finding.verdict is Verdict.ENGINE_STALL:
        # A replay without faults has shown it, or it is to be seen.
        return finding.confidence is not Confidence.HIGH and not stands_out(case)
    if finding.verdict is Verdict.OVERLOAD and not case.loads.changes.all_grew(case.window.start, case.window.end):
        return True
    changed = any(suspect.change is not None for suspect in finding.culprits)
    return not changed and not stands_out(case)


def _beyond_replay(finding: Finding) -> bool:
    """Whether no replay of the engine could say more: of what it waits for apart from its batch, it knows nothing."""
    beyond = (Verdict.INSUFFICIENT_DATA, Verdict.OUTSIDE_ENGINE, Verdict.COLD_CACHE)
    return finding.verdict in beyond or finding.mechanism in OWN_CONDITIONS


# --- as it is reported --------------------------------------------------------------------------------------------


def _incident(case: Case, judgement: Judgement, replays: IncidentReplays | None, check: ReplayCheck | None) -> Incident:
    """``replays``: remedies are tried in those, if it could be replayed, by a replay that was checked so."""
    finding, interventions = judgement.finding, judgement.interventions
    assert finding is not None
    finding = as_far_as_seen(finding, case.replica, case.window, check if interventions else None)
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
