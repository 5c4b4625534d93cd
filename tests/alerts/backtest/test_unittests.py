"""What promtool is given is what the scraper saw: each value to the last bit, each name to the last character."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallscope.alerts.backtest.promtool import Surprise, run_tests
from stallscope.alerts.backtest.timeline import Timeline, grid_of
from stallscope.alerts.backtest.unittests import Expectation, document, number, unit_test
from stallscope.alerts.promtool import RULES
from stallscope.errors import InconclusiveError
from stallscope.watch.samples import Samples, Series
from tests.alerts.backtest.stories import needs_promtool, ns, timeline

NO_RULES = "groups: []\n"
HOSTILE = [
    'a"b',
    "back\\slash",
    "{{ $labels.tenant }}",
    "a\nb\r\t\0\x7f\x85\u2028\ufeff",
    '}, {x="y"} 1E+00',
    "🦙" * 300,
    "it's",
    "%s%d",
    " ",
    "é\u0301",
    "\U000e0001\ue000",
]


def asked(
    made: Timeline, expression: str, expected: dict[int, list[tuple[Series, float]]] | None = None
) -> list[Surprise]:
    """What promtool gives for an expression in each evaluation, where that is something other than expected."""
    grid = grid_of(made, 10)
    expectations = [
        Expectation(
            expression,
            at * 10_000,
            [((*labels, ("__name__", name)), value) for (name, labels), value in (expected or {}).get(at, [])],
        )
        for at in range(grid.evaluations)
    ]
    lines = document([RULES], 10_000, unit_test(made, grid, list(made.samples.values), expectations))
    return run_tests(NO_RULES, lines, "rules")


def two_scrapes(values: dict[Series, list[float]]) -> Timeline:
    times = np.array([ns(10 * at) for at in range(max(map(len, values.values())))], dtype=np.int64)
    return Timeline("made", Samples(times, {series: np.array(row) for series, row in values.items()}), ())


@needs_promtool
@settings(max_examples=15)
@given(st.lists(st.floats(allow_nan=False), min_size=30, max_size=200))
def test_each_value_arrives_to_the_last_bit(values: list[float]) -> None:
    series = {("m", (("n", str(at)),)): [value, 1.0] for at, value in enumerate(values)}
    (first, _) = asked(two_scrapes(series), "m")
    got = {int(dict(labels)["n"]): value for labels, value in first.got}
    assert [struct.pack("d", got[at] + 0.0) for at in range(len(values))] == [
        struct.pack("d", value + 0.0) for value in values
    ]


@needs_promtool
@settings(max_examples=15)
@given(st.sets(st.text(max_size=40), min_size=20, max_size=60))
def test_each_name_arrives_to_the_last_character_and_comes_back(names: set[str]) -> None:
    chosen = sorted({*names, *HOSTILE} - {""})
    series: dict[Series, list[float]] = {("m", (("tenant", name),)): [float(at), 0.0] for at, name in enumerate(chosen)}
    made = two_scrapes(series)
    (first, _) = asked(made, "m")
    got = {int(value): dict(labels)["tenant"] for labels, value in first.got}
    assert [got[at] for at in range(len(chosen))] == chosen
    right: dict[int, list[tuple[Series, float]]] = {
        1: [(one, values[0]) for one, values in series.items()],
        2: [(one, values[1]) for one, values in series.items()],
    }
    assert asked(made, "m", right) == []


@given(st.floats(allow_nan=False))
def test_a_number_is_written_exactly(value: float) -> None:
    assert float(number(value)) == value


@needs_promtool
def test_an_evaluation_sees_the_scrape_before_it_and_none_where_the_series_went_away() -> None:
    nan = math.nan
    made = two_scrapes({("m", ()): [nan, 1.0, nan, nan, 4.0, 5.0]})
    got = {one.elapsed_ms // 1000: [value for _, value in one.got] for one in asked(made, "m")}
    assert got == {20: [1.0], 50: [4.0], 60: [5.0]}


@needs_promtool
def test_a_scrape_that_failed_leaves_the_last_value_for_a_while() -> None:
    whole = timeline(100)
    kept = [at for at in range(len(whole.samples.times_ns)) if at not in (4, 5)]
    samples = Samples(whole.samples.times_ns[kept], {one: row[kept] for one, row in whole.samples.values.items()})
    got = asked(Timeline("gap", samples, ()), "count(stallscope_blame_seconds_total)")
    assert [one.elapsed_ms // 1000 for one in got] == list(range(10, 111, 10))


@needs_promtool
def test_a_time_as_a_value_is_as_long_ago_as_it_was() -> None:
    last_seen = [(ns(0) / 1e9) - 3, (ns(0) / 1e9) - 3]
    got = asked(two_scrapes({("stallscope_last_span_timestamp_seconds", ()): last_seen}), "time() - {__name__=~'.+'}")
    ages = [value for one in got for _, value in one.got]
    assert ages == pytest.approx([8, 18], abs=1e-5)  # evaluated 5 s after the scrape


def test_more_samples_than_promtool_is_given_are_refused_with_a_way_out() -> None:
    made = timeline(100)
    grid = grid_of(made, 10)
    many: list[Series] = list(made.samples.values) * 2_000_000
    with pytest.raises(InconclusiveError, match=r"22,000,000 samples of 2,000,000 series, .* give a shorter trace"):
        list(unit_test(made, grid, many, ()))


@pytest.mark.parametrize(("length_s", "says"), [(0, "1 scrapes; rules need at least 2")])
def test_a_trace_too_short_for_two_scrapes_is_inconclusive(length_s: float, says: str) -> None:
    with pytest.raises(InconclusiveError, match=says):
        grid_of(timeline(length_s), 10)


def test_scrapes_at_no_interval_are_inconclusive() -> None:
    samples = Samples(np.array([0, 10, 10, 20], dtype=np.int64) * 10**9, {})
    with pytest.raises(InconclusiveError, match="not at one interval"):
        grid_of(Timeline("odd", samples, ()), 10)
