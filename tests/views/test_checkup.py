"""The check-up: a full recording answers what it can, losses take answers away."""

from __future__ import annotations

import random

import pytest

from stallscope.trace import Trace
from stallscope.views.checkup import Answer, Checkup, check_up
from stallscope_engine.config import EngineConfig
from tests.trace.recording import Arrival, Workload, read, run
from tests.views.recordings import recorded


def answers(checkup: Checkup) -> dict[str, Answer]:
    return {one.question.split("?")[0].split(":")[0]: one.answer for one in checkup.questions}


def lossy(lost: float, tenants: tuple[str, ...] = ("a", "b"), keyframe_every: int = 400) -> Trace:
    arrivals = [Arrival(3_000_000, 20, 30, tenants[number % len(tenants)]) for number in range(60)]
    recording = run(Workload(EngineConfig(), arrivals, keyframe_every, 10_000))
    rng = random.Random(0)
    return read([*(line for line in recording.step_lines() if rng.random() >= lost), *recording.request_lines()])


def test_a_full_recording_can_say_who_and_when_and_which() -> None:
    checkup = check_up(recorded())
    found = answers(checkup)
    assert checkup.usable
    for question in ("Which tenant stalled which", "How long did requests wait", "Which request did it"):
        assert found[question] is Answer.YES
    assert found["What would have been without it (replay)"] is Answer.YES
    assert found["Was the GPU throttled"] is Answer.NO
    assert checkup.replicas[0].batches_known == 1.0
    assert checkup.tenants == 3


def test_lost_steps_take_away_who_did_it_and_the_replay() -> None:
    checkup = check_up(lossy(0.5))
    found = answers(checkup)
    assert found["Which tenant stalled which"] is Answer.NO
    assert found["Which request did it"] is Answer.NO
    assert found["What would have been without it (replay)"] is Answer.NO
    assert not checkup.usable
    assert checkup.replicas[0].steps_lost > 0
    assert checkup.replicas[0].fidelity < 3


@pytest.mark.parametrize(
    ("tenants", "answer", "why"),
    [
        (("",), Answer.NO, "100% of the requests are of no known tenant"),
        (("a", "b", "", ""), Answer.PARTLY, "50% of the requests are of no known tenant"),
        (("a",), Answer.PARTLY, "all requests are of one tenant"),
        (("a", "b"), Answer.YES, ""),
    ],
)
def test_without_tenants_nobody_can_be_named(tenants: tuple[str, ...], answer: Answer, why: str) -> None:
    (who,) = (one for one in check_up(lossy(0.0, tenants)).questions if one.question.startswith("Which tenant"))
    assert who.answer is answer
    assert why in who.why


def test_whoever_is_short_of_something_is_told_what_to_do() -> None:
    for checkup in (check_up(recorded()), check_up(lossy(0.5)), check_up(lossy(0.0, ("",)))):
        for one in checkup.questions:
            assert bool(one.why) == bool(one.remedy) == (one.answer is not Answer.YES)
