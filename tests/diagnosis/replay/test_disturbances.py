"""What no batch explains: pauses, stops and drops of clocks are found where they were, and not made up of scatter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stallscope.diagnosis.replay.disturbances import CLOCK_BIN_NS, StepTimes, read_disturbances
from stallscope.diagnosis.replay.machine import learn_machine
from tests.diagnosis.replay.recorded import CHAT, FLOOD, history_of

MS, S = 1_000_000, 1_000_000_000
STEPS, PREDICTED_NS, GAP_NS = 2000, 20 * MS, MS
PAUSE = "inject: [{engine: pause, at_s: 22, for_s: 2}]"
SLOW_STEPS = "inject: [{engine: slow_step, from_s: 12, to_s: 18, every: 20, by_s: 0.4}]"
THROTTLE = "inject: [{engine: throttle, from_s: 12, to_s: 20, factor: 1.6}]"


def steps(
    seed: int = 0, *, longer_ns: dict[int, int] | None = None, held_up_ns: dict[int, int] | None = None
) -> StepTimes:
    """Steps as predicted but for scatter; some take longer, before some the host is held up (by position)."""
    generator = np.random.default_rng(seed)
    duration = (PREDICTED_NS * generator.lognormal(0, 0.06, STEPS)).astype(np.int64)
    gap = (GAP_NS * generator.lognormal(0, 0.2, STEPS)).astype(np.int64)
    for changed, by in ((duration, longer_ns), (gap, held_up_ns)):
        for position, ns in (by or {}).items():
            changed[position] += ns
    end = np.cumsum(gap + duration)
    return StepTimes(end - duration, end, gap, np.full(STEPS, 8.0), np.full(STEPS, float(PREDICTED_NS)))


@pytest.mark.parametrize("seed", range(5))
def test_scatter_is_no_fault(seed: int) -> None:
    found = read_disturbances(steps(seed))
    assert not found.any_fault
    assert np.median(found.factors) == pytest.approx(1.0, rel=0.02)
    assert found.host_ns + 8 * found.host_request_ns == pytest.approx(GAP_NS, rel=0.05)


def test_a_step_that_takes_several_times_its_cost_is_scatter_still() -> None:
    found = read_disturbances(steps(longer_ns=dict.fromkeys(range(50, STEPS, 100), 4 * PREDICTED_NS)))
    assert not found.any_fault
    assert found.factors.max() > 4


def test_a_pause_is_found_before_the_step_that_it_held_up() -> None:
    times = steps(held_up_ns={700: 900 * MS})
    (pause,) = read_disturbances(times).pauses
    assert pause[0] == times.end[699]
    assert pause[1] == pytest.approx(900 * MS, rel=0.01)


def test_a_stopped_step_is_found_and_is_no_scatter() -> None:
    times = steps(longer_ns={700: 900 * MS})
    found = read_disturbances(times)
    ((start, length),) = found.stops
    assert start == times.start[700]
    assert length == pytest.approx(900 * MS, rel=0.02)
    assert not found.pauses
    assert found.factors.max() < 2


@pytest.mark.parametrize("factor", [1.3, 3.0])
def test_dropped_clocks_are_found_when_they_were_and_not_in_the_scatter(factor: float) -> None:
    slow = range(500, 1500)
    times = steps(longer_ns=dict.fromkeys(slow, int((factor - 1) * PREDICTED_NS)))
    found = read_disturbances(times)
    begin, end = (int((times.start[position] - found.clock_start) // CLOCK_BIN_NS) for position in (500, 1500))
    assert found.clock[begin + 1 : end] == pytest.approx([factor] * (end - begin - 1), rel=0.1)
    assert {*found.clock[:begin], *found.clock[end + 1 :]} == {1.0}
    assert np.quantile(found.factors, 0.9) < 1.2


def test_host_work_that_grows_with_the_batch_is_no_pause() -> None:
    size = np.tile(np.arange(1.0, 41.0), STEPS // 40)
    times = steps()
    found = read_disturbances(replace(times, host_gap=(MS + size * MS).astype(np.int64), size=size))
    assert found.pauses == []
    assert (found.host_ns, found.host_request_ns) == (pytest.approx(MS, rel=0.1), pytest.approx(MS, rel=0.05))


def test_without_faults_the_engine_is_as_slow_as_usual() -> None:
    found = read_disturbances(steps(longer_ns={700: 900 * MS}, held_up_ns={900: 900 * MS}))
    assert found.any_fault
    calm = found.without_faults()
    assert not calm.any_fault
    assert (calm.host_ns, calm.host_request_ns) == (found.host_ns, found.host_request_ns)
    assert calm.factors is found.factors


# --- in recordings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [CHAT, CHAT + FLOOD])
def test_a_recording_without_faults_has_none(text: str) -> None:
    assert not learn_machine(history_of(text)).disturbances.any_fault


def test_a_recorded_pause_is_found_at_its_time() -> None:
    history = history_of(CHAT + PAUSE)
    found = learn_machine(history).disturbances
    ((start, length),) = found.pauses
    assert (start - int(history.replica.timeline.before[0])) / S == pytest.approx(22, abs=1)
    assert length / S == pytest.approx(2, abs=0.1)
    assert not found.stops
    assert set(found.clock) == {1.0}


def test_recorded_slow_steps_are_found_in_their_stretch() -> None:
    history = history_of(CHAT + SLOW_STEPS)
    found = learn_machine(history).disturbances
    faults = [*found.pauses, *found.stops]
    assert len(faults) >= 5
    since = [(start - int(history.replica.timeline.before[0])) / S for start, _ in faults]
    assert 11 < min(since) < max(since) < 19


def test_recorded_throttling_is_found_in_its_stretch() -> None:
    clock = np.array(learn_machine(history_of(CHAT + THROTTLE)).disturbances.clock)
    slow = np.flatnonzero(clock > 1.3) * CLOCK_BIN_NS / S
    assert len(slow) >= 3
    assert 11 <= slow.min() <= slow.max() <= 20
