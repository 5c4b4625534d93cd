"""A real vLLM scheduler without a model: random requests, made-up outputs, and a trace beside what vLLM itself said.

Runs in vLLM's environment, started by ``test_hook``:

    drive_scheduler.py TRACE LOG.json SEED [--asynchronous] [--policy priority] [--adapters] [--whole-prompts]
                       [--break-at STEP] [--without ATTRIBUTE]

LOG.json holds for each batch vLLM's own ``num_scheduled_tokens`` and what its queues lacked then, the steps of each
request's tokens and how often vLLM preempted it. ``--break-at`` breaks what the hook reads, ``--without`` is a vLLM
whose scheduler has no such attribute: to see that vLLM goes on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict, deque
from itertools import chain
from typing import Any

from vllm.v1.request import Request, RequestStatus

from benchmarks.vllm_scheduler import BLOCK, STOP, Room, made_up, make_request, make_scheduler, who_samples
from stallscope_telemetry.vllm import StallscopeAsyncScheduler, StallscopeScheduler
from stallscope_telemetry.vllm.watch import watch

REQUESTS = 60


class Lacking:
    """A scheduler as another version of vLLM might have it."""

    def __init__(self, scheduler: Any, attribute: str) -> None:
        self._scheduler, self._attribute = scheduler, attribute

    def __getattr__(self, name: str) -> Any:
        if name == self._attribute:
            raise AttributeError(f"'Scheduler' object has no attribute {name!r}")
        return getattr(self._scheduler, name)


def main() -> None:
    chosen = _chosen()
    room = Room(slots=8, tokens=600 if chosen.whole_prompts else 128, blocks=80, adapters=1 if chosen.adapters else 0)
    scheduler = make_scheduler(
        StallscopeAsyncScheduler if chosen.asynchronous else StallscopeScheduler,
        room,
        asynchronous=chosen.asynchronous,
        policy=chosen.policy,
        chunked=not chosen.whole_prompts,
    )
    if chosen.without:
        scheduler._watch = watch(Lacking(scheduler, chosen.without), chosen.trace)
    else:
        scheduler.record_to(chosen.trace)
    rng = random.Random(chosen.seed)
    common = [rng.randrange(3, 1000) for _ in range(64)]
    waiting = [_request(rng, number, common, chosen) for number in range(REQUESTS)]
    batches: list[dict[str, int]] = []
    reasons: list[dict[str, str]] = []
    tokens: dict[str, list[int]] = defaultdict(list)
    preempted: Counter[str] = Counter()
    in_flight: deque[tuple[int, Any, list[bool]]] = deque()

    def complete() -> None:
        step, output, samples = in_flight.popleft()
        said = made_up(output, samples, lambda: STOP if rng.random() < 0.01 else rng.randrange(3, 1000))
        for of_client in scheduler.update_from_output(output, said).values():
            for one in of_client.outputs:
                tokens[one.request_id] += [step] * len(one.new_token_ids)

    while waiting or scheduler.has_unfinished_requests() or in_flight:
        while waiting and rng.random() < 0.4:
            scheduler.add_request(waiting.pop(0))
        alive = [*scheduler.running, *scheduler.waiting]
        if alive and rng.random() < 0.02:
            scheduler.finish_requests(rng.choice(alive).request_id, RequestStatus.FINISHED_ABORTED)
        if alive and rng.random() < 0.005:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        if len(batches) == chosen.break_at:
            scheduler._watch._pool = None
        if scheduler.has_unfinished_requests():
            output = scheduler.schedule()
            preempted.update(output.preempted_req_ids or ())
            in_flight.append((len(batches), output, who_samples(scheduler, output)))
            if output.total_num_scheduled_tokens:
                batches.append(dict(output.num_scheduled_tokens))
                reasons.append(_reasons(scheduler, room, output))
        while in_flight and (len(in_flight) > chosen.asynchronous or not scheduler.has_unfinished_requests()):
            complete()
            if chosen.asynchronous and scheduler.has_unfinished_requests():
                break
    scheduler.shutdown()
    log = {"batches": batches, "reasons": reasons, "tokens": tokens, "preempted": preempted, "blocks": room.blocks - 1}
    with open(chosen.log, "w", encoding="utf-8") as file:
        json.dump(log, file)


def _chosen() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("trace", "log"):
        parser.add_argument(name)
    parser.add_argument("seed", type=int)
    parser.add_argument("--policy", default="fcfs")
    for name in ("--asynchronous", "--adapters", "--whole-prompts"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--break-at", type=int, default=-1)
    parser.add_argument("--without", default="")
    return parser.parse_args()


def _request(rng: random.Random, number: int, common: list[int], chosen: argparse.Namespace) -> Request:
    prompt = [rng.randrange(3, 1000) for _ in range(rng.choice([1, 5, 40, 150, 500]))]
    return make_request(
        f"r{number}",
        [*common, *prompt] if rng.random() < 0.3 else prompt,
        rng.randint(1, 90),
        rng.choice("abc"),
        priority=rng.randrange(3) if chosen.policy == "priority" else 0,
        adapter=rng.randrange(3) if chosen.adapters else 0,
    )


def _reasons(scheduler: Any, room: Room, output: Any) -> dict[str, str]:
    """Why each in vLLM's queues was not in the batch, from all that it has: what the hook finds by looking at few."""
    running = scheduler.running
    budget = room.tokens - output.total_num_scheduled_tokens
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    adapters = {one.lora_request.lora_int_id for one in running if one.lora_request}
    found: dict[str, str] = {}
    is_head = True
    for request in chain(scheduler.kv_holding_waiting, scheduler.waiting):
        adapter = request.lora_request.lora_int_id if request.lora_request else 0
        if len(running) >= room.slots:
            reason = "slots"
        elif budget <= 0 or (not scheduler.scheduler_config.enable_chunked_prefill and request.num_tokens > budget):
            reason = "budget"
        elif adapter and len(adapters) >= room.adapters and adapter not in adapters:
            reason = "adapter"  # vLLM asks the next one instead
        else:
            reason = "kv" if is_head or -(-request.num_tokens // BLOCK) > free else "head"
        is_head = is_head and reason == "adapter"
        found[request.request_id] = reason
    return found


if __name__ == "__main__":
    main()
