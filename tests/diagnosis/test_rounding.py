"""Rounding by largest remainder: the parts of a stretch sum to its length, to the nanosecond."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stallscope.diagnosis.rounding import round_to_sum


@given(
    st.lists(
        st.lists(st.floats(0.01, 1e12), min_size=1, max_size=6),
        min_size=1,
        max_size=20,
    )
)
def test_parts_sum_exactly_and_stay_within_one_of_their_share(groups: list[list[float]]) -> None:
    group = np.repeat(np.arange(len(groups)), [len(parts) for parts in groups])
    amount = np.concatenate([np.array(parts) for parts in groups])
    total = np.array([round(sum(parts)) for parts in groups], dtype=np.int64)
    rounded = round_to_sum(group, amount, total)
    assert (np.bincount(group, rounded, len(total)).astype(np.int64) == total).all()
    assert (rounded >= 0).all()
    exact = amount * (total / np.bincount(group, amount))[group]
    assert (np.abs(rounded - exact) <= 1 + 1e-9 * exact).all()


def test_the_largest_remainder_gets_the_missing_unit() -> None:
    rounded = round_to_sum(np.array([0, 0, 0]), np.array([1.2, 1.7, 1.1]), np.array([4]))
    assert rounded.tolist() == [1, 2, 1]
