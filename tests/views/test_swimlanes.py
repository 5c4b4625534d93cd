"""Swimlanes: a lane's rectangles never overlap, their number is bounded, and the culprit's work is among them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from stallscope.views.swimlanes import STEPS_AROUND, Swimlanes, swimlanes
from tests.views.recordings import diagnosed, replica


def worst(scenario: str, most_lanes: int = 40) -> Swimlanes:
    incident = diagnosed(scenario).incidents[0]
    found = swimlanes(replica(scenario), incident.start_ns, incident.end_ns, most_lanes)
    assert found is not None
    return found


@pytest.mark.parametrize("scenario", ["kv_pinning", "reasoning_prompt"])
def test_rectangles_of_a_lane_lie_in_the_window_and_never_overlap(scenario: str) -> None:
    view = worst(scenario)
    for lane in range(len(view.lanes)):
        mine = sorted((one.start_ns, one.end_ns) for one in view.rectangles if one.lane == lane)
        assert mine
        assert all(view.start_ns <= start < end <= view.end_ns for start, end in mine)
        assert all(end <= start for (_, end), (start, _) in pairwise(mine))


def test_the_huge_prompt_is_among_the_lanes_with_its_prefill() -> None:
    view = worst("reasoning_prompt")
    lane = next(position for position, one in enumerate(view.lanes) if one.prompt_tokens == 15_000)
    doing = {one.doing for one in view.rectangles if one.lane == lane}
    assert view.lanes[lane].tenant == "reasoner"
    assert doing & {"prefill", "decoding"}


def test_lanes_are_bounded_and_those_left_out_are_counted() -> None:
    few, all_of_them = worst("kv_pinning", most_lanes=4), worst("kv_pinning", most_lanes=10_000)
    assert len(few.lanes) == 4
    assert few.lanes_left_out == len(all_of_them.lanes) - 4
    assert all_of_them.lanes_left_out == 0
    assert "archive" in {lane.tenant for lane in few.lanes}


def test_the_worst_step_is_that_in_which_most_time_of_requests_passed() -> None:
    view, r = worst("reasoning_prompt"), replica("reasoning_prompt")
    incident = diagnosed("reasoning_prompt").incidents[0]
    present = (r.steps["running"] + r.steps["waiting"]).to_numpy(np.int64)
    inside = (r.timeline.end > incident.start_ns) & (r.timeline.start < incident.end_ns)
    assert view.worst_step == r.timeline.step[np.argmax(np.where(inside, r.timeline.duration * present, 0))]
    assert len(view.step_start_ns) <= 2 * STEPS_AROUND + 1


def test_where_no_step_lies_there_is_nothing_to_show() -> None:
    assert swimlanes(replica(), 0, 1) is None
