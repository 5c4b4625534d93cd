"""Where each instant of a request's life went, and to whom: the exact partition and its charges.

A request's life comes cut into segments (``lives``); ``charge`` reads from the ``ledger``, for any stretch of it,
who pays for it and by which mechanism. The parts of a stretch are int ns and sum to its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
import pandas as pd

from stallscope.diagnosis.ledger import Holder, Ledger
from stallscope.diagnosis.lives import Lives, State
from stallscope.diagnosis.rounding import round_to_sum
from stallscope.diagnosis.timeline import Floats, Ints


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
    """One replica's ledger and lives: all that is needed to charge any stretch of them."""

    ledger: Ledger
    lives: Lives

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
        pieces = queries.merge(self.lives.table, on="request", suffixes=("", "_life"))
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
        self._add_shared(out, pieces, group_of_request, own_of)
        return out.frame()

    def _add_shared(self, out: _Parts, pieces: pd.DataFrame, group_of_request: Ints, own_of: Floats) -> None:
        """Adds what each holder pays of the pieces that are shared out; ``own_of``: a running piece's own cost."""
        ledger, timeline = self.ledger, self.ledger.timeline
        begin, end = pieces["begin"].to_numpy(np.int64), pieces["end"].to_numpy(np.int64)
        state = pieces["state"].to_numpy(np.int64)
        stretch = pieces["stretch"].to_numpy(np.int64)
        own_group = group_of_request[pieces["request"].to_numpy(np.int64)]
        own_prefills = np.append(ledger.stretches.prefill, False)[stretch]
        group_of_head = np.append(group_of_request, -1)[self.lives.head]
        rows_of = {shared: np.flatnonzero(state == shared) for shared in _SHARED}

        def over(values: Floats, rows: Ints) -> Floats:
            return timeline.at(values, end[rows]) - timeline.at(values, begin[rows])

        for code, holder in enumerate(self.holders(group_of_request)):
            for shared_state, rules in _SHARED.items():
                rows = rows_of[shared_state]
                if not len(rows):
                    continue
                for resource, mechanism in rules:
                    values = holder.head(group_of_head == code) if resource == "head" else getattr(holder, resource)
                    amount = over(values, rows)
                    if shared_state in (State.RUNNING, State.RECOMPUTE):
                        mine = (own_group[rows] == code) & (own_prefills[rows] == (resource == "prefill"))
                        amount = np.where(mine, amount - own_of[rows], amount)
                    out.add(rows, code, mechanism, amount)
        # Where nobody is known to stand at the head.
        nobodys = ledger.share_of_marginal((group_of_head < 0).astype(np.float64), np.ones(len(group_of_head)))
        behind = rows_of[State.HEAD]
        out.add(behind, Party.UNSEEN, Mechanism.UNOBSERVED, over(nobodys, behind))


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
