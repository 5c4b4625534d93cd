"""Why the requests in vLLM's queues wait, as ``watch`` tells it after each batch: only where the reason is another one.

Who waits is looked at again only where something has changed for it: what is scarce, who is first, or the free blocks
past those that it needs. So a long queue costs no more than a short one, but for the steps in which another thing
becomes scarce than before.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from vllm.v1.request import RequestStatus

from stallscope_telemetry.records import WaitReason
from stallscope_telemetry.vllm.lives import NEVER, Life

_OWN_CONDITIONS = {
    RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR: WaitReason.GRAMMAR,
    RequestStatus.WAITING_FOR_REMOTE_KVS: WaitReason.REMOTE_KV,
}


class Waits:
    """Who waits in a vLLM scheduler, and for what. ``lives`` are all its requests, by id."""

    def __init__(self, scheduler: Any, lives: Mapping[str, Life]) -> None:
        self._scheduler = scheduler
        self._lives = lives
        self._queues = (scheduler.kv_holding_waiting, scheduler.waiting)  # in the order in which vLLM asks
        self._deferred = scheduler.deferred_waiting
        self._pool = scheduler.kv_cache_manager.block_pool
        self._watermark: int = scheduler.kv_cache_manager.watermark_blocks
        self._block_size: int = scheduler.block_size
        self._most_running: int = scheduler.max_num_active_reqs
        self._chunked: bool = scheduler.scheduler_config.enable_chunked_prefill
        self._most_adapters: int = scheduler.lora_config.max_loras if scheduler.lora_config else NEVER
        self.count = 0  # of those who waited when ``changes`` was last asked for
        self._waiting: dict[int, Life] = {}  # by handle
        self._by_need: list[tuple[int, int]] = []  # blocks and handle of each, least first
        # As the last reasons were found:
        self._scarce = WaitReason.HEAD
        self._free = 0
        self._head: Life | None = None
        self._adapters: set[int] = set()  # of who runs, where they are scarce
        self._unusual: list[Life] = []  # who may have had a reason of its own
        self._new: list[Life] = []  # who came since

    def requests(self) -> Iterator[Any]:
        """vLLM's own, in the order in which it asks."""
        return chain.from_iterable(self._queues)

    def enter(self, life: Life) -> None:
        """It waits from now on: it has arrived, or lost its blocks."""
        self._waiting[life.handle] = life
        self._new.append(life)

    def leave(self, life: Life) -> None:
        """It was admitted, or has ended; if it did not wait, nothing happens."""
        if self._waiting.pop(life.handle, None) is not None:
            if life.need_blocks:
                del self._by_need[bisect_left(self._by_need, (life.need_blocks, life.handle))]
            life.need_blocks, life.wait_reason = 0, None

    def changes(self, budget: int) -> list[tuple[int, int, int]]:
        """Handle, reason and what is lacking of each whose reason is not what it was; ``budget``: tokens left over."""
        blocked, waiting = self._queues
        self.count = len(blocked) + len(waiting)
        if len(self._waiting) != self.count:
            self._take_stock()
        if not self._waiting:
            self._new.clear()
            return []
        self._rank_new()
        running = len(self._scheduler.running)
        free = self._pool.get_num_free_blocks() - (self._watermark if running else 0)
        scarce = (
            WaitReason.SLOTS if running >= self._most_running else WaitReason.BUDGET if budget <= 0 else WaitReason.KV
        )
        adapters, self._adapters = self._adapters, self._scarce_adapters() if scarce is WaitReason.KV else set()
        head = self._first() if scarce is WaitReason.KV else None
        changed: list[tuple[int, int, int]] = []
        is_other = scarce is not self._scarce or adapters != self._adapters
        for life in self._to_judge(scarce, free, head, is_other):
            reason, lacking = self._lacks(life, scarce, budget, free, head)
            if reason is not life.wait_reason:
                life.wait_reason, life.lacking = reason, lacking
                changed.append((life.handle, reason, lacking))
        self._scarce, self._free, self._head = scarce, free, head
        self._new = []
        return changed

    def _rank_new(self) -> None:
        """Finds a place for those who came, but for whom the next batch took at once: most of them, on most days."""
        self._new = [life for life in self._new if self._waiting.get(life.handle) is life]
        for life in self._new:
            if not life.need_blocks:
                life.need_blocks = -(-life.request.num_tokens // self._block_size)
                insort(self._by_need, (life.need_blocks, life.handle))

    def _to_judge(self, scarce: WaitReason, free: int, head: Life | None, is_other: bool) -> Iterable[Life]:
        """Everybody whose reason may be another one now."""
        unusual = self._unusual
        self._unusual = [life for one in self._deferred if (life := self._lives.get(one.request_id)) is not None]
        if is_other or not self._chunked:
            return self._waiting.values()
        suspects = [*self._new, *unusual, *self._unusual]
        if scarce is WaitReason.KV:
            suspects += [one for one in (self._head, head) if one is not None]
            less, more = sorted((self._free, free))
            between = slice(*(bisect_right(self._by_need, (blocks, NEVER)) for blocks in (less, more)))
            suspects += [self._waiting[handle] for _, handle in self._by_need[between]]
        return [life for life in suspects if life.handle in self._waiting]

    def _lacks(
        self, life: Life, scarce: WaitReason, budget: int, free: int, head: Life | None
    ) -> tuple[WaitReason, int]:
        request = life.request
        if (own := _OWN_CONDITIONS.get(request.status)) is not None:
            return own, 0
        if scarce is WaitReason.SLOTS:
            return scarce, 1
        if scarce is WaitReason.BUDGET or (not self._chunked and request.num_tokens > budget):
            return WaitReason.BUDGET, request.num_tokens - budget
        if self._lacks_adapter(request):
            return WaitReason.ADAPTER, 1
        short = life.need_blocks - free
        if short > 0 or life is head:
            return WaitReason.KV, max(short, 0)
        return WaitReason.HEAD, 0

    def _first(self) -> Life | None:
        """Who is asked first of those that could be admitted."""
        for request in self.requests():
            if request.status not in _OWN_CONDITIONS and not self._lacks_adapter(request):
                return self._lives.get(request.request_id)
        return None

    def _scarce_adapters(self) -> set[int]:
        """Those that run, where no other may join them."""
        if self._most_adapters == NEVER:
            return set()
        running = {one.lora_request.lora_int_id for one in self._scheduler.running if one.lora_request}
        return running if len(running) >= self._most_adapters else set()

    def _lacks_adapter(self, request: Any) -> bool:
        adapter = request.lora_request
        return bool(self._adapters and adapter and adapter.lora_int_id not in self._adapters)

    def _take_stock(self) -> None:
        """Begins anew where somebody came or went in a way that is not watched."""
        there = {life.handle: life for one in self.requests() if (life := self._lives.get(one.request_id))}
        for handle in self._waiting.keys() - there.keys():
            self.leave(self._waiting[handle])
        for handle in there.keys() - self._waiting.keys():
            self.enter(there[handle])
