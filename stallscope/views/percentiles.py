"""Percentiles over time: how long each tenant's requests waited, in bins by arrival, and how many are behind each."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stallscope.diagnosis.incidents import TAIL_REQUESTS
from stallscope.diagnosis.metrics import END_TO_END, ITL, METRICS, TTFT
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Ints, Mask

SHOWN_METRICS = (METRICS[TTFT], METRICS[ITL], END_TO_END)
MEDIAN, P90, P95, P99, WORST = 0.5, 0.9, 0.95, 0.99, 1.0
# Requests that each needs behind it, so that as many lie beyond it as beyond a p99 that can be trusted.
_NEEDS = {P90: TAIL_REQUESTS // 10, P95: TAIL_REQUESTS // 5, P99: TAIL_REQUESTS}
_NICE_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 43_200, 86_400)


@dataclass(frozen=True, eq=False)
class Line:
    """One tenant's percentile of one metric over time.

    Arrays over the bins with requests: ``start_ns`` of the bin, ``value_s``, and ``requests`` behind it, of which
    ``open_requests`` had not got there and count with what they had waited so far. ``quantile`` is one that the
    line's typical bin can bear: 0.5, 0.95, 0.99, or where that has too few requests, 0.9 or 1.0 (the worst).
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
    """Lines by metric, in each the tenants with most requests first; of each tenant the median, then p95 and p99 as far
    as its bins can bear them, or else one of p90 and the worst."""

    replica: str
    bin_ns: int
    lines: tuple[Line, ...]
    tenants_left_out: int

    def nearest(self, metric: str, quantile: float) -> list[Line]:
        """Of each tenant that has ``metric``, the line whose quantile is nearest to the one asked for."""
        of_tenant: dict[str, list[Line]] = {}
        for line in self.lines:
            if line.metric == metric:
                of_tenant.setdefault(line.tenant, []).append(line)
        return [min(lines, key=lambda line: abs(line.quantile - quantile)) for lines in of_tenant.values()]


def percentiles(
    replica: Replica,
    start_ns: int,
    end_ns: int,
    width: int,
    most_tenants: int = 8,
    metrics: Sequence[str] = SHOWN_METRICS,
    tenants: Collection[str] | None = None,
) -> Percentiles:
    """TTFT, longest gap and end-to-end time of the requests that arrived from ``start_ns`` to ``end_ns``, in at most
    ``width`` bins; of the tenants named by ``tenants`` only, where given. Raises ValueError for another metric."""
    if unknown := set(metrics) - set(SHOWN_METRICS):
        raise ValueError(f"no percentiles of {sorted(unknown)}")
    bin_ns = bin_length(end_ns - start_ns, width)
    bins = max(1, -(-(end_ns - start_ns) // bin_ns))
    arrival = replica.requests["arrival"].to_numpy()
    low, high = np.searchsorted(arrival, [start_ns, end_ns + 1]).tolist()
    by_requests = np.bincount(replica.tenant_of_request[low:high], minlength=len(replica.tenants))
    ranked = [
        code
        for code in np.argsort(-by_requests, kind="stable").tolist()
        if by_requests[code] and (tenants is None or replica.tenants[code] in tenants)
    ]
    shown = ranked[:most_tenants]
    place = np.full(len(replica.tenants), -1)
    place[shown] = np.arange(len(shown))
    placed = place[replica.tenant_of_request[low:high]]
    chosen = low + np.flatnonzero(placed >= 0)
    group = placed[chosen - low] * bins + np.minimum((arrival[chosen] - start_ns) // bin_ns, bins - 1)
    names = [replica.tenants[code] for code in shown]
    start = start_ns + np.arange(bins) * bin_ns
    lines = [line for metric in metrics for line in _lines(replica, metric, names, chosen, group, start)]
    return Percentiles(replica.name, bin_ns, tuple(lines), len(ranked) - len(shown))


def bin_length(length_ns: int, most: int) -> int:
    """The shortest length that people count in with which ``length_ns`` has at most ``most`` bins."""
    least = length_ns / max(most, 1)
    return next((int(nice * 1e9) for nice in _NICE_S if nice * 1e9 >= least), int(-(-least // 1)))


def _lines(
    replica: Replica, metric: str, tenants: Sequence[str], requests: Ints, group: Ints, start_ns: Ints
) -> Iterator[Line]:
    """Lines of one metric. ``group`` numbers each request's tenant and bin: those of a tenant follow one another."""
    if metric == METRICS[ITL]:
        has = replica.longest_gap[requests] >= 0
        requests, group = requests[has], group[has]
    ns, still = _measured(replica, metric, requests)
    shape = len(tenants), len(start_ns)
    groups = len(tenants) * len(start_ns)
    # Two sorts, the second by radix where the type is small, take a fifth of the time of one by both keys.
    order = np.argsort(ns)
    order = order[np.argsort(group.astype(np.min_scalar_type(groups))[order], kind="stable")]
    ns = ns[order]
    counts = np.bincount(group, minlength=groups)
    firsts = np.cumsum(counts) - counts
    opens = np.bincount(group[still], minlength=groups)
    for tenant, count, first, waiting in zip(
        tenants, *(each.reshape(shape) for each in (counts, firsts, opens)), strict=True
    ):
        seen = np.flatnonzero(count)
        for quantile in _borne(count[seen]):
            at = first[seen] + np.ceil(quantile * (count[seen] - 1)).astype(np.int64)
            yield Line(tenant, metric, quantile, start_ns[seen], ns[at] / 1e9, count[seen], waiting[seen])


def _measured(replica: Replica, metric: str, requests: Ints) -> tuple[Ints, Mask]:
    """How long each request waited, ns, and whether it still waits."""
    table = replica.requests
    arrival, until, end = (table[name].to_numpy()[requests] for name in ("arrival", "seen_until", "end"))
    if metric == METRICS[ITL]:
        return replica.longest_gap[requests], end < 0
    if metric == END_TO_END:
        return until - arrival, end < 0
    first_token = table["first_token"].to_numpy()[requests]
    return np.where(first_token < 0, until, first_token) - arrival, first_token < 0


def _borne(requests: Ints) -> tuple[float, ...]:
    """The quantiles that a line can show whose bins have so many requests each."""
    if not len(requests):
        return ()
    typical = float(np.median(requests))
    tails = [tail for tail in (P95, P99) if typical >= _NEEDS[tail]]
    return (MEDIAN, *(tails or [P90 if typical >= _NEEDS[P90] else WORST]))
