"""Sketches: the same whoever is merged first, exact while there are few numbers, close where there are many."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stallscope.diagnosis import sketch
from stallscope.diagnosis.sketch import Sketch

numbers = st.lists(st.integers(0, 10**13), max_size=12)
shares = st.floats(0, 1)


def as_plain(one: Sketch) -> tuple[list[int], list[int], list[int]]:
    return one.few.tolist(), one.bins.tolist(), one.counts.tolist()


def of(values: list[int]) -> Sketch:
    return Sketch.of(np.array(values, dtype=np.int64))


@given(numbers, numbers, st.integers(0, 16))
def test_the_sketch_of_two_parts_is_the_sketch_of_the_whole(one: list[int], other: list[int], exact: int) -> None:
    known = sketch.EXACT
    sketch.EXACT = exact
    try:
        assert as_plain(of(one).merged(of(other))) == as_plain(of(one + other))
        assert as_plain(of(other).merged(of(one))) == as_plain(of(one + other))
    finally:
        sketch.EXACT = known


@given(numbers.filter(bool), shares)
def test_of_few_numbers_a_quantile_is_one_of_them(values: list[int], share: float) -> None:
    assert of(values).quantile(share) == np.quantile(np.array(values), share, method="higher")


@given(st.integers(0, 2**32), shares)
def test_of_many_numbers_it_is_within_half_a_percent(seed: int, share: float) -> None:
    values = np.random.default_rng(seed).lognormal(18, 2, sketch.EXACT + 1).astype(np.int64)
    exact = np.quantile(values, share, method="higher")
    assert abs(Sketch.of(values).quantile(share) / exact - 1) <= 0.0051
