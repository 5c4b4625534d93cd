"""Each policy does what its name promises, on the engine's own clockless scheduler."""

from collections.abc import Callable, Sequence

import pytest

from stallscope_engine.config import POLICIES, EngineConfig
from stallscope_engine.policies import BY_NAME
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch, RequestRejected, Scheduler
from stallscope_telemetry.records import RequestInfo, WaitReason


def make(handle: int, prompt: int, most: int, tenant: str = "", priority: int = 0, source: str = "api_key") -> Request:
    return Request(RequestInfo(handle, f"r{handle}", handle, prompt, most, tenant, source, priority))


def run(scheduler: Scheduler, steps: int, each: Callable[[int, Batch], None] = lambda step, batch: None) -> list[Batch]:
    """Runs up to ``steps`` steps; ``each`` sees a batch before it is completed."""
    batches = []
    for step in range(1, steps + 1):
        if (batch := scheduler.schedule(step)) is None:
            break
        each(step, batch)
        batches.append(batch)
        scheduler.complete(batch, step)
    return batches


def start(config: EngineConfig, requests: Sequence[Request]) -> Scheduler:
    scheduler = Scheduler(config)
    for request in requests:
        scheduler.add(request)
    return scheduler


def handles(batch: Batch) -> list[int]:
    return [request.info.handle for request in batch.requests]


def reasons(scheduler: Scheduler) -> dict[int, WaitReason | None]:
    return {request.info.handle: request.wait_reason for request in scheduler.waiting}


def test_every_policy_of_the_configuration_exists() -> None:
    assert tuple(BY_NAME) == POLICIES


# --- prefill first ------------------------------------------------------------------------------------------------


def test_prefill_first_lets_decodes_stand_still_while_a_prompt_is_unfinished() -> None:
    config = EngineConfig(policy="prefill_first", max_num_batched_tokens=32)
    scheduler = start(config, [make(1, 8, 20)])
    run(scheduler, 2)
    scheduler.add(make(2, 80, 5))
    batches = run(scheduler, 4)
    assert [handles(batch) for batch in batches] == [[2], [2], [2], [1, 2]]
    assert [batch.paused for batch in batches] == [[(1, 0)], [(1, 0)], [(1, 0)], []]


def test_prefill_first_retracts_who_made_the_fewest_tokens_to_the_end_of_the_queue() -> None:
    config = EngineConfig(policy="prefill_first", block_size=1, kv_blocks=64)
    older, newer = make(1, 10, 50), make(2, 10, 50)
    scheduler = start(config, [older])
    run(scheduler, 14)
    scheduler.add(newer)
    scheduler.policy._share = 0.0  # the expectation has decayed: SGLang admits on what is seen
    batches = run(scheduler, 40)
    assert [victim for batch in batches for victim, _ in batch.preempted] == [2]
    assert older.preemptions == 0


def test_prefill_first_expects_part_of_max_tokens_before_it_admits() -> None:
    config = EngineConfig(policy="prefill_first", block_size=1, kv_blocks=100)
    scheduler = start(config, [make(1, 10, 60), make(2, 10, 60)])
    run(scheduler, 1)
    assert reasons(scheduler) == {2: WaitReason.KV}  # 10 + 0.7 * 60 twice, though 80 blocks are free


# --- static batches -----------------------------------------------------------------------------------------------


def test_nobody_joins_a_static_batch_until_its_last_request_is_done() -> None:
    config = EngineConfig(policy="static", max_num_seqs=2)
    scheduler = start(config, [make(1, 8, 3), make(2, 8, 9), make(3, 8, 2)])
    batches = run(scheduler, 11)
    assert [len(batch.requests) for batch in batches] == [2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert handles(batches[9]) == [3]


def test_a_static_batch_reserves_its_longest_answers() -> None:
    config = EngineConfig(policy="static", block_size=1, kv_blocks=100)
    scheduler = start(config, [make(handle, 10, 40) for handle in range(1, 4)])
    batch = run(scheduler, 1)[0]
    assert (len(batch.requests), batch.kv_used) == (2, 100)
    assert reasons(scheduler) == {3: WaitReason.SLOTS}


def test_a_static_batch_fills_over_several_steps_before_it_decodes() -> None:
    config = EngineConfig(policy="static", max_num_seqs=4, max_num_batched_tokens=16)
    scheduler = start(config, [make(handle, 16, 4) for handle in range(1, 6)])
    batches = run(scheduler, 6)
    assert [handles(batch) for batch in batches[:4]] == [[1], [2], [3], [4]]
    assert [batch.decode_tokens for batch in batches] == [0, 0, 0, 0, 4, 4]


# --- shortest remaining, priority -----------------------------------------------------------------------------------


def test_the_shortest_is_admitted_first_and_a_long_prompt_yields_its_chunks() -> None:
    config = EngineConfig(policy="shortest_remaining", max_num_batched_tokens=32)
    scheduler = start(config, [make(1, 200, 5)])
    run(scheduler, 1)
    scheduler.add(make(2, 60, 5))
    scheduler.add(make(3, 10, 5))
    assert [batch.chunks for batch in run(scheduler, 3)] == [[(3, 10), (2, 22)], [(2, 31)], [(2, 7), (1, 24)]]


def test_priority_admits_and_preempts_by_importance() -> None:
    config = EngineConfig(policy="priority", max_num_seqs=2, block_size=1, kv_blocks=60)
    low, high, mid = make(1, 10, 30, priority=9), make(2, 10, 40, priority=0), make(3, 10, 5, priority=5)
    scheduler = start(config, [low, mid, high])
    batches = run(scheduler, 60)
    assert handles(batches[0]) == [2, 3]
    assert low.scheduled_ns > mid.scheduled_ns
    assert {victim for batch in batches for victim, _ in batch.preempted} <= {1}
    assert all(request.finish_reason is not None for request in (low, mid, high))


def test_who_waits_behind_a_more_important_head_is_told_so() -> None:
    config = EngineConfig(policy="priority", block_size=1, kv_blocks=100)
    scheduler = start(config, [make(1, 50, 50, priority=1)])
    run(scheduler, 1)
    scheduler.add(make(2, 90, 5, priority=0))
    scheduler.add(make(3, 5, 5, priority=1))
    run(scheduler, 1)
    assert reasons(scheduler) == {2: WaitReason.KV, 3: WaitReason.PRIORITY}


# --- fairness -----------------------------------------------------------------------------------------------------


def served(batches: Sequence[Batch]) -> dict[str, int]:
    """Decode tokens by tenant."""
    tokens: dict[str, int] = {}
    for batch in batches:
        chunked = {handle for handle, _ in batch.chunks}
        for request in batch.requests:
            tokens[request.info.tenant] = tokens.get(request.info.tenant, 0) + (request.info.handle not in chunked)
    return tokens


@pytest.mark.parametrize(("policy", "least"), [("fair", 0.8), ("fcfs", 0.0)])
def test_a_flood_of_one_tenant_does_not_starve_another_under_fair_queueing(policy: str, least: float) -> None:
    config = EngineConfig(policy=policy, max_num_seqs=4)
    flood = [make(handle, 16, 20, "flood") for handle in range(1, 101)]
    few = [make(handle, 16, 20, "chat") for handle in range(101, 141)]
    batches = run(start(config, flood + few), 400)
    tokens = served(batches)
    ratio = tokens.get("chat", 0) / tokens["flood"]
    assert ratio >= least
    if policy == "fcfs":
        assert ratio < 0.1


def test_a_tenant_that_was_away_saves_up_no_credit() -> None:
    config = EngineConfig(policy="fair", max_num_seqs=1)
    scheduler = start(config, [make(handle, 10, 10, "busy") for handle in range(1, 40)])
    run(scheduler, 200)
    for handle in range(100, 140):
        scheduler.add(make(handle, 10, 10, "back"))
    tokens = served(run(scheduler, 120))
    assert abs(tokens["busy"] - tokens["back"]) <= 20


def test_claimed_tenants_share_one_account() -> None:
    config = EngineConfig(policy="fair", max_num_seqs=1)
    honest = [make(handle, 10, 10, "chat") for handle in range(1, 40)]
    many_names = [make(handle, 10, 10, f"name-{handle}", source="claim:user") for handle in range(40, 80)]
    tokens = served(run(start(config, honest + many_names), 300))
    claimed = sum(count for tenant, count in tokens.items() if tenant != "chat")
    assert abs(claimed - tokens["chat"]) <= 20


# --- quotas and thresholds ------------------------------------------------------------------------------------------


def test_a_tenant_over_its_kv_share_waits_and_lets_others_pass() -> None:
    config = EngineConfig(block_size=1, kv_blocks=100, tenant_kv_share=0.5)
    requests = [make(1, 40, 5, "big"), make(2, 40, 5, "big"), make(3, 20, 5, "chat")]
    scheduler = start(config, requests)
    (batch,) = run(scheduler, 1)
    assert handles(batch) == [1, 3]
    assert reasons(scheduler) == {2: WaitReason.QUOTA}
    assert requests[1].lacking == 30


def test_a_claimed_tenant_has_no_quota() -> None:
    config = EngineConfig(block_size=1, kv_blocks=100, tenant_kv_share=0.5)
    scheduler = start(config, [make(handle, 40, 5, "big", source="claim:header") for handle in (1, 2)])
    assert handles(run(scheduler, 1)[0]) == [1, 2]


def test_a_request_larger_than_its_tenants_share_is_rejected_in_one_line() -> None:
    scheduler = Scheduler(EngineConfig(block_size=1, kv_blocks=100, tenant_kv_share=0.5))
    with pytest.raises(RequestRejected, match=r"60 tokens do not fit the 50 that tenant big may hold"):
        scheduler.add(make(1, 50, 10, "big"))


def test_a_tenants_prompts_take_their_share_of_a_step() -> None:
    config = EngineConfig(max_num_batched_tokens=100, tenant_token_share=0.5)
    scheduler = start(config, [make(1, 300, 5, "big"), make(2, 300, 5, "big"), make(3, 40, 5, "chat")])
    batch = run(scheduler, 1)[0]
    assert batch.chunks == [(1, 50), (3, 40)]
    assert reasons(scheduler) == {2: WaitReason.QUOTA}


def test_without_chunks_a_prompt_beyond_the_share_goes_alone() -> None:
    config = EngineConfig(max_num_batched_tokens=100, chunked_prefill=False, tenant_token_share=0.3)
    scheduler = start(config, [make(1, 60, 5, "big"), make(2, 30, 5, "big"), make(3, 20, 5, "chat")])
    batches = run(scheduler, 2)
    assert [batch.chunks for batch in batches] == [[(1, 60), (3, 20)], [(2, 30)]]


def test_a_long_prompt_takes_no_more_than_the_threshold_of_a_step() -> None:
    config = EngineConfig(max_num_batched_tokens=100, long_prefill_token_threshold=30)
    batches = run(start(config, [make(1, 80, 5), make(2, 20, 5)]), 3)
    assert [batch.chunks for batch in batches] == [[(1, 30), (2, 20)], [(1, 30)], [(1, 20)]]


# --- preemption ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preemption", "victim"), [("latest", 2), ("least_work", 1)])
def test_who_loses_its_blocks_is_the_latest_or_who_has_computed_least(preemption: str, victim: int) -> None:
    config = EngineConfig(block_size=1, kv_blocks=40, preemption=preemption)
    scheduler = start(config, [make(1, 4, 30), make(2, 30, 8)])
    batches = run(scheduler, 6)
    assert next(pair for batch in batches for pair in batch.preempted)[0] == victim


# --- prefix caching, as the scheduler uses it -------------------------------------------------------------------------


def test_a_prompt_seen_before_is_computed_from_its_first_new_block() -> None:
    scheduler = Scheduler(EngineConfig(prefix_caching=True, block_size=4, kv_blocks=20))
    first = Request(RequestInfo(1, "r1", 0, 10, 2), [5] * 10)
    again = Request(RequestInfo(2, "r2", 0, 12, 2), [5] * 12)
    scheduler.add(first)
    run(scheduler, 5)
    scheduler.add(again)
    (batch,) = run(scheduler, 1)
    assert (batch.starts, batch.num_tokens, batch.cached) == ([8], [4], [(2, 8)])
    assert again.cached_tokens == 8


def test_evictions_name_who_took_and_whose_they_were() -> None:
    scheduler = Scheduler(EngineConfig(prefix_caching=True, block_size=4, kv_blocks=6))
    scheduler.add(Request(RequestInfo(1, "r1", 0, 16, 1), [5] * 16))
    run(scheduler, 3)
    scheduler.add(Request(RequestInfo(2, "r2", 0, 20, 1), [6] * 20))
    (batch,) = run(scheduler, 1)
    assert batch.evicted == [(2, 1, 3)]
    assert batch.kv_cached == 1


def test_a_preempted_request_finds_what_is_left_of_its_blocks() -> None:
    config = EngineConfig(prefix_caching=True, block_size=4, kv_blocks=10)
    one, other = (Request(RequestInfo(n, f"r{n}", n, 16, 12), [n] * 16) for n in (1, 2))
    scheduler = start(config, [one, other])
    batches = run(scheduler, 60)
    assert other.preemptions == 1
    (readmission,) = [pair for batch in batches for pair in batch.cached]
    assert readmission[0] == 2
    assert readmission[1] >= 4
    assert one.output_tokens == other.output_tokens == 12


# --- asynchronous scheduling -----------------------------------------------------------------------------------------


def test_the_next_step_is_scheduled_before_the_last_one_is_done() -> None:
    scheduler = start(EngineConfig(async_scheduling=True), [make(1, 20, 3)])
    first, second, third = scheduler.schedule(1), scheduler.schedule(2), scheduler.schedule(3)
    assert first is not None
    assert second is not None
    assert third is not None
    assert [first.starts, second.starts, third.starts] == [[0], [20], [21]]
    assert scheduler.schedule(4) is None  # its last token is in flight
    assert scheduler.complete(first, 5) == scheduler.complete(second, 6) == []
    assert [request.info.handle for request in scheduler.complete(third, 7)] == [1]
    assert scheduler.blocks.used_blocks == 0


def test_who_stops_while_its_next_step_is_in_flight_is_told_by_that_step_and_its_token_does_not_count() -> None:
    request = make(1, 20, 10)
    scheduler = start(EngineConfig(async_scheduling=True), [request])
    first, second = scheduler.schedule(1), scheduler.schedule(2)
    assert first is not None
    assert second is not None
    assert scheduler.complete(first, 3, stopped=[request]) == [request]
    assert scheduler.complete(second, 4) == []
    assert (first.left, second.left) == ([], [(1, 0)])
    assert (second.decode_tokens, second.size, second.paused) == (0, 0, [(1, 0)])
    assert request.output_tokens == 1


def test_what_a_failed_step_would_have_computed_is_computed_again() -> None:
    config = EngineConfig(async_scheduling=True, prefix_caching=True, block_size=4)
    request = Request(RequestInfo(1, "r1", 0, 20, 4), [5] * 20)
    scheduler = start(config, [request])
    assert scheduler.schedule(1) is not None
    assert scheduler.schedule(2) is not None
    scheduler.lose_in_flight()
    assert (request.computed_tokens, request.pending_tokens) == (0, 0)
    assert scheduler.blocks.match(Request(RequestInfo(2, "r2", 0, 21, 1), [5] * 21)) == []
    again = scheduler.schedule(3)
    assert again is not None
    assert (again.starts, again.num_tokens) == ([0], [20])
