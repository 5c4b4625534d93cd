"""How much requests waited beyond their tenants' usual, by the same measure for a recording and its replays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stallscope.diagnosis.cost_model import CostModel
from stallscope.diagnosis.incidents import FEWEST_STALLED, NOTICEABLE_NS, TAIL_REQUESTS, Waits, Window
from stallscope.diagnosis.metrics import ITL, METRICS, TTFT
from stallscope.diagnosis.replay.run import Outcome
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Ints

WINDOWS_NS = (15_000_000_000, 60_000_000_000)
FEWEST_REQUESTS = 20  # that a p90 needs behind it
LEAST_CHANGE_S, LEAST_CHANGE_SHARE = 0.05, 0.2  # what nobody would notice is no harm


@dataclass(frozen=True, eq=False)
class Norms:
    """What is usual: per metric (``METRICS``) and tenant, the median delay (``usual``) and the ``bar``, in ns.

    A delay is a wait without the request's own work, which ``cost`` estimates.
    """

    usual: Floats
    bar: Floats
    cost: CostModel

    def excess(self, outcomes: pd.DataFrame) -> Floats:
        """Per row of ``Outcome.requests``: ns beyond the usual of its TTFT and longest gap, where beyond the bar."""
        tenant = outcomes["tenant"].to_numpy(np.int64)
        b0, b1, b2, b3, _ = self.cost.coefficients
        prompt = outcomes["prompt_tokens"].to_numpy(np.float64)
        total = np.zeros(len(outcomes))
        for metric, wait, own in (
            (TTFT, _ttft(outcomes), b0 + b1 * prompt + b2 * prompt**2 / 2),
            (ITL, outcomes["longest_gap"].to_numpy(np.float64), np.full(len(outcomes), b0 + b3)),
        ):
            delay = wait - own
            stalled = (delay > self.bar[metric][tenant]) & (delay > NOTICEABLE_NS)
            total += np.where(stalled, np.maximum(delay - self.usual[metric][tenant], 0.0), 0.0)
        return total


def _ttft(outcomes: pd.DataFrame) -> Floats:
    """Time to first token, or as long as it was waited for; 0 where it came before the replay, or nothing arrived."""
    arrived = outcomes["arrived"].to_numpy(np.int64)
    none = (arrived < 0) | ((outcomes["first_token"].to_numpy() < 0) & (outcomes["output_tokens"].to_numpy() > 0))
    wait: Floats = np.where(none, 0, outcomes["waited_until"].to_numpy(np.int64) - arrived).astype(np.float64)
    return np.maximum(wait, 0.0)


def read_norms(replica: Replica, waits: Waits, healthy: pd.DataFrame) -> Norms:
    """From all waits of a replica, and those of them that are usual."""
    tenants = range(len(replica.tenants))
    bar = waits.table.groupby(["metric", "tenant"])["bar"].first()
    usual = healthy.groupby(["metric", "tenant"])["delay"].median()
    index = [[(metric, tenant) for tenant in tenants] for metric in range(len(METRICS))]
    bars = np.array([bar.reindex(keys).to_numpy(np.float64) for keys in index])
    usuals = np.array([usual.reindex(keys).to_numpy(np.float64) for keys in index])
    return Norms(np.nan_to_num(usuals, nan=0.0), np.nan_to_num(bars, nan=np.inf), replica.ledger.model)


def recorded_outcomes(replica: Replica) -> pd.DataFrame:
    """The recording as ``Outcome.requests`` has replays."""
    requests = replica.requests
    first = requests["first_token"]
    return pd.DataFrame(
        {
            "code": np.arange(len(requests)),
            "tenant": requests["tenant"],
            "arrival": requests["arrival"],
            "prompt_tokens": requests["prompt_tokens"],
            "arrived": requests["arrival"],
            "first_token": first,
            "end": requests["end"],
            "longest_gap": np.maximum(replica.longest_gap, 0),
            "output_tokens": requests["output_tokens"],
            "waited_until": first.where(first >= 0, requests["seen_until"]),
        }
    )


def in_scope(outcomes: pd.DataFrame, scope: Ints) -> NDArray[np.bool_]:
    """Which rows are of the requests (codes) in ``scope``."""
    found: NDArray[np.bool_] = np.isin(outcomes["code"].to_numpy(np.int64), scope)
    return found


def waits_of(outcome: Outcome | pd.DataFrame, metric: int) -> Floats:
    """The waits of one metric, ns, by row: TTFT, or the longest gap."""
    table = outcome.requests if isinstance(outcome, Outcome) else outcome
    return _ttft(table) if metric == TTFT else table["longest_gap"].to_numpy(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Harm:
    """What something did to a tenant's percentile in the worst of the windows around an incident, in seconds.

    ``requests``: the codes of those that arrived in that window.
    """

    tenant: int
    metric: int
    quantile: float
    with_s: float
    without_s: float
    requests: Ints

    @property
    def excess_s(self) -> float:
        return self.with_s - self.without_s

    @property
    def magnitude(self) -> float:
        """Log10 of the factor by which the percentile rose, a hundred at most."""
        return float(np.log10(min(max(self.with_s, 1e-3) / max(self.without_s, 1e-3), 100.0)))

    @property
    def counts(self) -> bool:
        """Whether anybody would notice."""
        return self.excess_s >= max(LEAST_CHANGE_S, LEAST_CHANGE_SHARE * self.without_s)


Pairs = Sequence[tuple[pd.DataFrame, pd.DataFrame]]  # by draw: with it, and without it, as ``Outcome.requests``


def worst_harm(pairs: Pairs, window: Window, kinds: Collection[tuple[int, int]]) -> Harm | None:
    """The largest change of a percentile of any of ``kinds`` (tenant and metric: TTFT or ITL), of those that count or
    else of all: means over draws.

    Only requests (codes) that are in all tables are compared. Percentiles are p99 where 300 requests are in a window,
    else p90 of at least ``FEWEST_REQUESTS``: windows of two lengths by arrival, so that neither a short stall is
    diluted nor a slow tenant has none. Tenants with fewer requests only count where there are no others.
    """
    code, tenant_of, arrived, waits = _in_all(pairs)
    found: list[Harm] = []
    for tenant in sorted({tenant for tenant, _ in kinds}):
        mine = np.flatnonzero(tenant_of == tenant)
        metrics = [metric for metric in (TTFT, ITL) if (tenant, metric) in kinds]
        for first, end in _windows(arrived[mine], window):
            quantile = 0.99 if end - first >= TAIL_REQUESTS else 0.9
            rows = mine[first:end]
            for metric in metrics:
                found.append(_harm(tenant, metric, quantile, code[rows], waits[:, :, metric, rows]))
    enough = [harm for harm in found if len(harm.requests) >= FEWEST_REQUESTS]
    return max(enough or found, key=lambda harm: (harm.counts, harm.excess_s), default=None)


def same_harm(harm: Harm, pairs: Pairs) -> Harm:
    """The change of the same percentile of the same requests, between other tables."""
    code, _, _, waits = _in_all(pairs)
    return _harm(
        harm.tenant, harm.metric, harm.quantile, harm.requests, waits[:, :, harm.metric, np.isin(code, harm.requests)]
    )


def _harm(tenant: int, metric: int, quantile: float, requests: Ints, waits: Floats) -> Harm:
    """``waits`` (ns): by draw, with and without it, and request."""
    if not waits.shape[-1]:
        return Harm(tenant, metric, quantile, 0.0, 0.0, requests)
    with_s, without_s = np.quantile(waits, quantile, axis=-1, method="higher").mean(axis=0) / 1e9
    return Harm(tenant, metric, quantile, float(with_s), float(without_s), requests)


def _in_all(pairs: Pairs) -> tuple[Ints, Ints, Ints, Floats]:
    """Of the requests that arrived in all tables, by arrival in the first: code, tenant, arrival (ns), and waits (ns)
    by draw, with and without it, metric and request."""
    tables = [
        table[(table["code"] >= 0) & (table["arrived"] >= 0)].set_index("code") for pair in pairs for table in pair
    ]
    code = tables[0].index
    for table in tables[1:]:
        code = code.intersection(table.index)
    first = tables[0].loc[code].sort_values("arrived", kind="stable")
    waits = np.array([[waits_of(table.loc[first.index], metric) for metric in (TTFT, ITL)] for table in tables])
    return (
        first.index.to_numpy(np.int64),
        first["tenant"].to_numpy(np.int64),
        first["arrived"].to_numpy(np.int64),
        waits.reshape(len(pairs), 2, 2, len(first)),
    )


def change_of_all(before: pd.DataFrame, after: pd.DataFrame, window: Window, tenants: Collection[int]) -> Harm | None:
    """As ``worst_harm``, of tenants whose requests are others afterwards: over the window's arrivals as a whole."""
    found = []
    for tenant in tenants:
        mine = [
            one[(one["tenant"] == tenant) & one["arrived"].between(window.start, window.end)] for one in (before, after)
        ]
        if len(mine[0]) < FEWEST_STALLED:
            continue
        quantile = 0.99 if len(mine[0]) >= TAIL_REQUESTS else 0.9
        for metric in (TTFT, ITL):
            values = [_at(waits_of(one, metric), quantile) for one in mine]
            found.append(Harm(tenant, metric, quantile, values[0], values[1], np.zeros(0, dtype=np.int64)))
    return max(found, key=lambda harm: (harm.counts, harm.excess_s), default=None)


def _windows(arrived: Ints, window: Window) -> list[tuple[int, int]]:
    """Runs of arrivals (first, end) around an incident that are long enough for a percentile."""
    found = []
    for length in WINDOWS_NS:
        starts = np.arange(window.start - length // 2, max(window.end, window.start + 1), length // 2)
        first, end = np.searchsorted(arrived, starts), np.searchsorted(arrived, starts + length)
        found += [(a, b) for a, b in zip(first.tolist(), end.tolist(), strict=True) if b - a >= FEWEST_REQUESTS]
    if not found:
        # A slow tenant: the requests nearest to the incident.
        middle = int(np.searchsorted(arrived, (window.start + window.end) // 2))
        first_near = max(0, min(middle - FEWEST_REQUESTS // 2, len(arrived) - FEWEST_REQUESTS))
        found = [(first_near, min(first_near + FEWEST_REQUESTS, len(arrived)))]
    return found


def _at(waits: Floats, quantile: float) -> float:
    return float(np.quantile(waits, quantile, method="higher")) / 1e9 if len(waits) else 0.0
