"""Schedulers that live under the benchmark alone: two that no replay has, and one that a relaxation needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stallscope_engine import config as engine_config
from stallscope_engine.config import EngineConfig
from stallscope_engine.policies import BY_NAME
from stallscope_engine.policies.base import Policy
from stallscope_engine.policies.fcfs import FirstComeFirstServed
from stallscope_engine.policies.queues import NOBODY, ArrivalQueue, SortedQueue, account_of
from stallscope_engine.request import Request
from stallscope_telemetry.records import WaitReason

if TYPE_CHECKING:
    from stallscope_engine.scheduler import Batch, Scheduler

AGEING_TOKENS_PER_S = 2000


class ShortestPromptAged(FirstComeFirstServed):
    """Shortest prompt first, where each second of waiting makes a prompt ``AGEING_TOKENS_PER_S`` shorter.

    All that wait age alike, so the order is that of prompt and arrival together, and never changes.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.waiting = SortedQueue(_aged_tokens)


def _aged_tokens(request: Request) -> int:
    return request.info.prompt_tokens + request.info.arrival_ns * AGEING_TOKENS_PER_S // 1_000_000_000


class TwoQueues(Policy):
    """Prompts and decodes in queues of their own, which take turns: a step is prefill alone or decode alone."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._decodes_next = False

    def compose(self, scheduler: Scheduler, batch: Batch) -> None:
        turns = (self._decode, self._prefill) if self._decodes_next else (self._prefill, self._decode)
        for turn in turns:
            turn(scheduler, batch)
            if batch.requests:
                self._decodes_next = turn == self._prefill
                return

    @staticmethod
    def _prefill(scheduler: Scheduler, batch: Batch) -> None:
        scheduler.go_on(batch, [request for request in scheduler.running if request.prefills])
        if not batch.preempts:
            scheduler.admit(batch)

    @staticmethod
    def _decode(scheduler: Scheduler, batch: Batch) -> None:
        scheduler.go_on(batch, [request for request in scheduler.running if not request.prefills])


class SkipsWhatDoesNotFit(FirstComeFirstServed):
    """First come, first served, but who lacks KV blocks is passed over for those behind who don't."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._queue = _SkippingQueue()
        self.waiting = self._queue

    def compose(self, scheduler: Scheduler, batch: Batch) -> None:
        self._queue.passed_over.clear()
        scheduler.go_on(batch)
        while not batch.preempts and scheduler.admit(batch) is WaitReason.KV:
            head = self._queue.head()
            if head is None:
                return
            self._queue.passed_over.add(head)


class _SkippingQueue(ArrivalQueue):
    def __init__(self) -> None:
        super().__init__()
        self.passed_over: set[Request] = set()

    def head(self, skip: Collection[str] = NOBODY) -> Request | None:
        return next((one for one in self if one not in self.passed_over and account_of(one) not in skip), None)


UNKNOWN_TO_REPLAY: dict[str, type[Policy]] = {"shortest_prompt_aged": ShortestPromptAged, "two_queues": TwoQueues}
SKIPPING = "skips_what_does_not_fit"
_ALL = UNKNOWN_TO_REPLAY | {SKIPPING: SkipsWhatDoesNotFit}


@contextmanager
def registered() -> Iterator[None]:
    """While it is open, engines of this process know the policies above; an analyzer is called outside of it."""
    known = engine_config.POLICIES
    BY_NAME.update(_ALL)
    setattr(engine_config, "POLICIES", (*known, *_ALL))  # noqa: B010 - a constant for everybody but the benchmark
    try:
        yield
    finally:
        for name in _ALL:
            del BY_NAME[name]
        setattr(engine_config, "POLICIES", known)  # noqa: B010
