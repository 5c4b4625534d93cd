"""Percentiles over time: how long each tenant's requests waited, in bins by arrival, and how many are behind each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.diagnosis.incidents import TAIL_REQUESTS
from stallscope.diagnosis.metrics import ITL, METRICS, TTFT
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Ints

MEDIAN = 0.5
_NICE_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 43_200, 86_400)


@dataclass(frozen=True, eq=False)
class Line:
    """One tenant's percentile of one metric over time.

    Arrays over the bins with requests: ``start_ns`` of the bin, ``value_s``, and ``requests`` behind it, of which
    ``open_requests`` had not got there and count with what they had waited so far. ``quantile`` is the highest that
    the line's typical bin can bear: 0.99, 0.9, or 1.0 (the worst).
    """

    tenant: str
    metric: str
    quantile: float
    start_ns: Ints
    value_s: Floats
    requests: Ints
    open_requests: Ints


@dataclass(frozen=True, eq=False)
class Percentiles:
    """Lines of a replica's tenants, the tenants with most requests first; of each metric a median and a tail."""

    replica: str
    bin_ns: int
    lines: tuple[Line, ...]
    tenants_left_out: int


def percentiles(replica: Replica, start_ns: int, end_ns: int, width: int, most_tenants: int = 8) -> Percentiles:
    """TTFT and longest gap of the requests that arrived from ``start_ns`` to ``end_ns``, in at most ``width`` bins."""
    bin_ns = bin_length(end_ns - start_ns, width)
    arrived = replica.requests["arrival"].between(start_ns, end_ns)
    by_requests = replica.requests.loc[arrived, "tenant"].value_counts(sort=False).sort_index()
    shown = by_requests.sort_values(ascending=False, kind="stable").index.to_numpy(np.int64)
    lines = []
    for tenant in shown[:most_tenants]:
        mine = replica.requests[arrived & (replica.requests["tenant"] == tenant)]
        for metric, values in ((TTFT, _first_tokens(mine)), (ITL, _longest_gaps(replica, mine))):
            lines += _lines(replica.tenants[tenant], METRICS[metric], values, start_ns, bin_ns)
    return Percentiles(replica.name, bin_ns, tuple(lines), max(0, len(shown) - most_tenants))


def bin_length(length_ns: int, most: int) -> int:
    """The shortest length that people count in with which ``length_ns`` has at most ``most`` bins."""
    least = length_ns / max(most, 1)
    return next((int(nice * 1e9) for nice in _NICE_S if nice * 1e9 >= least), int(-(-least // 1)))


def _first_tokens(requests: pd.DataFrame) -> pd.DataFrame:
    """arrival, ns, open of each request."""
    waits = requests["first_token"] < 0
    until = requests["first_token"].where(~waits, requests["seen_until"])
    return pd.DataFrame({"arrival": requests["arrival"], "ns": until - requests["arrival"], "open": waits})


def _longest_gaps(replica: Replica, requests: pd.DataFrame) -> pd.DataFrame:
    """arrival, ns, open of each request that has a gap."""
    longest = replica.gaps.groupby("request")["length_ns"].max()
    mine = requests[requests.index.isin(longest.index)]
    ns = longest.reindex(mine.index).astype(np.int64)
    return pd.DataFrame({"arrival": mine["arrival"], "ns": ns, "open": mine["end"] < 0})


def _lines(tenant: str, metric: str, values: pd.DataFrame, start_ns: int, bin_ns: int) -> list[Line]:
    if values.empty:
        return []
    bins, ns = ((values["arrival"] - start_ns) // bin_ns).to_numpy(np.int64), values["ns"].to_numpy(np.int64)
    order = np.lexsort((ns, bins))
    bins, ns, still = bins[order], ns[order], values["open"].to_numpy(np.int64)[order]
    first = np.flatnonzero(np.diff(bins, prepend=-1))
    count = np.diff(np.append(first, len(bins)))
    typical = float(np.median(count))
    tail = 0.99 if typical >= TAIL_REQUESTS else 0.9 if typical >= TAIL_REQUESTS // 10 else 1.0
    return [
        Line(
            tenant,
            metric,
            quantile,
            start_ns + bins[first] * bin_ns,
            ns[first + np.ceil(quantile * (count - 1)).astype(np.int64)] / 1e9,
            count,
            np.add.reduceat(still, first),
        )
        for quantile in (MEDIAN, tail)
    ]
