"""The cut of a replica's time into slices, gaps, idle and unobserved stretches."""

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from stallscope.diagnosis.timeline import Timeline

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


@given(step_tables())
def test_every_instant_is_slice_gap_idle_or_unobserved_and_only_one(steps: pd.DataFrame) -> None:
    timeline = Timeline.of_steps(steps)
    slices = timeline.over_slices(timeline.duration.astype(float))
    idle = float((timeline.idle_end - timeline.idle_start).sum())
    spent = slices[-1] + timeline.host_gap[-1] + timeline.unobserved[-1]
    # Idle before a step whose predecessor is missing lies in the unobserved gap, and is counted once, as idle.
    assert spent + idle == timeline.end[-1] - timeline.before[0]
    assert (np.diff(timeline.knots) >= 0).all()


@given(step_tables(), st.data())
def test_cumulative_functions_add_up_over_any_cut(steps: pd.DataFrame, data: st.DataObject) -> None:
    timeline = Timeline.of_steps(steps)
    low, high = int(timeline.before[0]), int(timeline.end[-1])
    cuts = np.sort(np.array([low, high, *data.draw(st.lists(st.integers(low, high), max_size=5))]))
    for values in (timeline.host_gap, timeline.unobserved, timeline.over_slices(timeline.duration.astype(float))):
        parts = np.diff(timeline.at(values, cuts))
        assert (parts >= 0).all()
        assert np.isclose(parts.sum(), values[-1])


def test_a_gap_over_lost_steps_is_unobserved_not_the_hosts() -> None:
    steps = pd.DataFrame(
        {"step": [0, 3], "scheduled": [0, 50], "dispatched": [2, 52], "ready": [10, 60], "idle_ns": [0, 0]}
    )
    timeline = Timeline.of_steps(steps + np.array([0, EPOCH, EPOCH, EPOCH, 0]))
    assert timeline.host_gap[-1] == 2
    assert timeline.unobserved[-1] == 42


def test_overlapping_steps_have_slices_that_do_not_overlap() -> None:
    steps = pd.DataFrame(
        {"step": [0, 1], "scheduled": [0, 5], "dispatched": [1, 6], "ready": [10, 18], "idle_ns": [0, 0]}
    )
    timeline = Timeline.of_steps(steps)
    assert timeline.start.tolist() == [1, 10]
    assert timeline.duration.tolist() == [9, 8]
