"""Shares to whole nanoseconds that add up: rounding by largest remainder."""

from __future__ import annotations

import numpy as np

from stallscope.diagnosis.timeline import Floats, Ints


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
