"""Soak: many requests of many tenants with cancels, timeouts, preemptions and quotas; does anything leak or starve?

    soak.py                         20,000 requests on the torch executor, with prefix caching and overlapped steps
    soak.py --executor virtual --policy fair

Prints, every tenth of the way, what is free and how much memory the process holds, and at the end: blocks that did not
come back, requests that were never answered, the longest wait for a first token beside the median (starvation: somebody
waits while those who came later are served), and the growth of memory after the first fifth, when all caches are warm.
Exits with 1 if blocks are missing, somebody was not answered, or was passed over by more than half of all requests.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import resource
import statistics
import sys
from bisect import bisect, insort
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from stallscope_engine.config import POLICIES, EngineConfig
from stallscope_engine.engine import Clock, Engine, Executor, VirtualClock, WallClock
from stallscope_engine.executors.virtual import VirtualExecutor, cost_for
from stallscope_engine.request import Request
from stallscope_engine.scheduler import RequestRejected
from stallscope_telemetry.records import FinishReason, RequestInfo

TENANTS = 50
IN_SYSTEM = 64  # requests that wait or run; a new one comes when one ends
CANCEL_SHARE = 0.1
PREFIXES = 20  # beginnings that prompts share


def resident_mib() -> float:
    """Memory that the process holds now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:  # no /proc: the most it ever held
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def arrivals(count: int, seed: int) -> Iterator[tuple[Request, int]]:
    """Requests, and the steps after which each is cancelled (0: never)."""
    draw = random.Random(seed)
    beginnings = [[draw.randrange(3, 1000) for _ in range(64)] for _ in range(PREFIXES)]
    for handle in range(1, count + 1):
        own = [draw.randrange(3, 1000) for _ in range(draw.choice((1, 8, 40, 200)))]
        prompt = (beginnings[draw.randrange(PREFIXES)] if draw.random() < 0.5 else []) + own
        most = draw.randint(1, 24)
        tenant = f"tenant-{draw.randrange(TENANTS)}"
        source = "api_key" if draw.random() < 0.8 else "claim:user"
        info = RequestInfo(handle, f"r{handle}", 0, len(prompt), most, tenant, source, draw.randrange(3))
        cancel_after = draw.randint(1, 20) if draw.random() < CANCEL_SHARE else 0
        yield Request(info, prompt, stop_after=draw.choice((0, 0, 5))), cancel_after


def make_engine(arguments: argparse.Namespace) -> Engine:
    config = EngineConfig(
        max_num_seqs=32,
        max_num_batched_tokens=512,
        kv_blocks=96,  # less than half of what 32 requests want: preemptions
        prefix_caching=True,
        policy=arguments.policy,
        tenant_kv_share=0.5,
        tenant_token_share=0.5,
        async_scheduling=True,
    )
    clock: Clock
    executor: Executor
    if arguments.executor == "virtual":
        clock = VirtualClock(0)
        executor = VirtualExecutor(clock, cost_for("tiny-llama"), arguments.seed)
    else:
        import torch

        from stallscope_engine.executors.torch_cpu import TorchExecutor

        torch.set_num_threads(os.cpu_count() or 1)
        clock, executor = WallClock(), TorchExecutor(config, "tiny-llama")
    return Engine(config, executor, clock)


class Soak:
    """Keeps ``IN_SYSTEM`` requests in an engine until all of ``coming`` have had their end."""

    def __init__(self, engine: Engine, coming: Iterator[tuple[Request, int]]) -> None:
        self.engine = engine
        self.outcomes = dict.fromkeys(("stop", "length", "abort", "rejected"), 0)
        self.waits_s: list[float] = []
        self.overtaken: list[int] = []  # by how many that came later, when its first token came
        self.preemptions = 0
        self.steps = 0
        self._coming = coming
        self._in_system: set[Request] = set()
        self._cancels: list[tuple[int, Request]] = []
        self._answered: list[int] = []  # handles with a first token, ascending

    @property
    def done(self) -> int:
        return sum(self.outcomes.values())

    def step(self) -> bool:
        """One step of the engine, with what its clients do before; False when nobody is left."""
        self._fill()
        self._cancel()
        waiting = [request for request in self._in_system if not request.output_tokens]
        for request in self.engine.step():
            self._end(request, "stop" if request.finish_reason is FinishReason.STOP else "length")
        for request in waiting:
            if request.output_tokens:
                self.waits_s.append((request.token_times_ns[0] - request.info.arrival_ns) / 1e9)
                self.overtaken.append(len(self._answered) - bisect(self._answered, request.info.handle))
        for request in waiting:
            if request.output_tokens:
                insort(self._answered, request.info.handle)
        self.steps += 1
        return bool(self._in_system)

    def _fill(self) -> None:
        while len(self._in_system) < IN_SYSTEM and (pair := next(self._coming, None)) is not None:
            request, cancel_after = pair
            request.info = replace(request.info, arrival_ns=self.engine.clock.now_ns())
            try:
                self.engine.submit(request)
            except RequestRejected:
                self._end(request, "rejected")
                continue
            self._in_system.add(request)
            if cancel_after:
                self._cancels.append((self.steps + cancel_after, request))

    def _cancel(self) -> None:
        due = [request for at, request in self._cancels if at <= self.steps]
        self._cancels = [(at, request) for at, request in self._cancels if at > self.steps]
        for request in due:
            if request in self._in_system:
                self.engine.abort(request, FinishReason.ABORT)
                if request.finish_reason is FinishReason.ABORT:
                    self._end(request, "abort")

    def _end(self, request: Request, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self.preemptions += request.preemptions
        self._in_system.discard(request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--executor", choices=("torch", "virtual"), default="torch")
    parser.add_argument("--policy", choices=POLICIES, default="fcfs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    engine = make_engine(arguments)
    free_at_start = engine.scheduler.blocks.free_blocks
    soak = Soak(engine, arrivals(arguments.requests, arguments.seed))
    memory: list[float] = []
    print(f"{'done':>8}{'steps':>10}{'free blocks':>13}{'resident MiB':>14}", flush=True)
    while soak.step():
        if soak.done // (arguments.requests // 10) > len(memory):
            gc.collect()
            memory.append(resident_mib())
            free = engine.scheduler.blocks.free_blocks
            print(f"{soak.done:8,}{soak.steps:10,}{free:13,}{memory[-1]:14.1f}", flush=True)
    leaked = free_at_start - engine.scheduler.blocks.free_blocks
    unanswered = arguments.requests - soak.done
    outcomes = ", ".join(f"{count:,} {name}" for name, count in soak.outcomes.items())
    print(f"\n{outcomes}; {soak.preemptions:,} preemptions")
    print(f"blocks that did not come back: {leaked} of {free_at_start}")
    print(f"requests without an end: {unanswered}")
    print(
        f"wait for the first token: median {statistics.median(soak.waits_s):.3f} s, longest {max(soak.waits_s):.3f} s; "
        f"overtaken by {max(soak.overtaken):,} later requests at most"
    )
    print(f"memory since the first fifth: {memory[-1] - memory[1]:+.1f} MiB")
    if leaked or unanswered or max(soak.overtaken) > arguments.requests // 2:
        sys.exit(1)


if __name__ == "__main__":
    main()
