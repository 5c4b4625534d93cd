"""What an incident stands out of: percentiles of windows, as NumPy has them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.diagnosis.outstanding import QUANTILE, TOGETHER, percentiles
from stallscope.diagnosis.replay.harm import FEWEST_REQUESTS

LENGTH = 1_000_000


@given(st.integers(0, 2**32), st.integers(0, 400))
def test_each_window_has_the_percentile_of_its_waits(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    begin = np.sort(rng.integers(0, 10 * LENGTH, count))
    wait = rng.lognormal(15, 2, count)
    starts, heights = percentiles(begin, wait, LENGTH)
    expected = {}
    for start in range(int(begin[0]), int(begin[-1]) + 1, LENGTH // 4) if count else ():
        inside = wait[(begin >= start) & (begin < start + LENGTH)]
        if len(inside) >= FEWEST_REQUESTS:
            expected[start] = np.quantile(inside, QUANTILE)
    assert starts.tolist() == list(expected)
    assert heights.tolist() == pytest.approx(list(expected.values()), rel=1e-12)


def test_of_more_windows_than_are_sorted_together_none_is_missing() -> None:
    begin = np.arange(0, TOGETHER * LENGTH, LENGTH // 40)
    starts, heights = percentiles(begin, np.arange(len(begin), dtype=np.float64), LENGTH)
    assert len(starts) > 2 * TOGETHER
    assert (np.diff(heights) > 0).all()
