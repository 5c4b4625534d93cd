"""The requests that an incident hit hardest: how long each waited, and who is charged with most of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stallscope.diagnosis.incidents import Waits
from stallscope.diagnosis.metrics import METRICS
from stallscope.diagnosis.model import Incident
from stallscope.diagnosis.partition import MECHANISMS, Mechanism
from stallscope.diagnosis.replica import Replica
from stallscope.views.waterfall import holder_name

_OWN_WORK = MECHANISMS.index(Mechanism.OWN_WORK)


@dataclass(frozen=True)
class Hit:
    """A request's longest stalled wait for what ``metric`` says (ttft, itl, delivery).

    ``begin_ns``: when the wait began; ``waited_s``: how long it was, ``delay_s`` of it not the request's own work.
    ``holder`` ("" for nobody) is charged with most of it: ``held_s``, by ``mechanism`` mostly.
    """

    request: str
    tenant: str
    metric: str
    begin_ns: int
    waited_s: float
    delay_s: float
    holder: str
    mechanism: str
    held_s: float


def hardest_hit(replica: Replica, waits: Waits, incident: Incident, most: int = 200) -> tuple[Hit, ...]:
    """Of the incident's victims the requests with the longest delays, the longest first."""
    table = waits.table
    names = [victim.tenant for victim in incident.victims]
    victims = [code for code, name in enumerate(replica.tenants) if name in names]
    there = table["stalled"] & (table["begin"] <= incident.end_ns) & (table["end"] >= incident.start_ns)
    chosen = table[there & table["tenant"].isin(victims)].sort_values("delay", ascending=False, kind="stable")
    chosen = chosen.drop_duplicates("request").head(most)

    charges = waits.charges[waits.charges["query"].isin(chosen.index) & (waits.charges["mechanism"] != _OWN_WORK)]
    charges = charges.sort_values("ns", ascending=False, kind="stable")
    held = charges.groupby(["query", "holder"], sort=False).agg(ns=("ns", "sum"), mechanism=("mechanism", "first"))
    largest = held.reset_index().sort_values("ns", ascending=False, kind="stable").drop_duplicates("query")
    largest = largest.set_index("query").reindex(chosen.index)
    columns = (
        replica.requests["request"].to_numpy()[chosen["request"]],
        chosen["tenant"],
        chosen["metric"],
        chosen["begin"],
        (chosen["end"] - chosen["begin"]) / 1e9,
        chosen["delay"] / 1e9,
        largest["holder"].fillna(np.iinfo(np.int64).min).astype(np.int64),
        largest["mechanism"].fillna(-1).astype(np.int64),
        largest["ns"].fillna(0.0) / 1e9,
    )
    return tuple(
        Hit(
            str(request),
            replica.tenants[tenant],
            METRICS[metric],
            int(begin),
            waited,
            delay,
            holder_name(replica, holder) if mechanism >= 0 else "",
            str(MECHANISMS[mechanism]) if mechanism >= 0 else "",
            seconds,
        )
        for request, tenant, metric, begin, waited, delay, holder, mechanism, seconds in zip(*columns, strict=True)
    )
