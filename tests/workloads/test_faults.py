"""Faults: each shows in the recorded trace what it should and nothing else, and only the engine's reach requests."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from stallscope.errors import UsageError
from stallscope.trace import Trace, read_trace
from stallscope.workloads import faults as faults_module
from stallscope.workloads.draws import Literal, Uniform
from stallscope.workloads.faults import Stretch, plan_faults
from stallscope.workloads.recording import VIRTUAL_START_NS, RecordingSummary, Simulation, record, simulate
from stallscope.workloads.scenario import (
    EnginePause,
    Every,
    Fault,
    Lengths,
    Scenario,
    SlowStep,
    TelemetryAggregate,
    TelemetryDrop,
    TelemetryHang,
    TelemetrySample,
    Tenant,
    Throttle,
)
from stallscope.workloads.traffic import plan
from stallscope_engine.config import EngineConfig
from stallscope_telemetry.records import StepRecord

S = 1_000_000_000
RARE = Tenant("chat", Every(Literal(0.1)), Lengths(Literal(50), Literal(10)))
BUSY = replace(RARE, arrivals=Every(Literal(0.02)))
STORY = Scenario("story", "", 5.0, 0, EngineConfig(kv_blocks=256), (BUSY,), (), None)

PAUSE = EnginePause(Literal(2), Literal(1))
SLOW = SlowStep(Literal(2), Literal(3), Literal(4), Literal(0.05))
THROTTLE = Throttle(Literal(2), Literal(3), Literal(3))
HANG = TelemetryHang(Literal(2), Literal(4))
DROP = TelemetryDrop(Literal(0.1))
SAMPLE = TelemetrySample(Literal(0.25))
EVERY_FAULT: list[Fault] = [PAUSE, SLOW, THROTTLE, HANG, DROP, SAMPLE, TelemetryAggregate()]
TELEMETRY_FAULTS: list[Fault] = EVERY_FAULT[3:]


def with_fault(*faults: Fault, tenant: Tenant = BUSY) -> Scenario:
    return replace(STORY, tenants=(tenant,), inject=faults)


def ttft_ms(run: Simulation, percentile: float) -> float:
    times = [one.first_token_ns - one.info.arrival_ns for one in run.requests]
    return float(np.percentile(times, percentile)) / 1e6


def gaps_ns(steps: list[StepRecord]) -> list[int]:
    """Between steps, less idle: what a diagnosis calls the host gap."""
    return [later.scheduled_ns - sooner.ready_ns - later.idle_ns for sooner, later in pairwise(steps)]


def within(step: StepRecord, from_s: float, to_s: float) -> bool:
    return from_s * S <= step.scheduled_ns - VIRTUAL_START_NS < to_s * S


def recorded(folder: Path, *faults: Fault, seed: int = 0) -> tuple[RecordingSummary, Trace]:
    summary = record(with_fault(*faults), folder / "story.otlp.jsonl", seed=seed, executor="virtual", force=True)
    return summary, read_trace(summary.path)


# --- by seed ----------------------------------------------------------------------------------------------------


def test_faults_are_planned_by_seed_and_pauses_in_order() -> None:
    scenario = with_fault(EnginePause(Literal(4), Literal(0.5)), EnginePause(Uniform(1, 3), Literal(0.25)))
    early, late = plan_faults(scenario, 0).pauses
    assert 1 * S <= early.start_ns <= 3 * S
    assert early.end_ns - early.start_ns == pytest.approx(S // 4)
    assert late == Stretch(4 * S, 4 * S + S // 2)
    assert plan_faults(scenario, 0) == plan_faults(scenario, 0) != plan_faults(scenario, 1)


def test_a_fault_does_not_change_when_one_of_another_kind_goes() -> None:
    pause = EnginePause(Uniform(1, 3), Uniform(0.1, 1))
    assert plan_faults(with_fault(SLOW, pause), 7).pauses == plan_faults(with_fault(pause, DROP), 7).pauses


@pytest.mark.parametrize("fault", EVERY_FAULT)
def test_a_fault_changes_no_traffic(fault: Fault) -> None:
    assert plan(with_fault(fault), 3) == plan(STORY, 3)


@pytest.mark.parametrize("fault", EVERY_FAULT)
def test_the_same_seed_gives_the_same_bytes_and_the_control_run_has_no_fault(fault: Fault, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.otlp.jsonl" for name in ("first", "again", "control", "plain")}
    for name in ("first", "again"):
        record(with_fault(fault), files[name], seed=0, executor="virtual")
    record(with_fault(fault), files["control"], seed=0, executor="virtual", inject=False)
    record(STORY, files["plain"], seed=0, executor="virtual", inject=False)
    content = {name: path.read_bytes() for name, path in files.items()}
    assert content["first"] == content["again"]
    assert content["control"] == content["plain"]
    if fault != HANG:  # it costs nothing here until the queue is full
        assert len(read_trace(files["first"]).steps) > 0
        assert content["first"] != content["control"]


# --- pause ------------------------------------------------------------------------------------------------------


def test_a_pause_is_a_gap_of_the_host_and_lasts_until_its_end() -> None:
    run = simulate(with_fault(PAUSE), 0)
    longest_ns = max(gaps_ns(run.steps))
    assert 0.95 * S < longest_ns <= S
    assert VIRTUAL_START_NS + 3 * S in [step.scheduled_ns for step in run.steps]
    assert not any(within(step, 2.000000001, 3) for step in run.steps)
    assert max(step.ready_ns - step.scheduled_ns for step in run.steps) < S / 10
    assert ttft_ms(run, 100) > 900


def test_an_idle_engine_is_paused_from_the_next_arrival_on() -> None:
    run = simulate(with_fault(PAUSE, tenant=replace(RARE, arrivals=Every(Literal(2.5)))), 0)
    assert max(gaps_ns(run.steps)) == S // 2
    assert run.steps[-1].scheduled_ns > VIRTUAL_START_NS + 3 * S
    assert ttft_ms(run, 100) > 500


# --- slow steps -------------------------------------------------------------------------------------------------


def test_every_nth_step_of_the_stretch_is_held_up_before_its_dispatch_and_no_other() -> None:
    run, usual = simulate(with_fault(SLOW), 0), simulate(STORY, 0)
    inside = [step for step in run.steps if within(step, 2, 3)]
    held_up = [step.dispatched_ns - step.scheduled_ns >= 50_000_000 for step in inside]
    assert len(inside) > 40
    assert held_up == [number % 4 == 0 for number in range(1, len(inside) + 1)]
    others = [step for step in run.steps if not within(step, 2, 3)]
    assert max(step.dispatched_ns - step.scheduled_ns for step in others) < 5_000_000
    assert max(step.ready_ns - step.dispatched_ns for step in run.steps) < 50_000_000
    assert max(gaps_ns(run.steps)) == 0
    before = [step for step in usual.steps if step.ready_ns < VIRTUAL_START_NS + 2 * S]
    assert run.steps[: len(before)] == before


def test_who_decodes_then_waits_for_each_slow_step() -> None:
    run, usual = simulate(with_fault(SLOW), 0), simulate(STORY, 0)

    def slow_gaps(of: Simulation) -> int:
        return sum(b - a >= 50_000_000 for one in of.requests for a, b in pairwise(one.token_times_ns))

    assert slow_gaps(usual) == 0
    assert slow_gaps(run) > sum(within(step, 2, 3) for step in run.steps) // 4
    assert ttft_ms(run, 99) > ttft_ms(usual, 99) + 40


def test_the_trace_shows_slow_steps_as_time_of_the_host(tmp_path: Path) -> None:
    _, trace = recorded(tmp_path, SLOW)
    steps = trace.steps.to_pandas()
    slow = steps[steps.dispatched - steps.scheduled >= 50_000_000]
    assert len(slow) > 10
    assert ((slow.scheduled - VIRTUAL_START_NS) // S == 2).all()
    assert trace.findings == ()
    assert trace.validate() == []


# --- throttle ---------------------------------------------------------------------------------------------------


def test_a_clock_drop_multiplies_the_time_on_the_device_in_its_stretch_alone() -> None:
    run, usual = simulate(with_fault(THROTTLE, tenant=RARE), 0), simulate(with_fault(tenant=RARE), 0)

    def device_ns(of: Simulation, from_s: float, to_s: float) -> float:
        return float(np.mean([step.ready_ns - step.dispatched_ns for step in of.steps if within(step, from_s, to_s)]))

    assert device_ns(run, 2, 3) == pytest.approx(3 * device_ns(usual, 2, 3), rel=0.1)
    assert device_ns(run, 0, 2) == device_ns(usual, 0, 2)
    assert device_ns(run, 3.2, 5) == pytest.approx(device_ns(usual, 3.2, 5), rel=0.05)
    assert max(step.dispatched_ns - step.scheduled_ns for step in run.steps) < 1_000_000
    assert ttft_ms(run, 99) > 2 * ttft_ms(usual, 99)


def test_a_throttle_on_real_hardware_is_refused_before_any_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^story: a throttle needs virtual time; record it with --executor virtual$"):
        record(with_fault(THROTTLE), tmp_path / "story.otlp.jsonl", seed=0, executor="torch")
    assert list(tmp_path.iterdir()) == []


# --- telemetry --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", TELEMETRY_FAULTS)
def test_requests_do_not_feel_what_happens_to_telemetry(fault: Fault) -> None:
    run, usual = simulate(with_fault(fault), 0), simulate(STORY, 0)
    assert (run.steps, run.requests) == (usual.steps, usual.requests)


@pytest.mark.parametrize("fault", TELEMETRY_FAULTS)
def test_a_recording_with_broken_telemetry_serves_the_same_requests_at_the_same_times(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults_module, "CAPACITY", 20)
    summary, _ = recorded(tmp_path, fault)
    plain, _ = recorded(tmp_path)
    assert replace(summary, dropped=0) == plain


def test_a_lossy_collector_loses_its_share_of_steps_and_no_request(tmp_path: Path) -> None:
    summary, trace = recorded(tmp_path, DROP)
    lost = summary.steps - trace.steps.num_rows
    assert 0.07 < lost / summary.steps < 0.13
    assert set(trace.requests.column("state").to_pylist()) == {"finished"}
    assert sum(trace.coverage.column("steps_lost").to_pylist()) == lost
    assert sum(trace.coverage.column("spans_dropped").to_pylist()) == summary.dropped == 0
    _, other = recorded(tmp_path, DROP, seed=1)
    assert other.steps.column("step").to_pylist() != trace.steps.column("step").to_pylist()


def test_a_sampler_keeps_its_share_of_request_spans_and_every_step(tmp_path: Path) -> None:
    summary, trace = recorded(tmp_path, SAMPLE)
    spans = summary.path.read_bytes().count(b'"name":"llm_request"')
    assert 0.15 < spans / summary.finished < 0.35
    assert trace.steps.num_rows == summary.steps
    assert trace.coverage.column("fidelity").to_pylist() == [3]
    assert trace.requests.num_rows == summary.requests


def test_aggregates_say_how_many_and_not_who(tmp_path: Path) -> None:
    summary, trace = recorded(tmp_path, TelemetryAggregate())
    _, usual = recorded(tmp_path)
    assert trace.coverage.column("fidelity").to_pylist() == [2]
    assert trace.steps == usual.steps
    # Who was in a batch is estimated, from when requests were there: rightly, where so few run at a time.
    assert trace.residency == usual.residency
    assert trace.requests.num_rows == summary.requests
    assert trace.findings == ()


def test_a_collector_that_hangs_costs_what_the_queue_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults_module, "CAPACITY", 100)
    summary, trace = recorded(tmp_path, HANG)
    assert summary.dropped > 50
    steps = trace.steps.to_pandas()
    lost = summary.steps - len(steps)
    # Of requests and steps 100 of the stretch waited; whatever came later within it is lost and counted.
    ready = (steps.ready - VIRTUAL_START_NS) / S
    assert 0 < ((ready >= 2) & (ready < 4)).sum() <= 100
    (gap,) = np.flatnonzero(np.diff(steps.step) > 1)
    assert 2 < ready[gap] < ready[gap + 1] < 4.1
    coverage = trace.coverage.to_pandas()
    assert coverage.fidelity.tolist() == [3, 2, 3]  # between: the step in flight at the end, scheduled without room
    assert coverage.steps_seen[1] == 1
    assert coverage.steps_lost.sum() == lost < summary.dropped
    assert coverage.spans_dropped.sum() == summary.dropped


def test_a_short_hang_costs_nothing(tmp_path: Path) -> None:
    summary, _ = recorded(tmp_path, HANG)
    hung = summary.path.read_bytes()
    recorded(tmp_path)
    assert summary.path.read_bytes() == hung
    assert summary.dropped == 0


# --- in real time -----------------------------------------------------------------------------------------------


def real(folder: Path, *faults: Fault) -> tuple[RecordingSummary, Trace]:
    pytest.importorskip("torch")
    rare = replace(RARE, arrivals=Every(Literal(0.25)), lengths=Lengths(Literal(12), Literal(3)))
    story = replace(STORY, duration_s=1.0, tenants=(rare,), inject=faults)
    summary = record(story, folder / "story.otlp.jsonl", seed=0, executor="torch")
    assert (summary.requests, summary.finished) == (4, 4)
    return summary, read_trace(summary.path)


def test_in_real_time_no_step_begins_within_a_pause_and_slow_steps_are_held_up(tmp_path: Path) -> None:
    slow = SlowStep(Literal(0.7), Literal(1), Literal(2), Literal(0.06))
    summary, trace = real(tmp_path, EnginePause(Literal(0.3), Literal(0.4)), slow)
    steps = trace.steps.to_pandas()
    begun = steps.scheduled - summary.start_ns
    assert not ((begun >= 0.3 * S) & (begun < 0.7 * S)).any()
    held_up = steps.dispatched - steps.scheduled >= 60_000_000
    assert held_up[begun >= 0.7 * S].sum() >= 2


def test_in_real_time_a_hang_ends_with_the_run_and_what_waited_is_written(tmp_path: Path) -> None:
    summary, trace = real(tmp_path, TelemetryHang(Literal(0), Literal(1)))
    assert trace.steps.num_rows == summary.steps
    assert summary.dropped == 0
