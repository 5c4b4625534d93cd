"""The scheduler keeps its limits, serves first come first, finishes everybody, and says truly why others wait."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope_engine.config import POLICIES, PREEMPTION, EngineConfig
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch, RequestRejected, Scheduler
from stallscope_telemetry.records import FinishReason, RequestInfo, RequestState, WaitReason

STEP_NS = 1_000
TENANTS = ("chat", "batch", "chat")
TENANT_SOURCES = ("api_key", "api_key", "claim:user")


@dataclass(frozen=True)
class Case:
    """A configuration, and requests as (step of arrival, prompt tokens, max tokens, steps until it is aborted)."""

    config: EngineConfig
    arrivals: Sequence[tuple[int, int, int, int | None]]


@st.composite
def cases(draw: st.DrawFn, aborts: bool = True, any_policy: bool = False) -> Case:
    """Small engines under pressure, so that slots, budget and blocks all run out; first come first served, or any."""
    chunked = draw(st.booleans())
    config = EngineConfig(
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 40)) if chunked else draw(st.integers(30, 80)),
        chunked_prefill=chunked,
        block_size=draw(st.sampled_from([1, 4, 16])),
        kv_blocks=draw(st.integers(4, 40)),
        watermark=draw(st.sampled_from([0.0, 0.1])),
    )
    if any_policy:
        config = replace(
            config,
            policy=draw(st.sampled_from(POLICIES)),
            preemption=draw(st.sampled_from(PREEMPTION)),
            prefix_caching=draw(st.booleans()),
            tenant_kv_share=draw(st.sampled_from([1.0, 0.5])),
            tenant_token_share=draw(st.sampled_from([1.0, 0.3])),
            long_prefill_token_threshold=draw(st.sampled_from([0, 7])) if chunked else 0,
        )
    aborted = st.one_of(st.none(), st.integers(0, 15)) if aborts else st.none()
    arrival = st.tuples(st.integers(0, 8), st.integers(1, 60), st.integers(1, 20), aborted)
    return Case(config, sorted(draw(st.lists(arrival, min_size=1, max_size=14)), key=lambda one: one[0]))


class Run:
    """Serves a case step by step; ``requests`` are those that were accepted."""

    def __init__(self, case: Case) -> None:
        self.scheduler = Scheduler(case.config)
        self.requests: list[Request] = []
        self._pending = [(*one, handle) for handle, one in enumerate(case.arrivals)]
        self._aborts: list[tuple[int, Request]] = []

    def steps(self) -> Iterator[tuple[Batch, list[RequestState]]]:
        """Each batch before it is completed, with the states of ``requests`` before it was scheduled."""
        step = 0
        while self._pending or self.scheduler.has_work:
            while self._pending and self._pending[0][0] <= step:
                self._submit(*self._pending.pop(0))
            for at, request in self._aborts:
                if at <= step:
                    self.scheduler.abort(request, FinishReason.ABORT, (step + 1) * STEP_NS)
            if self.scheduler.has_work:
                before = [request.state for request in self.requests]
                batch = self.scheduler.schedule((step + 1) * STEP_NS)  # a time of 0 means never
                yield batch, before
                self.scheduler.complete(batch, (step + 2) * STEP_NS)
            step += 1
            assert step < 10_000, "no end in sight"

    def _submit(self, at: int, prompt: int, most: int, abort_after: int | None, handle: int) -> None:
        info = RequestInfo(
            handle, f"req-{handle}", at, prompt, most, TENANTS[handle % 3], TENANT_SOURCES[handle % 3], handle % 4
        )
        request = Request(info, ([handle % 2] * 20 + [2] * 40)[:prompt])
        try:
            self.scheduler.add(request)
        except RequestRejected:
            return
        self.requests.append(request)
        if abort_after is not None:
            self._aborts.append((at + abort_after, request))


@given(cases(any_policy=True))
def test_a_step_keeps_within_budget_slots_and_blocks(case: Case) -> None:
    run, config = Run(case), case.config
    for batch, _ in run.steps():
        held = [block for request in run.requests for block in request.blocks]
        assert sum(batch.num_tokens) == batch.prefill_tokens + batch.decode_tokens <= config.max_num_batched_tokens
        assert len(batch.requests) <= len(run.scheduler.running) == batch.running <= config.max_num_seqs
        assert len(set(held)) == batch.kv_used <= config.kv_blocks - batch.kv_cached
        assert config.prefix_caching or len(held) == len(set(held))
        for request, tokens, start in zip(batch.requests, batch.num_tokens, batch.starts, strict=True):
            need = -(-(start + tokens) // config.block_size)
            assert len(request.blocks) == need or (config.policy == "static" and len(request.blocks) > need)
        assert all(not request.blocks for request in run.scheduler.waiting)


@given(cases(any_policy=True))
def test_a_batch_has_work_as_long_as_there_is_a_request(case: Case) -> None:
    run = Run(case)
    for batch, _ in run.steps():
        assert batch is not None
        assert batch.requests
        assert all(tokens >= 1 for tokens in batch.num_tokens)
        assert len(set(batch.requests)) == len(batch.requests)


@given(cases(any_policy=True))
def test_everybody_ends_with_its_tokens_and_without_blocks(case: Case) -> None:
    run = Run(case)
    joined: list[Request] = []
    batches = []
    for batch, _ in run.steps():
        batches.append(batch)
        joined += batch.joined
    left = [pair for batch in batches for pair in batch.left]
    assert run.scheduler.blocks.used_blocks == 0
    assert not run.scheduler.has_work
    for request in run.requests:
        ended = request.finish_reason
        assert ended in (FinishReason.LENGTH, FinishReason.ABORT)
        assert len(request.token_times_ns) == request.output_tokens <= request.info.max_tokens
        if ended is FinishReason.LENGTH:
            assert request.output_tokens == request.info.max_tokens
            assert (request.info.handle, FinishReason.LENGTH) in left
    assert len(left) == len(set(left))
    assert [request for request in joined if request in run.requests] == joined
    assert run.scheduler.blocks.free_blocks == case.config.kv_blocks


@given(cases(aborts=False))
def test_requests_are_admitted_in_the_order_of_their_arrival(case: Case) -> None:
    run = Run(case)
    for batch, before in run.steps():
        if batch.preempted:
            continue
        admitted = [
            request for request, state in zip(run.requests, before, strict=True)
            if state is not RequestState.RUNNING and request.state is RequestState.RUNNING
        ]  # fmt: skip
        waiting = list(run.scheduler.waiting)
        passed = [request for request in waiting if any(request.info.handle < one.info.handle for one in admitted)]
        assert passed == []
        assert [one.info.handle for one in batch.requests if one in admitted] == [one.info.handle for one in admitted]
    first_scheduled = [request.scheduled_ns for request in run.requests]
    assert first_scheduled == sorted(first_scheduled)


@given(cases())
def test_the_latest_admitted_is_preempted_and_nobody_enters_in_that_step(case: Case) -> None:
    run = Run(case)
    order: list[int] = []  # handles of who runs, in the order of admission
    for batch, before in run.steps():
        gone = {handle for handle, _ in batch.left} | {
            request.info.handle for request in run.requests if request.finish_reason is not None
        }
        order = [handle for handle in order if handle not in gone]
        victims = [handle for handle, _ in batch.preempted]
        assert victims == order[len(order) - len(victims) :][::-1]
        order = order[: len(order) - len(victims)]
        for victim, taker in batch.preempted:
            assert taker in order or taker == victim
            (request,) = (one for one in run.requests if one.info.handle == victim)
            assert (request.computed_tokens, request.blocks) == (0, [])
            assert request not in batch.requests
        entered = [
            request.info.handle for request, state in zip(run.requests, before, strict=True)
            if state is not RequestState.RUNNING and request.state is RequestState.RUNNING
        ]  # fmt: skip
        assert not (victims and entered)
        order += [request.info.handle for request in batch.requests if request.info.handle in entered]
        assert [request.info.handle for request in run.scheduler.running] == order


@given(cases())
def test_why_a_request_waits_is_what_it_lacks(case: Case) -> None:
    """Recomputed from the state of the engine alone, not from what the scheduler remembers."""
    run, config = Run(case), case.config
    told: dict[int, tuple[int, int]] = {}
    for batch, _ in run.steps():
        told |= {handle: (reason, lacking) for handle, reason, lacking in batch.waits}
        running, waiting = run.scheduler.running, list(run.scheduler.waiting)
        slots = config.max_num_seqs - len(running)
        budget = config.max_num_batched_tokens - sum(batch.num_tokens)
        free = config.kv_blocks - sum(len(request.blocks) for request in run.requests)
        free -= int(config.watermark * config.kv_blocks) if running else 0
        for request in waiting:
            reason, _ = told[request.info.handle]
            tokens = request.info.prompt_tokens + request.output_tokens
            lacks = {
                WaitReason.SLOTS: slots <= 0,
                WaitReason.BUDGET: budget <= 0 or (not config.chunked_prefill and tokens > budget),
                WaitReason.KV: -(-tokens // config.block_size) > free,
            }
            if any(lacks.values()):
                assert reason == next(one for one, true in lacks.items() if true)
            else:
                assert reason == WaitReason.HEAD
                assert request is not waiting[0]
        for request in running:
            told.pop(request.info.handle, None)


@given(cases())
def test_chunks_are_as_large_as_budget_allows_and_whole_without_chunked_prefill(case: Case) -> None:
    run = Run(case)
    for batch, _ in run.steps():
        budget = case.config.max_num_batched_tokens
        for request, tokens, start in zip(batch.requests, batch.num_tokens, batch.starts, strict=True):
            rest = request.info.prompt_tokens + request.output_tokens - start
            assert tokens == min(rest, budget)
            assert case.config.chunked_prefill or tokens == rest
            budget -= tokens


@given(cases())
def test_a_token_is_sampled_when_the_context_is_complete(case: Case) -> None:
    run = Run(case)
    for batch, _ in run.steps():
        for request, tokens, start, samples in zip(
            batch.requests, batch.num_tokens, batch.starts, batch.samples, strict=True
        ):
            assert samples == (start + tokens == request.info.prompt_tokens + request.output_tokens)
        decodes = {request.info.handle for request in batch.requests} - {handle for handle, _ in batch.chunks}
        assert batch.decode_tokens == len(decodes)
        assert batch.prefill_tokens == sum(tokens for _, tokens in batch.chunks)


@pytest.mark.parametrize(
    ("chunked", "prompt", "most", "says"),
    [
        (True, 0, 1, "at least 1 token"),
        (True, 1, 0, "at least 1 token"),
        (True, 60, 5, "raise kv_blocks"),
        (False, 30, 3, "turn chunked_prefill on"),
    ],
)
def test_a_request_that_could_never_run_is_rejected_and_leaves_no_trace(
    chunked: bool, prompt: int, most: int, says: str
) -> None:
    config = EngineConfig(block_size=4, kv_blocks=16, max_num_batched_tokens=32, chunked_prefill=chunked)
    scheduler = Scheduler(config)
    with pytest.raises(RequestRejected, match=says):
        scheduler.add(Request(RequestInfo(0, "req-0", 0, prompt, most)))
    assert not scheduler.has_work
    assert scheduler.schedule(0) is None
    accepted = Request(RequestInfo(1, "req-1", 0, 5, 5))
    scheduler.add(accepted)
    batch = scheduler.schedule(0)
    assert (batch.joined, batch.left, batch.requests) == ([accepted], [], [accepted])


def test_aborting_twice_is_told_once_and_frees_the_blocks() -> None:
    scheduler = Scheduler(EngineConfig())
    gone, stays = (Request(RequestInfo(handle, f"req-{handle}", 0, 20, 5)) for handle in range(2))
    scheduler.add(gone)
    scheduler.add(stays)
    scheduler.complete(scheduler.schedule(0), STEP_NS)
    scheduler.abort(gone, FinishReason.TIMEOUT, STEP_NS)
    scheduler.abort(gone, FinishReason.ABORT, STEP_NS)
    assert gone.blocks == []
    batch = scheduler.schedule(2 * STEP_NS)
    assert batch.left == [(0, FinishReason.TIMEOUT)]
    assert batch.requests == [stays]


def test_a_request_aborted_while_its_step_runs_gets_no_token() -> None:
    scheduler = Scheduler(EngineConfig())
    request = Request(RequestInfo(0, "req-0", 0, 20, 5))
    scheduler.add(request)
    batch = scheduler.schedule(0)
    scheduler.abort(request, FinishReason.ABORT, 1)
    assert scheduler.complete(batch, STEP_NS) == []
    assert (request.output_tokens, request.finish_reason) == (0, FinishReason.ABORT)


def test_who_stops_ends_before_its_limit() -> None:
    scheduler = Scheduler(EngineConfig())
    request = Request(RequestInfo(0, "req-0", 0, 20, 5))
    scheduler.add(request)
    batch = scheduler.schedule(0)
    assert scheduler.complete(batch, STEP_NS, stopped=[request]) == [request]
    assert batch.left == [(0, FinishReason.STOP)]
    assert not scheduler.has_work


@pytest.mark.parametrize("policy", ["fcfs", "prefill_first", "priority", "fair"])
def test_thousands_of_requests_with_cancels_and_quotas_leave_no_block_behind(policy: str) -> None:
    """The soak of the benchmarks, smaller and in virtual time: it exits with 1 where anything leaks or starves."""
    soak = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    command = [sys.executable, str(soak), "--executor", "virtual", "--requests", "2000", "--policy", policy]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "blocks that did not come back: 0" in run.stdout
