"""Iteration-level scheduling: makes each step's batch as its policy decides, and says why everybody else waits.

Plain Python without torch, clock or I/O, so that the engine that serves and the replay that answers "what if" are
the same code. Here is the mechanism: slots, token budget, KV blocks, preemption, what is recorded. Who goes first is
``policies``'.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from stallscope_engine.block_manager import BlockManager
from stallscope_engine.config import EngineConfig
from stallscope_engine.policies import BY_NAME, Policy
from stallscope_engine.policies.queues import WaitingQueue, account_of
from stallscope_engine.policies.quotas import TenantQuotas
from stallscope_engine.request import Request
from stallscope_telemetry.records import FinishReason, RequestSnapshot, RequestState, WaitReason


class RequestRejected(ValueError):
    """The request could never run under this configuration; the message says which limit it breaks."""


@dataclass(eq=False, slots=True)
class Batch:
    """One step's work, recorded as it was when scheduled, and what changed since the step before.

    ``requests``, ``num_tokens`` and ``starts`` are parallel: request i computes ``num_tokens[i]`` tokens from
    position ``starts[i]`` on; it samples a token when that makes its KV cache complete (``samples[i]``).
    The lists of handles are those of ``StepRecord``. ``budget`` is what is left of the step's tokens.
    """

    scheduled_ns: int = 0
    requests: list[Request] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    prefill_tokens: int = 0
    decode_tokens: int = 0
    joined: list[Request] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    cached: list[tuple[int, int]] = field(default_factory=list)
    paused: list[tuple[int, int]] = field(default_factory=list)  # runs, but takes no token in this step: (handle, 0)
    waits: list[tuple[int, int, int]] = field(default_factory=list)
    preempted: list[tuple[int, int]] = field(default_factory=list)
    evicted: list[tuple[int, int, int]] = field(default_factory=list)
    left: list[tuple[int, int]] = field(default_factory=list)
    size: int = 0
    running: int = 0
    waiting: int = 0
    kv_used: int = 0
    kv_cached: int = 0
    budget: int = 0
    preempts: bool = False  # blocks were taken from somebody in this pass


class Scheduler:
    """Owns the waiting queue, the running list and the blocks; one of each per replica."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.policy = BY_NAME[config.policy](config)
        self.quotas = TenantQuotas.of(config)
        self.blocks = BlockManager(config.kv_blocks, config.block_size, config.prefix_caching)
        self.running: list[Request] = []
        self._next = Batch()  # gathers who joined and left until a step is scheduled
        self._in_flight: deque[Batch] = deque()
        self._over_quota: dict[str, int] = {}  # account: what its next request lacks
        self._room: tuple[object, ...] | None = None  # what the last wait reasons were judged on
        self._queue_changed = False
        self._policy_counts = type(self.policy).computed is not Policy.computed

    @property
    def waiting(self) -> WaitingQueue:
        """Requests that wait, in the order in which they would be admitted."""
        return self.policy.waiting

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.policy.waiting)

    # --- requests come and go -------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues a new request. Raises RequestRejected as ``check`` does."""
        self.check(request)
        self.policy.queued(request)
        self.policy.waiting.push(request)
        self._next.joined.append(request)
        self._queue_changed = True

    def check(self, request: Request) -> None:
        """Raises RequestRejected where a request could never finish.

        That is: more tokens than the KV cache or its tenant's share of it holds or, without chunked prefill, than a
        step's budget.
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
        if self.quotas and account_of(request) and self.blocks.blocks_for(most) > self.quotas.kv_blocks:
            raise RequestRejected(
                f"request {info.request_id}: {most} tokens do not fit the {self.quotas.kv_blocks * config.block_size} "
                f"that tenant {info.tenant} may hold; raise tenant_kv_share"
            )

    def resume(self, running: Sequence[Request], waiting: Sequence[Request]) -> None:
        """Goes on where another run stood, as a new scheduler.

        ``running`` by admission, with what they have computed; ``waiting`` in the order of arrival. Who does not find
        its blocks free waits like one that was preempted.
        """
        lost = []
        for request in running:
            self.policy.queued(request)
            held = self.policy.held_tokens(request, request.computed_tokens)
            self.blocks.share(request, self.blocks.match(request)[: request.computed_tokens // self.config.block_size])
            if self.blocks.grow(request, held):
                request.state = RequestState.RUNNING
                self.blocks.keep(request)
                self.running.append(request)
            else:
                self.blocks.release(request)
                request.computed_tokens = request.cached_now = 0
                request.state = RequestState.PREEMPTED
                lost.append(request)
        for request in waiting:
            self.policy.queued(request)
            self.policy.waiting.push(request)
        for request in reversed(lost):
            self.policy.put_back(request)
        self._queue_changed = True

    def abort(self, request: Request, reason: FinishReason, now_ns: int) -> None:
        """Ends a request between two steps and frees its blocks; no-op if it has ended."""
        if request.finish_reason is not None:
            return
        self._take_out(request)
        self._finish(request, reason, now_ns)
        if request in self._next.joined:  # no step has seen it, so none needs to say that it left
            self._next.joined.remove(request)
        else:
            self._next.left.append((request.info.handle, reason))

    # --- a step ---------------------------------------------------------------------------------------------

    def schedule(self, now_ns: int) -> Batch | None:
        """Chooses the next batch; None where there is nothing to compute before a step in flight is complete."""
        batch = self._next
        batch.scheduled_ns = now_ns
        batch.budget = self.config.max_num_batched_tokens
        batch.preempts = False
        for request in batch.joined:
            request.queued_ns = request.queued_ns or now_ns
        if self.quotas:
            self.quotas.begin_step()
            self._over_quota.clear()
        self.policy.compose(self, batch)
        if not batch.requests:
            return None
        self._next = Batch()
        self._explain_waiting(batch)
        self._commit(batch)
        self._in_flight.append(batch)
        return batch

    def complete(self, batch: Batch, now_ns: int, stopped: Collection[Request] = ()) -> list[Request]:
        """Counts the output of the oldest ``batch`` in flight, ready at ``now_ns``; returns who finished.

        ``stopped`` are requests whose sampled token ends them; others end at ``stop_after`` or ``max_tokens``. Where
        a later step was scheduled already, that one says who left, for they still stand in it, and a token that it
        decodes for them counts for nothing.
        """
        if self._in_flight.popleft() is not batch:
            raise ValueError("batches are completed in the order in which they were scheduled")
        told_by = self._in_flight[-1] if self._in_flight else batch
        finished: list[Request] = []
        for request, tokens, samples in zip(batch.requests, batch.num_tokens, batch.samples, strict=True):
            if request.finish_reason is not None:  # aborted, or stopped, while the step was in flight
                if (request.info.handle, tokens) not in batch.chunks:
                    batch.decode_tokens -= tokens
                    batch.size -= 1
                    batch.paused.append((request.info.handle, 0))
                continue
            if not samples:
                continue
            request.pending_tokens -= 1
            request.output_tokens = made = request.output_tokens + 1
            request.token_times_ns.append(now_ns)
            if made == 1:
                request.events.append(("first_token", now_ns))
            if made == request.stop_after or (stopped and request in stopped):
                reason = FinishReason.STOP
            elif made >= request.info.max_tokens:
                reason = FinishReason.LENGTH
            else:
                continue
            if request.state is RequestState.PREEMPTED:
                self._take_out(request)
            self._finish(request, reason, now_ns)
            told_by.left.append((request.info.handle, reason))
            finished.append(request)
        if finished:
            self.running = [request for request in self.running if request.finish_reason is None]
        return finished

    def lose_in_flight(self) -> None:
        """Takes back all steps in flight, whose outputs will never come: what they computed is to be computed again."""
        while self._in_flight:
            batch = self._in_flight.pop()
            for request, start, samples in zip(batch.requests, batch.starts, batch.samples, strict=True):
                request.pending_tokens -= samples
                del request.output_token_ids[request.output_tokens + request.pending_tokens :]
                if request.state is RequestState.RUNNING and request.finish_reason is None:
                    self.blocks.forget(request, start)
                    request.computed_tokens = min(request.computed_tokens, start)

    def snapshot(self, batch: Batch) -> list[RequestSnapshot]:
        """Everybody as a keyframe of ``batch`` shows them: after admission, before the step's tokens are counted.

        Outputs of earlier steps in flight count as made: by the time the record is read, they were.
        """
        starts = dict(zip(batch.requests, batch.starts, strict=True))
        sampling = {request for request, samples in zip(batch.requests, batch.samples, strict=True) if samples}
        return [
            RequestSnapshot(
                request.info,
                request.state,
                starts.get(request, request.computed_tokens),
                request.output_tokens + request.pending_tokens - (request in sampling),
                request.cached_tokens,
                len(request.blocks),
                request.wait_reason,
                request.lacking,
            )
            for queue in (self.running, self.policy.waiting)
            for request in queue
        ]

    # --- what a policy composes a step from -----------------------------------------------------------------

    def go_on(self, batch: Batch, requests: Sequence[Request] | None = None) -> None:
        """Gives running requests (without ``requests`` all, as admitted) their tokens, preempting where blocks run out.

        A request for which no budget is left, or whose last token is in flight, takes none.
        """
        # The request's properties and ``_put`` are written out: nothing else runs as often.
        block_size, running, quotas = self.config.block_size, RequestState.RUNNING, self.quotas
        members, num_tokens, starts, samples = batch.requests, batch.num_tokens, batch.starts, batch.samples
        for request in self.running.copy() if requests is None else requests:
            if batch.budget <= 0:
                break
            made, info = request.output_tokens + request.pending_tokens, request.info
            if request.state is not running or made >= info.max_tokens:
                continue  # or it has just lost its blocks to one before it
            start = request.computed_tokens
            remaining = info.prompt_tokens + made - start
            tokens = 1 if remaining == 1 else self._most_tokens(request, remaining, batch.budget)
            end = start + tokens
            if tokens and (end <= len(request.blocks) * block_size or self._grow_or_preempt(request, end, batch)):
                members.append(request)
                num_tokens.append(tokens)
                starts.append(start)
                samples.append(tokens == remaining)
                batch.budget -= tokens
                if quotas and request.prefills:
                    quotas.spend(request, tokens)

    def admit(self, batch: Batch, wanted: Callable[[Request], bool] | None = None) -> WaitReason | None:
        """Admits from the queue while slots, budget, blocks and quotas last; returns what was short, if anything.

        ``wanted`` ends it at the first request for which it is false. Who is over its quota is passed over, with all
        of its tenant, and the next one is looked at.
        """
        waiting = self.policy.waiting
        while (request := waiting.head(self._over_quota)) is not None:
            if wanted is not None and not wanted(request):
                return None
            if len(self.running) >= self.config.max_num_seqs:
                return WaitReason.SLOTS
            if batch.budget <= 0:
                return WaitReason.BUDGET
            short = self._admit_one(request, batch)
            if short is not None and short is not WaitReason.QUOTA:
                return short
        return None

    # --- how it is done -------------------------------------------------------------------------------------

    def _most_tokens(self, request: Request, remaining: int, budget: int) -> int:
        """Tokens of a prefill's ``remaining`` ones that a step may compute (0: its tenant has had its share)."""
        tokens = min(remaining, budget, self.config.long_prefill_token_threshold or remaining)
        if self.quotas and (left := self.quotas.tokens_left(request)) is not None:
            tokens = min(tokens, max(left, 0))
        return tokens

    def _admit_one(self, request: Request, batch: Batch) -> WaitReason | None:
        """Admits ``request``; if it can't be, says what is short."""
        matched = self.blocks.match(request)
        cached = len(matched) * self.config.block_size
        request.computed_tokens = request.cached_now = cached
        remaining = request.remaining_tokens
        tokens = self._most_tokens(request, remaining, batch.budget)
        if tokens < remaining and not self.config.chunked_prefill:
            if remaining > batch.budget:
                return self._turn_away(request, WaitReason.BUDGET)
            # The whole prompt or nothing: one that is larger than its tenant's share goes when it is the only one.
            if self.quotas and self.quotas.tokens_left(request) != self.quotas.step_tokens:
                return self._turn_away(request, WaitReason.QUOTA, remaining - tokens)
            tokens = remaining
        if tokens == 0:
            return self._turn_away(request, WaitReason.QUOTA, remaining)
        room = self.blocks.blocks_for(self.policy.room_tokens(request)) - len(matched)
        if self.quotas and (over := self.quotas.blocks_over(request, room + len(matched), self.running)) > 0:
            return self._turn_away(request, WaitReason.QUOTA, over)
        if room > self._available_blocks() - self.blocks.unused(matched):
            return self._turn_away(request, WaitReason.KV)

        self.policy.waiting.remove(request)
        self.blocks.share(request, matched)
        self.blocks.grow(request, self.policy.held_tokens(request, cached + tokens))
        self.running.append(request)
        self._queue_changed = True
        request.events.append(("scheduled" if request.state is RequestState.WAITING else "resumed", batch.scheduled_ns))
        if request.state is RequestState.WAITING:
            request.cached_tokens = cached
        if cached:
            batch.cached.append((request.info.handle, cached))
        request.state = RequestState.RUNNING
        request.scheduled_ns = request.scheduled_ns or batch.scheduled_ns
        request.wait_reason = None
        self.policy.admitted(request)
        self._put(batch, request, tokens, remaining)
        return None

    def _turn_away(self, request: Request, reason: WaitReason, lacking: int = 0) -> WaitReason:
        request.computed_tokens = request.cached_now = 0
        if reason is WaitReason.QUOTA:
            self._over_quota[account_of(request)] = lacking
        return reason

    def _put(self, batch: Batch, request: Request, tokens: int, remaining: int) -> None:
        batch.requests.append(request)
        batch.num_tokens.append(tokens)
        batch.starts.append(request.computed_tokens)
        batch.samples.append(tokens == remaining)
        batch.budget -= tokens
        if self.quotas and request.prefills:
            self.quotas.spend(request, tokens)

    @staticmethod
    def _put_out(batch: Batch, request: Request) -> None:
        index = batch.requests.index(request)
        batch.budget += batch.num_tokens[index]
        for column in (batch.requests, batch.num_tokens, batch.starts, batch.samples):
            del column[index]

    def _grow_or_preempt(self, request: Request, tokens: int, batch: Batch) -> bool:
        while not self.blocks.grow(request, tokens):
            victim = self.policy.victim(self.running)
            self._preempt(victim, request, batch)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request, taker: Request, batch: Batch) -> None:
        """Takes the victim's blocks and queues it again; its tokens are computed again."""
        if victim in batch.requests:
            self._put_out(batch, victim)
        self.running.remove(victim)
        self.blocks.release(victim)
        victim.state = RequestState.PREEMPTED
        victim.computed_tokens = victim.cached_now = 0
        victim.preemptions += 1
        victim.events.append(("preempted", batch.scheduled_ns))
        self.policy.put_back(victim)
        self._queue_changed = True
        batch.preempted.append((victim.info.handle, taker.info.handle))
        batch.preempts = True

    def _commit(self, batch: Batch) -> None:
        """Counts the batch's tokens as computed, since no later step runs before it, and closes its books."""
        caches, policy_counts, prefill_tokens = self.blocks.prefix_caching, self._policy_counts, 0
        for request, tokens, samples in zip(batch.requests, batch.num_tokens, batch.samples, strict=True):
            made, computed = request.output_tokens + request.pending_tokens, request.computed_tokens
            # ``Request.prefills``, written out
            prefills = computed + 1 < request.info.prompt_tokens + made or computed == request.cached_now or not made
            if prefills:
                prefill_tokens += tokens
                batch.chunks.append((request.info.handle, tokens))
            if policy_counts:
                self.policy.computed(request, tokens, not prefills)
            request.computed_tokens = computed + tokens
            request.pending_tokens += samples
            if caches:
                self.blocks.keep(request)
        batch.prefill_tokens = prefill_tokens
        batch.decode_tokens = sum(batch.num_tokens) - prefill_tokens
        if len(batch.requests) < len(self.running):
            taking = set(batch.requests)
            batch.paused = [(request.info.handle, 0) for request in self.running if request not in taking]
        if self.blocks.evicted:
            batch.evicted = [(*pair, blocks) for pair, blocks in self.blocks.evicted.items()]
            self.blocks.evicted.clear()
        batch.size = len(batch.requests)
        batch.running = len(self.running)
        batch.waiting = len(self.policy.waiting)
        batch.kv_used = self.blocks.used_blocks
        batch.kv_cached = self.blocks.reusable_blocks

    def _take_out(self, request: Request) -> None:
        """Removes a request from where it stands: queue or batch."""
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
        else:
            self.policy.waiting.remove(request)
            self._queue_changed = True

    def _finish(self, request: Request, reason: FinishReason, now_ns: int) -> None:
        request.finish_reason = reason
        request.end_ns = now_ns
        del request.output_token_ids[request.output_tokens :]  # what a step in flight computed beyond its end
        request.events.append(("finished", now_ns))
        self.blocks.release(request)

    # --- why the others wait --------------------------------------------------------------------------------

    def _available_blocks(self) -> int:
        """Free blocks for admission, without those that the policy keeps for the running ones."""
        return self.blocks.free_blocks - self.policy.headroom_blocks(self.running)

    def _explain_waiting(self, batch: Batch) -> None:
        """Notes for each waiting request what it lacks, in the order in which admission asks.

        Judged again only when the queue or the room changed, and written only where the reason changed. What the
        prefix cache would spare a request is looked up when its turn comes, not here.
        """
        waiting = self.policy.waiting
        if not waiting:
            self._queue_changed = False
            return
        slots = 0 if self.policy.closed else self.config.max_num_seqs - len(self.running)
        available = self._available_blocks()
        room = (slots, batch.budget, available, *self._over_quota.items())
        if room == self._room and not self._queue_changed:
            return
        self._room = room
        self._queue_changed = False
        head = waiting.head(self._over_quota)
        for request in waiting:
            reason, lacking = self._lacks(request, slots, batch.budget, available, head)
            if request.wait_reason is not reason:
                request.wait_reason, request.lacking = reason, lacking
                batch.waits.append((request.info.handle, reason, lacking))

    def _lacks(
        self, request: Request, slots: int, budget: int, available: int, head: Request | None
    ) -> tuple[WaitReason, int]:
        """What keeps ``request`` waiting, and how much of it is missing."""
        if self._over_quota and (account := account_of(request)) in self._over_quota:
            return WaitReason.QUOTA, self._over_quota[account]
        if slots <= 0:
            return WaitReason.SLOTS, 1
        if budget <= 0 or (not self.config.chunked_prefill and request.remaining_tokens > budget):
            return WaitReason.BUDGET, request.remaining_tokens - max(budget, 0)
        short = self.blocks.blocks_for(self.policy.room_tokens(request)) - available
        if short > 0:
            return WaitReason.KV, short
        return WaitReason.HEAD if head is None else self.policy.reason_behind(head, request), 0
