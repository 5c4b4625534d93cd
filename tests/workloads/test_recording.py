"""Recordings: the same seed gives the same bytes, the trace keeps the answer to itself."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from stallscope.errors import UsageError
from stallscope.trace import read_trace
from stallscope.workloads.draws import Literal, Uniform
from stallscope.workloads.recording import VIRTUAL_START_NS, Simulation, record, simulate
from stallscope.workloads.scenario import (
    AddedRequests,
    ClosedLoop,
    Every,
    Expect,
    Lengths,
    Poisson,
    Scenario,
    SlowClient,
    Tenant,
    load_scenario,
)
from stallscope.workloads.traffic import plan
from stallscope_engine.config import EngineConfig
from stallscope_telemetry.records import FinishReason, RequestRecord, WaitReason

SHORT = Tenant("chat", Every(Literal(0.1)), Lengths(Literal(50), Literal(10)))
STORY = Scenario("story", "", 5.0, 0, EngineConfig(kv_blocks=256), (SHORT,), (), None)
S = 1_000_000_000


def ttft_ms(run: Simulation, tenant: str, percentile: float) -> float:
    times = [one.first_token_ns - one.info.arrival_ns for one in run.requests if one.info.tenant == tenant]
    return float(np.percentile(times, percentile)) / 1e6


def busy_share(run: Simulation) -> float:
    """Share of the time from the first arrival on in which there was a request."""
    return 1 - sum(step.idle_ns for step in run.steps[1:]) / (run.steps[-1].ready_ns - run.steps[0].scheduled_ns)


@pytest.mark.parametrize("name", ["reasoning_prompt", "kv_pinning", "batch_flood"])
def test_the_injection_of_a_shipped_scenario_is_what_hurts(name: str) -> None:
    scenario = load_scenario(name, "sample")
    harmed, usual = simulate(scenario, 0), simulate(scenario, 0, inject=False)
    assert ttft_ms(harmed, "chat", 99) > 5 * ttft_ms(usual, "chat", 99)
    assert ttft_ms(usual, "chat", 99) < 50
    assert busy_share(usual) < 0.6
    assert scenario.expect is not None
    assert {one.info.tenant for one in harmed.requests} - {one.info.tenant for one in usual.requests} == set(
        scenario.expect.culprits
    )


@pytest.mark.parametrize(
    ("name", "reason"), [("kv_pinning", WaitReason.KV), ("batch_flood", WaitReason.BUDGET), ("reasoning_prompt", None)]
)
def test_victims_wait_for_the_reason_that_the_scenario_is_about(name: str, reason: WaitReason | None) -> None:
    scenario = load_scenario(name, "sample")
    run = simulate(scenario, 0)
    reasons = [WaitReason(reason) for step in run.steps for _, reason, _ in step.waits]
    if reason is None:  # all of the harm is done by steps that take long
        assert reasons == []
        assert max(step.ready_ns - step.dispatched_ns for step in run.steps) > 0.8 * S
    else:
        assert reasons.count(reason) > len(reasons) / 2
    assert sum(len(step.preempted) for step in run.steps) == 0


def test_healthy_traffic_is_comfortable() -> None:
    run = simulate(load_scenario("healthy"), 1)
    assert busy_share(run) < 0.6
    assert ttft_ms(run, "chat", 99) < 100
    assert len({one.info.tenant for one in run.requests}) == 3


def test_a_simulation_finishes_what_was_planned_at_the_planned_times() -> None:
    run = simulate(STORY, 0)
    planned = {one.request_id: one for one in plan(STORY, 0)}
    assert {one.info.request_id for one in run.requests} == planned.keys()
    for one in run.requests:
        wanted = planned[one.info.request_id]
        assert one.info.arrival_ns == VIRTUAL_START_NS + wanted.offset_ns
        assert (one.info.prompt_tokens, len(one.token_times_ns)) == (wanted.prompt_tokens, wanted.output_tokens)


# --- closed loops -------------------------------------------------------------------------------------------

IMPATIENT = Tenant("agents", ClosedLoop(3, Literal(0.2), timeout_s=0.3, retries=2), Lengths(Literal(100), Literal(20)))
BIG = AddedRequests("big", (Literal(2),), Literal(1), Lengths(Literal(14000), Literal(5)))
ROOMY = EngineConfig(max_num_batched_tokens=16384)


def test_a_client_never_has_two_requests_at_once_and_thinks_between_them() -> None:
    run = simulate(replace(STORY, tenants=(IMPATIENT,)), 0)
    sessions: dict[str, list[RequestRecord]] = {}
    for one in sorted(run.requests, key=lambda one: one.info.arrival_ns):
        sessions.setdefault(one.info.session, []).append(one)
    assert len(sessions) == 3
    for requests in sessions.values():
        assert len(requests) > 10
        for before, after in pairwise(requests):
            assert after.info.arrival_ns == before.end_ns + S // 5
            assert after.info.predecessor == before.info.request_id


def test_clients_give_up_during_a_stall_and_their_retries_arrive_meanwhile(tmp_path: Path) -> None:
    stalled = replace(STORY, tenants=(IMPATIENT,), inject=(BIG,), engine=ROOMY)
    run, usual = simulate(stalled, 0), simulate(stalled, 0, inject=False)
    given_up = [one for one in run.requests if one.finish_reason is FinishReason.TIMEOUT]
    retries = [one for one in run.requests if one.info.retry_of]
    ids = {one.info.request_id for one in run.requests}
    assert given_up
    assert retries
    assert {one.info.retry_of for one in retries} <= ids
    assert not [one for one in usual.requests if one.finish_reason is FinishReason.TIMEOUT or one.info.retry_of]
    (stall,) = (step for step in run.steps if step.ready_ns - step.dispatched_ns > S // 2)
    assert any(stall.dispatched_ns < one.info.arrival_ns < stall.ready_ns for one in retries)
    summary = record(stalled, tmp_path / "story.otlp.jsonl", seed=0, executor="virtual")
    assert (summary.requests, summary.given_up) == (len(run.requests), len(given_up))
    assert summary.open == 0


def test_the_run_without_the_injection_has_the_same_turns() -> None:
    drawn = replace(IMPATIENT, lengths=Lengths(Uniform(50, 150), Uniform(10, 30)))
    stalled = replace(STORY, tenants=(drawn,), inject=(BIG,), engine=ROOMY)
    runs = [simulate(stalled, 0), simulate(stalled, 0, inject=False)]
    harmed, usual = ({one.info.request_id: one.info.prompt_tokens for one in run.requests} for run in runs)
    shared = harmed.keys() & usual.keys()
    assert len(shared) > 20
    assert {name: harmed[name] for name in shared} == {name: usual[name] for name in shared}


def test_a_growing_conversation_finds_its_beginning_in_the_prefix_cache() -> None:
    talk = Tenant("agents", ClosedLoop(2, Literal(0.1), context_tokens=600), Lengths(Literal(50), Literal(10)))
    run = simulate(replace(STORY, tenants=(talk,), engine=EngineConfig(kv_blocks=256, prefix_caching=True)), 0)
    later = [one for one in run.requests if one.info.prompt_tokens > 50]
    assert len(later) > 20
    # All but the end of what was asked before, and its answer, whose tokens nobody knows beforehand.
    assert all(one.info.prompt_tokens - 16 - 60 <= one.cached_tokens < one.info.prompt_tokens for one in later)
    assert any(step.kv_cached for step in run.steps)


def test_the_last_client_to_give_up_ends_the_run() -> None:
    hopeless = Tenant("agents", ClosedLoop(1, Literal(0), timeout_s=0.5), Lengths(Literal(100), Literal(60_000)))
    run = simulate(replace(STORY, tenants=(hopeless,), engine=EngineConfig(kv_blocks=8192)), 0)
    assert {one.finish_reason for one in run.requests} == {FinishReason.TIMEOUT}
    assert len(run.requests) == 10
    assert run.steps[-1].ready_ns - VIRTUAL_START_NS < 6 * S


def test_clients_live_on_the_torch_executor_too(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    loop = ClosedLoop(2, Literal(0.1), context_tokens=60)
    story = replace(STORY, duration_s=1.0, tenants=(Tenant("agents", loop, Lengths(Literal(12), Literal(3))),))
    summary = record(story, tmp_path / "story.otlp.jsonl", seed=0, executor="torch")
    assert summary.requests == summary.finished > 2


# --- files --------------------------------------------------------------------------------------------------


def spans(path: Path) -> list[dict[str, object]]:
    with path.open(encoding="utf-8") as lines:
        return [
            span
            for line in lines
            for resource in json.loads(line)["resourceSpans"]
            for scope in resource["scopeSpans"]
            for span in scope["spans"]
        ]


def test_a_virtual_recording_of_the_same_seed_has_the_same_bytes(tmp_path: Path) -> None:
    scenario = load_scenario("reasoning_prompt", "demo")
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        record(scenario, tmp_path / f"{name}.otlp.jsonl.gz", seed=seed, executor="virtual")
    same, again, other = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert same == again != other


def test_a_recording_holds_every_step_and_every_finished_request(tmp_path: Path) -> None:
    summary = record(STORY, tmp_path / "story.otlp.jsonl", seed=0, executor="virtual")
    names = [span["name"] for span in spans(summary.path)]
    assert (summary.requests, summary.finished, summary.open, summary.dropped) == (50, 50, 0, 0)
    assert (names.count("engine.step"), names.count("llm_request")) == (summary.steps, 50)
    assert summary.start_ns == VIRTUAL_START_NS
    assert 4.9 * S < summary.end_ns - summary.start_ns < 6 * S


def test_a_recording_keeps_the_answer_to_itself(tmp_path: Path) -> None:
    culprit = AddedRequests("batch", (Literal(2),), Literal(2), Lengths(Literal(2000), Literal(10)))
    answer = Expect("noisy_neighbor", ("batch",), ("kv_pinning",))
    story = replace(STORY, name="who_did_it", inject=(culprit,), expect=answer)
    plain, told = tmp_path / "plain.otlp.jsonl", tmp_path / "told.otlp.jsonl"
    record(story, told, seed=0, executor="virtual")
    record(replace(story, expect=None), plain, seed=0, executor="virtual")
    assert told.read_bytes() == plain.read_bytes()
    text = told.read_text(encoding="utf-8")
    assert '"batch-000001"' in text
    assert not [word for word in ("inject", "expect", "who_did_it", "noisy", "kv_pinning") if word in text]


def test_requests_that_do_not_finish_in_time_stay_open(tmp_path: Path) -> None:
    endless = replace(SHORT, arrivals=Every(Literal(4)), lengths=Lengths(Literal(50), Literal(60_000)))
    story = replace(STORY, tenants=(endless,), engine=EngineConfig(kv_blocks=8192))
    summary = record(story, tmp_path / "story.otlp.jsonl", seed=0, executor="virtual")
    assert (summary.requests, summary.finished, summary.open) == (2, 0, 2)
    assert 35 * S <= summary.end_ns - summary.start_ns < 36 * S


def test_a_run_in_which_nobody_came_is_a_recording_too(tmp_path: Path) -> None:
    nobody = replace(SHORT, arrivals=Poisson(Literal(0)))
    summary = record(replace(STORY, tenants=(nobody,)), tmp_path / "story.otlp.jsonl", seed=0, executor="virtual")
    assert (summary.requests, summary.steps, spans(summary.path)) == (0, 0, [])


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "story.otlp.jsonl"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="exists: choose another name, or overwrite it with --force"):
        record(STORY, path, seed=0, executor="virtual")
    assert path.read_text(encoding="utf-8") == "mine"
    record(STORY, path, seed=0, executor="virtual", force=True)
    assert len(spans(path)) > 50


@pytest.mark.parametrize("name", ["story.csv", "file/story.otlp.jsonl"])
def test_a_file_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()  # where a folder would have to be
    with pytest.raises(UsageError, match=r"^[^\n]*story[^\n]*$"):
        record(STORY, tmp_path / name, seed=0, executor="virtual")


def test_the_folder_of_a_trace_is_made(tmp_path: Path) -> None:
    assert record(STORY, tmp_path / "new" / "run" / "story.otlp.jsonl", seed=0, executor="virtual").path.exists()


@pytest.mark.parametrize("executor", ["virtual", "torch"])
def test_a_model_that_the_executor_does_not_know_is_an_error_before_any_file(tmp_path: Path, executor: str) -> None:
    if executor == "torch":
        pytest.importorskip("torch")
    story = replace(STORY, engine=replace(STORY.engine, model="70b"))
    with pytest.raises(UsageError, match=r"'70b'.*tiny-llama"):
        record(story, tmp_path / "story.otlp.jsonl", seed=0, executor=executor)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told_in_order_and_ends_at_one(tmp_path: Path) -> None:
    shares: list[float] = []
    record(STORY, tmp_path / "story.otlp.jsonl", seed=0, executor="virtual", progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert 20 < len(shares) < 110


def test_the_torch_executor_records_in_real_time(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    rare = replace(SHORT, arrivals=Every(Literal(0.25)), lengths=Lengths(Literal(12), Literal(3)))
    story = replace(STORY, duration_s=1.0, tenants=(rare,))
    summary = record(story, tmp_path / "story.otlp.jsonl", seed=0, executor="torch")
    assert (summary.requests, summary.finished) == (4, 4)
    assert [span["name"] for span in spans(summary.path)].count("engine.step") == summary.steps


def test_shared_beginnings_of_prompts_are_found_in_the_prefix_cache() -> None:
    lengths = Lengths(Literal(400), Literal(5), shared_prefix_tokens=330, shared_prefixes=2)
    chat = Tenant("chat", Every(Literal(0.5)), lengths)
    engine = EngineConfig(model="8b", prefix_caching=True)
    cached = [one.cached_tokens for one in simulate(replace(STORY, tenants=(chat,), engine=engine), 0).requests]
    assert sorted(set(cached)) == [0, 320]  # full blocks of 16 tokens
    assert cached.count(0) == 2
    without = replace(engine, prefix_caching=False)
    assert {one.cached_tokens for one in simulate(replace(STORY, tenants=(chat,), engine=without), 0).requests} == {0}


def test_slow_clients_delay_what_is_delivered_and_nothing_else(tmp_path: Path) -> None:
    slow = replace(STORY, inject=(SlowClient("chat", Literal(2), Literal(4), Literal(1.5)),))
    paths = {name: tmp_path / f"{name}.otlp.jsonl" for name in ("slow", "plain")}
    for name, story in (("slow", slow), ("plain", STORY)):
        record(story, paths[name], seed=0, executor="virtual")
    tables = {name: read_trace(path).requests.to_pandas() for name, path in paths.items()}
    late = tables["slow"]["delivered"] - tables["slow"]["end"]
    ends_s = (tables["slow"]["end"] - VIRTUAL_START_NS) / 1e9
    assert set(late[(ends_s >= 2) & (ends_s < 4)]) == {1_500_000_000}
    assert set(late[(ends_s < 2) | (ends_s >= 4)]) == {0}
    assert tables["slow"].drop(columns="delivered").equals(tables["plain"].drop(columns="delivered"))
