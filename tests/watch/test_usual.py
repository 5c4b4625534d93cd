"""What is usual is learned from what was, and a stall is far beyond it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.diagnosis.incidents import NOTICEABLE_NS
from stallscope.watch.usual import BINS, FEWEST_BINS, NEVER, Losses, Usual

MS, S = 10**6, 10**9


def learned(delays_ms: list[float], kind: int = 0) -> Usual:
    """One delay a second."""
    usual = Usual()
    for second, delay in enumerate(delays_ms, 1):
        usual.learn(np.array([kind]), np.array([second * S]), np.array([delay * MS]))
    usual.settle()
    return usual


def bar_of(usual: Usual, kind: int = 0, own_ms: float = 0.0) -> float:
    return float(usual.bars(np.array([kind]), np.array([own_ms * MS]))[0])


@given(st.lists(st.floats(1, 1e5), max_size=FEWEST_BINS - 1), st.integers(0, 9), st.floats(0, 1e4))
def test_before_enough_is_known_only_what_is_too_long_in_any_case_is_unusual(
    delays: list[float], kind: int, own_ms: float
) -> None:
    usual = learned(delays, kind)
    for one in (kind, kind + 1):  # the other never came
        assert bar_of(usual, one, own_ms) == pytest.approx(max(1_000, 10 * own_ms) * MS)


@given(st.lists(st.floats(1, 50), min_size=FEWEST_BINS + 1, max_size=2 * BINS))
def test_the_bar_is_above_the_median_and_never_below_what_is_noticed(delays: list[float]) -> None:
    usual = learned(delays)
    median = float(usual.medians(np.array([0]))[0])
    assert NEVER > bar_of(usual) >= max(NOTICEABLE_NS, median)


def test_a_short_stall_does_not_become_usual_and_a_lasting_one_does() -> None:
    calm = learned([20.0] * 200)
    assert bar_of(learned([20.0] * 200 + [5_000.0] * 30)) < 2 * bar_of(calm)
    assert bar_of(learned([20.0] * 200 + [5_000.0] * 2 * BINS)) > 5_000 * MS


def test_the_worst_of_a_second_counts_in_whatever_order_waits_are_told() -> None:
    one, other = Usual(), Usual()
    time, delay = np.arange(400) // 4 * S + S, np.array([10.0, 40.0, 20.0, 30.0] * 100) * MS
    one.learn(np.zeros(400, dtype=np.int64), time, delay)
    for second in range(100):
        rows = np.arange(4 * second, 4 * second + 4)[::-1]
        other.learn(np.zeros(4, dtype=np.int64), time[rows], delay[rows])
    one.settle()
    other.settle()
    assert bar_of(one) == pytest.approx(bar_of(other))
    assert one.medians(np.array([0]))[0] == pytest.approx(40 * MS)


def test_what_a_busy_engine_loses_now_and_then_is_no_stall_and_far_more_is() -> None:
    losses = Losses()
    for number in range(40):
        losses.add(0.4 if number % 5 == 0 else 0.0)
        assert not losses.is_unusual
        losses.learn()
    losses.add(30.0)
    assert losses.is_unusual
    losses.add(0.0)
    assert not losses.is_over, "two windows are looked at"
    losses.add(0.0)
    assert losses.is_over
