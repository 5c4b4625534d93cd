"""Whether an incident stands out of its trace: are its percentiles beyond what the trace has at other times?

Where nobody did anything, that is all there is to tell an overload from a busy engine's usual ups and downs.
"""

from __future__ import annotations

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

    True, too, where there is no other time to compare it with: it can't be said to be what the trace is full of.
    """
    table, window = case.waits.table, case.window
    # What led up to a stall stalled nobody: it is a time to compare with.
    stalls = [(start + LEADS_UP_NS, end) for start, end in case.loads.windows]
    compared = False
    for tenant in range(len(case.replica.tenants)):
        for metric in (TTFT, ITL):
            mine = table[(table["tenant"] == tenant) & (table["metric"] == metric)]
            begin, wait = _by_request(mine)
            for length in WINDOWS_NS:
                start, height = _percentiles(begin, wait, length)
                inside = (start + length > window.start) & (start < window.end)
                outside = np.ones(len(start), dtype=np.bool_)
                for since, until in [*stalls, (window.start, window.end)]:
                    outside &= (start + length <= since) | (start >= until)
                if not inside.any() or not outside.any():
                    continue
                compared = True
                if _is_far_above(height[inside], height[outside]):
                    return True
    return not compared


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
