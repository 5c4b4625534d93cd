"""Steps of vLLM's scheduler with and without the hook, timed. Runs in vLLM's environment, started by ``vllm_hook``.

    vllm_steps.py CASES.json      (a list of {running, waiting, asynchronous, passes, steps})

Prints a line of JSON first for what importing the hook takes, then one for each pass, bare and hooked in turns.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks.vllm_scheduler import Room, made_up, make_request, make_scheduler, who_samples

BUDGET = 8192  # tokens a step
BLOCKS_EACH = 64  # KV blocks for each that runs: enough
FORWARD_S = 0.002  # a step's forward pass, in which the engine's thread waits and others get Python's lock


@dataclass(slots=True)
class Case:
    """So many run, and so many wait, at any time: who ends is followed by another request."""

    running: int
    waiting: int
    asynchronous: bool
    passes: int
    steps: int


class Stopwatch:
    """Adds up the thread's processor time within it, in ns."""

    def __init__(self) -> None:
        self.cpu_ns = 0

    def __enter__(self) -> None:
        self._start_ns = time.thread_time_ns()

    def __exit__(self, *_: object) -> None:
        self.cpu_ns += time.thread_time_ns() - self._start_ns


class OwnTime:
    """Processor time of this thread in the hook's own methods, in ns, without what looking at the clock takes."""

    METHODS = ("joined", "aborted", "preempted", "scheduled", "delivered")

    def __init__(self) -> None:
        self.ns = 0

    def watch(self, hook: Any) -> None:
        for name in self.METHODS:
            setattr(hook, name, self.timed(getattr(hook, name)))

    def timed(self, call: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object) -> None:
            start = time.thread_time_ns()
            call(*args)
            end = time.thread_time_ns()
            self.ns += end - start - (time.thread_time_ns() - end)

        return timed


class Traffic:
    """Prompts of 32 to 512 tokens, answers of 16 to 128, eight tenants; the same again for each pass.

    Requests are kept to the end of a pass: else it would be the hook that has the last hold of one, and takes the time
    that vLLM takes without it to clear them away.
    """

    def __init__(self) -> None:
        self._draw = random.Random(0)
        self._made: list[Any] = []

    def next(self) -> Any:
        draw = self._draw
        prompt = [draw.randrange(3, 1000) for _ in range(draw.randint(32, 512))]
        name = f"cmpl-{draw.getrandbits(128):032x}-0"
        self._made.append(make_request(name, prompt, draw.randint(16, 128), f"tenant-{draw.randrange(8)}"))
        return self._made[-1]


def serve(case: Case, kind: Any, trace: Path | None) -> dict[str, Any]:
    """One pass; a ``trace`` is of a scheduler with the hook. Times are in microseconds a step."""
    gc.collect()
    gc.freeze()  # as vLLM's engine does when it has started
    room = Room(slots=case.running, tokens=BUDGET, blocks=case.running * BLOCKS_EACH)
    scheduler = make_scheduler(kind, room, asynchronous=case.asynchronous)
    traffic, watch, own = Traffic(), Stopwatch(), OwnTime()
    if trace is not None:
        scheduler.record_to(trace)
        own.watch(scheduler._watch)
    in_flight: deque[tuple[Any, list[bool]]] = deque()
    is_full, steps, present = False, 0, 0
    while steps < case.steps:
        joining = [traffic.next() for _ in range(case.running + case.waiting - present)]
        present += len(joining)
        with watch:
            for request in joining:
                scheduler.add_request(request)
            output = scheduler.schedule()
        was_full = len(scheduler.running) == case.running  # before who ends with this step makes room
        in_flight.append((output, who_samples(scheduler, output)))
        time.sleep(FORWARD_S)
        if len(in_flight) > case.asynchronous:
            output, samples = in_flight.popleft()
            said = made_up(output, samples, lambda: 7)
            with watch:
                outputs = scheduler.update_from_output(output, said)
            present -= sum(one.finish_reason is not None for client in outputs.values() for one in client.outputs)
        steps += is_full
        if not is_full and was_full:  # from the next one on it counts
            is_full, watch, own.ns = True, Stopwatch(), 0
    waits = len(scheduler.waiting)
    dropped = scheduler._watch._emitter.dropped if trace is not None else 0
    scheduler.shutdown()
    return {
        "cpu_us": watch.cpu_ns / 1e3 / steps,
        "hook_us": own.ns / 1e3 / steps,
        "waiting": waits,
        "dropped": dropped,
        "bytes": trace.stat().st_size / steps if trace is not None else 0,
    }


def main() -> None:
    cases = [Case(**one) for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    start = time.perf_counter()
    from stallscope_telemetry.vllm import StallscopeAsyncScheduler, StallscopeScheduler

    print(json.dumps({"import_ms": (time.perf_counter() - start) * 1e3}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for place, case in enumerate(cases):
            bare, hooked = (
                (AsyncScheduler, StallscopeAsyncScheduler) if case.asynchronous else (Scheduler, StallscopeScheduler)
            )
            for turn in range(2 * case.passes):
                is_hooked = turn % 4 in (1, 2)  # bare, hooked, hooked, bare: what drifts meets both
                trace = Path(folder) / f"{place}-{turn}.otlp.jsonl.gz" if is_hooked else None
                found = serve(case, hooked if is_hooked else bare, trace)
                print(json.dumps({"case": place, "hooked": is_hooked, **found}), flush=True)


if __name__ == "__main__":
    main()
