"""What each tenant cost over time: shares of tokens, step time and KV cache, and how fairly step time was shared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Intervals, Ints, Mask, Places, at, expand, running_total
from stallscope.views.percentiles import bin_length
from stallscope.views.words import OTHERS

_NOISE = 1e-9  # share of a bin's step time that may be what floating point leaves of nothing


@dataclass(frozen=True, eq=False)
class Spent:
    """What tenants took of one resource: ``amount[i, k]`` by tenant i in bin k."""

    amount: Floats

    @property
    def share(self) -> Floats:
        """Of what all took in the bin; 0 where nobody took anything."""
        total = self.amount.sum(axis=0)
        found: Floats = np.divide(self.amount, total, out=np.zeros_like(self.amount), where=total > 0)
        return found

    @property
    def total(self) -> Floats:
        """Of each tenant, in all bins."""
        found: Floats = self.amount.sum(axis=1)
        return found


@dataclass(frozen=True, eq=False)
class Shares:
    """What each of ``tenants`` took in bins of ``bin_ns`` that begin at ``start_ns``; the last ends with the window.

    ``tokens``: computed. ``step_time``: seconds, the marginal cost of its requests by the cost model, so that what a
    step costs in any case is nobody's. ``kv``: block-seconds, those in use shared out by the tokens that each tenant's
    requests held. Tenants are sorted by step time, "(others)" last.

    ``fairness[k]``: Jain's index of the step time that the tenants got who had a request in the bin, those among
    "(others)" one by one: 1 where all got the same, 1/n where one of n got everything, NaN where nobody got any (Jain,
    Chiu, Hawe, "A Quantitative Measure of Fairness and Discrimination for Resource Allocation in Shared Computer
    Systems", DEC-TR-301, 1984). It does not know who wanted more.
    """

    replica: str
    bin_ns: int
    tenants: tuple[str, ...]
    start_ns: Ints
    tokens: Spent
    step_time: Spent
    kv: Spent
    fairness: Floats


def shares(replica: Replica, start_ns: int, end_ns: int, width: int, most_tenants: int = 8) -> Shares:
    """What the replica's tenants took from ``start_ns`` to ``end_ns``, in at most ``width`` bins."""
    bin_ns = bin_length(end_ns - start_ns, width)
    edges = np.append(np.arange(start_ns, end_ns, bin_ns), max(start_ns, end_ns))
    tokens, step_time, kv = _spent(replica, edges)
    took_some = step_time > _NOISE * step_time.sum(axis=0)
    fairness = _fairness(step_time, took_some | _had_requests(replica, edges))
    order = np.argsort(-step_time.sum(axis=1), kind="stable")
    order = order[(tokens + kv).sum(axis=1)[order] > 0]
    shown, rest = order[:most_tenants], order[most_tenants:]
    names = [replica.tenants[code] for code in shown] + [OTHERS] * (len(rest) > 0)

    def spent(amount: Floats) -> Spent:
        return Spent(np.vstack([amount[shown], amount[rest].sum(axis=0)])[: len(names)])

    return Shares(replica.name, bin_ns, tuple(names), edges[:-1], spent(tokens), spent(step_time), spent(kv), fairness)


def _spent(replica: Replica, edges: Ints) -> tuple[Floats, Floats, Floats]:
    """Tokens, seconds of step time and KV block-seconds of each tenant (rows, by code) in each bin."""
    ledger, s, bounds = replica.ledger, replica.ledger.stretches, replica.timeline.bounds
    cut = replica.timeline.locate(edges)
    rows = s.within(Intervals(cut.position[:1], cut.position[-1:] + 1))
    rows = rows[s.resident[rows]]
    first, after = s.first[rows], s.last[rows] + 1
    # All that a row takes counts where it begins, and at each edge that it crosses the rest is passed on: few do.
    begun = np.searchsorted(first, np.searchsorted(bounds, edges))  # rows are ordered by their first step
    begun = np.repeat(np.arange(len(edges) + 1), np.diff(begun, prepend=0, append=len(rows)))
    beyond = np.searchsorted(bounds, edges, side="right")
    crossing = np.flatnonzero(after >= np.append(beyond, len(bounds))[begun])
    crossed = np.searchsorted(beyond, after[crossing], side="right")
    edge = expand(begun[crossing], crossed)
    crossing = np.repeat(crossing, crossed - begun[crossing])
    tenant = replica.tenant_of_request[s.request[rows]].astype(np.int64)
    shape = (len(replica.tenants), len(edges) + 1)
    cell = tenant * shape[1] + begun
    source = tenant[crossing] * shape[1] + edge

    def by_bin(whole: Floats, rest: Floats) -> Floats:
        size = shape[0] * shape[1]
        found = np.bincount(cell, whole, size)
        found += np.bincount(source + 1, rest, size) - np.bincount(source, rest, size)
        return np.maximum(
            found.reshape(shape)[:, 1:-1], 0.0
        )  # without what lies before the first edge and after the last

    some, work_cut = rows[crossing], cut.take(edge)
    in_step, _ = ledger.token_lines(rows)
    steps_left = after[crossing] - work_cut.position - work_cut.passed
    tokens = by_bin(in_step * (after - first), in_step[crossing] * steps_left)
    end = Places(s.last[some], np.ones(len(some)))
    step_ns = by_bin(ledger.own_cost_of(rows), ledger.own_cost_between(some, work_cut, end))

    # Between steps nothing is computed, but blocks are held.
    length = np.diff(bounds)
    since = (edges - bounds[cut.position]) / np.maximum(length[cut.position], 1)
    held_cut = Places(cut.position, np.clip(since, 0.0, 1.0))
    weighted = running_total(length * np.arange(float(len(length))))
    level, rise = ledger.kv_lines(rows)
    level -= rise * first  # as of the timeline's first step
    token_ns = level * (bounds[after] - bounds[first]) + rise * (weighted[after] - weighted[first])
    ns_left = bounds[after[crossing]] - edges[edge]
    weighted_left = weighted[after[crossing]] - at(weighted, held_cut)[edge]
    held = Spent(by_bin(token_ns, level[crossing] * ns_left + rise[crossing] * weighted_left))
    used = np.diff(at(running_total(length * replica.steps["kv_used"].to_numpy(np.int64)), held_cut))
    return tokens, step_ns / 1e9, held.share * used / 1e9


def _had_requests(replica: Replica, edges: Ints) -> Mask:
    """Which tenants (rows, by code) had a request in which bin, whatever it did there."""
    arrival, until = (replica.requests[name].to_numpy(np.int64) for name in ("arrival", "seen_until"))
    there = np.flatnonzero((arrival < edges[-1]) & (until > edges[0]))
    came, left = (np.zeros((len(replica.tenants), len(edges) + 1), dtype=np.int64) for _ in range(2))
    np.add.at(came, (replica.tenant_of_request[there], np.searchsorted(edges, arrival[there], side="right")), 1)
    np.add.at(left, (replica.tenant_of_request[there], np.searchsorted(edges, until[there])), 1)
    # Who left in a bin was there in it.
    found: Mask = np.cumsum(came, axis=1)[:, 1:-1] > np.cumsum(left, axis=1)[:, :-2]
    return found


def _fairness(got: Floats, counts: Mask) -> Floats:
    """Jain's index of each column of ``got``, of the rows that count there."""
    squares = counts.sum(axis=0) * (got**2).sum(axis=0)
    found: Floats = np.divide(got.sum(axis=0) ** 2, squares, out=np.full(len(squares), np.nan), where=squares > 0)
    return found
