"""The benchmark's own schedulers: each does what it says, and no engine elsewhere knows it."""

from __future__ import annotations

import pytest

from stallscope.bench.policies import SKIPPING, registered
from stallscope_engine.config import EngineConfig
from stallscope_engine.policies import BY_NAME
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch, Scheduler
from stallscope_telemetry.records import RequestInfo

S = 1_000_000_000


def ask(handle: int, prompt: int, output: int = 5, arrival_s: float = 0) -> Request:
    return Request(RequestInfo(handle, f"r-{handle}", round(arrival_s * S), prompt, output, "chat"))


def scheduler(policy: str, **settings: int) -> Scheduler:
    with registered():
        return Scheduler(EngineConfig(policy=policy, **settings))  # type: ignore[arg-type]


def step(of: Scheduler) -> list[int]:
    """Handles of the next batch, which is completed at once."""
    batch = of.schedule(0)
    assert isinstance(batch, Batch)
    of.complete(batch, 0)
    return [request.info.handle for request in batch.requests]


def test_the_shortest_prompt_goes_first_unless_another_has_waited_for_its_length() -> None:
    queue = scheduler("shortest_prompt_aged", max_num_seqs=1)
    for request in (ask(1, 900), ask(2, 100, arrival_s=0.1), ask(3, 100, arrival_s=0.9)):
        queue.add(request)
    assert [request.info.handle for request in queue.waiting] == [2, 1, 3]


def test_two_queues_never_mix_and_take_turns() -> None:
    queues = scheduler("two_queues")
    for handle in (1, 2):
        queues.add(ask(handle, 100))
    assert step(queues) == [1, 2]
    queues.add(ask(3, 100))
    assert step(queues) == [1, 2]
    assert step(queues) == [3]
    assert step(queues) == [1, 2, 3]


def test_two_queues_go_on_with_one_where_the_other_is_empty() -> None:
    queues = scheduler("two_queues", max_num_batched_tokens=60)
    queues.add(ask(1, 100, 3))
    assert [step(queues) for _ in range(4)] == [[1]] * 4
    assert not queues.has_work


def test_who_does_not_fit_is_passed_over_and_waits_on() -> None:
    skipping, strict = (scheduler(policy, kv_blocks=20) for policy in (SKIPPING, "fcfs"))
    for queue in (skipping, strict):
        for request in (ask(1, 100), ask(2, 250), ask(3, 50)):
            queue.add(request)
    assert step(skipping) == [1, 3]
    assert [request.info.handle for request in skipping.waiting] == [2]
    assert step(strict) == [1]


def test_no_engine_knows_them_outside() -> None:
    assert SKIPPING not in BY_NAME
    with pytest.raises(ValueError, match="policy must be one of"):
        EngineConfig(policy="two_queues")
