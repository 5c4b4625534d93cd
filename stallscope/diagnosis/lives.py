"""Each request's life as segments in which one rule says who pays: what it was doing, from arrival to its end.

One segment for each stretch of residency, and what lies before, between and after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stallscope.diagnosis.ledger import Ledger, stable_order
from stallscope.diagnosis.timeline import Intervals, Ints, expand

Small = NDArray[np.int8]


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

    ``arrival`` and ``last`` bound each life (ns; ``last``: the last sight of those that never ended). ``state`` and
    ``taker`` (who took its blocks: a request code or -1) are of each of the ledger's stretches. ``by_arrival``: the
    replica's queue is served first come, first served.
    """

    ledger: Ledger
    arrival: Ints
    last: Ints
    state: Small
    taker: Ints
    by_arrival: bool

    @cached_property
    def by_request(self) -> tuple[Ints, Ints]:
        """Stretches ordered by request and step, and where those of each request begin (one more than requests)."""
        order = stable_order(self.ledger.stretches.request)
        count = np.bincount(self.ledger.stretches.request, minlength=len(self.arrival))
        return order, np.concatenate([[0], np.cumsum(count)])

    def of(self, requests: Ints) -> pd.DataFrame:
        """The lives of these requests (codes, ascending): request, begin, end (ns), state, stretch (row of the ledger's
        stretches or -1), taker; one segment for each stretch and for what lies before, between and after them, per
        request without gaps or overlaps, ordered."""
        order, starts = self.by_request
        stretch = order[expand(starts[requests], starts[requests + 1])]
        code, bounds = self.ledger.stretches.request[stretch], self.ledger.timeline.bounds
        arrival, last = self.arrival[code], self.last[code]
        begin = np.clip(bounds[self.ledger.stretches.first[stretch]], arrival, last)
        end = np.clip(bounds[self.ledger.stretches.last[stretch] + 1], arrival, last)
        rows = pd.DataFrame(
            {
                "request": code,
                "begin": begin,
                "end": end,
                "state": self.state[stretch],
                "stretch": stretch,
                "taker": self.taker[stretch],
            }
        )
        lives = pd.concat([rows, self._between(rows, requests)], ignore_index=True)
        lives = lives[lives["end"] > lives["begin"]]
        return lives.take(np.lexsort((lives["begin"], lives["request"]))).reset_index(drop=True)

    def _between(self, rows: pd.DataFrame, requests: Ints) -> pd.DataFrame:
        """Segments for the time of each life that no row covers: before the first, in holes, after the last."""
        timeline = self.ledger.timeline
        code = rows["request"].to_numpy(np.int64)
        begin, end = rows["begin"].to_numpy(np.int64), rows["end"].to_numpy(np.int64)
        first, after = np.searchsorted(code, requests), np.searchsorted(code, requests, side="right") - 1
        absent = requests[after < first]
        present, first, after = requests[after >= first], first[after >= first], after[after >= first]
        arrival, last = self.arrival, self.last
        ended = np.searchsorted(timeline.end, end[after])
        next_start = self._next_start(ended)
        pieces = [
            # Before the first row: the steps in flight since the arrival.
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
            inside_start = np.clip(start, timeline.bounds[0], timeline.bounds[-1])
            inside_stop = np.clip(stop, timeline.bounds[0], timeline.bounds[-1])
            for a, b, s in (
                (start, np.minimum(stop, inside_start), State.UNSEEN),
                (inside_start, inside_stop, state),
                (np.maximum(start, inside_stop), stop, State.UNSEEN),
            ):
                some = b > a
                frames.append(
                    pd.DataFrame({"request": request[some], "begin": a[some], "end": b[some], "state": int(s)})
                )
        joined = pd.concat(frames, ignore_index=True)
        joined["stretch"] = -1
        joined["taker"] = -1
        return joined

    def _next_start(self, position: Ints) -> Ints:
        """When the slice after each of these steps begins; where that was not seen, when the step ends."""
        timeline = self.ledger.timeline
        following = np.minimum(position + 1, len(timeline) - 1)
        seen = (position + 1 < len(timeline)) & timeline.observed[following]
        return np.where(seen, timeline.start[following], timeline.end[np.minimum(position, len(timeline) - 1)])

    def head(self, spans: Intervals) -> tuple[Ints, Ints]:
        """Steps (positions, ascending) in these spans of positions in which somebody waits because of the head of the
        queue, and the request that is the head (-1: not known).

        Preempted ones come first, then by arrival. In a queue of another order than arrival it is known only where just
        one request can be meant.
        """
        stretches = self.ledger.stretches
        rows = stretches.within(spans)
        state, first, after = self.state[rows], stretches.first[rows], stretches.last[rows] + 1
        behind = Intervals(first[state == State.HEAD], after[state == State.HEAD]).merged()
        asked = expand(behind.begin, behind.end)
        head = np.full(len(asked), -1, dtype=np.int64)
        # Candidates' stretches, in positions among the asked steps only.
        begin, end = np.searchsorted(asked, first), np.searchsorted(asked, after)
        some = np.isin(state, (State.BUDGET, State.KV, State.SLOTS, State.PREEMPTED)) & (end > begin)
        begin, end, request = begin[some], end[some], stretches.request[rows[some]]
        order = np.lexsort((self.arrival[request], state[some] != State.PREEMPTED))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        where = expand(begin, end)
        best = np.full(len(asked), len(order), dtype=np.int64)
        np.minimum.at(best, where, np.repeat(rank, end - begin))
        found = best < len(order)
        if not self.by_arrival:
            found &= np.bincount(where, minlength=len(asked)) == 1
        head[found] = request[order[best[found]]]
        return asked, head


def read_states(phase: pd.Series[str], reason: pd.Series[str], holder: Ints) -> Small:
    """The state of a request in each row of residency; ``holder``: code of who took its blocks, -1 for none."""
    codes, reasons = pd.factorize(reason, use_na_sentinel=False)
    waiting = np.array([_REASON_STATES.get(str(name), State.UNSEEN) for name in reasons], dtype=np.int8)
    state = waiting[codes] if len(codes) else np.zeros(0, dtype=np.int8)
    state[phase.isin(("prefill", "decode"))] = State.RUNNING
    state[(phase == "prefill") & (holder >= 0)] = State.RECOMPUTE
    state[phase == "paused"] = State.PAUSED
    state[phase == "preempted"] = State.PREEMPTED
    return state
