"""Where each instant of a request's life went, and to whom: the exact partition and its charges.

A request's life comes cut into segments (``lives``); ``charge`` reads from the ``ledger`` and ``holdings``, for any
stretch of it, who pays for it and by which mechanism. The parts of a stretch are int ns and sum to its length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
import pandas as pd

from stallscope.diagnosis.holdings import Holders, Holding
from stallscope.diagnosis.ledger import CHUNK, Ledger
from stallscope.diagnosis.lives import Lives, State
from stallscope.diagnosis.rounding import round_to_sum
from stallscope.diagnosis.timeline import Floats, Intervals, Ints, Places, at, expand, running_total


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
    CACHE_EVICTION = "cache_eviction"
    STEP_FIXED = "step_fixed"
    UNEXPLAINED = "unexplained"
    HOST_GAP = "host_gap"
    LOCKSTEP = "lockstep"
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


Held = Callable[[Holders, int], Holding]

# States in which the marginal cost of the batch is shared among holders, by which function, as which mechanism.
_SHARED: dict[State, tuple[tuple[Held, Mechanism], ...]] = {
    State.BOUNDARY: ((Holders.prefill, Mechanism.STEP_BOUNDARY), (Holders.decode, Mechanism.STEP_BOUNDARY)),
    State.BUDGET: ((Holders.budget, Mechanism.PREFILL_QUEUE),),
    State.KV: ((Holders.kv, Mechanism.KV_PINNING),),
    State.SLOTS: ((Holders.slots, Mechanism.SLOT_EXHAUSTION),),
    State.HEAD: ((Holders.head, Mechanism.HEAD_OF_LINE),),
    State.POLICY: ((Holders.budget, Mechanism.POLICY),),
    State.RUNNING: ((Holders.prefill, Mechanism.PREFILL_INTERFERENCE), (Holders.decode, Mechanism.DECODE_DRAG)),
    State.RECOMPUTE: ((Holders.prefill, Mechanism.PREFILL_INTERFERENCE), (Holders.decode, Mechanism.DECODE_DRAG)),
    State.PAUSED: ((Holders.prefill, Mechanism.PREFILL_PRIORITY), (Holders.decode, Mechanism.PREFILL_PRIORITY)),
}
# States that are a request's own condition: its whole slice time is its own.
_OWN_CONDITION = {
    State.GRAMMAR: Mechanism.GRAMMAR_COMPILE,
    State.REMOTE_KV: Mechanism.KV_TRANSFER,
    State.ADAPTER: Mechanism.ADAPTER_SWAP,
    State.ENCODER: Mechanism.ENCODER,
}
OWN_CONDITIONS = frozenset(_OWN_CONDITION.values())


BLOCK = 2048  # queries that are charged at a time


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Stretches of lives in which one rule says who pays (arrays, one entry a piece).

    ``query`` is the position of the query; ``begin`` and ``end`` are ns, ``state`` is one of ``State``, ``stretch`` the
    ledger's or -1, ``taker`` a request or -1.
    """

    query: Ints
    request: Ints
    begin: Ints
    end: Ints
    state: Ints
    stretch: Ints
    taker: Ints


_CHARGE_TYPES = {"query": np.int64, "holder": np.int32, "mechanism": np.int8, "ns": np.int64}
_NO_CHARGES = pd.DataFrame({name: np.zeros(0, dtype=kind) for name, kind in _CHARGE_TYPES.items()})


@dataclass(frozen=True, eq=False)
class Partition:
    """One replica's ledger and lives: all that is needed to charge any stretch of them."""

    ledger: Ledger
    lives: Lives

    def charge(self, queries: pd.DataFrame, group_of_request: Ints) -> pd.DataFrame:
        """Who pays for stretches of lives, and by which mechanism.

        ``queries``: columns query (unique int), request (code), begin, end (int64 ns, within the request's life).
        ``group_of_request``: group code of each request; groups are the holders.
        Returns columns query, holder (a group's code or a ``Party``), mechanism (index into ``MECHANISMS``), ns (all
        integers, ns positive), sorted; the parts of each query sum to its length.
        """
        order = np.argsort(queries["begin"].to_numpy(), kind="stable")
        blocks = (queries.iloc[order[first : first + BLOCK]] for first in range(0, len(order), BLOCK))
        charges = pd.concat([_NO_CHARGES, *(self._charge(block, group_of_request) for block in blocks)])
        return charges.take(np.argsort(charges["query"].to_numpy(), kind="stable")).reset_index(drop=True)

    def _charge(self, queries: pd.DataFrame, group_of_request: Ints) -> pd.DataFrame:
        """``charge`` for a block of queries."""
        pieces = self._cut(queries)
        parts = self._parts(pieces, group_of_request)
        parts["ns"] = round_to_sum(parts["piece"].to_numpy(), parts["ns"].to_numpy(), pieces.end - pieces.begin)
        parts = parts[parts["ns"] > 0]
        parts["query"] = queries["query"].to_numpy()[pieces.query[parts["piece"].to_numpy()]]
        charges = parts.groupby(["query", "holder", "mechanism"], sort=True)["ns"].sum().reset_index()
        return charges.astype(_CHARGE_TYPES)

    def cut(self, queries: pd.DataFrame) -> pd.DataFrame:
        """The queries cut at the segment boundaries of the lives they lie in; no empty pieces."""
        pieces = pd.DataFrame(vars(self._cut(queries)))
        pieces["query"] = queries["query"].to_numpy()[pieces["query"].to_numpy()]
        return pieces.sort_values(["query", "begin"], ignore_index=True)

    def _cut(self, queries: pd.DataFrame) -> _Pieces:
        request = queries["request"].to_numpy(np.int64)
        lives = self.lives.of(np.unique(request))
        code = lives["request"].to_numpy(np.int64)
        first, after = np.searchsorted(code, request), np.searchsorted(code, request, side="right")
        query, segment = np.repeat(np.arange(len(request)), after - first), expand(first, after)
        begin, end = (
            limit(queries[name].to_numpy(np.int64)[query], lives[name].to_numpy(np.int64)[segment])
            for name, limit in (("begin", np.maximum), ("end", np.minimum))
        )
        some = end > begin
        kept = segment[some]
        rest = (lives[name].to_numpy(np.int64)[kept] for name in ("state", "stretch", "taker"))
        return _Pieces(query[some], code[kept], begin[some], end[some], *rest)

    def own_work(self, waits: pd.DataFrame) -> Ints:
        """How much of each wait (columns request, begin, end: ns, within the request's life) is the request's own work.

        Of many waits at once; rounded, so it may be off by a ns from what ``charge`` says.
        """
        ledger, stretches, timeline = self.ledger, self.ledger.stretches, self.ledger.timeline
        order, _ = self.lives.by_request
        rows = order[self.lives.state[order] == State.RUNNING]
        if not len(rows):
            return np.zeros(len(waits), dtype=np.int64)
        key = stretches.request[rows] * np.int64(len(timeline))
        key += stretches.first[rows]
        before = running_total(ledger.own_work()[rows])

        def until(request: Ints, times: Ints) -> Floats:
            """Own work of a request up to a time, and of all requests with lower codes."""
            places = timeline.locate(times)
            begun = np.searchsorted(key, request * np.int64(len(timeline)) + places.position, side="right")
            total = before[begun]
            # In the last row that has begun, if it is the request's and not over, only part of the work is done.
            some = np.flatnonzero(begun > 0)
            row = rows[begun[some] - 1]
            runs = (stretches.request[row] == request[some]) & (places.position[some] <= stretches.last[row])
            some, row = some[runs], row[runs]
            since, now = Places(stretches.first[row], np.zeros(len(some))), places.take(some)
            own = ledger.own_cost_between(row, since, now) + ledger.fixed(since, now)
            total[some] = before[begun[some] - 1] + own
            return total

        request, begin, end = (waits[name].to_numpy() for name in ("request", "begin", "end"))
        at_arrival = before[np.searchsorted(key, np.arange(len(self.lives.arrival)) * np.int64(len(timeline)))]
        work = np.empty(len(waits), dtype=np.int64)
        for low in range(0, len(waits), CHUNK):
            some = slice(low, low + CHUNK)
            own = until(request[some], end[some]) - at_arrival[request[some]]
            late = np.flatnonzero(begin[some] > self.lives.arrival[request[some]])
            own[late] -= until(request[some][late], begin[some][late]) - at_arrival[request[some][late]]
            work[some] = np.rint(np.maximum(own, 0.0))
        return work

    def _parts(self, pieces: _Pieces, group_of_request: Ints) -> pd.DataFrame:
        """Unrounded parts of each piece, long form: piece, holder, mechanism, ns."""
        ledger, timeline = self.ledger, self.ledger.timeline
        begin, end, state, stretch, taker = pieces.begin, pieces.end, pieces.state, pieces.stretch, pieces.taker
        from_place, to_place = timeline.locate(begin), timeline.locate(end)
        out = _Parts()

        every = np.arange(len(begin))
        seen = every[state != State.UNSEEN]
        unseen = every[state == State.UNSEEN]
        out.add(unseen, Party.UNSEEN, Mechanism.UNOBSERVED, (end - begin)[unseen].astype(np.float64))
        low, high, low_place, high_place = begin[seen], end[seen], from_place.take(seen), to_place.take(seen)
        fixed = ledger.fixed(low_place, high_place)
        marginal = at(ledger.marginal, high_place) - at(ledger.marginal, low_place)
        unknown = ledger.unknown.between(low, high)
        unexplained = np.maximum(timeline.slices.between(low, high) - unknown - fixed - marginal, 0.0)
        out.add(seen, Party.ENGINE, Mechanism.HOST_GAP, timeline.host_gap(low, high).astype(np.float64))
        unobserved = timeline.unobserved.between(low, high) + unknown
        out.add(seen, Party.UNSEEN, Mechanism.UNOBSERVED, unobserved.astype(np.float64))
        # The engine was idle although the request had arrived: it was not in the engine's queue yet.
        out.add(seen, Party.FRONTEND, Mechanism.INTAKE, timeline.idle.between(low, high).astype(np.float64))

        condition = np.isin(state[seen], [int(s) for s in _OWN_CONDITION])
        for own_state, mechanism in _OWN_CONDITION.items():
            mine = state[seen] == own_state
            out.add(seen[mine], Party.OWN, mechanism, (fixed + marginal + unexplained)[mine])
        runs = np.isin(state[seen], (State.RUNNING, State.RECOMPUTE))
        out.add(seen[~condition], Party.ENGINE, Mechanism.UNEXPLAINED, unexplained[~condition])
        still = ~runs & ~condition
        out.add(seen[still], Party.ENGINE, Mechanism.STEP_FIXED, fixed[still])

        running = seen[runs]
        own = ledger.own_cost_between(stretch[running], from_place.take(running), to_place.take(running))
        own = np.minimum(own, marginal[runs])
        redo = state[running] == State.RECOMPUTE
        # Work done a second time is charged to who took the blocks; to nobody seen where that was lost.
        taken_by = np.append(group_of_request, int(Party.UNSEEN))[taker]
        out.add_each(running[redo], taken_by[running[redo]], Mechanism.RECOMPUTE, (own + fixed[runs])[redo])
        out.add(running[~redo], Party.OWN, Mechanism.OWN_WORK, (own + fixed[runs])[~redo])
        lost = state[seen] == State.PREEMPTED
        out.add_each(seen[lost], taken_by[seen[lost]], Mechanism.PREEMPTION, marginal[lost])

        own_of = np.zeros(len(begin))
        own_of[running] = own
        self._add_shared(out, pieces, (from_place, to_place), group_of_request, own_of)
        return out.frame()

    def _add_shared(
        self, out: _Parts, pieces: _Pieces, places: tuple[Places, Places], group_of_request: Ints, own_of: Floats
    ) -> None:
        """Adds what each holder pays of the pieces that are shared out; ``own_of``: a running piece's own cost."""
        state = pieces.state
        rows_of = {shared: rows for shared in _SHARED if len(rows := np.flatnonzero(state == shared))}
        if not rows_of:
            return
        some = np.concatenate(list(rows_of.values()))
        spans = Intervals(places[0].position[some], places[1].position[some] + 1).merged()
        holders = Holders(self.ledger, self.lives, spans, group_of_request)
        begin, end = (holders.places(each) for each in places)
        own_group = group_of_request[pieces.request]
        own_prefills = np.append(self.ledger.stretches.prefill, False)[pieces.stretch]
        for group in holders.groups():
            for shared_state, rows in rows_of.items():
                for held, mechanism in _SHARED[shared_state]:
                    amount = held(holders, group).between(begin.take(rows), end.take(rows))
                    if shared_state in (State.RUNNING, State.RECOMPUTE):
                        mine = (own_group[rows] == group) & (own_prefills[rows] == (held is Holders.prefill))
                        amount = np.where(mine, amount - own_of[rows], amount)
                    out.add(rows, group, mechanism, amount)
        # Where nobody is known to stand at the head.
        if State.HEAD in rows_of:
            behind = rows_of[State.HEAD]
            nobodys = holders.head(-1).between(begin.take(behind), end.take(behind))
            out.add(behind, Party.UNSEEN, Mechanism.UNOBSERVED, nobodys)


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
