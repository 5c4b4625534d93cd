"""Iteration-level scheduling: chooses each step's batch, and says why everybody else waits.

Plain Python without torch, clock or I/O, so that the engine that serves and the replay that answers "what if" are
the same code. The order of decisions is vLLM V1's (``vllm/v1/core/sched/scheduler.py``, 0.32): requests that run
come first, in the order of their admission, a decode being no different from a prefill that lacks one token; the
latest admitted loses its blocks when one that runs cannot grow; then the queue is admitted from its head, first come
first served, while slots, token budget and KV blocks last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from stallscope_engine.block_manager import BlockManager
from stallscope_engine.config import EngineConfig
from stallscope_engine.request import Request
from stallscope_telemetry.records import FinishReason, RequestSnapshot, RequestState, WaitReason


class RequestRejected(ValueError):
    """The request could never run under this configuration; the message says which limit it breaks."""


@dataclass(eq=False, slots=True)
class Batch:
    """One step's work, recorded as it was when scheduled, and what changed since the step before.

    ``requests``, ``num_tokens`` and ``starts`` are parallel: request i computes ``num_tokens[i]`` tokens from
    position ``starts[i]`` on; it samples a token when that makes its KV cache complete (``samples[i]``).
    The lists of handles are those of ``StepRecord``.
    """

    scheduled_ns: int
    requests: list[Request] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    prefill_tokens: int = 0
    decode_tokens: int = 0
    joined: list[Request] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    paused: list[tuple[int, int]] = field(default_factory=list)  # runs, but takes no token in this step: (handle, 0)
    waits: list[tuple[int, int, int]] = field(default_factory=list)
    preempted: list[tuple[int, int]] = field(default_factory=list)
    left: list[tuple[int, int]] = field(default_factory=list)
    running: int = 0
    waiting: int = 0
    kv_used: int = 0


class Scheduler:
    """Owns the waiting queue, the running list and the blocks; one of each per replica."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.kv_blocks, config.block_size)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._joining: list[Request] = []
        self._left: list[tuple[int, int]] = []
        self._room: tuple[int, int, int] | None = None  # what the last wait reasons were judged on
        self._queue_changed = False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # --- requests come and go -------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Puts a new request at the end of the queue.

        Raises RequestRejected where it could never finish: more tokens than the KV cache holds or, without
        chunked prefill, than a step's budget.
        """
        info, config = request.info, self.config
        if info.prompt_tokens < 1 or info.max_tokens < 1:
            raise RequestRejected(f"request {info.request_id}: prompt and max_tokens must be at least 1 token")
        most = info.prompt_tokens + info.max_tokens
        capacity = config.kv_blocks * config.block_size
        if most > capacity:
            raise RequestRejected(
                f"request {info.request_id}: {most} tokens do not fit the KV cache of {capacity}; raise kv_blocks"
            )
        if not config.chunked_prefill and most > config.max_num_batched_tokens:
            raise RequestRejected(
                f"request {info.request_id}: {most} tokens exceed max_num_batched_tokens="
                f"{config.max_num_batched_tokens}; raise it or turn chunked_prefill on"
            )
        self.waiting.append(request)
        self._joining.append(request)
        self._queue_changed = True

    def abort(self, request: Request, reason: FinishReason, now_ns: int) -> None:
        """Ends a request between two steps and frees its blocks; no-op if it has ended."""
        if request.finish_reason is not None:
            return
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
            self._queue_changed = True
        self._finish(request, reason, now_ns)
        if request in self._joining:  # no step has seen it, so none needs to say that it left
            self._joining.remove(request)
        else:
            self._left.append((request.info.handle, reason))

    # --- a step ---------------------------------------------------------------------------------------------

    def schedule(self, now_ns: int) -> Batch:
        """Chooses the next batch. It is empty only if no request is left."""
        batch = Batch(now_ns)
        if self._joining:
            batch.joined, self._joining = self._joining, []
            for request in batch.joined:
                request.queued_ns = now_ns
        if self._left:
            batch.left, self._left = self._left, []
        budget = self._schedule_running(batch)
        if not batch.preempted:
            budget = self._admit_waiting(batch, budget)
        self._explain_waiting(batch, budget)
        batch.running = len(self.running)
        batch.waiting = len(self.waiting)
        batch.kv_used = self.blocks.used_blocks
        return batch

    def complete(self, batch: Batch, now_ns: int, stopped: Collection[Request] = ()) -> list[Request]:
        """Counts the tokens of ``batch``, whose outputs were ready at ``now_ns``; returns who finished.

        ``stopped`` are requests whose sampled token ends them; others end at their ``max_tokens``.
        """
        finished: list[Request] = []
        for request, tokens, samples in zip(batch.requests, batch.num_tokens, batch.samples, strict=True):
            if request.finish_reason is not None:  # aborted while the step was in flight
                continue
            request.computed_tokens += tokens
            if not samples:
                continue
            request.output_tokens += 1
            request.token_times_ns.append(now_ns)
            if request.output_tokens == 1:
                request.events.append(("first_token", now_ns))
            if request in stopped:
                reason = FinishReason.STOP
            elif request.output_tokens >= request.info.max_tokens:
                reason = FinishReason.LENGTH
            else:
                continue
            self._finish(request, reason, now_ns)
            batch.left.append((request.info.handle, reason))
            finished.append(request)
        if finished:
            self.running = [request for request in self.running if request.finish_reason is None]
        return finished

    def snapshot(self) -> list[RequestSnapshot]:
        """Everybody as a keyframe shows them: after admission, before the step's tokens are counted."""
        return [
            RequestSnapshot(
                request.info,
                request.state,
                request.computed_tokens,
                request.output_tokens,
                request.cached_tokens,
                len(request.blocks),
                request.wait_reason,
                request.lacking,
            )
            for queue in (self.running, self.waiting)
            for request in queue
        ]

    # --- how a batch is chosen ------------------------------------------------------------------------------

    def _schedule_running(self, batch: Batch) -> int:
        """Gives running requests their tokens, preempting the latest where blocks run out; returns the budget left."""
        budget = self.config.max_num_batched_tokens
        running = self.running
        index = 0
        while index < len(running):
            request = running[index]
            remaining = request.remaining_tokens
            tokens = min(remaining, budget)
            if tokens == 0:
                batch.paused.append((request.info.handle, 0))
                index += 1
                continue
            if not self._grow_or_preempt(request, request.computed_tokens + tokens, batch):
                break  # it was the latest itself, and lost its own blocks
            self._put(batch, request, tokens, remaining)
            budget -= tokens
            index += 1
        return budget

    def _grow_or_preempt(self, request: Request, tokens: int, batch: Batch) -> bool:
        while not self.blocks.grow(request, tokens):
            victim = self.running.pop()
            self._preempt(victim, request, batch)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request, taker: Request, batch: Batch) -> None:
        """Takes the victim's blocks and puts it at the head of the queue; its tokens are computed again."""
        self.blocks.release(victim)
        victim.state = RequestState.PREEMPTED
        victim.computed_tokens = 0
        victim.preemptions += 1
        victim.events.append(("preempted", batch.scheduled_ns))
        self.waiting.appendleft(victim)
        self._queue_changed = True
        batch.preempted.append((victim.info.handle, taker.info.handle))

    def _admit_waiting(self, batch: Batch, budget: int) -> int:
        """Admits from the head of the queue while slots, budget and blocks last; returns the budget left."""
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            tokens = remaining = request.remaining_tokens
            if tokens > budget:
                if not self.config.chunked_prefill:
                    break
                tokens = budget
            # As vLLM does, the whole input must fit before its first chunk is admitted, or half-admitted prompts
            # would fill the cache and preempt one another.
            if self._blocks_short(request) > 0 or not self.blocks.grow(request, request.computed_tokens + tokens):
                break
            self.waiting.popleft()
            self._queue_changed = True
            self.running.append(request)
            request.events.append(
                ("scheduled" if request.state is RequestState.WAITING else "resumed", batch.scheduled_ns)
            )
            request.state = RequestState.RUNNING
            request.scheduled_ns = request.scheduled_ns or batch.scheduled_ns
            request.wait_reason = None
            self._put(batch, request, tokens, remaining)
            budget -= tokens
        return budget

    def _put(self, batch: Batch, request: Request, tokens: int, remaining: int) -> None:
        # More than the last token is missing from the KV cache: prompt, or recompute after a preemption.
        if remaining > 1 or request.output_tokens == 0:
            batch.prefill_tokens += tokens
            batch.chunks.append((request.info.handle, tokens))
        else:
            batch.decode_tokens += tokens
        batch.requests.append(request)
        batch.num_tokens.append(tokens)
        batch.starts.append(request.computed_tokens)
        batch.samples.append(tokens == remaining)

    def _available_blocks(self) -> int:
        """Free blocks for admission: the watermark is kept free unless nothing runs."""
        return self.blocks.free_blocks - (self.config.watermark_blocks if self.running else 0)

    def _blocks_short(self, request: Request) -> int:
        """Blocks missing to admit the request's whole input (0 or less: it fits)."""
        return self.blocks.lacking(request, request.total_tokens) - self._available_blocks()

    # --- why the others wait --------------------------------------------------------------------------------

    def _explain_waiting(self, batch: Batch, budget: int) -> None:
        """Notes for each waiting request what it lacks, in the order in which admission asks.

        Judged again only when the queue or the room changed, and written only where the reason changed.
        """
        if not self.waiting:
            self._queue_changed = False
            return
        room = (self.config.max_num_seqs - len(self.running), budget, self._available_blocks())
        if room == self._room and not self._queue_changed and not batch.preempted:
            return
        self._room = room
        self._queue_changed = False
        slots, _, _ = room
        chunked = self.config.chunked_prefill
        for request in self.waiting:
            reason, lacking = WaitReason.HEAD, 0
            if slots <= 0:
                reason, lacking = WaitReason.SLOTS, 1
            elif budget <= 0 or (not chunked and request.remaining_tokens > budget):
                reason, lacking = WaitReason.BUDGET, request.remaining_tokens - max(budget, 0)
            elif (short := self._blocks_short(request)) > 0:
                reason, lacking = WaitReason.KV, short
            if request.wait_reason is not reason:
                request.wait_reason, request.lacking = reason, lacking
                batch.waits.append((request.info.handle, reason, lacking))

    def _finish(self, request: Request, reason: FinishReason, now_ns: int) -> None:
        request.finish_reason = reason
        request.end_ns = now_ns
        request.events.append(("finished", now_ns))
        self.blocks.release(request)
