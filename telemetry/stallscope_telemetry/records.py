"""Plain records that an engine's thread hands over: what a request is, what a step did, and what a GPU said then.

Nothing here touches OpenTelemetry: a record costs an allocation, and becomes a span in the background
(``spans``). All times are int nanoseconds since the Unix epoch, all durations int nanoseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum


class WaitReason(IntEnum):
    """Why a request that waits was not admitted in a step (the order is part of the contract)."""

    STEP = 0  # arrived while a step was in flight; never written, since a reader derives it from the arrival
    BUDGET = 1  # lacks tokens of the step's budget
    KV = 2  # lacks KV blocks
    SLOTS = 3  # lacks a sequence slot
    HEAD = 4  # would fit by itself, but the head of the queue does not
    QUOTA = 5
    PRIORITY = 6
    GRAMMAR = 7
    REMOTE_KV = 8
    ADAPTER = 9
    ENCODER = 10


class FinishReason(IntEnum):
    """How a request ended. STOP and LENGTH end with a step's output, the others before the step that says so."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    TIMEOUT = 3
    ERROR = 4


class RequestState(IntEnum):
    """Where a request stands in a keyframe (or when it joins: always WAITING)."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2  # waits again after losing its blocks


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """What never changes about a request, known when it arrives.

    ``handle`` is unique in the life of a replica's process and small: step spans name requests by it.
    ``tenant`` is "" when nobody said. ``tenant_source`` says who did ("scenario", "api_key", "claim:user", ...).
    ``trace_id`` and ``parent_span_id`` are those of the caller's traceparent (0 without one).
    """

    handle: int
    request_id: str
    arrival_ns: int
    prompt_tokens: int
    max_tokens: int
    tenant: str = ""
    tenant_source: str = ""
    priority: int = 0
    session: str = ""
    predecessor: str = ""
    retry_of: str = ""
    trace_id: int = 0
    parent_span_id: int = 0


@dataclass(frozen=True, slots=True)
class RequestSnapshot:
    """A request as a keyframe shows it: after this step's admissions and preemptions, before its tokens."""

    info: RequestInfo
    state: RequestState
    computed_tokens: int
    output_tokens: int
    cached_tokens: int
    blocks: int
    wait_reason: WaitReason | None = None
    lacking: int = 0


@dataclass(slots=True)
class StepRecord:
    """One engine iteration, closed when its own outputs were ready.

    Handles in pairs and triples are those of ``RequestInfo``. A request that runs, is not in ``chunks`` and not
    in ``decodes`` takes exactly one decode token. Fields that end in ``_ns`` are times or durations in ns.
    """

    step: int
    scheduled_ns: int  # the scheduler began to choose this batch
    dispatched_ns: int  # the batch went to the executor
    ready_ns: int  # its outputs were there
    idle_ns: int  # of the time before ``scheduled_ns``: the engine had no request at all
    sched_ns: int  # time the scheduler took
    device_ns: int  # time on the device, -1 where not measured
    prefill_tokens: int
    decode_tokens: int
    batch_size: int
    running: int
    waiting: int
    kv_used: int
    kv_cached: int
    joined: Sequence[RequestInfo] = ()  # considered by the scheduler for the first time
    cached: Sequence[tuple[int, int]] = ()  # (handle, tokens): admitted with so many found in the prefix cache
    chunks: Sequence[tuple[int, int]] = ()  # (handle, prefill tokens); recomputed tokens are prefill
    decodes: Sequence[tuple[int, int]] = ()  # (handle, tokens): running requests that take none or several
    waits: Sequence[tuple[int, int, int]] = ()  # (handle, WaitReason, lacking): changes only
    preempted: Sequence[tuple[int, int]] = ()  # (handle, handle of the request that took the blocks)
    evicted: Sequence[tuple[int, int, int]] = ()  # (handle that took them, handle of the last holder, cached blocks)
    left: Sequence[tuple[int, int]] = ()  # (handle, FinishReason)
    keyframe: Sequence[RequestSnapshot] | None = None  # everybody, when this step is a keyframe


@dataclass(slots=True)
class RequestRecord:
    """A request that ended. ``token_times_ns`` holds one time an output token (several may share one).

    ``scheduled_ns``, ``first_token_ns`` are 0 where it did not get so far. ``events`` are (name, time) pairs:
    queued, scheduled, first_token, preempted, resumed, finished. ``prefix`` is the same number for prompts that begin
    with the same block, 0 where unknown.
    """

    info: RequestInfo
    queued_ns: int
    scheduled_ns: int
    first_token_ns: int
    end_ns: int
    delivered_ns: int
    cached_tokens: int
    preemptions: int
    finish_reason: FinishReason
    token_times_ns: Sequence[int] = field(default_factory=list)
    events: Sequence[tuple[str, int]] = ()
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class GpuSample:
    """What a GPU said at one time; None is what it doesn't have, or what may not be read.

    ``device`` is its UUID (or that of a MIG instance). ``utilization`` is the share, in [0, 1], of the driver's last
    sample period in which a kernel ran. ``throttle`` names the reasons why clocks are below their most; empty: none.
    """

    device: str
    time_ns: int
    utilization: float | None = None
    sm_clock_mhz: int | None = None
    mem_clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    memory_used_bytes: int | None = None
    throttle: Sequence[str] | None = None
