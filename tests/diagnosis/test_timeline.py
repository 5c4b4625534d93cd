"""The cut of a replica's time into slices, gaps, idle and unobserved stretches."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.diagnosis.timeline import Timeline, at, running_total

EPOCH = 1_800_000_000_000_000_000


@st.composite
def step_tables(draw: st.DrawFn) -> pd.DataFrame:
    """Steps as an engine records them: idle, scheduling, execution; some of them lost, some overlapping."""
    count = draw(st.integers(1, 30))
    parts = st.integers(0, 10_000)
    now, rows = EPOCH, []
    for step in range(count):
        idle = draw(parts)
        scheduled = now + idle
        dispatched = scheduled + draw(parts)
        ready = dispatched + draw(st.integers(1, 10_000))
        rows.append((step, scheduled, dispatched, ready, idle))
        # With asynchronous scheduling the next step is scheduled, even dispatched, before this one is ready.
        now = ready - draw(st.sampled_from([0, 0, 5_000])) if ready - 5_000 > EPOCH else ready
    frame = pd.DataFrame(rows, columns=["step", "scheduled", "dispatched", "ready", "idle_ns"])
    kept = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    frame = frame[np.array(kept) | (frame["step"] == 0)]
    return frame.reset_index(drop=True)


@given(step_tables(), st.data())
def test_every_instant_is_slice_gap_idle_or_unobserved_and_only_one(steps: pd.DataFrame, data: st.DataObject) -> None:
    timeline = Timeline.of_steps(steps)
    first, last = int(timeline.bounds[0]), int(timeline.bounds[-1])
    cuts = np.sort(np.array([first, last, *data.draw(st.lists(st.integers(first, last), max_size=5))]))
    begin, end = cuts[:-1], cuts[1:]
    kinds = [one.between(begin, end) for one in (timeline.slices, timeline.idle, timeline.unobserved)]
    kinds.append(timeline.host_gap(begin, end))
    assert all((kind >= 0).all() for kind in kinds)
    assert sum(kinds).tolist() == (end - begin).tolist()


@given(step_tables(), st.data())
def test_a_running_total_rises_evenly_over_each_slice(steps: pd.DataFrame, data: st.DataObject) -> None:
    timeline = Timeline.of_steps(steps)
    first, last = int(timeline.bounds[0]), int(timeline.bounds[-1])
    times = np.array(data.draw(st.lists(st.integers(first, last), min_size=1, max_size=5)))
    found = at(running_total(timeline.duration.astype(float)), timeline.locate(times))
    assert found == pytest.approx(timeline.slices.before(times))


def test_a_gap_over_lost_steps_is_unobserved_not_the_hosts() -> None:
    steps = pd.DataFrame(
        {"step": [0, 3], "scheduled": [0, 50], "dispatched": [2, 52], "ready": [10, 60], "idle_ns": [0, 0]}
    )
    timeline = Timeline.of_steps(steps + np.array([0, EPOCH, EPOCH, EPOCH, 0]))
    whole = timeline.bounds[:1], timeline.bounds[-1:]
    assert timeline.host_gap(*whole) == 2
    assert timeline.unobserved.between(*whole) == 42


def test_overlapping_steps_have_slices_that_do_not_overlap() -> None:
    steps = pd.DataFrame(
        {"step": [0, 1], "scheduled": [0, 5], "dispatched": [1, 6], "ready": [10, 18], "idle_ns": [0, 0]}
    )
    timeline = Timeline.of_steps(steps)
    assert timeline.start.tolist() == [1, 10]
    assert timeline.duration.tolist() == [9, 8]
