"""What was in the batch around the worst steps: a lane a request, a rectangle for each thing that it was doing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Ints
from stallscope.views.waterfall import doing_of

STEPS_AROUND = 25  # on either side of the worst step
MOST_LANES, MOST_RECTANGLES = 40, 1500


@dataclass(frozen=True)
class Lane:
    """A request that was there."""

    request: str
    tenant: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Rectangle:
    """What the request of lane ``lane`` was doing from ``start_ns`` to ``end_ns``, in so many steps: ``tokens`` were
    computed in them together."""

    lane: int
    start_ns: int
    end_ns: int
    doing: str
    tokens: int
    steps: int


@dataclass(frozen=True, eq=False)
class Swimlanes:
    """Lanes in the order of their arrival, their rectangles, and the slices of the steps (``step_start_ns``,
    ``step_end_ns``).

    ``worst_step`` is the number of the worst, ``marked_lane`` the lane that was asked for. What did not fit is counted
    in ``*_left_out``.
    """

    replica: str
    start_ns: int
    end_ns: int
    worst_step: int
    marked_lane: int | None
    lanes: tuple[Lane, ...]
    rectangles: tuple[Rectangle, ...]
    step_start_ns: Ints
    step_end_ns: Ints
    lanes_left_out: int
    rectangles_left_out: int


def swimlanes(
    replica: Replica, start_ns: int, end_ns: int, most_lanes: int = MOST_LANES, marked: int | None = None
) -> Swimlanes | None:
    """The batches around the worst step between two times; None where no step lies there.

    The worst step is the one in which most time of requests passed: its length times those who ran or waited. The
    request with the code ``marked`` has a lane in any case, where it was there.
    """
    timeline = replica.timeline
    inside = np.flatnonzero((timeline.end > start_ns) & (timeline.start < end_ns))
    if not len(inside):
        return None
    present = (replica.steps["running"] + replica.steps["waiting"]).to_numpy(np.int64)
    worst = int(inside[(timeline.duration * present)[inside].argmax()])
    low, high = max(0, worst - STEPS_AROUND), min(len(timeline) - 1, worst + STEPS_AROUND)
    return _between(replica, low, high, worst, most_lanes, marked)


def _between(replica: Replica, low: int, high: int, worst: int, most_lanes: int, marked: int | None) -> Swimlanes:
    timeline, s = replica.timeline, replica.ledger.stretches
    rows = np.flatnonzero((s.first <= high) & (s.last >= low))
    first, last = np.maximum(s.first[rows], low), np.minimum(s.last[rows], high)
    begin, end = timeline.before[first], timeline.end[last]
    lanes = _lanes(replica, rows, begin, end, most_lanes, marked)
    lane_of = np.full(len(replica.requests), -1, dtype=np.int64)
    lane_of[lanes] = np.arange(len(lanes))
    mine = np.flatnonzero(lane_of[s.request[rows]] >= 0)
    # Where rectangles are too many, the shortest are those that nobody would see.
    shown = np.sort(mine[np.argsort(begin[mine] - end[mine], kind="stable")[:MOST_RECTANGLES]])
    doing = doing_of(replica, rows[shown])
    columns = (lane_of[s.request[rows[shown]]], begin[shown], end[shown], s.tokens[rows[shown]], (last - first)[shown])
    facts = [replica.facts(int(code)) for code in lanes]
    return Swimlanes(
        replica.name,
        int(timeline.before[low]),
        int(timeline.end[high]),
        int(timeline.step[worst]),
        int(np.searchsorted(lanes, marked)) if marked is not None and marked in lanes else None,
        tuple(Lane(one.request, replica.tenants[one.tenant], one.prompt_tokens, one.output_tokens) for one in facts),
        tuple(
            Rectangle(int(lane), int(start), int(stop), what, int(tokens * (steps + 1)), int(steps + 1))
            for lane, start, stop, tokens, steps, what in zip(*columns, doing, strict=True)
        ),
        timeline.start[low : high + 1],
        timeline.end[low : high + 1],
        len(np.unique(s.request[rows])) - len(lanes),
        len(mine) - len(shown),
    )


def _lanes(replica: Replica, rows: Ints, begin: Ints, end: Ints, most: int, marked: int | None) -> Ints:
    """Codes of the requests to show, by arrival: the marked one, then half of them those that cost the steps most, then
    who was there longest."""
    s = replica.ledger.stretches
    cost = replica.ledger.own_cost(rows, np.maximum(begin, replica.timeline.start[s.first[rows]]), end)
    request = s.request[rows]
    spent = np.bincount(request, cost, len(replica.requests))
    stay = np.bincount(request, (end - begin).astype(np.float64), len(replica.requests))
    present = np.unique(request)
    if marked is not None:
        spent[marked] = np.inf
    by_cost = present[np.argsort(-spent[present], kind="stable")][: max(most // 2, 1)]
    others = np.setdiff1d(present, by_cost)
    by_stay = others[np.argsort(-stay[others], kind="stable")][: most - len(by_cost)]
    return np.sort(np.concatenate([by_cost, by_stay]))
