"""What shows that a verdict is right: the requests behind it, the victims' percentiles, the charges in full."""

from __future__ import annotations

import numpy as np
import pandas as pd

from stallscope.diagnosis.incidents import TAIL_REQUESTS, Waits, Window
from stallscope.diagnosis.metrics import METRICS, TTFT
from stallscope.diagnosis.model import Charge, Quantile, SuspectRequest, Victim
from stallscope.diagnosis.partition import MECHANISMS, Party
from stallscope.diagnosis.replica import Replica

SUSPECT_REQUESTS = 40  # of a culprit, the largest, that are looked at one by one
SHOWN_REQUESTS = 5
_PARTY_NAMES = {Party.ENGINE: "(engine)", Party.FRONTEND: "(frontend)", Party.UNSEEN: "(telemetry)"}


def suspect_requests(replica: Replica, waits: Waits, window: Window, tenant: int) -> tuple[SuspectRequest, ...]:
    """A culprit's requests by what each cost the window's victims, the worst first."""
    requests = replica.requests
    present = (
        (requests["tenant"] == tenant) & (requests["arrival"] < window.end) & (requests["seen_until"] > window.start)
    )
    size = (requests["prompt_tokens"] + requests["output_tokens"])[present]
    chosen = size.nlargest(SUSPECT_REQUESTS).index.to_numpy(np.int64)
    groups = np.full(len(requests), len(chosen), dtype=np.int64)  # one more group: everybody else
    groups[chosen] = np.arange(len(chosen))
    stalled = waits.table.loc[window.waits]
    queries = stalled[["request", "begin", "end"]].assign(query=stalled.index)
    charges = replica.partition.charge(queries, groups)
    charges = charges[(charges["holder"] >= 0) & (charges["holder"] < len(chosen))]
    # A request doesn't suspect itself; what it cost others of its own tenant is the tenant's own affair.
    victim = stalled["tenant"].reindex(charges["query"]).to_numpy()
    if (victim != tenant).any():
        charges = charges[victim != tenant]
    caused = np.bincount(charges["holder"], charges["ns"], len(chosen))
    total = float(caused.sum())
    order = [one for one in np.argsort(-caused, kind="stable") if caused[one] > 0]
    shown = [(replica.facts(int(chosen[one])), float(caused[one])) for one in order[:SHOWN_REQUESTS]]
    return tuple(
        SuspectRequest(
            facts.request, facts.arrival, facts.prompt_tokens, facts.output_tokens, ns / 1e9, share(ns, total)
        )
        for facts, ns in shown
    )


def victims(
    replica: Replica, waits: Waits, window: Window, healthy: pd.DataFrame, excess: pd.DataFrame
) -> tuple[Victim, ...]:
    """Tenants by what they lost, the most first; ``healthy``: the waits that are their usual."""
    table, stalled = waits.table, waits.table.loc[window.waits]
    during = table[((table["begin"] >= window.start) & (table["begin"] <= window.end)).to_numpy()]
    usual = dict(iter(healthy[["metric", "request", "begin", "end"]].groupby(healthy["tenant"].to_numpy())))
    request = stalled["request"].reindex(excess["wait"]).to_numpy()
    lost = np.bincount(excess["victim"], excess["ns"], len(replica.tenants))
    found = []
    for tenant in np.argsort(-lost, kind="stable"):
        if not lost[tenant]:
            break
        hit = (excess["victim"] == tenant).to_numpy()
        worst = int(np.bincount(request[hit], excess["ns"][hit]).argmax())
        mine = during[(during["tenant"] == tenant).to_numpy()]
        stalled_requests = stalled.loc[stalled["tenant"] == tenant, "request"].nunique()
        arrived = int((mine["metric"] == TTFT).sum())
        found.append(
            Victim(
                replica.tenants[tenant],
                stalled_requests,
                max(arrived, stalled_requests),
                float(lost[tenant]) / 1e9,
                quantiles(mine),
                quantiles(usual.get(tenant, healthy[:0])),
                replica.facts(worst).request,
            )
        )
    return tuple(found)


def quantiles(waits: pd.DataFrame) -> tuple[Quantile, ...]:
    """A percentile of each metric that the number of requests can bear: p99, else p90, else the worst.

    For gaps, a request counts with its longest.
    """
    found = []
    length, request = (waits["end"] - waits["begin"]).to_numpy(), waits["request"].to_numpy()
    for code, metric in enumerate(METRICS):
        mine = np.flatnonzero(waits["metric"].to_numpy() == code)
        if not len(mine):
            continue
        longest = np.full(request.max() + 1, -1)
        np.maximum.at(longest, request[mine], length[mine])
        values = longest[longest >= 0]
        quantile = tail_quantile(len(values))
        value = float(np.quantile(values, quantile, method="higher")) / 1e9
        found.append(Quantile(metric, quantile, value, len(values)))
    return tuple(found)


def tail_quantile(requests: int) -> float:
    """The percentile that so many requests can bear."""
    return 0.99 if requests >= TAIL_REQUESTS else 0.9 if requests >= TAIL_REQUESTS // 10 else 1.0


def charges_of(replica: Replica, excess: pd.DataFrame) -> tuple[Charge, ...]:
    """The incident's charges by holder and mechanism, the largest first."""
    lost = float(excess["ns"].sum())
    own = (excess["holder"] == excess["victim"]).to_numpy()
    total = excess.assign(own=own).groupby(["holder", "mechanism", "own"])["ns"].sum().reset_index()
    total = total[total["ns"] > 0].sort_values("ns", ascending=False, kind="stable")
    return tuple(
        Charge(_holder_name(replica, holder), str(MECHANISMS[mechanism]), ns / 1e9, share(ns, lost), mine)
        for holder, mechanism, mine, ns in zip(*(total[name].to_list() for name in total.columns), strict=True)
    )


def _holder_name(replica: Replica, holder: int) -> str:
    return replica.tenants[holder] if holder >= 0 else _PARTY_NAMES.get(Party(holder), "(own)")


def share(part: float, whole: float) -> float:
    """``part`` of ``whole``, 0 of nothing."""
    return part / whole if whole > 0 else 0.0
