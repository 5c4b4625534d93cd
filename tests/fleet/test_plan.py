"""The plan: portions of all time, with enough requests each, and no more files than each needs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.diagnosis.portion import AFTER_NS, BEFORE_NS, EVER
from stallscope.fleet import plan as planning
from stallscope.fleet.plan import Task, plan, span
from stallscope.trace import Trace, read_trace
from stallscope.trace.select import span as span_of_steps
from stallscope.trace.stored import Part, StoredTables

HOUR_NS = 3_600_000_000_000
MOST_STEPS_AN_HOUR = 400_000
START_NS = 1_767_225_600_000_000_000  # 2026-01-01T00Z


def stored(hours: list[tuple[int, int]], replica: str = "r0") -> Trace:
    """A dataset's list of parts: requests and steps of each hour."""
    parts, first = [], 0
    for hour, (requests, steps) in enumerate(hours):
        begin = START_NS + hour * HOUR_NS
        rows = {"requests": requests, "steps": steps}
        parts.append(Part(replica, f"2026-01-01T{hour:02}", 0, begin, begin + HOUR_NS - 1, first, rows))
        first += requests
    return Trace(StoredTables(Path("dataset"), parts), "dataset")


def hours_of(tasks: list[Task]) -> list[int]:
    """How many hours each portion has."""
    edges = [START_NS, *(task.portion.start for task in tasks[1:]), START_NS + 24 * HOUR_NS]
    return [(high - low) // HOUR_NS for low, high in pairwise(edges)]


@given(st.lists(st.tuples(st.integers(1, 60_000), st.integers(1, MOST_STEPS_AN_HOUR)), min_size=1, max_size=24))
def test_portions_are_all_time_and_have_enough_requests(hours: list[tuple[int, int]]) -> None:
    tasks = plan(stored(hours))
    starts = START_NS + np.arange(len(hours)) * HOUR_NS
    # Only where hours have too many steps to be taken together may a portion have too few requests.
    dense = (
        sum(requests for requests, _ in hours) >= planning.ENOUGH_REQUESTS
        and sum(steps for _, steps in hours) <= planning.MOST_STEPS
    )
    assert (tasks[0].portion.start, tasks[-1].portion.end) == (-EVER, EVER)
    assert all(one.portion.end == next_one.portion.start for one, next_one in pairwise(tasks))
    for task in tasks:
        inside = [
            hours[number] for number in range(len(hours)) if task.portion.holds(starts[number : number + 1]).all()
        ]
        requests, steps = (sum(each) for each in zip(*inside, strict=True))
        assert steps <= planning.MOST_STEPS or len(inside) == 1
        assert requests >= planning.ENOUGH_REQUESTS or steps > planning.MOST_STEPS - MOST_STEPS_AN_HOUR or not dense


def test_sparse_hours_are_taken_together_and_a_day_of_a_million_requests_by_the_hour() -> None:
    assert hours_of(plan(stored([(3_000, 50_000)] * 24))) == [7, 7, 10]
    assert hours_of(plan(stored([(42_000, 180_000)] * 24))) == [1] * 24
    assert len(plan(stored([(10, 500)] * 24))) == 1


def test_a_portion_reads_only_what_its_margins_reach() -> None:
    tasks = plan(stored([(42_000, 180_000)] * 24))
    assert [len(task.parts) for task in tasks] == [2, *[3] * 22, 2]
    assert tasks[0].view == (None, START_NS + HOUR_NS + AFTER_NS)
    assert tasks[1].name == "r0 from 2026-01-01T01:00Z to 2026-01-01T02:00Z"


def test_of_what_was_asked_for_nothing_else_is_seen() -> None:
    low, high = START_NS + HOUR_NS // 2, START_NS + 3 * HOUR_NS
    tasks = plan(stored([(42_000, 180_000)] * 24), low, high)
    assert [(task.view[0], task.view[1]) for task in (tasks[0], tasks[-1])] == [
        (low, START_NS + HOUR_NS + AFTER_NS),
        (START_NS + 2 * HOUR_NS - BEFORE_NS, high),
    ]
    assert sum(task.counted.end - task.counted.start for task in tasks) == high - low


def test_what_is_not_stored_has_no_portions(dataset: Path) -> None:
    read = read_trace(dataset)
    with pytest.raises(ValueError, match="is not a dataset"):
        plan(Trace(dict(read.tables), "made up"))


def test_a_dataset_spans_its_steps(dataset: Path) -> None:
    trace = read_trace(dataset)
    first, last = span_of_steps(trace)
    low, high = span(trace)
    assert low <= first < last <= high
