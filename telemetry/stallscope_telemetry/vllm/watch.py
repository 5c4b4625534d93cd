"""What a vLLM scheduler does, step by step, as records: read from it right before and after it did so.

Each batch is recorded as it was when it was scheduled, and closed by its own outputs: with asynchronous scheduling the
next one has been scheduled by then. Nothing of vLLM is changed, and nothing that goes wrong here reaches it. Which
cached prefixes are pushed out of the KV cache is not told.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import vllm
from vllm.v1.request import RequestStatus

from stallscope_telemetry.emitter import Emitter
from stallscope_telemetry.files import OtlpFileExporter
from stallscope_telemetry.prefixes import PrefixGroups
from stallscope_telemetry.records import (
    FinishReason,
    RequestInfo,
    RequestRecord,
    RequestSnapshot,
    RequestState,
    StepRecord,
    WaitReason,
)
from stallscope_telemetry.spans import EngineDescription, resource_attributes
from stallscope_telemetry.vllm.settings import exporters, info_of, log, replica_name, tenants_from_environment

_CLOCK_OFFSET_NS = time.time_ns() - time.perf_counter_ns()
_OWN_CONDITIONS = {
    RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR: WaitReason.GRAMMAR,
    RequestStatus.WAITING_FOR_REMOTE_KVS: WaitReason.REMOTE_KV,
}
_FINISH_REASONS = {
    "STOP": FinishReason.STOP,
    "LENGTH": FinishReason.LENGTH,
    "ABORT": FinishReason.ABORT,
    "ERROR": FinishReason.ERROR,
}


def now_ns() -> int:
    """Int ns since the Unix epoch, on a clock that never runs backwards."""
    return time.perf_counter_ns() + _CLOCK_OFFSET_NS


@dataclass(eq=False, slots=True)
class _Life:
    """A request from its arrival to its end, as its ``RequestRecord`` will have it."""

    request: Any
    info: RequestInfo
    queued_ns: int = 0
    scheduled_ns: int = 0
    cached_tokens: int = 0
    prefill_until: int = 0  # tokens to be computed before it decodes, from its last admission on
    preemptions: int = 0
    wait_reason: WaitReason | None = None
    lacking: int = 0
    token_times_ns: list[int] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _News:
    """What happened since the last step, for the next one to tell."""

    idle_ns: int = 0
    joined: list[_Life] = field(default_factory=list)
    preempted: list[tuple[int, int]] = field(default_factory=list)
    left: list[tuple[int, int]] = field(default_factory=list)


_P = ParamSpec("_P")


def _harmless(method: Callable[Concatenate[Watch, _P], None]) -> Callable[Concatenate[Watch, _P], None]:
    """Whatever fails in a method of ``Watch`` ends the telemetry, and nothing else."""

    @wraps(method)
    def guarded(self: Watch, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if self.is_off:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.is_off = True
            log.warning(
                "stallscope: telemetry is off from here on, serving goes on: %s: %s (vLLM %s)",
                type(error).__name__,
                error,
                vllm.__version__,
                exc_info=True,
            )
            self.close(timeout=0.0)

    return guarded


def watch(scheduler: Any, path: str | Path | None = None) -> Watch | None:
    """Telemetry of a vLLM scheduler, to a new file or to where the environment says; None, with a line in the log,
    where that is nowhere, or where this vLLM can't be watched."""
    try:
        rank = scheduler.parallel_config.data_parallel_rank
        ways = [OtlpFileExporter(path)] if path is not None else exporters(rank)
        if not ways:
            log.warning("stallscope: no telemetry: set OTEL_EXPORTER_OTLP_ENDPOINT or STALLSCOPE_TRACE_DIR")
            return None
        return Watch(scheduler, Emitter(resource_attributes(describe(scheduler)), ways, random.Random()))
    except Exception as error:
        log.warning("stallscope: no telemetry: %s: %s (vLLM %s)", type(error).__name__, error, vllm.__version__)
        return None


def describe(scheduler: Any) -> EngineDescription:
    """What vLLM is set to, as far as a replay needs it."""
    settings, parallel = scheduler.scheduler_config, scheduler.parallel_config
    return EngineDescription(
        replica=replica_name(parallel.data_parallel_rank),
        model=Path(scheduler.vllm_config.model_config.model).name,
        engine_version=vllm.__version__,
        executor="torch",
        block_size=scheduler.block_size,
        total_blocks=_blocks(scheduler),
        max_num_seqs=scheduler.max_num_active_reqs,
        max_num_batched_tokens=scheduler.max_num_scheduled_tokens,
        chunked_prefill=settings.enable_chunked_prefill,
        policy=settings.policy,
        watermark=settings.watermark,
        prefix_caching=bool(scheduler.cache_config.enable_prefix_caching),
        async_scheduling=bool(settings.async_scheduling),
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        service_name="vllm",
        engine="vllm",
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        data_parallel=parallel.data_parallel_size,
        rank=parallel.data_parallel_rank,
    )


def _blocks(scheduler: Any) -> int:
    # One of the blocks that vLLM counts stands for "none", and is nobody's ever; it is not among the free ones.
    blocks: int = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return blocks


class Watch:
    """Follows one scheduler. All methods are for the engine's thread; none raises, none blocks.

    ``is_off``: it has met what it doesn't understand, and stands aside.
    """

    def __init__(self, scheduler: Any, emitter: Emitter) -> None:
        self.is_off = False
        self._scheduler = scheduler
        self._emitter = emitter
        self._tenant_of = tenants_from_environment()
        self._prefixes = PrefixGroups()
        self._pool = scheduler.kv_cache_manager.block_pool
        self._total_blocks = _blocks(scheduler)
        self._watermark: int = scheduler.kv_cache_manager.watermark_blocks
        self._queues = (scheduler.kv_holding_waiting, scheduler.waiting)  # in the order in which vLLM asks
        self._chunked: bool = scheduler.scheduler_config.enable_chunked_prefill
        self._lives: dict[str, _Life] = {}
        self._prefilling: dict[str, _Life] = {}
        self._handles = 0
        self._steps = 0
        self._news = _News()
        self._in_flight: dict[int, tuple[Any, StepRecord]] = {}  # by the identity of vLLM's output, which is kept
        self._idle_since_ns = now_ns()
        self._scheduling_ns = 0

    def close(self, timeout: float = 15.0) -> None:
        """Ends the telemetry; waits for what is not written yet. May be called again."""
        self.is_off = True
        self._emitter.close(timeout)

    # --- requests come and go -------------------------------------------------------------------------------------

    @_harmless
    def joined(self, request: Any) -> None:
        """After it was queued. More input for a request that is there is none that joins."""
        if request.request_id in self._lives or request.request_id not in self._scheduler.requests:
            return
        if self._idle_since_ns:
            self._news.idle_ns += now_ns() - self._idle_since_ns
            self._idle_since_ns = 0
        self._handles += 1
        life = self._lives[request.request_id] = _Life(request, info_of(request, self._handles, self._tenant_of))
        self._news.joined.append(life)

    @_harmless
    def aborted(self, requests: Any) -> None:
        """After vLLM ended these from outside: their clients are gone, or they can't be served."""
        for request in requests or ():
            is_error = request.status is RequestStatus.FINISHED_ERROR
            self._leave_early(request.request_id, FinishReason.ERROR if is_error else FinishReason.ABORT)

    def _leave_early(self, request_id: str, reason: FinishReason) -> None:
        life = self._end(request_id, reason, now_ns())
        if life in self._news.joined:  # no step has seen it, so none needs to say that it left
            self._news.joined.remove(life)
        elif life is not None:
            self._news.left.append((life.info.handle, reason))

    def _end(self, request_id: str, reason: FinishReason, end_ns: int) -> _Life | None:
        life = self._lives.pop(request_id, None)
        self._prefilling.pop(request_id, None)
        if life is None:
            return None
        if not self._lives:
            self._idle_since_ns = end_ns
        life.events.append(("finished", end_ns))
        times = life.token_times_ns
        self._emitter.request(
            RequestRecord(
                life.info,
                life.queued_ns,
                life.scheduled_ns,
                times[0] if times else 0,
                end_ns,
                end_ns,
                life.cached_tokens,
                life.preemptions,
                reason,
                times,
                life.events,
                self._prefixes.number(life.request.block_hashes),
            )
        )
        return life

    @_harmless
    def preempted(self, request: Any) -> None:
        """After it lost its blocks, from within ``schedule``."""
        life = self._lives.get(request.request_id)
        if life is None:
            return
        # Only vLLM's loop knows for whose sake: this method's guard and the scheduler's override lie between.
        asks = sys._getframe(3).f_locals.get("request")
        taker = self._lives.get(getattr(asks, "request_id", ""), life)
        life.preemptions += 1
        life.events.append(("preempted", now_ns()))
        self._prefilling.pop(request.request_id, None)
        self._news.preempted.append((life.info.handle, taker.info.handle))

    # --- a step -----------------------------------------------------------------------------------------------------

    @_harmless
    def scheduling(self) -> None:
        """Before a batch is chosen."""
        self._scheduling_ns = now_ns()

    @_harmless
    def scheduled(self, output: Any) -> None:
        """After a batch was chosen; vLLM has counted its tokens as computed by then."""
        if not output.total_num_scheduled_tokens:
            return
        step = self._note(output)
        step.dispatched_ns = now_ns()
        step.sched_ns = step.dispatched_ns - step.scheduled_ns
        self._in_flight[id(output)] = output, step

    @_harmless
    def ready(self, output: Any) -> None:
        """When a batch's outputs are there."""
        if id(output) in self._in_flight:
            self._in_flight[id(output)][1].ready_ns = now_ns()

    @_harmless
    def delivered(self, output: Any, outputs: Mapping[int, Any] | None) -> None:
        """After vLLM has taken a batch's outputs."""
        _, step = self._in_flight.pop(id(output), (None, None))
        if step is None:
            return
        left = self._deliver(outputs or {}, step.ready_ns)
        step.left = [*step.left, *left]
        self._emitter.step(step)
        if left and self._in_flight:
            # Steps that were scheduled meanwhile come later in the trace, where who has left is nobody.
            gone = {handle for handle, _ in left}
            for _, later in self._in_flight.values():
                later.decodes = [pair for pair in later.decodes if pair[0] not in gone]
                later.chunks = [pair for pair in later.chunks if pair[0] not in gone]
                if later.keyframe is not None:
                    later.keyframe = [one for one in later.keyframe if one.info.handle not in gone]

    def _deliver(self, outputs: Mapping[int, Any], ready_ns: int) -> list[tuple[int, int]]:
        """Counts the tokens of a step; returns who finished with it."""
        left: list[tuple[int, int]] = []
        lives = self._lives
        for output in chain.from_iterable(of_client.outputs for of_client in outputs.values()):
            life = lives.get(output.request_id)
            if life is None:
                continue
            times, tokens = life.token_times_ns, output.new_token_ids
            if tokens:
                if not times:
                    life.events.append(("first_token", ready_ns))
                if len(tokens) == 1:
                    times.append(ready_ns)
                else:
                    times += [ready_ns] * len(tokens)
            if output.finish_reason is not None:
                reason = _FINISH_REASONS.get(output.finish_reason.name, FinishReason.ERROR)
                self._end(output.request_id, reason, ready_ns)
                left.append((life.info.handle, reason))
        return left

    def _note(self, output: Any) -> StepRecord:
        """The record of a step that was just scheduled."""
        wants_keyframe = self._emitter.wants_keyframe(self._steps)
        if wants_keyframe:
            self._forget_lost()
        scheduler, scheduled_ns = self._scheduler, self._scheduling_ns
        news, self._news = self._news, _News()
        for life in news.joined:
            life.queued_ns = scheduled_ns
        cached = self._admit(output, scheduled_ns)
        chunks = self._chunks(output.num_scheduled_tokens)
        prefill_tokens = sum(tokens for _, tokens in chunks)
        waits = self._explain_waiting(scheduler.max_num_scheduled_tokens - output.total_num_scheduled_tokens)
        step, self._steps = self._steps, self._steps + 1
        return StepRecord(
            step=step,
            scheduled_ns=scheduled_ns,
            dispatched_ns=0,
            ready_ns=0,
            idle_ns=news.idle_ns,
            sched_ns=0,
            device_ns=-1,
            prefill_tokens=prefill_tokens,
            decode_tokens=output.total_num_scheduled_tokens - prefill_tokens,
            batch_size=len(output.num_scheduled_tokens),
            running=len(scheduler.running),
            waiting=sum(map(len, self._queues)),
            kv_used=self._total_blocks - self._pool.get_num_free_blocks(),
            kv_cached=0,
            joined=[life.info for life in news.joined],
            cached=cached,
            chunks=chunks,
            decodes=self._unlike_one(output, len(chunks), prefill_tokens),
            waits=waits,
            preempted=news.preempted,
            left=news.left,
            keyframe=self._snapshot(output.num_scheduled_tokens) if wants_keyframe else None,
        )

    def _admit(self, output: Any, scheduled_ns: int) -> list[tuple[int, int]]:
        """Notes who was admitted; returns what those found in the cache, by handle."""
        cached = []
        new = (one.req_id for one in output.scheduled_new_reqs)
        for request_id in chain(new, output.scheduled_cached_reqs.resumed_req_ids):
            life = self._lives.get(request_id)
            if life is None:
                continue
            life.events.append(("resumed" if life.scheduled_ns else "scheduled", scheduled_ns))
            start = life.request.num_computed_tokens - output.num_scheduled_tokens[request_id]
            if not life.scheduled_ns:
                life.scheduled_ns, life.cached_tokens = scheduled_ns, start
            if start:
                cached.append((life.info.handle, start))
            life.wait_reason = None
            life.prefill_until = life.request.num_tokens
            self._prefilling[request_id] = life
        return cached

    def _chunks(self, scheduled: Mapping[str, int]) -> list[tuple[int, int]]:
        """Prefill tokens of a step, by handle; who has the last of its prompt decodes from the next one on."""
        chunks, done = [], []
        for request_id, life in self._prefilling.items():
            if tokens := scheduled.get(request_id, 0):
                chunks.append((life.info.handle, tokens))
                if life.request.num_computed_tokens >= life.prefill_until:
                    done.append(request_id)
        for request_id in done:
            del self._prefilling[request_id]
        return chunks

    def _unlike_one(self, output: Any, chunks: int, prefill_tokens: int) -> list[tuple[int, int]]:
        """Who runs and decodes another number of tokens than one."""
        scheduled, running = output.num_scheduled_tokens, self._scheduler.running
        decodes = len(scheduled) - chunks
        if len(scheduled) == len(running) and output.total_num_scheduled_tokens - prefill_tokens == decodes:
            return []
        found = []
        for request in running:
            tokens = scheduled.get(request.request_id, 0)
            if tokens == 1 or (life := self._lives.get(request.request_id)) is None:
                continue
            is_chunk = tokens and request.num_computed_tokens - tokens < life.prefill_until
            if not is_chunk:
                found.append((life.info.handle, tokens))
        return found

    def _snapshot(self, scheduled: Mapping[str, int]) -> list[RequestSnapshot]:
        """Everybody after admission, before the step's tokens are counted; what is in flight counts as made."""
        found = []
        for request in chain(self._scheduler.running, self._waiting()):
            life = self._lives.get(request.request_id)
            if life is None:
                continue
            tokens = scheduled.get(request.request_id, 0)
            runs = request.status is RequestStatus.RUNNING
            preempted = request.status is RequestStatus.PREEMPTED
            pending = request.num_output_placeholders
            if pending and tokens and not request.is_prefill_chunk:
                pending -= 1  # that of this step
            blocks = self._scheduler.kv_cache_manager.get_block_ids(request.request_id) if runs else ()
            found.append(
                RequestSnapshot(
                    life.info,
                    RequestState.RUNNING if runs else RequestState.PREEMPTED if preempted else RequestState.WAITING,
                    request.num_computed_tokens - tokens,
                    request.num_output_tokens + pending,
                    life.cached_tokens,
                    sum(map(len, blocks)),
                    life.wait_reason,
                    life.lacking,
                )
            )
        return found

    def _forget_lost(self) -> None:
        """Whom vLLM has ended in a way that is not watched."""
        for request_id in self._lives.keys() - self._scheduler.requests.keys():
            self._leave_early(request_id, FinishReason.ERROR)

    # --- why the others wait ------------------------------------------------------------------------------------------

    def _waiting(self) -> Iterator[Any]:
        return chain.from_iterable(self._queues)

    def _explain_waiting(self, budget: int) -> list[tuple[int, int, int]]:
        """What each waiting request lacks now, where that is another thing than before, in the order vLLM asks in."""
        changed: list[tuple[int, int, int]] = []
        slots = self._scheduler.max_num_active_reqs - len(self._scheduler.running)
        free = self._pool.get_num_free_blocks() - (self._watermark if self._scheduler.running else 0)
        for position, request in enumerate(self._waiting()):
            life = self._lives.get(request.request_id)
            if life is None:
                continue
            reason, lacking = self._lacks(request, slots, budget, free, is_head=position == 0)
            if reason is not life.wait_reason:
                life.wait_reason, life.lacking = reason, lacking
                changed.append((life.info.handle, reason, lacking))
        return changed

    def _lacks(self, request: Any, slots: int, budget: int, free: int, *, is_head: bool) -> tuple[WaitReason, int]:
        if (own := _OWN_CONDITIONS.get(request.status)) is not None:
            return own, 0
        if slots <= 0:
            return WaitReason.SLOTS, 1
        if budget <= 0 or (not self._chunked and request.num_tokens > budget):
            return WaitReason.BUDGET, request.num_tokens - budget
        short = -(-request.num_tokens // self._scheduler.block_size) - free
        if short > 0 or is_head:
            return WaitReason.KV, max(short, 0)
        return WaitReason.HEAD, 0
