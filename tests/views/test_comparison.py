"""Comparisons: a real difference is found, chance is not taken for one, and what can't be compared is said."""

from __future__ import annotations

from functools import cache

import pytest

from stallscope.diagnosis import Diagnosis, diagnose
from stallscope.trace import Trace
from stallscope.views.comparison import FEWEST, Comparison, Outcome, compare
from stallscope_engine.config import EngineConfig
from tests.trace.recording import Arrival, Workload, read, run
from tests.views.recordings import recorded

SECOND = 1_000_000_000


@cache
def healthy(seed: int) -> tuple[Trace, Diagnosis]:
    trace = recorded("healthy", "sample", seed)
    return trace, diagnose(trace)


@cache
def stalled() -> tuple[Trace, Diagnosis]:
    trace = recorded("kv_pinning", "sample", 1000)
    return trace, diagnose(trace)


def outcomes(comparison: Comparison) -> set[Outcome]:
    return {change.outcome for change in comparison.changes}


@pytest.mark.parametrize(("first", "second"), [(1, 2), (3, 4), (2, 2)])
def test_recordings_of_the_same_traffic_differ_by_chance_alone(first: int, second: int) -> None:
    assert outcomes(compare(healthy(first), healthy(second))) == {Outcome.CHANCE}


def test_a_change_of_everything_is_better_one_way_and_worse_the_other() -> None:
    slow = [Arrival(SECOND // 10, 400, 20, f"t{number % 2}") for number in range(120)]
    fast = [Arrival(SECOND // 10, 20, 20, f"t{number % 2}") for number in range(120)]
    before, after = (
        (trace, diagnose(trace))
        for trace in (read(run(Workload(EngineConfig(), side, 50, 10_000)).lines()) for side in (slow, fast))
    )
    better = [change for change in compare(before, after).changes if change.metric == "ttft"]
    worse = [change for change in compare(after, before).changes if change.metric == "ttft"]
    assert {change.outcome for change in better} == {Outcome.BETTER}
    assert {change.outcome for change in worse} == {Outcome.WORSE}
    for change in better:
        ratio = change.after_s / change.before_s
        assert change.ratio_low * (1 - 1e-9) <= ratio <= change.ratio_high * (1 + 1e-9)


def test_the_same_seed_gives_the_same_intervals() -> None:
    assert compare(stalled(), healthy(1), seed=5) == compare(stalled(), healthy(1), seed=5)


def test_a_tenant_with_few_requests_on_a_side_is_named_and_not_compared() -> None:
    found = compare(stalled(), healthy(1))
    assert "archive" in found.not_compared
    assert {change.tenant for change in found.changes}.isdisjoint(found.not_compared)
    assert all(min(change.before_requests, change.after_requests) >= FEWEST for change in found.changes)


def test_loads_that_differ_are_said_the_largest_first() -> None:
    loads = compare(stalled(), healthy(1)).loads
    assert loads[0].tenant == "archive"
    assert loads[0].after == 0.0
    assert compare(healthy(1), healthy(1)).loads == ()


def test_incidents_of_both_sides_are_counted() -> None:
    found = compare(stalled(), healthy(1))
    assert found.before.incidents == len(stalled()[1].incidents) > 0
    assert found.before.lost_s == pytest.approx(sum(incident.lost_s for incident in stalled()[1].incidents))
