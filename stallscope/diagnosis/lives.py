"""Each request's life as segments in which one rule says who pays: what it was doing, from arrival to its end.

One segment for each stretch of residency, and what lies before, between and after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import pandas as pd

from stallscope.diagnosis.ledger import Ledger
from stallscope.diagnosis.timeline import Ints, Timeline


class State(IntEnum):
    """What a request is in a segment; decides the rule by which its time is charged."""

    BOUNDARY = 0  # arrived while a step was in flight
    BUDGET = 1
    KV = 2
    SLOTS = 3
    HEAD = 4
    POLICY = 5
    GRAMMAR = 6
    REMOTE_KV = 7
    ADAPTER = 8
    ENCODER = 9
    RUNNING = 10
    RECOMPUTE = 11
    PAUSED = 12
    PREEMPTED = 13
    UNSEEN = 14
    BETWEEN = 15  # aborted between two steps: the gap after its last one


_REASON_STATES = {
    "step": State.BOUNDARY,
    "budget": State.BUDGET,
    "kv": State.KV,
    "slots": State.SLOTS,
    "head": State.HEAD,
    "quota": State.POLICY,
    "priority": State.POLICY,
    "grammar": State.GRAMMAR,
    "remote_kv": State.REMOTE_KV,
    "adapter": State.ADAPTER,
    "encoder": State.ENCODER,
}


@dataclass(frozen=True, eq=False)
class Lives:
    """What every request of a replica was doing, and whose turn it was.

    ``table``: columns request (code), begin, end (ns), state, stretch (row of the ledger's stretches or -1), taker (who
    took its blocks: a request code or -1); per request without gaps or overlaps, ordered. ``head``: per step, the
    code of the request at the head of the queue, looked up where somebody waits because of it (else -1).
    """

    table: pd.DataFrame
    head: Ints


def read_lives(ledger: Ledger, requests: pd.DataFrame, residency: pd.DataFrame, by_arrival: bool = True) -> Lives:
    """Lives of one replica's requests; ``by_arrival``: its queue is served first come, first served.

    ``requests``: index 0..n-1 are the request codes; columns arrival, end (ns; the time of the last sight for those
    that never ended). ``residency``: the rows of ``ledger.stretches``, with request and holder as codes (holder -1:
    none), phase and reason as strings.
    """
    timeline = ledger.timeline
    stretches = ledger.stretches
    begin = timeline.before[stretches.first]
    end = timeline.end[stretches.last]
    rows = pd.DataFrame(
        {
            "request": stretches.request,
            "begin": begin,
            "end": end,
            "state": _states(residency),
            "stretch": np.arange(len(stretches)),
            "taker": residency["holder"].to_numpy(np.int64),
        }
    )
    arrival = requests["arrival"].to_numpy(np.int64)
    last = np.maximum(requests["end"].to_numpy(np.int64), arrival)
    rows = rows.sort_values(["request", "begin"], kind="stable")
    code = rows["request"].to_numpy()
    rows["begin"] = np.clip(rows["begin"].to_numpy(), arrival[code], last[code])
    rows["end"] = np.clip(rows["end"].to_numpy(), arrival[code], last[code])
    lives = pd.concat([rows, _between(rows, arrival, last, timeline)], ignore_index=True)
    lives = lives[lives["end"] > lives["begin"]].sort_values(["request", "begin"], kind="stable")
    return Lives(lives.reset_index(drop=True), _head_of_queue(ledger, rows, arrival, by_arrival))


def _states(residency: pd.DataFrame) -> Ints:
    phase = residency["phase"].astype(str).to_numpy()
    reason = residency["reason"].astype(object).to_numpy()
    waiting = np.array([_REASON_STATES.get(str(name), State.UNSEEN) for name in pd.unique(reason)], dtype=np.int64)
    codes = pd.factorize(reason, use_na_sentinel=False)[0]
    state = waiting[codes] if len(codes) else np.zeros(0, dtype=np.int64)
    redo = residency["holder"].to_numpy(np.int64) >= 0
    state = np.where((phase == "prefill") | (phase == "decode"), int(State.RUNNING), state)
    state = np.where((phase == "prefill") & redo, int(State.RECOMPUTE), state)
    state = np.where(phase == "paused", int(State.PAUSED), state)
    return np.where(phase == "preempted", int(State.PREEMPTED), state)


def _between(rows: pd.DataFrame, arrival: Ints, last: Ints, timeline: Timeline) -> pd.DataFrame:
    """Segments for the time of each life that no row covers: before the first, in holes, after the last."""
    code = rows["request"].to_numpy(np.int64)
    n = len(arrival)
    present = np.unique(code)
    absent = np.setdiff1d(np.arange(n), present)
    # Before the first row: the steps in flight since the arrival.
    first = np.searchsorted(code, present)
    after = np.searchsorted(code, present, side="right") - 1
    begin, end = rows["begin"].to_numpy(np.int64), rows["end"].to_numpy(np.int64)
    beyond = np.append(np.where(timeline.observed[1:], timeline.start[1:], timeline.end[:-1]), timeline.end[-1:])
    next_start = beyond[np.searchsorted(timeline.end, end[after])]
    pieces = [
        (present, arrival[present], begin[first], State.BOUNDARY),
        (absent, arrival[absent], last[absent], State.BOUNDARY),
        (code[:-1], end[:-1], np.where(code[1:] == code[:-1], begin[1:], end[:-1]), State.UNSEEN),
        # An abort comes between two steps: up to the next slice it is the gap that passed, nothing was missed.
        (present, end[after], np.minimum(last[present], next_start), State.BETWEEN),
        (present, np.maximum(end[after], next_start), last[present], State.UNSEEN),
    ]
    frames = []
    for request, start, stop, state in pieces:
        # What lies outside the steps seen can't be charged to them.
        inside_start = np.clip(start, timeline.before[0], timeline.end[-1])
        inside_stop = np.clip(stop, timeline.before[0], timeline.end[-1])
        for a, b, s in (
            (start, np.minimum(stop, inside_start), State.UNSEEN),
            (inside_start, inside_stop, state),
            (np.maximum(start, inside_stop), stop, State.UNSEEN),
        ):
            frames.append(pd.DataFrame({"request": request, "begin": a, "end": b, "state": int(s)}))
    joined = pd.concat(frames, ignore_index=True)
    joined["stretch"] = -1
    joined["taker"] = -1
    return joined[joined["end"] > joined["begin"]]


def _head_of_queue(ledger: Ledger, rows: pd.DataFrame, arrival: Ints, by_arrival: bool) -> Ints:
    """Per step, the request whose turn it is: preempted ones first, then by arrival.

    Looked up only in steps in which somebody waits because of the head. In a queue of another order than arrival it
    is known only where just one request can be meant.
    """
    timeline, stretches = ledger.timeline, ledger.stretches
    n = len(timeline)
    head = np.full(n, -1, dtype=np.int64)
    state = rows["state"].to_numpy()
    stretch = rows["stretch"].to_numpy()
    behind = stretch[state == State.HEAD]
    change = np.bincount(stretches.first[behind], minlength=n + 1) - np.bincount(
        stretches.last[behind] + 1, minlength=n + 1
    )
    asked = np.flatnonzero(np.cumsum(change)[:n] > 0)
    lacking = np.isin(state, (State.BUDGET, State.KV, State.SLOTS, State.PREEMPTED))
    candidates = stretch[lacking]
    if not len(asked) or not len(candidates):
        return head
    # Candidates' stretches, in positions among the asked steps only.
    low = np.searchsorted(asked, stretches.first[candidates])
    high = np.searchsorted(asked, stretches.last[candidates], side="right")
    some = high > low
    candidates, low, high = candidates[some], low[some], high[some]
    was_preempted = state[lacking][some] == State.PREEMPTED
    request = stretches.request[candidates]
    order = np.lexsort((arrival[request], ~was_preempted))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    counts = high - low
    where = np.repeat(low, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    best = np.full(len(asked), len(order), dtype=np.int64)
    np.minimum.at(best, where, np.repeat(rank, counts))
    found = best < len(order)
    if not by_arrival:
        found &= np.bincount(where, minlength=len(asked)) == 1
    head[asked[found]] = request[order[best[found]]]
    return head
