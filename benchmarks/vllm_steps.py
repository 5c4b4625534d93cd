"""What a real vLLM does, step by step, as telemetry: its own scheduler, watched from within and left as it is.

Lives in vLLM's environment (0.32), where ``stallscope_telemetry`` need only be importable; ``vllm_run`` loads it and
says when to record. It writes what the bundled engine writes, so an analysis can't tell the two apart. For synchronous
scheduling without speculative decoding; which cached prefixes are pushed out of the KV cache is not told.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from stallscope_telemetry.emitter import Emitter
from stallscope_telemetry.files import OtlpFileExporter
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

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput

_CLOCK_OFFSET_NS = time.time_ns() - time.perf_counter_ns()
_OWN_CONDITION = {
    RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR: WaitReason.GRAMMAR,
    RequestStatus.WAITING_FOR_REMOTE_KVS: WaitReason.REMOTE_KV,
}


def now_ns() -> int:
    """Int ns since the Unix epoch, on a clock that never runs backwards."""
    return time.perf_counter_ns() + _CLOCK_OFFSET_NS


@dataclass(eq=False, slots=True)
class _Life:
    """A request from its arrival to its end, as its ``RequestRecord`` will have it."""

    info: RequestInfo
    queued_ns: int = 0
    scheduled_ns: int = 0
    cached_tokens: int = 0
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


class StepRecordingScheduler(Scheduler):
    """vLLM's scheduler; after ``record_to``, which needs an engine without requests, with a record of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        pool, allocate = self.kv_cache_manager.block_pool, self.kv_cache_manager.allocate_slots
        # Asked now, since one of the blocks that vLLM counts stands for "none" and is nobody's ever.
        self._total_blocks: int = pool.get_num_free_blocks()
        self._emitter: Emitter | None = None
        self._lives: dict[str, _Life] = {}
        self._handles = 0
        self._steps = 0
        self._news = _News()
        self._step: StepRecord | None = None  # in flight
        self._idle_since_ns = 0
        self._asks: Request | None = None  # for whose sake others are preempted

        def allocate_slots(request: Request, *args: Any, **kwargs: Any) -> Any:
            self._asks = request
            return allocate(request, *args, **kwargs)

        self.kv_cache_manager.allocate_slots = allocate_slots

    def record_to(self, path: Path) -> None:
        """Writes a trace to a new file from now on, until ``shutdown``."""
        self._emitter = Emitter(resource_attributes(self._describe()), [OtlpFileExporter(path)], random.Random())
        self._idle_since_ns = now_ns()

    def shutdown(self) -> None:
        if self._emitter is not None:
            self._emitter.close()
        super().shutdown()

    def _describe(self) -> EngineDescription:
        settings, parallel = self.scheduler_config, self.parallel_config
        return EngineDescription(
            replica="vllm-0",
            model=Path(self.vllm_config.model_config.model).name,
            engine_version=vllm.__version__,
            executor="torch",
            block_size=self.block_size,
            total_blocks=self._total_blocks,
            max_num_seqs=self.max_num_active_reqs,
            max_num_batched_tokens=self.max_num_scheduled_tokens,
            chunked_prefill=settings.enable_chunked_prefill,
            policy=settings.policy,
            watermark=settings.watermark,
            prefix_caching=bool(self.cache_config.enable_prefix_caching),
            long_prefill_token_threshold=settings.long_prefill_token_threshold,
            service_name="vllm",
            engine="vllm",
            tensor_parallel=parallel.tensor_parallel_size,
            pipeline_parallel=parallel.pipeline_parallel_size,
            data_parallel=parallel.data_parallel_size,
        )

    # --- requests come and go -------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        if self._emitter is None:
            return
        if self._idle_since_ns:
            self._news.idle_ns += now_ns() - self._idle_since_ns
            self._idle_since_ns = 0
        self._handles += 1
        life = self._lives[request.request_id] = _Life(_info(request, self._handles))
        self._news.joined.append(life)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        ended: list[Request] = super().finish_requests(request_ids, finished_status)
        reason = FinishReason.ERROR if finished_status is RequestStatus.FINISHED_ERROR else FinishReason.ABORT
        for request in ended:
            life = self._end(request.request_id, reason, now_ns())
            if life in self._news.joined:  # no step has seen it, so none needs to say that it left
                self._news.joined.remove(life)
            elif life is not None:
                self._news.left.append((life.info.handle, reason))
        return ended

    def _end(self, request_id: str, reason: FinishReason, end_ns: int) -> _Life | None:
        life = self._lives.pop(request_id, None)
        if life is None or self._emitter is None:
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
            )
        )
        return life

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        life = self._lives.get(request.request_id)
        if life is None:
            return
        taker = self._lives[self._asks.request_id] if self._asks is not None else life
        life.preemptions += 1
        life.events.append(("preempted", now_ns()))
        self._news.preempted.append((life.info.handle, taker.info.handle))

    # --- a step -----------------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        scheduled_ns = now_ns()
        ran = set(self.running)
        output = super().schedule(throttle_prefills)
        if self._emitter is not None and output.total_num_scheduled_tokens:
            self._step = self._note(self._emitter, output, ran, scheduled_ns)
            self._step.dispatched_ns = now_ns()
            self._step.sched_ns = self._step.dispatched_ns - scheduled_ns
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        ready_ns = now_ns()
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        step, self._step = self._step, None
        if self._emitter is not None and step is not None:
            step.ready_ns = ready_ns
            step.left = [*step.left, *self._deliver(outputs, ready_ns)]
            self._emitter.step(step)
        return outputs

    def _deliver(self, outputs: dict[int, EngineCoreOutputs], ready_ns: int) -> list[tuple[int, int]]:
        """Counts the tokens of a step; returns who finished with it."""
        left: list[tuple[int, int]] = []
        for output in chain.from_iterable(of_client.outputs for of_client in outputs.values()):
            life = self._lives.get(output.request_id)
            if life is None:
                continue
            if output.new_token_ids and not life.token_times_ns:
                life.events.append(("first_token", ready_ns))
            life.token_times_ns += [ready_ns] * len(output.new_token_ids)
            if output.finish_reason is not None:
                reason = FinishReason.LENGTH if output.finish_reason.name == "LENGTH" else FinishReason.STOP
                self._end(output.request_id, reason, ready_ns)
                left.append((life.info.handle, reason))
        return left

    def _note(self, emitter: Emitter, output: SchedulerOutput, ran: set[Request], scheduled_ns: int) -> StepRecord:
        """The record of a step that was just scheduled; ``ran``: who ran before it."""
        news, self._news = self._news, _News()
        for life in news.joined:
            life.queued_ns = scheduled_ns
        cached, chunks = [], []
        for request_id, tokens in output.num_scheduled_tokens.items():
            request, life = self.requests[request_id], self._lives[request_id]
            start = request.num_computed_tokens - tokens  # vLLM has counted them already
            if admitted := request not in ran:
                life.events.append(("resumed" if life.scheduled_ns else "scheduled", scheduled_ns))
                if not life.scheduled_ns:
                    life.scheduled_ns, life.cached_tokens = scheduled_ns, start
                if start:
                    cached.append((life.info.handle, start))
                life.wait_reason = None
            if admitted or not request.num_output_tokens or start + 1 < request.num_tokens:
                chunks.append((life.info.handle, tokens))
        prefill_tokens = sum(tokens for _, tokens in chunks)
        left_over = self.max_num_scheduled_tokens - output.total_num_scheduled_tokens
        waits = self._explain_waiting(left_over)
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
            running=len(self.running),
            waiting=len(self.waiting) + len(self.kv_holding_waiting),
            kv_used=self._total_blocks - self.kv_cache_manager.block_pool.get_num_free_blocks(),
            kv_cached=0,
            joined=[life.info for life in news.joined],
            cached=cached,
            chunks=chunks,
            decodes=[
                (self._lives[request.request_id].info.handle, 0)
                for request in self.running
                if request.request_id not in output.num_scheduled_tokens
            ],
            waits=waits,
            preempted=news.preempted,
            left=news.left,
            keyframe=self._snapshot(output)
            if self._emitter is not None and self._emitter.wants_keyframe(step)
            else None,
        )

    def _snapshot(self, output: SchedulerOutput) -> list[RequestSnapshot]:
        """Everybody after admission, before the step's tokens are counted."""
        found = []
        for request in chain(self.running, self.kv_holding_waiting, self.waiting):
            life = self._lives[request.request_id]
            runs = request.status is RequestStatus.RUNNING
            preempted = request.status is RequestStatus.PREEMPTED
            found.append(
                RequestSnapshot(
                    life.info,
                    RequestState.RUNNING if runs else RequestState.PREEMPTED if preempted else RequestState.WAITING,
                    request.num_computed_tokens - output.num_scheduled_tokens.get(request.request_id, 0),
                    request.num_output_tokens,
                    life.cached_tokens,
                    len(self.kv_cache_manager.get_block_ids(request.request_id)[0]) if runs else 0,
                    life.wait_reason,
                    life.lacking,
                )
            )
        return found

    # --- why the others wait ------------------------------------------------------------------------------------------

    def _explain_waiting(self, budget: int) -> list[tuple[int, int, int]]:
        """What each waiting request lacks now, where that is another thing than before, in the order vLLM asks in."""
        changed: list[tuple[int, int, int]] = []
        slots = self.max_num_active_reqs - len(self.running)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        free -= self.kv_cache_manager.watermark_blocks if self.running else 0
        for position, request in enumerate(chain(self.kv_holding_waiting, self.waiting)):
            life = self._lives[request.request_id]
            reason, lacking = self._lacks(request, slots, budget, free, is_head=position == 0)
            if reason is not life.wait_reason:
                life.wait_reason, life.lacking = reason, lacking
                changed.append((life.info.handle, reason, lacking))
        return changed

    def _lacks(self, request: Request, slots: int, budget: int, free: int, *, is_head: bool) -> tuple[WaitReason, int]:
        if (own := _OWN_CONDITION.get(request.status)) is not None:
            return own, 0
        if slots <= 0:
            return WaitReason.SLOTS, 1
        chunked = self.scheduler_config.enable_chunked_prefill
        if budget <= 0 or (not chunked and request.num_tokens > budget):
            return WaitReason.BUDGET, request.num_tokens - budget
        short = -(-request.num_tokens // self.block_size) - free
        if short > 0 or is_head:
            return WaitReason.KV, max(short, 0)
        return WaitReason.HEAD, 0


def _info(request: Request, handle: int) -> RequestInfo:
    """``tenant`` is that of the request's ``vllm_xargs``, which its client sets."""
    extra = request.sampling_params.extra_args or {}
    tenant = str(extra.get("tenant", ""))
    return RequestInfo(
        handle,
        request.request_id,
        round(request.arrival_time * 1e9),
        request.num_prompt_tokens,
        request.max_tokens,
        tenant,
        "claim:vllm_xargs" if tenant else "",
        request.priority,
    )
