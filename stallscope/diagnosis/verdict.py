"""From an incident's charges to a verdict: who, by which mechanism, through which request, and how sure.

Charges count above what the same holder usually costs the same kind of victim; a tenant is accused only if its charges
carry the incident and its load was beyond what chance makes of its usual load. Without a replay, no confidence is
higher than medium.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.diagnosis.evidence import charges_of, share, suspect_requests, victims
from stallscope.diagnosis.incidents import TTFT, Waits, Window
from stallscope.diagnosis.load import RESOURCE_OF, STEP_TIME, Load, Loads
from stallscope.diagnosis.model import Confidence, Culprit, Incident, Verdict
from stallscope.diagnosis.partition import MECHANISMS, Mechanism, Party
from stallscope.diagnosis.replica import Replica

CARRIES = 0.4  # share of the loss above which tenants, the engine or one's own tenant carry an incident
LEAST_SHARE = 0.1  # share below which a tenant is not accused beside others
ENOUGH_OF_SET = 0.8  # culprits are the smallest set that makes up this share of what the accused caused
# After a stall those who are as usual queue for one another: that backlog is part of the loss, and no cause of it. Who
# carries this much of the whole and that much of what is no backlog carries the incident too.
CARRIES_WITH_BACKLOG, CARRIES_BUT_BACKLOG = 0.25, 0.6
BACKLOG_WORTH_SAYING = 0.1
UNUSUAL_SIGMAS = 5.0
UNUSUAL_GROWTH = 1.5
DOMINATES = 0.5

_QUEUES = [MECHANISMS.index(m) for m in (Mechanism.KV_PINNING, Mechanism.PREFILL_QUEUE, Mechanism.SLOT_EXHAUSTION)]
_OWN_WORK, _STEP_FIXED = MECHANISMS.index(Mechanism.OWN_WORK), MECHANISMS.index(Mechanism.STEP_FIXED)


@dataclass(frozen=True)
class _Suspect:
    tenant: int
    caused_ns: float
    mechanism: Mechanism
    load: Load
    common_growth: float
    resource: str

    @property
    def unusual(self) -> bool:
        """Its load has grown beyond chance, and beyond what all have grown."""
        return (
            self.load.sigmas_beyond(self.common_growth) >= UNUSUAL_SIGMAS
            and self.load.growth >= UNUSUAL_GROWTH * self.common_growth
        )


def judge(replica: Replica, waits: Waits, windows: list[Window]) -> list[Incident]:
    """One incident for each window, in their order."""
    loads = Loads(replica, [(window.start, window.end) for window in windows])
    healthy = _healthy_waits(waits, windows)
    usual = _usual_charges(waits, healthy)
    return [_judge_window(replica, waits, window, loads, healthy, usual) for window in windows]


# --- charges above usual ------------------------------------------------------------------------------------------


def _healthy_waits(waits: Waits, windows: list[Window]) -> pd.DataFrame:
    """Waits that were not stalled, outside of all windows."""
    table = waits.table
    calm = ~table["stalled"] & ~table["censored"]
    for window in windows:
        calm &= (table["end"] < window.start) | (table["begin"] > window.end)
    return table[calm]


def _usual_charges(waits: Waits, healthy: pd.DataFrame) -> pd.Series[float]:
    """Mean ns by (tenant, metric, holder, mechanism) that a healthy wait is charged: TTFT only."""
    healthy = healthy[(healthy["metric"] == TTFT) & healthy["charged"]]
    count = healthy.groupby(["tenant", "metric"]).size()
    charges = waits.charges.merge(healthy[["tenant", "metric"]], left_on="query", right_index=True)
    total = charges.groupby(["tenant", "metric", "holder", "mechanism"])["ns"].sum()
    keys = total.index.to_frame()[["tenant", "metric"]]
    mean: pd.Series[float] = total / count.reindex(pd.MultiIndex.from_frame(keys)).to_numpy()
    return mean


def _excess_charges(waits: Waits, window: Window, usual: pd.Series[float]) -> pd.DataFrame:
    """Charges of the window's stalled waits above usual: wait, victim (tenant), holder, mechanism, ns (float)."""
    stalled = waits.table.loc[window.waits]
    charges = waits.charges[waits.charges["query"].isin(window.waits)]
    charges = charges.merge(stalled[["tenant", "metric"]], left_on="query", right_index=True)
    keys = pd.MultiIndex.from_frame(charges[["tenant", "metric", "holder", "mechanism"]])
    known = usual.reindex(keys).fillna(0.0).to_numpy() if len(usual) else np.zeros(len(charges))
    charges["ns"] = np.maximum(charges["ns"] - known, 0.0)
    return charges[charges["mechanism"] != _OWN_WORK].rename(columns={"query": "wait", "tenant": "victim"})


def _pass_on_head_of_line(excess: pd.DataFrame, waits: Waits, window: Window, unusual: set[int]) -> pd.DataFrame:
    """What is charged to a head of the queue that was as usual goes to those for whom the head itself waited.

    The partition charges the head alone; a head that lacks blocks or tokens because others hold them is not the cause.
    """
    head_code = MECHANISMS.index(Mechanism.HEAD_OF_LINE)
    is_head = (excess["mechanism"] == head_code) & ~excess["holder"].isin(unusual)
    if not is_head.any():
        return excess
    table = waits.table
    overlapping = table[(table["metric"] == TTFT) & (table["end"] > window.start) & (table["begin"] < window.end)]
    behind = waits.charges.merge(overlapping[["tenant"]], left_on="query", right_index=True)
    behind = behind[behind["mechanism"].isin(_QUEUES)]
    cause = behind.groupby(["tenant", "holder", "mechanism"])["ns"].sum()
    share = (cause / cause.groupby(level="tenant").sum()).rename("share").reset_index()
    moved = excess[is_head].merge(share, left_on="holder", right_on="tenant", how="left", suffixes=("", "_cause"))
    found = moved["share"].notna()
    moved.loc[found, "ns"] *= moved.loc[found, "share"]
    for column in ("holder", "mechanism"):
        moved[column] = moved[f"{column}_cause"].where(found, moved[column]).astype(np.int64)
    return pd.concat([excess[~is_head], moved[excess.columns]], ignore_index=True)


# --- the verdict --------------------------------------------------------------------------------------------------


def _judge_window(
    replica: Replica, waits: Waits, window: Window, loads: Loads, healthy: pd.DataFrame, usual: pd.Series[float]
) -> Incident:
    everything = _excess_charges(waits, window, usual)
    # What a step costs whatever is in it is no tenant's doing and no fault: part of the loss, but of no one's share.
    excess = everything[everything["mechanism"] != _STEP_FIXED]
    tenants = range(len(replica.tenants))
    first_look = {tenant: _suspect(excess, tenant, loads, window) for tenant in tenants}
    unusual = {tenant for tenant, suspect in first_look.items() if suspect and suspect.unusual}
    excess = _pass_on_head_of_line(excess, waits, window, unusual)
    charged = float(excess["ns"].sum())
    own = excess["holder"] == excess["victim"]
    to_others = excess[~own]
    suspects = [s for tenant in tenants if (s := _suspect(to_others, tenant, loads, window)) is not None]
    suspects.sort(key=lambda suspect: -suspect.caused_ns)
    by_holder = excess.groupby("holder")["ns"].sum()
    engine = share(by_holder.get(int(Party.ENGINE), 0.0), charged)
    unseen = share(by_holder.get(int(Party.UNSEEN), 0.0), charged)
    accused = [s for s in suspects if s.unusual and share(s.caused_ns, charged) >= LEAST_SHARE]
    carried = share(sum(s.caused_ns for s in accused), charged)
    own_share = share(float(excess.loc[own, "ns"].sum()), charged)
    queued = excess["mechanism"].isin(_QUEUES) & (excess["holder"] >= 0) & ~excess["holder"].isin(unusual)
    backlog = share(float(excess.loc[queued, "ns"].sum()), charged)

    culprits: tuple[Culprit, ...] = ()
    mechanism: str | None = None
    if unseen >= 0.5:
        verdict = Verdict.INSUFFICIENT_DATA
        reasons = [f"{unseen:.0%} of the victims' loss lies in stretches without telemetry"]
    elif accused and _carries(carried, backlog) and carried >= engine:
        verdict = Verdict.NOISY_NEIGHBOR
        chosen = _smallest_set(accused)
        culprits = tuple(_culprit(replica, waits, window, suspect, charged) for suspect in chosen)
        mechanism = culprits[0].mechanism
        reasons = [_load_reason(replica, suspect) for suspect in chosen]
    elif _carries(engine, backlog):
        verdict = Verdict.ENGINE_STALL
        mechanism = _largest_mechanism(excess[excess["holder"] == int(Party.ENGINE)])
        reasons = [f"{engine:.0%} of the loss is time that no request's work explains"]
    elif own_share >= CARRIES and (grown := _grown_victim(excess[own], loads, window)) is not None:
        verdict = Verdict.SELF_INFLICTED
        culprits = (_culprit(replica, waits, window, grown, charged),)
        mechanism = culprits[0].mechanism
        reasons = [_load_reason(replica, grown)]
    else:
        verdict = Verdict.OVERLOAD
        mechanism = _largest_mechanism(excess[excess["holder"] >= 0])
        reasons = ["no tenant's load is beyond what chance makes of its usual: together they were too much"]
    if verdict in (Verdict.NOISY_NEIGHBOR, Verdict.ENGINE_STALL) and backlog >= BACKLOG_WORTH_SAYING:
        reasons.append(f"{backlog:.0%} of the loss is backlog: requests of tenants as usual queued for one another")
    others = [s for s in suspects if all(replica.tenants[s.tenant] != c.tenant for c in culprits)]
    return Incident(
        replica=replica.name,
        start_ns=window.start,
        end_ns=window.end,
        verdict=verdict,
        confidence=_confidence(verdict, share(carried, 1 - backlog), share(engine, 1 - backlog), culprits),
        mechanism=mechanism,
        culprits=culprits,
        victims=victims(replica, waits, window, healthy, everything),
        lost_s=float(everything["ns"].sum()) / 1e9,
        charged_s=charged / 1e9,
        charges=charges_of(replica, pd.concat([excess, everything[everything["mechanism"] == _STEP_FIXED]])),
        runner_up=replica.tenants[others[0].tenant] if others else None,
        runner_up_share=share(others[0].caused_ns, charged) if others else 0.0,
        reasons=tuple(reasons),
    )


def _suspect(excess: pd.DataFrame, tenant: int, loads: Loads, window: Window) -> _Suspect | None:
    """A tenant that cost victims something: how much, mostly by what, and its load on that resource."""
    caused = excess[excess["holder"] == tenant]
    if caused.empty or caused["ns"].sum() <= 0:
        return None
    name = _largest_mechanism(caused)
    mechanism = Mechanism(name) if name else Mechanism.UNEXPLAINED
    resource = RESOURCE_OF.get(mechanism, STEP_TIME)
    load = loads.of_all(resource, window.start, window.end)[tenant]
    common = loads.growth_of_others(tenant, resource, window.start, window.end)
    return _Suspect(tenant, float(caused["ns"].sum()), mechanism, load, common, resource)


def _largest_mechanism(charges: pd.DataFrame) -> str | None:
    if charges.empty:
        return None
    return str(MECHANISMS[int(np.bincount(charges["mechanism"], charges["ns"]).argmax())])


def _smallest_set(accused: list[_Suspect]) -> list[_Suspect]:
    """The first of the accused (sorted by what they caused) that together caused enough."""
    total = sum(suspect.caused_ns for suspect in accused)
    chosen: list[_Suspect] = []
    for suspect in accused:
        if sum(s.caused_ns for s in chosen) >= ENOUGH_OF_SET * total:
            break
        chosen.append(suspect)
    return chosen


def _grown_victim(own: pd.DataFrame, loads: Loads, window: Window) -> _Suspect | None:
    """The tenant that lost most to itself, if its load was unusual."""
    tenant = int(np.bincount(own["holder"], own["ns"]).argmax())
    suspect = _suspect(own, tenant, loads, window)
    return suspect if suspect is not None and suspect.unusual else None


def _carries(part: float, backlog: float) -> bool:
    """Whether who has this share of the loss carries the incident; ``backlog``: share that has no cause of its own."""
    return part >= CARRIES or (part >= CARRIES_WITH_BACKLOG and share(part, 1 - backlog) >= CARRIES_BUT_BACKLOG)


def _confidence(verdict: Verdict, carried: float, engine: float, culprits: tuple[Culprit, ...]) -> Confidence:
    """At most medium without a replay; the shares are those of what is no backlog."""
    if verdict is Verdict.NOISY_NEIGHBOR:
        sure = carried >= 0.6 and all(culprit.tenant != "(unknown)" for culprit in culprits)
    elif verdict is Verdict.ENGINE_STALL:
        sure = engine >= 0.6
    else:
        sure = False
    return Confidence.MEDIUM if sure else Confidence.LOW


def _culprit(replica: Replica, waits: Waits, window: Window, suspect: _Suspect, charged: float) -> Culprit:
    requests = suspect_requests(replica, waits, window, suspect.tenant)
    top = requests[0] if requests else None
    return Culprit(
        tenant=replica.tenants[suspect.tenant],
        tenant_source=replica.sources[suspect.tenant],
        mechanism=str(suspect.mechanism),
        caused_s=suspect.caused_ns / 1e9,
        share=share(suspect.caused_ns, charged),
        load=suspect.load.level,
        usual_load=suspect.load.usual,
        load_of=suspect.resource,
        requests=requests,
        dominating_request=top.request if top and top.share >= DOMINATES else None,
    )


def _load_reason(replica: Replica, suspect: _Suspect) -> str:
    load, tenant = suspect.load, replica.tenants[suspect.tenant]
    if load.usual <= 0:
        return f"{tenant} took {load.level:.0%} of the {suspect.resource}; outside incidents it takes none"
    return f"{tenant} took {load.level:.0%} of the {suspect.resource}, usually {load.usual:.1%}"
