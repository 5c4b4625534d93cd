"""Shortest remaining work first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from stallscope_engine.config import EngineConfig
from stallscope_engine.policies.base import Policy
from stallscope_engine.policies.queues import SortedQueue
from stallscope_engine.request import Request

if TYPE_CHECKING:
    from stallscope_engine.scheduler import Batch, Scheduler


class ShortestRemaining(Policy):
    """Who has the fewest tokens to go is admitted first, and gets its tokens of a step first.

    A decode's one token is always the least; a prompt in chunks yields to every shorter one. How long an answer will
    be is not known, so ``max_tokens`` stands for it. Long requests starve while shorter ones keep coming: the mean
    is the best there is (Schrage, Operations Research 16(3), 1968), their tail is not.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.waiting = SortedQueue(_tokens_to_go)

    def compose(self, scheduler: Scheduler, batch: Batch) -> None:
        prefills = [request for request in scheduler.running if request.prefills]
        scheduler.go_on(batch, [request for request in scheduler.running if not request.prefills])
        for request in sorted(prefills, key=_tokens_to_go):
            if not batch.preempts:
                scheduler.admit(batch, partial(_is_shorter, request))
            scheduler.go_on(batch, [request])
        if not batch.preempts:
            scheduler.admit(batch)

    def victim(self, running: Sequence[Request]) -> Request:
        return max(running, key=_tokens_to_go)


def _tokens_to_go(request: Request) -> int:
    return request.tokens_to_go


def _is_shorter(than: Request, request: Request) -> bool:
    return request.tokens_to_go < than.tokens_to_go
