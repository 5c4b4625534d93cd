"""Small runs for the tests of the diagnosis: the bundled engine in virtual time, at random or by a script."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pandas as pd

from stallscope.diagnosis.replica import Replica, replicas
from stallscope.trace import Trace
from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, StepResult, VirtualClock
from stallscope_engine.policies.fcfs import FirstComeFirstServed
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch, RequestRejected, Scheduler
from stallscope_telemetry.records import FinishReason, RequestInfo, RequestRecord, StepRecord, WaitReason
from tests.trace.recording import START_NS, Arrival, Recording, Workload

MS = 1_000_000
Host = Callable[[Engine, str], None]  # is told the moment of a step
# Reasons that the bundled scheduler never gives, in place of HEAD, so that every rule is met.
OTHER_REASONS = (
    WaitReason.HEAD,
    WaitReason.HEAD,
    WaitReason.QUOTA,
    WaitReason.PRIORITY,
    WaitReason.GRAMMAR,
    WaitReason.REMOTE_KV,
    WaitReason.ADAPTER,
    WaitReason.ENCODER,
)


@dataclass(eq=False)
class RandomRun:
    """A recording and, noted from the scheduler itself, who stood at the head of the queue in each step."""

    recording: Recording
    heads: dict[int, str] = field(default_factory=dict)


@dataclass(eq=False)
class _LateClock(VirtualClock):
    """Wakes up later than asked for, as real timers do; ``advance`` is exact."""

    rng: random.Random

    def __post_init__(self) -> None:
        super().__init__(START_NS)

    def wait_until(self, time_ns: int) -> None:
        super().wait_until(time_ns + self.rng.choice([0, 0, self.rng.randrange(2 * MS)]))

    def advance(self, length_ns: float) -> None:
        super().wait_until(self.now_ns() + int(length_ns))


@dataclass(eq=False)
class _RandomTime:
    """Executor, recorder and host of a run: lets random time pass, notes heads, and renames some reasons to wait."""

    run: RandomRun
    clock: _LateClock
    rng: random.Random
    keyframe_every: int
    aborts: list[tuple[Request, int]]
    engine: Engine | None = None

    def before_step(self) -> None:
        if self.rng.random() < 0.05:
            self.clock.advance(self.rng.randrange(60 * MS))

    def after_step(self, finished: list[Request]) -> None:
        assert self.engine is not None
        if self.rng.random() < 0.1:
            self.clock.advance(self.rng.randrange(10 * MS))
        scheduler = self.engine.scheduler
        present = {*scheduler.waiting, *scheduler.running}
        self.aborts = [(request, left - (request in present)) for request, left in self.aborts]
        for request, left in self.aborts:
            if left < 0 and request in present:
                self.engine.abort(request, FinishReason.ABORT)

    def before_dispatch(self, batch: Batch) -> None:
        assert self.engine is not None
        if self.engine.scheduler.waiting:
            self.run.heads[self.engine.steps] = next(iter(self.engine.scheduler.waiting)).info.request_id
        self.clock.advance(self.rng.randrange(MS // 5) if self.rng.random() < 0.95 else self.rng.randrange(40 * MS))

    def dispatch(self, batch: Batch) -> None:
        work = sum(tokens * (start + tokens) for tokens, start in zip(batch.num_tokens, batch.starts, strict=True))
        cost = MS + 30_000 * batch.prefill_tokens + 150_000 * batch.decode_tokens + 700 * work
        self.clock.advance(cost * self.rng.lognormvariate(0, 0.2) * self.rng.choice([1] * 15 + [10]))

    def collect(self, batch: Batch) -> StepResult:
        return StepResult()

    def wants_keyframe(self, step: int) -> bool:
        return step % self.keyframe_every == 0

    def step(self, record: StepRecord) -> None:
        record.waits = [(handle, self._reason(handle, reason), lacking) for handle, reason, lacking in record.waits]
        self.run.recording.steps.append(record)

    def request(self, record: RequestRecord) -> None:
        self.run.recording.ended.append(record)

    @staticmethod
    def _reason(handle: int, reason: int) -> int:
        return OTHER_REASONS[handle % len(OTHER_REASONS)] if reason == WaitReason.HEAD else reason


def random_workload(rng: random.Random) -> Workload:
    """A crowded engine: too few slots, tokens a step, or KV blocks for what arrives."""
    chunked = rng.random() < 0.6
    block_size = rng.choice([1, 4, 16])
    config = EngineConfig(
        max_num_seqs=rng.choice([1, 3, 16]),
        max_num_batched_tokens=rng.choice([5, 24, 80]) if chunked else rng.choice([40, 80]),
        chunked_prefill=chunked,
        block_size=block_size,
        kv_blocks=rng.choice([60, 100, 1000]) // block_size,
        watermark=rng.choice([0.0, 0.1]),
    )
    arrivals = [
        Arrival(
            gap_ns=rng.choice([0, rng.randrange(5 * MS), rng.randrange(30 * MS)]),
            prompt_tokens=rng.choice([rng.randrange(1, 10), rng.randrange(1, 60)]),
            max_tokens=rng.randrange(1, 25),
            tenant=rng.choice(["", "chat", "batch", "chat"]),
            abort_after=rng.choice([None, None, None, rng.randrange(12)]),
        )
        for _ in range(rng.randrange(1, 16))
    ]
    return Workload(config, arrivals, rng.randrange(1, 30), rng.choice([20, 10_000]))


def random_run(seed: int) -> RandomRun:
    """A random workload in random time."""
    rng = random.Random(seed)
    return run_randomly(random_workload(rng), rng)


def run_randomly(workload: Workload, rng: random.Random) -> RandomRun:
    """Runs a workload with random durations; what the engine would reject is left out."""
    clock = _LateClock(rng)
    run = RandomRun(Recording(workload.config))
    time_ns, requests, aborts = START_NS, [], []
    for handle, arrival in enumerate(workload.arrivals):
        time_ns += arrival.gap_ns
        request = _request(handle, time_ns, arrival)
        if _fits(workload.config, request):
            requests.append(request)
            if arrival.abort_after is not None:
                aborts.append((request, arrival.abort_after))
    host = _RandomTime(run, clock, rng, workload.keyframe_every, aborts)
    host.engine = Engine(workload.config, host, clock, host, host.before_dispatch)
    until_ns = START_NS + 4 * MS * workload.steps if workload.steps < 1000 else None
    host.engine.run(requests, until_ns, before_step=host.before_step, after_step=host.after_step)
    run.recording.requests = requests
    return run


def _request(handle: int, time_ns: int, arrival: Arrival) -> Request:
    name, tenant = f"req-{handle}", arrival.tenant
    return Request(RequestInfo(handle, name, time_ns, arrival.prompt_tokens, arrival.max_tokens, tenant))


def _fits(config: EngineConfig, request: Request) -> bool:
    try:
        Scheduler(config).add(request)
    except RequestRejected:
        return False
    return True


@dataclass(eq=False)
class _Scripted:
    """Executor, recorder and host of a run without noise; ``host`` may do something at each moment of a step."""

    clock: VirtualClock
    recording: Recording
    host: Host | None
    instead_of_slots: WaitReason
    engine: Engine | None = None

    def at(self, moment: str) -> None:
        if self.host is not None and self.engine is not None:
            self.host(self.engine, moment)

    def dispatch(self, batch: Batch) -> None:
        self.clock.wait_until(self.clock.now_ns() + MS + 1_000 * batch.prefill_tokens + 100_000 * batch.decode_tokens)
        self.at("in step")

    def collect(self, batch: Batch) -> StepResult:
        return StepResult()

    def wants_keyframe(self, step: int) -> bool:
        return step % 50 == 0

    def step(self, record: StepRecord) -> None:
        record.waits = [(handle, self._reason(reason), lacking) for handle, reason, lacking in record.waits]
        if record.keyframe is not None:
            record.keyframe = [
                one if one.wait_reason is None else replace(one, wait_reason=self._reason(one.wait_reason))
                for one in record.keyframe
            ]
        self.recording.steps.append(record)

    def request(self, record: RequestRecord) -> None:
        self.recording.ended.append(record)

    def _reason(self, reason: int) -> WaitReason:
        return self.instead_of_slots if reason == WaitReason.SLOTS else WaitReason(reason)


class Held(FirstComeFirstServed):
    """Admits nobody while it is ``held``; who waits lacks a slot."""

    held = False

    @property
    def closed(self) -> bool:
        return self.held

    def compose(self, scheduler: Scheduler, batch: Batch) -> None:
        scheduler.go_on(batch)
        if not self.held:
            scheduler.admit(batch)


def held_between(first_ms: int, last_ms: int) -> Host:
    """Nobody is admitted between these times."""

    def host(engine: Engine, moment: str) -> None:
        policy = engine.scheduler.policy
        if not isinstance(policy, Held):
            engine.scheduler.policy = policy = Held(engine.config)
        now_ns = engine.clock.now_ns()
        policy.held = START_NS + first_ms * MS <= now_ns < START_NS + last_ms * MS
        if policy.held and moment == "before step" and not engine.scheduler.running:
            engine.clock.wait_until(now_ns + MS)  # an engine that looks again and again

    return host


def scripted_lines(
    requests: Sequence[tuple[str, int, int, int]],
    host: Host | None = None,
    config: EngineConfig | None = None,
    instead_of_slots: WaitReason = WaitReason.SLOTS,
) -> list[bytes]:
    """The spans of a run whose steps take 1 ms, 1 us more a prefill token and 100 us more a decode.

    ``requests``: tenant, arrival in ms, prompt tokens, output tokens; each is named by its position. ``host`` is called
    "before step", "before dispatch", "in step" and "after step". Who lacks a slot waits for what is said
    ``instead_of_slots``.
    """
    clock = VirtualClock(START_NS)
    script = _Scripted(clock, Recording(config or EngineConfig()), host, instead_of_slots)
    script.engine = Engine(script.recording.config, script, clock, script, lambda _: script.at("before dispatch"))
    infos = (
        RequestInfo(code, str(code), START_NS + at_ms * MS, prompt, output, tenant)
        for code, (tenant, at_ms, prompt, output) in enumerate(requests)
    )
    script.engine.run(
        [Request(info) for info in infos],
        before_step=lambda: script.at("before step"),
        after_step=lambda _: script.at("after step"),
    )
    return script.recording.lines()


def only_replica(trace: Trace) -> Replica:
    (replica,) = replicas(trace)
    return replica


class Wait(NamedTuple):
    """A stretch of a request's life (times in ns), as a row of ``all_waits``."""

    query: int
    request: int
    begin: int
    end: int


def all_waits(replica: Replica) -> pd.DataFrame:
    """Queries for every whole life, time to first token and single gap of a replica's requests."""
    requests, gaps = replica.requests, replica.gaps
    life = pd.DataFrame({"request": requests.index, "begin": requests["arrival"], "end": requests["seen_until"]})
    answered = requests[requests["first_token"] >= 0]
    ttft = pd.DataFrame({"request": answered.index, "begin": answered["arrival"], "end": answered["first_token"]})
    single = gaps[gaps["count"] == 1]
    gap = pd.DataFrame(
        {"request": single["request"], "begin": single["start"], "end": single["start"] + single["length_ns"]}
    )
    queries = pd.concat([life, ttft, gap], ignore_index=True).astype("int64")
    queries.insert(0, "query", queries.index.to_numpy())
    return queries


def each(queries: pd.DataFrame) -> list[Wait]:
    return [Wait(*row) for row in queries[list(Wait._fields)].to_numpy().tolist()]
