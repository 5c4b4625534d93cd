"""Batches from requests alone, and from requests and sums of steps, held against what the engine really did."""

from dataclasses import replace
from functools import cache

import numpy as np
import orjson
import pytest
from hypothesis import assume, given

from stallscope.trace import Trace
from stallscope.trace.reconstruct import Stations, estimate_clock, reconstruct
from stallscope_engine.config import EngineConfig
from stallscope_telemetry import names
from stallscope_telemetry.records import WaitReason
from tests.trace.recording import Arrival, Recording, Workload, read, run, share_of_batches, workloads

_OF_STEP = {
    *(names.STEP, names.DISPATCH_DELAY, names.SCHED, names.PREFILL_TOKENS, names.DECODE_TOKENS, names.BATCH_SIZE),
    *(names.RUNNING, names.WAITING, names.KV_USED, names.IDLE),
}


@cache
def busy() -> Recording:
    """Sixty requests whose prompts take one to eight steps; up to a dozen run at once."""
    config = EngineConfig(max_num_batched_tokens=64, block_size=4, kv_blocks=4096)
    arrivals = [Arrival(3_000_000 + 1_700_000 * (n % 5), 20 + 97 * (n % 6 == 0), 8 + n % 17, "t") for n in range(60)]
    return run(Workload(config, arrivals, 16, 10_000))


def sums_alone(recording: Recording) -> list[bytes]:
    """Steps that do not tell of their batches, and the requests."""
    lines = []
    for text in recording.step_lines():
        data = orjson.loads(text)
        (span,) = data["resourceSpans"][0]["scopeSpans"][0]["spans"]
        span["attributes"] = [one for one in span["attributes"] if one["key"] in _OF_STEP]
        lines.append(orjson.dumps(data))
    return [*lines, *recording.request_lines()]


def test_with_the_sums_of_steps_nearly_every_batch_is_the_real_one() -> None:
    recording = busy()
    trace = read(sums_alone(recording))
    assert trace.coverage["fidelity"].to_pylist() == [2]
    assert share_of_batches(trace, recording) > 0.95


def test_prefills_add_up_to_each_step_and_to_each_prompt() -> None:
    trace = read(sums_alone(busy()))
    rows = trace.residency.to_pandas()
    prefills = rows[rows["phase"] == "prefill"]
    by_step = prefills.groupby("first_step")["tokens"].sum()
    told = trace.steps.to_pandas().set_index("step")["prefill_tokens"]
    assert (by_step - told[told > 0]).abs().max() <= 2  # each part is rounded
    computed = prefills.groupby("request", observed=True)["tokens"].sum()
    assert computed.to_dict() == trace.requests.to_pandas().set_index("request")["prompt_tokens"].to_dict()


def test_requests_alone_tell_how_many_steps_there_were_and_when() -> None:
    recording = busy()
    trace = read(recording.request_lines())
    assert trace.coverage["fidelity"].to_pylist() == [1]
    estimated = np.array(trace.steps["ready"].to_pylist())
    real = np.array([one.ready_ns for one in recording.steps])
    assert len(estimated) == pytest.approx(len(real), rel=0.1)
    halves = np.quantile(real, [0.25, 0.5, 0.75])
    steps_until = [np.searchsorted(times, halves) / len(times) for times in (estimated, real)]
    assert steps_until[0] == pytest.approx(steps_until[1], abs=0.03)


def test_a_step_that_takes_long_is_found_where_decodes_waited_for_it() -> None:
    # One token a ms each, but for the 50 ms in which a long prompt is computed in two steps.
    ms = 1_000_000
    told = Stations(
        arrival=np.array([0, 0, 20]) * ms,
        scheduled=np.array([0, 0, 20]) * ms,
        first_token=np.array([2, 2, 70]) * ms,
        end=np.array([102, 32, 80]) * ms,
        prompt_tokens=np.array([2, 2, 5000]),
        output_tokens=np.array([53, 21, 11]),
    )
    clock = estimate_clock(told)
    within = (clock.start >= 20 * ms) & (clock.ready <= 70 * ms)
    assert 1 <= within.sum() <= 6
    assert len(clock.start) == pytest.approx(53, abs=5)


@given(workload=workloads())
def test_whatever_ran_is_a_sound_trace_at_any_fidelity(workload: Workload) -> None:
    recording = run(workload)
    answered = [one for one in recording.ended if one.first_token_ns]
    assume(recording.steps and answered)
    for lines in (sums_alone(recording), recording.request_lines()):
        trace = read(lines)
        assert [one.kind for one in trace.validate()] == []
        assert trace.residency.num_rows
        assert _prefilled(trace) <= {one.info.request_id for one in recording.ended}


def _prefilled(trace: Trace) -> set[str]:
    rows = trace.residency.to_pylist()
    return {row["request"] for row in rows if row["phase"] == "prefill"}


def test_a_wait_beside_a_prefill_is_for_tokens_and_beside_full_slots_for_slots() -> None:
    ms = 1_000_000
    told = Stations(
        arrival=np.array([0, 0, 200, 11_000]) * ms,
        scheduled=np.array([0, 0, 4000, 14_000]) * ms,
        first_token=np.array([4000, 500, 5000, 15_000]) * ms,
        end=np.array([14_000, 10_000, 12_000, 16_000]) * ms,
        prompt_tokens=np.array([4000, 10, 10, 10]),
        output_tokens=np.array([11, 6, 6, 2]),
    )
    clock = estimate_clock(told)
    rows = reconstruct(told, clock, np.arange(len(clock.start)), None)
    waits = {int(who): WaitReason(why).name for who, why in zip(rows.request, rows.reason, strict=True) if why >= 0}
    assert waits == {2: "BUDGET", 3: "KV"}
    crowded = replace(told, end=np.array([14_000, 14_000, 14_000, 16_000]) * ms)
    clock = estimate_clock(crowded)
    rows = reconstruct(crowded, clock, np.arange(len(clock.start)), None)
    waits = {int(who): WaitReason(why).name for who, why in zip(rows.request, rows.reason, strict=True) if why >= 0}
    assert waits == {2: "BUDGET", 3: "SLOTS"}
