"""Prompts whose beginning the prefix cache had lost: how much of a request's work that was, and who pushed it out.

A request's own work is no delay, unless it is work that it is usually spared. What a tenant's requests find in the
cache most often is what they are usually spared; who pushed out whose blocks is recorded (``evictions``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.diagnosis.partition import MECHANISMS, Mechanism, Party
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Ints

USUALLY_HITS = 0.5  # share of a tenant's requests that must find something for that to be its usual
MEMORY_NS = 60_000_000_000  # evictions longer ago are not what a request's blocks were lost to
_OWN_WORK, _EVICTION = MECHANISMS.index(Mechanism.OWN_WORK), MECHANISMS.index(Mechanism.CACHE_EVICTION)


@dataclass(frozen=True, eq=False)
class Refills:
    """``share``: by request code, of its prefill (``computed`` tokens) what it would usually have been spared.

    ``causes``: by request that has such a share, and tenant that pushed its kind out: request, holder, part (of 1). The
    holder is ``Party.ENGINE`` where nobody did: what is cold from the start is nobody's fault.
    """

    share: Floats
    computed: Ints
    causes: pd.DataFrame

    def causes_of(self, requests: Ints) -> dict[int, float]:
        """Of all that these requests (codes) computed, the part that each tenant made necessary."""
        chosen = self.causes[self.causes["request"].isin(requests)]
        request = chosen["request"].to_numpy(np.int64)
        tokens = pd.Series(chosen["part"].to_numpy() * self.share[request] * self.computed[request])
        by_holder = tokens.groupby(chosen["holder"].to_numpy(np.int64)).sum()
        whole = max(float(self.computed[requests].sum()), 1.0)
        return dict(zip(by_holder.index.to_list(), (by_holder / whole).to_list(), strict=True))

    def passed_on(self, charges: pd.DataFrame, request_of: Ints) -> pd.DataFrame:
        """The charges (query, holder, mechanism, ns) with refilling charged to who made it necessary.

        ``request_of``: the request of each query, which are numbered from 0.
        """
        cold = self.share[request_of[charges["query"].to_numpy(np.int64)]] > 0
        own = charges["mechanism"].to_numpy() == _OWN_WORK
        moved = charges[cold & own & (charges["holder"].to_numpy() == int(Party.OWN))]
        if moved.empty:
            return charges
        request = request_of[moved["query"].to_numpy(np.int64)]
        amount = (moved["ns"].to_numpy() * self.share[request]).astype(np.int64)
        kept = charges.copy()
        kept.loc[moved.index, "ns"] -= amount
        to_share = pd.DataFrame({"query": moved["query"].to_numpy(), "request": request, "amount": amount})
        shared = to_share.merge(self.causes, on="request")
        shared["ns"] = (shared["amount"] * shared["part"]).astype(np.int64)
        # What rounding leaves over stays the request's own.
        left = to_share.set_index("query")["amount"] - shared.groupby("query")["ns"].sum()
        kept.loc[moved.index, "ns"] += left.reindex(moved["query"]).to_numpy(np.int64)
        added = pd.DataFrame(
            {"query": shared["query"], "holder": shared["holder"], "mechanism": _EVICTION, "ns": shared["ns"]}
        )
        return pd.concat([kept, added[added["ns"] > 0]], ignore_index=True)


def read_refills(replica: Replica) -> Refills | None:
    """None without prefix caching, or where nobody had to compute what it is usually spared."""
    if not replica.settings.get("prefix_caching"):
        return None
    evictions = replica.evictions
    tenant, cached = replica.tenant_of_request, replica.clients["cached_tokens"].to_numpy(np.int64)
    prompt = replica.requests["prompt_tokens"].to_numpy(np.int64)
    usual = _usually_cached(tenant, cached, len(replica.tenants))[tenant]
    missing = np.clip(np.minimum(usual, prompt) - cached, 0, None)
    share = missing / np.maximum(prompt - cached, 1)
    cold = np.flatnonzero(share > 0)
    if not len(cold):
        return None
    return Refills(share, np.maximum(prompt - cached, 1), _causes(replica, evictions, cold))


def _usually_cached(tenant: Ints, cached: Ints, tenants: int) -> Ints:
    """Of each tenant, the number of tokens that its requests find in the cache most often, where most find some."""
    hits = pd.Series(cached[cached > 0])
    commonest = hits.groupby(tenant[cached > 0]).agg(lambda tokens: tokens.value_counts().index[0])
    rate = np.bincount(tenant[cached > 0], minlength=tenants) / np.maximum(np.bincount(tenant, minlength=tenants), 1)
    usual = commonest.reindex(range(tenants)).fillna(0).to_numpy(np.int64)
    return np.where(rate >= USUALLY_HITS, usual, 0)


def _causes(replica: Replica, evictions: pd.DataFrame, cold: Ints) -> pd.DataFrame:
    """Who pushed out blocks of each cold request's tenant in the time before it, by blocks."""
    arrival = replica.requests["arrival"].to_numpy(np.int64)[cold]
    tenant = replica.tenant_of_request[cold]
    parts = []
    for (owner, taker), pushed in evictions.groupby(["owner", "taker"]):
        mine = np.flatnonzero(tenant == owner)
        total = np.concatenate([[0], np.cumsum(pushed["blocks"].to_numpy(np.int64))])
        time = pushed["time"].to_numpy(np.int64)
        until, since = (np.searchsorted(time, arrival[mine] - back) for back in (0, MEMORY_NS))
        parts.append(pd.DataFrame({"request": cold[mine], "holder": taker, "blocks": total[until] - total[since]}))
    found = [part[part["blocks"] > 0] for part in parts]
    nobodys = np.setdiff1d(cold, np.concatenate([part["request"] for part in found]) if found else [])
    found.append(pd.DataFrame({"request": nobodys, "holder": int(Party.ENGINE), "blocks": 1}))
    causes = pd.concat(found, ignore_index=True)
    # Blocks that a tenant took from itself it took because others had taken room from it, where any did.
    own = causes["holder"].to_numpy() == replica.tenant_of_request[causes["request"].to_numpy(np.int64)]
    others = causes.assign(other=~own).groupby("request")["other"].transform("any").to_numpy(np.bool_)
    causes = causes[~(own & others)].reset_index(drop=True)
    causes["part"] = causes["blocks"] / causes.groupby("request")["blocks"].transform("sum")
    shared: pd.DataFrame = causes.drop(columns="blocks")
    return shared
