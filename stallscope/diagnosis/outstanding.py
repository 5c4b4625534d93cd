"""Whether an incident stands out of its trace: are its percentiles beyond what the trace has at other times?

Where nobody did anything, that is all there is to tell an overload from a busy engine's usual ups and downs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from stallscope.diagnosis.case import Case
from stallscope.diagnosis.incidents import LEADS_UP_NS
from stallscope.diagnosis.metrics import ITL, TTFT
from stallscope.diagnosis.replay.harm import FEWEST_REQUESTS, LEAST_CHANGE_S, WINDOWS_NS
from stallscope.diagnosis.timeline import Floats, Ints

QUANTILE = 0.9
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
        found = list(_compared(case, apart))
        if found:
            return any(found)
    return True


def _compared(case: Case, apart: Sequence[tuple[int, int]]) -> Iterator[bool]:
    """For each tenant, metric and length of window that can be compared with the time outside of ``apart`` (ns):
    whether the incident's is far above it."""
    table, window = case.waits.table, case.window
    for tenant in range(len(case.replica.tenants)):
        for metric in (TTFT, ITL):
            begin, wait = _by_request(table[(table["tenant"] == tenant) & (table["metric"] == metric)])
            for length in WINDOWS_NS:
                start, height = _percentiles(begin, wait, length)
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


def _by_request(waits: pd.DataFrame) -> tuple[Ints, Floats]:
    """When each request's longest wait began, and its delay (ns), by time."""
    longest = waits.sort_values("delay").drop_duplicates("request", keep="last").sort_values("begin")
    return longest["begin"].to_numpy(np.int64), longest["delay"].to_numpy(np.float64)


def _percentiles(begin: Ints, wait: Floats, length: int) -> tuple[Ints, Floats]:
    """p90 of the waits that began in each window of this length, where there are enough."""
    if not len(begin):
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    starts = np.arange(begin[0], begin[-1] + 1, length // 4)
    first, end = np.searchsorted(begin, starts), np.searchsorted(begin, starts + length)
    enough = end - first >= FEWEST_REQUESTS
    values = [float(np.quantile(wait[a:b], QUANTILE)) for a, b in zip(first[enough], end[enough], strict=True)]
    return starts[enough], np.array(values)
