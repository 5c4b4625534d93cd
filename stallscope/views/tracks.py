"""A replica's whole recording as tracks for a timeline viewer: every request, step and counter, and who stalled whom.

Nothing is summed up or left out, so all is columns: a face writes them out one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stallscope.diagnosis.incidents import Waits
from stallscope.diagnosis.lives import State
from stallscope.diagnosis.metrics import METRICS
from stallscope.diagnosis.model import Incident
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Ints, Mask
from stallscope.views.waterfall import doing_in

_IN_BATCH = (State.RUNNING, State.RECOMPUTE, State.PAUSED)
_NEVER = np.iinfo(np.int64).max
Words = NDArray[np.object_]


# --- requests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pieces:
    """What a request was ``doing`` from ``begin`` to ``end`` (ns), and how many ``tokens`` were computed meanwhile."""

    begin: Ints
    end: Ints
    doing: Words
    tokens: Ints


@dataclass(frozen=True, eq=False)
class Stays:
    """Stretches of requests (codes) from ``begin`` to ``end`` (ns), ordered by ``lane`` and begin.

    Those of a lane never overlap. Stay i is made of the ``pieces`` from ``first_piece[i]`` to below
    ``first_piece[i + 1]``, without gaps.
    """

    lane: Ints
    request: Ints
    begin: Ints
    end: Ints
    first_piece: Ints
    pieces: Pieces

    def of(self, requests: int) -> Ints:
        """For each request, its stay (each has one at most); -1 for none."""
        found: Ints = np.full(requests, -1, dtype=np.int64)
        found[self.request] = np.arange(len(self.request))
        return found


def stays(replica: Replica) -> tuple[Stays, Stays]:
    """All lives, cut in two where a request first gets into a batch: before that it waits, from then on it keeps its
    lane until it has left, even while it is preempted."""
    requests = replica.requests
    codes = np.arange(len(requests))
    whole = pd.DataFrame(
        {"query": codes, "request": codes, "begin": requests["arrival"], "end": requests["seen_until"]}
    )
    cut = replica.partition.cut(whole)
    request, begin, end, state, stretch = (
        cut[name].to_numpy(np.int64) for name in ("request", "begin", "end", "state", "stretch")
    )
    entered = np.full(len(requests), _NEVER)
    runs = np.isin(state, _IN_BATCH)
    np.minimum.at(entered, request[runs], begin[runs])
    inside = begin >= entered[request]

    rows = replica.ledger.stretches
    prefill = np.append(rows.prefill, False)[stretch]  # what lies outside all stretches has row -1
    tokens = np.append(rows.tokens * (rows.last.astype(np.int64) - rows.first + 1), 0)[stretch]
    kind = state * 2 + (prefill & (state == State.RUNNING))
    first = np.flatnonzero(_changes(request) | _changes(kind) | _changes(inside.astype(np.int64)))
    last = np.append(first[1:], len(request))[: len(first)] - 1
    _, example, which = np.unique(kind, return_index=True, return_inverse=True)
    doing = np.array(doing_in(replica, state[example], stretch[example]), dtype=object)[which[first]]
    sums = np.add.reduceat(tokens, first) if len(first) else tokens
    pieces = Pieces(begin[first], end[last], doing, sums)
    waits = ~inside[first]
    return _on_lanes(request[first], pieces, waits), _on_lanes(request[first], pieces, ~waits)


def _on_lanes(request: Ints, pieces: Pieces, chosen: Mask) -> Stays:
    """Stays of the chosen pieces: those of one request, which follow each other, are one."""
    rows = np.flatnonzero(chosen)
    first = np.flatnonzero(_changes(request[rows]))
    count = np.diff(np.append(first, len(rows)))
    begin, end = pieces.begin[rows[first]], pieces.end[rows[first + count - 1]]
    lane = lanes(begin, end)
    order = np.lexsort((begin, lane))
    bounds = np.concatenate([[0], np.cumsum(count[order])])
    within = np.arange(len(rows)) - np.repeat(bounds[:-1], count[order])
    rows = rows[np.repeat(first[order], count[order]) + within]
    columns = Pieces(*(column[rows] for column in vars(pieces).values()))
    return Stays(lane[order], request[chosen][first][order], begin[order], end[order], bounds, columns)


def lanes(begin: Ints, end: Ints) -> Ints:
    """For each interval the lowest lane that is free when it begins; one may begin where another ends."""
    found: Ints = np.zeros(len(begin), dtype=np.int64)
    order = np.lexsort((end, begin))
    free: list[int] = []
    taken: list[tuple[int, int]] = []
    for row, start, stop in zip(order.tolist(), begin[order].tolist(), end[order].tolist(), strict=True):
        while taken and taken[0][0] <= start:
            heappush(free, heappop(taken)[1])
        lane = heappop(free) if free else len(taken)
        heappush(taken, (stop, lane))
        found[row] = lane
    return found


def _changes(values: Ints) -> Mask:
    """Where a value differs from the one before it; the first does."""
    found = np.ones(len(values), dtype=np.bool_)
    found[1:] = values[1:] != values[:-1]
    return found


# --- the engine ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Steps:
    """The slices of the steps, in order: they never overlap."""

    begin: Ints
    end: Ints
    step: Ints
    prefill_tokens: Ints
    decode_tokens: Ints
    batch_size: Ints


@dataclass(frozen=True, eq=False)
class Counter:
    """A number that keeps each ``value`` from its ``time_ns`` until the next one."""

    name: str
    time_ns: Ints
    value: Ints


def engine(replica: Replica) -> tuple[Steps, tuple[Counter, ...]]:
    """The replica's steps, and what the scheduler counted in each: all of it is 0 where the engine was idle."""
    timeline = replica.timeline
    numbers = replica.read_steps(
        ["prefill_tokens", "decode_tokens", "batch_size", "running", "waiting", "kv_used", "kv_total", "budget"]
    )
    columns = {str(name): numbers[name].to_numpy(np.int64) for name in numbers}
    tokens = columns["prefill_tokens"] + columns["decode_tokens"]
    steps = Steps(
        timeline.start,
        timeline.end,
        timeline.step,
        columns["prefill_tokens"],
        columns["decode_tokens"],
        columns["batch_size"],
    )
    counted = {
        f"KV blocks used{_of(columns['kv_total'])}": columns["kv_used"],
        "requests waiting": columns["waiting"],
        "requests running": columns["running"],
        f"batch tokens{_of(columns['budget'])}": tokens,
        "prefill tokens": columns["prefill_tokens"],
    }
    time = np.concatenate([timeline.start, timeline.idle.begin])
    order = np.argsort(time, kind="stable")
    found = []
    for name, value in counted.items():
        all_of_them = np.concatenate([value, np.zeros(len(timeline.idle.begin), dtype=np.int64)])[order]
        fresh = _changes(all_of_them)
        found.append(Counter(name, time[order][fresh], all_of_them[fresh]))
    return steps, tuple(found)


def _of(limits: Ints) -> str:
    """The limit of a counter behind its name, where there is one."""
    return f" (of {limits.max():,})" if limits.max(initial=0) else ""


# --- incidents ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stalls:
    """The stalled waits of incidents' victims, ordered by ``lane`` and begin; those of a lane never overlap.

    ``request`` waited from ``begin`` to ``end`` (ns) for what ``metric`` says. ``cause`` is the culprit's request
    behind it (-1 where nobody is to blame), which was there ``since`` (ns, not before the wait began): in the batch or,
    if not ``cause_runs``, itself waiting.
    """

    lane: Ints
    request: Ints
    begin: Ints
    end: Ints
    metric: Words
    cause: Ints
    cause_runs: Mask
    since: Ints


def stalls(replica: Replica, waits: Waits, incidents: Sequence[Incident], batch: Stays) -> Stalls:
    """The stalled waits within the replica's ``incidents``; ``batch``: the stays of requests in it.

    A wait is laid to the culprit that it is charged to most, the incident's first where it is charged to none; of that
    tenant's suspected requests, to the first that was there meanwhile.
    """
    table = waits.table[waits.table["stalled"]]
    begin, end, tenant, request = (table[name].to_numpy(np.int64) for name in ("begin", "end", "tenant", "request"))
    arrival, left = (replica.requests[name].to_numpy(np.int64) for name in ("arrival", "seen_until"))
    cause = np.full(len(table), -1, dtype=np.int64)
    shown = np.zeros(len(table), dtype=np.bool_)
    code_of = {name: code for code, name in enumerate(replica.tenants)}
    for incident in incidents:
        victims = [code_of[one.tenant] for one in incident.victims if one.tenant in code_of]
        rows = np.flatnonzero(
            (begin <= incident.end_ns) & (end >= incident.start_ns) & np.isin(tenant, victims) & ~shown
        )
        shown[rows] = True
        culprits = [one for one in incident.culprits if one.tenant in code_of]
        most = _most_charged(waits, table.index.to_numpy()[rows], [code_of[one.tenant] for one in culprits])
        for number, culprit in enumerate(culprits):
            suspects = _codes(replica, [one.request for one in culprit.requests])
            for suspect in suspects[::-1].tolist():  # the first comes last, and stays
                meets = (most == number) & (arrival[suspect] < end[rows]) & (left[suspect] > begin[rows])
                cause[rows[meets & (request[rows] != suspect)]] = suspect
    stay = np.append(batch.of(len(arrival)), -1)[cause]
    entered = np.where(stay >= 0, np.append(batch.begin, 0)[stay], _NEVER)
    runs = entered < end
    since = np.maximum(begin, np.where(runs, entered, np.append(arrival, 0)[cause]))
    kept = np.flatnonzero(shown)
    lane = lanes(begin[kept], end[kept])
    metric = np.array(METRICS, dtype=object)[table["metric"].to_numpy(np.int64)]
    by_lane = np.lexsort((begin[kept], lane))
    order = kept[by_lane]
    return Stalls(
        lane[by_lane],
        request[order],
        begin[order],
        end[order],
        metric[order],
        cause[order],
        runs[order],
        since[order],
    )


def _most_charged(waits: Waits, asked: Ints, holders: Sequence[int]) -> Ints:
    """For each of these waits, the position of the holder that it is charged to most: 0 where to none of them."""
    if not holders:
        return np.full(len(asked), -1, dtype=np.int64)
    charges = waits.charges[waits.charges["query"].isin(asked) & waits.charges["holder"].isin(holders)]
    position = pd.Series(range(len(holders)), index=list(holders))
    amounts = np.zeros((len(asked), len(holders)))
    order = np.argsort(asked)
    rows = order[np.searchsorted(asked[order], charges["query"].to_numpy())]
    np.add.at(amounts, (rows, position[charges["holder"]].to_numpy()), charges["ns"].to_numpy(np.float64))
    found: Ints = amounts.argmax(axis=1)
    return found


def _codes(replica: Replica, names: Sequence[str]) -> Ints:
    """Codes of the requests with these names, in this order; those that the replica doesn't know are left out."""
    mine = replica.requests["request"]
    chosen = mine[mine.isin(names)]
    code_of = pd.Series(chosen.index, index=chosen.to_numpy())
    found: Ints = code_of.reindex([name for name in names if name in code_of.index]).to_numpy(np.int64)
    return found
