"""Where each instant of a request's life went, and to whom: the exact partition and its charges.

``lives`` cuts each request's life into segments, one for each stretch of residency and one before it; ``charge`` reads
from the ledger, for any stretch of that life, who pays for it and by which mechanism. The parts of a stretch are int
ns and sum to its length: shares are rounded by largest remainder.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
import pandas as pd

from stallscope.diagnosis.ledger import Holder, Ledger
from stallscope.diagnosis.timeline import Floats, Ints, Timeline


class Mechanism(StrEnum):
    """How a holder delays a request. One term each, in tables, reports and docs."""

    OWN_WORK = "own_work"
    INTAKE = "intake"
    STEP_BOUNDARY = "step_boundary"
    PREFILL_QUEUE = "prefill_queue"
    KV_PINNING = "kv_pinning"
    SLOT_EXHAUSTION = "slot_exhaustion"
    HEAD_OF_LINE = "head_of_line"
    POLICY = "policy"
    GRAMMAR_COMPILE = "grammar_compile"
    KV_TRANSFER = "kv_transfer"
    ADAPTER_SWAP = "adapter_swap"
    ENCODER = "encoder"
    PREFILL_INTERFERENCE = "prefill_interference"
    DECODE_DRAG = "decode_drag"
    PREFILL_PRIORITY = "prefill_priority"
    PREEMPTION = "preemption"
    RECOMPUTE = "recompute"
    STEP_FIXED = "step_fixed"
    UNEXPLAINED = "unexplained"
    HOST_GAP = "host_gap"
    DELIVERY = "delivery"
    UNOBSERVED = "unobserved"


MECHANISMS = tuple(Mechanism)
_CODE = {mechanism: code for code, mechanism in enumerate(MECHANISMS)}


class Party(IntEnum):
    """Holders that are no group of requests (groups have codes from 0 on)."""

    OWN = -1  # the request itself
    ENGINE = -2
    FRONTEND = -3
    UNSEEN = -4  # telemetry is missing


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
# States in which the marginal cost of the batch is shared among holders, by which function, as which mechanism.
_SHARED: dict[State, tuple[tuple[str, Mechanism], ...]] = {
    State.BOUNDARY: (("prefill", Mechanism.STEP_BOUNDARY), ("decode", Mechanism.STEP_BOUNDARY)),
    State.BUDGET: (("budget", Mechanism.PREFILL_QUEUE),),
    State.KV: (("kv", Mechanism.KV_PINNING),),
    State.SLOTS: (("slots", Mechanism.SLOT_EXHAUSTION),),
    State.HEAD: (("head", Mechanism.HEAD_OF_LINE),),
    State.POLICY: (("budget", Mechanism.POLICY),),
    State.RUNNING: (("prefill", Mechanism.PREFILL_INTERFERENCE), ("decode", Mechanism.DECODE_DRAG)),
    State.RECOMPUTE: (("prefill", Mechanism.PREFILL_INTERFERENCE), ("decode", Mechanism.DECODE_DRAG)),
    State.PAUSED: (("prefill", Mechanism.PREFILL_PRIORITY), ("decode", Mechanism.PREFILL_PRIORITY)),
}
# States that are a request's own condition: its whole slice time is its own.
_OWN_CONDITION = {
    State.GRAMMAR: Mechanism.GRAMMAR_COMPILE,
    State.REMOTE_KV: Mechanism.KV_TRANSFER,
    State.ADAPTER: Mechanism.ADAPTER_SWAP,
    State.ENCODER: Mechanism.ENCODER,
}


@dataclass(frozen=True, eq=False)
class Partition:
    """One replica's ledger and lives, with what is needed to charge any stretch of them.

    ``lives``: columns request (code), begin, end (ns), state, stretch (row of the ledger's stretches or -1), taker
    (code of the request that took the blocks, or -1); per request without gaps or overlaps, ordered.
    ``head``: per step, the code of the request at the head of the queue (-1: nobody waits).
    """

    ledger: Ledger
    lives: pd.DataFrame
    head: Ints

    def holders(self, group_of_request: Ints) -> list[Holder]:
        """Holders 0..max of ``group_of_request`` (a group code for each request code; -1: no holder)."""
        group = group_of_request[self.ledger.stretches.request]
        return [self.ledger.holder(group == code) for code in range(int(group_of_request.max(initial=-1)) + 1)]

    def charge(self, queries: pd.DataFrame, group_of_request: Ints) -> pd.DataFrame:
        """Who pays for stretches of lives, and by which mechanism.

        ``queries``: columns query (unique int), request (code), begin, end (int64 ns, within the request's life).
        ``group_of_request``: group code of each request; groups are the holders.
        Returns columns query, holder (a group's code or a ``Party``), mechanism (index into ``MECHANISMS``), ns (int64,
        positive), sorted; the parts of each query sum to its length.
        """
        pieces = self.cut(queries)
        parts = self._parts(pieces, group_of_request)
        lengths = (pieces["end"] - pieces["begin"]).to_numpy(np.int64)
        parts["ns"] = round_to_sum(parts["piece"].to_numpy(), parts["ns"].to_numpy(), lengths)
        parts["query"] = pieces["query"].to_numpy()[parts["piece"].to_numpy()]
        grouped = parts[parts["ns"] > 0].groupby(["query", "holder", "mechanism"], sort=True)["ns"].sum()
        return grouped.reset_index()

    def cut(self, queries: pd.DataFrame) -> pd.DataFrame:
        """The queries cut at the segment boundaries of the lives they lie in; no empty pieces."""
        pieces = queries.merge(self.lives, on="request", suffixes=("", "_life"))
        pieces["begin"] = np.maximum(pieces["begin"], pieces["begin_life"])
        pieces["end"] = np.minimum(pieces["end"], pieces["end_life"])
        pieces = pieces[pieces["end"] > pieces["begin"]].drop(columns=["begin_life", "end_life"])
        return pieces.sort_values(["query", "begin"], kind="stable").reset_index(drop=True)

    def _parts(self, pieces: pd.DataFrame, group_of_request: Ints) -> pd.DataFrame:
        """Unrounded parts of each piece, long form: piece, holder, mechanism, ns."""
        ledger, timeline = self.ledger, self.ledger.timeline
        begin, end = pieces["begin"].to_numpy(np.int64), pieces["end"].to_numpy(np.int64)
        state = pieces["state"].to_numpy(np.int64)
        stretch = pieces["stretch"].to_numpy(np.int64)
        taker = pieces["taker"].to_numpy(np.int64)
        own_group = group_of_request[pieces["request"].to_numpy(np.int64)]
        out = _Parts()

        def over(values: Floats, rows: Ints) -> Floats:
            return timeline.at(values, end[rows]) - timeline.at(values, begin[rows])

        every = np.arange(len(pieces))
        seen = every[state != State.UNSEEN]
        unseen = every[state == State.UNSEEN]
        out.add(unseen, Party.UNSEEN, Mechanism.UNOBSERVED, (end - begin)[unseen].astype(np.float64))
        fixed, marginal, unexplained = (
            over(values, seen) for values in (ledger.fixed, ledger.marginal, ledger.unexplained)
        )
        out.add(seen, Party.ENGINE, Mechanism.HOST_GAP, over(timeline.host_gap, seen))
        out.add(seen, Party.UNSEEN, Mechanism.UNOBSERVED, over(ledger.unobserved, seen))
        # The engine was idle although the request had arrived: it was not in the engine's queue yet.
        out.add(seen, Party.FRONTEND, Mechanism.INTAKE, over(timeline.idle, seen))

        condition = np.isin(state[seen], [int(s) for s in _OWN_CONDITION])
        for own_state, mechanism in _OWN_CONDITION.items():
            mine = state[seen] == own_state
            out.add(seen[mine], Party.OWN, mechanism, (fixed + marginal + unexplained)[mine])
        runs = np.isin(state[seen], (State.RUNNING, State.RECOMPUTE))
        out.add(seen[~condition], Party.ENGINE, Mechanism.UNEXPLAINED, unexplained[~condition])
        still = ~runs & ~condition
        out.add(seen[still], Party.ENGINE, Mechanism.STEP_FIXED, fixed[still])

        running = seen[runs]
        own = ledger.own_cost(stretch[running], begin[running], end[running])
        own = np.minimum(own, marginal[runs])
        redo = state[running] == State.RECOMPUTE
        # Work done a second time is charged to who took the blocks; to nobody seen where that was lost.
        taken_by = np.append(group_of_request, int(Party.UNSEEN))[taker]
        out.add_each(running[redo], taken_by[running[redo]], Mechanism.RECOMPUTE, (own + fixed[runs])[redo])
        out.add(running[~redo], Party.OWN, Mechanism.OWN_WORK, (own + fixed[runs])[~redo])
        lost = every[state == State.PREEMPTED]
        out.add_each(lost, taken_by[lost], Mechanism.PREEMPTION, over(ledger.marginal, lost))

        own_of = np.zeros(len(pieces))
        own_of[running] = own
        own_prefills = np.zeros(len(pieces), dtype=bool)
        own_prefills[running] = ledger.stretches.prefill[stretch[running]]
        group_of_head = np.append(group_of_request, -1)[self.head]
        for code, holder in enumerate(self.holders(group_of_request)):
            for shared_state, rules in _SHARED.items():
                rows = every[state == shared_state]
                if not len(rows):
                    continue
                for resource, mechanism in rules:
                    values = holder.head(group_of_head == code) if resource == "head" else getattr(holder, resource)
                    amount = over(values, rows)
                    if shared_state in (State.RUNNING, State.RECOMPUTE):
                        mine = (own_group[rows] == code) & (own_prefills[rows] == (resource == "prefill"))
                        amount = np.where(mine, amount - own_of[rows], amount)
                    out.add(rows, code, mechanism, amount)
        # Nobody is known to stand at the head.
        behind = every[state == State.HEAD]
        nobodys = ledger.share_of_marginal((group_of_head < 0).astype(np.float64), np.ones(len(group_of_head)))
        out.add(behind, Party.UNSEEN, Mechanism.UNOBSERVED, over(nobodys, behind))
        return out.frame()


class _Parts:
    """Collects parts of pieces column by column."""

    def __init__(self) -> None:
        self._columns: list[tuple[Ints, Ints, Ints, Floats]] = []

    def add(self, pieces: Ints, holder: int, mechanism: Mechanism, ns: Floats) -> None:
        self.add_each(pieces, np.full(len(pieces), int(holder)), mechanism, ns)

    def add_each(self, pieces: Ints, holder: Ints, mechanism: Mechanism, ns: Floats) -> None:
        some = ns > 0
        if some.any():
            code = np.full(int(some.sum()), _CODE[mechanism])
            self._columns.append((pieces[some], holder[some], code, ns[some]))

    def frame(self) -> pd.DataFrame:
        if not self._columns:
            return pd.DataFrame({"piece": [], "holder": [], "mechanism": [], "ns": []}).astype(np.int64)
        piece, holder, mechanism, ns = (np.concatenate(column) for column in zip(*self._columns, strict=True))
        return pd.DataFrame({"piece": piece, "holder": holder, "mechanism": mechanism, "ns": ns})


def round_to_sum(group: Ints, amount: Floats, total: Ints) -> Ints:
    """Rounds amounts to integers that sum to ``total[g]`` in each group g, by largest remainder.

    ``group`` gives each amount's group (0..len(total)-1). Amounts are first scaled to the total, since floating-point
    sums miss it by parts of a nanosecond. Every group with a total above 0 must have an amount above 0.
    """
    sums = np.bincount(group, amount, len(total))
    factor = np.divide(total, sums, out=np.zeros(len(total)), where=sums > 0)
    exact = amount * factor[group]
    down = np.floor(exact).astype(np.int64)
    missing = total - np.bincount(group, down, len(total)).astype(np.int64)
    order = np.lexsort((np.arange(len(group)), down - exact, group))
    ranked = group[order]
    starts = np.searchsorted(ranked, np.arange(len(total)))
    rank = np.arange(len(group)) - starts[ranked]
    rounded = down[order] + (rank < missing[ranked])
    result = np.empty_like(down)
    result[order] = rounded
    return result


# --- lives --------------------------------------------------------------------------------------------------------


def read_partition(ledger: Ledger, requests: pd.DataFrame, residency: pd.DataFrame) -> Partition:
    """Lives of one replica's requests.

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
    return Partition(ledger, lives.reset_index(drop=True), _head_of_queue(ledger, rows, arrival))


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


def _head_of_queue(ledger: Ledger, rows: pd.DataFrame, arrival: Ints) -> Ints:
    """Per step, the request whose turn it is: preempted ones first, then by arrival (first come, first served).

    Looked up only in steps in which somebody waits because of the head.
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
    head[asked[found]] = request[order[best[found]]]
    return head
