"""Records to spans: which attributes a step, a request or a GPU sample carries, and nothing of how they travel.

The inverse lives in ``stallscope.trace.decode``; ``names`` gives the meaning of each attribute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from stallscope_telemetry import names
from stallscope_telemetry.records import (
    FinishReason,
    GpuSample,
    RequestInfo,
    RequestRecord,
    RequestSnapshot,
    RequestState,
    StepRecord,
)

Value = int | str | bool | float | list[int] | list[str]
Attributes = dict[str, Value]


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What a replica is and is set to: the Resource of its spans, and all that a replay needs."""

    replica: str
    model: str
    engine_version: str
    executor: str  # what runs the batches, e.g. torch or virtual
    block_size: int  # tokens
    total_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    chunked_prefill: bool
    policy: str = "fcfs"
    watermark: float = 0.0  # share of blocks kept free at admission
    prefix_caching: bool = False
    async_scheduling: bool = False
    preemption: str = "latest"
    long_prefill_token_threshold: int = 0
    tenant_kv_share: float = 1.0
    tenant_token_share: float = 1.0
    service_name: str = "stallscope-engine"
    engine: str = "stallscope"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    group: str = ""  # replicas that serve the same model together; "" where there is none
    rank: int = 0
    role: str = "both"  # prefill, decode or both


def resource_attributes(engine: EngineDescription) -> Attributes:
    """Attributes of the Resource that all spans of a replica share."""
    attributes: Attributes = {
        names.SERVICE_NAME: engine.service_name,
        names.REPLICA: engine.replica,
        names.RANK: engine.rank,
        names.ROLE: engine.role,
        names.MODEL: engine.model,
        names.ENGINE: engine.engine,
        names.ENGINE_VERSION: engine.engine_version,
        names.EXECUTOR: engine.executor,
        names.POLICY: engine.policy,
        names.BLOCK_SIZE: engine.block_size,
        names.KV_TOTAL: engine.total_blocks,
        names.MAX_NUM_SEQS: engine.max_num_seqs,
        names.MAX_NUM_BATCHED_TOKENS: engine.max_num_batched_tokens,
        names.CHUNKED_PREFILL: engine.chunked_prefill,
        names.WATERMARK: float(engine.watermark),
        names.PREFIX_CACHING: engine.prefix_caching,
        names.ASYNC_SCHEDULING: engine.async_scheduling,
        names.PREEMPTION: engine.preemption,
        names.LONG_PREFILL_THRESHOLD: engine.long_prefill_token_threshold,
        names.TENANT_KV_SHARE: float(engine.tenant_kv_share),
        names.TENANT_TOKEN_SHARE: float(engine.tenant_token_share),
        names.TENSOR_PARALLEL: engine.tensor_parallel,
        names.PIPELINE_PARALLEL: engine.pipeline_parallel,
        names.DATA_PARALLEL: engine.data_parallel,
    }
    if engine.group:
        attributes[names.GROUP] = engine.group
    return attributes


def step_attributes(record: StepRecord, dropped: int) -> Attributes:
    """Attributes of a step span; ``dropped`` counts the records lost so far. Empty parts are left out."""
    attributes: Attributes = {
        names.STEP: record.step,
        names.DISPATCH_DELAY: record.dispatched_ns - record.scheduled_ns,
        names.SCHED: record.sched_ns,
        names.PREFILL_TOKENS: record.prefill_tokens,
        names.DECODE_TOKENS: record.decode_tokens,
        names.BATCH_SIZE: record.batch_size,
        names.RUNNING: record.running,
        names.WAITING: record.waiting,
        names.KV_USED: record.kv_used,
    }
    if record.idle_ns:
        attributes[names.IDLE] = record.idle_ns
    if record.device_ns >= 0:
        attributes[names.DEVICE] = record.device_ns
    if record.kv_cached:
        attributes[names.KV_CACHED] = record.kv_cached
    if dropped:
        attributes[names.DROPPED] = dropped
    if record.keyframe is not None:
        attributes[names.KEYFRAME] = True
        _describe_requests(attributes, [snapshot.info for snapshot in record.keyframe], record.scheduled_ns)
        _describe_states(attributes, record.keyframe)
    elif record.joined:
        _describe_requests(attributes, record.joined, record.scheduled_ns)
    for name, groups in (
        (names.CACHED, record.cached),
        (names.CHUNKS, record.chunks),
        (names.DECODES, record.decodes),
        (names.WAITS, record.waits),
        (names.PREEMPTED, record.preempted),
        (names.EVICTED, record.evicted),
        (names.LEFT, record.left),
    ):
        if groups:
            attributes[name] = [int(value) for value in chain.from_iterable(groups)]
    return attributes


def _describe_requests(attributes: Attributes, infos: Sequence[RequestInfo], scheduled_ns: int) -> None:
    """One entry a request in each ``stallscope.request.*`` array; arrays that would say nothing are left out."""
    attributes[names.R_HANDLE] = [info.handle for info in infos]
    attributes[names.R_ID] = [_text(info.request_id) for info in infos]
    attributes[names.R_TENANT] = [_text(info.tenant) for info in infos]
    attributes[names.R_SOURCE] = [_text(info.tenant_source) for info in infos]
    attributes[names.R_AGE] = [scheduled_ns - info.arrival_ns for info in infos]
    attributes[names.R_PROMPT] = [info.prompt_tokens for info in infos]
    attributes[names.R_MAX] = [info.max_tokens for info in infos]
    _put_integers(attributes, names.R_PRIORITY, (info.priority for info in infos))
    _put_strings(attributes, names.R_TRACE, (f"{info.trace_id:032x}" if info.trace_id else "" for info in infos))
    _put_strings(attributes, names.R_SESSION, (_text(info.session) for info in infos))
    _put_strings(attributes, names.R_PREDECESSOR, (_text(info.predecessor) for info in infos))
    _put_strings(attributes, names.R_RETRY_OF, (_text(info.retry_of) for info in infos))


def _describe_states(attributes: Attributes, snapshots: Sequence[RequestSnapshot]) -> None:
    """What a keyframe adds: how far everybody is. Waiting reasons come as ``stallscope.wait`` for all who wait."""
    _put_integers(attributes, names.R_STATE, (int(snapshot.state) for snapshot in snapshots))
    _put_integers(attributes, names.R_COMPUTED, (snapshot.computed_tokens for snapshot in snapshots))
    _put_integers(attributes, names.R_OUTPUT, (snapshot.output_tokens for snapshot in snapshots))
    _put_integers(attributes, names.R_CACHED, (snapshot.cached_tokens for snapshot in snapshots))
    _put_integers(attributes, names.R_BLOCKS, (snapshot.blocks for snapshot in snapshots))
    waits = [
        (snapshot.info.handle, int(snapshot.wait_reason or 0), snapshot.lacking)
        for snapshot in snapshots
        if snapshot.state is not RequestState.RUNNING
    ]
    if waits:
        attributes[names.R_WAITS] = list(chain.from_iterable(waits))


def _put_integers(attributes: Attributes, name: str, values: Iterable[int]) -> None:
    listed = list(values)
    if any(listed):
        attributes[name] = listed


def _put_strings(attributes: Attributes, name: str, values: Iterable[str]) -> None:
    listed = list(values)
    if any(listed):
        attributes[name] = listed


def _text(value: str) -> str:
    """``value`` as it can be encoded: a lone surrogate in a client's string would cost the array, or the file line."""
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def request_attributes(record: RequestRecord) -> Attributes:
    """Attributes of a request span, made when the request has ended."""
    info = record.info
    arrival_ns = info.arrival_ns
    attributes: Attributes = {
        names.REQUEST_ID: _text(info.request_id),
        names.HANDLE: info.handle,
        names.USAGE_PROMPT: info.prompt_tokens,
        names.USAGE_COMPLETION: len(record.token_times_ns),
        names.REQUEST_MAX_TOKENS: info.max_tokens,
        names.LATENCY_E2E: (record.end_ns - arrival_ns) / 1e9,
        names.FINISH_REASON: FinishReason(record.finish_reason).name.lower(),
    }
    if record.queued_ns:
        attributes[names.QUEUED] = record.queued_ns - arrival_ns
    if record.scheduled_ns:
        attributes[names.SCHEDULED] = record.scheduled_ns - arrival_ns
        attributes[names.LATENCY_QUEUE] = (record.scheduled_ns - arrival_ns) / 1e9
    if record.first_token_ns:
        attributes[names.LATENCY_TTFT] = (record.first_token_ns - arrival_ns) / 1e9
    if record.delivered_ns > record.end_ns:
        attributes[names.DELIVERED] = record.delivered_ns - record.end_ns
    if info.tenant:
        attributes[names.TENANT] = _text(info.tenant)
        attributes[names.TENANT_SOURCE] = _text(info.tenant_source)
    optional: tuple[tuple[str, int | str], ...] = (
        (names.PRIORITY, info.priority),
        (names.CACHED_TOKENS, record.cached_tokens),
        (names.PREFIX, record.prefix),
        (names.PREEMPTIONS, record.preemptions),
        (names.SESSION, _text(info.session)),
        (names.PREDECESSOR, _text(info.predecessor)),
        (names.RETRY_OF, _text(info.retry_of)),
    )
    attributes.update({name: value for name, value in optional if value})
    times = record.token_times_ns
    if times:
        gaps = [times[0] - arrival_ns, *(later - sooner for sooner, later in pairwise(times))]
        attributes[names.TOKEN_TIMES] = ",".join(map(str, gaps))
    return attributes


def gpu_attributes(sample: GpuSample) -> Attributes:
    """Attributes of a GPU sample's span."""
    throttle = None if sample.throttle is None else "|".join(sample.throttle)
    optional: tuple[tuple[str, Value | None], ...] = (
        (names.GPU_UTILIZATION, sample.utilization),
        (names.GPU_SM_CLOCK, sample.sm_clock_mhz),
        (names.GPU_MEM_CLOCK, sample.mem_clock_mhz),
        (names.GPU_POWER, sample.power_w),
        (names.GPU_TEMPERATURE, sample.temperature_c),
        (names.GPU_MEMORY_USED, sample.memory_used_bytes),
        (names.GPU_THROTTLE, throttle),
    )
    attributes: Attributes = {names.GPU_DEVICE: sample.device}
    attributes.update({name: value for name, value in optional if value is not None})
    return attributes
