"""Who cost an incident's victims more than it usually does, by which mechanism, and whether it had changed.

Charges count above what the same holder usually costs the same kind of victim: who always costs something is no news.
They pick the suspects and explain the mechanism; whether one is to blame is decided elsewhere (``verdict``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.diagnosis.changes import Change
from stallscope.diagnosis.incidents import Waits, Window
from stallscope.diagnosis.load import RESOURCE_OF, STEP_TIME, Load, Loads
from stallscope.diagnosis.metrics import TTFT
from stallscope.diagnosis.partition import MECHANISMS, OWN_CONDITIONS, Mechanism
from stallscope.diagnosis.replica import Replica

QUEUES = [MECHANISMS.index(m) for m in (Mechanism.KV_PINNING, Mechanism.PREFILL_QUEUE, Mechanism.SLOT_EXHAUSTION)]
PREFILLS = [
    MECHANISMS.index(m)
    for m in (
        Mechanism.PREFILL_QUEUE,
        Mechanism.PREFILL_INTERFERENCE,
        Mechanism.STEP_BOUNDARY,
        Mechanism.PREFILL_PRIORITY,
    )
]
CONDITIONS = [MECHANISMS.index(one) for one in OWN_CONDITIONS]
CACHE_EVICTION = MECHANISMS.index(Mechanism.CACHE_EVICTION)
OWN_WORK, STEP_FIXED = MECHANISMS.index(Mechanism.OWN_WORK), MECHANISMS.index(Mechanism.STEP_FIXED)


@dataclass(frozen=True)
class Suspect:
    """A tenant that cost victims something; ``change``: what it did then that it usually does not."""

    tenant: int
    caused_ns: float
    mechanism: Mechanism
    load: Load
    resource: str
    change: Change | None


def healthy_waits(waits: Waits, windows: list[Window]) -> pd.DataFrame:
    """Waits that were not stalled, outside of all windows."""
    table = waits.table
    calm = ~table["stalled"] & ~table["censored"]
    for window in windows:
        calm &= (table["end"] < window.start) | (table["begin"] > window.end)
    return table[calm]


def usual_charges(waits: Waits, healthy: pd.DataFrame) -> pd.Series[float]:
    """Mean ns by (tenant, metric, holder, mechanism) that a healthy wait is charged: TTFT only."""
    healthy = healthy[(healthy["metric"] == TTFT) & healthy["charged"]]
    count = healthy.groupby(["tenant", "metric"]).size()
    charges = waits.charges.merge(healthy[["tenant", "metric"]], left_on="query", right_index=True)
    total = charges.groupby(["tenant", "metric", "holder", "mechanism"])["ns"].sum()
    keys = total.index.to_frame()[["tenant", "metric"]]
    mean: pd.Series[float] = total / count.reindex(pd.MultiIndex.from_frame(keys)).to_numpy()
    return mean


def excess_charges(waits: Waits, window: Window, usual: pd.Series[float]) -> pd.DataFrame:
    """Charges of the window's stalled waits above usual: wait, victim (tenant), holder, mechanism, ns (float)."""
    stalled = waits.table.loc[window.waits]
    charges = waits.charges[waits.charges["query"].isin(window.waits)]
    charges = charges.merge(stalled[["tenant", "metric"]], left_on="query", right_index=True)
    keys = pd.MultiIndex.from_frame(charges[["tenant", "metric", "holder", "mechanism"]])
    known = usual.reindex(keys).fillna(0.0).to_numpy() if len(usual) else np.zeros(len(charges))
    charges["ns"] = np.maximum(charges["ns"] - known, 0.0)
    return charges[charges["mechanism"] != OWN_WORK].rename(columns={"query": "wait", "tenant": "victim"})


def pass_on_head_of_line(excess: pd.DataFrame, waits: Waits, window: Window, unusual: set[int]) -> pd.DataFrame:
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
    behind = behind[behind["mechanism"].isin(QUEUES)]
    cause = behind.groupby(["tenant", "holder", "mechanism"])["ns"].sum()
    share = (cause / cause.groupby(level="tenant").sum()).rename("share").reset_index()
    moved = excess[is_head].merge(share, left_on="holder", right_on="tenant", how="left", suffixes=("", "_cause"))
    found = moved["share"].notna()
    moved.loc[found, "ns"] *= moved.loc[found, "share"]
    for column in ("holder", "mechanism"):
        moved[column] = moved[f"{column}_cause"].where(found, moved[column]).astype(np.int64)
    return pd.concat([excess[~is_head], moved[excess.columns]], ignore_index=True)


def pass_on_refills(excess: pd.DataFrame, replica: Replica, waits: Waits, window: Window) -> pd.DataFrame:
    """What is charged for prefills that fill a beginning again goes to those who had pushed it out of the cache."""
    if waits.refills is None:
        return excess
    requests = replica.requests
    near = (requests["arrival"] <= window.end) & (requests["seen_until"] >= window.start)
    parts = [excess]
    for holder in np.unique(excess["holder"][excess["holder"] >= 0]).tolist():
        theirs = np.flatnonzero(near & (replica.tenant_of_request == holder))
        rows = ((excess["holder"] == holder) & excess["mechanism"].isin(PREFILLS)).to_numpy()
        for taker, part in waits.refills.causes_of(theirs).items():
            if taker != holder and rows.any():
                moved = excess[rows].assign(holder=taker, mechanism=CACHE_EVICTION)
                parts += [moved.assign(ns=moved["ns"] * part), excess[rows].assign(ns=-excess["ns"][rows] * part)]
    keys = ["wait", "victim", "holder", "mechanism"]
    total: pd.DataFrame = pd.concat(parts, ignore_index=True).groupby(keys)["ns"].sum().reset_index()
    return total[total["ns"] > 0]


def find_suspect(excess: pd.DataFrame, tenant: int, loads: Loads, window: Window) -> Suspect:
    """How much a tenant cost the victims, mostly by what, and its load on that resource."""
    caused = excess[excess["holder"] == tenant]
    name = largest_mechanism(caused)
    mechanism = Mechanism(name) if name else Mechanism.UNEXPLAINED
    resource = RESOURCE_OF.get(mechanism, STEP_TIME)
    load = loads.of_all(resource, window.start, window.end)[tenant]
    change = loads.changes.during(window.start, window.end).get(tenant)
    return Suspect(tenant, float(caused["ns"].sum()), mechanism, load, resource, change)


def largest_mechanism(charges: pd.DataFrame) -> str | None:
    if charges.empty:
        return None
    return str(MECHANISMS[int(np.bincount(charges["mechanism"], charges["ns"]).argmax())])
