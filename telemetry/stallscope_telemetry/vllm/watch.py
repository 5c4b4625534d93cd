"""What a vLLM scheduler does, step by step, as records: read from it right before and after it did so.

Each batch is recorded as it was when it was scheduled, and closed by its own outputs: with asynchronous scheduling the
next one has been scheduled by then. Nothing of vLLM is changed, and nothing that goes wrong here reaches it. Which
cached prefixes are pushed out of the KV cache is not told.
"""

from __future__ import annotations

import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import vllm
from vllm.v1.request import RequestStatus

from stallscope_telemetry.emitter import Emitter
from stallscope_telemetry.files import OtlpFileExporter
from stallscope_telemetry.prefixes import PrefixGroups
from stallscope_telemetry.records import FinishReason, RequestSnapshot, RequestState, StepRecord
from stallscope_telemetry.spans import EngineDescription, resource_attributes
from stallscope_telemetry.vllm.lives import Infos, Life, ReadyTimes
from stallscope_telemetry.vllm.settings import exporters, info_of, log, replica_name, tenants_from_environment
from stallscope_telemetry.vllm.waits import Waits

_CLOCK_OFFSET_NS = time.time_ns() - time.perf_counter_ns()
_READ_LATER = ("requests", "running", "finished_req_ids", "max_num_scheduled_tokens")
_FINISH_REASONS = {
    "FINISHED_STOPPED": FinishReason.STOP,
    "FINISHED_LENGTH_CAPPED": FinishReason.LENGTH,
    "FINISHED_ABORTED": FinishReason.ABORT,
    "FINISHED_IGNORED": FinishReason.LENGTH,
    "FINISHED_REPETITION": FinishReason.STOP,
}


def now_ns() -> int:
    """Int ns since the Unix epoch, on a clock that never runs backwards."""
    return time.perf_counter_ns() + _CLOCK_OFFSET_NS


@dataclass(eq=False, slots=True)
class _News:
    """What happened since the last step, for the next one to tell."""

    idle_ns: int = 0
    joined: list[Life] = field(default_factory=list)  # not changed any more once a step tells of it
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
            log.warning("stallscope: telemetry is off from here on, serving goes on: %s", _described(error))
            self.close(timeout=0.0)

    return guarded


def watch(scheduler: Any, path: str | Path | None = None) -> Watch | None:
    """Telemetry of a vLLM scheduler, to a new file or to where the environment says; None, with a line in the log,
    where that is nowhere, or where this vLLM can't be watched."""
    try:
        ways = [OtlpFileExporter(path)] if path is not None else exporters(scheduler)
        if not ways:
            log.warning("stallscope: no telemetry: set STALLSCOPE_TRACE_DIR or OTEL_EXPORTER_OTLP_ENDPOINT")
            return None
        with ExitStack() as stack:
            emitter = stack.enter_context(Emitter(resource_attributes(describe(scheduler)), ways, random.Random()))
            found = Watch(scheduler, emitter)
            stack.pop_all()
        return found
    except Exception as error:
        log.warning("stallscope: no telemetry: %s", _described(error))
        return None


def _described(error: Exception) -> str:
    """What went wrong and where, in a line: enough to report it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    return f"{type(error).__name__}: {error} (vLLM {vllm.__version__}, {where})"


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
        attrgetter(*_READ_LATER)(scheduler)  # a vLLM without them is to be known now
        self.is_off = False
        self._scheduler = scheduler
        self._emitter = emitter
        self._describe = partial(info_of, tenants_from_environment())
        self._prefixes = PrefixGroups()
        self._pool = scheduler.kv_cache_manager.block_pool
        self._total_blocks = _blocks(scheduler)
        # Where each request that decodes takes one token in each step, tokens need no counting.
        self._counts_tokens = bool(
            scheduler.num_spec_tokens or scheduler.num_sampled_tokens_per_step != 1 or scheduler.connector is not None
        )
        self._lives: dict[str, Life] = {}
        self._running: set[str] = set()
        self._prefilling: dict[str, Life] = {}
        self._waits = Waits(scheduler, self._lives)
        self._handles = 0
        self._steps = 0
        self._news = _News()
        self._in_flight: dict[int, tuple[Any, StepRecord]] = {}  # by the identity of vLLM's output, which is kept
        self._ready = ReadyTimes()
        self._idle_since_ns = now_ns()

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
        life = self._lives[request.request_id] = Life(request, self._handles, self._describe)
        self._waits.enter(life)
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
            self._news.left.append((life.handle, reason))

    def _end(self, request_id: str, reason: FinishReason, end_ns: int) -> Life | None:
        life = self._lives.pop(request_id, None)
        if life is None:
            return None
        self._running.discard(request_id)
        self._prefilling.pop(request_id, None)
        self._waits.leave(life)
        if not self._lives:
            self._idle_since_ns = end_ns
        life.end(reason, end_ns, self._ready, self._prefixes)
        self._emitter.request(life.record)
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
        life.events += (("preempted", now_ns()),)
        self._prefilling.pop(request.request_id, None)
        self._running.discard(request.request_id)
        # What is in flight is delivered yet, unless vLLM says that it drops it.
        life.pause(self._ready.steps if request.drop_stale_output else self._steps)
        self._waits.enter(life)
        self._news.preempted.append((life.handle, taker.handle))

    # --- a step -----------------------------------------------------------------------------------------------------

    @_harmless
    def scheduled(self, output: Any, began_ns: int) -> None:
        """After a batch was chosen, which began then; vLLM has counted its tokens as computed by now."""
        if not output.total_num_scheduled_tokens:
            return
        step = self._note(output, began_ns)
        step.dispatched_ns = now_ns()
        step.sched_ns = step.dispatched_ns - began_ns
        self._in_flight[id(output)] = output, step

    @_harmless
    def delivered(self, output: Any, outputs: Mapping[int, Any] | None, ready_ns: int) -> None:
        """After vLLM has taken a batch's outputs, which were there at ``ready_ns``."""
        _, step = self._in_flight.pop(id(output), (None, None))
        if step is None:
            return
        step.ready_ns = ready_ns
        self._ready.add(step.step, ready_ns)
        if self._counts_tokens:
            self._count_tokens(outputs or {}, ready_ns)
        left = self._finish(ready_ns)
        if left:
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

    def _count_tokens(self, outputs: Mapping[int, Any], ready_ns: int) -> None:
        for output in chain.from_iterable(of_client.outputs for of_client in outputs.values()):
            if (life := self._lives.get(output.request_id)) is not None:
                life.token_times_ns += [ready_ns] * len(output.new_token_ids)

    def _finish(self, ready_ns: int) -> list[tuple[int, int]]:
        """Ends whom vLLM has ended with a step's outputs, and returns them."""
        left = []
        for request_id in self._scheduler.finished_req_ids:
            if (life := self._lives.get(request_id)) is not None:
                reason = _FINISH_REASONS.get(life.request.status.name, FinishReason.ERROR)
                self._end(request_id, reason, ready_ns)
                left.append((life.handle, reason))
        return sorted(left)

    def _note(self, output: Any, scheduled_ns: int) -> StepRecord:
        """The record of a step that was just scheduled."""
        wants_keyframe = self._emitter.wants_keyframe(self._steps)
        if wants_keyframe:
            self._forget_lost()
            self._ready.keep_for(self._lives.values())
        scheduler = self._scheduler
        news, self._news = self._news, _News()
        for life in news.joined:
            life.queued_ns = scheduled_ns
        cached = self._admit(output, scheduled_ns)
        chunks = self._chunks(output.num_scheduled_tokens)
        prefill_tokens = sum([tokens for _, tokens in chunks]) if chunks else 0
        decode_tokens = output.total_num_scheduled_tokens - prefill_tokens
        decodes = self._unlike_one(output.num_scheduled_tokens, chunks, decode_tokens)
        waits = self._waits.changes(scheduler.max_num_scheduled_tokens - output.total_num_scheduled_tokens)
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
            decode_tokens=decode_tokens,
            batch_size=len(output.num_scheduled_tokens),
            running=len(scheduler.running),
            waiting=self._waits.count,
            kv_used=self._total_blocks - self._pool.get_num_free_blocks(),
            kv_cached=0,
            joined=Infos(news.joined),
            cached=cached,
            chunks=chunks,
            decodes=decodes,
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
            start = life.request.num_computed_tokens - output.num_scheduled_tokens[request_id]
            if life.scheduled_ns:
                life.events += (("resumed", scheduled_ns),)
            else:
                life.scheduled_ns, life.cached_tokens = scheduled_ns, start
            if start:
                cached.append((life.handle, start))
            life.prefill_until = life.request.num_tokens
            self._waits.leave(life)
            self._running.add(request_id)
            self._prefilling[request_id] = life
        return cached

    def _chunks(self, scheduled: Mapping[str, int]) -> list[tuple[int, int]]:
        """Prefill tokens of a step, by handle; with the last of its prompt a request takes its next token."""
        chunks, done = [], []
        for request_id, life in self._prefilling.items():
            if tokens := scheduled.get(request_id, 0):
                chunks.append((life.handle, tokens))
                if life.request.num_computed_tokens >= life.prefill_until:
                    done.append(request_id)
        for request_id in done:
            life = self._prefilling.pop(request_id)
            if not self._counts_tokens:
                life.decodes_from = self._steps
        return chunks

    def _unlike_one(
        self, scheduled: Mapping[str, int], chunks: list[tuple[int, int]], decode_tokens: int
    ) -> list[tuple[int, int]]:
        """Who runs and decodes another number of tokens than one."""
        found = []
        if len(scheduled) != len(self._running):
            for request_id in self._running.difference(scheduled):
                life = self._lives[request_id]
                life.skip(self._steps)
                found.append((life.handle, 0))
        if decode_tokens != len(scheduled) - len(chunks):
            prefilling = {handle for handle, _ in chunks}
            several = (self._lives.get(request_id) for request_id, tokens in scheduled.items() if tokens != 1)
            found += [
                (life.handle, scheduled[life.request.request_id])
                for life in several
                if life is not None and life.handle not in prefilling
            ]
        return sorted(found) if found else found

    def _snapshot(self, scheduled: Mapping[str, int]) -> list[RequestSnapshot]:
        """Everybody after admission, before the step's tokens are counted; what is in flight counts as made."""
        found = []
        for request in chain(self._scheduler.running, self._waits.requests()):
            life = self._lives.get(request.request_id)
            if life is None:
                continue
            tokens = scheduled.get(request.request_id, 0)
            runs = request.status is RequestStatus.RUNNING
            preempted = request.status is RequestStatus.PREEMPTED
            pending = request.num_output_placeholders
            if pending and tokens and not request.is_prefill_chunk:
                pending -= 1  # that of this step
            blocks = self._scheduler.kv_cache_manager.get_blocks(request.request_id).blocks if runs else ()
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
