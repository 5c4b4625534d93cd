"""Records a run of the real scheduler and engine in virtual time, and notes each batch by itself for comparison.

The encoder here writes one span a line, so that tests can drop, repeat and damage single spans.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import orjson
from hypothesis import strategies as st

from stallscope.trace import Trace, batches, read_trace
from stallscope_engine.config import POLICIES, PREEMPTION, EngineConfig
from stallscope_engine.engine import Engine, StepResult, VirtualClock
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch, RequestRejected
from stallscope_telemetry import names, spans
from stallscope_telemetry.records import FinishReason, RequestInfo, RequestRecord, RequestState, StepRecord, WaitReason

START_NS = 1_790_000_000_000_000_000
Doing = tuple[str, int, int, str | None, str | None]  # phase, tokens, context, reason, holder
Batches = dict[int, dict[str, Doing]]


@dataclass(frozen=True)
class Arrival:
    """A request of a workload; ``abort_after`` steps from its arrival on it is aborted (None: never)."""

    gap_ns: int
    prompt_tokens: int
    max_tokens: int
    tenant: str
    abort_after: int | None = None
    stop_after: int = 0


@dataclass(frozen=True)
class Workload:
    """What to run; the run ends after ``steps`` steps at the latest."""

    config: EngineConfig
    arrivals: Sequence[Arrival]
    keyframe_every: int
    steps: int


@dataclass(eq=False)
class Recording:
    """What the run recorded, and (``truth``) what each step did, noted independently of telemetry."""

    config: EngineConfig
    steps: list[StepRecord] = field(default_factory=list)
    ended: list[RequestRecord] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    truth: Batches = field(default_factory=dict)

    def step_lines(self, replica: str = "r0") -> list[bytes]:
        return [
            line(replica, self.config, names.STEP_SPAN, one.scheduled_ns, one.ready_ns, spans.step_attributes(one, 0))
            for one in self.steps
        ]

    def request_lines(self, replica: str = "r0") -> list[bytes]:
        return [
            line(
                replica,
                self.config,
                names.REQUEST_SPAN,
                one.info.arrival_ns,
                one.end_ns,
                spans.request_attributes(one),
                one.info.trace_id,
            )
            for one in self.ended
        ]

    def lines(self, replica: str = "r0") -> list[bytes]:
        return [*self.step_lines(replica), *self.request_lines(replica)]


def line(
    replica: str, config: EngineConfig, name: str, start: int, end: int, attributes: spans.Attributes, trace_id: int = 0
) -> bytes:
    """One TracesData with one span."""
    resource: spans.Attributes = {
        names.REPLICA: replica,
        names.MODEL: config.model,
        names.BLOCK_SIZE: config.block_size,
        names.KV_TOTAL: config.kv_blocks,
        names.MAX_NUM_BATCHED_TOKENS: config.max_num_batched_tokens,
        names.CHUNKED_PREFILL: config.chunked_prefill,
        names.WATERMARK: config.watermark,
        names.ASYNC_SCHEDULING: config.async_scheduling,
    }
    span = {
        "traceId": f"{trace_id or 1:032x}",
        "name": name,
        "startTimeUnixNano": str(start),
        "endTimeUnixNano": str(end),
        "attributes": key_values(attributes),
    }
    scope_spans = [{"scope": {"name": names.SCOPE}, "spans": [span]}]
    return orjson.dumps(
        {"resourceSpans": [{"resource": {"attributes": key_values(resource)}, "scopeSpans": scope_spans}]}
    )


def key_values(attributes: spans.Attributes) -> list[dict[str, object]]:
    return [{"key": key, "value": any_value(value)} for key, value in attributes.items()]


def any_value(value: spans.Value) -> dict[str, object]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case str():
            return {"stringValue": value}
    return {"arrayValue": {"values": [any_value(item) for item in value]}}


@dataclass(eq=False)
class _NotingExecutor:
    """Lets time pass by the size of the batch, and notes from the requests themselves what they do."""

    clock: VirtualClock
    recording: Recording
    engine: Engine | None = None
    computed: dict[str, int] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    steps: dict[int, int] = field(default_factory=dict)  # by identity of the batch
    owners: dict[str, dict[int, str]] = field(default_factory=dict)  # of tokens thrown away: who took their blocks

    def dispatch(self, batch: Batch) -> None:
        assert self.engine is not None
        by_handle = {request.info.handle: request.info.request_id for request in self.recording.requests}
        takers = {by_handle[handle]: by_handle[taker] for handle, taker in batch.preempted}
        for victim, taker in takers.items():
            self.owners.setdefault(victim, {}).update(dict.fromkeys(range(self.computed[victim]), taker))
            self.computed[victim] = 0
            self.owners[victim][-1] = taker  # of its wait
        doing: dict[str, Doing] = {}
        self.ran -= takers.keys()
        for request, tokens, start, samples in zip(
            batch.requests, batch.num_tokens, batch.starts, batch.samples, strict=True
        ):
            name = request.info.request_id
            owner = self.owners.get(name, {})
            output = request.output_tokens + request.pending_tokens - samples  # before this step
            prefills = request.info.prompt_tokens + output - start > 1 or output == 0 or name not in self.ran
            holder = owner.get(start) if prefills else None
            doing[name] = ("prefill" if prefills else "decode", tokens, start, None, holder)
            for position in range(start, start + tokens):
                owner.pop(position, None)
            self.computed[name] = start + tokens
        for handle, _ in batch.paused:
            doing[by_handle[handle]] = ("paused", 0, self.computed[by_handle[handle]], None, None)
        for request in self.engine.scheduler.waiting:
            name = request.info.request_id
            assert request.wait_reason is not None
            reason = WaitReason(request.wait_reason).name.lower()
            if request.state is RequestState.PREEMPTED:
                doing[name] = ("preempted", 0, 0, reason, self.owners[name][-1])
            else:
                doing[name] = ("waiting", 0, 0, reason, None)
        self.ran = {request.info.request_id for request in self.engine.scheduler.running}
        self.recording.truth[self.engine.steps] = doing
        self.steps[id(batch)] = self.engine.steps
        self.clock.wait_until(self.clock.now_ns() + 1_000_000 + 10_000 * sum(batch.num_tokens))

    def collect(self, batch: Batch) -> StepResult:
        """What a step decodes for a request that the step before it ended counts for nothing."""
        for request, start in zip(batch.requests, batch.starts, strict=True):
            if request.finish_reason is not None:
                doing = self.recording.truth[self.steps[id(batch)]]
                doing[request.info.request_id] = ("paused", 0, start, None, None)
        return StepResult()


@dataclass(eq=False)
class _Recorder:
    recording: Recording
    keyframe_every: int

    def wants_keyframe(self, step: int) -> bool:
        return step % self.keyframe_every == 0

    def step(self, record: StepRecord) -> None:
        self.recording.steps.append(record)

    def request(self, record: RequestRecord) -> None:
        self.recording.ended.append(record)


def run(workload: Workload) -> Recording:
    """Runs a workload to its end, or to its last step."""
    recording = Recording(workload.config)
    clock = VirtualClock(START_NS)
    executor = _NotingExecutor(clock, recording)
    engine = Engine(workload.config, executor, clock, _Recorder(recording, workload.keyframe_every))
    executor.engine = engine
    aborts: list[tuple[int, Request]] = []
    time_ns, pending = START_NS, []
    for handle, arrival in enumerate(workload.arrivals):
        time_ns += arrival.gap_ns
        info = RequestInfo(
            handle, f"req-{handle}", time_ns, arrival.prompt_tokens, arrival.max_tokens, arrival.tenant, trace_id=handle
        )
        prompt = [handle % 3] * 20 + [4] * 40  # three beginnings that others have had before
        request = Request(info, prompt[: arrival.prompt_tokens], stop_after=arrival.stop_after)
        pending.append((request, arrival.abort_after))
    pending.reverse()
    while engine.steps < workload.steps and (pending or engine.has_work):
        while pending and pending[-1][0].info.arrival_ns <= clock.now_ns():
            request, abort_after = pending.pop()
            try:
                engine.submit(request)
            except RequestRejected:
                continue
            recording.requests.append(request)
            if abort_after is not None:
                aborts.append((engine.steps + abort_after, request))
        for at, request in aborts:
            if at <= engine.steps and request.finish_reason is None:
                engine.abort(request, FinishReason.ABORT)
        if engine.has_work:
            engine.step()
        elif pending:
            clock.wait_until(pending[-1][0].info.arrival_ns)
    engine.drain()
    return recording


@st.composite
def workloads(draw: st.DrawFn, most_requests: int = 14) -> Workload:
    """Small engines of every policy under pressure: few blocks (preemptions), few slots, aborts."""
    chunked = draw(st.booleans())
    config = EngineConfig(
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 40)) if chunked else draw(st.integers(30, 80)),
        chunked_prefill=chunked,
        block_size=draw(st.sampled_from([1, 4, 16])),
        kv_blocks=draw(st.integers(4, 40)),
        watermark=draw(st.sampled_from([0.0, 0.1])),
        prefix_caching=draw(st.booleans()),
        policy=draw(st.sampled_from(["fcfs", *POLICIES])),
        preemption=draw(st.sampled_from(PREEMPTION)),
        tenant_kv_share=draw(st.sampled_from([1.0, 0.6])),
        tenant_token_share=draw(st.sampled_from([1.0, 0.5])),
        async_scheduling=draw(st.booleans()),
    )
    arrival = st.builds(
        Arrival,
        gap_ns=st.sampled_from([0, 0, 300_000, 2_000_000, 30_000_000]),
        prompt_tokens=st.integers(1, 60),
        max_tokens=st.integers(1, 20),
        tenant=st.sampled_from(["", "chat", "batch"]),
        abort_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
        stop_after=st.sampled_from([0, 0, 3]),
    )
    arrivals = draw(st.lists(arrival, min_size=1, max_size=most_requests))
    return Workload(config, arrivals, draw(st.integers(1, 40)), draw(st.sampled_from([7, 40, 10_000])))


def as_batches(trace: Trace, replica: str = "r0") -> Batches:
    """What the trace says each step did, in the form of ``Recording.truth``."""
    found: Batches = {row["step"]: {} for row in trace.steps.to_pylist() if row["replica"] == replica}
    for row in batches(trace, replica).to_pylist():
        doing = (row["phase"], row["tokens"], row["context"], row["reason"], row["holder"])
        assert found[row["step"]].setdefault(row["request"], doing) is doing
    return found


def share_of_batches(trace: Trace, recording: Recording, replica: str = "r0") -> float:
    """Of what requests really computed in steps, the share that the trace says so: phase and tokens."""
    found = as_batches(trace, replica)
    real = [
        found[step].get(request, ("", 0))[:2] == (phase, tokens)
        for step, doing in recording.truth.items()
        for request, (phase, tokens, *_) in doing.items()
        if phase in ("prefill", "decode")
    ]
    return sum(real) / len(real)


def write(path: Path, lines: Iterable[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for one example of a property test."""
    with TemporaryDirectory() as path:
        yield Path(path)


def read(lines: Sequence[bytes]) -> Trace:
    with folder() as path:
        return read_trace(write(path / "t.otlp.jsonl", lines))


def steady(
    requests: int = 1,
    output: int = 6,
    keyframe_every: int = 4,
    kv_blocks: int = 64,
    max_num_batched_tokens: int = 2048,
) -> Recording:
    """Requests of 8 prompt tokens that arrive at once, in an engine with blocks of 4."""
    arrivals = [Arrival(0, 8, output, f"t{number}") for number in range(requests)]
    config = EngineConfig(block_size=4, kv_blocks=kv_blocks, max_num_batched_tokens=max_num_batched_tokens)
    return run(Workload(config, arrivals, keyframe_every, 10_000))
