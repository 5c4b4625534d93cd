"""Whether an incident stands out of its trace: are its percentiles beyond what the trace has at other times?

Where nobody did anything, that is all there is to tell an overload from a busy engine's usual ups and downs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from stallscope.diagnosis.case import Case
from stallscope.diagnosis.incidents import LEADS_UP_NS
from stallscope.diagnosis.metrics import ITL, METRICS, TTFT
from stallscope.diagnosis.replay.harm import FEWEST_REQUESTS, LEAST_CHANGE_S, WINDOWS_NS
from stallscope.diagnosis.timeline import Floats, Ints

QUANTILE = 0.9
TOGETHER = 256  # windows that are sorted at a time
TIMES_USUAL, TIMES_MOST = 2.0, 1.2  # over the median of other times, and over the worst of them


def stands_out(case: Case) -> bool:
    """Whether a tenant's p90 is higher in the incident than at any other time, by far.

    Other times are those without stalls; where none is long enough, those of the other stalls too. True where nothing
    is left to compare with: then it can't be said to be what the trace is full of.
    """
    mine = (case.window.start, case.window.end)
    # What led up to a stall stalled nobody: it is a time to compare with.
    stalls = [(start + LEADS_UP_NS, end) for start, end in case.loads.windows]
    for apart in ([*stalls, mine], [mine]):
        compared = False
        for far in _compared(case, apart):
            if far:
                return True
            compared = True
        if compared:
            return False
    return True


def _compared(case: Case, apart: Sequence[tuple[int, int]]) -> Iterator[bool]:
    """For each tenant, metric and length of window that can be compared with the time outside of ``apart`` (ns):
    whether the incident's is far above it."""
    window = case.window
    for begin, wait in _by_kind(case.waits.table):
        for length in WINDOWS_NS:
            start, height = percentiles(begin, wait, length)
            inside = (start + length > window.start) & (start < window.end)
            outside = np.ones(len(start), dtype=np.bool_)
            for since, until in apart:
                outside &= (start + length <= since) | (start >= until)
            if inside.any() and outside.any():
                yield _is_far_above(height[inside], height[outside])


def _is_far_above(inside: Floats, outside: Floats) -> bool:
    usual, most = float(np.median(outside)), float(outside.max())
    worst = float(inside.max())
    return worst >= TIMES_USUAL * usual and worst >= usual + LEAST_CHANGE_S * 1e9 and worst >= TIMES_MOST * most


def _by_kind(waits: pd.DataFrame) -> Iterator[tuple[Ints, Floats]]:
    """Of each tenant and metric, when each request's longest wait began, and its delay (ns), by time."""
    rows = np.flatnonzero((waits["metric"] == TTFT) | (waits["metric"] == ITL))
    metric, request, tenant, begin, delay = (
        waits[name].to_numpy()[rows] for name in ("metric", "request", "tenant", "begin", "delay")
    )
    order = np.lexsort((delay, request, metric))
    last = np.append((np.diff(request[order]) != 0) | (np.diff(metric[order]) != 0), True)
    longest = order[last[-len(order) :]]
    kind = tenant[longest] * np.int64(len(METRICS)) + metric[longest]
    ordered = np.lexsort((begin[longest], kind))
    longest, kind = longest[ordered], kind[ordered]
    for each in np.split(longest, np.flatnonzero(np.diff(kind)) + 1):
        yield begin[each].astype(np.int64), delay[each].astype(np.float64)


def percentiles(begin: Ints, wait: Floats, length: int) -> tuple[Ints, Floats]:
    """When each window of this length starts (ns) that has enough waits, and the p90 of those that began in it.

    ``begin``: of the waits, ascending; as NumPy's quantiles are, linear between two of them.
    """
    if not len(begin):
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    starts = np.arange(begin[0], begin[-1] + 1, length // 4)
    first, end = np.searchsorted(begin, starts), np.searchsorted(begin, starts + length)
    enough = end - first >= FEWEST_REQUESTS
    first, count = first[enough], (end - first)[enough]
    heights = np.zeros(len(first))
    by_count = np.argsort(count, kind="stable")  # windows of like numbers are sorted together
    for low in range(0, len(by_count), TOGETHER):
        some = by_count[low : low + TOGETHER]
        place = np.arange(count[some[-1]])
        inside = place < count[some][:, None]
        values = np.where(inside, wait[np.minimum(first[some][:, None] + place, len(wait) - 1)], np.inf)
        values.sort(axis=1)
        rank = QUANTILE * (count[some] - 1)
        below = rank.astype(np.int64)
        lower, upper = (values[np.arange(len(some)), np.minimum(at, count[some] - 1)] for at in (below, below + 1))
        heights[some] = lower + (upper - lower) * (rank - below)
    return starts[enough], heights
